"""Unlearning of models on disk: into new folders, or in place with a journal."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..arguments import check_count, check_size
from ..errors import ArgumentError, CheckpointError, FileWriteError, FiunError
from ..files import CHECKSUM, location
from . import disk, record, unfinished
from .digests import Digests
from .disk import Source
from .entries import Tree, absolute
from .family import Family
from .header import read_header
from .journal import Journal, JournalSink, Past, begin
from .output import OutSink
from .result import Result
from .run import Run, bytes_of_models, bytes_read, result_of
from .schedule import Schedule, items_of, rest_of
from .streaming import Progress, stream, with_threads
from .tree_file import read_tree

Location = str | os.PathLike[str]
_MOST_THREADS = 1 << 16


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

    The method is FIUn's (arXiv 2408.08493; docs/semantics.md); each forget Fisher is read once for all models.

    Args:
        tree: models and requests, or the TOML file that says them.
        out: a folder that is not there yet; gets one folder for each model, and the record `fiun-fast.json`. Until all
            is there and flushed it is called `….incomplete`.
        in_place: change the models' files themselves; needs `journal`.
        journal: a folder that is not there yet, for the old bytes of what is changed, and the record. `resume` and
            `rollback` take it.
        memory: for all buffers together, bytes or a text such as "4GB". What Python and torch take themselves (0.3 GB)
            is not in it.
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
        check_count("threads", threads, most=_MOST_THREADS)
    for place in (out, journal):
        if place is not None:
            location(place)  # complains of what is no path
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
        assert journal is not None
        return _in_place(given, Path(journal), size, progress, began)


def _into(tree: Tree, out: Path, memory: int, progress: Progress | None, began: float) -> Result:
    with Family(tree, writable=False) as family:
        unfinished.check(family)
        items = items_of(family)
        rest = rest_of(family, items)
        Schedule(items, rest, memory, keep=False)  # complains before anything is made
        sink, digests = OutSink(out, family), Digests()
        with sink.work():
            schedule = Schedule(items, rest, memory, keep=sink.keep)
            run = Run(bytes_read(items, rest) + bytes_of_models(family), progress)
            stream(family, schedule, schedule, sink, digests, run.done)
            family.check_unchanged()
            others = sink.copy_others()
            sink.finish(others, record.make(family, items, run.counts, digests, others, "out"))
        return result_of("out", out, family, items, run, schedule, began, lambda name: out / name)


def _dry_run(
    tree: Tree, out: Location | None, in_place: bool, memory: int, progress: Progress | None, began: float
) -> Result:
    with Family(tree, writable=in_place) as family:
        unfinished.check(family)
        if out is not None:
            OutSink.check(Path(out), family)
        items = items_of(family)
        schedule = Schedule(items, [], memory, keep=in_place)
        run = Run(bytes_read(items, []), progress)
        stream(family, schedule, schedule, None, None, run.done)
        rest = rest_of(family, items)
        run.read += sum(span.stop - span.start for span in rest)
        run.written = (
            sum(p.span.stop - p.span.start for i in items for p in i.thetas) if in_place else bytes_of_models(family)
        )
        return result_of("dry run", None, family, items, run, schedule, began, lambda name: family.weights[name].root)


def _in_place(tree: Tree, journal: Path, memory: int, progress: Progress | None, began: float) -> Result:
    tree = absolute(tree)
    with Family(tree, writable=True) as family:
        unfinished.check(family)
        for model in tree.models:
            if model.path.is_dir() and journal.resolve().is_relative_to(model.path.resolve()):
                raise FileWriteError(
                    f"{journal}: lies inside the model {model.name!r}, {model.path}, and copies of that would hold "
                    "what was to be forgotten; name another folder"
                )
        schedule = _schedule(family, memory)
        files = [
            {"path": str(file.path), "size": file.size, "header_sha256": header.sha256}
            for weights in family.weights.values()
            for file, header in zip(weights.files, weights.headers, strict=True)
        ]
        family.check_unchanged()
        plan = {"tree": record.tree_to_dict(tree), "memory": memory, "windows": _fingerprint(schedule), "files": files}
        plan["fishers"] = _fishers(family)
        begin(journal, plan)
        with Journal(journal) as opened:
            return _go_on(opened, family, schedule, progress, began)


def resume(journal: Location, *, threads: int | None = None, progress: Progress | None = None) -> Result:
    """Finish a run in place that was stopped, from its journal; what it has done already is not done twice.

    After a rollback it begins anew; where nothing is left to do it changes nothing.

    Raises:
        CheckpointError: there is no journal, another process works with it, a rollback of it was begun, or a file is
            missing or not as the journal left it.
        FiunError: as `unlearn`.

    """
    began = time.monotonic()
    if threads is not None:
        check_count("threads", threads, most=_MOST_THREADS)
    with Journal(Path(journal)) as opened, with_threads(threads):
        if opened.log.has("rollback"):
            raise CheckpointError(f"{opened.folder}: a rollback was begun and not finished: run rollback first")
        with _files_of(opened) as files:
            opened.check_as_left(files, after=opened.log.committed)
            opened.put_back(files, after=opened.log.committed)
            opened.log.cut_after_commit()
        tree = record.tree_from_dict(opened.plan["tree"])
        with Family(tree, writable=True) as family:
            unfinished.check(family, opened.plan[CHECKSUM])
            for now, line in zip(_fishers(family), opened.plan["fishers"], strict=False):
                if now != line:
                    raise CheckpointError(
                        f"{now['path']}: changed since {opened.folder} was begun: what is left would not fit what was "
                        "done; roll it back, and begin with another journal"
                    )
            schedule = _schedule(family, opened.plan["memory"])
            if _fingerprint(schedule) != opened.plan["windows"]:
                raise CheckpointError(
                    f"{opened.folder}: the Fishers or models are not those that the run began with, or another version "
                    "of fiun_fast began it; roll it back"
                )
            return _go_on(opened, family, schedule, progress, began)


def _go_on(journal: Journal, family: Family, schedule: Schedule, progress: Progress | None, began: float) -> Result:
    """Do what is left of a run in place."""
    digests, items = Digests(), schedule.items
    run = Run(bytes_read(items, schedule.rest), progress, writes=False)
    sink = JournalSink(journal, family)
    with _recoverable(journal.folder):
        if not journal.log.has("finished"):
            unfinished.mark(family, journal.folder, journal.plan[CHECKSUM])
        stream(family, schedule, schedule, sink, digests, run.done, Past(journal.log, family))
        for file in family.files[family.first_fisher :]:
            file.check_unchanged()
        if not journal.log.has("finished"):
            sink.commit()
            made = record.make(family, items, run.counts, digests, {}, "in place") | {"log": journal.log.end}
            disk.write_whole(journal.folder / record.NAME, json.dumps(made, indent=1) + "\n")
            journal.log.append({"kind": "finished"}, [])
        unfinished.clear(unfinished.first_files(family), journal.plan[CHECKSUM])
    roots = {name: weights.root for name, weights in family.weights.items()}
    return result_of("in place", journal.folder, family, items, run, schedule, began, lambda name: roots[name])


def rollback(journal: Location) -> Result:
    """Put back the old bytes of all that a run in place has changed, finished or not, from its journal.

    It may be repeated, and `resume` then begins the run anew.

    Raises:
        CheckpointError: there is no journal, another process works with it, or a file is missing or not as the journal
            left it; nothing was written then.
        FileWriteError: the disk failed; a rollback can be begun again.

    """
    began = time.monotonic()
    with Journal(Path(journal)) as opened, _files_of(opened) as files, _recoverable(opened.folder):
        log = opened.log
        opened.check_as_left(files, after=-1)
        if log.records and not log.has("rollback"):
            log.append({"kind": "rollback"}, [])
        restored = opened.put_back(files, after=-1)
        with disk.said_of(opened.folder / record.NAME):
            (opened.folder / record.NAME).unlink(missing_ok=True)
        disk.flush_folder(opened.folder)
        log.cut([])
        unfinished.clear((file.path for file in files.values()), opened.plan[CHECKSUM])
        return Result("rolled back", opened.folder, {}, 0, restored, 0, time.monotonic() - began)


@contextmanager
def _files_of(journal: Journal) -> Iterator[dict[int, Source]]:
    """The files that a journal is about, locked, if each is there, with its size and header as they were."""
    files: dict[int, Source] = {}
    _check_log(journal)
    try:
        for i, line in enumerate(journal.plan["files"]):
            files[i] = file = Source(Path(line["path"]), writable=True)
            file.lock(alone=True)
            if file.size != line["size"] or read_header(file).sha256 != line["header_sha256"]:
                raise CheckpointError(f"{file.path}: another file than the one that {journal.folder} is about")
        yield files
    finally:
        for file in files.values():
            file.close()


@contextmanager
def _recoverable(journal: Path) -> Iterator[None]:
    """Errors say what to do."""
    try:
        yield
    except FiunError as error:
        made = type(error)(f"{error}; {journal} has all that is needed: resume it, or roll it back")
        if isinstance(error, OSError):
            made.errno = error.errno  # type: ignore[attr-defined]
        raise made from error


def _schedule(family: Family, memory: int) -> Schedule:
    """Of a run in place; what is not computed is read too, after it, for its digests."""
    items = items_of(family)
    return Schedule(items, rest_of(family, items), memory, keep=True)


def _fishers(family: Family) -> list[dict[str, object]]:
    """By which a change of a Fisher is known."""
    return [{"path": str(f.path), "size": f.size, "mtime": f.mtime} for f in family.files[family.first_fisher :]]


def _check_log(journal: Journal) -> None:
    """Raise a CheckpointError where the log has less than when the record was written, which goes before it is cut."""
    try:
        least = record.read(journal.folder).get("log", 0)
    except CheckpointError:  # none, or damaged; that is no matter here
        return
    if journal.log.end < least:
        raise CheckpointError(
            f"{journal.log.path}: damaged: {journal.log.end:,} bytes of entries, and there were {least:,}; nothing was "
            "changed. Bring back a copy of the log"
        )


def _fingerprint(schedule: Schedule) -> str:
    """Of all windows: which bytes of which files."""
    digest = hashlib.sha256()
    for window in schedule:
        for piece in window.pieces:
            digest.update(json.dumps([window.number, *piece.spans]).encode())
    return digest.hexdigest()
