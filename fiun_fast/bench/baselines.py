"""The competitors, in plain torch: what people run today, and the best they could write.

All work on lists: `thetas[n][s]` is parameter s of model n, `originals[n][s]` its original Fisher, `forgets[k][s]` the
forget Fisher of request k. A `Group` says which requests reach which models. All compute the same: merge by maximum,
select m > alpha I, theta <- theta * min(lam I / m, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = list[Tensor]


class Group(NamedTuple):
    """Models that the same requests reach."""

    sources: tuple[int, ...]
    nodes: tuple[int, ...]


@torch.no_grad()
def naive(
    thetas: Sequence[Tensors],
    originals: Sequence[Tensors],
    forgets: Sequence[Tensors],
    groups: Sequence[Group],
    alpha: float,
    lam: float,
) -> None:
    """The chain of existing SSD and FIUn code: model by model, parameter by parameter, selected elements by index.

    Every model merges for itself, into clones, as code does that handles one model at a time. The exponent is 1 and
    goes through pow all the same; the bound is applied by index.
    """
    for group in groups:
        for n in group.nodes:
            merged = (
                merge_clone([forgets[k] for k in group.sources]) if len(group.sources) > 1 else forgets[group[0][0]]
            )
            for theta, original, forget in zip(thetas[n], originals[n], merged, strict=True):
                locations = torch.where(forget > original.mul(alpha))
                weight = original.mul(lam).div(forget).pow(1)
                update = weight[locations]
                update[torch.where(update > 1)] = 1
                theta[locations] = theta[locations].mul(update).to(theta.dtype)


@torch.no_grad()
def tidy(
    thetas: Sequence[Tensors],
    originals: Sequence[Tensors],
    forgets: Sequence[Tensors],
    groups: Sequence[Group],
    alpha: float,
    lam: float,
) -> None:
    """The same without gathers, merging once a group: out of place, one `torch.where` a parameter."""
    for group in groups:
        merged = merge_tidy([forgets[k] for k in group.sources])
        for n in group.nodes:
            for theta, original, forget in zip(thetas[n], originals[n], merged, strict=True):
                dampen_tensor(theta, original, forget, alpha, lam)


@torch.no_grad()
def foreach(
    thetas: Sequence[Tensors],
    originals: Sequence[Tensors],
    forgets: Sequence[Tensors],
    groups: Sequence[Group],
    alpha: float,
    lam: float,
) -> None:
    """torch._foreach_* over all parameters of a model; only the selection, which has no such form, goes one by one."""
    for group in groups:
        merged = merge_foreach([forgets[k] for k in group.sources])
        for n in group.nodes:
            threshold = torch._foreach_mul(originals[n], alpha)
            factor = torch._foreach_mul(originals[n], lam)
            torch._foreach_div_(factor, merged)
            torch._foreach_clamp_max_(factor, 1.0)
            for f, m, t in zip(factor, merged, threshold, strict=True):
                f.masked_fill_(m <= t, 1.0)
            torch._foreach_mul_(thetas[n], factor)


def dampen_tensor(theta: Tensor, original: Tensor, merged: Tensor, alpha: float, lam: float) -> None:
    """One tensor, in place, as an expression that torch.compile turns into one loop."""
    factor = (original * lam / merged).clamp(max=1.0)
    theta.copy_(torch.where(merged > original * alpha, theta * factor, theta))


def dampen_list(thetas: Tensors, originals: Tensors, merged: Tensors, alpha: float, lam: float) -> None:
    """All tensors of a model."""
    for theta, original, m in zip(thetas, originals, merged, strict=True):
        dampen_tensor(theta, original, m, alpha, lam)


def merge_clone(forgets: Sequence[Tensors]) -> list[Tensor]:
    """Clone the first, then take the maximum with each further one, parameter by parameter."""
    merged = [f.clone() for f in forgets[0]]
    for forget in forgets[1:]:
        for s, f in enumerate(forget):
            merged[s] = torch.maximum(merged[s], f)
    return merged


def merge_tidy(forgets: Sequence[Tensors]) -> Tensors:
    """As merge_clone without the clone, and in place after the first maximum."""
    if len(forgets) == 1:
        return forgets[0]
    merged = [torch.maximum(a, b) for a, b in zip(*forgets[:2], strict=True)]
    for forget in forgets[2:]:
        for m, f in zip(merged, forget, strict=True):
            torch.maximum(m, f, out=m)
    return merged


def merge_foreach(forgets: Sequence[Tensors]) -> Tensors:
    """torch._foreach_maximum over all parameters."""
    if len(forgets) == 1:
        return forgets[0]
    merged = list(torch._foreach_maximum(forgets[0], forgets[1]))
    for forget in forgets[2:]:
        torch._foreach_maximum_(merged, forget)
    return merged


def merge_stack(forgets: Sequence[Tensor]) -> Tensor:
    """Flat buffers only: stack, then the maximum over the stack."""
    return torch.stack(list(forgets)).amax(0)


def merge_flat(forgets: Sequence[Tensor]) -> Tensor:
    """Flat buffers, as an expression for torch.compile."""
    merged = forgets[0]
    for f in forgets[1:]:
        merged = torch.maximum(merged, f)
    return merged


class Compiled:
    """torch.compile over flat buffers and over parameter lists; merges once a group, one call a model.

    Compilation happens at the first call and is not timed. `calls` counts compiled graphs run.
    """

    def __init__(self, alpha: float, lam: float, backend: str = "inductor") -> None:
        torch._dynamo.reset()  # no limit reached by the shapes of other cases

        def compiled(function: Callable) -> Callable:
            return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)

        self._flat = compiled(lambda theta, original, merged: dampen_tensor(theta, original, merged, alpha, lam))
        self._list = compiled(lambda thetas, originals, merged: dampen_list(thetas, originals, merged, alpha, lam))
        self.merge_flat = compiled(merge_flat)
        self._merge_list = compiled(merge_tidy)

    @torch.no_grad()
    def flat(self, thetas: Tensors, originals: Tensors, forgets: Tensors, groups: Sequence[Group]) -> None:
        """thetas[n], originals[n] and forgets[k] are flat buffers: the models were re-homed for it."""
        for group in groups:
            sources = [forgets[k] for k in group.sources]
            merged = self.merge_flat(sources) if len(sources) > 1 else sources[0]
            for n in group.nodes:
                self._flat(thetas[n], originals[n], merged)

    @torch.no_grad()
    def lists(
        self,
        thetas: Sequence[Tensors],
        originals: Sequence[Tensors],
        forgets: Sequence[Tensors],
        groups: Sequence[Group],
    ) -> None:
        """The models as they are: lists of parameters."""
        for group in groups:
            sources = [forgets[k] for k in group.sources]
            merged = self._merge_list(sources) if len(sources) > 1 else sources[0]
            for n in group.nodes:
                self._list(thetas[n], originals[n], merged)


def compiled_calls(groups: Sequence[Group]) -> int:
    """Compiled graphs that one run of `Compiled` calls."""
    return sum(len(group.nodes) + (len(group.sources) > 1) for group in groups)


def accumulate_naive(gradients: Tensors, totals: Tensors) -> None:
    """Existing code, parameter by parameter: clone the gradient, square it, add."""
    for gradient, total in zip(gradients, totals, strict=True):
        total += gradient.clone().pow(2)


def accumulate_tidy(gradients: Tensors, totals: Tensors) -> None:
    """One fused operator a parameter."""
    for gradient, total in zip(gradients, totals, strict=True):
        total.addcmul_(gradient, gradient)


def accumulate_foreach(gradients: Tensors, totals: Tensors) -> None:
    """One operator for all."""
    torch._foreach_addcmul_(totals, gradients, gradients)
