"""What an undo log keeps of each parameter, and how it lies on disk: a safetensors file of indices and old values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import files
from .arguments import THETA_DTYPES, short
from .errors import UndoFileError
from .homes import Home
from .version import __version__

FORMATS = ("fiun_fast.undo/2", "fiun_fast.undo/1")  # written, and read too: without a checksum
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # restored as integers: no NaN loses its payload on the way
_DTYPES = {short(dtype): dtype for dtype in THETA_DTYPES}
_RECORD = {"node": str, "name": str, "shape": list, "dtype": str, "after": int}
_PIECE = 1 << 22  # elements of a loaded log that are restored at a time


@dataclass
class Entry:
    """One parameter of one node: pieces of (start, index [k] int32 from there, old bits [k])."""

    node: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    home: Home | None = None  # where the parameter lived during the run; None in a loaded log
    pieces: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    after: Tensor = field(  # fingerprint of what the run left
        default_factory=lambda: torch.zeros((), dtype=torch.int64, device="cpu")
    )

    @property
    def where(self) -> str:
        """As error messages name it."""
        return f"node {self.node!r}, parameter {self.name!r}"

    @property
    def numel(self) -> int:
        """Elements kept."""
        return sum(len(index) for _, index, _ in self.pieces)


def write(path: str | os.PathLike[str], entries: Iterable[Entry]) -> None:
    """Write the file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    records = []
    for i, entry in enumerate(entries):
        wide = torch.int32 if torch.Size(entry.shape).numel() < 1 << 31 else torch.int64
        tensors[f"{i}.index"] = torch.cat([index.cpu().to(wide) + start for start, index, _ in entry.pieces])
        tensors[f"{i}.old"] = torch.cat([old.cpu() for _, _, old in entry.pieces]).view(entry.dtype)
        records.append(
            {
                "node": entry.node,
                "name": entry.name,
                "shape": entry.shape,
                "dtype": short(entry.dtype),
                "after": int(entry.after),
            }
        )
    files.save(path, tensors, {"format": FORMATS[0], "version": __version__, "entries": json.dumps(records)})


def read(path: str | os.PathLike[str]) -> list[Entry]:
    """What `write` wrote, in main memory; indices and values are checked against their shape and dtype.

    Raises:
        UndoFileError: the file is truncated, damaged or foreign.
        FileNotFoundError: there is none.

    """
    with files.opened(path, "an undo log", FORMATS, UndoFileError) as (file, metadata):
        records = json.loads(metadata["entries"])
        names = [f"{i}.{key}" for i in range(len(records)) for key in ("index", "old")]
        if not isinstance(records, list) or set(file.keys()) != set(names):
            raise UndoFileError(f"{os.fspath(path)}: its tensors are not those of its {len(records)} entries")
        tensors = {name: file.get_tensor(name).clone() for name in names}  # what is mapped may go with the file
        files.check_whole(tensors, metadata)
        entries = [_entry(record, tensors[f"{i}.index"], tensors[f"{i}.old"]) for i, record in enumerate(records)]
        if len({(entry.node, entry.name) for entry in entries}) < len(entries):
            raise ValueError("a parameter of a node is there twice")
    return entries


def _entry(record: dict[str, Any], index: Tensor, old: Tensor) -> Entry:
    """An entry of a file; raises anything where it is none."""
    for key, kind in _RECORD.items():
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise ValueError(f"{key} is {record[key]!r:.80}, expected {kind.__name__}")
    entry = Entry(record["node"], record["name"], tuple(record["shape"]), _DTYPES[record["dtype"]])
    entry.after += record["after"]
    numel = math.prod(entry.shape)
    fits = index.dtype in (torch.int32, torch.int64) and index.dim() == 1 and old.shape == index.shape
    if not all(type(n) is int and n >= 0 for n in entry.shape) or not fits or old.dtype != entry.dtype:
        raise ValueError(f"{entry.where}: indices or values do not fit a {entry.dtype} {list(entry.shape)}")
    if len(index) and not 0 <= index.min() <= index.max() < numel:
        raise ValueError(f"{entry.where}: indices or values do not fit a {entry.dtype} {list(entry.shape)}")
    if not bool((index[1:] > index[:-1]).all()) and len(index.unique()) < len(index):
        raise ValueError(f"{entry.where}: an index is there twice")
    bits = old.view(BITS[entry.dtype.itemsize])
    entry.pieces = [(0, *piece) for piece in zip(index.split(_PIECE), bits.split(_PIECE), strict=True)]
    return entry
