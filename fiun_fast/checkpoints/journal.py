"""The journal of a run in place: a folder with what is to be done, and a log of old bytes kept before they are changed.

The order, in which power may fail at any point:

1. A window's old bytes go to the end of the log, with their digest, and are flushed.
2. Then its changed blocks are written to the models' files.
3. Now and then the models' files are flushed, and after that a line in the log says up to which window.

What the log has of windows after that line may or may not have reached the files: a resume puts these old bytes back,
cuts the log there, and goes on; a rollback puts all back and empties it. Both can be stopped and begun again. An entry
at the end of a log that is not whole does not count: nothing that depends on it was written. One that is followed by
others was damaged later, and is an error: all are flushed before the next.

A block of a disk is taken to hold what it held or what was written to it, not anything else, after a loss of power.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import CHECKSUM
from ..fisher_file import checksum_of
from . import disk
from .changes import blocks_of, write_changes
from .disk import BLOCK, Source, room, up
from .family import Family
from .schedule import Span
from .streaming import Loaded
from .window import LINE, Change, Outcome

NAME, LOG, FORMAT = "journal.json", "log", "fiun_fast.journal/2"
_HEAD = struct.Struct("<8sQQ32s")  # magic, bytes of the JSON line, bytes of data, SHA-256 of both
_MAGIC = b"fiunlog1"
COMMIT = 256 << 20  # changed bytes after which the models' files are flushed


@dataclass(frozen=True)
class Record:
    """An entry of the log: where it lies, and its line."""

    start: int
    stop: int
    line: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """One of window, commit, finished, rollback."""
        return self.line["kind"]


class Log:
    """The log of a journal: appended to, read, cut. Entries begin at blocks, so that they can be written directly."""

    def __init__(self, path: Path) -> None:
        self._file = Source(path, writable=True)
        self.path = path
        self.records: list[Record] = []
        at = 0
        while (record := self._record(at)) is not None:
            self.records.append(record)
            at = record.stop
        self.end = at  # in bytes
        for later in range(at + BLOCK, self._file.size, BLOCK):
            if self._record(later) is not None:
                self._file.close()
                raise CheckpointError(
                    f"{path}: damaged at byte {at:,}: what lies there is no entry, and entries follow; nothing was "
                    "changed. Bring back a copy of the log"
                )

    def _record(self, at: int) -> Record | None:
        """The entry there, if it is whole."""
        if at + BLOCK > self._file.size:
            return None
        magic, length, size, digest = _HEAD.unpack(self._bytes(at, _HEAD.size).tobytes())
        stop = at + up(_HEAD.size + length + size)
        if magic != _MAGIC or length > self._file.size or stop > self._file.size:
            return None
        body = self._bytes(at + _HEAD.size, length + size)
        if hashlib.sha256(body.data).digest() != digest:
            return None
        return Record(at, stop, json.loads(body[:length].tobytes()))

    def _bytes(self, start: int, count: int) -> np.ndarray:
        first = start % BLOCK
        array = room(first + count)
        self._file.read(array, start - first, first + count)
        return array[first : first + count]

    @property
    def committed(self) -> int:
        """The last window that is known to be on disk, -1 for none."""
        return max((record.line["number"] for record in self.records if record.kind == "commit"), default=-1)

    def has(self, kind: str) -> bool:
        """Whether there is an entry of that kind."""
        return any(record.kind == kind for record in self.records)

    def append(self, line: Mapping[str, Any], data: list[np.ndarray]) -> None:
        """Write an entry, which is on disk when this returns."""
        head = json.dumps(line).encode()
        size = sum(one.nbytes for one in data)
        array = room(_HEAD.size + len(head) + size)
        at = _HEAD.size
        for one in (np.frombuffer(head, np.uint8), *data):
            array[at : at + one.nbytes] = one.view(np.uint8).reshape(-1)
            at += one.nbytes
        digest = hashlib.sha256(array[_HEAD.size : at].data).digest()
        array[: _HEAD.size] = np.frombuffer(_HEAD.pack(_MAGIC, len(head), size, digest), np.uint8)
        self._file.write(array, self.end)
        self._file.flush()
        self.records.append(Record(self.end, self.end + len(array), line))
        self.end += len(array)

    def changes(self, record: Record) -> dict[Span, Change]:
        """What a window changed: its runs, and old bytes."""
        _, length, size, _ = _HEAD.unpack(self._bytes(record.start, _HEAD.size).tobytes())
        data = self._bytes(record.start + _HEAD.size + length, size)
        found, at = {}, 0
        for line in record.line["changes"]:
            runs = data[at : at + 16 * line["runs"]].copy().view(np.int64).reshape(-1, 2)
            at += runs.nbytes
            kept = int(runs[:, 1].sum())
            found[Span(*line["span"])] = Change(runs, data[at : at + kept])
            at += kept
        return found

    def cut(self, kept: list[Record]) -> None:
        """Leave these entries only, the first ones."""
        self.end = kept[-1].stop if kept else 0
        self._file.truncate(self.end)
        self.records = list(kept)

    def cut_after_commit(self) -> None:
        """Leave what is known to be on disk."""
        last = max((i for i, record in enumerate(self.records) if record.kind in ("commit", "finished")), default=-1)
        self.cut(self.records[: last + 1])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Journal:
    """A journal, locked; use it in `with`.

    Attributes:
        folder: where it is.
        plan: what is to be done, as `begin` wrote it.
        log: of old bytes.

    Raises:
        CheckpointError: there is none, it is damaged, or another process works with it.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no journal: no such folder")
        self._lock = disk.locked_folder(folder)

    def __enter__(self) -> Journal:
        self._lock.__enter__()
        try:
            self.plan = _read_plan(self.folder / NAME)
            self.log = Log(self.folder / LOG)
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.log.close()
        self._lock.__exit__(None, None, None)

    def put_back(self, files: Mapping[int, Source], after: int) -> int:
        """Restore the old bytes of the windows after that one, and flush; return how many bytes."""
        total = 0
        for record in reversed(self.log.records):
            if record.kind != "window" or record.line["number"] <= after:
                continue
            for span, change in self.log.changes(record).items():
                data, at = _read(files[span.file], span), 0
                for piece in _pieces(data, span.start, change.runs):
                    piece[:] = change.old[at : at + len(piece)]
                    at += len(piece)
                for start, stop in blocks_of(span, change.runs):
                    files[span.file].write(data[start - span.start : stop - span.start], start)
                total += at
        for file in files.values():
            file.flush()
        return total

    def check_as_left(self, files: Mapping[int, Source], after: int) -> None:
        """Raise a CheckpointError where somebody else has changed what the windows after that one read and left.

        What they changed is known up to the last commit, until a rollback begins; what they did not change always is.
        """
        known = -1 if self.log.has("rollback") else self.log.committed
        for record in self.log.records:
            if record.kind != "window" or record.line["number"] <= after:
                continue
            for (span, change), line in zip(self.log.changes(record).items(), record.line["changes"], strict=True):
                data = _read(files[span.file], span)
                same = _untouched(data, span.start, change.runs) == line["untouched"]
                if same and record.line["number"] <= known:
                    now = np.concatenate(list(_pieces(data, span.start, change.runs)))
                    same = hashlib.sha256(now.data).hexdigest() == line["new"]
                if not same:
                    raise changed_since(files[span.file].path, span.tensor)


