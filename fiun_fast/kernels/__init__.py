"""Backends behind one small interface, and the choice between them.

A backend is a module with
    name                                                 as users write it
    why_not(device_type) -> str | None                   None: usable for tensors of that device; else why not
    dampen(table: DampenTable) -> launch(dry_run: bool)  prepare once, launch as often as wanted; launch.refresh(), if
                                                         it has one, after table.alpha or .lam was written to
    histogram(table) -> launch(bases, low, nearest, counts)   counts of m / I, in bins of the ratio's bits, per node
    merge(sources, weights, how, scale, out)             out = scale * reduce_k (w_k F_k), flat tensors
    accumulate(gradients, into, power, zero)             into += |g|^power for each pair; with zero, g = 0 afterwards
    outer_square_accumulate(left, right, into)           into += sum_b (left_b right_b^T)^2
`reference` states what each must compute. Nothing here falls back silently: a backend asked for by name is used or
is an error.
"""

from __future__ import annotations

import importlib
import os
from typing import Protocol, cast

import torch

from ..errors import BackendError

BACKENDS = ("reference", "cpu", "triton", "cuda")
DEFAULTS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton")}  # device type -> in order of preference
ENVIRONMENT = "FIUN_FAST_BACKEND"

_chosen: str | None = None


class Backend(Protocol):
    """What the modules of this package look like to the plan; signatures as in `reference`."""

    name: str

    def why_not(self, device_type: str) -> str | None: ...
    def dampen(self, table): ...
    def histogram(self, table): ...
    def merge(self, sources, weights, how, scale, out) -> None: ...
    def accumulate(self, gradients, into, power, zero) -> None: ...
    def outer_square_accumulate(self, left, right, into) -> None: ...


def load(name: str) -> Backend:
    """The backend module of that name; an unknown one is an error that lists the known."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(f".{name}", __name__))


def status(device_type: str) -> dict[str, str | None]:
    """Each known backend: None where it works for tensors on that kind of device, else the reason why not."""
    return {name: load(name).why_not(device_type) for name in BACKENDS}


def available_backends(device_type: str | None = None) -> list[str]:
    """Names of the backends that work here, for tensors on that kind of device ("cpu", "cuda"), or on any."""
    if device_type is None:
        kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        return [name for name in BACKENDS if any(load(name).why_not(kind) is None for kind in kinds)]
    return [name for name, reason in status(device_type).items() if reason is None]


class use_backend:  # noqa: N801  (read as a verb, like torch.no_grad)
    """Use this backend from now on, or inside a `with` block; None returns to the default choice.

    Raises:
        BackendError: for a name that is not known.

    """

    def __init__(self, name: str | None) -> None:
        global _chosen
        if name is not None:
            load(name)
        self._before, _chosen = _chosen, name

    def __enter__(self) -> None:
        """The choice is made already, when the object is built."""

    def __exit__(self, *exc: object) -> None:
        """Return to what was chosen before."""
        global _chosen
        _chosen = self._before


def select(name: str | None, device_type: str) -> Backend:
    """The backend for tensors on that device: `name`, else use_backend, else FIUN_FAST_BACKEND, else the default.

    Raises:
        BackendError: it is unknown or cannot be used here; the message says why, and lists those that can.

    """
    asked = name or _chosen or os.environ.get(ENVIRONMENT)
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


def _others(device_type: str) -> str:
    reasons = status(device_type)
    usable = [name for name, reason in reasons.items() if reason is None]
    unusable = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return f"usable: {', '.join(usable)}" + (f" (not: {'; '.join(unusable)})" if unusable else "")
