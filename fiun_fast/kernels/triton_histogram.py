"""Histograms of m / I in Triton: device code and launch. Its tiles, tables and helpers are those of `dampen`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl

from . import triton as host
from .table import BINS, DampenTable, cut_runs
from .triton_kernels import _divide, _merge, _pointer, _tile


@triton.jit
def _count_tile(
    sources, weights, original, start, length, source_count, scale, low, base, nearest,
    FISHER: tl.constexpr, BITS: tl.constexpr, MERGE: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, FLUSHES: tl.constexpr,
):  # fmt: skip
    """Counts [BINS] int32 of one tile: reference.ratio_bins has the rule."""
    offsets, mask = _tile(length, BLOCK, VECTOR)
    merged = _merge(sources, weights, start, source_count, scale, offsets, mask, FISHER, MERGE, VECTOR, FLUSHES)
    # 0 in the padding: 0 / 0 has no bin
    original = tl.load(_pointer(original, start, FISHER, VECTOR) + offsets, mask=mask, other=0.0)
    ratio = _divide(merged, original, FISHER, FLUSHES)
    at = (tl.abs(ratio).to(BITS, bitcast=True) >> low.to(BITS)) - base.to(BITS)
    inside = tl.minimum(tl.maximum(at, 0), BINS - 1)
    counted = mask & (ratio >= 0) & ((at == inside) | (nearest != 0))
    # what has no bin goes to the first one and is taken off it again
    where = tl.reshape(tl.where(counted, inside, 0).to(tl.int32), [BLOCK])
    others = tl.sum(tl.reshape(tl.where(counted, 0, 1), [BLOCK]), axis=0)
    return tl.histogram(where, BINS) - tl.where(tl.arange(0, BINS) == 0, others, 0)


@triton.jit(do_not_specialize=["low", "nearest"])
def histogram(
    runs,  # [R + 1] int64: first tile of each run, and the end
    tiles,  # [T, 7] int64, as in `dampen`, each of one node; all tiles of a run are of one slot
    sources,  # [sum K] int64 addresses
    weights,  # [sum K] FISHER
    targets,  # [sum N, 3] int64: address of theta, address of I, slot
    numbers,  # [1] FISHER: scale
    bases,  # [slots] int64
    counts,  # [slots, BINS] int64, added to
    low,
    nearest,
    FISHER: tl.constexpr, BITS: tl.constexpr, MERGE: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, FLUSHES: tl.constexpr,
):  # fmt: skip
    """One program a run: its counts stay in registers until the run ends."""
    run = runs + tl.program_id(0)
    first, end = tl.load(run), tl.load(run + 1)
    slot = tl.load(targets + tl.load(tiles + first * 7 + 4) * 3 + 2)
    base, scale = tl.load(bases + slot), tl.load(numbers)
    found = tl.zeros([BINS], tl.int32)
    for t in range(first, end):
        tile = tiles + t * 7
        start, length = tl.load(tile), tl.load(tile + 1).to(tl.int32)
        first_source, source_count = tl.load(tile + 2), tl.load(tile + 3).to(tl.int32)
        original = tl.load(targets + tl.load(tile + 4) * 3 + 1)
        if tl.load(tile + 6) != 0:
            found += _count_tile(
                sources + first_source, weights + first_source, original, start, length, source_count, scale,
                low, base, nearest, FISHER, BITS, MERGE, BINS, BLOCK, VECTOR, FLUSHES,
            )  # fmt: skip
        else:
            found += _count_tile(
                sources + first_source, weights + first_source, original, start, length, source_count, scale,
                low, base, nearest, FISHER, BITS, MERGE, BINS, BLOCK, 1, FLUSHES,
            )  # fmt: skip
    total = counts + slot * BINS + tl.arange(0, BINS)
    tl.atomic_add(total, found.to(tl.int64), mask=found > 0, sem="relaxed")


def block_size() -> int:
    """Elements of a tile: half as many as elsewhere, because the counts take registers too."""
    return host.block_size() if host.interpreted() else host.block_size() // 2


def constants(fisher: torch.dtype, how: str) -> dict[str, object]:
    """Compile-time arguments."""
    bits = tl.int32 if fisher == torch.float32 else tl.int64
    shapes = {"BINS": BINS, "BLOCK": block_size(), "VECTOR": host.vector_width(fisher)}
    return {"FISHER": host.triton_type(fisher), "BITS": bits, "MERGE": how} | shapes


class HistogramLaunch:
    """A prepared count of the ratios m / I of every node, as `reference.histogram`."""

    def __init__(self, table: DampenTable) -> None:
        """Upload the tables, once. Parameters are not touched, so that their alignment does not matter."""
        self.table = table
        fishers = replace(table, theta_dtype=table.fisher_dtype, targets=table.targets[:, [1, 1, 2]])
        programs = host._programs(table.device)
        everyone = int(table.rows[:, 0] @ table.rows[:, 4]) + 1  # so many programs that every node gets its own tiles
        tiles = host.schedule(fishers, everyone, block_size())
        slots = table.targets[tiles[:, 4], 2]
        order = np.argsort(slots, kind="stable")
        runs = cut_runs(slots[order], programs)
        number = torch.empty(0, dtype=table.fisher_dtype).numpy().dtype
        arrays = (
            runs,
            tiles[order],
            table.sources,
            table.weights.astype(number),
            table.targets,
            np.array([table.scale]).astype(number),
        )
        self._grid = len(runs) - 1
        self._tables = [torch.from_numpy(np.ascontiguousarray(array)).to(table.device) for array in arrays]
        self._constants = constants(table.fisher_dtype, table.merge)

    def __call__(self, bases: np.ndarray, low: int, nearest: bool, counts: torch.Tensor) -> None:
        """Overwrite counts [slots, BINS]; bases [slots]."""
        counts.zero_()
        if self._grid:
            uploaded = torch.from_numpy(np.ascontiguousarray(bases, dtype=np.int64)).to(self.table.device)
            arguments = (*self._tables, uploaded, counts, low, int(nearest))
            host.launch(histogram, self.table.device, self._grid, *arguments, **self._constants)
