"""Layouts: which parameters a flat buffer holds, in which order and shape."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .errors import ArgumentError, DTypeError, LayoutError

Params = str | Iterable[str] | Callable[[str, torch.Tensor], bool] | None
THETA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Segment:
    """One parameter's place in a flat buffer; offset and numel in elements."""

    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]


class Layout:
    """Ordered named segments of a flat 1-D buffer, without gaps. Immutable; equal when names, order and shapes are.

    Args:
        shapes: parameter name -> shape, in the order of the buffer.

    Raises:
        LayoutError: there is no segment.

    """

    __slots__ = ("_hash", "_segments", "names", "numel")

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        if not shapes:
            raise LayoutError("a layout needs at least one parameter")
        self._segments: dict[str, Segment] = {}
        offset = 0
        for name, shape in shapes.items():
            size = tuple(int(n) for n in shape)
            self._segments[name] = Segment(name, offset, math.prod(size), size)
            offset += math.prod(size)
        self.names: tuple[str, ...] = tuple(self._segments)
        self.numel: int = offset
        self._hash = hash(tuple((s.name, s.shape) for s in self._segments.values()))

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
            raise LayoutError(f"no parameter {name!r} in this layout{_near(name, self.names)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._segments

    def __iter__(self):
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
        lines = [f"{s.name} {list(s.shape)} only in {mine}" for s in self if s.name not in other]
        lines += [f"{s.name} {list(s.shape)} only in {theirs}" for s in other if s.name not in self]
        lines += [
            f"{s.name} is {list(s.shape)} in {mine} and {list(other[s.name].shape)} in {theirs}"
            for s in self
            if s.name in other and other[s.name].shape != s.shape
        ]
        if not lines:
            return None
        return "; ".join(lines[:8]) + (f"; … {len(lines) - 8} more" if len(lines) > 8 else "")


def select_parameters(model: torch.nn.Module, params: Params = None) -> dict[str, torch.nn.Parameter]:
    """Choose parameters of a module, in the module's own order, each once: a tied one under its first name.

    Args:
        model: the module.
        params: None for all that require grad; a name, a glob, or a list of these; or
            callable(name, parameter) -> bool.

    Raises:
        LayoutError: a pattern matches nothing (the message lists near names), or nothing is selected.
        DTypeError: a selected parameter is not float32, float64, bfloat16 or float16.
        ArgumentError: `params` or `model` is of another type.

    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    aliases = dict(model.named_parameters(remove_duplicate=False))
    if params is None:
        chosen = {id(p) for p in aliases.values() if p.requires_grad}
    elif callable(params):
        chosen = {id(p) for name, p in aliases.items() if params(name, p)}
    elif isinstance(params, Iterable):
        chosen = set()
        for pattern in [params] if isinstance(params, str) else params:
            if not isinstance(pattern, str):
                raise ArgumentError(f"params holds a {type(pattern).__name__}, expected names or globs")
            hits = [n for n in aliases if n == pattern or fnmatch.fnmatchcase(n, pattern)]
            if not hits:
                raise LayoutError(f"no parameter matches {pattern!r}{_near(pattern, aliases)}")
            chosen.update(id(aliases[n]) for n in hits)
    else:
        found = type(params).__name__
        raise ArgumentError(f"params is a {found}, expected None, a name or glob, a list of these, or a callable")
    selected = {name: p for name, p in model.named_parameters() if id(p) in chosen}
    if not selected:
        raise LayoutError(f"no parameter of {type(model).__name__} is selected ({len(aliases)} exist)")
    for name, p in selected.items():
        if isinstance(p, torch.nn.parameter.UninitializedParameter):
            raise LayoutError(f"parameter {name!r} has no shape yet: run the lazy module once on a batch")
        if p.dtype not in THETA_DTYPES:
            raise DTypeError(f"parameter {name!r} is {p.dtype}, expected one of {_dtypes(THETA_DTYPES)}")
    return selected


def last_layer(model: torch.nn.Module) -> list[str]:
    """Names of the final parametrised layer: FIUn's default scope, ready to be passed as `params`.

    "Final" is by registration: the last submodule that owns parameters itself, as `model.named_modules()` lists them.
    A tied parameter appears under its first name.

    Raises:
        LayoutError: the model has no parameters.

    """
    first_names = {id(p): name for name, p in model.named_parameters()}
    for module in reversed(list(model.modules())):
        own = [first_names[id(p)] for p in module.parameters(recurse=False)]
        if own:
            return own
    raise LayoutError(f"{type(model).__name__} has no parameters")


def _near(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.4) or names[:4]
    return f"; near names: {', '.join(near)}" if near else ""


def _dtypes(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
