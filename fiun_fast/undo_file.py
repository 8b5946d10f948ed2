"""What an undo log keeps of each parameter, and how it lies on disk: a safetensors file of indices and old values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import files
from .arguments import THETA_DTYPES, short
from .errors import UndoFileError
from .memory import Home
from .version import __version__

FORMAT = "fiun_fast.undo/1"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # restored as integers: no NaN loses its payload on the way
_DTYPES = {short(dtype): dtype for dtype in THETA_DTYPES}
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
    files.save(path, tensors, {"format": FORMAT, "version": __version__, "entries": json.dumps(records)})


def read(path: str | os.PathLike[str]) -> list[Entry]:
    """What `write` wrote, on the CPU; indices and values are checked against their shape and dtype.

    Raises:
        UndoFileError: the file is truncated or foreign.
        FileNotFoundError: there is none.

    """
    where, entries = os.fspath(path), []
    with files.opened(path, "an undo log", FORMAT, UndoFileError) as (file, metadata):
        for i, record in enumerate(json.loads(metadata["entries"])):
            shape, dtype = tuple(record["shape"]), _DTYPES[record["dtype"]]
            for key, kind in (("node", str), ("name", str), ("after", int)):
                if not isinstance(record[key], kind):
                    raise UndoFileError(f"{where}: entry {i}: {key} is {record[key]!r}, expected {kind.__name__}")
            entry = Entry(record["node"], record["name"], shape, dtype)
            entry.after += record["after"]
            index, old = file.get_tensor(f"{i}.index"), file.get_tensor(f"{i}.old")
            numel = torch.Size(shape).numel()
            fits = index.dtype in (torch.int32, torch.int64) and index.dim() == 1 and old.shape == index.shape
            if not fits or old.dtype != dtype or (len(index) and not 0 <= index.min() <= index.max() < numel):
                raise UndoFileError(f"{where}: {entry.where}: indices or values do not fit a {dtype} {list(shape)}")
            bits = old.view(BITS[dtype.itemsize])
            entry.pieces = [(0, *piece) for piece in zip(index.split(_PIECE), bits.split(_PIECE), strict=True)]
            entries.append(entry)
    return entries
