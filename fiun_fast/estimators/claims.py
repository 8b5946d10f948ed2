"""Threads side by side: who is at work on which model, and settings of the whole process that they share.

An estimate sets a model to eval mode, freezes parameters and takes what is in `.grad`. Two at once on one model, or on
models that share a part, would each undo what the other has set; so the second waits, or is refused where it would wait
for itself. A stream stays open for as long as its `with` does: nobody waits for it.

What torch has once for the process, its random state among it, is put back by the last who leaves.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import EstimationError
from ..guards import signals_deferred

State = TypeVar("State")


@dataclass(frozen=True, eq=False)
class _Claim:
    what: str
    thread: int
    waits: bool  # others wait until it is given back
    parts: dict[int, str]  # id -> name; whoever claims keeps them alive


_claims: list[_Claim] = []
_changed = threading.Condition()


@contextmanager
def estimating(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have these models, with all their modules, parameters and buffers, to oneself; waits for other threads.

    Raises:
        EstimationError: this thread is estimating one of them already (from inside a forward, or the loader), or one of
            their parameters streams into a FisherAccumulator.

    """
    parts: dict[int, str] = {}
    for model in models.values():
        for named in (model.named_modules(), model.named_parameters(), model.named_buffers()):
            parts.update((id(part), name) for name, part in named)
    with _claimed(_Claim("an estimate", threading.get_ident(), True, parts)):
        yield


@contextmanager
def streaming(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Have these parameters' gradients to oneself.

    Raises:
        EstimationError: an estimate of them is under way, or they stream already.

    """
    with _claimed(_Claim("a stream", threading.get_ident(), False, {id(p): name for name, p in parameters.items()})):
        yield


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """For a short look at what requires grad: waits until no other thread's estimate has set that, and keeps it so."""
    parts = {id(p) for p in model.parameters()}
    thread = threading.get_ident()
    with _changed:
        while any(one.waits and one.thread != thread and not parts.isdisjoint(one.parts) for one in _claims):
            if any(one.thread == thread for one in _claims):
                break  # whoever holds must not wait
            _changed.wait()
        yield


def check_not_estimated(parameters: Mapping[str, Tensor]) -> None:
    """Raise an EstimationError where what is in `.grad` now is that of an estimate in another thread."""
    if not _claims:
        return
    claim = _Claim("an update", threading.get_ident(), True, {id(p): name for name, p in parameters.items()})
    with _changed:
        for one in _claims:
            if one.waits and one.thread != claim.thread and not one.parts.keys().isdisjoint(claim.parts):
                raise EstimationError(_refusal(claim, one))


@contextmanager
def _claimed(claim: _Claim) -> Iterator[None]:
    with _changed:
        while (other := _in_the_way(claim)) is not None:
            holding = any(one.thread == claim.thread and one.waits for one in _claims)  # whoever holds must not wait
            if not other.waits or not claim.waits or holding:
                raise EstimationError(_refusal(claim, other))
            _changed.wait()
        with signals_deferred():
            _claims.append(claim)
    try:
        yield
    finally:
        with signals_deferred(), _changed:
            _claims.remove(claim)
            _changed.notify_all()


def _in_the_way(claim: _Claim) -> _Claim | None:
    return next((other for other in _claims if not other.parts.keys().isdisjoint(claim.parts.keys())), None)


def _refusal(claim: _Claim, other: _Claim) -> str:
    name = next(claim.parts[key] for key in claim.parts if key in other.parts)
    part = f"{name!r}" if name else "the model"
    if not other.waits:
        return f"the gradients of {part} go to a FisherAccumulator's streaming() already: leave that first"
    whose = "this thread" if other.thread == claim.thread else "another thread"
    return f"{whose} is estimating a Fisher with {part} already: begin {claim.what} when that has ended"


_settings: list[Shared] = []


class Shared(Generic[State]):
    """A setting of the whole process: changed by the first thread that comes in, put back by the last that leaves.

    Args:
        change: changes it, and returns how it was.
        restore: puts that back.

    """

    def __init__(self, change: Callable[[], State], restore: Callable[[State], object]) -> None:
        self._change, self._restore = change, restore
        self._inside: list[State] = []  # how it was, once for each who is inside
        _settings.append(self)

    def forget(self) -> None:
        """Nobody is inside."""
        self._inside.clear()

    def __enter__(self) -> None:
        with _changed:
            self._inside.append(self._inside[0] if self._inside else self._change())

    def __exit__(self, *_: object) -> None:
        with _changed:
            state = self._inside.pop()
            if not self._inside:
                self._restore(state)


_random: dict[torch.device, Shared[Tensor]] = {}


@contextmanager
def random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put torch's random state back, on the CPU and on these CUDA devices."""
    with ExitStack() as stack:
        for device in (torch.device("cpu"), *devices):
            with _changed:
                if device not in _random:
                    of = torch.random if device.type == "cpu" else torch.cuda
                    options = {} if device.type == "cpu" else {"device": device}
                    _random[device] = Shared(partial(of.get_rng_state, **options), partial(of.set_rng_state, **options))
                shared = _random[device]
            stack.enter_context(shared)
        yield


_eager: Shared[Any] = Shared(
    lambda: torch.compiler.set_stance("force_eager"), lambda stance: stance.__exit__(None, None, None)
)


@contextmanager
def uncompiled() -> Iterator[None]:
    """What torch.compile has made runs as it was written: closed forms see through that, and nothing is compiled."""
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled, and importing it takes a second
        yield
        return
    with _eager:
        yield


def _forget() -> None:
    """In a forked process, where the threads that held claims are not there."""
    global _changed
    _claims.clear()
    for setting in _settings:
        setting.forget()
    _changed = threading.Condition()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
