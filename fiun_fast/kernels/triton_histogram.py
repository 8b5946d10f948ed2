"""Histograms of m / I in Triton: device code and launch. Tiles are like those of `dampen`, with one node each."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from . import triton_host as host
from .extension import FISHER_KINDS, kind
from .prepared import PreparedHistogram, upload
from .table import BINS, Merging, Table, number_type
from .triton_tiles import divide, merge_sources, opposed, pointer_to, tile_of, widen


@triton.jit
def _count_tile(
    sources, gradients, weights, theta, original, start, length, source_count, scale, low, base, nearest,
    FISHER: tl.constexpr, THETA: tl.constexpr, BITS: tl.constexpr, MERGE: tl.constexpr, BINS: tl.constexpr,
    SIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr, FLUSHES: tl.constexpr,
):  # fmt: skip
    """Counts [BINS] int32 of one tile: reference.ratio_bins has the rule."""
    offsets, mask = tile_of(length, BLOCK, VECTOR)
    merged = merge_sources(sources, weights, start, source_count, scale, offsets, mask, FISHER, MERGE, VECTOR, FLUSHES)
    # 0 in the padding: 0 / 0 has no bin
    original = tl.load(pointer_to(original, start, FISHER, VECTOR) + offsets, mask=mask, other=0.0)
    ratio = divide(merged, original, FISHER, FLUSHES)
    at = (tl.abs(ratio).to(BITS, bitcast=True) >> low.to(BITS)) - base.to(BITS)
    inside = tl.minimum(tl.maximum(at, 0), BINS - 1)
    counted = mask & (ratio >= 0) & ((at == inside) | (nearest != 0))
    if SIGNED:
        slope = merge_sources(
            gradients, weights, start, source_count, 1.0, offsets, mask, FISHER, "sum", VECTOR, FLUSHES
        )  # fmt: skip
        value = tl.load(pointer_to(theta, start, THETA, VECTOR) + offsets, mask=mask, other=0.0)
        counted = counted & opposed(slope, widen(value, tl.float64 if THETA == tl.float64 else tl.float32, SOFT))
    # what has no bin is counted in the first one, and subtracted from it again
    where = tl.reshape(tl.where(counted, inside, 0).to(tl.int32), [BLOCK])
    others = tl.sum(tl.reshape(tl.where(counted, 0, 1), [BLOCK]), axis=0)
    return tl.histogram(where, BINS) - tl.where(tl.arange(0, BINS) == 0, others, 0)


@triton.jit(do_not_specialize=["low", "nearest"])
def histogram(
    runs,  # [R + 1] int64: first tile of each run, and the end
    tiles,  # [T, 7] int64, as in `dampen`, with one node each, the same in all tiles of a run
    sources,  # [sum K] int64 addresses
    gradients,  # [sum K] int64 addresses, read where SIGNED
    weights,  # [sum K] FISHER
    targets,  # [sum N, 3] int64: address of theta, address of I, node
    numbers,  # [1] FISHER: scale
    bases,  # [nodes] int64
    counts,  # [nodes, BINS] int64, added to
    low,
    nearest,
    FISHER: tl.constexpr, THETA: tl.constexpr, BITS: tl.constexpr, MERGE: tl.constexpr, BINS: tl.constexpr,
    SIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr, FLUSHES: tl.constexpr,
):  # fmt: skip
    """One program per run: its counts stay in registers until the run ends."""
    run = runs + tl.program_id(0)
    first, end = tl.load(run), tl.load(run + 1)
    node = tl.load(targets + tl.load(tiles + first * 7 + 4) * 3 + 2)
    base, scale = tl.load(bases + node), tl.load(numbers)
    found = tl.zeros([BINS], tl.int32)
    for t in range(first, end):
        tile = tiles + t * 7
        start, length = tl.load(tile), tl.load(tile + 1).to(tl.int32)
        first_source, source_count = tl.load(tile + 2), tl.load(tile + 3).to(tl.int32)
        target = targets + tl.load(tile + 4) * 3
        theta, original = tl.load(target), tl.load(target + 1)
        if tl.load(tile + 6) != 0:
            found += _count_tile(
                sources + first_source, gradients + first_source, weights + first_source, theta, original,
                start, length, source_count, scale, low, base, nearest,
                FISHER, THETA, BITS, MERGE, BINS, SIGNED, BLOCK, VECTOR, SOFT, FLUSHES,
            )  # fmt: skip
        else:
            found += _count_tile(
                sources + first_source, gradients + first_source, weights + first_source, theta, original,
                start, length, source_count, scale, low, base, nearest,
                FISHER, THETA, BITS, MERGE, BINS, SIGNED, BLOCK, 1, SOFT, FLUSHES,
            )  # fmt: skip
    total = counts + node * BINS + tl.arange(0, BINS)
    tl.atomic_add(total, found.to(tl.int64), mask=found > 0, sem="relaxed")


def constants(fisher: torch.dtype, how: str, theta: torch.dtype | None = None) -> dict[str, object]:
    """Compile-time arguments; `theta`: the dtype of the parameters, where the signs of these are asked for."""
    bits = tl.int32 if fisher == torch.float32 else tl.int64
    shapes = {"BINS": BINS, "BLOCK": host.histogram_block_size(), "VECTOR": host.vector_width(fisher)}
    types = {"FISHER": host.triton_type(fisher), "THETA": host.triton_type(theta or fisher)}
    return types | {"BITS": bits, "MERGE": how, "SIGNED": theta is not None, "SOFT": host.interpreted()} | shapes


class TritonHistogram(PreparedHistogram):
    """One program per run of tiles."""

    def __init__(self, table: Table, merging: Merging) -> None:
        """Upload the tables, once."""
        kind(host.NAME, table.fisher_dtype, FISHER_KINDS)
        self._constants = constants(table.fisher_dtype, merging.how, table.theta_dtype if table.signed else None)
        workers = host.ROUNDS * host.resident(table.device, self._constants)
        dtypes = (table.fisher_dtype, table.theta_dtype or table.fisher_dtype)
        super().__init__(table, host.grain(host.histogram_block_size(), workers, *dtypes, most_targets=1))
        self._scale = upload(np.array([merging.scale]).astype(number_type(table.fisher_dtype)), table.device)
        tiles, runs, *others = self.tables.tensors
        self._arguments = (runs, tiles, *others, self._scale)

    laid_out = staticmethod(host.columns)

    def start(self, counts: torch.Tensor, bases: torch.Tensor, low: int, nearest: bool, stream: int) -> None:
        """One launch."""
        arguments = (*self._arguments, bases, counts, low, int(nearest))
        host.launch(histogram, self.device, self.runs, *arguments, **self._constants)
