"""What every backend promises whoever prepares and runs its launches; tables are packed here, without a plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import DTYPES
from random_tables import dampened, make_ordinary, work
from test_parity import same_bits

from fiun_fast.kernels import load
from fiun_fast.kernels.table import Merging

ORDINARY = [(1.5, 0.7, 1.0), (0.0, 1.0, 0.5), (10.0, 64.0, 8.0), (1.0, 1 / 64, 1.0)]  # alpha, lambda, cap
GROUPS = [((0, 3, 4), 2, (7, 1, 33, 1009)), ((1,), 1, (5, 20_011)), ((2, 5), 3, (64,))]
REFERENCE = load("reference")


@pytest.mark.parametrize("how", ["max", "mean", "sum"])
@pytest.mark.parametrize("fisher", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("theta", DTYPES, ids=str)
def test_a_table_is_dampened_as_in_the_reference(backend, theta, fisher, how):
    for shift in (0, 3):
        problem = work(GROUPS, 7, theta=theta, fisher=fisher, shift=shift, device=backend.device, edges=how == "max")
        numbers = problem.dampening(), Merging(how, 0.75)
        counts, thetas = dampened(backend.kernels, problem, numbers[1], numbers[0])
        expected, wanted = dampened(REFERENCE, problem, numbers[1], numbers[0])
        assert not counts[6].any(), "a node of the plan that is not in the table"
        if how == "max":
            assert torch.equal(counts, expected)
            assert all(map(same_bits, thetas, wanted))
        else:  # rounding decides the selection of few
            assert (counts - expected).abs().max() <= 2
            differ = sum(int((~torch.isclose(a, b, rtol=1e-2)).sum()) for a, b in zip(thetas, wanted, strict=True))
            assert differ <= 2


@pytest.mark.parametrize("theta", DTYPES, ids=str)
def test_ordinary_numbers_are_dampened_as_in_the_reference(backend, theta):
    check_ordinary(backend, theta, GROUPS)


def check_ordinary(backend, theta, groups):
    for shift, (alpha, lam, cap) in enumerate(
        [(1.5, 0.7, 1.0), (0.0, 1.0, 0.5), (10.0, 64.0, 8.0), (1.0, 1 / 64, 1.0)]
    ):
        problem = make_ordinary(work(groups, 7, theta=theta, shift=shift * 4, device=backend.device), shift)
        numbers = Merging("max", 0.75), problem.dampening(alpha, lam, cap=cap)
        counts, thetas = dampened(backend.kernels, problem, *numbers)
        expected, wanted = dampened(REFERENCE, problem, *numbers)
        assert torch.equal(counts, expected)
        assert all(map(same_bits, thetas, wanted))
        assert (expected[:6, 0] > 0).all() and expected[:, 0].sum() < problem.numels().sum() and expected[:, 1].any()


@pytest.mark.parametrize("fisher", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("theta", DTYPES, ids=str)
def test_ratios_of_a_signed_table_are_counted_as_in_the_reference(backend, theta, fisher):
    """Of the elements whose gradient and parameter have opposite signs, whatever the parameters are aligned to."""
    low, merging, bases = (20 if fisher == torch.float32 else 52), Merging("sum", 0.75), np.zeros(7, dtype=np.int64)
    for shift in (0, 3):
        problem = work(GROUPS, 7, theta=theta, fisher=fisher, signed=True, shift=shift, device=backend.device)
        unsigned = replace(
            problem.table, gradients=None, groups=[replace(g, gradients=None) for g in problem.table.groups]
        )
        found, expected, everything = problem.bins(), problem.bins(), problem.bins()
        backend.kernels.histogram(problem.table, merging).run(found, bases, low, False)
        REFERENCE.histogram(problem.table, merging).run(expected, bases, low, False)
        backend.kernels.histogram(unsigned, merging).run(everything, bases, low, False)
        assert torch.equal(found, expected)
        assert 0.3 * everything.sum() < found.sum() < 0.6 * everything.sum()


@pytest.mark.parametrize("theta", [torch.float32, None], ids=str)
@pytest.mark.parametrize("fisher", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("nearest", [False, True])
def test_ratios_are_counted_as_in_the_reference(backend, nearest, fisher, theta):
    """Of tables with parameters and of Fishers alone, which have addresses of 0 for theta."""
    low, merging = (20 if fisher == torch.float32 else 52), Merging("max", 0.75)
    for shift in (0, 1):
        problem = work(GROUPS, 7, theta=theta, fisher=fisher, shift=shift, device=backend.device)
        assert bool(problem.table.targets[:, 0].any()) == (theta is not None)
        bases = np.array([0, 100, 900, 0, 1000, 7, 3])
        found, expected = problem.bins(), problem.bins()
        backend.kernels.histogram(problem.table, merging).run(found, bases, low, nearest)
        REFERENCE.histogram(problem.table, merging).run(expected, bases, low, nearest)
        assert torch.equal(found, expected)
        assert found[:6].any(dim=1).all() and not found[6].any()


def test_runs_add_to_the_counts_they_are_given(backend):
    problem = work(GROUPS, 7, device=backend.device)
    launch = backend.kernels.dampen(problem.table, Merging(), problem.dampening())
    once, thrice = problem.counts(), problem.counts() + 5
    launch.run(once, dry_run=True)
    for _ in range(3):
        launch.run(thrice, dry_run=True)
    assert once.any()
    assert torch.equal(thrice, 3 * once + 5)


def test_histograms_add_to_the_counts_they_are_given(backend):
    problem = work(GROUPS, 7, theta=None, device=backend.device)
    launch, bases = backend.kernels.histogram(problem.table, Merging()), np.zeros(7, dtype=np.int64)
    once, twice = problem.bins(), problem.bins() + 5
    launch.run(once, bases, 20, False)
    for _ in range(2):
        launch.run(twice, bases, 20, False)
    assert once.any()
    assert torch.equal(twice, 2 * once + 5)


def test_tables_of_one_plan_share_their_counts(backend):
    """Nodes 0 and 1 have parameters of two dtypes, and so lie in two tables; node 2 lies in the second alone."""
    first = work([((0, 1), 2, (33, 1009))], 3, device=backend.device)
    second = work([((1, 2), 1, (300,)), ((0,), 1, (17,))], 3, theta=torch.float16, device=backend.device, seed=1)
    together, apart = first.counts(), []
    for problem in (first, second):
        launch = backend.kernels.dampen(problem.table, Merging(), problem.dampening())
        launch.run(together, dry_run=True)
        apart.append(problem.counts())
        launch.run(apart[-1], dry_run=True)
    assert torch.equal(together, apart[0] + apart[1])
    assert not apart[0][2].any() and apart[1][2].any()


def test_a_dry_run_counts_and_writes_nothing_else(backend):
    problem = work(GROUPS, 7, device=backend.device)
    before = [tensor.clone() for tensor in problem.thetas()]
    launch = backend.kernels.dampen(problem.table, Merging(), problem.dampening())
    counted, counts = problem.counts(), problem.counts()
    launch.run(counted, dry_run=True)
    assert all(map(same_bits, problem.thetas(), before))
    launch.run(counts)
    assert torch.equal(counts, counted)
    assert not all(map(same_bits, problem.thetas(), before))


def test_numbers_written_since_are_those_of_the_next_run(backend):
    problem = work(GROUPS, 7, device=backend.device)
    dampening = problem.dampening(alpha=1e30)
    launch = backend.kernels.dampen(problem.table, Merging(), dampening)
    dampening.alpha[:], dampening.lam[:] = 0.5, 0.25
    launch.refresh()
    launch.warmup()
    counts = problem.counts()
    before = [tensor.clone() for tensor in problem.thetas()]
    launch.run(counts)
    after = [tensor.clone() for tensor in problem.thetas()]
    for tensor, value in zip(problem.thetas(), before, strict=True):
        tensor.copy_(value)
    expected, wanted = dampened(REFERENCE, problem, Merging(), problem.dampening(0.5, 0.25))
    assert torch.equal(counts, expected)
    assert all(map(same_bits, after, wanted))


def test_every_element_is_selected_or_not_once(backend):
    problem = work(GROUPS, 7, edges=False, device=backend.device)
    counts = problem.counts()
    backend.kernels.dampen(problem.table, Merging(), problem.dampening(alpha=0.0)).run(counts, dry_run=True)
    assert torch.equal(counts[:, 0].cpu(), problem.numels())
