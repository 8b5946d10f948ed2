"""What is asked, the most telling first, and how long each step may take in a run of twenty minutes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import asked, parity, timed
from .machine import Gpu, checkout

Items = Callable[[Gpu], Iterator[tuple[str, Callable[[], dict[str, Any]]]]]
MINUTES = 20.0  # that the times below add up to


@dataclass(frozen=True)
class Step:
    """One step: its items in a process of their own, or a command; `under` gives the command that the process runs in.

    Both functions take whether the run is dry, and give words, or the reason why the step is skipped.
    """

    name: str
    title: str
    seconds: int
    items: Items | None = None
    command: Callable[[bool], list[str] | str] | None = None
    under: Callable[[bool], list[str] | str] | None = None


def _backend(name: str, gpu: Gpu) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    return parity.items(gpu, name, few=gpu.dry)


def _few(gpu: Gpu) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    return parity.items(gpu, "cuda", few=True)


def _doctor(dry: bool) -> list[str]:
    return [sys.executable, "-m", "fiun_fast.cli", "doctor"]


def _sanitizer(tool: str, dry: bool) -> list[str] | str:
    homes = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    folders = [os.environ.get("PATH", ""), *(str(home / "bin") for home in homes)]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        return "compute-sanitizer was not found: it comes with the CUDA toolkit"
    return [found, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]


def _suite(dry: bool) -> list[str] | str:
    root = checkout()
    if root is None:
        return "the tests are in a checkout only"
    if missing := [name for name in ("pytest", "hypothesis", "networkx") if importlib.util.find_spec(name) is None]:
        return f"{missing[0]} is not installed"
    files = ("test_gpu.py",) if dry else ("test_gpu.py", "test_triton_gpu.py", "test_parity.py")
    paths = [str(root / "tests" / "kernels" / name) for name in files]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *paths]


STEPS = (
    Step("doctor", "what is installed, which backends work", 40, command=_doctor),
    Step("parity-cuda", "the cuda backend against the textbook", 60, partial(_backend, "cuda")),
    Step("parity-triton", "the triton backend against the textbook", 120, partial(_backend, "triton")),
    Step("checks", "graphs, streams, two devices, offsets beyond 32 bits", 80, asked.checks),
    Step("bench", "benchmark cases beside a copy and torch.compile", 400, timed.cases),
    Step("costs", "the host's time and memory", 60, asked.costs),
    Step("sweep", "launch settings of the Triton kernels", 150, timed.sweep),
    Step("memcheck", "accesses of the CUDA kernels", 75, _few, under=partial(_sanitizer, "memcheck")),
    Step("racecheck", "races in the CUDA kernels", 75, _few, under=partial(_sanitizer, "racecheck")),
    Step("suite", "the tests of a checkout", 140, command=_suite),
)
