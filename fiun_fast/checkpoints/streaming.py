"""The loop: while one window is computed, the next ones are read and hashed, and the last one is written."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch

from .digests import Digests
from .disk import room
from .family import Family
from .schedule import SLOTS, Region, Schedule, Span, Window
from .window import Outcome, Scratch, compute

_CHUNK = 8 << 20  # bytes that one read takes, so that several are under way
_HELPERS = 16  # threads that read, hash and write; they wait for the disk most of the time

Progress = Callable[[int, int], Any]


class Loaded:
    """A window in its slot."""

    def __init__(self, window: Window, slot: torch.Tensor) -> None:
        self.window, self.slot = window, slot
        self.bytes = slot.numpy()
        self.before: dict[Span, Any] = {}  # digests
        self.past: Outcome | None = None  # what became of it in an earlier run

    def bytes_of(self, span: Span) -> np.ndarray:
        """The bytes of a span."""
        at = self.window.places[span]
        return self.bytes[at : at + span.stop - span.start]

    def runs(self, spans: Iterable[Span]) -> Iterator[tuple[int, int, np.ndarray]]:
        """File, offset and bytes of these spans, neighbours together."""
        held: list[Span] = []
        for span in [*sorted(spans), None]:
            if held and (span is None or span.file != held[0].file or span.start != held[-1].stop):
                at = self.window.places[held[0]]
                yield held[0].file, held[0].start, self.bytes[at : at + held[-1].stop - held[0].start]
                held = []
            if span is not None:
                held.append(span)


class Sink(Protocol):
    """Where results go."""

    keep: bool  # whether it wants to know which lines changed, and their old bytes

    def store(self, loaded: Loaded, outcome: Outcome, helpers: ThreadPoolExecutor) -> int:
        """Take a window, in order; return how many bytes were written."""


class Past(Protocol):
    """Windows that were stored by an earlier run."""

    def take(self, loaded: Loaded) -> Outcome | None:
        """What became of a window, whose old bytes are put into the slot; None: it is to be computed."""

    def swap(self, loaded: Loaded, outcome: Outcome) -> None:
        """Put the new bytes there instead."""


def stream(
    family: Family,
    schedule: Schedule,
    windows: Iterable[Window],
    sink: Sink | None,
    digests: Digests | None,
    done: Callable[[Window, Outcome, int], Any],
    past: Past | None = None,
) -> None:
    """Take every window through memory.

    Args:
        family: what is read.
        schedule: whose windows these are; says how large a slot is.
        windows: all, or those that are left.
        sink: takes results; None: only count.
        digests: of what is read and written; None: none are made.
        past: of windows that are done already: they are read and hashed only.
        done: called with each window when it is stored, with what became of it and the bytes written.

    Raises:
        CheckpointError, FileWriteError, ArgumentError: as reading, writing and computing; everything has stopped then.

    """
    with ExitStack() as stack:
        slots = deque(torch.from_numpy(room(schedule.capacity)) for _ in range(SLOTS))
        scratch = Scratch(schedule.capacity)
        helpers = stack.enter_context(ThreadPoolExecutor(_HELPERS, "fiun_fast.disk"))
        stages = [ThreadPoolExecutor(1, f"fiun_fast.{name}") for name in ("read", "hash", "write")]
        reader, hasher, writer = stages
        broken = threading.Event()  # a window could not be stored: no later one may be
        for one in stages:
            stack.callback(one.shutdown, wait=True, cancel_futures=True)
        left = iter(windows)
        coming: deque[Future[Loaded]] = deque()
        going: deque[tuple[torch.Tensor, Window, Outcome, Future[int]]] = deque()
        more = True
        while True:
            while more and slots:
                window = next(left, None)
                if window is None:
                    more = False
                    break
                read = reader.submit(_load, family, window, slots.popleft(), past, helpers)
                coming.append(hasher.submit(_hash, read, digests, helpers))
            if coming:
                loaded = coming.popleft().result()
                if loaded.past is not None and past is not None:
                    outcome = loaded.past
                    past.swap(loaded, outcome)
                else:
                    keep = sink is not None and sink.keep
                    outcome = compute(family, loaded.window, loaded.slot, scratch, dry_run=sink is None, keep=keep)
                stored = writer.submit(_store, sink, loaded, outcome, digests, helpers, broken)
                going.append((loaded.slot, loaded.window, outcome, stored))
            while going and (going[0][3].done() or not (coming or (more and slots))):
                slot, window, outcome, stored = going.popleft()
                done(window, outcome, stored.result())
                slots.append(slot)
            if not (coming or going or more):
                return


def _load(family: Family, window: Window, slot: torch.Tensor, past: Past | None, helpers: ThreadPoolExecutor) -> Loaded:
    loaded = Loaded(window, slot)
    waiting = [helpers.submit(_read, family, loaded.bytes, region) for region in _chunks(window.regions)]
    for one in waiting:
        one.result()
    if past is not None:
        loaded.past = past.take(loaded)
    return loaded


def _chunks(regions: Iterable[Region]) -> Iterator[Region]:
    for region in regions:
        for at in range(0, region.stop - region.start, _CHUNK):
            stop = min(region.stop, region.start + at + _CHUNK)
            needed = min(region.needed - at, stop - region.start - at)
            yield Region(region.file, region.start + at, stop, region.at + at, needed)


def _read(family: Family, slot: np.ndarray, region: Region) -> None:
    into = slot[region.at : region.at + region.stop - region.start]
    family.files[region.file].read(into, region.start, region.needed)


def _hash(read: Future[Loaded], digests: Digests | None, helpers: ThreadPoolExecutor) -> Loaded:
    loaded = read.result()
    if digests is not None:
        loaded.before = digests.read(loaded.window.places, loaded.bytes_of, helpers)
    return loaded


def _store(
    sink: Sink | None,
    loaded: Loaded,
    outcome: Outcome,
    digests: Digests | None,
    helpers: ThreadPoolExecutor,
    broken: threading.Event,
) -> int:
    if sink is None:
        return 0
    if broken.is_set():
        raise CancelledError
    try:
        waiting = []
        if digests is not None:
            thetas = [part.span for piece in loaded.window.pieces for part in piece.thetas]
            waiting = digests.write(thetas, outcome.changed, loaded.before, loaded.bytes_of, helpers)
        written = 0 if loaded.past is not None else sink.store(loaded, outcome, helpers)
        for one in waiting:
            one.result()
        return written
    except BaseException:
        broken.set()
        raise


def with_threads(threads: int | None) -> ExitStack:
    """Compute with that many threads inside `with`."""
    stack = ExitStack()
    if threads is not None:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
    return stack
