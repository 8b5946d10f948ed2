"""Layouts: which parameters of a module are meant, and which a flat buffer holds, in which order and shape."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import index

import numpy as np
import torch

from .arguments import THETA_DTYPES, short
from .errors import ArgumentError, DTypeError, LayoutError
from .memory import check_addressable, check_disjoint, check_one_device, span

Params = str | Iterable[str] | Callable[[str, torch.Tensor], bool] | None
LAST = "last"  # as `params`: the last layer


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
    """One parameter's place in a flat buffer; offset and numel in elements. `shard` is None where it is whole."""

    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]
    shard: Shard | None = None

    def fits(self, other: Segment) -> bool:
        """Whether the other holds the same elements of a parameter, wherever it lies in its buffer."""
        return self.shape == other.shape and self.shard == other.shard

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
        LayoutError: there is no segment, or a shard of a parameter that is not there.

    """

    __slots__ = ("_hash", "_segments", "names", "numel")

    def __init__(self, shapes: Mapping[str, Sequence[int]], shards: Mapping[str, Shard] | None = None) -> None:
        if not isinstance(shapes, Mapping):
            raise ArgumentError(f"shapes is a {type(shapes).__name__}, expected a dict of name -> shape")
        if not shapes:
            raise LayoutError("a layout needs at least one parameter")
        parts = shards or {}
        for name in parts:
            if name not in shapes:
                raise LayoutError(f"a shard of {name!r}, which is not in the layout{near(name, shapes)}")
        self._segments: dict[str, Segment] = {}
        offset = 0
        for name, shape in shapes.items():
            size = _size(name, shape)
            self._segments[name] = Segment(name, offset, math.prod(size), size, parts.get(name))
            offset += math.prod(size)
        self.names: tuple[str, ...] = tuple(self._segments)
        self.numel: int = offset
        self._hash = hash(tuple((s.name, s.shape, s.shard) for s in self._segments.values()))

    def __reduce__(self) -> tuple:
        """Pickled by its contents: hashes of strings differ from process to process."""
        shards = {s.name: s.shard for s in self if s.shard is not None}
        return Layout, ({s.name: s.shape for s in self}, shards)

    @classmethod
    def from_module(cls, model: torch.nn.Module, params: Params = None) -> Layout:
        """Layout of a module's parameters; see `select_parameters` for `params` and the errors."""
        return cls({name: p.shape for name, p in select_parameters(model, params).items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Layout:
        """Layout of a dict of tensors, in the order of the dict."""
        return cls({name: t.shape for name, t in tensors.items()})

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
        if buffer.dim() != 1 or buffer.numel() != self.numel:
            raise LayoutError(f"buffer of shape {list(buffer.shape)}, expected [{self.numel}] for {self!r}")
        return {s.name: buffer[s.offset : s.offset + s.numel].view(s.shape) for s in self}

    def difference(self, other: Layout, mine: str, theirs: str) -> str | None:
        """Say how `other` differs in names and shapes (order does not matter), or None where it does not."""
        lines = [f"{s.name} {s} only in {mine}" for s in self if s.name not in other]
        lines += [f"{s.name} {s} only in {theirs}" for s in other if s.name not in self]
        lines += [
            f"{s.name} is {s} in {mine} and {other[s.name]} in {theirs}"
            for s in self
            if s.name in other and not s.fits(other[s.name])
        ]
        if not lines:
            return None
        return "; ".join(lines[:8]) + (f"; … {len(lines) - 8} more" if len(lines) > 8 else "")


def _size(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    try:
        size = tuple(index(n) for n in shape)
    except TypeError:
        raise LayoutError(f"parameter {name!r}: shape {shape!r}, expected whole numbers") from None
    if any(n < 0 for n in size):
        raise LayoutError(f"parameter {name!r}: shape {list(size)}, expected no negative number")
    return size


def select_parameters(model: torch.nn.Module, params: Params = None) -> dict[str, torch.nn.Parameter]:
    """Choose parameters of a module, in the module's own order, each once: a tied one under its first name.

    Args:
        model: the module.
        params: None for all that require grad; "last" for those of `last_layer`; a name, a glob, or a list of these
            (an exact name wins over a glob, and over "last"); or callable(name, parameter) -> bool.

    Raises:
        LayoutError: a pattern matches nothing (the message lists near names), nothing is selected, or a selected
            parameter has no shape yet.
        DTypeError: a selected parameter is not float32, float64, bfloat16 or float16.
        ArgumentError: `params` or `model` is of another type.

    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    aliases = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(p) for p in _chosen(model, aliases, params)}
    selected = {name: p for name, p in model.named_parameters() if id(p) in chosen}
    if not selected:
        raise LayoutError(_nothing(model, aliases, params))
    for name, p in selected.items():
        if isinstance(p, torch.nn.parameter.UninitializedParameter):
            raise LayoutError(f"parameter {name!r} has no shape yet: run the lazy module once on a batch")
        if p.dtype not in THETA_DTYPES:
            raise DTypeError(f"parameter {name!r} is {p.dtype}, expected one of {', '.join(map(short, THETA_DTYPES))}")
    return selected


def _chosen(
    model: torch.nn.Module, aliases: dict[str, torch.nn.Parameter], params: Params
) -> Iterable[torch.nn.Parameter]:
    if params is None:
        return [p for p in aliases.values() if p.requires_grad]
    if callable(params):
        return [p for name, p in aliases.items() if params(name, p)]
    if not isinstance(params, Iterable):
        found = type(params).__name__
        raise ArgumentError(f"params is a {found}, expected None, a name or glob, a list of these, or a callable")
    found = []
    for pattern in [params] if isinstance(params, str) else params:
        if not isinstance(pattern, str):
            raise ArgumentError(f"params holds a {type(pattern).__name__}, expected names or globs")
        if pattern in aliases:
            hits = [pattern]
        elif pattern == LAST:
            hits = last_layer(model)
        else:
            hits = [name for name in aliases if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            raise LayoutError(f"no parameter matches {pattern!r}{near(pattern, aliases)}")
        found += [aliases[name] for name in hits]
    return found


def _nothing(model: torch.nn.Module, aliases: dict[str, torch.nn.Parameter], params: Params) -> str:
    kind = type(model).__name__
    if not aliases:
        return f"{kind} has no parameters"
    if params is None:
        return f"no parameter of {kind} is selected ({len(aliases)} exist): none requires grad; name them with params="
    return f"no parameter of {kind} is selected ({len(aliases)} exist)"


def last_layer(model: torch.nn.Module) -> list[str]:
    """Names of the final parametrised layer: FIUn's default scope. `params="last"` means the same.

    "Final" is by registration: the last submodule that owns parameters itself, as `model.named_modules()` lists them.
    A tied parameter appears under its first name.

    Raises:
        LayoutError: the model has no parameters.

    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    first_names = {id(p): name for name, p in model.named_parameters()}
    for module in reversed(list(model.modules())):
        own = [first_names[id(p)] for p in module.parameters(recurse=False)]
        if own:
            return own
    raise LayoutError(f"{type(model).__name__} has no parameters")


def near(name: str, known: Iterable[str]) -> str:
    """What an error message adds to an unknown name: the known ones nearest to it."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=4, cutoff=0.4) or names[:4]
    return f"; near names: {', '.join(found)}" if found else ""


def flatten_(model: torch.nn.Module, params: Params = None) -> torch.Tensor:
    """Re-home the selected parameters in one contiguous buffer, in layout order, without changing a value.

    The parameters stay the same objects (optimisers and ties go on working); only their storage moves. Optional: it
    makes a whole model one run of memory. Moving the model afterwards (`.to()`) takes the parameters apart again.

    Returns:
        The buffer, [numel], of the parameters' dtype and device.

    Raises:
        DTypeError, DeviceError: the parameters differ in dtype or device.
        LayoutError: two parameters share memory without being the same parameter, one has no memory of its own (a
            DTensor, a sparse tensor, …); or as in `Layout.from_module`.

    """
    parameters = select_parameters(model, params)
    (first, like), *_ = parameters.items()
    for name, p in parameters.items():
        check_addressable(f"parameter {name!r}", p)
        if p.dtype != like.dtype:
            raise DTypeError(
                f"parameter {name!r} is {p.dtype}, expected {like.dtype} as {first!r}: one buffer, one dtype"
            )
    check_one_device(parameters, lambda name: f"parameter {name!r}")
    names, spans = list(parameters), np.array([span(p) for p in parameters.values()])
    check_disjoint(spans[:, 0], spans[:, 1], lambda i: repr(names[i]))
    layout = Layout({name: p.shape for name, p in parameters.items()})
    buffer = torch.empty(layout.numel, dtype=like.dtype, device=like.device)
    for (name, view), p in zip(layout.views(buffer).items(), parameters.values(), strict=True):
        view.copy_(p.detach())
        parameters[name].data = view
    return buffer
