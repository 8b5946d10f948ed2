"""Fishers on disk: a tensor for each parameter, in one safetensors file, or in a folder of shards with an index."""

from __future__ import annotations

import json
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from . import files
from .arguments import FISHER_DTYPES, listed, short
from .errors import ArgumentError, FileWriteError, FisherFileError, FiunError
from .kernels.cpu import expect_writes
from .layout import Layout
from .version import __version__

FORMATS = ("fiun_fast.fisher/2", "fiun_fast.fisher/1")  # written, and read too: without a checksum
INDEX = "fisher.safetensors.index.json"
INDEX_FORMAT, SHARD_FORMAT = "fiun_fast.fisher.index/1", "fiun_fast.fisher.shard/1"
LARGEST_INDEX = 1 << 28  # bytes
ROUNDED = torch.bfloat16  # on disk, where that is asked for; read as float32
CODES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16}  # in a safetensors header
STORED = (*FISHER_DTYPES, ROUNDED)
NEEDED = {"estimator": str, "steps": int, "samples": int}  # what the record of a provenance holds
OPTIONAL = {"how": dict, "reduction": str, "dtype": str, "per": str}  # empty where it is not there
RECORD = NEEDED | OPTIONAL
SHARD = re.compile(r"fisher-\d{5,9}-of-\d{5,9}\.[0-9a-f]{8}\.safetensors")  # no other file is taken for one, or removed


