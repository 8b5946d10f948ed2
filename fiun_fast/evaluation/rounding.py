"""Does it come back when the weights are rounded? Quantise a copy and test again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..arguments import check_count
from ..errors import ArgumentError
from ..estimators.reading import Forward
from .accuracies import Accuracies, accuracies
from .outputs import check_again


@torch.no_grad()
def quantised(model: nn.Module, bits: int = 8) -> nn.Module:
    """A copy of a model whose weights are rounded to `bits` bits, and are then floating-point numbers again.

    Round to nearest, symmetric, a scale for each output channel: for every channel w (index 0 of the weight) of a
    parameter with two dimensions or more, s = max |w| / (2^(bits - 1) - 1), w <- s · round(w / s), ties to even.
    Biases, norms and buffers stay; activations are not quantised. Channels of zeros stay zero. (Of
    ConvTranspose the first index is the input channel.)

    Args:
        model: stays as it is.
        bits: 2 to 16.

    Raises:
        ArgumentError: other bits.

    """
    levels = 2 ** (check_count("bits", bits, least=2, most=16) - 1) - 1
    other = copy.deepcopy(model)
    for p in other.parameters():
        if p.dim() > 1 and p.is_floating_point():
            w = p.double().flatten(1)
            scale = (w.abs().amax(1, keepdim=True) / levels).clamp(min=torch.finfo(torch.float64).tiny)
            p.copy_(((w / scale).round() * scale).view(p.shape))
    return other


def requantised(
    model: nn.Module,
    *,
    forget: Iterable[Any] | None = None,
    retain: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    bits: Sequence[int] = (8, 4),
    forward_fn: Forward | None = None,
) -> dict[int, Accuracies]:
    """Accuracies after rounding the weights, {bits: accuracies}: what is merely hidden by small changes comes back.

    Unlearning that moves weights by less than half a step of the grid is undone by it. Source: arXiv 2410.16454.

    Args:
        model: a classifier, [B, C]; stays as it is.
        forget, retain, test: as for `accuracies`; loaders, since several models go over them.
        bits: see `quantised`.
        forward_fn: as for `ff.estimate_fisher`.

    Raises:
        ArgumentError: no set, or no bits, or other bits than 2 to 16.
        EstimationError: as `answers`, naming the set.

    """
    if not list(bits):
        raise ArgumentError("bits is empty, expected numbers such as (8, 4)")
    sets = {"forget": forget, "retain": retain, "test": test}
    for what, data in sets.items():
        check_again(what, data)
    return {b: accuracies(quantised(model, b), **sets, forward_fn=forward_fn) for b in bits}
