"""What both GPU backends share of their host side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiun_fast.kernels.schedule import by_node, cut_runs, phases, ranges
from fiun_fast.kernels.table import Table


def table_of(theta: torch.dtype | None, fisher: torch.dtype, sources: list[int], targets: list[list[int]]) -> Table:
    """One row of 100 elements at addresses where nothing lies."""
    rows = np.array([[100, 0, len(sources), 0, len(targets)]])
    weights = np.ones(len(sources))
    return Table(torch.device("cpu"), theta, fisher, [], rows, np.array(sources), weights, np.array(targets))


def test_ranges():
    assert ranges(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
    assert ranges(0, np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_a_row_is_wide_behind_its_head_where_all_tensors_agree(shift):
    at = 4096 + 4 * shift
    head, fits = phases(table_of(torch.float32, torch.float32, [at, at], [[at, at, 0], [at, at, 1]]), 4)
    assert (head.tolist(), fits.tolist()) == ([-shift % 4], [True])
    for odd in ([[at + 4, at, 0], [at, at, 1]], [[at, at, 0], [at, at + 8, 1]]):
        assert not phases(table_of(torch.float32, torch.float32, [at, at], odd), 4)[1].any()
    assert not phases(table_of(torch.float32, torch.float32, [at, at + 4], [[at, at, 0]]), 4)[1].any()


@pytest.mark.parametrize("fisher", [torch.float32, torch.float64], ids=str)
def test_without_parameters_only_fishers_have_to_agree(fisher):
    size = fisher.itemsize
    at, unit = 4096 + size, 16 // size
    head, fits = phases(table_of(None, fisher, [at], [[0, at, 0], [0, at + 16, 1]]), unit)
    assert (head.tolist(), fits.tolist()) == ([unit - 1], [True])
    with_parameters = table_of(torch.float32, fisher, [at], [[0, at, 0], [0, at + 16, 1]])
    assert not phases(with_parameters, unit)[1].any(), "addresses of 0 would be out of step"


def test_a_narrow_unit_asks_for_no_more_than_its_bytes():
    """Four halves beside four doubles are 8 bytes."""
    assert phases(table_of(torch.float16, torch.float64, [4096], [[4096 + 8, 4096, 0]]), 4)[1].all()
    assert not phases(table_of(torch.float16, torch.float64, [4096], [[4096 + 8, 4096 + 8, 0]]), 4)[1].any()


@given(nodes=st.lists(st.integers(0, 9), max_size=200), workers=st.integers(1, 50))
def test_runs_are_of_one_node_each_and_cover_all_tiles(nodes, workers):
    given_nodes = np.array(nodes, dtype=np.int64)
    order, runs = by_node(given_nodes, workers)
    ordered = given_nodes[order]
    assert sorted(order.tolist()) == list(range(len(nodes)))
    assert (ordered[1:] >= ordered[:-1]).all()
    assert runs[0] == 0 and runs[-1] == len(nodes)
    for first, end in zip(runs[:-1], runs[1:]):
        assert end > first and len(set(ordered[first:end].tolist())) == 1
    assert len(runs) - 1 <= workers + len(set(nodes))


def test_no_tiles_are_no_runs():
    assert cut_runs(np.zeros(0, dtype=np.int64), 4).tolist() == [0]
