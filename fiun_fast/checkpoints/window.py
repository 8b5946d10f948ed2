"""A piece of a parameter in host memory as a source for `binding.bind`, and what a launch did to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..arguments import short
from ..binding import bind
from ..errors import ArgumentError
from ..fisher import Fisher
from ..gradient import Gradient
from ..layout import Layout
from .family import Family
from .header import FLOATS
from .schedule import Part, Piece, Span, Window

LINE = 64  # bytes: what changed is found, and kept, by lines of this length


@dataclass(frozen=True)
class Change:
    """What a launch changed in some bytes of a file.

    Attributes:
        runs: [n, 2] int64, offset in the file and length of each run of changed lines.
        old: their bytes before, one after another.

    """

    runs: np.ndarray
    old: np.ndarray


@dataclass
class Outcome:
    """What became of a window.

    Attributes:
        counts: (item, node) -> selected, zeroed, nonfinite.
        changed: spans of parameters with a selection; what changed there, if that was asked for.

    """

    counts: dict[tuple[int, int], tuple[int, int, int]]
    changed: dict[Span, Change | None]


class Scratch:
    """Memory for what cannot be used as it lies, taken anew for each piece: new pages cost much."""

    def __init__(self, size: int) -> None:
        self._room = torch.empty(size, dtype=torch.uint8)
        self._used = 0

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A tensor [numel], valid until `clear`."""
        start = -(-self._used // LINE) * LINE
        self._used = start + numel * dtype.itemsize
        return self._room[start : self._used].view(dtype)

    def clear(self) -> None:
        """All that was taken is free."""
        self._used = 0


class PieceMemory:
    """Where the numbers of a piece are: views into a slot, or copies where its bytes cannot be used as they lie."""

    def __init__(self, family: Family, piece: Piece, slot: Tensor, window: Window, scratch: Scratch) -> None:
        self._scratch = scratch
        self._numel, self._family = piece.numel, family
        self._moved: list[tuple[Tensor, Tensor]] = []  # bytes in the slot, and their copy
        self._thetas = {(p.who, p.name): self._theta(p, slot, window.places[p.span]) for p in piece.thetas}
        values = {p.span: self._values(p, slot, window.places[p.span]) for p in (*piece.originals, *piece.forgets)}
        self._originals = {p.who: Fisher(values[p.span], Layout({p.name: (piece.numel,)})) for p in piece.originals}
        self._forgets: dict[int, Fisher] = {
            p.who: Fisher(values[p.span], Layout({p.name: (piece.numel,)})) for p in piece.forgets
        }

    def _theta(self, part: Part, slot: Tensor, at: int) -> Tensor:
        dtype = FLOATS[part.entry.dtype]
        raw = slot[at : at + self._numel * dtype.itemsize]
        if at % dtype.itemsize:
            copy = self._copy(raw)
            self._moved.append((raw, copy))
            raw = copy
        return raw.view(dtype)

    def _copy(self, raw: Tensor) -> Tensor:
        return self._scratch.take(len(raw), torch.uint8).copy_(raw)

    def _values(self, part: Part, slot: Tensor, at: int) -> Tensor:
        """Numbers of a Fisher; bfloat16 is widened, which adds zeros to its bits."""
        dtype = FLOATS[part.entry.dtype]
        raw = slot[at : at + self._numel * dtype.itemsize]
        if at % dtype.itemsize:
            raw = self._copy(raw)
        values = raw.view(dtype)
        if dtype == torch.bfloat16:
            values = self._scratch.take(self._numel, torch.float32).copy_(values)
        if _has_a_sign(values) and bool((values < 0).any()):
            path = self._family.files[part.span.file].path
            raise ArgumentError(f"{path}: {part.name!r} has negative entries ({short(dtype)}); a Fisher has none")
        return values

    def originals(self, nodes: Sequence[int]) -> list[Fisher]:
        """Of each node, over this piece."""
        return [self._originals[n] for n in nodes]

    def forget(self, request: int, device: torch.device) -> Fisher:
        """Of a request, over this piece."""
        return self._forgets[request]

    def gradient(self, request: int, device: torch.device) -> Gradient:
        """None has one on disk, and so no program asks."""
        raise LookupError(f"request {request} has no gradient")

    def thetas(self, nodes: Sequence[int], names: Sequence[str]) -> list[list[Tensor]]:
        """Of each node, flat."""
        return [[self._thetas[n, name] for n in nodes] for name in names]

    def settle(self) -> None:
        """Put back what was copied."""
        for raw, copy in self._moved:
            raw.copy_(copy)


def compute(family: Family, window: Window, slot: Tensor, scratch: Scratch, *, dry_run: bool, keep: bool) -> Outcome:
    """Dampen the pieces of a window in their slot, or only count; `keep`: find the lines that changed, and old bytes.

    Raises:
        ArgumentError: a Fisher has a negative entry.

    """
    outcome = Outcome({}, {})
    numpy = slot.numpy()
    for piece in window.pieces:
        scratch.clear()
        memory = PieceMemory(family, piece, slot, window, scratch)
        counts = torch.zeros(len(family.names), 3, dtype=torch.int64)
        program = replace(family.program, groups=list(piece.groups))
        bytes_of = {p.span: _bytes(numpy, window, p.span) for p in piece.thetas}
        before = {span: raw.copy() for span, raw in bytes_of.items()} if keep else {}
        for part in bind(program, memory, family.merging, family.dampening, None):
            part.launch.run(counts, dry_run)
        memory.settle()
        found = counts.tolist()
        for theta in piece.thetas:
            selected, zeroed, nonfinite = found[theta.who]
            a, b, c = outcome.counts.get((piece.item, theta.who), (0, 0, 0))  # a window may have two pieces of an item
            outcome.counts[piece.item, theta.who] = a + selected, b + zeroed, c + nonfinite
            if selected and not dry_run:
                span = theta.span
                change = changed(before[span], bytes_of[span], span.start) if keep else None
                outcome.changed[span] = change
    return outcome


def _has_a_sign(values: Tensor) -> bool:
    """Whether a sign bit is set: of a number below 0, of -0, of a NaN.

    NumPy finds the least integer twice as fast as torch the least number.
    """
    numbers = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).numpy()
    return bool(numbers.size) and int(numbers.min()) < 0


def _bytes(slot: np.ndarray, window: Window, span: Span) -> np.ndarray:
    at = window.places[span]
    return slot[at : at + span.stop - span.start]


def changed(old: np.ndarray, new: np.ndarray, start: int) -> Change:
    """What differs, by lines of 64 bytes from the first byte of both on; `start`: its offset in the file."""
    lines = -(-len(new) // LINE)
    differ = np.zeros(lines * LINE, dtype=bool)
    np.not_equal(old, new, out=differ[: len(new)])
    hit = np.flatnonzero(differ.reshape(lines, LINE).any(axis=1))
    if not len(hit):
        return Change(np.empty((0, 2), np.int64), old[:0])
    ends = np.flatnonzero(np.diff(hit) > 1)
    begin = hit[np.concatenate(([0], ends + 1))] * LINE
    end = np.minimum((hit[np.concatenate((ends, [len(hit) - 1]))] + 1) * LINE, len(new))
    kept = np.concatenate([old[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)])
    return Change(np.stack([begin + start, end - begin], axis=1), kept)
