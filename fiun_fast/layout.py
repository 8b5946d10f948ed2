"""Layouts: which parameters a flat buffer holds, in which order and shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index

import torch

from .dtensors import is_dtensor, part_of
from .errors import ArgumentError, LayoutError
from .memory import flaw_of_kind
from .naming import matched, near
from .scope import Params, select_parameters

LARGEST = 2**63 - 1  # sizes and offsets are 64-bit


@dataclass(frozen=True)
class Shard:
    """Which part of a larger tensor a segment is, where a model is split over ranks or read piece by piece.

    Attributes:
        name: of the whole tensor, the same on every rank.
        shape: of the whole tensor.
        start: index of the part's first element in each dimension; the part itself has the segment's shape.

    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """One parameter's place in a flat buffer; offset and numel in elements. `shard` is None where it is whole.

    Of a model that is spread over ranks shape and numel are those of this rank's part, `shard.shape` of the whole.
    """

    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]
    shard: Shard | None = None

    def fits(self, other: Segment) -> bool:
        """Whether the other holds the same elements of a parameter, wherever it lies in its buffer."""
        return self.shape == other.shape and self.place == other.place

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shape of the whole, and where this part begins in it; None where this is the whole."""
        return None if self.shard is None else (self.shard.shape, self.shard.start)

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the whole parameter, the same on every rank."""
        return self.shape if self.shard is None else self.shard.shape

    def __str__(self) -> str:
        whole = "" if self.shard is None else f" of {list(self.shard.shape)} from {list(self.shard.start)}"
        return f"{list(self.shape)}{whole}"


