"""Second moments that Adam-like optimisers keep: squared gradients that training has already paid for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .arguments import check_number
from .dtensors import local_tensor
from .errors import ArgumentError, EstimationError, LayoutError
from .memory import check_addressable
from .wrappers import optimizer_in

NEEDED = ("exp_avg_sq", "step")


def second_moments(
    optimizer: torch.optim.Optimizer, selected: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str], int]:
    """Bias-corrected second moments v / (1 - beta2^t) of the selected parameters, in float32 (float64 stays).

    Returns:
        name -> tensor in the parameter's shape; name -> how it was obtained; steps taken.

    Raises:
        ArgumentError: `optimizer` is not an optimiser, or not one of Adam's kind; its numbers are none.
        LayoutError: a parameter is in none of its groups.
        FiunError: a moment has no plain memory of its own (quantised, freed, …).
        EstimationError: the optimiser has taken no step with a parameter yet.

    """
    optimizer = optimizer_in(optimizer)
    kind = type(optimizer).__name__
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    strangers = [name for name, p in selected.items() if id(p) not in groups]
    if strangers:
        raise LayoutError(f"{kind} does not optimise {_names(strangers)} (parameters are told apart by identity)")
    if not all(isinstance(group.get("betas"), (tuple, list)) and len(group["betas"]) == 2 for group in groups.values()):
        raise ArgumentError(f"{kind} keeps no second moments, expected Adam, AdamW or one of their kind")
    states = {name: optimizer.state.get(p, {}) for name, p in selected.items()}
    fresh = [name for name, state in states.items() if not state]
    if fresh:
        raise EstimationError(
            f"{kind} has no state for {_names(fresh)}: no gradient has reached them in a step() yet; choose others "
            "with params=, or estimate a Fisher from data"
        )
    lacking = sorted({key for state in states.values() for key in NEEDED if key not in state})
    if lacking:
        raise ArgumentError(f"{kind} keeps no {', '.join(lacking)}, expected Adam, AdamW or one of their kind")

    moments, how, steps = {}, {}, 0
    for name, p in selected.items():
        state, group = states[name], groups[id(p)]
        step, beta2 = (_number(*pair) for pair in (("step", state["step"]), ("beta2", group["betas"][1])))
        if beta2 >= 1:
            raise ArgumentError(f"{kind}: beta2 is {beta2:g}, expected less than 1")
        if step < 1:
            raise EstimationError(f"{kind} has taken no step with {name!r} yet")
        check_addressable(f"exp_avg_sq of {name!r}", local_tensor(state["exp_avg_sq"]))
        moment = state["exp_avg_sq"].detach()
        moment = moment.to(torch.float64 if moment.dtype == torch.float64 else torch.float32)
        moments[name] = moment / -_expm1_of_log(beta2, step)
        how[name] = f"{kind}'s exp_avg_sq" + (", weight decay inside" if _decays_in_gradient(kind, group) else "")
        steps = max(steps, int(step))
    return moments, how, steps


def _number(what: str, value: Any) -> float:
    """What an optimiser keeps as a number, or as a tensor on any device."""
    return check_number(what, value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value)


def _expm1_of_log(beta: float, step: float) -> float:
    """beta^step - 1, exact where beta is close to 1."""
    return math.expm1(step * math.log(beta)) if beta > 0 else -1.0


def _decays_in_gradient(kind: str, group: Mapping[str, Any]) -> bool:
    """Whether weight decay was added to the gradient before it was squared, as Adam does and AdamW does not."""
    return float(group.get("weight_decay", 0)) != 0 and not group.get("decoupled_weight_decay", kind == "AdamW")


def _names(names: list[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
