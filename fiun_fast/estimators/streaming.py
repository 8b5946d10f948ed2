"""Gradients folded into a Fisher as they arrive: during a backward, each freed at once, or at an optimiser's steps."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..arguments import check_count, check_number
from ..errors import ArgumentError, EstimationError
from ..guards import signals_deferred
from ..wrappers import optimizer_in
from .totals import Totals


class _Stream:
    """What the hooks of one `in_backward` share: which backward is running, and what to do when it ends.

    A backward that raises tells nobody. So what is to be called at its end is held by that backward alone, and gone
    when that is.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        every: int,
        scale: float | Callable[[], float],
        free: bool,
        totals: Totals,
    ) -> None:
        self._parameters, self._every, self._scale, self._free, self._totals = parameters, every, scale, free, totals
        self.backwards = 0  # completed
        self._running = self._added = False  # a backward is under way; something of it has been added
        self._task = 0  # its number, or that of one nested in it; torch's numbers ascend
        self._end: Callable[[], object] = lambda: None  # what is called when it ends; None where it is gone
        self._factor = 1.0
        self._late: dict[str, None] = {}  # hold a gradient from earlier backwards of this mini-batch

    def hook(self, name: str) -> Callable[[Tensor], None]:
        """For a parameter's post-accumulate-grad hook."""
        return lambda parameter: self._arrived(name, parameter)

    def _arrived(self, name: str, parameter: Tensor) -> None:
        self._totals.check_right()
        if self._running and self._is_another():
            self._broken()
        if not self._running:
            self._factor = check_scale(self._scale() if callable(self._scale) else self._scale)
            self._running, self._added, self._task = True, False, torch._C._current_graph_task_id()
            self._await_end()
        if (self.backwards + 1) % self._every:
            self._late[name] = None
        else:
            self._late.pop(name, None)
            self._take(name, parameter)

    def _is_another(self) -> bool:
        """Whether this backward is not the one that was running, which must have raised."""
        return self._end() is None or (torch._C._current_graph_task_id() > self._task and _enclosing() is None)

    def _broken(self) -> None:
        self._totals.spoil("a backward raised while its gradients streamed")
        self._totals.check_right()

    def _await_end(self) -> None:
        """Have `_ended` called after the outermost backward; one nested in it (checkpointing) is not a step."""
        node = _enclosing()
        ending = _Ending(self._ended if node is None else self._outlived)
        self._end = weakref.ref(ending)
        torch.autograd.Variable._execution_engine.queue_callback(ending)
        if node is None:
            return
        following = next(n for n, _ in node.next_functions if n is not None)  # runs later, in the backward around this

        def reached(_: Any) -> None:
            handle.remove()
            if self._running and torch._C._current_graph_task_id() < self._task:
                self._await_end()

        handle = following.register_prehook(reached)

    def _outlived(self) -> None:
        """A nested backward has ended well. Until the one around it is met, there is no end to be watched."""
        self._end = lambda: self

    def _ended(self) -> None:
        self.backwards += 1
        if self.backwards % self._every == 0:
            for name in self._late:
                self._take(name, self._parameters[name])
            self._late.clear()
            self._totals.count(0)
        self._running = False

    def _take(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        self._totals.add({name: parameter.grad}, scale=self._factor)
        self._added = True
        if self._free:
            parameter.grad = None

    def close(self, raised: bool) -> None:
        """After the last backward: `raised` says that an error is under way, which then counts.

        Raises:
            EstimationError: a backward raised, or the last mini-batch lacks some.

        """
        if self._running and (self._added or not raised):
            if not raised:
                self._broken()
            self._totals.spoil("a backward raised while its gradients streamed")
        if self._free:
            for name in self._late:  # of an incomplete mini-batch
                self._parameters[name].grad = None
        if (rest := self.backwards % self._every) and not raised:
            raise EstimationError(
                f"{rest} of {self._every} backward passes of the last mini-batch were made: it was left out"
            )


class _Ending:
    """What a backward calls when it ends, and drops when it raises."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def __call__(self) -> None:
        self._then()


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
    totals: Totals,
) -> Iterator[None]:
    """Add gradients from post-accumulate-grad hooks, at every `every`-th backward, and count a step after each such.

    A backward counts if at least one of the parameters takes part in it.

    Raises:
        ArgumentError: `every` is not a whole number of at least 1, or `scale` is not a finite number above 0.
        EstimationError: a parameter holds a gradient on entry; on exit, the last backwards are fewer than `every`, or a
            backward raised, after which the sum is spoilt: an error at the next backward too.

    """
    check_count("every", every)
    if not callable(scale):
        check_scale(scale)
    for name, p in parameters.items():
        if p.grad is not None:
            raise EstimationError(f"parameter {name!r} holds a gradient already: set .grad to None before streaming")
    stream = _Stream(parameters, every, scale, free, totals)
    handles: list[Any] = []
    raised = True
    try:
        with signals_deferred():  # a hook that nobody knows of would take every later gradient
            for name, p in parameters.items():
                if p.requires_grad:
                    handles.append(p.register_post_accumulate_grad_hook(stream.hook(name)))
        yield
        raised = False
    finally:
        with signals_deferred():
            for handle in handles:
                handle.remove()
        stream.close(raised)


def check_scale(value: Any) -> float:
    """What a loss was multiplied by; an ArgumentError where it is not a finite number above 0."""
    number = check_number("scale", value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
    if number == 0:
        raise ArgumentError("scale is 0, expected a finite number above 0")
    return number


@contextmanager
def at_steps(optimizer: torch.optim.Optimizer, collect: Callable[[float], None]) -> Iterator[None]:
    """Call `collect` with the scale of the gradients at every step of the optimiser, before it changes anything.

    By then gradients are accumulated, reduced over processes and, under a GradScaler, unscaled; a step that a scaler
    skips is not seen. Fused optimisers unscale by themselves: `collect` gets their scale, and 1 for others. Where a
    step is given a closure that makes the gradients, those of its first call count.

    Raises:
        ArgumentError: it is not an optimiser, nor a wrapper of one that can be looked through (`optimizer_in`).

    """

    def before(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if _inside_step(stepping):
            return None
        found: Any = getattr(stepping, "found_inf", None)  # a GradScaler sets it on fused optimisers only
        if found is not None and bool(found):
            return None
        scale: Any = getattr(stepping, "grad_scale", None)

        def now() -> None:
            collect(1.0 if scale is None else float(scale))

        if callable(kwargs.get("closure")):
            return args, kwargs | {"closure": _after_first(kwargs["closure"], now)}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimiser
            return (args[0], _after_first(args[1], now), *args[2:]), kwargs
        now()
        return None

    handle = optimizer_in(optimizer).register_step_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def _after_first(closure: Callable[[], Any], then: Callable[[], None]) -> Callable[[], Any]:
    """The closure, which after its first call calls `then`."""
    called: list[bool] = []

    def wrapped() -> Any:
        loss = closure()
        if not called:
            called.append(True)
            then()
        return loss

    return wrapped


def _inside_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step that calls its base class's has begun already: torch calls the hooks of both."""
    code = getattr(type(optimizer).step, "__code__", None)
    frame, steps = sys._getframe(1), 0
    while frame is not None:
        steps += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return steps > 1
