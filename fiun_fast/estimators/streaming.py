"""Gradients folded into a Fisher as they arrive: in a backward, each freed at once, or at an optimiser's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

Fold = Callable[[str, Tensor], None]  # a parameter's name and its gradient, unscaled


@contextmanager
def in_backward(
    parameters: Mapping[str, nn.Parameter],
    every: int,
    scale: float | Callable[[], float],
    free: bool,
    fold: Fold,
    stepped: Callable[[int], None],
) -> Iterator[None]:
    """Call `fold` from post-accumulate-grad hooks, at every `every`-th backward; `stepped` hears how many there were.

    Raises:
        ArgumentError: `every` is not a whole number above 0.

    """
    if not isinstance(every, int) or every < 1:
        raise ArgumentError(f"every is {every!r}, expected a whole number above 0")
    arrivals = dict.fromkeys(parameters, 0)
    done = 0

    def arrived(name: str, parameter: Tensor) -> None:
        nonlocal done
        arrivals[name] += 1
        if arrivals[name] % every or parameter.grad is None:
            return
        factor = float(scale() if callable(scale) else scale)
        fold(name, parameter.grad if factor == 1 else parameter.grad / factor)
        if free:
            parameter.grad = None
        steps = arrivals[name] // every
        if steps > done:
            stepped(steps - done)
            done = steps

    def hook(name: str) -> Callable[[Tensor], None]:
        return lambda parameter: arrived(name, parameter)

    handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def at_steps(optimizer: torch.optim.Optimizer, collect: Callable[[float], None]) -> Iterator[None]:
    """Call `collect` with the scale of the gradients before every step that the optimiser takes.

    By then gradients are accumulated, reduced over processes and, under a GradScaler, unscaled; a step that a scaler
    skips is not seen. Fused optimisers unscale by themselves: their scale, 1 for others, is handed on.

    Raises:
        ArgumentError: it is no optimiser.

    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")

    def before(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found: Any = getattr(stepping, "found_inf", None)  # set by a GradScaler on fused optimisers alone
        if found is not None and bool(found):
            return
        scale: Any = getattr(stepping, "grad_scale", None)
        collect(1.0 if scale is None else float(scale))

    handle = optimizer.register_step_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
