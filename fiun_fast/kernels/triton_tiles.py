"""What the Triton kernels are made of: addresses, tiles, conversions, division, the merge of forget Fishers, counters.

Every tensor is reached through an int64 address from a table, so one launch serves any number of tensors. A tile is a
matrix [BLOCK / VECTOR, VECTOR] of consecutive elements: one thread owns whole rows of it, a row is one 16-byte access,
and a mask that is constant along a row keeps it one access. Tiles whose addresses or length are not multiples of 16
bytes run the same code with VECTOR = 1: 4-byte accesses, still coalesced over the warp.

Bits: `tl.div_rn` is IEEE division, and the launch sets enable_fp_fusion=False, so that no product is contracted into a
sum. FLUSHES is set for the Tritons (3.2 to 3.5) whose `tl.div_rn` flushes subnormal numbers to zero: they get the PTX
instruction itself. SOFT is set under the interpreter only, whose bfloat16 conversion rounds wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer_to(address, start, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Element `start` of the tensor at `address`. Only a hint after the cast makes accesses wider than 4 bytes."""
    pointer = address.to(tl.pointer_type(DTYPE), bitcast=True) + start
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def tile_of(length, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets [BLOCK / VECTOR, VECTOR] and their mask; with VECTOR > 1 `length` is a multiple of VECTOR."""
    rows = tl.arange(0, BLOCK // VECTOR)[:, None]
    offsets = rows * VECTOR + tl.arange(0, VECTOR)[None, :]
    return offsets, tl.broadcast_to(rows < length // VECTOR, [BLOCK // VECTOR, VECTOR])


@triton.jit
def widen(x, DTYPE: tl.constexpr, SOFT: tl.constexpr):
    """In the wider DTYPE."""
    if SOFT and x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x
    return wide.to(DTYPE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr, SOFT: tl.constexpr):
    """Round to nearest even; x is float32 where DTYPE is a half."""
    if SOFT and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        narrow = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(DTYPE)
    return narrow


@triton.jit
def divide(x, y, DTYPE: tl.constexpr, FLUSHES: tl.constexpr):
    """IEEE division, subnormal numbers kept."""
    if DTYPE == tl.float64:
        quotient = x / y  # div_rn is float32 only; the float64 division instruction is IEEE anyway
    elif FLUSHES:
        quotient = tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def merge_sources(
    sources, weights, start, count, scale, offsets, mask,
    FISHER: tl.constexpr, MERGE: tl.constexpr, VECTOR: tl.constexpr, FLUSHES: tl.constexpr,
):  # fmt: skip
    """m = scale * reduce_k (w_k F_k) of one tile, 0 in the padding. A factor of 1 changes no bits: none is skipped."""
    merged = tl.load(pointer_to(tl.load(sources), start, FISHER, VECTOR) + offsets, mask=mask, other=0.0)
    merged = merged * tl.load(weights)
    for k in range(1, count):
        term = tl.load(pointer_to(tl.load(sources + k), start, FISHER, VECTOR) + offsets, mask=mask, other=0.0)
        term = term * tl.load(weights + k)
        merged = tl.maximum(merged, term, propagate_nan=tl.PropagateNan.ALL) if MERGE == "max" else merged + term
    if MERGE == "mean":
        merged = divide(merged, tl.zeros_like(merged) + count.to(FISHER), FISHER, FLUSHES)
    return merged * scale


@triton.jit
def opposed(slope, theta):
    """Where slope * theta < 0: signs differ, neither is 0 or NaN; both of one shape, each in its dtype."""
    return ((slope < 0) & (theta > 0)) | ((slope > 0) & (theta < 0))


@triton.jit
def count(flags):
    """How many of a tile [R, V] are set; of numbers, their sum."""
    return tl.sum(tl.sum(flags.to(tl.int32), axis=1), axis=0)


@triton.jit
def tally(counter, amount):
    """One relaxed atomic without a result, and none for 0. The default order would fence every tile."""
    tl.atomic_add(counter, amount.to(tl.int64), mask=amount > 0, sem="relaxed")
