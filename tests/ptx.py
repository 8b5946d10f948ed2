"""The few PTX instructions that the Triton kernels have, in NumPy, so that its interpreter can run them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np

from fiun_fast.kernels import triton_host as host


def reciprocal(y: np.ndarray) -> np.ndarray:
    """-1 / y, one unit in the last place too low, right, or too high: all that the PTX manual leaves open."""
    with np.errstate(divide="ignore"):
        right = (-1 / y.astype(np.float64)).astype(np.float32).view(np.uint32)
    off = (y.view(np.uint32) * np.uint32(2654435761) >> 16) % 3 - 1
    return (right + off.astype(np.uint32)).view(np.float32)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z, rounded once."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    x, y, z = (TensorHandle(np.asarray(each, np.float32), tl.float32) for each in np.broadcast_arrays(x, y, z))
    return InterpreterBuilder().create_fma(x, y, z).data


def quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """-x / y by the steps that follow a reciprocal."""
    r = reciprocal(y)
    r = fused(r, fused(y, r, np.float32(1)), r)
    q = x * r
    return fused(r, fused(y, q, x), q)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits, rounded to nearest even; NaN becomes 0x7FFF."""
    bits = x.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)


def float16(x: np.ndarray) -> np.ndarray:
    """Bits, rounded to nearest even; NaN becomes 0x7FFF."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.isnan(x), 0x7FFF, x.astype(np.float16).view(np.uint16)).astype(np.uint32)


def signs(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Each sign bit 16 times."""
    of = lambda x: (x.view(np.uint32) >> 31) * np.uint32(0xFFFF)
    return of(low) | of(high) << 16


def halves_equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1.0 of fp16 in each half that is equal as a number of fp16."""
    of = lambda x, y: (x.astype(np.uint16).view(np.float16) == y.astype(np.uint16).view(np.float16)) * np.uint32(0x3C00)
    return of(a, b) | of(a >> 16, b >> 16) << 16


INSTRUCTIONS = {
    "prefetch.global.L2 [$1]; mov.b32 $0, 0;": lambda lines: np.zeros(lines.shape, np.int32),
    "{ .reg .f32 y; neg.f32 y, $1; rcp.approx.ftz.f32 $0, y; }": reciprocal,
    "cvt.rn.bf16x2.f32 $0, $1, $2;": lambda high, low: bfloat16(high) << 16 | bfloat16(low),
    "cvt.rn.f16x2.f32 $0, $1, $2;": lambda high, low: float16(high) << 16 | float16(low),
    "prmt.b32 $0, $1, $2, 0xffbb;": signs,
    "set.eq.f16x2.f16x2 $0, $1, $2;": halves_equal,
}


@contextmanager
def quick_way(how: int) -> Iterator[list[str]]:
    """Inside, the interpreter takes the way of ordinary numbers too; gives the instructions that it met.

    `how`: 2 for those of GPUs that have instructions of two numbers, else 1.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    met: list[str] = []

    def create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
        met.append(asm)
        assert (pack == 2) == ("f32x2" in asm)
        found = (quotient if pack == 2 else INSTRUCTIONS[asm])(*(value.data for value in values))
        types = [getattr(kind, "scalar", kind) for kind in types]
        return SimpleNamespace(get_result=lambda i: TensorHandle(found, types[i]))

    shipped = host.options

    def options(*given):
        return shipped(*given) | ({"QUICK": how} if "POWER" in given[-1] else {})

    with (
        mock.patch.object(InterpreterBuilder, "create_inline_asm", create_inline_asm, create=True),
        mock.patch.object(host, "options", options),
    ):
        yield met
