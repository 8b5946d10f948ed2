"""The `cpu` backend: the C++ loops of csrc/cpu over a work table, for tensors in main memory.

It uses `torch.get_num_threads()` threads. The newest instruction set that the CPU has is chosen when it runs;
FIUN_FAST_ISA names another ("avx512", "avx2", "baseline"). Neither changes a bit of the result.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..arguments import MERGE_RULES
from ..errors import BackendError
from . import extension as extensions
from .extension import FISHER_KINDS, KINDS, kind, merge_kind, outer_square_without_kernel, pairs_of
from .interface import Backend, Histogram, Launch
from .table import BINS, Dampening, Merging, Table

NAME = "cpu"
ISA_ENVIRONMENT = "FIUN_FAST_ISA"
IMPORTED_BY = os.getpid()

PRODUCTS = 1 << 18  # elements multiplied at a time by the library: still in the second-level cache when squared
MOST_POSITIONS = 512  # with more of them the squares cost little beside the products, and the library is faster


@functools.cache
def load() -> ModuleType | str:
    """The extension module, or the reason why there is none."""
    module = extensions.load(
        "_cpu",
        "its C++ extension",
        "its C++ extension was not built; install a C++17 compiler (g++ or clang++), then run "
        "`FIUN_FAST_CPU=1 pip install --force-reinstall --no-deps --no-cache-dir` on fiun_fast's source again "
        "(FIUN_FAST_CPU=1 shows the compiler's errors)",
    )
    if not isinstance(module, str) and os.getpid() == IMPORTED_BY:  # in a child of fork torch's threads are gone
        module.use_openmp(*openmp_of_torch())
    return module


def extension() -> ModuleType:
    """The extension module; a BackendError where there is none."""
    return extensions.require(NAME, load())


def openmp_of_torch() -> tuple[int, int]:
    """Addresses of GOMP_parallel and omp_get_thread_num in the OpenMP runtime that torch has loaded, (0, 0) for none.

    csrc/cpu/pool.h says why.
    """
    try:
        runtime = ctypes.CDLL(None)
        functions = runtime.GOMP_parallel, runtime.omp_get_thread_num
        parallel, number = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
        return parallel, number
    except (AttributeError, OSError, TypeError):
        return 0, 0


def expect_writes(buffer: torch.Tensor) -> torch.Tensor:
    """Ask for large pages for a buffer that is new and not yet written; a hint, which only Linux takes.

    Whoever writes there first decides on which socket's memory a page lies: torch's threads, or these kernels'.
    """
    module = load()
    if buffer.device.type == "cpu" and not isinstance(module, str):
        module.expect_writes(buffer.data_ptr(), buffer.numel() * buffer.element_size())
    return buffer


def isas() -> dict[str, bool]:
    """The instruction sets that were compiled, newest first, and whether this CPU has them.

    Raises:
        BackendError: the extension is missing.

    """
    usable = extension().usable_isas()
    return {isa: isa in usable for isa in extension().compiled_isas()}


def isa() -> str:
    """The instruction set in use: the newest of this CPU, or FIUN_FAST_ISA.

    Raises:
        BackendError: the extension is missing, or FIUN_FAST_ISA names what this CPU does not have.

    """
    asked = os.environ.get(ISA_ENVIRONMENT, "")
    try:
        return extension().isa(asked)
    except ValueError as error:
        raise BackendError(f"{ISA_ENVIRONMENT}: {error}") from None


class _Geometry:
    """A table and how it is merged, as C++ takes them; keeps the arrays whose addresses it passes on."""

    def __init__(self, table: Table, merging: Merging) -> None:
        fisher = kind(NAME, table.fisher_dtype, FISHER_KINDS)
        rows, sources, targets = (_packed(array, np.int64) for array in (table.rows, table.sources, table.targets))
        weights = _packed(table.weights, np.float64)
        gradients = None if table.gradients is None else _packed(table.gradients, np.int64)
        self._kept = table.groups, rows, sources, gradients, weights, targets
        beside = 0 if gradients is None else gradients.ctypes.data
        of_sources = (sources.ctypes.data, beside, weights.ctypes.data)
        addresses = (rows.ctypes.data, len(rows), *of_sources, targets.ctypes.data)
        self.arguments = (*addresses, fisher, MERGE_RULES.index(merging.how), merging.scale)


class CpuLaunch(Launch):
    """Cut into work for the threads there are; cut again only if torch.set_num_threads changed their number."""

    in_one_call = True

    def __init__(self, table: Table, merging: Merging, dampening: Dampening) -> None:
        theta = kind(NAME, table.theta_dtype, KINDS)
        alpha, lam = (_packed(array, np.float64) for array in (dampening.alpha, dampening.lam))
        assert alpha is dampening.alpha, "a launch reads alpha in place, which must be contiguous float64"
        assert lam is dampening.lam, "a launch reads lam in place, which must be contiguous float64"
        self._geometry, self._dampening = _Geometry(table, merging), dampening
        numbers = (theta, alpha.ctypes.data, lam.ctypes.data, dampening.exponent, dampening.cap)
        self._arguments = (*self._geometry.arguments, *numbers)
        self.prepared = self._prepare(torch.get_num_threads())

    def _prepare(self, threads: int) -> Any:
        return extension().DampenLaunch(*self._arguments, threads)

    def run(self, counts: torch.Tensor, dry_run: bool = False) -> None:
        """Dampen every node, or only count. Several threads may do so at once."""
        prepared, threads = self.prepared, torch.get_num_threads()
        if prepared.threads != threads:
            self.prepared = prepared = self._prepare(threads)
        prepared.run(counts.data_ptr(), dry_run, isa())


class CpuHistogram(Histogram):
    """Each thread keeps its own counts until it turns to another node."""

    def __init__(self, table: Table, merging: Merging) -> None:
        self._geometry = _Geometry(table, merging)
        self._theta = kind(NAME, table.theta_dtype, KINDS) if table.signed else 0  # looked at where there are signs

    def run(self, counts: torch.Tensor, bases: np.ndarray, low: int, nearest: bool) -> None:
        """Add to the counts of every node."""
        assert counts.shape == (len(bases), BINS)
        bases = _packed(bases, np.int64)
        numbers = (self._theta, bases.ctypes.data, low, nearest, counts.data_ptr(), torch.get_num_threads(), isa())
        extension().histogram(*self._geometry.arguments, *numbers)


class CpuBackend(Backend):
    """Fused C++ loops, vectorised and shared out over threads."""

    name = NAME

    def why_not(self, device_type: str) -> str | None:
        """None for "cpu" where the extension loads; else the reason why this backend cannot be used."""
        if device_type != "cpu":
            return "it works on tensors in main memory only"
        module = load()
        return module if isinstance(module, str) else None

    def dampen(self, table: Table, merging: Merging, dampening: Dampening) -> CpuLaunch:
        """Prepare a dampening; each run reads alpha and lam in place."""
        return CpuLaunch(table, merging, dampening)

    def histogram(self, table: Table, merging: Merging) -> CpuHistogram:
        """Prepare a histogram."""
        return CpuHistogram(table, merging)

    def merge(
        self, sources: Sequence[torch.Tensor], weights: Sequence[float], merging: Merging, out: torch.Tensor
    ) -> None:
        """All sources are read side by side."""
        number = merge_kind(NAME, sources, out)
        addresses = np.array([source.data_ptr() for source in sources], dtype=np.int64)
        factors = np.array(weights, dtype=np.float64)
        extension().merge(
            addresses.ctypes.data,
            factors.ctypes.data,
            len(addresses),
            out.data_ptr(),
            out.numel(),
            number,
            MERGE_RULES.index(merging.how),
            merging.scale,
            torch.get_num_threads(),
            isa(),
        )

    def accumulate(
        self, gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor], power: int, zero: bool
    ) -> None:
        """One call for all pairs, whatever their dtypes."""
        dense = [g if g.is_contiguous() else g.contiguous() for g in gradients]
        pairs = pairs_of(NAME, dense, into)
        extension().accumulate(pairs.ctypes.data, len(pairs), power == 2, zero, torch.get_num_threads(), isa())
        if zero:
            for gradient, copy in zip(gradients, dense, strict=True):
                if gradient is not copy:
                    gradient.detach().zero_()

    def outer_square_accumulate(self, left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
        """In the fastest of three ways, as measured (docs/fishers.md).

        One position and one group: a product of squares. Few positions, float32, K contiguous in memory:
        csrc/cpu/squares.h, where squares are added from registers. Else: torch's batched product, a few samples at a
        time, and squares added while it is in the cache.
        """
        if outer_square_without_kernel(NAME, left, right, into):
            return
        samples, groups, m, t = left.shape
        k = right.shape[2]
        module, threads, instructions = extension(), torch.get_num_threads(), isa()
        if into.dtype == torch.float32 and groups == 1 and t < MOST_POSITIONS and right.stride(2) == 1:
            left = left.transpose(2, 3).contiguous().transpose(2, 3)  # for a convolution by far the smaller one
            module.outer_square(
                left.data_ptr(),
                right.data_ptr(),
                into.data_ptr(),
                samples,
                t,
                m,
                k,
                left.stride(0),
                left.stride(3),
                right.stride(0),
                right.stride(3),
                threads,
                instructions,
            )
            return
        number, step = FISHER_KINDS[into.dtype], min(samples, max(1, PRODUCTS // (groups * m * k)))
        products = left.new_empty(step * groups, m, k)
        for at in range(0, samples, step):
            rows = min(step, samples - at)
            a, b = (x[at : at + rows].flatten(0, 1) for x in (left, right))
            torch.bmm(a, b.transpose(1, 2), out=products[: rows * groups])
            arguments = (into.data_ptr(), products.data_ptr(), rows, groups * m * k, number, threads, instructions)
            module.add_squares(*arguments)


def _packed(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=dtype)


BACKEND = CpuBackend()
