"""Compile the Triton kernels ahead of time, for the GPU of this machine or for a target that is not here.

A stand-in driver that only knows its target goes through Triton's own launch path as far as compilation. So the
artefacts are the very ones a later launch on such a GPU finds in Triton's cache directory, on every Triton version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..arguments import MERGE_RULES
from ..errors import ArgumentError, BackendError
from . import triton_host as host

HALVES_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time arguments, and stand-ins for the others: dtypes for tensors, numbers."""

    kernel: str
    arguments: tuple[Any, ...]
    constants: dict[str, Any] = field(hash=False)

    def __str__(self) -> str:
        """Name and what sets this variant apart."""
        shown = (
            f"{k}={v}" for k, v in self.constants.items() if k not in ("BLOCK", "STEP", "VECTOR", "SOFT", "COMPUTE")
        )
        return f"{self.kernel}({', '.join(shown)})"


_ADDRESS = 1 << 40  # any number that needs 64 bits


def dampen_variant(
    fisher: torch.dtype, theta: torch.dtype, how: str = "max", power: bool = False, signed: bool = False
) -> Variant:
    """The dampening kernel for these dtypes; `power`: the exponent is not 1; `signed`: with gradients."""
    arguments = (torch.int64, torch.int64, torch.int64, fisher, torch.int64, fisher, fisher, torch.int64, 1)
    return Variant("dampen", arguments, host.dampen_constants(fisher, theta, how, power, signed))


def merge_variant(dtype: torch.dtype, how: str = "max") -> Variant:
    """The merge kernel."""
    return Variant("merge", (torch.int64, dtype, dtype, _ADDRESS, 1, 1, 1), host.merge_constants(dtype, how))


def accumulate_variant(
    gradient: torch.dtype, into: torch.dtype, power: int = 2, zero: bool = False, one: bool = False
) -> Variant:
    """The accumulation kernel for many pairs, or for `one`."""
    constants = host.accumulate_constants(gradient, into, power, zero)
    if one:
        return Variant("accumulate_one", (_ADDRESS, _ADDRESS, 1), constants)
    return Variant("accumulate", (torch.int64, torch.int64), constants)


def standard_variants() -> list[Variant]:
    """What float32 Fishers need: parameters and gradients in fp32, bf16 and fp16, exponent 1."""
    fp32 = torch.float32
    found = [dampen_variant(fp32, theta, how) for theta in HALVES_AND_FULL for how in MERGE_RULES]
    found += [merge_variant(fp32, how) for how in MERGE_RULES]
    for gradient in HALVES_AND_FULL:
        for zero in (False, True):
            found += [accumulate_variant(gradient, fp32, 2, zero, one) for one in (False, True)]
    return found


class _StandIn:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> str:
        return f"{self._target.backend}:{self._target.arch}"  # a key of Triton's caches, never a device of this machine

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@contextmanager
def standing_in(target: Any) -> Iterator[None]:
    """Inside, Triton's driver is a stand-in that only knows the target."""
    from triton.runtime import driver

    state = vars(driver)  # not by attribute: reading driver.active would start the real driver
    previous = state["_active"] if "_active" in state else state["active"]
    driver.set_active(_StandIn(target))
    try:
        yield
    finally:
        driver.set_active(previous)


def parse_target(target: str) -> Any:
    """Triton's target for "cuda:90" or "hip:gfx942".

    Raises:
        ArgumentError: it is neither.

    """
    from triton.backends.compiler import GPUTarget

    backend, _, arch = target.partition(":")
    if backend == "cuda" and arch.isdigit():
        return GPUTarget("cuda", int(arch), 32)
    if backend == "hip" and arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ArgumentError(f'target is {target!r}, expected the form "cuda:90" or "hip:gfx942"')


def compile_variant(variant: Variant, target: str) -> Any:
    """Triton's compiled kernel, with its stages in `.asm`; from Triton's cache directory if it is there."""
    if host.interpreted():
        raise BackendError("nothing is compiled under TRITON_INTERPRET")
    wanted = parse_target(target)
    with standing_in(wanted):
        kernel = getattr(host.device_code(), variant.kernel)
        arch = wanted.arch if wanted.backend == "cuda" else 0
        flags = host.options(wanted.backend, arch, variant.constants)
        return kernel.warmup(*variant.arguments, grid=(1,), **variant.constants, **flags)


def warmup(target: str | None = None, progress: Callable[[str], None] | None = None) -> int:
    """Compile the standard set into Triton's cache directory, for `target` ("cuda:90") or the GPU of this machine.

    Returns: the number of kernels. `progress` is called with the name of each before it is compiled.

    Raises:
        BackendError: there is no target and no GPU here, or the kernels are interpreted.

    """
    if target is None:
        if reason := host.why_not("cuda"):
            raise BackendError(f'name a target such as "cuda:90": the triton backend cannot be used here: {reason}')
        from triton.runtime import driver

        found = driver.active.get_current_target()
        target = f"{found.backend}:{found.arch}"
    variants = standard_variants()
    for variant in variants:
        if progress:
            progress(str(variant))
        compile_variant(variant, target)
    return len(variants)
