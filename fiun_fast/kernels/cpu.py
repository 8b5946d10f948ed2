"""The `cpu` backend: the C++ loops of csrc/cpu over the plan's work table, for tensors in main memory.

It uses `torch.get_num_threads()` threads. The newest instruction set that the CPU has is chosen when it runs;
FIUN_FAST_ISA names another ("avx512", "avx2", "baseline"). Neither changes a bit of the result.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch

from ..errors import BackendError, DTypeError
from .table import BINS, MERGES, DampenTable

name = "cpu"

ISA_ENVIRONMENT = "FIUN_FAST_ISA"
KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as in csrc/cpu/kernels.h
FISHER_KINDS = {torch.float32: 0, torch.float64: 1}
IMPORTED_BY = os.getpid()


@functools.cache
def load() -> ModuleType | str:
    """The extension module, or the reason why there is none."""
    try:
        from .. import _cpu
    except ImportError as error:
        if getattr(error, "name", None) == "fiun_fast._cpu" or "cannot import name" in str(error):
            return (
                "its C++ extension was not built; install a C++17 compiler (g++ or clang++), then run "
                "`FIUN_FAST_CPU=1 pip install --force-reinstall --no-deps --no-cache-dir` on fiun_fast's source again "
                "(FIUN_FAST_CPU=1 shows the compiler's errors)"
            )
        return f"its C++ extension does not load: {error}"
    if os.getpid() == IMPORTED_BY:  # in a child of fork, torch's threads are gone
        _cpu.use_openmp(openmp_of_torch())
    return _cpu


def extension() -> ModuleType:
    """The extension module; a BackendError where there is none."""
    module = load()
    if isinstance(module, str):
        raise BackendError(f"backend 'cpu' cannot be used: {module}")
    return module


def openmp_of_torch() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, 0 for none: csrc/cpu/pool.h says why."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


def why_not(device_type: str) -> str | None:
    """None for "cpu" where the extension loads; else the reason why this backend cannot be used."""
    if device_type != "cpu":
        return "it works on tensors in main memory only"
    module = load()
    return module if isinstance(module, str) else None


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


def dampen(table: DampenTable) -> Callable[[bool], None]:
    """Prepare a launch over the table; the returned function dampens every node, or with dry_run only counts.

    Raises:
        DTypeError: parameters or Fishers of a dtype that the backend does not take.

    """
    module = extension()
    theta, fisher = _kind(table.theta_dtype, KINDS), _kind(table.fisher_dtype, FISHER_KINDS)
    how = MERGES.index(table.merge)
    rows, sources, targets = (_packed(array, np.int64) for array in (table.rows, table.sources, table.targets))
    weights, alpha, lam = (_packed(array, np.float64) for array in (table.weights, table.alpha, table.lam))
    assert alpha is table.alpha, "a launch reads what was written to the table since"
    assert lam is table.lam

    def launch(dry_run: bool) -> None:
        module.dampen(
            rows.ctypes.data,
            len(rows),
            sources.ctypes.data,
            weights.ctypes.data,
            targets.ctypes.data,
            alpha.ctypes.data,
            lam.ctypes.data,
            table.counts.data_ptr(),
            len(alpha),
            theta,
            fisher,
            how,
            table.scale,
            table.exponent,
            table.cap,
            dry_run,
            torch.get_num_threads(),
            isa(),
        )

    return launch


def histogram(table: DampenTable) -> Callable[[np.ndarray, int, bool, torch.Tensor], None]:
    """Prepare a count of the ratios m / I of every node, as `reference.histogram`.

    Raises:
        DTypeError: Fishers of a dtype that the backend does not take.

    """
    module = extension()
    fisher, how = _kind(table.fisher_dtype, FISHER_KINDS), MERGES.index(table.merge)
    rows, sources, targets = (_packed(array, np.int64) for array in (table.rows, table.sources, table.targets))
    weights, slots = _packed(table.weights, np.float64), len(table.alpha)

    def launch(bases: np.ndarray, low: int, nearest: bool, counts: torch.Tensor) -> None:
        assert counts.shape == (slots, BINS)
        bases = _packed(bases, np.int64)
        module.histogram(
            rows.ctypes.data,
            len(rows),
            sources.ctypes.data,
            weights.ctypes.data,
            targets.ctypes.data,
            slots,
            fisher,
            how,
            table.scale,
            bases.ctypes.data,
            low,
            nearest,
            counts.data_ptr(),
            torch.get_num_threads(),
            isa(),
        )

    return launch


def merge(sources: Sequence[torch.Tensor], weights: Sequence[float], how: str, scale: float, out: torch.Tensor) -> None:
    """Write m = scale * reduce_k (w_k F_k) to `out`; all are flat [n], contiguous, fp32 or all fp64.

    Raises:
        DTypeError: a dtype that the backend does not take, or not the same everywhere.

    """
    kind = _kind(out.dtype, FISHER_KINDS)
    if any(source.dtype != out.dtype for source in sources):
        raise DTypeError(
            f"merge: sources of {[str(s.dtype) for s in sources]}, output of {out.dtype}; expected one dtype"
        )
    addresses = np.array([source.data_ptr() for source in sources], dtype=np.int64)
    factors = np.array(weights, dtype=np.float64)
    extension().merge(
        addresses.ctypes.data,
        factors.ctypes.data,
        len(addresses),
        out.data_ptr(),
        out.numel(),
        kind,
        MERGES.index(how),
        scale,
        torch.get_num_threads(),
        isa(),
    )


def accumulate(gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor], power: int, zero: bool) -> None:
    """For each pair: into += |g| (power 1) or g^2 (power 2); with `zero`, g becomes 0 in the same pass.

    Args:
        gradients: of any shape and strides, in fp32, fp64, bf16 or fp16.
        into: flat accumulators, contiguous, fp32 or fp64, of as many elements as their gradient.
        power: 1 or 2.
        zero: set the gradients to zero.

    Raises:
        DTypeError: a dtype that the backend does not take.

    """
    dense = [g if g.is_contiguous() else g.contiguous() for g in gradients]
    pairs = np.empty((len(dense), 5), dtype=np.int64)
    try:  # few calls a pair: with many small parameters they would take longer than the sums
        pairs[:, 0] = [g.data_ptr() for g in dense]
        pairs[:, 1] = [total.data_ptr() for total in into]
        pairs[:, 2] = [total.numel() for total in into]
        pairs[:, 3] = [KINDS[g.dtype] for g in dense]
        pairs[:, 4] = [FISHER_KINDS[total.dtype] for total in into]
    except KeyError as error:
        raise _unknown(error.args[0], KINDS) from None
    extension().accumulate(pairs.ctypes.data, len(pairs), power == 2, zero, torch.get_num_threads(), isa())
    if zero:
        for gradient, copy in zip(gradients, dense, strict=True):
            if gradient is not copy:
                gradient.detach().zero_()


PRODUCTS = 1 << 18  # elements multiplied at a time by the library: still in the second-level cache when squared
MOST_POSITIONS = 512  # with more of them squares are a trifle beside the products, and the library is faster


def outer_square_accumulate(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
    """into += sum_b (sum_t left_bgmt right_bgkt)^2.

    Three ways, by what measured fastest (docs/fishers.md). One position and one group: a product of squares. Few
    positions, float32, M and K contiguous in memory: csrc/cpu/squares.h, where squares are added from registers.
    Else: torch's batched product, a few samples at a time, and squares added while it is in the cache.

    Args:
        left: [B, G, M, T], any strides; dtype of `into`.
        right: [B, G, K, T], the same.
        into: flat [G * M * K], contiguous, fp32 or fp64.

    Raises:
        DTypeError: dtypes that differ or that the backend does not take.

    """
    samples, groups, m, t = left.shape
    k = right.shape[2]
    kind = _kind(into.dtype, FISHER_KINDS)
    if left.dtype != into.dtype or right.dtype != into.dtype:
        raise DTypeError(f"outer_square_accumulate: {left.dtype} and {right.dtype}, expected {into.dtype}")
    if into.numel() == 0 or samples == 0 or t == 0:
        return
    module, threads, instructions = extension(), torch.get_num_threads(), isa()
    if t == 1 and groups == 1:
        into.view(m, k).addmm_(left.reshape(samples, m).square().t(), right.reshape(samples, k).square())
    elif kind == 0 and groups == 1 and t < MOST_POSITIONS and left.stride(2) == right.stride(2) == 1:
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
    else:
        step = min(samples, max(1, PRODUCTS // (groups * m * k)))
        products = left.new_empty(step * groups, m, k)
        for at in range(0, samples, step):
            rows = min(step, samples - at)
            a, b = (x[at : at + rows].flatten(0, 1) for x in (left, right))
            torch.bmm(a, b.transpose(1, 2), out=products[: rows * groups])
            module.add_squares(into.data_ptr(), products.data_ptr(), rows, groups * m * k, kind, threads, instructions)


def _kind(dtype: torch.dtype, kinds: dict[torch.dtype, int]) -> int:
    if dtype not in kinds:
        raise _unknown(dtype, kinds)
    return kinds[dtype]


def _unknown(dtype: torch.dtype, kinds: dict[torch.dtype, int]) -> DTypeError:
    return DTypeError(f"backend 'cpu' takes {', '.join(map(str, kinds))} here, found {dtype}")


def _packed(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=dtype)
