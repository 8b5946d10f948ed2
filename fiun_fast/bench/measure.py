"""How a case is measured: checked first, then timed in rounds, all variants in every round, from the same cold state.

Before each timed run the state is restored (theta that is dampened again and again goes denormal, and times double) and
the last-level cache is emptied of it; neither is timed. The order rotates from round to round, and a plain copy runs in
each round too: its bandwidth is the yardstick of that case. Medians count.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
COPY = "copy"  # the yardstick's name among the variants


@dataclass
class Variant:
    """One way to do the work of a case."""

    name: str  # as the table shows it
    kind: str  # "naive" (what people run today), "torch" (the best in plain torch), "ours", "reference", or "floor"
    run: Callable[[], object]  # the work; timed
    restore: Callable[[], object]  # puts the state back; called before each run, not timed
    outcome: Callable[[], Iterable[Tensor]] | None = None  # of a run, to be compared; None: nothing to compare
    calls: int = 0  # of one run that torch does not dispatch: our launches, compiled graphs
    capturable: bool = False  # in a CUDA graph


@dataclass
class Case:
    """One piece of work, several ways to do it."""

    floor: int | None  # bytes that the work moves at least, every element counted; None: bytes do not limit it
    elements: int  # parameters processed
    variants: list[Variant]
    expected: Callable[[], Iterable[Tensor]] | None = None  # what each must produce, from the reference
    ulps: int = 0  # units in the last place allowed against it; 0 where the bit contract holds
    flips: float = 0.0  # share of elements that may be further off: a threshold met values that differ by an ulp
    selected: float | None = None  # share of elements dampened
    moved: int | None = None  # bytes that it moves, lines of theta counted only where something is selected
    limits: Callable[[], dict[str, float]] | None = None  # measures what else could bound it: name -> milliseconds
    threads: int | None = None  # None: as many as torch has
    skipped: dict[str, str] = field(default_factory=dict)  # variant -> why it is not here
    name: str = ""  # the letter it is known by
    title: str = ""


class Kept:
    """Tensors of several models, and copies of them to put back before each run."""

    def __init__(self, tensors: Sequence[Sequence[Tensor]], copies: Sequence[Sequence[Tensor]] | None = None) -> None:
        self.tensors = tensors
        self._flat = list(chain(*tensors))
        self._copies = [t.clone() for t in self._flat] if copies is None else list(chain(*copies))

    def restore(self) -> None:
        """Put all back."""
        torch._foreach_copy_(self._flat, self._copies)

    def outcome(self) -> Iterator[Tensor]:
        """As they are now, flat, model by model."""
        return (torch.cat([t.reshape(-1) for t in model]) for model in self.tensors)


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds at least and at most, and seconds after which a variant has had enough."""

    least: int
    most: int
    seconds: float


class DisagreementError(Exception):
    """A variant does not compute what the reference computes; its time means nothing."""


