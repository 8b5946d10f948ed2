"""Counts and bytes of a run over models on disk, and the result made of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from .family import Family
from .result import ModelResult, Result
from .schedule import Item, Schedule, Span, Window
from .streaming import Progress
from .window import Outcome


class Run:
    """Counts and bytes of a run, as its windows are done.

    Args:
        total: bytes that will be done.
        progress: told of them.
        writes: whether those written are among them.

    """

    def __init__(self, total: int, progress: Progress | None, *, writes: bool = True) -> None:
        self._writes = writes
        self.counts: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.read = self.written = 0
        self._done, self._total, self._progress = 0, total, progress

    def done(self, window: Window, outcome: Outcome, written: int) -> None:
        """Take up a window."""
        for key, (selected, zeroed, nonfinite) in outcome.counts.items():
            a, b, c = self.counts.get(key, (0, 0, 0))
            self.counts[key] = a + selected, b + zeroed, c + nonfinite
        self.read += window.read
        self.written += written
        spans = {span for piece in window.pieces for span in piece.spans} | set(window.copies)
        self.step(sum(span.stop - span.start for span in spans) + written * self._writes)

    def step(self, count: int) -> None:
        """So many bytes more."""
        self._done += count
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def bytes_read(items: list[Item], rest: list[Span]) -> int:
    """All that a run reads."""
    spans = {part.span for item in items for part in (*item.thetas, *item.originals, *item.forgets)} | set(rest)
    return sum(span.stop - span.start for span in spans)


def bytes_of_models(family: Family) -> int:
    """Of the files of all models."""
    return sum(weights.size for weights in family.weights.values())


def result_of(
    mode: str,
    where: Path | None,
    family: Family,
    items: list[Item],
    run: Run,
    schedule: Schedule,
    began: float,
    place: Callable[[str], Path],
) -> Result:
    """The result; `place` says where each model's is."""
    node_of = {name: n for n, name in enumerate(family.names)}
    sums = [[0, 0, 0, 0] for _ in node_of]
    reached: dict[str, set[str]] = {name: set() for name in node_of}
    for item in items:
        for part in item.thetas:
            counts = (item.numel, *run.counts.get((item.index, part.who), (0, 0, 0)))
            sums[part.who] = [a + b for a, b in zip(sums[part.who], counts, strict=True)]
            reached[family.names[part.who]].add(part.entry.name)
    models = {}
    for model in family.tree.models:
        weights = family.weights.get(model.name)
        if weights is None:
            models[model.name] = ModelResult(model.name, model.path)
            continue
        left = tuple(map(str, weights.left))
        if model.name not in node_of:
            copied: dict[str, str] = {name: weights[name][1].dtype for name in weights}
            models[model.name] = ModelResult(model.name, place(model.name), copied=copied, left=left)
            continue
        n = node_of[model.name]
        sources = tuple(family.tree.forget[k].origin for k in family.program.nodes[n].requests)
        alpha, lam = float(family.dampening.alpha[n]), float(family.dampening.lam[n])
        copied = {name: weights[name][1].dtype for name in weights if name not in reached[model.name]}
        numel, selected, zeroed, nonfinite = sums[n]
        models[model.name] = ModelResult(
            model.name, place(model.name), sources, alpha, lam, numel, selected, zeroed, nonfinite, copied, left
        )
    return Result(mode, where, models, run.read, run.written, schedule.buffers, time.monotonic() - began)
