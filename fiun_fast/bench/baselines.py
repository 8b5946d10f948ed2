"""The competitors, in plain torch: what people run today, and the best they could write.

All compute the same: merge by maximum, select m > alpha I, theta <- theta * min(lam I / m, 1). A model's parameters,
its original Fisher and a forget Fisher are lists of tensors, or flat buffers where a way says so; a `Group` says which
requests reach which models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Tensors = list[Tensor]
Network = tuple[Sequence[Any], Sequence[Any], Sequence[Any], "Sequence[Group]"]
# parameters by model, originals by model, forget Fishers by request, groups


class Group(NamedTuple):
    """Models that the same requests reach."""

    sources: tuple[int, ...]
    nodes: tuple[int, ...]


class Way(NamedTuple):
    """One way to unlearn."""

    merge: Callable[[Any], Any]  # several forget Fishers -> one
    dampen: Callable[[Any, Any, Any, float, float], object]  # (theta, original, merged, alpha, lam), in place
    per_model: bool = False  # every model merges for itself, as code does that handles one model at a time


@torch.no_grad()
def unlearn(way: Way, network: Network, alpha: float, lam: float) -> None:
    """Model by model."""
    thetas, originals, forgets, groups = network
    for group in groups:
        sources = [forgets[k] for k in group.sources]
        merged = None
        for n in group.nodes:
            if merged is None or way.per_model:
                merged = way.merge(sources) if len(sources) > 1 else sources[0]
            way.dampen(thetas[n], originals[n], merged, alpha, lam)


def dampen_naive(thetas: Tensors, originals: Tensors, merged: Tensors, alpha: float, lam: float) -> None:
    """The chain of existing SSD and FIUn code: parameter by parameter, selected elements by index.

    The exponent is 1 and goes through pow all the same; the bound is applied by index.
    """
    for theta, original, forget in zip(thetas, originals, merged, strict=True):
        locations = torch.where(forget > original.mul(alpha))
        weight = original.mul(lam).div(forget).pow(1)
        update = weight[locations]
        update[torch.where(update > 1)] = 1
        theta[locations] = theta[locations].mul(update).to(theta.dtype)


@torch.no_grad()
def unlearn_named(
    models: Mapping[str, nn.Module],
    originals: Mapping[str, Mapping[str, Tensor]],
    reaching: Mapping[str, Sequence[Mapping[str, Tensor]]],
    alphas: Mapping[str, float],
    lams: Mapping[str, float],
) -> None:
    """Existing code again, by node: Fishers are dicts that name the parameters, `reaching` has the forget Fishers."""
    for node, fishers in reaching.items():
        merged = merge_clone([list(fisher.values()) for fisher in fishers])
        original = [originals[node][name] for name in fishers[0]]
        thetas = [models[node].get_parameter(name).detach() for name in fishers[0]]
        dampen_naive(thetas, original, merged, alphas[node], lams[node])


def dampen_tensor(theta: Tensor, original: Tensor, merged: Tensor, alpha: float, lam: float) -> None:
    """One tensor, in place, without gathers; an expression that torch.compile turns into one loop."""
    factor = (original * lam / merged).clamp(max=1.0)
    theta.copy_(torch.where(merged > original * alpha, theta * factor, theta))


def dampen_tidy(thetas: Tensors, originals: Tensors, merged: Tensors, alpha: float, lam: float) -> None:
    """All tensors of a model, one `torch.where` each."""
    for theta, original, m in zip(thetas, originals, merged, strict=True):
        dampen_tensor(theta, original, m, alpha, lam)


def dampen_foreach(thetas: Tensors, originals: Tensors, merged: Tensors, alpha: float, lam: float) -> None:
    """torch._foreach_* over all parameters of a model; only the selection, which has no such form, goes one by one."""
    threshold = torch._foreach_mul(originals, alpha)
    factor = torch._foreach_mul(originals, lam)
    torch._foreach_div_(factor, merged)
    torch._foreach_clamp_max_(factor, 1.0)
    for f, m, t in zip(factor, merged, threshold, strict=True):
        f.masked_fill_(m <= t, 1.0)
    torch._foreach_mul_(thetas, factor)


def merge_clone(forgets: Sequence[Tensors]) -> Tensors:
    """Clone the first, then take the maximum with each further one, parameter by parameter."""
    merged = [f.clone() for f in forgets[0]]
    for forget in forgets[1:]:
        for s, f in enumerate(forget):
            merged[s] = torch.maximum(merged[s], f)
    return merged


def merge_tidy(forgets: Sequence[Tensors]) -> Tensors:
    """As merge_clone without the clone, and in place after the first maximum; of two at least."""
    merged = [torch.maximum(a, b) for a, b in zip(*forgets[:2], strict=True)]
    for forget in forgets[2:]:
        for m, f in zip(merged, forget, strict=True):
            torch.maximum(m, f, out=m)
    return merged


def merge_foreach(forgets: Sequence[Tensors]) -> Tensors:
    """torch._foreach_maximum over all parameters; of two at least."""
    merged = list(torch._foreach_maximum(forgets[0], forgets[1]))
    for forget in forgets[2:]:
        torch._foreach_maximum_(merged, forget)
    return merged


def merge_flat(forgets: Sequence[Tensor]) -> Tensor:
    """Flat buffers, as an expression for torch.compile."""
    merged = forgets[0]
    for f in forgets[1:]:
        merged = torch.maximum(merged, f)
    return merged


WAYS = {  # name -> kind, way
    "naive": ("naive", Way(merge_clone, dampen_naive, per_model=True)),
    "tidy": ("torch", Way(merge_tidy, dampen_tidy)),
    "foreach": ("torch", Way(merge_foreach, dampen_foreach)),
}
SETS = {"mode": "max-autotune-no-cudagraphs"}  # graphs are replayed apart from this, on a GPU
COMPILED: dict[str, tuple[bool, bool, dict[str, Any]]] = {
    # name -> are the models one tensor, [N, P]; is a group one graph; options of torch.compile
    "compiled, flat": (False, False, {}),
    "compiled, stacked": (True, False, {}),
    "one graph, flat": (False, True, {}),
    "one graph, stacked": (True, True, {}),
    "max-autotune, flat": (False, True, SETS),
    "max-autotune, stacked": (True, True, SETS),
}
MANY = 16  # flat models in one graph; with more, compiling takes longer than anybody waits


def compiled(name: str, alpha: float, lam: float, backend: str) -> Callable[[Network], None]:
    """One of `COMPILED`, to be called with a network, for which the models were re-homed: flat, or stacked as one.

    A graph a merge and one a model, or one for a group: the merge goes into the loop that dampens. Compilation happens
    at the first call and is not timed; the caller resets torch._dynamo, so that the shapes of other cases reach no
    limit. Numbers are constants to the compiler.
    """
    _, whole, options = COMPILED[name]

    def with_numbers(theta: Tensor, original: Tensor, merged: Tensor) -> None:
        dampen_tensor(theta, original, merged, alpha, lam)

    def group(thetas: Sequence, originals: Sequence, sources: Sequence) -> None:
        merged = merge_flat(sources)
        for theta, original in zip(thetas, originals, strict=True):
            with_numbers(theta, original, merged)

    made = [
        torch.compile(f, backend=backend, dynamic=False, fullgraph=True, **options)
        for f in (merge_flat, with_numbers, group)
    ]
    if not whole:
        way = Way(made[0], lambda theta, original, merged, *numbers: made[1](theta, original, merged))
        return lambda network: unlearn(way, network, alpha, lam)

    @torch.no_grad()
    def run(network: Network) -> None:
        thetas, originals, forgets, groups = network
        for g in groups:
            made[2]([thetas[n] for n in g.nodes], [originals[n] for n in g.nodes], [forgets[k] for k in g.sources])

    return run


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


def zero_each(gradients: Tensors) -> None:
    """As `optimizer.zero_grad` does, parameter by parameter."""
    for gradient in gradients:
        gradient.zero_()


STEPS: dict[str, tuple[str, Callable[[Tensors, Tensors], None], Callable[[Tensors], None]]] = {
    # name -> kind, how to add, how to zero the gradients
    "naive": ("naive", accumulate_naive, zero_each),
    "tidy": ("torch", accumulate_tidy, zero_each),
    "foreach": ("torch", accumulate_foreach, torch._foreach_zero_),
}
