"""Unlearning of models on disk: into new folders, or in place with a journal."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..arguments import check_count, check_size
from ..errors import ArgumentError
from .digests import Digests
from .family import Family
from .output import OutSink
from .record import make
from .result import ModelResult, Result
from .schedule import Item, Schedule, Window, items_of, rest_of
from .streaming import Progress, stream, with_threads
from .tree import Tree
from .tree_file import read_tree
from .window import Outcome

Counts = dict[tuple[int, int], tuple[int, int, int]]
Location = str | os.PathLike[str]


def unlearn(
    tree: Tree | Location,
    *,
    out: Location | None = None,
    in_place: bool = False,
    journal: Location | None = None,
    memory: int | str = "1GB",
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Dampen a family of models on disk, piece by piece, with the bits that `plan(…).run_()` gives in memory.

    The method is FIUn's (arXiv 2408.08493), as docs/semantics.md has it; each forget Fisher is read once for all models.

    Args:
        tree: models and requests, or the TOML file that says them.
        out: a folder that is not there yet; gets one folder for each model, and the record `fiun-fast.json`. Until all
            is there and flushed it is called `….incomplete`.
        in_place: change the models' files themselves; needs `journal`.
        journal: a folder that is not there yet, for the old bytes of what is changed, and the record. `resume` and
            `rollback` take it.
        memory: for buffers, bytes or a text such as "4GB"; half of it is used. What Python and torch take themselves
            (0.3 GB) is not in it.
        dry_run: read everything and count; write nothing.
        threads: that compute; None: as torch has them.
        progress: called with bytes done and bytes in all, read and written ones together.

    Raises:
        ArgumentError: neither `out` nor `in_place`, or a number out of range; the memory is too little; a Fisher has a
            negative entry.
        CheckpointError, FisherFileError, FileNotFoundError: a file is missing, damaged, of a form that is not read, in
            use by another process, or changed meanwhile.
        LayoutError, DTypeError, DagError: names, shapes, dtypes or parents that do not fit, as `plan`.
        FileWriteError: the disk is full, or a folder must not be written. Of `out` nothing is left then; what was
            changed in place can be resumed or rolled back.

    """
    began = time.monotonic()
    size = check_size("memory", memory)
    if threads is not None:
        check_count("threads", threads)
    if (out is not None) + bool(in_place) > 1 or not (out is not None or in_place or dry_run):
        raise ArgumentError("give either out=folder, or in_place=True with journal=folder")
    if bool(in_place) != (journal is not None) and not dry_run:
        raise ArgumentError("in_place=True and journal=folder go together: the journal is what a rollback needs")
    given = tree if isinstance(tree, Tree) else read_tree(tree)
    with with_threads(threads):
        if dry_run:
            return _dry_run(given, out, bool(in_place), size, progress, began)
        if out is not None:
            return _into(given, Path(out), size, progress, began)
        raise NotImplementedError


class Run:
    """Counts and bytes of a run, as its windows are done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.counts: Counts = {}
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
        self.step(sum(span.stop - span.start for span in spans) + written)

    def step(self, count: int) -> None:
        """So many bytes more."""
        self._done += count
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _into(tree: Tree, out: Path, memory: int, progress: Progress | None, began: float) -> Result:
    with Family(tree, writable=False) as family:
        items = items_of(family)
        rest = rest_of(family, items)
        Schedule(items, rest, memory, keep=False)  # complains before anything is made
        sink, digests = OutSink(out, family), Digests()
        with sink.work():
            schedule = Schedule(items, rest, memory, keep=sink.keep)
            run = Run(_bytes_read(items, rest) + _bytes_of_models(family), progress)
            stream(family, schedule, schedule, sink, digests, run.done)
            family.check_unchanged()
            others = sink.copy_others()
            sink.finish(others, make(family, items, run.counts, digests, others, "out"))
        return _result("out", out, family, items, run, schedule, began, lambda name: out / name)


def _dry_run(
    tree: Tree, out: Location | None, in_place: bool, memory: int, progress: Progress | None, began: float
) -> Result:
    with Family(tree, writable=in_place) as family:
        if out is not None:
            OutSink.check(Path(out), family)
        items = items_of(family)
        schedule = Schedule(items, [], memory, keep=False)
        run = Run(_bytes_read(items, []), progress)
        stream(family, schedule, schedule, None, None, run.done)
        rest = [] if in_place else rest_of(family, items)
        run.read += sum(span.stop - span.start for span in rest)
        run.written = (
            sum(p.span.stop - p.span.start for i in items for p in i.thetas) if in_place else _bytes_of_models(family)
        )
        return _result("dry run", None, family, items, run, schedule, began, lambda name: family.weights[name].root)


def _bytes_read(items: list[Item], rest: list[Any]) -> int:
    spans = {part.span for item in items for part in (*item.thetas, *item.originals, *item.forgets)} | set(rest)
    return sum(span.stop - span.start for span in spans)


def _bytes_of_models(family: Family) -> int:
    return sum(weights.size for weights in family.weights.values())


def _result(
    mode: str,
    where: Path | None,
    family: Family,
    items: list[Item],
    run: Run,
    schedule: Schedule,
    began: float,
    place: Callable[[str], Path],
) -> Result:
    node_of = {name: n for n, name in enumerate(family.names)}
    sums = [[0, 0, 0, 0] for _ in node_of]
    reached: dict[str, set[str]] = {name: set() for name in node_of}
    for item in items:
        for part in item.thetas:
            counts = (item.numel, *run.counts.get((item.index, part.index), (0, 0, 0)))
            sums[part.index] = [a + b for a, b in zip(sums[part.index], counts, strict=True)]
            reached[family.names[part.index]].add(part.entry.name)
    models = {}
    for model in family.tree.models:
        weights = family.weights.get(model.name)
        if weights is None:
            models[model.name] = ModelResult(model.name, model.path)
            continue
        left = tuple(map(str, weights.left))
        if model.name not in node_of:
            copied: Mapping[str, str] = {name: weights[name][1].dtype for name in weights}
            models[model.name] = ModelResult(model.name, place(model.name), copied=copied, left=left)
            continue
        n = node_of[model.name]
        sources = tuple(family.tree.forget[k].origin for k in family.program.nodes[n].requests)
        alpha, lam = float(family.dampening.alpha[n]), float(family.dampening.lam[n])
        copied = {name: weights[name][1].dtype for name in weights if name not in reached[model.name]}
        models[model.name] = ModelResult(
            model.name, place(model.name), sources, alpha, lam, *sums[n], copied=copied, left=left
        )
    return Result(mode, where, models, run.read, run.written, schedule.buffers, time.monotonic() - began)