def changed_since(path: Path, tensor: str) -> CheckpointError:
    """The error for bytes that are no longer as a run left them."""
    return CheckpointError(f"{path}: tensor {tensor!r} is not as this journal left it: somebody else has changed it")


def _read(file: Source, span: Span) -> np.ndarray:
    """The bytes of a span, as they are now."""
    first = span.start % BLOCK
    array = room(first + span.stop - span.start)
    file.read(array, span.start - first, first + span.stop - span.start)
    return array[first : first + span.stop - span.start]


def begin(folder: Path, plan: Mapping[str, Any]) -> None:
    """Make a journal: the folder, and in it what is to be done.

    Raises:
        CheckpointError: there is one already.
        FileWriteError: it cannot be written.

    """
    with disk.locked_folder(folder, make=True):
        with disk.said_of(folder):
            there = {path.name for path in folder.iterdir()}
            if NAME in there:
                raise CheckpointError(f"{folder}: a journal is there already: resume it, roll it back, or delete it")
            if there - {f"{NAME}.partial", LOG} or (LOG in there and (folder / LOG).stat().st_size):
                raise CheckpointError(
                    f"{folder}: is there already, and no journal; name a folder that is not, or is empty"
                )
            (folder / LOG).touch()
        disk.write_whole(
            folder / NAME,
            json.dumps({"format": FORMAT, **plan, CHECKSUM: checksum_of({"format": FORMAT, **plan})}, indent=1) + "\n",
        )
    disk.flush_folder(folder.parent)


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        for file in found["files"]:
            _ = file["path"], file["size"], file["header_sha256"]
        if found[CHECKSUM] != checksum_of(found):
            raise ValueError("its checksum is another")
        _ = found["fishers"]
        _ = found["tree"], found["memory"], found["windows"]
    except OSError as error:
        raise CheckpointError(f"{path}: no journal: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or not a journal: {error!r:.200}") from error
    return found


