"""Dampening of ordinary float32 numbers in Triton, as the exact way has it to the bit, with half the instructions.

Ordinary is what `row_flags` finds nothing in; csrc/cuda/quick.h has the proof for the same steps. What is here in PTX
runs on NVIDIA GPUs only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import count, narrow, pointer_to, tally, widen


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def row_signs(x, SOFT: tl.constexpr):
    """Of each row [R] of float32 numbers [R, V]: negative if one has its sign bit. The interpreter reduces by name."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.min(bits, 1) if SOFT else tl.reduce(bits, 1, _either)


@triton.jit
def all_flags(flags, SOFT: tl.constexpr):
    """The flags 1, 2, 4 of any row."""
    if SOFT:
        seen = tl.max(flags & 1, 0) | tl.max(flags & 2, 0) | tl.max(flags & 4, 0)
    else:
        seen = tl.reduce(flags, 0, _either)
    return seen


@triton.jit
def row_flags(x, LEAST: tl.constexpr):
    """Of each row [R] of float32 numbers [R, V]: 2 if one is not finite or the sum is large, 4 if one is tiny, not 0.

    The sum stands for its numbers: nothing that is not finite hides in it. Less than LEAST in its bits is tiny.
    """
    least = tl.min(x.to(tl.uint32, bitcast=True) - 1, axis=1)  # 0 becomes the largest
    large = tl.where(tl.abs(tl.sum(x, axis=1)) <= 16777216.0, 0, 2)
    return large | tl.where(least < LEAST - 1, 4, 0)


@triton.jit
def _factor(original, merged, lam, cap, PAIRS: tl.constexpr):
    """min(lam * original / merged, cap), the quotient as div.rn.f32 has it on its fast path.

    PAIRS: by instructions of two numbers, which GPUs of compute capability 10 have; the steps are the same.
    """
    x = original * -lam
    if PAIRS:
        two: tl.constexpr = """{
            .reg .f32 a, b; .reg .b64 x, y, r, t, one;
            neg.f32 a, $4; rcp.approx.ftz.f32 a, a; neg.f32 b, $5; rcp.approx.ftz.f32 b, b;
            mov.b64 x, {$2, $3}; mov.b64 y, {$4, $5}; mov.b64 r, {a, b}; mov.b64 one, 0x3f8000003f800000;
            fma.rn.f32x2 t, y, r, one; fma.rn.f32x2 r, r, t, r;
            mul.rn.f32x2 t, x, r; fma.rn.f32x2 x, y, t, x; fma.rn.f32x2 t, r, x, t; mov.b64 {$0, $1}, t; }"""
        quotient = tl.inline_asm_elementwise(two, "=f,=f,f,f,f,f", [x, merged], tl.float32, True, 2)
    else:
        minus: tl.constexpr = "{ .reg .f32 y; neg.f32 y, $1; rcp.approx.ftz.f32 $0, y; }"  # -1 / y, nearly
        r = tl.inline_asm_elementwise(minus, "=f,f", [merged], tl.float32, True, 1)
        r = tl.fma(r, tl.fma(merged, r, 1.0), r)
        q = x * r
        quotient = tl.fma(r, tl.fma(merged, q, x), q)
    return tl.minimum(quotient, cap)


@triton.jit
def prefetch(pointer, BYTES: tl.constexpr):
    """Ask memory for BYTES bytes from a pointer on: what comes is in the L2 cache when it is loaded."""
    lines = pointer.to(tl.int64, bitcast=True) + tl.arange(0, BYTES // 128) * 128
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [lines], tl.int32, False, 1)


@triton.jit
def dampen_quickly(
    counter, theta_address, start, offsets, merged, original, above, lam, cap, difference, write,
    THETA: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Dampen one node's part of a tile, and count. `above`: negative in the rows [R] that hold something selected."""
    theta = pointer_to(theta_address, start, THETA, VECTOR) + offsets
    touched = tl.broadcast_to((above < 0)[:, None], [BLOCK // VECTOR, VECTOR])
    before = tl.load(theta, mask=touched)
    factor = _factor(original, merged, lam, cap, False)  # the compiler makes pairs of these by itself
    after = narrow(widen(before, COMPUTE, SOFT) * factor.to(COMPUTE), THETA, SOFT)
    selected = difference < 0
    if write != 0:
        tl.store(theta, tl.where(selected, after, before), mask=touched)
    both = count(tl.where(selected, tl.where(widen(after, COMPUTE, SOFT) == 0, 65537, 1), 0))
    tally(counter, both & 65535)
    tally(counter + 1, both >> 16)


@triton.jit
def _pairs(x, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The first and the second of each two in a row: [R, V / 2] each."""
    return tl.split(tl.reshape(x, [BLOCK // VECTOR, VECTOR // 2, 2]))


@triton.jit
def dampen_halves_quickly(
    counter, theta_address, start, merged, original, above, lam, cap, difference, write,
    THETA: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The same where theta is of 16 bits: two in a word, which are converted, selected and counted together."""
    words = tl.arange(0, BLOCK // VECTOR)[:, None] * (VECTOR // 2) + tl.arange(0, VECTOR // 2)[None, :]
    theta = pointer_to(theta_address, start // 2, tl.uint32, VECTOR) + words
    touched = tl.broadcast_to((above < 0)[:, None], [BLOCK // VECTOR, VECTOR // 2])
    before = tl.load(theta, mask=touched)
    if THETA == tl.bfloat16:
        low, high = (before << 16).to(tl.float32, bitcast=True), (before & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = (before & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (before >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    first, second = _pairs(_factor(original, merged, lam, cap, PAIRS), BLOCK, VECTOR)
    first, second = first * low, second * high
    if THETA == tl.bfloat16:
        after = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [second, first], tl.uint32, True, 1
        )
    else:
        after = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [second, first], tl.uint32, True, 1)
    first, second = _pairs(difference, BLOCK, VECTOR)
    selected = tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0xffbb;", "=r,f,f", [first, second], tl.uint32, True, 1
    )  # each sign 16 times
    if write != 0:
        tl.store(theta, before ^ ((before ^ after) & selected), mask=touched)
    # as numbers of fp16, 0x3C00 where a half is 0 or -0, whatever its type
    zero = tl.inline_asm_elementwise(
        "set.eq.f16x2.f16x2 $0, $1, $2;", "=r,r,r", [after, tl.zeros_like(after)], tl.uint32, True, 1
    )
    # of each half, in its own half: bit 0 counts what is selected, bit 10 what became 0; a row has at most 8
    sums = tl.sum(selected & ((zero & 0x04000400) | 0x00010001), axis=1)
    pair = (sums & 0xFFFF) + (sums >> 16)
    both = tl.sum((pair & 1023) | ((pair >> 10) << 16), axis=0)
    tally(counter, (both & 65535).to(tl.int32))
    tally(counter + 1, (both >> 16).to(tl.int32))
