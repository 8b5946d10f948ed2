"""Histograms of m / I and adaptive alpha, against numpy on the same ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, FAN, SIZES, TILES, Case, Problem, build, merge_textbook, reaches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fiun_fast as ff
from fiun_fast.demo.data import batches, load_digits
from fiun_fast.demo.networks import grow, transfer
from fiun_fast.kernels import available_backends
from fiun_fast.kernels.schedule import cut_runs
from fiun_fast.kernels.table import BINS
from fiun_fast.ratios import adaptive_percentile


def matters(case: Case) -> tuple:
    """What a histogram depends on; of cases that agree in it, one is enough."""
    shapes, parents = tuple(case.shapes.items()), tuple(case.parents.items())
    values = case.values if case.values == "edges" else "random"
    signs = case.signed and case.theta  # theta is read for its sign alone
    return (parents, case.origins, case.weights, shapes, case.fisher, case.scale, values, case.flat, case.shift, signs)


EXACT = list({matters(case): case for case in CASES if case.exact}.values())
FEW = [case for case in EXACT if (case.values == "edges" and len(case.parents) == 5) or case.weights]


def ratios(problem: Problem, node: str) -> np.ndarray:
    """R before anything is left out but by sign: m / I of the elements of a node, in the Fishers' dtype; else NaN."""
    case = problem.case
    mine = [k for k, origin in enumerate(case.origins) if reaches(case.parents, origin, node)]
    weights = case.weights or (1.0,) * len(case.origins)
    fishers = [problem.forgets[k].buffer.cpu() for k in mine]
    merged = merge_textbook(fishers, [weights[k] for k in mine], case.merge, case.scale)
    with np.errstate(all="ignore"):
        found = merged.numpy() / problem.originals[node].buffer.cpu().numpy()
    if case.signed:
        found[~opposed(problem, node, mine).cpu().numpy()] = np.nan
    return found


def opposed(problem: Problem, node: str, mine: list[int]) -> torch.Tensor:
    """Where the sum of the gradients and the parameter have opposite signs, [n] bool."""
    weights = problem.case.weights or (1.0,) * len(problem.case.origins)
    slope = merge_textbook([problem.gradients[k].buffer for k in mine], [weights[k] for k in mine], "sum", 1.0)
    theta = torch.cat([t.reshape(-1).double() for t in problem.models[node].values()])
    return slope.sign() * theta.sign() == -1


def bins_of(found: np.ndarray, base: int, low: int, nearest: bool) -> np.ndarray:
    """Counts [BINS], the obvious way."""
    found = np.abs(found[~np.isnan(found)])
    at = (found.view({4: np.uint32, 8: np.uint64}[found.itemsize]) >> low).astype(np.int64) - base
    at = at.clip(0, BINS - 1) if nearest else at[(at >= 0) & (at < BINS)]
    return np.bincount(at, minlength=BINS)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.id)
