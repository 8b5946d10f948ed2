"""Alpha and lambda by pattern: the bits of one plan a group, what patterns mean, how they change, and every refusal."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cases import CHAIN, FAN, SIZES, Case, build
from small import Tied
from torch import nn

import fiun_fast as ff

LAYERS = {"0.weight": 0.5, "0.*": 2.0, "*": 40.0}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))


def fisher_of(model: nn.Module, seed: int, params=None) -> ff.Fisher:
    layout = ff.Layout.from_module(model, params)
    generator = torch.Generator().manual_seed(seed)
    return ff.Fisher(torch.rand(layout.numel, generator=generator).square(), layout)


def chain() -> tuple[ff.InheritanceDAG, list[ff.ForgetRequest], dict[str, nn.Module]]:
    dag, models = ff.InheritanceDAG(), {name: net(k) for k, name in enumerate("abc")}
    for k, (name, model) in enumerate(models.items()):
        dag.add_model(name, model, fisher_of(model, k), parents=["abc"[k - 1]] if k else [])
    return dag, [ff.ForgetRequest("a", fisher_of(models["a"], 9))], models


def state(models: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": t.clone() for n, m in models.items() for k, t in m.state_dict().items()}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_bits_are_those_of_one_plan_a_group(backend):
    """Groups that overlap in nothing: each plan leaves all others alone, by Fishers over its own parameters only."""
    groups = {"0.weight": ["0.weight"], "0.*": ["0.bias"], "*": ["1.*", "2.*"]}
    lams = {"0.weight": 0.1, "0.*": 0.9, "*": 0.5}
    model, other = net(3).to(backend.device), net(3).to(backend.device)
    original, forget = (fisher_of(net(3), seed).to(backend.device) for seed in (1, 2))
    report = ff.dampen_(model, original, forget, alpha=LAYERS, lam=lams, backend=backend.name)
    selected = 0
    for pattern, params in groups.items():
        names = ff.Layout.from_module(other, params).names
        some = (ff.Fisher.from_dict({n: f.as_dict()[n] for n in names}) for f in (original, forget))
        numbers = {"alpha": LAYERS[pattern], "lam": lams[pattern], "backend": backend.name}
        selected += ff.dampen_(other, *some, **numbers).selected
    assert alike(model.state_dict(), other.state_dict())
    assert report.selected == selected > 0
    assert (report["model"].alpha, report["model"].lam) == (LAYERS, lams)


def test_dry_run_audit_undo_and_the_record():
    dag, requests, models = chain()
    alpha = {"a": LAYERS, "b": 1.5, "c": {"*": math.pi}}
    plan = ff.plan(dag, requests, alpha=alpha)
    before = state(models)
    dry = plan.run_(dry_run=True)
    assert alike(before, state(models))
    report = plan.run_(undo=True, audit=True)
    assert [(n.selected, n.zeroed) for n in report] == [(n.selected, n.zeroed) for n in dry]
    for node in report:
        assert node.selected == sum(p.selected for p in node.parameters)
        assert node.numel == 74
        for p in node.parameters:
            moved = before[f"{node.name}.{p.name}"] - models[node.name].get_parameter(p.name).detach()
            assert p.change == pytest.approx(float(moved.double().norm()), rel=1e-6)
    assert [type(n.alpha) for n in report] == [dict, float, dict]
    assert "0.5…40" in str(report)
    assert "3.14159" in str(report)
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["nodes"][0]["alpha"] == LAYERS
    assert {node.name for node in report if node.selected} <= set(report.undo.nodes)
    report.undo_()
    assert alike(before, state(models))
    assert "3 nodes of 3" in str(plan)


def test_a_profile_and_percentiles_are_of_whole_nodes():
    dag, requests, _ = chain()
    whole, parted = ff.plan(dag, requests), ff.plan(dag, requests, alpha=dict.fromkeys("abc", LAYERS))
    for one, other in zip(whole.profile(norms=True).values(), parted.profile(norms=True).values(), strict=True):
        assert (one.counts == other.counts).all()
        assert other.squares == pytest.approx(one.squares)
        assert (one.numel, one.always, one.never) == (other.numel, other.always, other.never)
    q = torch.tensor([30.0, 50.0, 99.0]).numpy()
    assert (whole.ratios().percentiles(q) == parted.ratios().percentiles(q)).all()
    auto = ff.plan(dag, requests, alpha="auto", forget_fraction=0.1, lam={n: {"0.*": 0.1, "*": 1.0} for n in "abc"})
    plain = ff.plan(dag, requests, alpha="auto", forget_fraction=0.1)
    assert [n.alpha for n in auto.run_(dry_run=True)] == [n.alpha for n in plain.run_(dry_run=True)]


def test_values_change_with_and_without_patterns():
    dag, requests, models = chain()
    plan = ff.plan(dag, requests)
    parts = plan.parts
    plan.set_values_(alpha={"a": 2.0, "b": {"*": 3.0}})
    plan.set_values_(alpha={"b": LAYERS}, lam=0.25)
    assert plan.parts is not parts, "patterns tell apart what had one number"
    parts = plan.parts
    plan.set_values_(alpha={"b": {"0.bias": 1.0, "0.weight": 2.0, "?.*": 4.0}}, lam={"b": {"0.w*": 0.1, "*": 0.2}})
    plan.set_values_(alpha={"a": 5.0})
    assert plan.parts is parts, "the same groups with other numbers"
    report = plan.run_(dry_run=True)
    assert report["a"].alpha == 5.0
    assert report["b"].alpha == {"0.bias": 1.0, "0.weight": 2.0, "?.*": 4.0}
    assert (report["b"].lam, report["c"].lam) == ({"0.w*": 0.1, "*": 0.2}, 0.25)
    choice = ff.Choice({"0.*": math.inf, "1.*": 0.1, "*": 7.0}, 0.5, 0.0)
    plan.set_values_({"c": choice, "b": ff.Choice(math.inf, 1.0, 0.0)})
    before = state(models)
    report = plan.run_(audit=True)
    assert report["b"].selected == 0 < report["c"].selected
    assert [p.selected for p in report["c"].parameters if p.name.startswith("0.")] == [0, 0]
    assert json.dumps(report.to_dict(), allow_nan=False)
    assert all(torch.equal(v, before[k]) for k, v in state(models).items() if k.startswith(("b", "c.0")))
    for model in models.values():
        ff.flatten_(model)  # built anew, with the values that there are
    again = plan.run_(dry_run=True)["c"].alpha
    assert again == choice.alpha


def test_trials_by_pattern():
    problem = build(Case("trials", FAN, ("root", "child3"), shapes=SIZES))
    plan, before = problem.plan(None), problem.state()
    low = {"root": {"prime": 0.5, "*": 2.0}}
    expected = build(problem.case)
    other = expected.plan(None)
    other.set_values_(alpha={"root": {"*": 4.0, "prime": 0.75}})
    other.run_()
    with plan.trials(alpha=low) as trials:
        for alpha in ({"root": {"prime": 3.0, "*": 3.0}}, {"root": 2.0}, {"root": {"*": 4.0, "prime": 0.75}}):
            trials.run(alpha=alpha)
        assert all(torch.equal(value, expected.state()[key]) for key, value in problem.state().items())
        with pytest.raises(ff.ArgumentError, match="node 'root', parameter '.*': alpha 1 is below 2, the lowest that"):
            trials.run(alpha={"root": {"prime": 1.0, "*": 1.0}})
        with pytest.raises(ff.ArgumentError, match=r"name all patterns in trials\(alpha=…\)"):
            trials.run(alpha={"root": {"line": 3.0, "*": 9.0}})
        with pytest.raises(ff.ArgumentError, match=r"name all patterns in trials"):
            plan.set_values_(alpha={"child1": {"line": 3.0, "*": 9.0}})
    assert all(torch.equal(value, before[key]) for key, value in problem.state().items())
    assert plan.run_(dry_run=True)["root"].alpha == 1.5


def test_names_that_are_tied_or_wrapped():
    model = Tied()
    names = ff.Layout.from_module(model).names
    tied = next(n for n, _ in model.named_parameters(remove_duplicate=False) if n not in names)
    original, forget = fisher_of(model, 1), fisher_of(model, 2)
    report = ff.dampen_(model, original, forget, alpha={tied: 1e30, "*": 0.0}, dry_run=True, audit=True)
    untouched = [p.name for p in report["model"].parameters if p.selected == 0]
    assert len(untouched) == 1
    assert model.get_parameter(untouched[0]) is model.get_parameter(tied)
    whole = net(), fisher_of(net(), 1), fisher_of(net(), 2)
    report = ff.dampen_(*whole, alpha={"module.0.*": 1.0, "*": 1e30}, dry_run=True, audit=True)
    assert [p.selected > 0 for p in report["model"].parameters] == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("alpha", "kind", "message"),
    [
        (
            {"0.*": 1.0},
            ff.ArgumentError,
            r"alpha\['b'\] has no pattern for parameter '1.weight' of node 'b'; add .\*",
        ),
        ({}, ff.ArgumentError, r"no pattern for parameter '0.weight' of node 'b'"),
        (
            {"0.wieght": 1.0, "*": 1.0},
            ff.LayoutError,
            r"no parameter of node 'b' matches '0.wieght'.*0.weight",
        ),
        ({"0.*": -1.0, "*": 1.0}, ff.ArgumentError, r"alpha\['b'\]\['0.\*'\] is -1.0, expected a finite number"),
        ({"0.*": math.inf, "*": 1.0}, ff.ArgumentError, r"alpha\['b'\]\['0.\*'\] is inf"),
        ({"0.*": "much", "*": 1.0}, ff.ArgumentError, r"alpha\['b'\]\['0.\*'\] is a str"),
        ({"0.*": {"weight": 1.0}, "*": 1.0}, ff.ArgumentError, r"alpha\['b'\]\['0.\*'\] is a dict"),
        ({3: 1.0, "*": 1.0}, ff.ArgumentError, r"alpha\['b'\] has a int for a pattern"),
    ],
)
def test_refusals_name_node_pattern_and_parameter(alpha, kind, message):
    dag, requests, models = chain()
    before = state(models)
    with pytest.raises(kind, match=message):
        ff.plan(dag, requests, alpha={"a": 1.0, "b": alpha, "c": 1.0})
    plan = ff.plan(dag, requests, alpha=1.0)
    with pytest.raises(kind, match=message):
        plan.set_values_(alpha={"b": alpha})
    with pytest.raises(kind, match=message.replace("alpha", "lam")):
        plan.set_values_(alpha=3.0, lam={"b": alpha})
    assert plan.run_(dry_run=True)["a"].alpha == 1.0
    assert alike(before, state(models))


def test_patterns_of_all_nodes_at_once_are_refused_with_advice():
    dag, requests, _ = chain()
    with pytest.raises(ff.ArgumentError, match=r"'0.\*', which is no node of the DAG.*\{node: \{pattern"):
        ff.plan(dag, requests, alpha={"0.*": 1.0, "*": 2.0})


def test_nodes_with_the_same_patterns_share_a_group():
    problem = build(Case("shared", CHAIN, ("a",), shapes=SIZES))
    plan = problem.plan(None)
    plan.set_values_(alpha={n: {"prime": 1.0, "*": 2.0} for n in "abc"})
    assert len(plan.parts) == 1, "one launch"
    assert [len(group.originals) for group in plan.parts[0].table.groups] == [3, 3]
    assert plan.traffic.forget == problem.plan(None).traffic.forget, "each forget Fisher is read once for all nodes"