class Machine:
    """A device: its clock, its cache, its yardstick; `clock` is that of work on a CPU, in seconds."""

    def __init__(
        self, device: torch.device, small: bool = False, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device, self._clock = device, clock
        cache = last_level_cache(device)
        size = 1 << 16 if small else max(4 * cache, 128 << 20) * (4 if device.type == "cuda" else 1)
        self._scratch = torch.zeros(size // 4, device=device)
        self._source, self._target = torch.ones(size // 4, device=device), torch.zeros(size // 4, device=device)
        self.copy_bytes = 2 * self._source.numel() * 4

    def copy(self) -> None:
        """Read one buffer and write another, each several times the cache."""
        self._target.copy_(self._source)

    def cool(self) -> None:
        """Empty the cache: by reading on a CPU, where dirty lines would cost the next run; by writing on a GPU."""
        if self.device.type == "cuda":
            self._scratch.zero_()
        else:
            self._scratch.sum()

    def wait(self) -> None:
        """Until the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Time of one run; on a GPU between two events on its stream."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            begin.record()
            run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
        began = self._clock()
        run()
        return self._clock() - began


def check(case: Case) -> dict[str, str]:
    """Run every variant once, which warms it up, and compare with the reference: variant -> "same bits" or how far off.

    Raises:
        DisagreementError: it is further off than the case allows.

    """
    expected = [t.clone() for t in case.expected()] if case.expected else []
    agreement = {}
    for variant in case.variants:
        variant.restore()
        variant.run()
        if variant.outcome is None or not expected:
            continue
        worst, wrong, n = 0, 0, 0
        for found, wanted in zip(variant.outcome(), expected, strict=True):
            distance = ulps(found.reshape(-1), wanted.reshape(-1))
            off = distance > case.ulps
            wrong += int(off.sum())
            worst = max(worst, int(distance.masked_fill(off, 0).max()))
            n += found.numel()
        if wrong > case.flips * n:
            raise DisagreementError(
                f"case {case.name}: {variant.name} differs from the reference in {wrong} of {n} elements"
            )
        off_by = f"within {worst} ulp" if worst else "same bits"
        agreement[variant.name] = f"{off_by} but for {wrong} of {n:,}" if wrong else off_by
    return agreement


def ulps(found: Tensor, wanted: Tensor) -> Tensor:
    """Distance in units in the last place, element by element: [n] int64."""
    if torch.equal(found, wanted):
        return torch.zeros(1, dtype=torch.int64)
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    bits = (t.contiguous().view(kinds[t.element_size()]).long() for t in (found, wanted))
    lowest = -(1 << (8 * found.element_size() - 1))
    a, b = (torch.where(i < 0, lowest - i, i) for i in bits)  # ordered as the numbers are
    return (a - b).abs()


def race(case: Case, machine: Machine, effort: Effort) -> dict[str, list[float]]:
    """Seconds of every run of every variant, and of the copy; a variant that has had its time sits out."""
    runs = [Variant(COPY, COPY, machine.copy, nothing), *case.variants]
    if machine.device.type == "cuda":
        runs += list(_graphs(case.variants, machine))
    times: dict[str, list[float]] = {v.name: [] for v in runs}
    machine.copy()  # the others are warm from being checked
    for r in range(effort.most):
        for variant in runs[r % len(runs) :] + runs[: r % len(runs)]:
            spent = times[variant.name]
            if len(spent) >= effort.least and sum(spent) >= effort.seconds:
                continue
            variant.restore()
            machine.cool()
            spent.append(machine.seconds(variant.run))
    return times


def _graphs(variants: Iterable[Variant], machine: Machine) -> Iterator[Variant]:
    """On a GPU: those that can be captured, once more as a graph replay, without the host's part."""
    for v in variants:
        if v.capturable:
            v.restore()
            v.run()
            torch.cuda.synchronize(machine.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                v.run()
            yield Variant(f"{v.name} (graph)", v.kind, graph.replay, v.restore, calls=1)


def operator_calls(variant: Variant) -> int:
    """Calls into native code that one run makes: torch operators, compiled graphs, our launches."""
    variant.restore()
    if variant.kind == "torch" and variant.calls:
        return variant.calls  # a compiled graph; its inside is not dispatched
    with _Counter() as counter:
        variant.run()
    return counter.count + variant.calls


class _Counter(TorchDispatchMode):
    """Counts every operator that reaches a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def kernel_launches(variant: Variant, device: torch.device) -> int | None:
    """Kernels that one run launches on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    variant.restore()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        variant.run()
        torch.cuda.synchronize(device)
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process, in which malloc gives large blocks back to the system once they are freed."""
    with ProcessPoolExecutor(1, get_context("spawn"), _give_back) as process:
        return process.submit(function, *arguments).result()


def _give_back() -> None:
    """Where resident memory is looked at: large blocks come straight from the system, never from malloc's own heap."""
    if CLEAR.exists():
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


def extra_bytes(variant: Variant, device: torch.device) -> int:
    """Peak memory of one run on top of what is there before it; run twice before, to warm up.

    On Linux it is the kernel's high-water mark of resident memory, reset before the run; in a process that `alone`
    started, nothing that was freed before hides what a run needs. On a GPU torch's allocator reports it.
    """
    for _ in range(2):
        variant.restore()
        variant.run()
    variant.restore()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        variant.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    variant.run()
    return max(0, _resident("VmHWM") - before)


def _resident(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Inside, torch has that many threads; None: no change."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache; 32 MB where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return max(_caches().values(), default=32 << 20)


def level_2_cache() -> int:
    """Bytes that a core has; 512 kB where the machine does not say."""
    return _caches().get(2, 1 << 19)


def _caches() -> dict[int, int]:
    """Level -> bytes."""
    units, found = {"K": 1 << 10, "M": 1 << 20}, {}
    for folder in CACHE.glob("index*"):
        if m := re.match(r"(\d+)([KM])", (folder / "size").read_text()):
            found[int((folder / "level").read_text())] = int(m[1]) * units[m[2]]
    return found


def nothing(*_: object) -> None:
    """What is to be done where there is nothing to do."""
