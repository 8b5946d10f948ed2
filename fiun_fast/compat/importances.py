"""Importances as these classes keep them, a dict of name -> tensor: as Fishers, merged (FIUn), compared (ASSD)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

import fiun_fast as ff
from fiun_fast.arguments import FISHER_DTYPES, THETA_DTYPES, check_number, listed, short
from fiun_fast.memory import check_addressable
from fiun_fast.naming import Names, matched, near
from fiun_fast.wrappers import check_gathered

LOWEST = 100 - math.log(101)  # ASSD's q for a fraction of 1: a smaller q belongs to no fraction

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
Value = TypeVar("Value")
Importances = Mapping[str, Tensor] | ff.Fisher


def values_of(what: str, importances: object) -> Mapping[str, Tensor]:
    """The dict itself, or that of a Fisher.

    Raises:
        ArgumentError: it is neither; the message begins with `what`.
        DTypeError: a value is not a floating-point tensor.
        FiunError: a value has no plain memory of its own (a DTensor, meta, sparse, freed, …).

    """
    if isinstance(importances, ff.Fisher):
        check_addressable(what, importances.buffer)
        return importances.as_dict()
    if not isinstance(importances, Mapping) or not importances:
        found = "empty" if isinstance(importances, Mapping) else f"a {type(importances).__name__}"
        raise ff.ArgumentError(f"{what} is {found}, expected a dict of name -> tensor, as calc_importance returns it")
    for name, value in importances.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ff.DTypeError(f"{what}: {name!r} is {found}, expected a floating-point tensor")
        check_addressable(f"{what}: {name!r}", value)
    return importances


def named_as(
    model: nn.Module, parameters: Iterable[str], what: str, values: Mapping[str, Value]
) -> Mapping[str, Value]:
    """The same values, by the names of `model.named_parameters()`: what wraps a model now, or did then, is no matter.

    Raises:
        LayoutError: a name that no parameter has, or two of one parameter; the message begins with `what`.

    """
    there = set(parameters)
    if values.keys() <= there:
        return values
    check_gathered("model", model)
    names = Names(model)
    own = {names.find(name): name for name in there}
    renamed: dict[str, Value] = {}
    given: dict[str, str] = {}
    for name, value in values.items():
        if (first := names.find(name)) is None:
            raise ff.LayoutError(
                f"{what} has {name!r}, which is not a parameter of the model{near(name, own.values())}"
            )
        if own[first] in renamed:
            raise ff.LayoutError(f"{what} has {name!r} and {given[own[first]]!r}, which are one parameter of the model")
        renamed[own[first]], given[own[first]] = value, name
    return renamed


def as_fisher(values: Mapping[str, Tensor], layout: ff.Layout | None = None) -> ff.Fisher:
    """A Fisher over these tensors: without a copy if they are adjacent in memory, in order; else in a copy.

    Args:
        values: name -> importance.
        layout: theirs, where there is one already.

    Raises:
        ArgumentError: a negative entry.
        DTypeError, DeviceError: dtypes or devices that differ.

    """
    buffer = _run(list(values.values()))
    if buffer is None:
        return ff.Fisher.from_dict(values)
    if not not_negative(buffer):
        ff.Fisher.from_dict(values)  # looks closely, and names the parameter
    return ff.Fisher(buffer, layout or ff.Layout.from_tensors(values))


def not_negative(buffer: Tensor) -> bool:
    """Whether no entry [n] has the sign of a negative number, which -0 and some NaN have too; as integers: fastest."""
    return buffer.numel() == 0 or bool(buffer.view(_INTEGERS[buffer.dtype]).amin() >= 0)


def mfim(importances: Sequence[Importances], divisor: float = 1.0) -> dict[str, Tensor]:
    """Merge forget importances as FIUn's code does: the maximum, divided once for each source after the first.

    Args:
        importances: one dict for each source, with the same names and shapes; none is changed.
        divisor: what FIUn's scripts divide by (5 if there are several sources); 1: the MFIM of the paper.

    Returns:
        Name -> view of one new flat buffer.

    Raises:
        ArgumentError: no importances, or a divisor that is not a positive number.
        LayoutError, DTypeError, DeviceError: the dicts differ.

    """
    if check_number("divisor", divisor) == 0:
        raise ff.ArgumentError(f"divisor is {divisor}, expected a positive number")
    if not importances:
        raise ff.ArgumentError("no importances to merge")
    listed = [values_of(f"importances[{k}]", one) for k, one in enumerate(importances)]
    layout = ff.Layout.from_tensors(listed[0])
    for k, one in enumerate(listed[1:], start=1):
        difference = layout.difference(ff.Layout.from_tensors(one), "importances[0]", f"importances[{k}]")
        if difference is not None:
            raise ff.LayoutError(f"importances differ: {difference}")
        called = {own: name for name, own in matched(list(one), layout.names).items()}
        listed[k] = {name: one[called.get(name, name)] for name in layout.names}
    if next(iter(listed[0].values())).dtype in FISHER_DTYPES:
        buffer = ff.merge_fishers([as_fisher(one) for one in listed]).buffer
    else:  # half precision stays half precision, bit by bit
        flat = [torch.cat([value.reshape(-1) for value in one.values()]) for one in listed]
        buffer = flat[0]
        for other in flat[1:]:
            buffer = torch.maximum(buffer, other)
    if divisor != 1:
        for _ in listed[1:]:
            buffer /= divisor
    return layout.views(buffer)


def check_averaged(where: str, parameter: Tensor) -> None:
    """Raise a FiunError that begins with `where`, unless a parameter's gradients can be squared and added up.

    Frozen ones get none: they may be of any dtype.
    """
    check_addressable(where, parameter)
    if parameter.requires_grad and parameter.dtype not in THETA_DTYPES:
        raise ff.DTypeError(f"{where} is {short(parameter.dtype)}, expected {listed(THETA_DTYPES)}")


def flat_zeros(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros of the same shapes, dtypes and devices; views of one buffer if all share a dtype and a device."""
    dtypes, devices = {t.dtype for t in like.values()}, {t.device for t in like.values()}
    if len(dtypes) != 1 or len(devices) != 1:
        return {name: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for name, t in like.items()}
    layout = ff.Layout.from_tensors(like)
    return layout.views(torch.zeros(layout.numel, dtype=dtypes.pop(), device=devices.pop()))


