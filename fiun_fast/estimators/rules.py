"""Closed forms: each sample's squared gradient, from a layer's input and output gradient, summed over samples.

With a_n the input and δ_n the output gradient of sample n, over positions t where there are any:

    linear, conv   weight  sum_n (sum_t δ_nt a_nt^T)^2;  one position: (δ^2)^T (a^2)     bias  sum_n (sum_t δ_nt)^2
    norms          weight  sum_n (sum_t δ_nt x_nt)^2, x the normalised input             bias  as above
    embedding      row v   sum_n (sum over t with index v of δ_nt)^2

The first is what BackPACK (arXiv 1912.10985) calls sum_grad_squared. No per-sample gradient of a whole layer is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .capture import Use
from .totals import Totals

UNFOLDED = 1 << 21  # elements of an unfolded input at a time, few enough to stay in the cache
ClosedForm = Callable[[Totals, Use, Tensor, Tensor], None]


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


def apply(totals: Totals, use: Use, given: Tensor, gradient: Tensor, axis: Axis, samples: int) -> None:
    """Add a use's squares to the total: `given` and `gradient` carry the samples on `axis`."""
    RULES[use.rule](totals, use, axis.first(given, samples), axis.first(gradient, samples))


def unsupported(use: Use, axis: int) -> str | None:
    """Why there is no closed form for this call, or None."""
    if use.rule in ("conv", "group_norm", "batch_norm") and axis != 0:
        return f"{use.rule} with the samples on axis {axis}"
    if use.rule == "batch_norm" and use.arguments.get("training"):
        return "batch_norm on the statistics of the batch"
    if use.rule == "embedding" and (use.arguments.get("max_norm") or use.arguments.get("scale_grad_by_freq")):
        return "embedding with max_norm or scale_grad_by_freq"
    if use.rule == "addmm" and (use.arguments.get("beta", 1) != 1 or use.arguments.get("alpha", 1) != 1):
        return "addmm with factors"
    return None


# Each rule: given [B, s, ...], gradient [B, s, ...].


def _linear(totals: Totals, use: Use, a: Tensor, d: Tensor) -> None:
    a, d = a.flatten(1, -2), d.flatten(1, -2)  # [B, T, K], [B, T, M]
    if weight := use.roles.get("weight"):
        left, right = (d, a) if use.rule == "linear" else (a, d)  # addmm takes its weight transposed
        totals.outer(weight, left.transpose(1, 2)[:, None], right.transpose(1, 2)[:, None])
    _bias(totals, use, d)


def _bias(totals: Totals, use: Use, d: Tensor) -> None:
    """d: [B, T, M]."""
    if bias := use.roles.get("bias"):
        totals.square(bias, totals.number(d).sum(1))


def _conv(totals: Totals, use: Use, a: Tensor, d: Tensor) -> None:
    b, s = a.shape[:2]
    d = d.flatten(3)  # [B, s, M, T]
    if bias := use.roles.get("bias"):
        totals.square(bias, totals.number(d).sum((1, 3)))
    weight = use.roles.get("weight")
    if weight is None:
        return
    groups = use.arguments.get("groups", 1)
    out_channels, in_channels, *kernel = use.arguments["weight_shape"]
    depth, positions = in_channels * math.prod(kernel), d.shape[-1]
    channels_last = groups == 1  # rows of channels copy faster than single elements; the sum is permuted back
    into = totals.buffer.new_zeros(out_channels, *kernel, in_channels if channels_last else 0)
    memory: Tensor | None = None
    for part in chunks(b, depth * groups * positions * s):
        strided = unfold(totals.number(a[part]).flatten(0, 1), kernel, use.arguments, channels_last)
        memory = (
            strided.new_empty(strided.shape) if memory is None else memory
        )  # allocated once: new pages are expensive
        windows = memory[: len(strided)].copy_(strided)
        if channels_last:  # [b * s, *T, *kernel, C]
            right = windows.view(-1, 1, s * positions, depth).transpose(2, 3)
            left = d[part].permute(0, 1, 3, 2).reshape(-1, 1, s * positions, out_channels).transpose(2, 3)
            totals.outer_into(into.view(-1), left, right)
        else:  # [b * s, C, *kernel, *T]
            right = windows.view(-1, s, groups, depth, positions).permute(0, 2, 3, 1, 4).flatten(3)
            left = d[part].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(3)
            totals.outer(weight, left, right)
    if channels_last:
        totals.rows(weight).add_(into.movedim(-1, 1))


