"""Closed forms of convolutions: by unfolding the input, or, with one input channel a group, by another convolution.

A transposed convolution is that of its output gradient: the roles of input and output gradient are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from .totals import Totals

UNFOLDED = 1 << 21  # elements of an unfolded input at a time, few enough to stay in the cache
_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def gradients(rule: str, arguments: dict[str, Any], a: Tensor, d: Tensor) -> Tensor:
    """Gradients [B, *weight_shape] of each sample: input a [B, s, C, ...], output gradient d [B, s, M, ...]."""
    image, d = (d, a) if rule == "transposed conv" else (a, d)
    b, s, m, *sizes = d.shape
    groups, (_, depth, *kernel) = arguments.get("groups", 1), arguments["weight_shape"]
    if depth == 1:
        return _by_convolution(arguments, image, d).view(b, s, m, 1, *kernel).sum(1)
    windows = unfold(image.flatten(0, 1), kernel, arguments, False, sizes)  # [b * s, C, *kernel, *T]
    right = windows.reshape(b, s, groups, depth * math.prod(kernel), -1).permute(0, 2, 3, 1, 4).flatten(3)
    left = d.flatten(3).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(3)
    return (left @ right.transpose(2, 3)).view(b, m, depth, *kernel)


def _by_convolution(arguments: dict[str, Any], image: Tensor, d: Tensor) -> Tensor:
    """Depthwise: each output gradient is the kernel that its channel's image meets; [b * s * M, 1, *kernel]."""
    kernel = arguments["weight_shape"][2:]
    n, m, channels = len(kernel), d.shape[2], image.shape[2]
    if m > channels:
        image = image.repeat_interleave(m // channels, 2)
    image, sizes = image.flatten(0, 1), d.shape[3:]
    if sizes.numel() == 1:  # a product; torch's convolutions with such kernels are fifty times slower
        windows = unfold(image, kernel, arguments, False, sizes)
        return windows.reshape(-1, 1, *kernel) * d.reshape(-1, 1, *[1] * n)
    stride, dilation = (each(arguments.get(key, 1), n) for key in ("stride", "dilation"))
    image = _padded(image, kernel, arguments)
    rows = image.shape[0] * image.shape[1]
    found = _CONVOLUTIONS[n](
        image.reshape(1, rows, *image.shape[2:]),
        d.reshape(rows, 1, *d.shape[3:]),
        stride=tuple(dilation),
        dilation=tuple(stride),
        groups=rows,
    )
    for k, size in enumerate(kernel):  # a stride may leave a rest of the image, seen by no window
        found = found.narrow(2 + k, 0, size)
    return found.reshape(rows, 1, *kernel)


def add_squares(totals: Totals, rule: str, arguments: dict[str, Any], into: Tensor, a: Tensor, d: Tensor) -> None:
    """Add the squares of `gradients` to `into`, without keeping those of several samples where they are large."""
    image, d = (d, a) if rule == "transposed conv" else (a, d)
    b, s, m, *sizes = d.shape
    groups, (_, depth, *kernel) = arguments.get("groups", 1), arguments["weight_shape"]
    positions = math.prod(sizes)
    if depth == 1:
        for part in chunks(b, m * s * positions):
            into += gradients("conv", arguments, image[part], d[part]).square_().sum(0)
        return
    d, channels_last = d.flatten(3), groups == 1  # rows of channels copy faster than single elements
    size = depth * math.prod(kernel)
    sums = into.new_zeros(m, *kernel, depth) if channels_last else into  # permuted back at the end
    memory: Tensor | None = None
    for part in chunks(b, size * groups * positions * s):
        strided = unfold(image[part].flatten(0, 1), kernel, arguments, channels_last, sizes)
        if memory is None:  # allocated once: new pages are expensive
            memory = strided.new_empty(strided.shape)
        windows = memory[: len(strided)].copy_(strided)
        if channels_last:  # [b * s, *T, *kernel, C]
            right = windows.view(-1, 1, s * positions, size).transpose(2, 3)
            left = d[part].permute(0, 1, 3, 2).reshape(-1, 1, s * positions, m).transpose(2, 3)
        else:  # [b * s, C, *kernel, *T]
            right = windows.view(-1, s, groups, size, positions).permute(0, 2, 3, 1, 4).flatten(3)
            left = d[part].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(3)
        totals.outer(sums, left, right)
    if channels_last:
        into.add_(sums.movedim(-1, 1))


def unfold(
    a: Tensor, kernel: Sequence[int], arguments: dict[str, Any], channels_last: bool, sizes: Sequence[int]
) -> Tensor:
    """The windows that a convolution with an output of these sizes sees, as a view of the padded input [B, C, ...].

    Returns: [B, C, *kernel, *T], or [B, *T, *kernel, C] with channels adjacent in memory.
    """
    n = len(kernel)
    stride, dilation = (each(arguments.get(key, 1), n) for key in ("stride", "dilation"))
    if channels_last:
        a = a.movedim(1, -1).contiguous().movedim(-1, 1)
    a = _padded(a, kernel, arguments)
    if channels_last:
        a = a.movedim(1, -1).contiguous().movedim(-1, 1)  # a no-op if padding kept the order
    batch, channel, *steps = a.stride()
    inside = tuple(t * d for t, d in zip(steps, dilation, strict=True))
    across = tuple(t * s for t, s in zip(steps, stride, strict=True))
    if channels_last:
        shape, strides = (len(a), *sizes, *kernel, a.shape[1]), (batch, *across, *inside, channel)
    else:
        shape, strides = (*a.shape[:2], *kernel, *sizes), (batch, channel, *inside, *across)
    return a.as_strided(shape, strides, a.storage_offset())


def _padded(a: Tensor, kernel: Sequence[int], arguments: dict[str, Any]) -> Tensor:
    """[B, C, ...] with the zeros that the convolution adds."""
    n, padding = len(kernel), arguments.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, each(arguments.get("dilation", 1), n), strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in each(0 if padding == "valid" else padding, n)]
    if not any(low or high for low, high in pads):
        return a
    return functional.pad(a, [p for pair in reversed(pads) for p in pair])


def chunks(samples: int, elements: int) -> Iterator[slice]:
    """Slices of samples that hold about UNFOLDED elements, at so many for each."""
    step = max(1, UNFOLDED // max(1, elements))
    return (slice(at, min(at + step, samples)) for at in range(0, samples, step))


def each(value: Any, n: int) -> list[int]:
    """One number for each dimension."""
    if isinstance(value, int):
        return [value] * n
    return list(value) * n if len(value) == 1 else list(value)
