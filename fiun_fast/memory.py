"""Memory of parameters: one contiguous buffer for a model, and the check that nothing lies on top of anything else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .errors import DeviceError, DTypeError, LayoutError
from .layout import Layout, Params, select_parameters


def flatten_(model: torch.nn.Module, params: Params = None) -> torch.Tensor:
    """Re-home the selected parameters in one contiguous buffer, in layout order, without changing a value.

    The parameters stay the same objects (optimisers and ties go on working); only their storage moves. Optional: it
    makes a whole model one run of memory. Moving the model afterwards (`.to()`) takes the parameters apart again.

    Returns:
        The buffer, [numel], of the parameters' dtype and device.

    Raises:
        DTypeError, DeviceError: the parameters differ in dtype or device.
        LayoutError: two parameters share memory without being the same parameter; or as in `Layout.from_module`.

    """
    parameters = select_parameters(model, params)
    (first, like), *_ = parameters.items()
    for name, p in parameters.items():
        if p.dtype != like.dtype:
            raise DTypeError(
                f"parameter {name!r} is {p.dtype}, expected {like.dtype} as {first!r}: one buffer, one dtype"
            )
        if p.device != like.device:
            raise DeviceError(f"parameter {name!r} is on {p.device}, expected {like.device} as {first!r}")
    spans = [span(p) for p in parameters.values()]
    check_disjoint(np.array([s[0] for s in spans]), np.array([s[1] for s in spans]), [repr(n) for n in parameters])
    layout = Layout({name: p.shape for name, p in parameters.items()})
    buffer = torch.empty(layout.numel, dtype=like.dtype, device=like.device)
    for (name, view), p in zip(layout.views(buffer).items(), parameters.values(), strict=True):
        view.copy_(p.detach())
        parameters[name].data = view
    return buffer


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that a dense or strided tensor can touch; empty for no elements."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def check_disjoint(starts: np.ndarray, ends: np.ndarray, labels: Sequence[str]) -> None:
    """Raise a LayoutError that names the first pair of [start, end) byte ranges that overlap; all are 1-D [n]."""
    keep = np.flatnonzero(ends > starts)
    order = keep[np.argsort(starts[keep], kind="stable")]
    clash = np.flatnonzero(starts[order[1:]] < ends[order[:-1]])
    if clash.size:
        i = clash[0]
        raise LayoutError(
            f"{labels[order[i]]} and {labels[order[i + 1]]} share memory: each would be dampened twice; "
            "clone one of them, or leave it out"
        )
