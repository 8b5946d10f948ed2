"""Dampening a model from dicts: one plan, whatever devices, dtypes and strides its parameters have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import fiun_fast as ff
from fiun_fast.guards import alone, denormals_kept, signals_deferred
from fiun_fast.memory import check_disjoint, span

from .importances import as_fisher


@dataclass(frozen=True)
class Numbers:
    """theta *= min((lam I / F)^exponent, cap) where F > alpha I."""

    alpha: float
    lam: float
    exponent: float
    cap: float


def dampen(
    model: nn.Module,
    original: Mapping[str, Tensor],
    forgets: Sequence[Mapping[str, Tensor]],
    numbers: Numbers,
    backend: str | None,
    options: Mapping[str, bool],
) -> ff.Report:
    """Dampen the named parameters by the maximum of `forgets`; all is checked before anything is written.

    Args:
        model: its parameters may lie on several devices, and need not be contiguous.
        original, forgets: name -> importance, on any device; the same names.
        numbers: alpha, lambda, exponent and cap.
        backend, options: as for `ff.plan` and `Plan.run_`.

    Returns:
        The report, with one node "model"; with one node per part if devices, dtypes or contiguity (channels_last)
        differ among the parameters, named as in "model, torch.float32 on cpu, strided".

    Raises:
        ArgumentError: undo, where a parameter is not contiguous; or as `ff.plan`.

    """
    parameters = dict(model.named_parameters())
    strided = {name for name in original if not parameters[name].is_contiguous()}
    _check_apart({name: parameters[name] for name in strided})
    if strided and options["undo"]:
        raise ff.ArgumentError(f"undo: parameter {min(strided)!r} is not contiguous; call ff.flatten_(model) first")
    dense = {name: parameters[name].detach().contiguous() for name in strided}  # dampened in a copy, copied back
    parts: dict[tuple, list[str]] = {}
    for name, value in original.items():
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        parts.setdefault((parameters[name].device, wide, name in strided), []).append(name)
    dag, requests = ff.InheritanceDAG(), []
    for (device, dtype, copied), names in parts.items():
        node = "model" if len(parts) == 1 else f"model, {dtype} on {device}{', strided' if copied else ''}"
        dag.add_model(node, dense if copied else model, fisher=_part(original, names, device))
        requests += [ff.ForgetRequest(node, _part(forget, names, device)) for forget in forgets]
    plan = ff.plan(
        dag, requests, alpha=numbers.alpha, lam=numbers.lam, exponent=numbers.exponent, cap=numbers.cap, backend=backend
    )
    with alone, signals_deferred():
        report = plan.run_(**options)
        if not options["dry_run"]:
            for name, copy in dense.items():
                _write(parameters[name], copy)
    return report


def _check_apart(parameters: Mapping[str, Tensor]) -> None:
    """Raise a LayoutError where two elements of a parameter lie in one place, as after `expand`.

    Sorted by stride, each dimension must step over all that the ones before it reach.
    """
    for name, p in parameters.items():
        reach = 0
        for stride, size in sorted(zip(p.stride(), p.shape, strict=True)) if p.numel() else ():
            if size > 1 and stride <= reach:
                raise ff.LayoutError(
                    f"parameter {name!r}: elements of it share memory (shape {list(p.shape)}, stride "
                    f"{list(p.stride())}); pass a copy, p.clone()"
                )
            reach += (size - 1) * stride


def _write(parameter: Tensor, values: Tensor) -> None:
    with torch.inference_mode() if parameter.is_inference() else torch.no_grad():
        parameter.copy_(values)


def _part(values: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> ff.Fisher:
    return as_fisher({name: values[name] for name in names}).to(device)


@torch.no_grad()
def dampen_in_half_precision(
    model: nn.Module,
    original: Mapping[str, Tensor],
    forget: Mapping[str, Tensor],
    numbers: Numbers,
) -> None:
    """The published chain, every step rounded to the importances' dtype: what the kernels deliberately do not do."""
    parameters = {name: p for name, p in model.named_parameters() if name in original}
    _check_apart(parameters)
    names, spans = list(parameters), np.array([span(p) for p in parameters.values()], dtype=np.int64).reshape(-1, 2)
    check_disjoint(spans[:, 0], spans[:, 1], lambda i: f"parameter {names[i]!r}")
    with alone, denormals_kept():
        dampened = {}
        for name, p in parameters.items():
            i, f = original[name].to(p.device), forget[name].to(p.device)
            factor = i.mul(numbers.lam).div(f).pow(numbers.exponent).clamp(max=numbers.cap)
            dampened[name] = torch.where(f > i.mul(numbers.alpha), p * factor, p)
        with signals_deferred():
            for name, values in dampened.items():
                _write(parameters[name], values)