class Layout:
    """Ordered named segments of a flat 1-D buffer, without gaps. Immutable.

    Two are equal when names, order, shapes and shards are.

    Args:
        shapes: parameter name -> shape, in the order of the buffer.
        shards: parameter name -> which part of a larger tensor it is, for those that are not whole.

    Raises:
        LayoutError: there is no segment, there are 2^63 elements or more, or a shard of a parameter that is not there.

    """

    __slots__ = ("_hash", "_segments", "names", "numel", "sharded")
    _hash: int
    sharded: bool  # whether any segment is a part of something larger
    _segments: dict[str, Segment]
    names: tuple[str, ...]
    numel: int

    def __init__(self, shapes: Mapping[str, Sequence[int]], shards: Mapping[str, Shard] | None = None) -> None:
        if not isinstance(shapes, Mapping):
            raise ArgumentError(f"shapes is a {type(shapes).__name__}, expected a dict of name -> shape")
        if not shapes:
            raise LayoutError("a layout needs at least one parameter")
        parts = shards or {}
        for name in parts:
            if name not in shapes:
                raise LayoutError(f"a shard of {name!r}, which is not in the layout{near(name, shapes)}")
        segments: dict[str, Segment] = {}
        offset = 0
        for name, shape in shapes.items():
            if not isinstance(name, str):
                raise ArgumentError(f"parameter name {name!r} is a {type(name).__name__}, expected a string")
            size = _size(name, shape)
            segments[name] = Segment(name, offset, math.prod(size), size, parts.get(name))
            offset += math.prod(size)
        if offset > LARGEST:
            raise LayoutError(f"a layout of {float(min(offset, 10**300)):.1e} elements, expected fewer than 2^63")
        contents = hash(tuple((s.name, s.shape, s.shard) for s in segments.values()))
        for key, value in (
            ("_segments", segments),
            ("names", tuple(segments)),
            ("numel", offset),
            ("_hash", contents),
            ("sharded", bool(parts)),
        ):
            object.__setattr__(self, key, value)

    def __setattr__(self, key: str, value: object) -> None:
        """Refuse: buffers are addressed by what a layout says.

        Raises:
            AttributeError: always.

        """
        raise AttributeError(f"a Layout does not change ({key}); make another")

    def __delattr__(self, key: str) -> None:
        """Refuse, as for setting."""
        raise AttributeError(f"a Layout does not change ({key}); make another")

    def __reduce__(self) -> tuple:
        """Pickled by its contents: hashes of strings differ from process to process."""
        shards = {s.name: s.shard for s in self if s.shard is not None}
        return Layout, ({s.name: s.shape for s in self}, shards)

    @classmethod
    def from_module(cls, model: torch.nn.Module, params: Params = None) -> Layout:
        """Layout of a module's parameters, also on meta; see `select_parameters` for `params` and the errors.

        Of a model that is spread over ranks (FSDP2, tensor parallel) each segment is what this rank has; names are the
        same everywhere.
        """
        return cls._of(select_parameters(model, params))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Layout:
        """Layout of a dict of tensors, in the order of the dict; of a DTensor, what this rank has.

        Raises:
            LayoutError: one is no dense tensor of its own shape: sparse, nested, lazy, ….

        """
        for name, t in tensors.items():
            if (flaw := flaw_of_kind(t)) is not None:
                raise flaw.raised(f"{name!r}")
        return cls._of(tensors)

    @classmethod
    def _of(cls, tensors: Mapping[str, torch.Tensor]) -> Layout:
        parts = {name: part_of(repr(name), t) for name, t in tensors.items() if is_dtensor(t)}
        shapes = {name: parts[name].tensor.shape if name in parts else t.shape for name, t in tensors.items()}
        return cls(shapes, {name: Shard(name, one.shape, one.start) for name, one in parts.items() if one.cut})

    def __getitem__(self, name: str) -> Segment:
        """Return the segment of that name.

        Raises:
            LayoutError: there is none; the message names the nearest.

        """
        try:
            return self._segments[name]
        except KeyError:
            raise LayoutError(f"no parameter {name!r} in this layout{near(name, self.names)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._segments

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments.values())

    def __len__(self) -> int:
        return len(self._segments)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Layout) or self._hash != other._hash:
            return False
        return list(self._segments.items()) == list(other._segments.items())

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        shown = ", ".join(f"{s.name} {list(s.shape)}" for s in list(self)[:4])
        more = f", … {len(self) - 4} more" if len(self) > 4 else ""
        return f"Layout({len(self)} parameters, {self.numel:,} elements: {shown}{more})"

    def slice(self, name: str) -> slice:
        """Where the parameter lies in the buffer, in elements."""
        segment = self[name]
        return slice(segment.offset, segment.offset + segment.numel)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> view into `buffer` [numel] in the parameter's shape; writing to a view writes to the buffer.

        Raises:
            LayoutError: the buffer is not 1-D with `numel` elements.

        """
        if not isinstance(buffer, torch.Tensor):
            raise ArgumentError(f"buffer is a {type(buffer).__name__}, expected a tensor")
        if buffer.dim() != 1 or buffer.numel() != self.numel:
            raise LayoutError(f"buffer of shape {list(buffer.shape)}, expected [{self.numel}] for {self!r}")
        return {s.name: buffer[s.offset : s.offset + s.numel].view(s.shape) for s in self}

    def renamed(self, called: Mapping[str, str]) -> Layout:
        """The same segments with other names, where `called` has one: name here -> new name."""
        shards = {called.get(s.name, s.name): s.shard for s in self if s.shard is not None}
        return Layout({called.get(s.name, s.name): s.shape for s in self}, shards)

    def unsharded(self) -> Layout:
        """The whole parameters, of which this has parts: the same on every rank."""
        return Layout({s.name: s.whole for s in self}) if self.sharded else self

    def named_as(self, other: Layout) -> Layout:
        """The same segments, called as in `other` where names differ by what wrappers add to them."""
        called = {} if self == other else matched(self.names, other.names)
        return self.renamed(called) if called else self

    def difference(self, other: Layout, mine: str, theirs: str, called: Mapping[str, str] | None = None) -> str | None:
        """Say how `other` differs in names and shapes (order does not matter), or None where it does not.

        Args:
            other: the other one.
            mine, theirs: what messages call the two.
            called: name there -> name here, where they differ; None: as `naming.matched` finds it.

        """
        called = matched(other.names, self.names) if called is None else called
        its = {called.get(s.name, s.name): s for s in other}
        kinds = [
            [f"{s.name} {s} only in {mine}" for s in self if s.name not in its],
            [f"{s.name} {s} only in {theirs}" for name, s in its.items() if name not in self],
            [
                f"{s.name} is {s} in {mine} and {its[s.name]} in {theirs}"
                for s in self
                if s.name in its and not s.fits(its[s.name])
            ],
        ]
        if (count := sum(map(len, kinds))) == 0:
            return None
        most = 8 // sum(map(bool, kinds)) if count > 8 else 8
        shown = [line for lines in kinds for line in lines[:most]]
        return "; ".join(shown) + (f"; … {count - len(shown)} more" if count > len(shown) else "")


def _size(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    try:
        size = tuple(index(n) for n in shape)
    except TypeError:
        raise LayoutError(f"parameter {name!r}: shape {shape!r}, expected whole numbers") from None
    if any(n < 0 for n in size):
        raise LayoutError(f"parameter {name!r}: shape {list(size)}, expected no negative number")
    return size