def unfold(a: Tensor, kernel: list[int], arguments: dict[str, Any], channels_last: bool) -> Tensor:
    """The windows that a convolution sees, as a view of the padded input [B, C, ...].

    Returns: [B, C, *kernel, *T], or [B, *T, *kernel, C] with channels adjacent in memory.
    """
    n = len(kernel)
    stride, dilation = (_each(arguments.get(key, 1), n) for key in ("stride", "dilation"))
    padding = arguments.get("padding", 0)
    if padding == "same":
        total = [k_d * (k - 1) for k, k_d in zip(kernel, dilation, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in _each(0 if padding == "valid" else padding, n)]
    if channels_last:
        a = a.movedim(1, -1).contiguous().movedim(-1, 1)
    if any(low or high for low, high in pads):
        a = functional.pad(a, [p for pair in reversed(pads) for p in pair])
    if channels_last:
        a = a.movedim(1, -1).contiguous().movedim(-1, 1)  # a no-op if padding kept the order
    sizes = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(a.shape[2:], kernel, stride, dilation, strict=True)
    ]
    batch, channel, *steps = a.stride()
    inside = tuple(t * d for t, d in zip(steps, dilation, strict=True))
    across = tuple(t * s for t, s in zip(steps, stride, strict=True))
    if channels_last:
        shape, strides = (len(a), *sizes, *kernel, a.shape[1]), (batch, *across, *inside, channel)
    else:
        shape, strides = (*a.shape[:2], *kernel, *sizes), (batch, channel, *inside, *across)
    return a.as_strided(shape, strides, a.storage_offset())


def _embedding(totals: Totals, use: Use, index: Tensor, d: Tensor) -> None:
    index, d = index.flatten(1), totals.number(d.flatten(1, -2))  # [B, T], [B, T, E]
    rows = use.arguments["weight_shape"][0]
    sample = torch.arange(len(index), device=index.device)[:, None]
    cells, place = torch.unique(sample * rows + index, return_inverse=True)  # (sample, row) pairs that occur
    gradient = d.new_zeros(len(cells), d.shape[-1]).index_add_(0, place.flatten(), d.flatten(0, 1))
    row = cells % rows
    if (padding := use.arguments.get("padding_idx")) is not None:
        gradient.masked_fill_((row == padding % rows)[:, None], 0)
    totals.rows(use.roles["weight"]).index_add_(0, row, gradient.square_())


def _normalised(totals: Totals, use: Use, a: Tensor, d: Tensor) -> None:
    """Weight and bias have the shape of the last dimensions (layer_norm, rms_norm)."""
    shape = tuple(use.arguments["normalized_shape"])
    for part in chunks(len(a), a[0].numel()):
        x, g = totals.number(a[part]), totals.number(d[part])
        eps = use.arguments.get("eps")
        if use.rule == "layer_norm":
            x = functional.layer_norm(x, shape, None, None, 1e-5 if eps is None else eps)
        else:
            eps = torch.finfo(a.dtype).eps if eps is None else eps
            x = functional.rms_norm(x, shape, None, eps)
        x, g = (t.reshape(len(t), -1, *shape) for t in (x, g))
        if weight := use.roles.get("weight"):
            totals.square(weight, (x * g).sum(1))
        if bias := use.roles.get("bias"):
            totals.square(bias, g.sum(1))


def _channels(totals: Totals, use: Use, a: Tensor, d: Tensor) -> None:
    """Weight and bias have one element per channel (group_norm, batch_norm)."""
    for part in chunks(len(a), a[0].numel()):
        x, g = totals.number(a[part]), totals.number(d[part])
        count, s, c = x.shape[:3]
        if weight := use.roles.get("weight"):
            eps = use.arguments.get("eps", 1e-5)
            if use.rule == "group_norm":
                x = functional.group_norm(x.flatten(0, 1), use.arguments["num_groups"], None, None, eps)
            else:
                mean, var = (use.arguments[key] for key in ("running_mean", "running_var"))
                x = functional.batch_norm(x.flatten(0, 1), mean.to(x), var.to(x), None, None, False, 0.0, eps)
            product = x.reshape(count, s, c, -1).mul_(g.reshape(count, s, c, -1))
            totals.square(weight, product.sum((1, 3)))
        if bias := use.roles.get("bias"):
            totals.square(bias, g.reshape(count, s, c, -1).sum((1, 3)))


RULES: dict[str, ClosedForm] = {
    "linear": _linear,
    "addmm": _linear,
    "conv": _conv,
    "embedding": _embedding,
    "layer_norm": _normalised,
    "rms_norm": _normalised,
    "group_norm": _channels,
    "batch_norm": _channels,
}
NAMES = {"addmm": "linear"}


def how(use: Use, role: str) -> str:
    """How a parameter was computed, for the provenance."""
    return f"closed form, {NAMES.get(use.rule, use.rule)} {role}{use.note}"


def chunks(samples: int, each: int) -> Iterator[slice]:
    """Slices of samples that hold about UNFOLDED elements, at `each` elements per sample."""
    step = max(1, UNFOLDED // max(1, each))
    return (slice(at, min(at + step, samples)) for at in range(0, samples, step))


def _each(value: Any, n: int) -> list[int]:
    if isinstance(value, int):
        return [value] * n
    return list(value) * n if len(value) == 1 else list(value)
