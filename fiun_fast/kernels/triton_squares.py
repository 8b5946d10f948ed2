"""Device code of outer_square_accumulate for Triton: a matrix product for each sample, squared in registers.

A program owns a tile of the weight, and all samples or a share of them; products never reach memory. Products are fp32
("ieee") unless torch.backends.cuda.matmul.allow_tf32 permits tensor cores to round their inputs ("tf32").
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def outer_square(
    left,  # [B, G, M, T] fp32, strides below
    right,  # [B, G, K, T] fp32
    into,  # [G, M, K] fp32
    samples, groups, m, k, t,
    left_b, left_g, left_m, left_t,
    right_b, right_g, right_k, right_t,
    share,  # samples of one program
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of the weight, groups, shares of the samples."""
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