class JournalSink:
    """Takes windows into the files themselves, by way of the log."""

    keep = True

    def __init__(self, journal: Journal, family: Family) -> None:
        self._log = journal.log
        self._files = dict(enumerate(family.files[: family.first_fisher]))
        self._touched: set[int] = set()
        self._unflushed = 0
        self._number = journal.log.committed

    def store(self, loaded: Loaded, outcome: Outcome, helpers: ThreadPoolExecutor) -> int:
        """Log the old bytes of a window, then write the new ones."""
        if not loaded.window.pieces:
            return 0  # read for its digests only
        changes = {s: c for s, c in outcome.changed.items() if c is not None and len(c.runs)}
        lines, data = [], []
        for span, change in changes.items():
            new = hashlib.sha256()
            for piece in _pieces(loaded.bytes_of(span), span.start, change.runs):
                new.update(piece.data)
            untouched = _untouched(loaded.bytes_of(span), span.start, change.runs)
            lines.append({"span": list(span), "runs": len(change.runs), "new": new.hexdigest(), "untouched": untouched})
            data += [change.runs.view(np.uint8).reshape(-1), change.old]
        counts = [[*key, *found] for key, found in outcome.counts.items()]
        line = {"kind": "window", "number": loaded.window.number, "counts": counts, "changes": lines}
        self._log.append(line, data)
        written = write_changes(self._files, loaded, outcome, helpers)
        self._touched |= {span.file for span in changes}
        self._unflushed += written
        self._number = loaded.window.number
        if self._unflushed >= COMMIT:
            self.commit()
        return written + sum(one.nbytes for one in data)

    def commit(self) -> None:
        """Flush the files, then say in the log up to which window."""
        for i in sorted(self._touched):
            self._files[i].flush()
        self._log.append({"kind": "commit", "number": self._number}, [])
        self._touched.clear()
        self._unflushed = 0


class Past:
    """What the log has of windows that are on disk: they are read again for their digests, and not computed again."""

    def __init__(self, log: Log, family: Family) -> None:
        self._log, self._family = log, family
        self._records = {r.line["number"]: r for r in log.records if r.kind == "window"}

    def take(self, loaded: Loaded) -> Outcome | None:
        """Put the old bytes of a window into its slot, for the digests; its outcome then holds the new ones."""
        record = self._records.get(loaded.window.number)
        if record is None:
            return None
        counts = {(item, node): (a, b, c) for item, node, a, b, c in record.line["counts"]}
        outcome = Outcome(counts, dict(self._log.changes(record)))
        self.swap(loaded, outcome)
        for line, (span, change) in zip(record.line["changes"], outcome.changed.items(), strict=True):
            assert change is not None
            if hashlib.sha256(change.old.data).hexdigest() != line["new"]:
                raise changed_since(self._family.files[span.file].path, span.tensor)
        return outcome

    def swap(self, loaded: Loaded, outcome: Outcome) -> None:
        """Exchange the bytes of a slot with those that an outcome holds."""
        for span, change in outcome.changed.items():
            assert change is not None
            at = 0
            for piece in _pieces(loaded.bytes_of(span), span.start, change.runs):
                held = change.old[at : at + len(piece)].copy()
                change.old[at : at + len(piece)] = piece
                piece[:] = held
                at += len(piece)


def _pieces(data: np.ndarray, start: int, runs: np.ndarray) -> Iterator[np.ndarray]:
    for offset, length in runs.tolist():
        yield data[offset - start : offset - start + length]


def _untouched(data: np.ndarray, start: int, runs: np.ndarray) -> int:
    """CRC-32 of the lines that lie in a span as a whole, and in which nothing changed."""
    lines = data[: len(data) // LINE * LINE].reshape(-1, LINE)
    begin = ((runs[:, 0] - start) // LINE).clip(0, len(lines))
    end = (-((start - runs[:, 0] - runs[:, 1]) // LINE)).clip(0, len(lines))
    size = len(lines) + 1
    inside = np.cumsum(np.bincount(begin, minlength=size) - np.bincount(end, minlength=size))
    return zlib.crc32(lines[inside[:-1] == 0])
