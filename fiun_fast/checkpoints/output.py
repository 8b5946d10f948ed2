"""New folders: written beside their place under a name that says they are not complete, flushed, renamed at the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FileWriteError
from . import disk, record
from .changes import write_changes
from .family import Family
from .streaming import Loaded
from .window import Outcome

MARK = "INCOMPLETE"  # a file that lies in the folder meanwhile
_TEXT = (
    "fiun-fast is at work here, or was stopped. Nothing here is needed by anyone: run it again, or delete the folder.\n"
)


class OutSink:
    """Takes windows into new files. Use it in `with`: where that is left without `finish`, nothing stays behind.

    Attributes:
        keep: whether the file system copies on write; then only what changed is written.

    """

    def __init__(self, out: Path, family: Family) -> None:
        self._out, self._family = out, family
        self._targets: dict[int, disk.Target] = {}
        self._cloned: dict[int, disk.Source] = {}
        self.keep = False

    @staticmethod
    def check(out: Path, family: Family) -> None:
        """Raise an error where the folder cannot be written, before anything is."""
        for name in family.weights:
            if name in ("", ".", "..", MARK, record.NAME) or "/" in name or "\\" in name or "\0" in name:
                raise ArgumentError(f"model {name!r:.80}: no name for a folder; --out has one for each model")
        if not out.name:
            raise FileWriteError(f"{out}: name a new folder, which gets its name when all is there")
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise FileWriteError(f"{out}: is there already; name a folder that is not, or is empty")
        if not out.parent.is_dir():
            raise FileWriteError(f"{out.parent}: no such folder")
        here = out.resolve()
        for name, weights in family.weights.items():
            if here.is_relative_to(weights.root.resolve()) and weights.others:
                raise FileWriteError(f"{out}: lies inside the model {name!r}, {weights.root}")

    @contextmanager
    def work(self) -> Iterator[None]:
        """Have the folder, empty; a FileWriteError where the disk is full, a CheckpointError where another is."""
        self.check(self._out, self._family)
        self._folder = folder = self._out.with_name(self._out.name + ".incomplete")
        with disk.locked_folder(folder, make=True):
            with disk.said_of(folder):
                self._empty()
            try:
                with disk.said_of(folder):
                    self._begin()
                yield
            except BaseException:
                self._close()
                if not self.finished:
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    finished = False

    def _empty(self) -> None:
        """Remove what an earlier run left; a FileWriteError where it is not ours."""
        there = {path.name for path in self._folder.iterdir()}
        if there and not there & {MARK, record.NAME}:
            raise FileWriteError(f"{self._folder}: is there already, and was not made by fiun-fast; move it away")
        for path in self._folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink()

    def _begin(self) -> None:
        (self._folder / MARK).write_text(_TEXT, encoding="utf-8")
        disk.flush_folder(self._folder)
        clones = False
        for name, weights in self._family.weights.items():
            folder = self._folder / name
            try:
                folder.mkdir()
            except OSError as error:
                raise disk.failed(folder, error) from error
            first = self._family.first_of(weights)
            for i, source in enumerate(weights.files, first):
                clones = disk.clone(source, folder / source.path.name)
                if clones:
                    self._cloned[i] = disk.Source(folder / source.path.name, writable=True)
                    continue
                if i == 0:
                    self._check_room()
                self._targets[i] = disk.Target(folder / source.path.name, source.size)
        self.keep = bool(self._cloned)

    def _check_room(self) -> None:
        needed = sum(weights.size for weights in self._family.weights.values())
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            error = FileWriteError(f"{self._out}: {needed:,} bytes are needed there, and {free:,} are free")
            error.errno = errno.ENOSPC
            raise error

    def store(self, loaded: Loaded, outcome: Outcome, helpers: ThreadPoolExecutor) -> int:
        """Write a window, several files at once; a file that is whole is flushed."""
        spans = [part.span for piece in loaded.window.pieces for part in piece.thetas] + loaded.window.copies
        waiting, written = [], []
        for file, offset, data in loaded.runs(span for span in spans if span.file in self._targets):
            self._targets[file].open()
            waiting.append(helpers.submit(self._targets[file].write, data, offset))
            written.append((file, len(data)))
        for one in waiting:
            one.result()
        for file, count in written:
            self._targets[file].wrote(count)
        total = sum(count for _, count in written)
        if self._cloned:
            total += write_changes(self._cloned, loaded, outcome, helpers)
        return total

    def finish(self, others: Mapping[str, Mapping[str, str]], made: Mapping[str, Any]) -> None:
        """Write the record, flush all names, give the folder its name. After this nothing can be lost."""
        for file in self._cloned.values():
            file.flush()
        disk.write_whole(self._folder / record.NAME, json.dumps(made, indent=1) + "\n")
        for where, _, _ in os.walk(self._folder):
            disk.flush_folder(Path(where))
        with disk.said_of(self._out):
            (self._folder / MARK).unlink()
            disk.flush_folder(self._folder)
            disk.SYSTEM.rename(self._folder, self._out)
        self.finished = True
        disk.flush_folder(self._out.parent)
        self._close()

    def copy_others(self) -> dict[str, dict[str, str]]:
        """Copy the other files of each folder; model -> file -> SHA-256."""
        found: dict[str, dict[str, str]] = {}
        for name, weights in self._family.weights.items():
            for other in weights.others:
                target = self._folder / name / other
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(weights.root / other, target)
                    with target.open("rb") as file:
                        disk.flush(target, file.fileno())
                except OSError as error:
                    raise disk.failed(target, error) from error
            paths = ((str(other), self._folder / name / other) for other in weights.others)
            found[name] = record.digests_of(paths)
        return found

    def _close(self) -> None:
        for target in self._targets.values():
            target.close()
        for file in self._cloned.values():
            file.close()