def test_every_case_is_counted_as_one_ratio_after_another(backend, case):
    problem = build(case, backend.device)
    plan = problem.plan(backend.name)
    wide = case.fisher == torch.float64
    found = {node: ratios(problem, node) for node in plan.nodes}
    sample = {node: np.abs(r[np.isfinite(r)]) for node, r in found.items()}
    middle = {n: (np.sort(r)[len(r) // 2] if len(r) else np.ones(1, r.dtype)[0]) for n, r in sample.items()}
    bits = {node: int(value.view(np.uint64 if wide else np.uint32)) for node, value in middle.items()}
    before = problem.state()
    first, second = (52, 41) if wide else (20, 9)
    for low, shift, nearest in ((first, 99, False), (second, first, False), (49, 99, True)):
        if nearest and not wide:
            low = first
        base = {node: bits[node] >> shift << (shift - low) if shift < 99 else 0 for node in plan.nodes}
        if nearest:
            base = dict.fromkeys(base, 896 * 8 if wide else 1000)
        bases = np.array([base[node] for node in plan.nodes])
        counted = plan.ratios().count(case.fisher, bases, low, nearest)
        for node, row in zip(plan.nodes, counted, strict=True):
            expected = bins_of(found[node], base[node], low, nearest)
            assert (row == expected).all(), (node, low, np.flatnonzero(row != expected))
    for key, tensor in problem.state().items():
        pair = (t.reshape(-1).contiguous().cpu().view(torch.uint8) for t in (tensor, before[key]))
        assert torch.equal(*pair), "a histogram wrote"


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
def test_auto_is_numpys_percentile_at_every_node(backend, case):
    problem = build(case, backend.device)
    dag, requests = network(problem)
    shares = dict(zip(dag, (0.1, 1.0, 1e-4, 0.37) * 9))
    expected = {}
    for node in dag.reached_by(requests):
        found = ratios(problem, node).astype(np.float64)
        found = found[np.isfinite(found)]
        expected[node] = np.percentile(found, adaptive_percentile(shares[node])) if len(found) else None
    numbers = {key: getattr(case, key) for key in ("lam", "exponent", "cap", "merge", "scale")}
    options = numbers | {"alpha": "auto", "backend": backend.name, "forget_fraction": shares}
    if None in expected.values():
        with pytest.raises(ff.ArgumentError, match="no finite ratio"):
            ff.plan(dag, requests, **options)
        return
    plan = ff.plan(dag, requests, **options)
    report = plan.run_(dry_run=True)
    for node, alpha in expected.items():
        assert report[node].alpha == pytest.approx(alpha, rel=2**-40, abs=0), node
    chosen = {node: report[node].alpha for node in expected}
    again = ff.plan(dag, requests, alpha=chosen, **numbers, backend=backend.name).run_(dry_run=True)
    assert report.to_dict() == again.to_dict(), "the launch did not get the alphas"


def network(problem: Problem) -> tuple[ff.InheritanceDAG, list[ff.ForgetRequest]]:
    case, dag = problem.case, ff.InheritanceDAG()
    for name, parents in case.parents.items():
        dag.add_model(name, problem.models[name], problem.originals[name], parents=parents)
    weights = case.weights or (1.0,) * len(case.origins)
    given = zip(case.origins, problem.forgets, weights, problem.gradients, strict=True)
    return dag, [ff.ForgetRequest(*each) for each in given]


values = st.one_of(
    st.sampled_from([0.0, 1e-45, 1e-38, 1.0, 3e38, np.inf, np.nan]), st.floats(0, 2.0**100, width=32), st.integers(1, 4)
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pairs=st.lists(st.tuples(values, values), min_size=1, max_size=60),
    share=st.floats(0, 1, exclude_min=True),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_adaptive_alpha_is_numpys_percentile(backend, pairs, share, dtype):
    original, forget = (torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True))
    with np.errstate(all="ignore"):
        found = (forget.numpy() / original.numpy()).astype(np.float64)
    found = found[np.isfinite(found)]
    layout = ff.Layout({"w": (len(pairs),)})
    i, f = (ff.Fisher(buffer.to(backend.device), layout) for buffer in (original, forget))
    if not len(found):
        with pytest.raises(ff.ArgumentError, match="no finite ratio"):
            ff.adaptive_alpha(i, f, forget_fraction=share, backend=backend.name)
        return
    expected = np.percentile(found, adaptive_percentile(share))
    alpha = ff.adaptive_alpha(i, f, forget_fraction=share, backend=backend.name)
    assert alpha == pytest.approx(expected, rel=2**-40, abs=0)


def test_many_ratios(backend):
    n = 3_000_017 if backend.name in ("cpu", "cuda") else 200_003
    generator = torch.Generator().manual_seed(5)
    original, forget = (torch.rand(n, generator=generator) ** 5 for _ in range(2))
    original[::3], forget[::4] = 0, 0
    found = (forget / original).double().numpy()
    found = found[np.isfinite(found)]
    layout = ff.Layout({"a": (n - 7,), "b": (7,)})
    i, f = (ff.Fisher(buffer.to(backend.device), layout) for buffer in (original, forget))
    for share in (1e-6, 0.01, 1.0):
        expected = np.percentile(found, adaptive_percentile(share))
        alpha = ff.adaptive_alpha(i, f, forget_fraction=share, backend=backend.name)
        assert abs(np.float32(alpha) - np.float32(expected)) <= np.spacing(np.float32(expected))


def test_real_fishers_of_the_demos_model(threads):
    threads(1)  # the model is too small to share
    digits = load_digits(0)
    recipe = transfer(digits, 0)
    model = grow(replace(recipe, steps=recipe.steps[:1]), effort=0.1)["source"]
    generator = torch.Generator().manual_seed(0)
    for label in (3, 8):
        own = digits.train.only([label])
        original = ff.estimate_fisher(model, batches(digits.train, 16, generator))
        forget = ff.estimate_fisher(model, batches(own, 16, generator))
        found = (forget.buffer / original.buffer).double().numpy()
        found = found[np.isfinite(found)]
        share = len(own.labels) / len(digits.train.labels)
        expected = np.percentile(found, 100 - np.log(1 + 100 * share))
        for name in available_backends("cpu"):
            if name != "triton":
                assert ff.adaptive_alpha(original, forget, forget_fraction=share, backend=name) == pytest.approx(
                    expected, rel=2**-40
                )


def test_threads_instruction_sets_and_splits_change_nothing(threads, monkeypatch):
    from fiun_fast.kernels import cpu

    if cpu.BACKEND.why_not("cpu"):
        pytest.skip(str(cpu.BACKEND.why_not("cpu")))
    problem = build(Case("threads", FAN, ("root", "child1"), shapes=TILES, weights=(1.0, 0.5)))
    plan = problem.plan("cpu")
    bases = np.zeros(len(plan.nodes), dtype=np.int64)
    expected = problem.plan("reference").ratios().count(torch.float32, bases, 20)
    assert expected.sum() == len(plan.nodes) * (211 * 197 + 211)
    for isa, usable in cpu.isas().items():
        if usable:
            monkeypatch.setenv(cpu.ISA_ENVIRONMENT, isa)
            for count in (1, 2, 5):
                threads(count)
                assert (plan.ratios().count(torch.float32, bases, 20) == expected).all(), (isa, count)


def test_a_node_with_parameters_of_two_dtypes_is_counted_whole(backend):
    model = {"a": torch.rand(40, device=backend.device), "b": torch.rand(9, device=backend.device).half()}
    layout = ff.Layout.from_tensors(model)
    i, f = (ff.Fisher(torch.rand(49).to(backend.device), layout) for _ in range(2))
    expected = np.percentile((f.buffer / i.buffer).cpu().double().numpy(), adaptive_percentile(0.2))
    report = ff.dampen_(model, i, f, alpha="auto", forget_fraction=0.2, backend=backend.name)
    assert report["model"].alpha == pytest.approx(expected, rel=1e-12)
    assert report.selected == int((f.buffer > i.buffer * report["model"].alpha).sum())


def test_several_forget_fishers_merge_on_the_fly_and_names_may_come_in_another_order(backend):
    values = [{name: torch.rand(shape).to(backend.device) for name, shape in SIZES.items()} for _ in range(3)]
    i, f = ff.Fisher.from_dict(values[0]), ff.Fisher.from_dict(values[1])
    turned = ff.Fisher.from_dict(dict(reversed(values[2].items())))
    straight = ff.Fisher.from_dict(values[2])
    expected = ff.adaptive_alpha(i, ff.merge_fishers([f, straight], scale=0.5), forget_fraction=0.3)
    assert ff.adaptive_alpha(i, [f, turned], forget_fraction=0.3, scale=0.5, backend=backend.name) == expected


def test_set_values_changes_the_next_run_and_its_report(backend):
    problem = build(Case("values", FAN, ("root",), shapes=SIZES), backend.device)
    plan = problem.plan(backend.name)
    before = plan.run_(dry_run=True)
    kept = before.to_dict()
    plan.set_values_(alpha={"child3": 0.25}, lam=0.5)
    report = plan.run_(dry_run=True)
    dag, requests = network(problem)
    alphas = {node: 0.25 if node == "child3" else 1.5 for node in dag}
    assert (
        report.to_dict()
        == ff.plan(dag, requests, alpha=alphas, lam=0.5, backend=backend.name).run_(dry_run=True).to_dict()
    )
    assert before.to_dict() == kept
    assert report["child3"].selected > before["child3"].selected
    with pytest.raises(ff.ArgumentError, match="nobody"):
        plan.set_values_(lam={"nobody": 1.0})
    with pytest.raises(ff.ArgumentError, match="alpha is -1"):
        plan.set_values_(alpha=-1.0, lam=3.0)
    assert plan.run_(dry_run=True).to_dict() == report.to_dict(), "a call that raised changed something"


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), float("inf"), "0.1", None, True])
def test_a_fraction_outside_0_1_is_refused(share):
    fisher = ff.Fisher.from_dict({"w": torch.rand(4)})
    with pytest.raises(ff.ArgumentError, match="forget_fraction"):
        ff.adaptive_alpha(fisher, fisher, forget_fraction=share)
    model = {"w": torch.ones(4)}
    with pytest.raises(ff.ArgumentError, match="forget_fraction"):
        ff.dampen_(model, fisher, fisher, alpha="auto", forget_fraction=share)
    assert torch.equal(model["w"], torch.ones(4))


