"""Closed forms: each sample's gradient, from a layer's input and output gradient.

With a_n the input and δ_n the output gradient of sample n, over positions t where there are any:

    linear, conv   weight  sum_t δ_nt a_nt^T                                     bias  sum_t δ_nt
    norms          weight  sum_t δ_nt x_nt, x the normalised input               bias  as above
    embedding      row v   sum over t with index v of δ_nt
    elementwise            sum of δ_n over what the parameter was spread

`gradients` gives them one after another in memory. Where a layer's weight is used once, `add_squares` adds up their
squares without that: what BackPACK (arXiv 1912.10985) calls sum_grad_squared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import convolution
from .capture import Use
from .totals import Totals


class Axis(NamedTuple):
    """The axis of the samples, which may be merged with another dimension; `inner`: they vary faster than that."""

    axis: int
    inner: bool = False

    def first(self, t: Tensor, samples: int) -> Tensor:
        """[.., B * s, ..] -> [B, s, the other dimensions]."""
        t = t.movedim(self.axis, 0)
        if self.inner:
            return t.reshape(t.shape[0] // samples, samples, *t.shape[1:]).transpose(0, 1)
        return t.reshape(samples, t.shape[0] // samples, *t.shape[1:])


def unsupported(use: Use) -> str | None:
    """Why there is no closed form for this call, or None."""
    channels = use.rule in ("conv", "transposed conv", "group_norm", "batch_norm", "instance_norm", "prelu")
    if channels and use.axis != 0:
        return f"{use.rule} with the samples on axis {use.axis}"
    if use.rule == "batch_norm" and use.arguments.get("training"):
        return "batch_norm on the statistics of the batch"
    if use.rule == "embedding" and (use.arguments.get("max_norm") or use.arguments.get("scale_grad_by_freq")):
        return "embedding with max_norm or scale_grad_by_freq"
    if use.rule == "addmm" and (use.arguments.get("beta", 1) != 1 or use.arguments.get("alpha", 1) != 1):
        return "addmm with factors"
    if use.rule.startswith(("addmm", "matmul")) and len(use.arguments["weight_shape"]) != 2:
        return f"{use.rule} with a weight of {len(use.arguments['weight_shape'])} dimensions"
    if use.rule == "matmul from the left" and use.given is not None and use.axis >= use.given.dim() - 2:
        return f"{use.rule} with the samples on axis {use.axis}"
    if use.rule == "grouped" and (use.owners is None or use.arguments.get("offs") is None):
        return "grouped_mm of rows that were not picked by an index"
    return None


# What each rule is given: an input [B, s, ...] and an output gradient [B, s, ...], both in the sum's dtype.
# What it returns: gradients [B, *shape] for a role.


def _linear(use: Use, role: str, a: Tensor, d: Tensor) -> Tensor:
    if role == "bias":
        return d.flatten(1, -2).sum(1)
    left, right = _sides(use, a, d)
    return left.transpose(1, 2) @ right


def _sides(use: Use, a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, M] and [B, T, K] for a weight [M, K]; only linear has its weight transposed."""
    if use.rule == "matmul from the left":
        return d.transpose(-2, -1).flatten(1, -2), a.transpose(-2, -1).flatten(1, -2)
    a, d = a.flatten(1, -2), d.flatten(1, -2)
    return (d, a) if use.rule == "linear" else (a, d)


def _grouped(use: Use, role: str, a: Tensor, d: Tensor) -> Tensor:
    """a: [B, groups, T, K], d: [B, groups, T, M], weight: [groups, K, M]."""
    return a.transpose(2, 3) @ d


def _conv(use: Use, role: str, a: Tensor, d: Tensor) -> Tensor:
    if role == "bias":
        return d.flatten(3).sum((1, 3))
    return convolution.gradients(use.rule, use.arguments, a, d)


def _embedding(use: Use, role: str, index: Tensor, d: Tensor) -> Tensor:
    row, sample, gradient = _cells(use, index, d)
    found = d.new_zeros(len(index), *use.arguments["weight_shape"])
    found[sample, row] = gradient
    return found


