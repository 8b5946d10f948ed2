"""The same unlearning the way existing code does it: node by node, tensor by tensor, one operation at a time.

It is here to be timed next to `plan.run_()`, and to be compared with it bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]


def merge_max(fishers: Sequence[Tensors]) -> dict[str, Tensor]:
    """MFIM: the element-wise maximum, name by name."""
    merged = {name: value.clone() for name, value in fishers[0].items()}
    for fisher in fishers[1:]:
        for name, value in fisher.items():
            merged[name] = torch.maximum(merged[name], value)
    return merged


@torch.no_grad()
def dampen(model: nn.Module, original: Tensors, forget: Tensors, alpha: float, lam: float) -> None:
    """Selective synaptic dampening: parameters with F > alpha * I shrink by min(lam * I / F, 1)."""
    for name, parameter in model.named_parameters():
        if name not in forget:
            continue
        threshold = original[name].mul(alpha)
        selected = torch.where(forget[name] > threshold)
        factor = original[name].mul(lam).div(forget[name])
        update = factor[selected]
        update[torch.where(update > 1)] = 1
        parameter[selected] = parameter[selected].mul(update)


def unlearn(
    models: Mapping[str, nn.Module],
    originals: Mapping[str, Tensors],
    reaching: Mapping[str, Sequence[Tensors]],
    alphas: Mapping[str, float],
    lams: Mapping[str, float],
) -> None:
    """Every node in turn; `reaching` holds the forget Fishers that reach each node."""
    for node, fishers in reaching.items():
        dampen(models[node], originals[node], merge_max(fishers), alphas[node], lams[node])