def published(original: Mapping[str, Tensor], forget: Mapping[str, Tensor], q: float) -> float:
    """Adaptive alpha as the ASSD scripts compute it (arXiv 2402.10098): numpy.percentile(R, q) over a copy of R.

    R is all finite ratios F / I of all parameters, in the importances' dtype.

    Raises:
        ArgumentError: no ratio is finite.

    """
    ratios = []
    for name, i in original.items():
        ratio = forget[name].to(i.device).div(i)
        ratios.append(ratio[ratio.isfinite()].reshape(-1).cpu())
    every = torch.cat([r.float() if r.itemsize == 2 else r for r in ratios])
    if every.numel() == 0:
        raise ff.ArgumentError("no finite ratio F / I: there is no percentile to take for alpha")
    return float(np.percentile(every.numpy(), q))


def streamed(
    original: Mapping[str, Tensor], forget: Mapping[str, Tensor], q: float, backend: str | None = None
) -> float:
    """The same by `ff.adaptive_alpha`, without a copy of R and interpolated in float64, if q belongs to a fraction."""
    devices = {value.device for values in (original, forget) for value in values.values()}
    if not LOWEST <= q < 100 or len(devices) > 1:
        return published(original, forget, q)
    fraction = math.expm1(100 - q) / 100
    return ff.adaptive_alpha(
        as_fisher(original), as_fisher(forget), forget_fraction=min(fraction, 1.0), backend=backend
    )


def _run(tensors: list[Tensor]) -> Tensor | None:
    """The memory of tensors that are adjacent, in order, as one flat tensor; None if they are not."""
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
