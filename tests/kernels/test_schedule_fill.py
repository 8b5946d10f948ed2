"""How evenly tiles fill a GPU: the tables that are uploaded, given to a list of workers, on the CPU.

This is a model: a tile takes as long as the bytes it moves, a forget Fisher that an earlier tile has read costs half
(it comes from the L2 cache), and a node takes a quarter of a step's time at least, whatever its length (latency). Ideal
is each byte once, on all workers at once.
"""

from __future__ import annotations

import heapq
import time

import numpy as np
import pytest
import torch

from fiun_fast.kernels import triton_host as host
from fiun_fast.kernels.prepared import tables_of
from fiun_fast.kernels.schedule import Grain, cut
from fiun_fast.kernels.table import Table

SMS = {"A100": 108, "H100": 132, "B200": 148}
WARPS, PROGRAMS = 20, 5  # that an SM runs at once
RESNET = [9408, *[64, 64, 36864] * 4, *[128, 128, 147456] * 3, *[256, 256, 589824] * 4, *[512, 512, 2359296] * 4, 51200]
WORK = {  # rows: elements, sources, nodes
    "one model of 100 M": [(100_000_000, 1, 1)],
    "one model of 100 M, with an odd end": [(100_000_003, 1, 1)],
    "10,000 heads of 5,130": [(5_130, 3, 10_000)],
    "1,000 heads of 51,300": [(51_300, 3, 1_000)],
    "few tiles, many nodes": [(2_000, 1, 20_000)],
    "one of 100 M and 9,999 that share a Fisher": [(100_000_000, 1, 1), (5_130, 1, 9_999)],
    "one of 100 M and 9,999 with their own": [(100_000_000, 1, 1), *[(5_130, 1, 1)] * 9_999],
    "a ResNet-18": [(numel, 1, 1) for numel in RESNET],
    "16 ResNet-18s": [(numel, 3, 16) for numel in RESNET],
    "three of 20 M": [(20_000_000, 2, 3)],
    "5,000 layouts": [(10 + 37 * i % 20_000, 1, 3) for i in range(5_000)],
}


def table_of(rows: list[tuple[int, int, int]], theta: torch.dtype = torch.float32) -> Table:
    """Aligned addresses where nothing lies."""
    counts = np.array(rows)
    ends = counts.cumsum(axis=0)
    firsts = ends - counts
    table = np.stack([counts[:, 0], firsts[:, 1], counts[:, 1], firsts[:, 2], counts[:, 2]], axis=1)
    sources, nodes = (np.arange(n, dtype=np.int64) for n in ends[-1, 1:])
    targets = np.stack([nodes + 1 << 32, (nodes + 1 << 32) + (1 << 60), nodes], axis=1)
    at = (sources + 1 << 32) + (1 << 61)
    return Table(torch.device("cpu"), theta, torch.float32, [], table, at, np.ones(len(sources)), targets)


def grain(backend: str, sms: int, theta: torch.dtype) -> Grain:
    if backend == "triton":
        return host.grain(host.BLOCK, sms * PROGRAMS, torch.float32, theta)
    return Grain(4 if theta == torch.float32 else 8, 256, 8, 32, sms * WARPS, 4 if theta == torch.float32 else 8)


def costs_of(tiles: np.ndarray, step: int, theta: torch.dtype) -> np.ndarray:
    chunk = tiles["first_source"] << 34 | tiles["start"]
    merging = np.full(len(tiles), 0.5)
    merging[np.unique(chunk, return_index=True)[1]] = 1.0
    length = np.maximum(tiles["length"], step // 4)
    return length * (4 * merging * tiles["sources"] + (4 + 2 * theta.itemsize) * tiles["targets"])


def in_turn(costs: np.ndarray, workers: int) -> float:
    """A persistent grid: each worker takes every `workers`-th tile."""
    return max(costs[worker::workers].sum() for worker in range(workers))


def as_they_are_free(costs: np.ndarray, workers: int) -> float:
    """A grid of all tiles: whoever is free takes the next one."""
    ends = [0.0] * workers
    for cost in costs.tolist():
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


@pytest.mark.parametrize("gpu", SMS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("work", WORK)
def test_all_workers_end_within_a_tenth_of_the_ideal(work, backend, gpu):
    rows, workers = WORK[work], SMS[gpu] * (WARPS if backend == "cuda" else PROGRAMS)
    for theta, most in (
        (torch.float32, 1.10),
        (torch.bfloat16, 1.12),
    ):  # half as many bytes a node: merging weighs more
        its = grain(backend, SMS[gpu], theta)
        tiles = cut(table_of(rows, theta), its)
        ideal = sum(n * (4 * k + (4 + 2 * theta.itemsize) * targets) for n, k, targets in rows) / workers
        given = in_turn if backend == "cuda" else as_they_are_free
        assert given(costs_of(tiles, its.step, theta), workers) <= most * ideal, theta


def test_a_row_shorter_than_a_program_is_what_triton_cannot_fill():
    """A bias of 10 elements takes a program a quarter of a block's time: known, and the reason to stack heads."""
    tiles = cut(table_of([(5_120, 3, 10_000), (10, 3, 10_000)]), grain("triton", 132, torch.float32))
    costs = costs_of(tiles, host.BLOCK, torch.float32)
    ideal = 5_130 * (12 + 12 * 10_000) / (132 * PROGRAMS)
    assert 1.10 * ideal < as_they_are_free(costs, 132 * PROGRAMS) < 1.16 * ideal


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_nothing_is_no_tiles_and_little_is_spread(backend):
    its = grain(backend, 132, torch.float32)
    assert len(cut(table_of([(0, 1, 3)]), its)) == 0
    tiles = cut(table_of([(5, 2, 1), (64, 1, 7)]), its)
    assert sorted(tiles["targets"].tolist()) == [1] * 8, "a node each: there are workers for all"


def test_the_checks_see_an_uneven_table():
    """Tiles as they were once: five sixths of a round left over, and a large tile at the end."""
    even, workers = np.full(6 * 132, 1.0), 132
    assert in_turn(even, workers) == as_they_are_free(even, workers) == 6
    assert in_turn(np.append(even, 1.0), workers) == 7
    assert as_they_are_free(np.append(even, 3.0), workers) == 9


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_tables_are_small_and_soon_made(backend):
    """Of what they describe; the longest time is that of one or a hundred thousand tiles."""
    for work, rows in WORK.items():
        table = table_of(rows)
        began = time.process_time()
        tiles = cut(table, grain(backend, 132, torch.float32))
        seconds = time.process_time() - began
        laid_out = host.columns(tiles) if backend == "triton" else tiles
        addresses = sum(array.nbytes for array in tables_of(table)) + 8 * len(table.targets)
        described = sum(12 * n * targets for n, _, targets in rows)
        assert laid_out.nbytes <= 4_800_000, work
        assert laid_out.nbytes + addresses < 0.005 * described, work
        assert seconds < 1.0, work
