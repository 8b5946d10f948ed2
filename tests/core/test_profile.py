"""Profiles against brute force: counts at the edges, what lies between, norms, and how they are shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DIAMOND, FAN, SIZES, TILES, Case, build

import fiun_fast as ff

CASES = [
    Case("random", DIAMOND, ("a", "b"), shapes=SIZES),
    Case("edges", DIAMOND, ("a", "b"), shapes=SIZES, values="edges"),
    Case("edges-fp64", DIAMOND, ("a", "b"), shapes=SIZES, fisher=torch.float64, values="edges"),
    Case("half", FAN, ("root", "child1"), (0.5, 1.0), shapes=SIZES, theta=torch.float16, scale=0.3),
    Case("tiles", shapes=TILES, fisher=torch.float64, flat=True),
    Case("signed", DIAMOND, ("a", "b"), (1.0, 0.5), SIZES, theta=torch.bfloat16, values="edges", signed=True),
]


def brute_force(problem, node: str) -> tuple[np.ndarray, np.ndarray]:
    """Ratios m / I of a node, and its parameters, both [n]."""
    case = problem.case
    reached = {"a": [0], "b": [0, 1], "c": [0], "d": [0, 1]} if case.parents is DIAMOND else {"child1": [0, 1]}
    weights = case.weights or (1.0,) * len(case.origins)
    terms = [problem.forgets[k].buffer * weights[k] for k in reached.get(node, [0])]
    merged = torch.stack(terms).amax(0) if len(terms) > 1 else terms[0]
    merged[torch.stack(terms).isnan().any(0)] = torch.nan
    theta = torch.cat([t.reshape(-1).double() for t in problem.models[node].values()])
    if case.signed:
        slope = sum(problem.gradients[k].buffer * weights[k] for k in reached.get(node, [0]))
        merged = merged.masked_fill(slope.sign() * theta.sign() != -1, torch.nan)
    return (merged * case.scale / problem.originals[node].buffer).double().cpu().numpy(), theta.cpu().numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_counts_are_those_of_brute_force_at_every_edge(backend, case):
    problem = build(case, backend.device)
    profiles = problem.plan(backend.name).profile()
    for node, profile in profiles.items():
        ratio, _ = brute_force(problem, node)
        assert profile.numel == len(ratio)
        assert profile.never == np.isnan(ratio).sum()
        assert profile.always == (ratio >= 2.0**128).sum()
        for alpha in profile.alphas[1::3]:
            assert profile.selected(alpha) == (ratio > alpha).sum(), alpha
            assert profile.bounds(alpha) == ((ratio > alpha).sum(),) * 2
        for alpha in (0.3, 1.7, 1234.5, 1e-20):
            low, high = profile.bounds(alpha)
            assert low <= (ratio > alpha).sum() <= high
            assert low <= profile.selected(alpha) <= high
            assert profile.share(alpha) == profile.selected(alpha) / profile.numel


def test_dampening_selects_what_the_profile_says(backend):
    problem = build(Case("dry", DIAMOND, ("a", "b"), shapes=TILES), backend.device)
    plan = problem.plan(backend.name)
    profiles = plan.profile()
    for alpha in profiles["b"].alphas[1000:1060:9]:
        plan.set_values_(alpha=float(alpha))
        report = plan.run_(dry_run=True)
        for node, profile in profiles.items():
            ratio, _ = brute_force(problem, node)
            near = (abs(ratio / alpha - 1) < 1e-6).sum()  # rounding may put these on the other side
            assert abs(report[node].selected - profile.selected(alpha)) <= near


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_alpha_of_a_share_is_the_smallest_edge_that_selects_no_more(backend, case):
    problem = build(case, backend.device)
    for profile in problem.plan(backend.name).profile().values():
        edges = profile.alphas
        for share in (0.0, 0.01, 0.1, 0.5, 1.0):
            alpha = profile.alpha(share)
            at = int(np.flatnonzero(edges == alpha)[0]) if alpha else 0
            if alpha < edges[-1]:
                assert profile.share(alpha) <= share or at == 0
            if at > 1:
                assert profile.bounds(edges[at - 1])[0] / profile.numel > share


def test_norm_removed_is_that_of_dampening(backend):
    for signed in (False, True):
        check_norm(backend, build(Case("norm", DIAMOND, ("a", "b"), shapes=TILES, signed=signed), backend.device))


def check_norm(backend, problem):
    plan = problem.plan(backend.name)
    profiles = plan.profile(norms=True)
    before = {node: brute_force(problem, node)[1] for node in plan.nodes}
    for alpha, lam in ((profiles["a"].alpha(0.1), 1.0), (profiles["a"].alpha(0.4), 0.1)):
        plan.set_values_(alpha=alpha, lam=lam)
        report = plan.run_(undo=True)
        for node, profile in profiles.items():
            after = brute_force(problem, node)[1]
            expected = np.linalg.norm(after - before[node]) / np.linalg.norm(before[node])
            assert profile.removed(alpha, lam=lam) == pytest.approx(expected, rel=0.03)
        report.undo_()


def test_one_model():
    model = {"w": torch.tensor([1.0, 2.0, 2.0, 4.0])}
    i = ff.Fisher.from_dict({"w": torch.tensor([1.0, 1.0, 0.0, 0.0])})
    f = ff.Fisher.from_dict({"w": torch.tensor([4.0, 0.5, 3.0, 0.0])})
    profile = ff.selection_profile(i, f)
    assert (profile.numel, profile.always, profile.never, profile.counts.sum()) == (4, 1, 1, 2)
    below_4 = float(np.nextafter(np.float32(4), np.float32(0)))
    assert [profile.selected(alpha) for alpha in (below_4, 0.1, 100)] == [2, 3, 1]
    assert profile.bounds(4.0) == (1, 2)
    with pytest.raises(ff.ArgumentError, match="without a model"):
        profile.removed(1.0)
    removed = ff.selection_profile(i, f, model).removed(1.0, lam=0.0)
    assert removed == pytest.approx(((1 + 4) / 25) ** 0.5)  # I = 0 < F goes to 0; so does m / I = 4, lambda being 0


def test_nothing_to_select():
    zeros, ones = ff.Fisher.from_dict({"w": torch.zeros(3)}), ff.Fisher.from_dict({"w": torch.ones(3)})
    assert ff.selection_profile(ones, zeros).selected(0.0) == 0
    assert ff.selection_profile(zeros, zeros).never == 3
    assert ff.selection_profile(zeros, ones).share(1e30) == 1
    assert ff.selection_profile(zeros, ones).alpha(0.5) == np.finfo(np.float32).max
    assert "3 elements" in str(ff.selection_profile(zeros, ones))


def test_it_is_shown():
    generator = torch.Generator().manual_seed(0)
    i, f = (ff.Fisher.from_dict({"w": torch.rand(1000, generator=generator) ** 4}) for _ in range(2))
    profile = ff.selection_profile(i, f)
    lines = str(profile).splitlines()
    assert lines[0].startswith("1,000 elements")
    octaves = [line.split() for line in lines[3:]]
    assert sum(int(row[1]) for row in octaves) == 1000
    assert [int(row[0]) for row in octaves] == sorted((int(row[0]) for row in octaves), reverse=True)
    assert octaves[-1][2] == "100.00%"
    assert max(len(row[3]) for row in octaves if len(row) > 3) == 60
    axes = profile.plot(alpha=2.0)
    assert sum(patch.get_height() for patch in axes.patches) == 1000
    plan = build(Case("shown", DIAMOND, ("a",))).plan("reference")
    assert len(str(plan.profile()).splitlines()) == 2 + 4
    with pytest.raises(ff.DagError, match="apart"):
        plan.profile()["apart"]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", None])
def test_bad_numbers_are_refused(value):
    fisher = ff.Fisher.from_dict({"w": torch.rand(4)})
    profile = ff.selection_profile(fisher, fisher, {"w": torch.rand(4)})
    for ask in (profile.selected, profile.bounds, profile.share, profile.alpha, profile.removed):
        with pytest.raises(ff.ArgumentError, match=r"alpha|share"):
            ask(value)
    with pytest.raises(ff.ArgumentError, match="share"):
        profile.alpha(1.5)


def test_what_does_not_fit_is_refused():
    fisher, other = ff.Fisher.from_dict({"w": torch.rand(4)}), ff.Fisher.from_dict({"v": torch.rand(4)})
    with pytest.raises(ff.LayoutError, match=r"v \[4\] only in forget"):
        ff.selection_profile(fisher, other)
    with pytest.raises(ff.LayoutError, match=r"v \[4\] only in forget"):
        ff.selection_profile(fisher, other, {"w": torch.rand(4)})
