"""Gradients folded into a Fisher as they arrive: during a backward, each freed at once, or at an optimiser's steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..arguments import check_count
from ..errors import ArgumentError, EstimationError

Fold = Callable[[str, Tensor, float], None]  # a parameter's name, its gradient, and the number to divide that by


class _Stream:
    """What the hooks of one `in_backward` share: which backward is running, and what to do when it ends."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        every: int,
        scale: float | Callable[[], float],
        free: bool,
        fold: Fold,
        stepped: Callable[[], None],
    ) -> None:
        self.parameters, self.every, self._scale, self.free = parameters, every, scale, free
        self._fold, self._stepped = fold, stepped
        self.backwards = 0  # completed
        self._running = False
        self._factor = 1.0
        self._late: dict[str, None] = {}  # hold a gradient from earlier backwards of this mini-batch

    def hook(self, name: str) -> Callable[[Tensor], None]:
        """For a parameter's post-accumulate-grad hook."""
        return lambda parameter: self._arrived(name, parameter)

    def _arrived(self, name: str, parameter: Tensor) -> None:
        if not self._running:
            self._running = True
            self._factor = float(self._scale() if callable(self._scale) else self._scale)
            self._await_end()
        if (self.backwards + 1) % self.every:
            self._late[name] = None
        else:
            self._late.pop(name, None)
            self._take(name, parameter)

    def _await_end(self) -> None:
        """Have `_ended` called after the outermost backward; one nested in it (checkpointing) is not a step."""
        node = _enclosing()
        if node is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)
            return
        following = next(n for n, _ in node.next_functions if n is not None)  # runs later, in the backward around this

        def reached(_: Any) -> None:
            handle.remove()
            self._await_end()

        handle = following.register_prehook(reached)

    def _ended(self) -> None:
        self._running = False
        self.backwards += 1
        if self.backwards % self.every == 0:
            for name in self._late:
                self._take(name, self.parameters[name])
            self._late.clear()
            self._stepped()

    def _take(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        self._fold(name, parameter.grad, self._factor)
        if self.free:
            parameter.grad = None

    def drop(self) -> None:
        """Clear the gradients of an incomplete mini-batch."""
        if self.free:
            for name in self._late:
                self.parameters[name].grad = None


def _enclosing() -> Any:
    """The graph node whose backward, written in Python, started the current backward; None if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


@contextmanager
def in_backward(
    parameters: Mapping[str, nn.Parameter],
    every: int,
    scale: float | Callable[[], float],
    free: bool,
    fold: Fold,
    stepped: Callable[[], None],
) -> Iterator[None]:
    """Call `fold` from post-accumulate-grad hooks, at every `every`-th backward, and `stepped` after each of these.

    A backward counts if at least one of the parameters takes part in it.

    Raises:
        ArgumentError: `every` is not a whole number of at least 1.
        EstimationError: a parameter holds a gradient on entry; on exit, the last backwards are fewer than `every`.

    """
    check_count("every", every)
    for name, p in parameters.items():
        if p.grad is not None:
            raise EstimationError(f"parameter {name!r} holds a gradient already: set .grad to None before streaming")
    stream = _Stream(parameters, every, scale, free, fold, stepped)
    handles: list[Any] = []
    try:
        for name, p in parameters.items():
            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(stream.hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if rest := stream.backwards % every:
        stream.drop()
        raise EstimationError(f"{rest} of {every} backward passes of the last mini-batch were made: it was left out")


@contextmanager
def at_steps(optimizer: torch.optim.Optimizer, collect: Callable[[float], None]) -> Iterator[None]:
    """Call `collect` with the scale of the gradients before every step that the optimiser takes.

    By then gradients are accumulated, reduced over processes and, under a GradScaler, unscaled; a step that a scaler
    skips is not seen. Fused optimisers unscale by themselves: `collect` gets their scale, and 1 for others.

    Raises:
        ArgumentError: it is not an optimiser.

    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")

    def before(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found: Any = getattr(stepping, "found_inf", None)  # a GradScaler sets it on fused optimisers only
        if found is not None and bool(found):
            return
        scale: Any = getattr(stepping, "grad_scale", None)
        collect(1.0 if scale is None else float(scale))

    handle = optimizer.register_step_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
