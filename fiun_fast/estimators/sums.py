"""Sums of squared per-sample gradients over a layout, one flat float32 buffer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import DeviceError
from ..kernels import select
from ..layout import Layout
from .capture import Target


class Sums:
    """A flat buffer of zeros with a view a parameter, and the few ways in which squares are added to it.

    Raises:
        DeviceError: the parameters lie on several devices.
        BackendError: the backend cannot be used there.

    """

    def __init__(self, selected: Mapping[str, Tensor], backend: str | None = None) -> None:
        first, like = next(iter(selected.items()))
        for name, p in selected.items():
            if p.device != like.device:
                raise DeviceError(f"parameter {name!r} is on {p.device}, expected {like.device} as {first!r}")
        self.layout = Layout({name: p.shape for name, p in selected.items()})
        self.kernels = select(backend, like.device.type)
        self.buffer = torch.zeros(self.layout.numel, device=like.device)
        self.views = self.layout.views(self.buffer)

    def number(self, t: Tensor) -> Tensor:
        """In the sums' dtype; half precision is widened before anything is added or squared."""
        return t.to(self.buffer.dtype)

    def rows(self, target: Target) -> Tensor:
        """The target's part of the buffer, in its shape."""
        return self.views[target.name][target.start : target.stop]

    def square(self, target: Target, gradients: Tensor) -> None:
        """Add per-sample gradients [B, *shape], squared."""
        into = self.rows(target)
        into += self.number(gradients).square().sum(0).view(into.shape)

    def outer(self, target: Target, left: Tensor, right: Tensor) -> None:
        """Add sum_b (left_b right_b^T)^2: left [B, G, M, T], right [B, G, K, T], for a weight of G * M * K elements."""
        self.kernels.outer_square_accumulate(self.number(left), self.number(right), self.rows(target).view(-1))