def unfit_record(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a provenance record, or None."""
    for key, kind in RECORD.items():
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            return f"{key} is a {type(record[key]).__name__}, expected {kind.__name__}"
    if not all(isinstance(text, str) for pair in record["how"].items() for text in pair):
        return "how is not a dict of strings"
    return None


# ---- writing --------------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    *,
    shard_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a file, or with `shard_size` (bytes) a folder; whole or not at all, what was there before stays until then.

    Raises:
        ArgumentError: an unfit record, or a name that a file cannot hold.
        ArgumentError, FileWriteError: as `files.replaced`.

    """
    if (unfit := unfit_record(record)) is not None:
        raise ArgumentError(f"the provenance of a Fisher to be saved: {unfit}")
    layout = {name: list(t.shape) for name, t in tensors.items()}
    contents = {"layout": layout, "provenance": dict(record)}
    if shard_size is not None:
        _write_folder(files.location(path), tensors, contents, shard_size, dtype)
        return
    metadata = {"format": FORMATS[0], **{key: json.dumps(value) for key, value in contents.items()}}
    files.save(path, _rounded(tensors, dtype), metadata | {"version": __version__})


def _rounded(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    return {name: t if dtype is None else t.to(dtype) for name, t in tensors.items()}


def _write_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    contents: Mapping[str, Any],
    shard_size: int,
    dtype: torch.dtype | None,
) -> None:
    """Shards have names that were never there; the index, which is renamed into place last, makes them the Fisher."""
    made = False
    try:
        if not folder.is_dir():
            if folder.is_symlink() or folder.exists():
                raise OSError("it is there, and not a folder")
            folder.mkdir()
            made = True
    except OSError as error:
        raise FileWriteError(f"{folder}: not written: {error.strerror or error}") from error
    parts = _parts(tensors, shard_size, dtype)
    token = secrets.token_hex(4)
    names = [_shard_name(k + 1, len(parts), token) for k in range(len(parts))]
    checksums = {}
    before = _shards_of(folder)
    try:
        for name, part in zip(names, parts, strict=True):
            rounded = _rounded({key: tensors[key] for key in part}, dtype)
            checksums[name] = files.save(folder / name, rounded, {"format": SHARD_FORMAT, "version": __version__})
        index = {"format": INDEX_FORMAT, "version": __version__, **contents, "shards": checksums}
        index["weight_map"] = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        files.write_text(folder / INDEX, json.dumps(index | {files.CHECKSUM: checksum_of(index)}, indent=1) + "\n")
        if made:
            with suppress(OSError):
                files.flush_folder(folder.parent)
    except BaseException:
        there = _shards_of(folder)  # those of the new index, where it was a signal that came after it
        _remove(folder, [name for name in names if name not in there])
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise
    _remove(folder, before)


def _shard_name(k: int, count: int, token: str) -> str:
    return f"fisher-{k:05d}-of-{count:05d}.{token}.safetensors"


def _parts(tensors: Mapping[str, torch.Tensor], shard_size: int, dtype: torch.dtype | None) -> list[list[str]]:
    """Names for each shard, in order: as many as fit, or one that is larger."""
    parts: list[list[str]] = []
    free = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if not parts or size > free:
            parts.append([])
            free = shard_size
        parts[-1].append(name)
        free -= size
    return parts


def _shards_of(folder: Path) -> list[str]:
    """The shards that an index in the folder names; none where there is none that can be read."""
    try:
        return list(_read_index(folder)["shards"])
    except FiunError:
        return []


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        with suppress(OSError):
            (folder / name).unlink()


# ---- reading --------------------------------------------------------------------------------------------------------


class FisherFile:
    """An open file or folder: `layout`, `record` (the provenance), and the numbers, by name and range.

    Attributes:
        where: the file or folder.
        layout: what the numbers belong to.
        record: how they were obtained.
        stored: dtype of the numbers on disk, one for all.
        dtype: dtype of the numbers as they are read: that of the disk, float32 for bfloat16.
        paths: the safetensors files, in the order of the index.

    """

    def __init__(
        self, where: Path, parts: Mapping[Path, tuple[Any, dict[str, str]]], contents: Mapping[str, Any]
    ) -> None:
        self.where = where
        with files.unless_damaged(where, "a Fisher", FisherFileError):
            try:
                self.layout = Layout(contents["layout"])
            except FiunError as error:
                raise self._wrong(f"truncated or not a Fisher file: {error}") from error
            kept = contents["provenance"]
            record = {key: kept[key] for key in NEEDED} | {key: kept.get(key, new()) for key, new in OPTIONAL.items()}
            if (unfit := unfit_record(record)) is not None:
                raise self._wrong(f"truncated or not a Fisher file: its provenance: {unfit}")
        self.record = record
        self.paths = tuple(parts)
        self._parts = parts
        held = [(name, path) for path, (file, _) in parts.items() for name in file.keys()]  # noqa: SIM118
        self._place = dict(held)
        if len(held) > len(self._place) or self._place.keys() != set(self.layout.names):
            strange = sorted(self._place.keys() ^ set(self.layout.names)) or ["one is there twice"]
            raise self._wrong(f"its tensors are not those of its layout: {', '.join(strange[:8])}")
        self.stored = self._checked_dtype()
        self.dtype = torch.float32 if self.stored == ROUNDED else self.stored

    def _wrong(self, what: str) -> FisherFileError:
        return FisherFileError(f"{self.where}: {what}")

    def _checked_dtype(self) -> torch.dtype:
        """The one dtype of all tensors, whose shapes must be those of the layout."""
        first: torch.dtype | None = None
        for segment in self.layout:
            with files.unless_damaged(self.where, "a Fisher", FisherFileError):
                file = self._parts[self._place[segment.name]][0]
                kept = file.get_slice(segment.name)  # of the header; a tensor, though mapped, takes a while
                dtype = CODES.get(kept.get_dtype()) or file.get_tensor(segment.name).dtype
            if dtype not in STORED:
                raise self._wrong(f"{segment.name!r} is {short(dtype)}, expected {listed(STORED)}")
            if tuple(kept.get_shape()) != segment.shape:
                found = f"{short(dtype)} {list(kept.get_shape())}"
                raise self._wrong(f"{segment.name!r} is {found}, expected {list(segment.shape)} as its layout says")
            first = first or dtype
            if dtype != first:
                raise self._wrong(f"{segment.name!r} is {short(dtype)}, expected {short(first)} as the others")
        assert first is not None  # a layout has a parameter
        return first

    def path_of(self, name: str) -> Path:
        """The safetensors file that holds a parameter; a LayoutError where there is no such parameter."""
        return self._place[self.layout[name].name]

    def mapped(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start..stop of a parameter, flat, as they are stored; all by default. Valid while the file is open.

        Raises:
            LayoutError: there is no such parameter.

        """
        return self._parts[self.path_of(name)][0].get_tensor(name).reshape(-1)[start:stop]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The same as `dtype`, in memory of its own. No checksum is looked at: that is one of a whole file."""
        return self.mapped(name, start, stop).to(self.dtype, copy=True)

    def read_all(self) -> torch.Tensor:
        """All numbers as `dtype`, flat [layout.numel], in memory of their own.

        Raises:
            FisherFileError: a checksum is another; the message names the file.

        """
        buffer = expect_writes(torch.empty(self.layout.numel, dtype=self.dtype, device="cpu"))
        views = self.layout.views(buffer)
        for path, (file, metadata) in self._parts.items():
            with files.unless_damaged(path, "a Fisher", FisherFileError):
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                for name, tensor in held.items():
                    views[name].copy_(tensor)
                exact = self.stored == self.dtype  # then what was read is checked itself
                files.check_whole({name: views[name] for name in held} if exact else held, metadata)
        return buffer


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[FisherFile]:
    """Open a file or a folder that `write` made.

    Raises:
        FisherFileError: it is truncated, foreign, incomplete, or its tensors do not match its own index or metadata.
        FileNotFoundError: there is none.
        ArgumentError: `path` is no path.

    """
    where = files.location(path)
    with ExitStack() as stack:
        if where.is_dir():
            contents, parts = _open_folder(where)
        else:
            parts = {where: files.open_tensors(path, "a Fisher", FORMATS, FisherFileError)}
            with files.unless_damaged(where, "a Fisher", FisherFileError):
                contents = {key: json.loads(parts[where][1][key]) for key in ("layout", "provenance")}
        for file, _ in parts.values():
            stack.enter_context(file)
        yield FisherFile(where, parts, contents)


def _open_folder(folder: Path) -> tuple[dict[str, Any], dict[Path, tuple[Any, dict[str, str]]]]:
    """Its index, and its shards by path."""
    index = _read_index(folder)
    parts = {}
    for name, checksum in index["shards"].items():
        path = folder / name
        try:
            parts[path] = files.open_tensors(path, "a shard of a Fisher", [SHARD_FORMAT], FisherFileError)
        except FileNotFoundError:
            raise FisherFileError(f"{folder}: {name} is missing, which its {INDEX} names") from None
        if parts[path][1].get(files.CHECKSUM) != checksum:
            raise FisherFileError(f"{path}: its checksum is not the one in {INDEX}: a shard of another Fisher")
    return index, parts


def checksum_of(index: Mapping[str, Any]) -> str:
    """CRC-32 of an index, as sorted JSON, without its checksum."""
    kept = {key: value for key, value in index.items() if key != files.CHECKSUM}
    return f"{zlib.crc32(json.dumps(kept, sort_keys=True).encode()):08x}"


def _read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of shards, of the right form and whole."""
    path = folder / INDEX
    if not path.is_file():
        raise FisherFileError(f"{folder}: it is no regular file, and a folder without {INDEX}")
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"it has more than {LARGEST_INDEX >> 20} MiB")
        index = json.loads(path.read_bytes())
        if not isinstance(index, dict) or (found := index.get("format", "none")) != INDEX_FORMAT:
            raise ValueError(f"format {found if isinstance(index, dict) else 'none'!s:.60}, expected {INDEX_FORMAT}")
        if index.get(files.CHECKSUM) != checksum_of(index):
            raise ValueError("its checksum is another: it was damaged since it was written")
        if not index["shards"] or not isinstance(index["provenance"], dict):
            raise ValueError("it names no shards, or its provenance is no record")
        for name, checksum in index["shards"].items():
            if not SHARD.fullmatch(name) or not isinstance(checksum, str):
                raise ValueError(f"shard {name!r:.80}, expected a name such as {_shard_name(1, 2, '0' * 8)}")
    except (FiunError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file leads to
        raise FisherFileError(f"{path}: truncated or not the index of a Fisher: {error}") from error
    return index
