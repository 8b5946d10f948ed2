"""Importances as these classes keep them, a dict of name -> tensor, and as Fishers over one flat buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import fiun_fast as ff

Importances = Mapping[str, Tensor] | ff.Fisher
FISHER_DTYPES = (torch.float32, torch.float64)


def values_of(what: str, importances: object) -> Mapping[str, Tensor]:
    """The dict itself, or that of a Fisher; an ArgumentError names `what` where it is neither."""
    if isinstance(importances, ff.Fisher):
        return importances.as_dict()
    if not isinstance(importances, Mapping) or not importances:
        found = "empty" if isinstance(importances, Mapping) else f"a {type(importances).__name__}"
        raise ff.ArgumentError(f"{what} is {found}, expected a dict of name -> tensor, as calc_importance returns it")
    for name, value in importances.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ff.DTypeError(f"{what}: {name!r} is {found}, expected a floating-point tensor")
    return importances


def as_fisher(values: Mapping[str, Tensor]) -> ff.Fisher:
    """A Fisher over these tensors: in their own memory where they follow one another there, else in a copy.

    Raises:
        ArgumentError: a negative entry.
        DTypeError, DeviceError: dtypes or devices that differ.

    """
    buffer = _run(list(values.values()))
    if buffer is None:
        return ff.Fisher.from_dict(values)
    lowest = buffer.amin() if buffer.numel() else buffer.new_zeros(())
    if not bool(lowest >= 0):  # NaN hides what is negative; from_dict looks closely, and names the parameter
        ff.Fisher.from_dict(values)
    return ff.Fisher(buffer, ff.Layout.from_tensors(values))


def mfim(importances: Sequence[Importances], divisor: float = 1.0) -> dict[str, Tensor]:
    """Merge forget importances as FIUn's code does: the maximum, then divided once for each further source.

    Args:
        importances: one dict for each source, with the same names and shapes; none is changed.
        divisor: of FIUn's scripts (5 for several sources there); 1: the MFIM of the paper.

    Returns:
        Name -> view of one new flat buffer.

    Raises:
        ArgumentError: no importances, or a divisor that is not a positive number.
        LayoutError, DTypeError, DeviceError: the dicts differ.

    """
    if not 0 < divisor < float("inf"):
        raise ff.ArgumentError(f"divisor is {divisor}, expected a positive number")
    listed = [values_of(f"importances[{k}]", one) for k, one in enumerate(importances)]
    if not listed:
        raise ff.ArgumentError("no importances to merge")
    dtype = next(iter(listed[0].values())).dtype
    if dtype in FISHER_DTYPES:
        merged = ff.merge_fishers([as_fisher(one) for one in listed])
        buffer, layout = merged.buffer, merged.layout
    else:  # half precision stays half precision, bit by bit
        layout = ff.Layout.from_tensors(listed[0])
        for k, one in enumerate(listed[1:], start=1):
            difference = layout.difference(ff.Layout.from_tensors(one), "importances[0]", f"importances[{k}]")
            if difference is not None:
                raise ff.LayoutError(f"importances differ: {difference}")
        flat = [torch.cat([one[name].reshape(-1) for name in layout.names]) for one in listed]
        buffer = flat[0]
        for other in flat[1:]:
            buffer = torch.maximum(buffer, other)
    if divisor != 1:
        for _ in listed[1:]:
            buffer /= divisor
    return layout.views(buffer)


def flat_zeros(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros of the same shapes, dtypes and devices; views of one buffer where these are the same for all."""
    dtypes, devices = {t.dtype for t in like.values()}, {t.device for t in like.values()}
    if len(dtypes) != 1 or len(devices) != 1:
        return {name: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for name, t in like.items()}
    layout = ff.Layout.from_tensors(like)
    return layout.views(torch.zeros(layout.numel, dtype=dtypes.pop(), device=devices.pop()))


def _run(tensors: list[Tensor]) -> Tensor | None:
    """The memory of tensors that follow one another, as one flat tensor; None where they do not."""
    first = tensors[0]
    storage, address = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        same = tensor.dtype == first.dtype and tensor.device == first.device and tensor.layout == torch.strided
        if not same or not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() != storage:
            return None
        if tensor.numel() and tensor.data_ptr() != address:
            return None
        address += tensor.nbytes
    if first.dtype not in FISHER_DTYPES or first.numel() == 0:
        return None
    return first.detach().as_strided((sum(t.numel() for t in tensors),), (1,), first.storage_offset())
