"""From uses to squares: one backward pass hands in inputs and output gradients, and each parameter is squared once.

Where a parameter is used once, its squares are added as its gradient arrives. Where it is used several times (tied
embeddings, shared layers), or something is made of it first (1 + weight, a table looked up), each sample's gradients
are added up over the uses before they are squared, a few samples at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import rules
from .capture import Use
from .convolution import chunks
from .picked import apart
from .rules import Axis
from .totals import Totals

AT_ONCE = 1 << 18  # elements of per-sample gradients that stay in the cache


class _Met(NamedTuple):
    use: Use
    given: Tensor  # [B, s, ...]
    gradient: Tensor


class Gathering:
    """Adds the squares of one batch's gradients to a total.

    Args:
        totals: the sum.
        parameters: name -> parameter, of which tensors are made again to be differentiated.
        uses: of this batch, those with a closed form.
        samples: how many there are.

    """

    def __init__(self, totals: Totals, parameters: Mapping[str, Tensor], uses: Iterable[Use], samples: int) -> None:
        self._totals, self._parameters, self._samples = totals, parameters, samples
        with torch._C.DisableTorchFunction():
            self._together = _components(uses, totals.views)  # use -> which others it has to be added up with
        self._met: dict[int, list[_Met]] = {}

    def alone(self, use: Use) -> bool:
        """Whether no other use has a part in the gradients of its parameters."""
        return use not in self._together

    def meet(self, use: Use, given: Tensor | None, gradient: Tensor, axis: Axis) -> None:
        """Take an input and an output gradient, which carry the samples on this axis."""
        if use.owners is None:
            d = axis.first(gradient, self._samples)
            a = d if given is None else axis.first(given, self._samples)
        else:
            assert given is not None
            a, d = (self._by_owner(use, t) for t in (given, gradient))
        if use in self._together:
            self._met.setdefault(self._together[use], []).append(_Met(use, a, d))
            return
        d = self._totals.number(d)
        a = self._totals.number(a) if a.is_floating_point() else a
        for role, made in use.roles.items():
            into = made.within(self._totals.views)
            assert into is not None
            if not rules.add_squares(self._totals, use, role, into, a, d):
                for part in chunks(self._samples, d[0].numel()):
                    self._totals.square(into, rules.gradients(use, role, a[part], d[part]))

    def _by_owner(self, use: Use, t: Tensor) -> Tensor:
        """Rows [n, ...] as [B, most, ...], or [B, groups, most, ...]."""
        assert use.owners is not None
        if use.rule != "grouped":
            return apart(t, use.owners, self._samples)
        ends, rows = use.arguments["offs"], torch.arange(len(t), device=t.device)
        group = torch.searchsorted(ends, rows.to(ends.dtype), right=True)
        groups = torch.where(group < len(ends), use.owners * len(ends) + group, -1)
        return apart(t, groups, self._samples * len(ends)).unflatten(0, (self._samples, len(ends)))

    def end(self) -> None:
        """A backward has ended: square what had to be added up first."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self._square_together()

    def _square_together(self) -> None:
        for met in self._met.values():
            names = dict.fromkeys(name for one in met for name in one.use.names)
            elements = sum(self._totals.views[name].numel() for name in names)
            pulls = {id(one): self._pulls(one.use) for one in met}
            step = max(1, AT_ONCE // max(1, elements))
            for at in range(0, self._samples, step):
                part = slice(at, min(at + step, self._samples))
                sums = {name: self._zeros(name, part.stop - at) for name in names}
                for one in met:
                    self._add(sums, one, part, pulls[id(one)])
                for name, gradients in sums.items():
                    self._totals.square(self._totals.views[name], gradients)
        self._met = {}

    def _zeros(self, name: str, samples: int) -> Tensor:
        view = self._totals.views[name]
        return view.new_zeros(samples, *view.shape)

    def _add(self, sums: Mapping[str, Tensor], met: _Met, part: slice, pulls: Mapping[str, Callable]) -> None:
        """Add the gradients of some samples, of one use."""
        d, a = self._totals.number(met.gradient[part]), met.given[part]
        a = self._totals.number(a) if a.is_floating_point() else a
        for role, made in met.use.roles.items():
            gradients = rules.gradients(met.use, role, a, d)
            if role in pulls:
                for name, found in zip(made.names, pulls[role](gradients), strict=True):
                    if found is not None:
                        sums[name] += found
                continue
            whole = self._totals.views[made.names[0]]
            within = made.within(self._totals.views)
            assert within is not None
            into = sums[made.names[0]]
            offset = within.storage_offset() - whole.storage_offset()
            into.as_strided((len(d), *within.shape), (whole.numel(), *within.stride()), offset).add_(gradients)

    def _pulls(self, use: Use) -> dict[str, Callable[[Tensor], tuple[Tensor | None, ...]]]:
        """For roles whose tensor is more than a part of a parameter: from its gradients to the parameters' own."""
        found: dict[str, Callable[[Tensor], tuple[Tensor | None, ...]]] = {}
        for role, made in use.roles.items():
            if made.within(self._totals.views) is None:
                of = {name: self._parameters[name].detach().clone().requires_grad_() for name in made.names}
                with torch.enable_grad():
                    tensor = made.again(of)
                found[role] = partial(_pull, tensor, tuple(of.values()))
        return found


def _pull(tensor: Tensor, of: tuple[Tensor, ...], gradients: Tensor) -> tuple[Tensor | None, ...]:
    if not tensor.requires_grad:  # detached on the way
        return (None,) * len(of)
    back = gradients.to(tensor.dtype)
    return torch.autograd.grad([tensor], of, [back], retain_graph=True, allow_unused=True, is_grads_batched=True)


def _components(uses: Iterable[Use], views: Mapping[str, Tensor]) -> dict[Use, int]:
    """Uses that cannot be squared alone, each with the number of those that have a parameter's element in common."""
    numbers: dict[Use, int] = {}
    parts: list[tuple[str, int, int, Use]] = []
    for i, use in enumerate(uses):
        for made in use.roles.values():
            within = made.within(views)
            if within is None:
                numbers[use] = i
                parts += [(name, 0, views[name].numel(), use) for name in made.names]
            else:
                start = int(within.storage_offset() - views[made.names[0]].storage_offset())
                length = int(sum((n - 1) * step for n, step in zip(within.shape, within.stride(), strict=True))) + 1
                parts.append((made.names[0], start, start + length, use))
    parts.sort(key=lambda part: part[:3])
    last, end, joined = "", 0, None
    for i, (name, start, stop, use) in enumerate(parts):
        if joined is not None and name == last and start < end:
            old = {numbers[one] for one in (use, joined) if one in numbers}
            number = min(old, default=len(parts) + i)
            numbers = {one: number if n in old else n for one, n in numbers.items()} | {use: number, joined: number}
            end = max(end, stop)
        else:
            last, end = name, stop
        joined = use
    return numbers
