"""Backends behind one small interface (interface.py), and the choice between them.

`reference` states what each must compute. Nothing here falls back silently: a backend asked for by name is either
used or an error.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from contextvars import ContextVar

import torch

from ..arguments import BACKENDS
from ..errors import BackendError
from .interface import Backend

# Modules, imported when first asked for; BACKEND is the one instance in each.
MODULES = {name: "triton_backend" if name == "triton" else name for name in BACKENDS}
DEFAULTS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton")}  # device type -> in order of preference
ENVIRONMENT = "FIUN_FAST_BACKEND"

_chosen: ContextVar[str | None] = ContextVar("fiun_fast_backend", default=None)
_registered: dict[str, Backend] = {}  # beyond MODULES


def register(backend: Backend) -> None:
    """Make a further backend known under its name, in place of any other of that name."""
    _registered[backend.name] = backend


def unregister(name: str) -> None:
    """Forget a backend that `register` made known."""
    del _registered[name]


def known() -> list[str]:
    """Names of all backends, usable here or not."""
    return [*MODULES, *(name for name in _registered if name not in MODULES)]


def load(name: str) -> Backend:
    """The backend of that name.

    Raises:
        BackendError: no backend has that name; the message lists the known ones.

    """
    if not isinstance(name, str):
        raise BackendError(f"backend is {name!r}, expected a name; known are {', '.join(known())}")
    if name in _registered:
        return _registered[name]
    if name not in MODULES:
        raise BackendError(f"unknown backend {name!r}; known are {', '.join(known())}")
    return importlib.import_module(f".{MODULES[name]}", __name__).BACKEND


def status(device_type: str) -> dict[str, str | None]:
    """Each known backend: None where it works for tensors on that kind of device, else the reason why not."""
    return {name: load(name).why_not(device_type) for name in known()}


def available_backends(device_type: str | None = None) -> list[str]:
    """Names of the backends that work here, for tensors on that kind of device ("cpu", "cuda"), or on any."""
    if device_type is None:
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        return [name for name in known() if any(load(name).why_not(kind) is None for kind in kinds)]
    return [name for name, reason in status(device_type).items() if reason is None]


class use_backend:  # noqa: N801  (read as a verb, like torch.no_grad)
    """Use this backend from now on, or inside a `with` block; None returns to the default choice.

    The choice belongs to the current context: another thread, or another asyncio task that was started before, does not
    see it. FIUN_FAST_BACKEND is for the whole process.

    Raises:
        BackendError: for a name that is not known.

    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            load(name)
        self._name, self._before = name, _chosen.get()
        _chosen.set(name)

    def __enter__(self) -> None:
        """Make the choice again, should the object be used for a second block."""
        _chosen.set(self._name)

    def __exit__(self, *exc: object) -> None:
        """Return to what was chosen before."""
        _chosen.set(self._before)


def select(name: str | None, device_type: str) -> Backend:
    """The backend for tensors on that device: `name`, else use_backend, else FIUN_FAST_BACKEND, else the default.

    Raises:
        BackendError: it is unknown or cannot be used here; the message says why, and lists those that can.

    """
    asked = name or _chosen.get() or os.environ.get(ENVIRONMENT)
    if asked:
        backend = load(asked)
        reason = backend.why_not(device_type)
        if reason is None:
            return backend
        raise BackendError(
            f"backend {asked!r} cannot be used for {device_type} tensors: {reason}; {_others(device_type)}"
        )
    for preferred in DEFAULTS.get(device_type, ()):
        if load(preferred).why_not(device_type) is None:
            return load(preferred)
    raise BackendError(f"no fast backend works for {device_type} tensors here; {_others(device_type)}")


def check_usable(name: str | None, device_types: Iterable[str]) -> None:
    """Raise the BackendError of `select` where it would have one for each of these kinds of device, if it is known."""
    errors = []
    for device_type in device_types:
        if device_type not in DEFAULTS:  # meta, say, of which others have more to tell
            continue
        try:
            select(name, device_type)
        except BackendError as error:
            errors.append(error)
        else:
            return
    if errors:
        raise errors[0]


def _others(device_type: str) -> str:
    reasons = status(device_type)
    usable = [name for name, reason in reasons.items() if reason is None]
    unusable = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return f"usable: {', '.join(usable)}" + (f" (not: {'; '.join(unusable)})" if unusable else "")
