"""The GPU as the steps see it, and what stands in for it in a dry run. No step asks torch.cuda itself."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import kernels

BACKENDS = ("cuda", "triton")


class SkippedError(Exception):
    """An item needs what this machine lacks; the message says what."""


class Gpu:
    """An NVIDIA GPU, or an AMD one under ROCm."""

    kind, dry = "cuda", False

    def count(self) -> int:
        """How many devices there are."""
        return torch.cuda.device_count()

    def device(self, index: int = 0) -> torch.device:
        """One of them."""
        return torch.device("cuda", index)

    def backend(self, name: str) -> str:
        """The name under which a backend is known; raises SkippedError where it does not work here."""
        reason = kernels.load(name).why_not(self.kind)
        if reason is not None:
            raise SkippedError(f"backend {name}: {reason}")
        return name

    def wait(self) -> None:
        """Until all devices have done what they were asked for."""
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On another stream, after what the present one was given; the present one goes on after it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def delay(self) -> None:
        """Keep the current stream busy for some hundredths of a second."""
        torch.cuda._sleep(50_000_000)

    def captured(self, run: Callable[[], object]) -> Callable[[], None]:
        """What replays `run`, captured in a graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Inside, waiting for the device is an error."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def allocations(self) -> int:
        """How often memory was asked for so far."""
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    def free_bytes(self) -> int:
        """Of the current device."""
        return torch.cuda.mem_get_info()[0]

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes that `run` takes at most, on top of what is there before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class StandIn(Gpu):
    """The CPU, for a dry run: a stream is nothing, a graph is the function itself."""

    kind, dry = "cpu", True

    def __init__(self) -> None:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the Triton kernels are imported

    def count(self) -> int:
        """Two, both the same."""
        return 2

    def device(self, index: int = 0) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def backend(self, name: str) -> str:
        """For `cuda`, its kernels on the tests' shim in a checkout that has been built, else the C++ backend."""
        if name != "cuda":
            return super().backend(name)
        shim = shim_of(checkout())
        return super().backend("cpu" if shim is None else shim)

    def wait(self) -> None:
        """Nothing is under way."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The same."""
        yield

    def delay(self) -> None:
        """None."""

    def captured(self, run: Callable[[], object]) -> Callable[[], None]:
        """The function."""
        return lambda: (run(), None)[1]

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """A CPU never waits for itself."""
        yield

    def allocations(self) -> int:
        """Not counted."""
        return 0

    def free_bytes(self) -> int:
        """None to spare."""
        return 0

    def peak(self, run: Callable[[], object]) -> int:
        """Not measured."""
        run()
        return 0


def machine(dry: bool) -> Gpu:
    """The GPU of this machine, or what stands in for it."""
    return StandIn() if dry else Gpu()


def checkout() -> Path | None:
    """The checkout that this package lies in, with its tests; None for an installed one."""
    root = Path(__file__).parents[2]
    return root if (root / "tests" / "kernels" / "test_parity.py").exists() else None


def shim_of(root: Path | None) -> str | None:
    """The backend of the CUDA kernels on the CPU, made known; None where there is no checkout or no compiler."""
    if root is None:
        return None
    folder = str(root / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    shim: Any = importlib.import_module("shim")
    if shim.why_not() is not None:
        return None
    kernels.register(shim.backend())
    return shim.NAME