def _cells(use: Use, index: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and samples that occur together, [n] each, and their gradients [n, E]."""
    index, d = index.flatten(1), d.flatten(1, -2)  # [B, T], [B, T, E]
    rows = use.arguments["weight_shape"][0]
    sample = torch.arange(len(index), device=index.device)[:, None]
    cells, place = torch.unique(sample * rows + index, return_inverse=True)
    gradient = d.new_zeros(len(cells), d.shape[-1]).index_add_(0, place.flatten(), d.flatten(0, 1))
    row = cells % rows
    if (padding := use.arguments.get("padding_idx")) is not None:
        gradient.masked_fill_((row == padding % rows)[:, None], 0)
    return row, cells // rows, gradient


def _normalised(use: Use, role: str, a: Tensor, d: Tensor) -> Tensor:
    """Weight and bias have the shape of the last dimensions (layer_norm, rms_norm)."""
    shape, eps = tuple(use.arguments["normalized_shape"]), use.arguments.get("eps")
    if role == "weight":
        if use.rule == "layer_norm":
            x = functional.layer_norm(a, shape, None, None, 1e-5 if eps is None else eps)
        else:
            x = functional.rms_norm(a, shape, None, use.arguments["least"] if eps is None else eps)
        d = x.mul_(d)
    return d.reshape(len(d), -1, *shape).sum(1)


def _channels(use: Use, role: str, a: Tensor, d: Tensor) -> Tensor:
    """Weight and bias have one element per channel (group_norm, batch_norm, instance_norm)."""
    b, s, c = d.shape[:3]
    if role == "weight":
        eps, x = use.arguments.get("eps", 1e-5), a.flatten(0, 1)
        mean, var = (use.arguments.get(key) for key in ("running_mean", "running_var"))
        if use.rule == "group_norm":
            x = functional.group_norm(x, use.arguments["num_groups"], None, None, eps)
        elif mean is not None and var is not None and not use.arguments.get("use_input_stats", False):
            x = functional.batch_norm(x, mean.to(x), var.to(x), None, None, False, 0.0, eps)
        else:
            x = functional.instance_norm(x, eps=eps)
        d = x.view(d.shape).mul_(d)
    return d.reshape(b, s, c, -1).sum((1, 3))


def _prelu(use: Use, role: str, a: Tensor, d: Tensor) -> Tensor:
    d = (a.clamp(max=0) * d).reshape(*d.shape[:2], d.shape[2] if d.dim() > 2 else 1, -1)
    shape = use.roles[role].shape
    return d.sum((1, 3)) if shape.numel() > 1 else d.sum((1, 2, 3))[:, None]


def _elementwise(use: Use, role: str, a: Tensor, d: Tensor) -> Tensor:
    shape = use.roles[role].shape
    if d[0].numel() == shape.numel():  # it was repeated as a whole, with the samples beside its own first axes
        return d.movedim(1, 1 + use.axis).reshape(len(d), *shape)
    return d.sum(1).reshape(len(d), *shape)


RULES: dict[str, Callable[[Use, str, Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(("linear", "addmm", "matmul", "matmul from the left"), _linear),
    "grouped": _grouped,
    **dict.fromkeys(("conv", "transposed conv"), _conv),
    "embedding": _embedding,
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(("group_norm", "batch_norm", "instance_norm"), _channels),
    "prelu": _prelu,
    "elementwise": _elementwise,
}
NAMES = {"addmm": "linear", "matmul": "linear", "matmul from the left": "linear"}


def gradients(use: Use, role: str, a: Tensor, d: Tensor) -> Tensor:
    """Gradients [B, *shape] of each sample by the tensor in this role."""
    return RULES[use.rule](use, role, a, d)


def add_squares(totals: Totals, use: Use, role: str, into: Tensor, a: Tensor, d: Tensor) -> bool:
    """Add their squares to `into`, of that tensor's shape, without making them; False: there is no way to."""
    if role == "bias":
        return False
    if RULES[use.rule] is _linear:
        left, right = _sides(use, a, d)
        totals.outer(into, left.transpose(1, 2)[:, None], right.transpose(1, 2)[:, None])
    elif use.rule == "grouped":
        for expert in range(len(into)):  # kernels take one large product better than groups
            left, right = (t[:, expert : expert + 1].transpose(2, 3) for t in (a, d))
            totals.outer(into[expert], left, right)
    elif use.rule in ("conv", "transposed conv"):
        convolution.add_squares(totals, use.rule, use.arguments, into, a, d)
    elif use.rule == "embedding":
        row, _, gradient = _cells(use, a, d)
        into.index_add_(0, row, gradient.square_())
    else:
        return False
    return True


def how(use: Use, role: str) -> str:
    """How a parameter was computed, for the provenance."""
    made = "" if use.roles[role].view else ", of what was made of it"
    return f"closed form, {NAMES.get(use.rule, use.rule)} {role}{made}{use.note}"