def test_what_does_not_fit_is_refused():
    fisher = ff.Fisher.from_dict({"w": torch.rand(4), "b": torch.rand(2)})
    with pytest.raises(ff.LayoutError, match=r"b \[2\] only in original"):
        ff.adaptive_alpha(fisher, ff.Fisher.from_dict({"w": torch.rand(4)}), forget_fraction=0.1)
    with pytest.raises(ff.LayoutError, match=r"forget\[1\].*w is \[4\] in original and \[5\]"):
        ff.adaptive_alpha(
            fisher, [fisher, ff.Fisher.from_dict({"w": torch.rand(5), "b": torch.rand(2)})], forget_fraction=0.1
        )
    with pytest.raises(ff.DTypeError, match="float64"):
        ff.adaptive_alpha(fisher, fisher.to(dtype=torch.float64), forget_fraction=0.1)
    with pytest.raises(ff.ArgumentError, match="dict, expected a fiun_fast.Fisher"):
        ff.adaptive_alpha(fisher, [{"w": 1}], forget_fraction=0.1)
    with pytest.raises(ff.ArgumentError, match="no forget Fisher"):
        ff.adaptive_alpha(fisher, [], forget_fraction=0.1)
    with pytest.raises(ff.ArgumentError, match="merge is 'min'"):
        ff.adaptive_alpha(fisher, fisher, forget_fraction=0.1, merge="min")
    zeros = ff.Fisher.from_dict({"w": torch.zeros(4), "b": torch.zeros(2)})
    with pytest.raises(ff.ArgumentError, match="no finite ratio"):
        ff.adaptive_alpha(zeros, fisher, forget_fraction=0.1)


