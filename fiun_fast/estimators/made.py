"""What a model makes of its parameters alone, and how its calls are known again from one forward pass to the next.

`weight.t()`, `1 + weight`, a table of positions looked up: none of them has samples in it. `Made` remembers how it came
about, so that the same can be done to a sum of squares (where it is only a view), or differentiated (where it is not).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Key = str | int
Sizes = tuple[torch.Size, ...]
MADE = -1  # in place of an axis: the result has no samples in it
# Functions that may return views: harmless to a sum of squares, and squares go through them as they are.
VIEWS = {
    *("view", "reshape", "t", "T", "mT", "transpose", "permute", "movedim", "swapaxes", "unsqueeze", "squeeze"),
    *("flatten", "unflatten", "select", "narrow", "split", "chunk", "unbind", "split_with_sizes", "__getitem__"),
    *("view_as", "reshape_as", "contiguous", "to", "float", "double", "half", "bfloat16", "type_as"),
}


@dataclass(frozen=True, eq=False)
class Made:
    """A parameter, or a tensor made of parameters alone.

    Attributes:
        key: the parameter's name, or the number of the call that made it.
        names: the parameters that are in it.
        shape: its shape.
        again: makes it of other tensors in the parameters' place.
        view: only functions of `VIEWS` were used.

    """

    key: Key
    names: tuple[str, ...]
    shape: torch.Size
    again: Callable[[Mapping[str, Tensor]], Tensor]
    view: bool = True

    def within(self, views: Mapping[str, Tensor]) -> Tensor | None:
        """That part of a tensor in the parameter's place that this is of the parameter; None if it is no plain part."""
        whole = views[self.names[0]]
        if isinstance(self.key, str):
            return whole
        if not self.view:
            return None
        part = self.again(views)
        alike = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() and part.dtype == whole.dtype
        once = all(step or size == 1 for size, step in zip(part.shape, part.stride(), strict=True))
        return part if alike and once else None


def parameter(name: str, p: Tensor) -> Made:
    """A parameter itself."""
    return Made(name, (name,), p.shape, lambda views: views[name])


def made_by(func: Any, name: str, args: tuple, kwargs: dict[str, Any], known: Callable[[Tensor], Made | None], key: Key,
            results: Sequence[Tensor]) -> list[Made]:  # fmt: skip
    """What a call has made of the known tensors among its arguments; one for each of its results."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    parts = {i: made for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and (made := known(leaf)) is not None}
    names = tuple(dict.fromkeys(n for made in parts.values() for n in made.names))
    view = name in VIEWS and len(parts) == 1 and all(made.view for made in parts.values())

    def call(views: Mapping[str, Tensor]) -> list[Tensor]:
        filled = [parts[i].again(views) if i in parts else leaf for i, leaf in enumerate(leaves)]
        again_args, again_kwargs = pytree.tree_unflatten(filled, tree)
        return tensors(func(*again_args, **again_kwargs))

    def nth(i: int, views: Mapping[str, Tensor]) -> Tensor:
        return call(views)[i]

    return [Made(key, names, result.shape, partial(nth, i), view) for i, result in enumerate(results)]


@dataclass(frozen=True)
class _First:
    sizes: Sizes
    tainted: bool  # something that came with the batch is in it
    given: Tensor | None


class Calls:
    """Which calls make something of parameters alone, and on which axis others have their samples.

    Found by comparing a pass with one sample to a pass with two; later passes look it up.
    """

    def __init__(self) -> None:
        self.stage = 0  # 1: one sample, 2: two samples, 3: whole batches
        self._numbers: dict[tuple, int] = {}
        self._first: dict[tuple[Key, int], _First] = {}
        self._last: dict[Key, _First] = {}
        self._axes: dict[tuple[Key, bool, int], int | None] = {}
        self._seen: Counter[Key] = Counter()

    def begin(self, stage: int) -> None:
        """A forward pass begins."""
        self.stage, self._seen = stage, Counter()
        if stage == 3:
            self._first, self._last = {}, {}  # activations of the first sample

    def key(self, name: str, made: Sequence[Made]) -> Key:
        """The number of calls of this function with these."""
        return self._numbers.setdefault((name, *(part.key for part in made)), len(self._numbers))

    def axis(
        self, key: Key, sizes: Sizes, tainted: bool, given: Tensor | None = None, made: bool = False
    ) -> tuple[int | None, Tensor | None]:
        """On which axis the samples lie in tensors of these sizes: `MADE`, an axis, or None where that is not clear.

        With it, in the second pass: what this call was given in the first. A layer may be called with data and with
        a table of its own, or what was made of parameters, and these are told apart.
        """
        kind = key, made, 0 if given is None else given.dim()
        if self.stage == 3:
            return self._axes.get(kind), None
        at = (key, self._seen[key])
        self._seen[key] += 1
        if self.stage == 1:
            self._first[at] = self._last[key] = _First(sizes, tainted, given)
            return (None if tainted else MADE), None
        first = self._first.get(at) or self._last.get(key)  # of calls in a loop there may be more than in the first
        axis = _grown(first.sizes, sizes, first.tainted) if first else None
        if self._axes.setdefault(kind, axis) != axis:
            self._axes[kind] = axis = None
        return axis, first.given if first else None


def _grown(one: Sizes, two: Sizes, tainted: bool) -> int | None:
    """The axis along which the second are twice the first; MADE where they are alike."""
    if one == two:
        return None if tainted else MADE
    if len(one) != 1 or len(two) != 1 or len(one[0]) != len(two[0]):
        return None
    grown = [k for k, (small, large) in enumerate(zip(one[0], two[0], strict=True)) if small != large]
    return grown[0] if len(grown) == 1 and two[0][grown[0]] == 2 * one[0][grown[0]] else None


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in a tree of arguments; every call of a model passes through here, and pytrees are slow."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [t for branch in tree if branch is not None for t in tensors(branch)]
    if isinstance(tree, dict):
        return [t for branch in tree.values() if branch is not None for t in tensors(branch)]
    return []
