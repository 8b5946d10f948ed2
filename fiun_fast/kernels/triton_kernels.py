"""Device code of the Triton backend. docs/kernels.md has the traffic, tiles and SASS figures."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_quick import all_flags, dampen_halves_quickly, dampen_quickly, prefetch, row_flags, row_signs
from .triton_tiles import count, divide, merge_sources, narrow, opposed, pointer_to, tally, tile_of, widen


@triton.jit
def _dampen_exactly(
    counter, theta_address, start, offsets, merged, slope, original, alpha, lam, exponent, cap, write,
    FISHER: tl.constexpr, THETA: tl.constexpr, COMPUTE: tl.constexpr, POWER: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr, FLUSHES: tl.constexpr,
):  # fmt: skip
    """Dampen one node's part of a tile, and count; numbers may be of any kind. `slope`: read where SIGNED."""
    selected = merged > original * alpha  # never true in the padding, where both are 0
    finite = (tl.abs(merged) < float("inf")) & (tl.abs(original) < float("inf"))
    theta = pointer_to(theta_address, start, THETA, VECTOR) + offsets
    if SIGNED:
        # theta is asked for its sign where a 16-byte access holds something above the threshold
        asked = tl.max(selected.to(tl.int32), axis=1, keep_dims=True) > 0
        asked = tl.broadcast_to(asked, [BLOCK // VECTOR, VECTOR])
        value = tl.load(theta, mask=asked, other=0.0)
        selected = selected & opposed(slope, widen(value, COMPUTE, SOFT))
        finite = finite & (tl.abs(slope) < float("inf"))
    both = count(selected.to(tl.int32) + tl.where(finite, 0, 65536))  # one reduction for two counts
    tally(counter, both & 65535)
    tally(counter + 2, both >> 16)
    if (both & 65535) > 0:
        # theta is touched where a 16-byte access holds something selected; its other bits are put back as read
        touched = tl.max(selected.to(tl.int32), axis=1, keep_dims=True) > 0
        touched = tl.broadcast_to(touched, [BLOCK // VECTOR, VECTOR])
        if SIGNED:
            before = value
        else:
            before = tl.load(theta, mask=touched)
        factor = divide(original * lam, merged, FISHER, FLUSHES)
        if POWER:
            # in float64 the logarithm's error, times a large exponent, stays far below a float32 ulp
            powered = tl.exp2(exponent.to(tl.float64) * tl.log2(factor.to(tl.float64))).to(FISHER)
            factor = tl.where(original == 0, 0.0, tl.where(exponent == 0, 1.0, powered))
            factor = tl.where(merged == float("inf"), 0.0, tl.minimum(factor, cap))
        else:
            factor = tl.where(factor == factor, tl.minimum(factor, cap), 0.0)  # infinity by infinity is 0
        after = narrow(widen(before, COMPUTE, SOFT) * factor.to(COMPUTE), THETA, SOFT)
        if write != 0:
            tl.store(theta, tl.where(selected, after, before), mask=touched)
        tally(counter + 1, count(selected & (widen(after, COMPUTE, SOFT) == 0)))


@triton.jit
def _dampen_tile(
    tile, start, length, sources, gradients, weights, targets, limits, numbers, counts, write,
    FISHER: tl.constexpr, THETA: tl.constexpr, COMPUTE: tl.constexpr, MERGE: tl.constexpr, POWER: tl.constexpr,
    SIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr, FLUSHES: tl.constexpr,
    QUICK: tl.constexpr,
):  # fmt: skip
    """A node's turn begins with a look, of float32: is anything selected, is any number not ordinary."""
    offsets, mask = tile_of(length, BLOCK, VECTOR)
    first_source, source_count = tl.load(tile + 2), tl.load(tile + 3).to(tl.int32)
    first_target, target_count = tl.load(tile + 4), tl.load(tile + 5).to(tl.int32)
    scale, exponent, cap = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    if QUICK and VECTOR > 1:  # noqa: SIM102 - known when compiling; the next one is not
        if length == BLOCK:
            prefetch(pointer_to(tl.load(targets + first_target * 3 + 1), start, FISHER, VECTOR), BLOCK * 4)
    merged = merge_sources(
        sources + first_source, weights + first_source, start, source_count, scale, offsets, mask,
        FISHER, MERGE, VECTOR, FLUSHES,
    )  # fmt: skip
    if SIGNED:
        slope = merge_sources(
            gradients + first_source, weights + first_source, start, source_count, 1.0, offsets, mask,
            FISHER, "sum", VECTOR, FLUSHES,
        )  # fmt: skip
    else:
        slope = merged
    LOOKS: tl.constexpr = FISHER == tl.float32
    if LOOKS:
        divisors = row_flags(merged, 0x0F800000)  # 2^-96
        if SIGNED:
            divisors = divisors | row_flags(slope, 1)
    for n in range(0, target_count):
        target = targets + (first_target + n) * 3
        limit = limits + (first_target + n) * 2
        # all addresses and numbers are on their way before the first of them is used
        theta_address, original_address, node = tl.load(target), tl.load(target + 1), tl.load(target + 2)
        alpha, lam = tl.load(limit), tl.load(limit + 1)
        if QUICK and VECTOR > 1:  # noqa: SIM102
            if (length == BLOCK) & (n + 1 < target_count):
                prefetch(pointer_to(tl.load(target + 4), start, FISHER, VECTOR), BLOCK * 4)
        original = pointer_to(original_address, start, FISHER, VECTOR) + offsets
        original = tl.load(original, mask=mask, other=0.0, eviction_policy="evict_first")
        counter = counts + node * 3
        if LOOKS:
            difference = tl.fma(original, alpha, 0.0) - merged  # the product; -0 becomes 0, so that signs say enough
            above = row_signs(difference, SOFT)  # the sign says m > alpha I
            flags = divisors | row_flags(original, 0x11800000) | tl.where(above < 0, 1, 0)  # 2^-92
            seen = all_flags(flags, SOFT)
            if (seen & 3) != 0:
                if QUICK and not POWER and not SIGNED:
                    # with an infinite alpha, which leaves a node alone, alpha I may be NaN, of either sign
                    if ((seen & 6) == 0) & (lam >= 0.015625) & (lam <= 64.0) & (alpha < float("inf")):
                        if THETA.primitive_bitwidth == 16 and VECTOR > 1:
                            dampen_halves_quickly(
                                counter, theta_address, start, merged, original, above, lam, cap, difference, write,
                                THETA, BLOCK, VECTOR, QUICK == 2,
                            )  # fmt: skip
                        else:
                            dampen_quickly(
                                counter, theta_address, start, offsets, merged, original, above, lam, cap, difference,
                                write, THETA, COMPUTE, BLOCK, VECTOR, SOFT,
                            )  # fmt: skip
                    else:
                        _dampen_exactly(
                            counter, theta_address, start, offsets, merged, slope, original, alpha, lam, exponent, cap,
                            write, FISHER, THETA, COMPUTE, POWER, SIGNED, BLOCK, VECTOR, SOFT, FLUSHES,
                        )  # fmt: skip
                else:
                    _dampen_exactly(
                        counter, theta_address, start, offsets, merged, slope, original, alpha, lam, exponent, cap,
                        write, FISHER, THETA, COMPUTE, POWER, SIGNED, BLOCK, VECTOR, SOFT, FLUSHES,
                    )  # fmt: skip
        else:
            _dampen_exactly(
                counter, theta_address, start, offsets, merged, slope, original, alpha, lam, exponent, cap,
                write, FISHER, THETA, COMPUTE, POWER, SIGNED, BLOCK, VECTOR, SOFT, FLUSHES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["write"])
def dampen(
    tiles,  # [T, 7] int64: start, length, first source, K, first target, N, aligned
    sources,  # [sum K] int64 addresses
    gradients,  # [sum K] int64 addresses, read where SIGNED
    weights,  # [sum K] FISHER
    targets,  # [sum N, 3] int64: address of theta, address of I, node
    limits,  # [sum N, 2] FISHER: alpha, lambda
    numbers,  # [3] FISHER: scale, exponent, cap; Triton would pass a Python float as float32
    counts,  # [nodes, 3] int64, added to
    write,  # 0: count only
    FISHER: tl.constexpr, THETA: tl.constexpr, COMPUTE: tl.constexpr, MERGE: tl.constexpr, POWER: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr, FLUSHES: tl.constexpr,
    QUICK: tl.constexpr,
):  # fmt: skip
    """One program per tile: merge its forget Fishers once, then dampen its share of the group's nodes.

    STEP elements at a time, where a whole tile of float64 would not fit into the registers.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 7
    start, length = tl.load(tile), tl.load(tile + 1).to(tl.int32)
    if tl.load(tile + 6) != 0:
        if STEP == BLOCK:
            _dampen_tile(
                tile, start, length, sources, gradients, weights, targets, limits, numbers, counts, write,
                FISHER, THETA, COMPUTE, MERGE, POWER, SIGNED, BLOCK, VECTOR, SOFT, FLUSHES, QUICK,
            )  # fmt: skip
        else:
            for done in range(0, length, STEP):
                _dampen_tile(
                    tile, start + done, tl.minimum(length - done, STEP), sources, gradients, weights, targets, limits,
                    numbers, counts, write, FISHER, THETA, COMPUTE, MERGE, POWER, SIGNED, STEP, VECTOR, SOFT, FLUSHES,
                    QUICK,
                )  # fmt: skip
    else:
        for done in range(0, length, BLOCK // 2):  # in halves: an address for each element takes twice the registers
            _dampen_tile(
                tile, start + done, tl.minimum(length - done, BLOCK // 2), sources, gradients, weights, targets, limits,
                numbers, counts, write, FISHER, THETA, COMPUTE, MERGE, POWER, SIGNED, BLOCK // 2, 1, SOFT, FLUSHES,
                QUICK,
            )  # fmt: skip


@triton.jit
def _merge_tile(
    sources, weights, out, start, count, source_count, numbers,
    FISHER: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, FLUSHES: tl.constexpr,
):  # fmt: skip
    offsets, mask = tile_of(count, BLOCK, VECTOR)
    merged = merge_sources(
        sources, weights, start, source_count, tl.load(numbers), offsets, mask, FISHER, MERGE, VECTOR, FLUSHES
    )
    tl.store(pointer_to(out, start, FISHER, VECTOR) + offsets, merged, mask=mask)


@triton.jit(do_not_specialize=["out", "numel", "source_count", "aligned"])
def merge(
    sources,  # [K] int64 addresses
    weights,  # [K] FISHER
    numbers,  # [1] FISHER: scale
    out,  # address
    numel,
    source_count,
    aligned,  # 1: all addresses are multiples of 16
    FISHER: tl.constexpr, MERGE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, FLUSHES: tl.constexpr,
):  # fmt: skip
    """One program per tile of BLOCK elements of `out`."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    count = tl.minimum(numel.to(tl.int64) - start, BLOCK).to(tl.int32)
    out = out.to(tl.int64)
    if (aligned != 0) & (count % VECTOR == 0):
        _merge_tile(sources, weights, out, start, count, source_count, numbers, FISHER, MERGE, BLOCK, VECTOR, FLUSHES)
    else:
        _merge_tile(sources, weights, out, start, count, source_count, numbers, FISHER, MERGE, BLOCK, 1, FLUSHES)


@triton.jit
def _accumulate_tile(
    gradient, into, start, count,
    GRADIENT: tl.constexpr, INTO: tl.constexpr, SQUARE: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    offsets, mask = tile_of(count, BLOCK, VECTOR)
    g_pointer = pointer_to(gradient, start, GRADIENT, VECTOR) + offsets
    into_pointer = pointer_to(into, start, INTO, VECTOR) + offsets
    g = widen(tl.load(g_pointer, mask=mask, eviction_policy="evict_first"), INTO, SOFT)
    total = tl.load(into_pointer, mask=mask)
    tl.store(into_pointer, total + (g * g if SQUARE else tl.abs(g)), mask=mask)
    if ZERO:
        tl.store(g_pointer, tl.zeros([BLOCK // VECTOR, VECTOR], GRADIENT), mask=mask)


@triton.jit
def _accumulate_chunk(
    gradient, into, numel, start,
    GRADIENT: tl.constexpr, INTO: tl.constexpr, SQUARE: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    count = tl.minimum(numel - start, BLOCK).to(tl.int32)
    if ((gradient | into) % 16 == 0) & (count % VECTOR == 0):
        _accumulate_tile(gradient, into, start, count, GRADIENT, INTO, SQUARE, ZERO, BLOCK, VECTOR, SOFT)
    else:
        _accumulate_tile(gradient, into, start, count, GRADIENT, INTO, SQUARE, ZERO, BLOCK, 1, SOFT)


@triton.jit
def accumulate(
    tiles,  # [T, 2] int64: pair, start
    pairs,  # [P, 3] int64: address of the gradient, address of the accumulator, numel
    GRADIENT: tl.constexpr, INTO: tl.constexpr, SQUARE: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """One program per tile: into += g^2 or |g|, and g = 0 in the same pass if asked."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    pair = pairs + tl.load(tile) * 3
    _accumulate_chunk(
        tl.load(pair), tl.load(pair + 1), tl.load(pair + 2), tl.load(tile + 1),
        GRADIENT, INTO, SQUARE, ZERO, BLOCK, VECTOR, SOFT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["gradient", "into", "numel"])
def accumulate_one(
    gradient,  # address
    into,  # address
    numel,
    GRADIENT: tl.constexpr, INTO: tl.constexpr, SQUARE: tl.constexpr, ZERO: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """`accumulate` for one pair."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    _accumulate_chunk(
        gradient.to(tl.int64), into.to(tl.int64), numel.to(tl.int64), start,
        GRADIENT, INTO, SQUARE, ZERO, BLOCK, VECTOR, SOFT,
    )  # fmt: skip


@triton.jit
def outer_square(
    left,  # [B, G, M, T] fp32, strides below
    right,  # [B, G, K, T] fp32
    into,  # [G, M, K] fp32
    samples, groups, m, k, t,
    left_b, left_g, left_m, left_t,
    right_b, right_g, right_k, right_t,
    share,  # samples per program
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A matrix product for each sample, squared in registers, so that products never reach memory.

    Grid: tiles of the weight, groups, shares of the samples. Products are fp32 ("ieee") unless
    torch.backends.cuda.matmul.allow_tf32 permits tensor cores to round their inputs ("tf32").
    """
    tiles_k = tl.cdiv(k, BLOCK_K)
    rows = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    group = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2).to(tl.int64) * share
    positions = tl.arange(0, BLOCK_T)
    left += group * left_g + rows[:, None].to(tl.int64) * left_m
    right += group * right_g + columns[None, :].to(tl.int64) * right_k
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for b in range(first, tl.minimum(first + share, samples)):
        product = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for start in range(0, t, BLOCK_T):
            at = (start + positions).to(tl.int64)
            known = start + positions < t
            a = tl.load(left + b * left_b + at[None, :] * left_t, mask=(rows < m)[:, None] & known[None, :], other=0.0)
            c = tl.load(
                right + b * right_b + at[:, None] * right_t, mask=known[:, None] & (columns < k)[None, :], other=0.0
            )
            product = tl.dot(a, c, product, input_precision=PRECISION)
        total += product * product
    to = into + (group * m + rows[:, None].to(tl.int64)) * k + columns[None, :]
    tl.atomic_add(to, total, mask=(rows < m)[:, None] & (columns < k)[None, :], sem="relaxed")
