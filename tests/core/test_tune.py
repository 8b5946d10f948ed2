"""Choosing alpha and lambda: the best of the grid, each selection once, and models as before."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import FAN, SIZES, Case, build
from torch import nn

import fiun_fast as ff
from fiun_fast.bench.baselines import unlearn_named
from fiun_fast.tuning import default_grids

pytestmark = pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")  # test_tuned.py has what they say


def family(seed: int = 0) -> tuple[ff.InheritanceDAG, list[ff.ForgetRequest], dict[str, nn.Module]]:
    """a -> b, a -> c, and d apart; a request at a, one at b."""
    generator = torch.Generator().manual_seed(seed)
    dag, models = ff.InheritanceDAG(), {}

    def fisher(model: nn.Module) -> ff.Fisher:
        layout = ff.Layout.from_module(model)
        return ff.Fisher(torch.rand(layout.numel, generator=generator) ** 3, layout)

    for name, parents in {"a": (), "b": ("a",), "c": ("a",), "d": ()}.items():
        torch.manual_seed(seed + ord(name))
        models[name] = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        dag.add_model(name, models[name], fisher(models[name]), parents=parents)
    return dag, [ff.ForgetRequest("a", fisher(models["a"])), ff.ForgetRequest("b", fisher(models["b"]))], models


def bits(models: dict[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}


def same(a, b) -> bool:
    return all(torch.equal(t, b[n][k]) for n, state in a.items() for k, t in state.items())


def weight_score(name: str, model: nn.Module) -> float:
    """Best where the weights' norm is near a number of each node's own."""
    norm = sum(float(p.detach().double().square().sum()) for p in model.parameters())
    return -abs(norm - {"a": 7.0, "b": 9.0, "c": 8.0}[name])


def test_the_best_of_the_grid_wins(backend):
    problem = build(Case("tune", FAN, ("root",), shapes=SIZES), backend.device)
    dag = ff.InheritanceDAG()
    for node, parents in problem.case.parents.items():
        dag.add_model(node, problem.models[node], problem.originals[node], parents=parents)
    requests = [ff.ForgetRequest("root", problem.forgets[0])]
    alphas, lams = [4.0, 0.3, 1.0, 30.0], [0.0, 1.0]

    def score(name: str, model) -> float:
        flat = torch.cat([t.reshape(-1).double().cpu() for t in model.values()])
        return float((flat * torch.arange(1, len(flat) + 1)).sin().sum())  # anything that every element changes

    before = problem.state()
    chosen = ff.tune(dag, requests, score, alphas=alphas, lams=lams, backend=backend.name)
    assert all(torch.equal(t, before[key]) for key, t in problem.state().items())
    best: dict[str, list] = {name: [(score(name, model), None, None)] for name, model in problem.models.items()}
    for lam in lams:
        for alpha in sorted(alphas, reverse=True):
            for name, fisher in problem.originals.items():
                model = {k: t.clone() for k, t in problem.models[name].items()}
                ff.dampen_(model, fisher, problem.forgets[0], alpha=alpha, lam=lam, backend="reference")
                best[name].append((score(name, model), alpha, lam))
    for name, tried in best.items():
        assert chosen[name].score == pytest.approx(max(s for s, *_ in tried), rel=1e-12), name
        alone = (chosen.points[name][0].alpha, 1.0)
        pairs = [alone if a is None else (a, lam) for s, a, lam in tried if s == chosen[name].score]
        assert (chosen[name].alpha, chosen[name].lam) in pairs


def test_models_of_modules_are_as_before_and_the_choice_can_be_applied():
    dag, requests, models = family()
    before = bits(models)
    chosen = ff.tune(dag, requests, weight_score)
    assert same(bits(models), before)
    assert set(chosen) == {"a", "b", "c"}
    plan = ff.plan(dag, requests)
    plan.set_values_(chosen)
    plan.run_()
    for name, choice in chosen.items():
        assert weight_score(name, models[name]) == choice.score
    assert torch.equal(models["d"][0].weight, before["d"]["0.weight"])


def test_equal_selections_are_scored_once():
    dag, requests, _ = family()
    seen: dict[str, list] = {"a": [], "b": [], "c": []}

    def score(name: str, model: nn.Module) -> float:
        seen[name].append(tuple(t.item() for p in model.parameters() for t in p.detach().view(-1)))
        return 0.0

    ff.tune(dag, requests, score, alphas=[1.0, 1.0000001, 1.0, 1e30, 1e31, 0.5], lams=[0.5, 0.1])
    for name, states in seen.items():
        assert len(states) == len(set(states)) == 5, name  # two selections with two lambdas, and the empty one once


def test_the_first_of_equal_scores_wins():
    dag, requests, models = family()
    before = bits(models)

    def changed(name: str, model: nn.Module) -> float:
        return float(not same({name: model.state_dict()}, before))

    grid = {"alphas": [0.1, 0.3, 0.2], "lams": [0.1, 1.0]}
    chosen = ff.tune(dag, requests, changed, **grid)
    assert {(c.alpha, c.lam) for c in chosen.values()} == {(0.3, 0.1)}
    chosen = ff.tune(dag, requests, lambda name, model: 1.0, **grid)
    assert all(choice.alpha == chosen.points[name][0].alpha for name, choice in chosen.items()), "left alone"


@pytest.mark.parametrize("at", [1, 2, 7])
def test_models_are_as_before_when_evaluate_raises(at):
    dag, requests, models = family()
    before, calls = bits(models), []

    def score(name: str, model: nn.Module) -> float:
        calls.append(name)
        if len(calls) == at:
            raise KeyError("mine")
        return 1.0

    with pytest.raises(KeyError, match="mine"):
        ff.tune(dag, requests, score, alphas=[2.0, 1.0, 0.1])
    assert same(bits(models), before)
    calls.clear()
    with pytest.raises(KeyError, match="mine"):
        ff.search_alpha(dag, requests, score)
    assert same(bits(models), before)


@pytest.mark.parametrize("score", [float("nan"), None, "good", torch.ones(2)])
def test_a_score_that_compares_with_nothing_is_refused(score):
    dag, requests, models = family()
    before = bits(models)
    with pytest.raises(ff.ArgumentError, match="evaluate"):
        ff.tune(dag, requests, lambda name, model: score)
    with pytest.raises(ff.ArgumentError, match="evaluate"):
        ff.search_alpha(dag, requests, lambda name, model: score)
    assert same(bits(models), before)


def test_the_default_grid_goes_from_one_element_to_most():
    dag, requests, _ = family()
    zeros: dict[str, set[int]] = {"a": set(), "b": set(), "c": set()}

    def score(name: str, model: nn.Module) -> float:
        zeros[name].add(sum(int((p == 0).sum()) for n, p in model.named_parameters() if n != "1.bias"))
        return 0.0

    ff.tune(dag, requests, score, lams=[0.0], points=12)
    for found in zeros.values():
        assert min(found) <= 1
        assert 0.6 * 58 < max(found) < 0.8 * 58
        assert len(found) >= 8


def test_the_default_grid_is_made_of_the_nodes_own_ratios(backend):
    problem = build(Case("grid", {"a": (), "b": ("a",)}, shapes=SIZES, seed=3), backend.device)
    for fisher in problem.originals.values():
        fisher.buffer[::5] = 0
    problem.forgets[0].buffer[::3] = 0
    plan = problem.plan(backend.name)
    for node, grid in default_grids(plan, 9).items():
        ratio = (problem.forgets[0].buffer / problem.originals[node].buffer).cpu()
        ratio = ratio[ratio.isfinite() & (ratio > 0)].sort(descending=True).values
        places = [int(share * len(ratio) + 1e-9) for share in np.logspace(-np.log10(len(ratio)), np.log10(0.7), 9)]
        assert grid == [float(ratio[place]) for place in places], node


def test_ratios_that_are_all_alike_still_make_a_grid():
    """All within one bin of the profile: only exact alphas tell them apart."""
    original = ff.Fisher.from_dict({"w": torch.ones(200)})
    forget = ff.Fisher.from_dict({"w": 1.01 + 0.0001 * torch.rand(200)})
    dag = ff.InheritanceDAG()
    dag.add_model("a", {"w": torch.ones(200)}, original)
    seen = set()

    def score(name: str, model) -> float:
        seen.add(int((model["w"] == 0).sum()))
        return 0.0

    ff.tune(dag, [ff.ForgetRequest("a", forget)], score, lams=[0.0], points=12)
    assert len(seen) >= 10
    assert {1, 140} <= seen


def test_nothing_to_select_leaves_one_point():
    dag = ff.InheritanceDAG()
    dag.add_model("a", {"w": torch.ones(3)}, ff.Fisher.from_dict({"w": torch.ones(3)}))
    calls = []
    request = ff.ForgetRequest("a", ff.Fisher.from_dict({"w": torch.zeros(3)}))
    chosen = ff.tune(dag, [request], lambda *given: calls.append(given) or 1)
    assert len(calls) == 1
    assert chosen["a"] == ff.Choice(1.0, 1.0, 1.0)


def test_grids_may_differ_from_node_to_node():
    dag, requests, _ = family()
    grids = {"a": [5.0], "b": [0.1, 0.2], "c": (1.0,), "d": [7.0]}
    chosen = ff.tune(dag, requests, weight_score, alphas=grids, lams=[0.3])
    tried = {name: {point.alpha for point in points if point.selected} for name, points in chosen.points.items()}
    assert tried["a"] <= {5.0} and tried["b"] == {0.1, 0.2} and tried["c"] == {1.0}
    with pytest.raises(ff.ArgumentError, match="no grid for node 'b'"):
        ff.tune(dag, requests, weight_score, alphas={"a": [1.0]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": []}, "alphas is empty"),
        ({"alphas": [1.0, -1.0]}, r"alphas\[1\] is -1"),
        ({"alphas": "10"}, "alphas is a str"),
        ({"alphas": {"a": [], "b": [1], "c": [1]}}, r"alphas\['a'\] is empty"),
        ({"lams": [float("inf")]}, r"lams\[0\] is inf"),
        ({"lams": ()}, "lams is empty"),
        ({"points": 0}, "points is 0"),
        ({"points": 1.5}, "points is 1.5"),
        ({"merge": "min"}, "merge is 'min'"),
    ],
)
def test_bad_grids_are_refused(options, message):
    dag, requests, models = family()
    before = bits(models)
    with pytest.raises(ff.ArgumentError, match=message):
        ff.tune(dag, requests, weight_score, **options)
    assert same(bits(models), before)


def test_search_lowers_the_percentile_until_the_accuracy_has_fallen():
    problem = build(Case("search", FAN, ("root",), shapes=SIZES))
    dag = ff.InheritanceDAG()
    for node, parents in problem.case.parents.items():
        dag.add_model(node, problem.models[node], problem.originals[node], parents=parents)
    requests = [ff.ForgetRequest("root", problem.forgets[0])]
    start = problem.state()

    def accuracy(name: str, model) -> float:  # the share of elements that are as at the start
        kept = [(t.cpu() == start[name, key]).reshape(-1) for key, t in model.items()]
        return float(torch.cat(kept).double().mean())

    found = ff.search_alpha(dag, requests, accuracy, rho=0.8, start=98.0, step=2.0)
    assert all(torch.equal(t, start[key]) for key, t in problem.state().items())
    for name, choice in found.items():
        ratio = (problem.forgets[0].buffer / problem.originals[name].buffer).double().cpu().numpy()
        percentiles = [98.0 - 2 * k for k in range(50)]
        for q in percentiles:
            alpha = np.percentile(ratio, q)
            unchanged = 1 - (ratio > alpha).mean()
            if unchanged < 0.8:
                break
        assert choice.alpha == pytest.approx(alpha, rel=1e-9), name
        assert choice.score == pytest.approx(unchanged, abs=2 / len(ratio))


def test_a_node_that_knows_nothing_is_left_alone():
    dag, requests, models = family()
    calls: list[str] = []
    found = ff.search_alpha(dag, requests, lambda name, model: calls.append(name) or 0.0, start=99.0)
    assert sorted(calls) == sorted(found)
    assert found.doubts == {}
    plan, before = ff.plan(dag, requests), bits(models)
    plan.set_values_(found)
    assert plan.run_().selected == 0
    assert same(bits(models), before)
    with pytest.raises(ff.ArgumentError, match=r"evaluate\('\w+', …\) gave -0.5, expected an accuracy, 0 or more"):
        ff.search_alpha(dag, requests, lambda name, model: -0.5)


@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")
def test_an_accuracy_that_rises_on_the_way():
    """Each node stops where its accuracy is below the goal for the first time, and one that never is says so."""
    dag, requests, _ = family()
    names = ff.plan(dag, requests).nodes
    courses = {
        names[0]: [0.9, 0.95, 1.0, 0.5, 0.1, 0.9, 0.0],
        names[1]: [0.9, 0.2, 0.1, 0.9, 0.9, 0.9, 0.9],
        names[2]: [0.9, 0.3, 0.25, 0.2, 0.19, 0.6, 0.7],
    }
    scores = {name: iter(course) for name, course in courses.items()}
    found = ff.search_alpha(dag, requests, lambda name, model: next(scores[name]), start=50.0, step=10.0, rho=0.2)
    assert {name: len(points) for name, points in found.points.items()} == dict(zip(names, (5, 3, 7)))
    assert [found[name].score for name in names] == [0.1, 0.1, 0.7]
    q = np.array([[50.0 - 10 * (len(found.points[name]) - 2) for name in names]]).reshape(-1)
    alphas = ff.plan(dag, requests).ratios().percentiles(q).tolist()
    assert [found[name].alpha for name in names] == pytest.approx(alphas)
    assert found.doubts.keys() == {names[2]}
    assert "the search failed: 0.7 is left at the lowest percentile, wanted less than 0.18" in found.doubts[names[2]]


def test_search_that_never_gets_there_ends_at_the_lowest_percentile():
    dag, requests, _ = family()
    found = ff.search_alpha(dag, requests, lambda name, model: 1.0, start=10.0, step=5.0)
    plan = ff.plan(dag, requests)
    assert {name: c.alpha for name, c in found.items()} == pytest.approx(
        dict(zip(plan.nodes, plan.ratios().percentiles(torch.zeros(3).numpy()).tolist()))
    )


@pytest.mark.parametrize("call", [ff.tune, ff.search_alpha])
@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (3, r"evaluate is a int, expected a function, called as evaluate\(name, model\)"),
        (nn.Linear, "evaluate is the class Linear"),
        (lambda model: 1.0, r"evaluate takes \(model\) and is called as evaluate\(name, model\): too many"),
        (lambda name, model, loader: 1.0, "evaluate takes .* missing a required argument: 'loader'"),
        (lambda *, name, model: 1.0, "evaluate takes"),
    ],
)
def test_an_evaluate_that_cannot_be_called_is_refused(call, evaluate, message):
    dag, requests, models = family()
    before = bits(models)
    with pytest.raises(ff.ArgumentError, match=message):
        call(dag, requests, evaluate)
    assert same(bits(models), before)


@pytest.mark.parametrize("options", [{"rho": 0}, {"rho": 1.1}, {"start": 101}, {"step": 0}, {"step": -1}, {"lam": -1}])
def test_a_bad_search_is_refused(options):
    dag, requests, _ = family()
    with pytest.raises(ff.ArgumentError, match=next(iter(options))):
        ff.search_alpha(dag, requests, weight_score, **options)


def test_the_textbook_does_the_same_with_the_choice():
    dag, requests, models = family()
    chosen = ff.tune(dag, requests[:1], weight_score)
    slow = {name: copy.deepcopy(models[name]) for name in chosen}
    unlearn_named(
        slow,
        {name: dag[name].fisher.as_dict() for name in chosen},
        {name: [requests[0].fisher.as_dict()] for name in chosen},
        {name: choice.alpha for name, choice in chosen.items()},
        {name: choice.lam for name, choice in chosen.items()},
    )
    for name, choice in chosen.items():
        assert weight_score(name, slow[name]) == choice.score