def test_auto_is_refused_where_it_makes_no_sense():
    fisher = ff.Fisher.from_dict({"w": torch.rand(4)})
    dag = ff.InheritanceDAG()
    dag.add_model("a", {"w": torch.ones(4)}, fisher)
    requests = [ff.ForgetRequest("a", fisher)]
    with pytest.raises(ff.ArgumentError, match='forget_fraction is for alpha="auto" only'):
        ff.plan(dag, requests, alpha=1.0, forget_fraction=0.1)
    with pytest.raises(ff.ArgumentError, match='"auto"'):
        ff.plan(dag, requests, alpha="automatic", forget_fraction=0.1)
    with pytest.raises(ff.ArgumentError, match="forget_fraction has no value for node 'a'"):
        ff.plan(dag, requests, alpha="auto", forget_fraction={})
    with pytest.raises(ff.ArgumentError, match=r"forget_fraction\['a'\]"):
        ff.plan(dag, requests, alpha="auto", forget_fraction={"a": 2.0})
    with pytest.raises(ff.ArgumentError, match="'b', which is no node"):
        ff.plan(dag, requests, alpha="auto", forget_fraction={"a": 0.5, "b": 0.5})


def test_runs_cover_every_tile_once_and_never_mix_slots():
    generator = np.random.default_rng(0)
    for _ in range(50):
        slots = np.sort(generator.integers(0, 6, generator.integers(0, 40)))
        runs = cut_runs(slots, int(generator.integers(1, 20)))
        assert runs[-1] == len(slots)
        assert len(slots) == 0 or runs[0] == 0
        for first, end in zip(runs[:-1], runs[1:], strict=True):
            assert first < end
            assert len(set(slots[first:end])) == 1


MACHINE_CODE = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import sass
from unittest import mock
from fiun_fast.kernels import triton_aot, triton_histogram, triton_kernels
fp32, int64 = torch.float32, torch.int64
arguments = (int64, int64, int64, int64, fp32, int64, fp32, int64, int64, 20, 1)
variant = triton_aot.Variant("histogram", arguments, triton_histogram.constants(fp32, "max"))
with mock.patch.object(triton_kernels, "histogram", triton_histogram.histogram, create=True):
    print(json.dumps(sass.figures(triton_aot.compile_variant(variant, "cuda:90"))))
"""


def test_the_triton_kernel_compiles_without_spills_for_a_gpu_that_is_not_here():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", MACHINE_CODE, str(Path(__file__).parents[1])]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    assert figures["local"] == figures["fences"] == figures["approximate"] == 0
    assert figures["div_rn"] > 0
    assert figures["load128"] >= 6  # two accesses a thread each of I, the first F and any further F
