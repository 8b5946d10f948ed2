"""The command `fiun-fast gpu`: each step in a process of its own, with its own time; one JSON and one page.

Both are written anew after every step, so that what is known survives whatever ends the run.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..bench.files import environment, write_json
from ..errors import ArgumentError
from ..files import write_text
from .child import UNUSABLE
from .machine import checkout
from .page import page
from .steps import MINUTES, STEPS, Step

TAIL = 3000  # characters of output that are kept
LEAST = 10.0  # seconds that a step is worth beginning for
DRY_PATIENCE = 5.0  # times the time of a step
RESTARTS = 5  # of a step whose process died


def main(out: Path, only: Sequence[str] | None, minutes: float, dry: bool) -> int:
    """Run the steps, print a line for each, write `gpu.json` and `gpu.md`; 0 where none failed, else 1.

    Raises:
        ArgumentError: there is no such step, or no GPU and the run is not dry.

    """
    chosen = _chosen(only)
    if not dry and not torch.cuda.is_available():
        raise ArgumentError("torch finds no GPU; --dry shows on the CPU that every step works")
    device = torch.device("cpu" if dry else "cuda")
    record: dict[str, Any] = {
        "what": "fiun-fast gpu",
        "dry": dry,
        "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "minutes": minutes,
        "environment": environment(device),
        "rows": [],
    }
    if dry:
        print("dry run on the CPU: shows that the steps work, and says nothing about a GPU")
    deadline = time.monotonic() + 60 * minutes
    for step in chosen:
        left = deadline - time.monotonic()
        if left < LEAST:
            result = _of(step, "skipped", 0.0, why="no time was left")
        else:
            result = run_step(step, min(left, _allowed(step, minutes, dry)), dry)
        record["rows"].append(result)
        write_json(out / "gpu.json", record)
        write_text(out / "gpu.md", page(json.loads((out / "gpu.json").read_text(encoding="utf-8"))))
        label = " (dry)" if dry else ""
        print(f"{step.name}{label}: {result['status']}, {result['seconds']:.0f} s {result.get('why', '')}", flush=True)
    print(f"written to {out / 'gpu.json'} and {out / 'gpu.md'}")
    return int(any(result["status"] == "failed" for result in record["rows"]))


def _allowed(step: Step, minutes: float, dry: bool) -> float:
    """Seconds of a step; a dry run may meet a busy machine, and compiles the kernels' stand-in first."""
    return max(2 * LEAST, step.seconds * (DRY_PATIENCE if dry else minutes / MINUTES))


def _chosen(only: Sequence[str] | None) -> list[Step]:
    known = {step.name: step for step in STEPS}
    if missing := [name for name in only or () if name not in known]:
        raise ArgumentError(f"no step {missing[0]!r}; known are {', '.join(known)}")
    return [step for step in STEPS if not only or step.name in only]


def run_step(step: Step, seconds: float, dry: bool) -> dict[str, Any]:
    """Run one step; what came of it, of each of its items, and the end of what it printed. Nothing is raised."""
    began = time.monotonic()
    before = step.under(dry) if step.under else []
    words = step.command(dry) if step.command else []
    for reason in (before, words):
        if isinstance(reason, str):
            return _of(step, "skipped", 0.0, why=reason)
    assert isinstance(before, list)
    assert isinstance(words, list)
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder) / "lines", Path(folder) / "log"
        lines.touch()
        if step.command:
            status, ended = _run(words, log, seconds, dry)
            why = "" if status == 0 else _ending(status, ended)
            return _of(step, "passed" if status == 0 else "failed", time.monotonic() - began, why, tail=_tail(log))
        items: dict[str, dict[str, Any]] = {}
        for _ in range(RESTARTS):
            left = seconds - (time.monotonic() - began)
            child = [sys.executable, "-m", "fiun_fast.gpu.child", step.name, "--lines", str(lines)]
            child += ["--seconds", f"{0.9 * left:.1f}", *(["--dry"] if dry else []), "--skip", *items]
            status, ended = _run([*before, *child], log, left, dry, bare=bool(before))
            found = _items(lines) | items  # what is known of the items before stands
            for item in found.values():
                if item["status"] == "begun":
                    item |= {"status": "failed", "why": _ending(status, ended)}
            fresh = found.keys() - items.keys()
            items = found
            over = ended or seconds - (time.monotonic() - began) < LEAST
            if status == 0 or over or not fresh or (step.under and status != UNUSABLE):
                break
        seen = {item["status"] for item in items.values()}
        worst = "failed" if status != 0 or "failed" in seen else "passed" if "passed" in seen else "skipped"
        why = _ending(status, ended) if status != 0 else ""
        if worst == "skipped":
            why = next((item["why"] for item in items.values()), "it has no items")
        return _of(step, worst, time.monotonic() - began, why, items=list(items.values()), tail=_tail(log))


def _of(step: Step, status: str, seconds: float, why: str = "", **more: Any) -> dict[str, Any]:
    found = {"step": step.name, "title": step.title, "status": status, "seconds": seconds}
    return found | ({"why": why} if why else {}) | more


def _items(lines: Path) -> dict[str, dict[str, Any]]:
    """What the process wrote of each item, the last word of each."""
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {item["item"]: item for item in found}


def _ending(status: int, ended: bool) -> str:
    if ended:
        return "its time was over"
    return f"the process was ended by signal {-status}" if status < 0 else f"exit status {status}"


def _tail(log: Path) -> str:
    """The end of the output, without the places where things lie on this machine."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    for place in {str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, str(Path.home())} - {"/", "/usr"}:
        text = text.replace(place, "…")
    return text[-TAIL:]


@contextmanager
def _ended_by_term() -> Iterator[None]:
    """Inside, SIGTERM is an exception, so that a step does not outlive the run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(words: list[str], log: Path, seconds: float, dry: bool, bare: bool = False) -> tuple[int, bool]:
    """Run a command, its output added to `log`: exit status, and whether it was ended because its time was over.

    `bare`: without torch's caching allocator, so that every tensor is an allocation of its own and an access beyond its
    end is found.
    """
    surroundings = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    parents = [str(Path(__file__).parents[2]), surroundings.get("PYTHONPATH", "")]
    surroundings |= {"PYTHONPATH": os.pathsep.join(filter(None, parents)), "PYTHONUNBUFFERED": "1"}
    if bare:
        surroundings["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if dry:
        surroundings |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as file, _ended_by_term():
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=surroundings, start_new_session=True, cwd=checkout()
        )
        try:
            return process.wait(seconds), False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait(), True
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
