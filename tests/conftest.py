"""The `backend` fixture, and a summary that names the backends that ran and those that did not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import shim
import torch

from fiun_fast import kernels
from fiun_fast.kernels.interface import Backend

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the Triton kernels are imported


@dataclass(frozen=True)
class Place:
    """A backend and a kind of device that it is tested on."""

    name: str
    device: str

    @property
    def kernels(self) -> Backend:
        """The backend itself."""
        return shim.backend() if self.name == shim.NAME else kernels.load(self.name)


def _places() -> list[Place]:
    """Each backend on every device it works on; one that works on none appears once, to be skipped by name."""
    places = []
    for name in kernels.known():
        usable = [d for d in DEVICES if kernels.load(name).why_not(d) is None]
        places += [Place(name, device) for device in usable or DEVICES[-1:]]
    return [*places, Place(shim.NAME, "cpu")]


@pytest.fixture(params=_places(), ids=lambda place: f"{place.name}@{place.device}")
def backend(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Every backend in turn; one that cannot be used here is skipped with its reason."""
    place: Place = request.param
    reason = place.kernels.why_not(place.device)
    request.node.user_properties.append(("backend", (f"{place.name} on {place.device}", reason)))
    if reason is not None:
        pytest.skip(f"backend {place.name}: {reason}")
    with shim.registered() if place.name == shim.NAME else nullcontext():
        yield place


@pytest.fixture
def threads():
    """Set the number of threads, restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """For models too small to share: threads that wait for one another cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter) -> None:
    """Name the backends: how many tests ran on each, and why others did not."""
    ran: dict[str, int] = {}
    missing: dict[str, tuple[str, int]] = {}
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            for key, value in getattr(report, "user_properties", ()):
                if key != "backend":
                    continue
                name, reason = value
                if reason is None:
                    ran[name] = ran.get(name, 0) + 1
                else:
                    missing[name] = (reason, missing.get(name, ("", 0))[1] + 1)
    if ran or missing:
        done = ", ".join(f"{name} ({count} tests)" for name, count in ran.items()) or "none"
        undone = "; ".join(f"{name} ({count} tests skipped: {why})" for name, (why, count) in missing.items()) or "none"
        terminalreporter.write_sep("=", "backends")
        terminalreporter.write_line(f"run: {done}")
        terminalreporter.write_line(f"not run: {undone}")
