"""Dampening a model from dicts: one plan, whatever devices, dtypes and strides its parameters have.

Making it takes longer than running it where the model is small, so the plan of the last call is kept for a next one:
of a small model for any importances over the same names and shapes, which are copied into memory of the plan's own; of
a large one, whose importances are read where they are, for the same tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fiun_fast as ff
from fiun_fast.guards import alone, denormals_kept, signals_deferred
from fiun_fast.homes import PlacesInPython
from fiun_fast.kernels import select
from fiun_fast.memory import all_plain, check_disjoint, flaw_of, places, span, torch_functions
from fiun_fast.overlaps import held_by

from .importances import as_fisher, not_negative

SMALL = 1 << 19  # elements of all importances together that are copied, so that they stay in the cache


@dataclass(frozen=True)
class Numbers:
    """theta *= min((lam I / F)^exponent, cap) where F > alpha I."""

    alpha: float
    lam: float
    exponent: float
    cap: float


class Kept:
    """The plan of the last call, for a next one that differs in values alone.

    The model must be the same, and each of its parameters and buffers the same object where it was, so that whatever
    was checked of them holds still. A small model's plan has memory of its own for importances: it takes any with the
    names, shapes and dtype of those it was made for. A large one's reads them in place: it takes the same tensors, and
    is gone as soon as one of them is. Signs are looked at each time, as for a new plan.
    """

    _plan: ff.Plan | None
    _fishers: list[ff.Fisher]
    _own: list[tuple[Any, np.ndarray]]  # of Fishers in the plan's own memory: their views, all as integers

    def __init__(self) -> None:
        self._forget()

    def keep(
        self, model: nn.Module, made: Made, given: Sequence[Mapping[str, Tensor]], options: tuple[Any, ...]
    ) -> None:
        """Keep a plan that was made for these with these options, the first of them the backend's name."""
        self._forget()
        if not (made.in_place or made.copied) or not all(type(one) is dict for one in given):
            return
        if made.copied and (any(len(one) != len(made.fishers[0].layout) for one in given) or not torch_functions()):
            return  # some importances were checked, and not copied
        held = held_by(model)
        others = _tensors(held)
        if any(flaw_of(tensor) is not None for tensor in others):  # some buffer has no memory that could be looked at
            return
        watched = [*others, *(_tensors(given) if made.in_place else ())]
        self._places = places() if torch_functions() else PlacesInPython()
        self._places.take(watched)
        self._given = list(map(list, [*given, *held])), list(map(id, watched)), options
        self._alive = [weakref.ref(tensor, self._forget) for tensor in watched]  # ids are given out again afterwards
        self._plan, self._fishers = made.plan, made.fishers
        for fisher in made.fishers if made.copied else ():
            own = places()
            own.take(list(fisher.as_dict().values()))
            self._own.append((own, fisher.buffer.numpy().view(f"i{fisher.buffer.itemsize}")))
        self._values: tuple[float, float] | None = None

    def _forget(self, _: object = None) -> None:
        self._plan: ff.Plan | None = None
        self._fishers: list[ff.Fisher] = []
        self._own: list[
            tuple[Any, np.ndarray]
        ] = []  # of Fishers in the plan's own memory: their views, all as integers

    def fitting(
        self, model: nn.Module, given: Sequence[Mapping[str, Tensor]], options: tuple[Any, ...]
    ) -> ff.Plan | None:
        """The plan, if it is one for that model and these dicts, options and backend, and no entry has a sign.

        It has the values of these dicts then.
        """
        plan = self._plan
        if plan is None or plan.models["model"] is not model or not all(type(one) is dict for one in given):
            return None
        held = held_by(model)
        watched = _tensors(held if self._own else [*held, *given])
        if self._given != (list(map(list, [*given, *held])), list(map(id, watched)), options):
            return None
        if not self._places.unchanged(watched):
            return None
        part = plan.parts[0]
        if select(options[0], part.table.device.type) is not part.backend:
            return None
        if self._own:
            return plan if self._copy(given) else None
        return plan if all(map(not_negative, {id(f): f.buffer for f in self._fishers}.values())) else None

    def _copy(self, given: Sequence[Mapping[str, Tensor]]) -> bool:
        """Copy importances into the plan's memory; False where one is of another kind, or an entry has a sign."""
        for (own, signed), fisher, values in zip(self._own, self._fishers, given, strict=True):
            tensors = [values.get(name) for name in fisher.layout.names]
            if not all_plain(tensors) or not own.copy_from(tensors, fisher.buffer.itemsize):
                return False
            if signed.size and signed.min() < 0:  # as `not_negative`; numpy wakes no other thread
                return False
        return True

    def set_values_(self, alpha: float, lam: float) -> None:
        """Change the plan's, where they are others than in the last call."""
        if self._plan is not None and (alpha, lam) != self._values:
            self._plan.set_values_(alpha=alpha, lam=lam)
            self._values = alpha, lam


def _tensors(mappings: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    return [tensor for one in mappings for tensor in one.values() if tensor is not None]


@dataclass(frozen=True)
class Made:
    """A plan, the Fishers in it, and what these are: the importances' own memory, or copies of all; neither: it varies.

    Where they are either, the plan writes to the model's own parameters.
    """

    plan: ff.Plan
    fishers: list[ff.Fisher]
    in_place: bool
    copied: bool


def dampen(
    model: nn.Module,
    original: Mapping[str, Tensor],
    forgets: Sequence[Mapping[str, Tensor]],
    numbers: Numbers,
    backend: str | None,
    options: Mapping[str, bool],
) -> tuple[ff.Report, Made]:
    """Dampen the named parameters by the maximum of `forgets`; all is checked before anything is written.

    Args:
        model: its parameters may lie on several devices, and need not be contiguous.
        original, forgets: name -> importance, on any device; the same names.
        numbers: alpha, lambda, exponent and cap.
        backend, options: as for `ff.plan` and `Plan.run_`.

    Returns:
        The report, with one node "model"; with one node per part if devices, dtypes or contiguity (channels_last)
        differ among the parameters, named as in "model, torch.float32 on cpu, strided". And the plan that it is of.

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
    fishers, in_place = [], len(parts) == 1 and not strided
    small = sum(parameters[name].numel() for name in original) * (1 + len(forgets)) <= SMALL
    for (device, dtype, copied), names in parts.items():
        node = "model" if len(parts) == 1 else f"model, {dtype} on {device}{', strided' if copied else ''}"
        chosen = [{name: values[name] for name in names} for values in (original, *forgets)]
        made = [(ff.Fisher.from_dict if small else as_fisher)(values).to(device) for values in chosen]
        pairs = zip(made, chosen, strict=True)
        in_place &= all(fisher.buffer.data_ptr() == values[names[0]].data_ptr() for fisher, values in pairs)
        dag.add_model(node, dense if copied else model, fisher=made[0])
        requests += [ff.ForgetRequest(node, fisher) for fisher in made[1:]]
        fishers += made
    plan = ff.plan(
        dag, requests, alpha=numbers.alpha, lam=numbers.lam, exponent=numbers.exponent, cap=numbers.cap, backend=backend
    )
    with alone, signals_deferred():
        report = plan.run_(**options)
        if not options["dry_run"]:
            for name, copy in dense.items():
                _write(parameters[name], copy)
    copied = small and len(parts) == 1 and not strided and fishers[0].buffer.is_cpu
    return report, Made(plan, fishers, in_place, copied)


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
