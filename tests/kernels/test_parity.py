"""Every backend against the textbook, over the case table and over random values."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest
import torch
from cases import CASES, DTYPES, EDGES, Case, Expected, Problem, build, textbook
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fiun_fast.kernels.table import Merging

# Where the bit contract does not hold: merging K <= 4 Fishers rounds 2K times, the chain 4 times; a power also rounds
# its exponent, which the logarithm of the factor (at most 88 in fp32) multiplies. Half precision is rounded once more,
# and may fall on the other side.
ULPS = 64
HALF_ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def tolerance(*dtypes: torch.dtype) -> float:
    """Relative, for a result of these dtypes: parameter and Fisher."""
    return max(HALF_ULP.get(dtype, ULPS * torch.finfo(dtype).eps) for dtype in dtypes)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, except that any NaN is as good as another."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


def check(problem: Problem, expected: Expected, report, exact: bool) -> None:
    state = problem.state()
    loose = dict.fromkeys(expected.counts, 0)  # elements whose selection rounding decides
    for key, value in expected.values.items():
        found = state[key]
        if exact:
            assert same_bits(found, value), (key, found, value)
            continue
        sure = ~expected.band[key] if key in expected.band else torch.ones_like(value, dtype=torch.bool)
        if key in expected.band:
            loose[key[0]] += int((~sure).sum())
        limits = {"rtol": tolerance(value.dtype, problem.case.fisher), "atol": torch.finfo(value.dtype).tiny}
        torch.testing.assert_close(found[sure], value[sure], equal_nan=True, **limits)
    for node, counts in expected.counts.items():
        found = (report[node].selected, report[node].zeroed, report[node].nonfinite)
        if exact:
            assert found == counts, node
        else:
            assert abs(found[0] - counts[0]) <= loose[node], node
            assert found[2] == counts[2], node


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_case_is_as_in_the_textbook(backend, case):
    problem = build(case, backend.device)
    expected, before = textbook(problem), problem.state()
    fishers = [f.buffer.clone() for f in problem.vectors()]
    plan = problem.plan(backend.name)
    counted = plan.run_(dry_run=True).to_dict()["nodes"]
    assert all(same_bits(t, before[key]) for key, t in problem.state().items()), "a dry run wrote"
    report = plan.run_()
    assert report.to_dict()["nodes"] == counted
    check(problem, expected, report, case.exact)
    after = [f.buffer for f in problem.vectors()]
    assert all(map(same_bits, fishers, after)), "a Fisher or gradient was changed"


def test_infinite_weights_become_nan_where_the_original_fisher_is_zero(backend):
    """As in the textbook: the factor is 0, and inf * 0 is NaN. They count as selected, and not as zeroed."""
    for case in CASES:
        if case.values == "infinite":
            problem = build(case, backend.device)
            report = problem.plan(backend.name).run_()
            assert all(t.isnan().all() for t in problem.state().values())
            assert (report.selected, report.zeroed) == (sum(t.numel() for t in problem.state().values()), 0)


@pytest.mark.parametrize("case", [c for c in CASES if not c.exact and c.values == "random"], ids=lambda case: case.id)
def test_sums_and_powers_are_close_to_the_float64_truth(backend, case):
    problem = build(case, backend.device, seed=1)
    expected = textbook(problem, torch.float64)
    check(problem, expected, problem.plan(backend.name).run_(), False)


@pytest.mark.parametrize("id_", ["diamond-two-origins", "two-roots"])
def test_the_order_in_which_models_are_added_does_not_matter(backend, id_):
    case = next(c for c in CASES if c.id == id_)
    graph = nx.DiGraph([(p, n) for n, parents in case.parents.items() for p in parents])
    graph.add_nodes_from(case.parents)
    results = []
    for order in itertools.islice(nx.all_topological_sorts(graph), 6):
        problem = build(case, backend.device)
        problem.plan(backend.name, order).run_()
        results.append(problem.state())
    assert len(results) > 1
    assert all(same_bits(t, results[0][key]) for state in results[1:] for key, t in state.items())


def test_a_plan_runs_again(backend):
    problem = build(Case("again", {"a": (), "b": ("a",)}, lam=0.9), backend.device)
    plan = problem.plan(backend.name)
    for _ in range(3):
        expected = textbook(problem)
        check(problem, expected, plan.run_(), True)


# ---- random values and DAGs ------------------------------------------------------------------------------------------

fisher_values = st.one_of(st.sampled_from(EDGES), st.floats(0, 2.0**127, width=32))
theta_values = st.one_of(st.sampled_from([0.0, -0.0]), st.floats(width=32))
numbers = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(0, 1e6, width=32))


@st.composite
def problems(draw) -> Problem:
    count = draw(st.integers(1, 6))
    names = [f"n{i}" for i in range(count)]
    parents = {n: tuple(p for p in names[:i] if draw(st.booleans())) for i, n in enumerate(names)}
    origins = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=4)))
    case = Case(
        "random",
        parents,
        origins,
        shapes={f"p{i}": (n,) for i, n in enumerate(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))},
        theta=draw(st.sampled_from(DTYPES)),
        fisher=draw(st.sampled_from([torch.float32, torch.float64])),
        alpha=draw(numbers),
        lam=draw(numbers),
        cap=draw(numbers),
        weights=tuple(draw(numbers) for _ in origins),
        scale=draw(numbers),
        signed=draw(st.booleans()),
        flat=draw(st.booleans()),
        shift=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**31)),
    )
    problem = build(case)
    for fisher in (*problem.originals.values(), *problem.forgets):
        _scatter(draw(st.lists(fisher_values, max_size=12)), fisher.buffer, case.seed)
    for gradient in filter(None, problem.gradients):
        _scatter(draw(st.lists(theta_values, max_size=12)), gradient.buffer, case.seed)
    for i, tensor in enumerate(t for model in problem.models.values() for t in model.values()):
        _scatter(draw(st.lists(theta_values, max_size=3)), tensor, case.seed + i)
    return problem


def _scatter(values: list[float], into: torch.Tensor, seed: int) -> None:
    at = torch.randint(into.numel(), (len(values),), generator=torch.Generator().manual_seed(seed))
    for index, value in zip(at.tolist(), values, strict=True):
        into[index] = value


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_random_problems_are_as_in_the_textbook(backend, problem):
    before = {node: {k: t.clone() for k, t in model.items()} for node, model in problem.models.items()}
    expected = textbook(problem)
    moved = Problem(
        problem.case,
        {node: {k: t.to(backend.device) for k, t in model.items()} for node, model in before.items()},
        {node: fisher.to(backend.device) for node, fisher in problem.originals.items()},
        [fisher.to(backend.device) for fisher in problem.forgets],
        [None if g is None else g.to(backend.device) for g in problem.gradients],
    )
    if backend.device == "cpu":
        moved = problem  # keeps the memory layout that was drawn
    check(moved, expected, moved.plan(backend.name).run_(), problem.case.exact)


# ---- merge and accumulate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["max", "mean", "sum"])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_merge(backend, how, count, dtype):
    generator = torch.Generator().manual_seed(count)
    edges = torch.tensor(EDGES, dtype=torch.float64)
    for n in (0, 1, 17, 5003, 300_007 if count == 3 else 64):
        sources = [
            edges[torch.randint(len(edges), (n,), generator=generator)].to(backend.device, dtype) for _ in range(count)
        ]
        kept = [s.clone() for s in sources]
        weights = [1.0, 0.5, 0.0, 3.0, 1.0, 1.0, 1e-3, 2.0, 1.0][:count]
        for scale in (1.0, 0.37):
            out = torch.full((n,), -1.0, dtype=dtype, device=backend.device)
            backend.kernels.merge(sources, weights, Merging(how, scale), out)
            terms = torch.stack([s * w for s, w in zip(sources, weights, strict=True)])
            if how == "max":
                expected = torch.where(terms.isnan().any(0), torch.nan, terms.amax(0))
            else:
                expected = terms[0].clone()
                for term in terms[1:]:
                    expected += term
                expected = expected / count if how == "mean" else expected
            expected = expected * scale if scale != 1 else expected
            if how == "max":
                assert same_bits(out, expected)
            else:
                torch.testing.assert_close(out, expected, rtol=tolerance(dtype), atol=0, equal_nan=True)
            assert all(map(same_bits, sources, kept))


@pytest.mark.parametrize("into_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [1, 2])
def test_accumulate(backend, power, dtype, into_dtype):
    generator = torch.Generator().manual_seed(7)
    shapes = [(), (0,), (1,), (17, 3), (64,), (1009,), *[(5,)] * 40, (300, 211)]
    gradients = [torch.randn(shape, generator=generator).to(backend.device, dtype) for shape in shapes]
    gradients.append(torch.randn(8, 6, generator=generator).to(backend.device, dtype).t())  # not contiguous
    gradients[3][0] = torch.tensor([float("inf"), float("nan"), -0.0])
    for zero in (False, True):
        into = [torch.rand(g.numel(), generator=generator).to(backend.device, into_dtype) for g in gradients]
        expected = []
        for g, total in zip(gradients, into, strict=True):
            flat = g.reshape(-1).to(into_dtype)
            expected.append(total + (flat.abs() if power == 1 else flat * flat))
        kept = [g.clone() for g in gradients]
        backend.kernels.accumulate(gradients, into, power, zero)
        for total, wanted in zip(into, expected, strict=True):
            torch.testing.assert_close(total, wanted, rtol=4 * torch.finfo(into_dtype).eps, atol=0, equal_nan=True)
        for g, before in zip(gradients, kept, strict=True):
            assert torch.equal(g, torch.zeros_like(g)) if zero else same_bits(g.contiguous(), before.contiguous())
