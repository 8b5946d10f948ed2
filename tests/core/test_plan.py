"""Plans and reports: grouping, coalescing, storage that moves, options per node, and every refusal."""

import copy
import gc
import json

import pytest
import torch
from small import Tied
from torch import nn

import fiun_fast as ff


def net(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, classes))


def fisher_of(model, seed: int, params=None, dtype=torch.float32) -> ff.Fisher:
    layout = ff.Layout.from_module(model, params) if isinstance(model, nn.Module) else ff.Layout.from_tensors(model)
    return ff.Fisher(torch.rand(layout.numel, generator=torch.Generator().manual_seed(seed), dtype=dtype), layout)


def family() -> tuple[ff.InheritanceDAG, dict[str, nn.Module], list[ff.ForgetRequest]]:
    """a -> b -> d, a -> c, and e on its own; requests at a and b."""
    models = {name: net(i) for i, name in enumerate("abcde")}
    dag = ff.InheritanceDAG()
    for i, (name, parents) in enumerate([("a", []), ("b", ["a"]), ("c", ["a"]), ("d", ["b"]), ("e", [])]):
        dag.add_model(name, models[name], fisher_of(models[name], 10 + i), parents=parents)
    requests = [ff.ForgetRequest("a", fisher_of(models["a"], 20)), ff.ForgetRequest("b", fisher_of(models["b"], 21))]
    return dag, models, requests


def snapshot(models) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": t.clone() for n, m in models.items() for k, t in m.state_dict().items()}


def textbook(model: nn.Module, original: ff.Fisher, forget: torch.Tensor, alpha: float, lam: float) -> dict:
    """SSD as its authors' code does it, one parameter after another; returns new values."""
    out = {}
    for name, p in model.named_parameters():
        i, f = original[name], forget[original.layout.slice(name)].view(p.shape)
        p = p.detach().clone()
        at = torch.where(f > i * alpha)
        p[at] = p[at].mul(((i * lam)[at].div(f[at])).clamp(max=1.0))
        out[name] = p
    return out


def test_every_node_gets_what_its_ancestors_ask():
    dag, models, requests = family()
    both = torch.maximum(requests[0].fisher.buffer, requests[1].fisher.buffer)
    forget = {"a": requests[0].fisher.buffer, "b": both, "c": requests[0].fisher.buffer, "d": both}
    expected = {n: textbook(models[n], dag[n].fisher, forget[n], 1.5, 0.5) for n in forget}
    untouched = snapshot({"e": models["e"]})
    plan = ff.plan(dag, requests, alpha=1.5, lam=0.5)
    report = plan.run_()
    for name, values in expected.items():
        for key, value in values.items():
            assert torch.equal(models[name].state_dict()[key], value), (name, key)
    assert snapshot({"e": models["e"]}).keys() == untouched.keys()
    assert all(torch.equal(v, untouched[k]) for k, v in snapshot({"e": models["e"]}).items())
    assert plan.nodes == ["a", "b", "c", "d"]
    assert report["d"].sources == ("a", "b")
    assert report["e"] == ff.NodeReport("e")
    assert report.selected == sum(report[n].selected for n in "abcd") > 0


def test_one_launch_two_groups_and_coalescing():
    dag, models, requests = family()
    plan = ff.plan(dag, requests)
    assert len(plan.parts) == 1
    assert len(plan.parts[0].table.groups) == 2  # {a, c} and {b, d}
    assert len(plan.parts[0].table.rows) == 8  # four parameters each
    before = plan.run_(dry_run=True).to_dict()
    for model in models.values():
        ff.flatten_(model)  # storage moves: the plan notices, and finds one run of memory a model
    assert plan.run_(dry_run=True).to_dict() == before
    assert len(plan.parts[0].table.rows) == 2
    assert plan.parts[0].table.rows[:, 0].tolist() == [43, 43]


def test_traffic_is_the_cost_model():
    dag, _, requests = family()
    traffic = ff.plan(dag, requests).traffic
    elements = 43
    assert traffic.forget == 4 * elements * (1 + 2)  # group {a, c} has one source, group {b, d} two
    assert traffic.original == 4 * elements * 4
    assert traffic.theta == 8 * elements * 4
    assert traffic.total == traffic.forget + traffic.original + traffic.theta


def test_dry_run_counts_the_same_and_touches_nothing():
    dag, models, requests = family()
    plan = ff.plan(dag, requests, alpha=0.7)
    before, versions = snapshot(models), [p._version for m in models.values() for p in m.parameters()]
    dry = plan.run_(dry_run=True)
    assert all(torch.equal(v, before[k]) for k, v in snapshot(models).items())
    assert [p._version for m in models.values() for p in m.parameters()] == versions
    wet = plan.run_()
    assert [n.selected for n in dry] == [n.selected for n in wet]
    assert [n.zeroed for n in dry] == [n.zeroed for n in wet]
    assert "dry run: nothing was changed" in str(dry)


def test_autograd_hears_of_the_write():
    model = net()
    original, forget = fisher_of(model, 1), fisher_of(model, 2)
    loss = model(torch.randn(2, 4)).pow(2).sum()
    ff.dampen_(model, original, forget, alpha=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_replaced_or_taken_away_are_noticed():
    dag, models, requests = family()
    plan = ff.plan(dag, requests, alpha=0.5)
    state = {k: torch.ones_like(v) for k, v in models["b"].state_dict().items()}
    models["b"].load_state_dict(state, assign=True)  # other Parameter objects from now on
    plan.run_()
    assert any((p != 1).any() for p in models["b"].parameters())
    before = snapshot(models)
    models["c"][1] = nn.Linear(5, 3, bias=False)
    with pytest.raises(ff.LayoutError, match="node 'c': the model has no parameter '1.bias', its original Fisher has"):
        plan.run_()
    models["c"][1] = nn.Linear(5, 9)
    with pytest.raises(ff.LayoutError, match=r"node 'c', parameter '1.weight': shape \[9, 5\] in the model, \[3, 5\]"):
        plan.run_()
    kept = {k: v for k, v in snapshot(models).items() if not k.startswith("c.1")}
    assert all(torch.equal(v, before[k]) for k, v in kept.items())


def test_a_fisher_that_was_replaced_is_noticed():
    dag, models, requests = family()
    plan = ff.plan(dag, requests, alpha=0.5)
    requests[0].fisher.buffer = torch.zeros_like(requests[0].fisher.buffer)
    assert plan.run_(dry_run=True)["a"].selected == 0


def test_the_plan_keeps_its_tensors_alive():
    dag, models, requests = family()
    expected = ff.plan(dag, requests, alpha=0.5).run_(dry_run=True).to_dict()
    plan = ff.plan(dag, requests, alpha=0.5)
    del dag, models, requests
    gc.collect()
    garbage = [torch.rand(43) for _ in range(200)]
    assert plan.run_(dry_run=True).to_dict() == expected
    del garbage


def test_warmup_changes_nothing():
    dag, models, requests = family()
    before = snapshot(models)
    ff.plan(dag, requests).warmup()
    assert all(torch.equal(v, before[k]) for k, v in snapshot(models).items())


def test_a_report_survives_the_next_run():
    dag, _, requests = family()
    plan = ff.plan(dag, requests, alpha=0.5)
    first = plan.run_()  # not read yet
    second = plan.run_()
    assert first.selected == second.selected
    assert first["a"].zeroed == second["a"].zeroed


def test_numbers_per_node():
    dag, models, requests = family()
    alone = {
        n: ff.plan(dag, requests, alpha=a, lam=0.3).run_(dry_run=True)[n].selected for n, a in zip("abcd", [1, 2, 3, 4])
    }
    alphas = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}
    report = ff.plan(dag, requests, alpha=alphas, lam=dict.fromkeys("abcd", 0.3)).run_()
    assert {n.name: n.selected for n in report} == alone
    assert report["c"].alpha == 3
    assert report["c"].lam == 0.3
    with pytest.raises(ff.ArgumentError, match="alpha has no value for node 'd'"):
        ff.plan(dag, requests, alpha={"a": 1, "b": 1, "c": 1})
    with pytest.raises(ff.ArgumentError, match="lam has a value for 'z', which is no node"):
        ff.plan(dag, requests, lam={"z": 1})
    with pytest.raises(ff.ArgumentError, match=r"alpha\['b'\] is -1.0"):
        ff.plan(dag, requests, alpha={"a": 1, "b": -1, "c": 1, "d": 1})


def test_state_dicts_are_models():
    dag, models, requests = family()
    other = ff.InheritanceDAG()
    states = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in models.items()}
    for name in "abcde":
        other.add_model(name, states[name], dag[name].fisher, parents=dag.parents(name))
    ff.plan(dag, requests, alpha=0.5).run_()
    plan = ff.plan(other, requests, alpha=0.5)
    plan.run_()
    for name, state in states.items():
        assert all(torch.equal(v, state[k]) for k, v in models[name].state_dict().items())
    states["a"]["0.weight"] = torch.ones(5, 4)  # replaced in the caller's dict: noticed
    plan.run_()
    assert not states["a"]["0.weight"].eq(1).all()


def test_transfer_heads_are_skipped_and_reported():
    dag, models, requests = family()
    head = net(9, classes=7)
    dag.add_model("t", head, fisher_of(head, 30), parents=["a"])
    with pytest.raises(
        ff.LayoutError, match=r"node 't': the forget Fisher of request 0 \(from 'a'\).*1.weight is \[7, 5\]"
    ):
        ff.plan(dag, requests)
    before = snapshot({"t": head})
    plan = ff.plan(dag, requests, alpha=0.5, on_mismatch="skip")
    assert "left out for another shape or no counterpart: 1.weight, 1.bias" in str(plan)
    report = plan.run_()
    assert report["t"].skipped == ("1.weight", "1.bias")
    assert report["t"].numel == 25
    assert "left out of t: 1.weight, 1.bias" in str(report)
    after = snapshot({"t": head})
    assert torch.equal(after["t.1.weight"], before["t.1.weight"])
    assert not torch.equal(after["t.0.weight"], before["t.0.weight"])


def test_requests_of_different_scope_merge_where_both_speak():
    """One request for the whole model, one for the head only: each element meets those that have it."""
    model = net()
    original, whole = fisher_of(model, 1), fisher_of(model, 2)
    head = fisher_of(model, 3, params="1.*")
    dag = ff.InheritanceDAG()
    dag.add_model("a", model, original)
    requests = [ff.ForgetRequest("a", whole), ff.ForgetRequest("a", head)]
    merged = whole.buffer.clone()
    merged[25:] = torch.maximum(merged[25:], head.buffer)
    expected = textbook(model, original, merged, 1.0, 1.0)
    report = ff.plan(dag, requests, alpha=1.0, on_mismatch="skip").run_()
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    assert report["a"].selected == int((merged > original.buffer).sum())


def test_weights_of_requests():
    dag, _, requests = family()
    heavy = [ff.ForgetRequest("a", requests[0].fisher, weight=3.0)]
    scaled = [ff.ForgetRequest("a", ff.Fisher(requests[0].fisher.buffer * 3.0, requests[0].fisher.layout))]
    counts = [[(n.selected, n.zeroed) for n in ff.plan(dag, r).run_(dry_run=True)] for r in (heavy, scaled)]
    assert counts[0] == counts[1]


def test_mixed_dtypes_make_one_launch_each():
    model = nn.Sequential(nn.Linear(4, 5).bfloat16(), nn.Linear(5, 3))
    original, forget = fisher_of(model, 1), fisher_of(model, 2)
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, original)
    plan = ff.plan(dag, [ff.ForgetRequest("m", forget)], alpha=0.5)
    assert [part.table.theta_dtype for part in plan.parts] == [torch.bfloat16, torch.float32]
    report = plan.run_()
    assert report["m"].numel == 43
    assert report["m"].selected == int((forget.buffer > original.buffer * 0.5).sum())


def test_alike_nodes_of_unlike_kinds_and_dtypes():
    """One layout; modules, dicts and dtypes mixed: each node as if it were alone, undone bit for bit."""
    generator = torch.Generator().manual_seed(torch.seed())
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    models = {}
    for n in range(12):
        model = net(n)
        for layer in model:
            layer.to(dtypes[int(torch.randint(3, (), generator=generator))])
        models[f"n{n}"] = model if n % 3 else dict(model.state_dict())
    originals = {name: fisher_of(model, n) for n, (name, model) in enumerate(models.items())}
    forget = fisher_of(models["n0"], 99)
    apart = copy.deepcopy(models)
    before = copy.deepcopy(models)
    dag = ff.InheritanceDAG()
    for name, model in models.items():
        dag.add_model(name, model, originals[name], parents=["n0"] if name != "n0" else [])
    report = ff.plan(dag, [ff.ForgetRequest("n0", forget)], alpha=0.7, lam=0.5).run_(undo=True)
    for name, model in apart.items():
        alone = ff.dampen_(model, originals[name], forget, alpha=0.7, lam=0.5)
        assert (report[name].selected, report[name].zeroed) == (alone.selected, alone.zeroed)

    def state(model):
        return model.state_dict() if isinstance(model, nn.Module) else model

    for name, model in models.items():
        assert all(torch.equal(value, state(apart[name])[key]) for key, value in state(model).items()), name
    report.undo_()
    for name, model in models.items():
        assert all(torch.equal(value, state(before[name])[key]) for key, value in state(model).items()), name


def test_tied_parameters_are_dampened_once():
    model = Tied()
    original, forget = fisher_of(model, 1), fisher_of(model, 2)
    expected = textbook(model, original, forget.buffer, 0.5, 1.0)
    ff.dampen_(model, original, forget, alpha=0.5)
    assert torch.equal(model.head.weight, expected["embedding.weight"])
    state = dict(model.state_dict())  # names the weight twice: a Fisher over both would dampen it twice
    twice = fisher_of(state, 3)
    with pytest.raises(
        ff.LayoutError, match="'embedding.weight' and node 'model', parameter 'head.weight' share memory"
    ):
        ff.dampen_(state, twice, twice)


def test_print_says_what_will_happen():
    dag, _, requests = family()
    plan = ff.plan(dag, requests, backend="reference")
    text = str(plan)
    assert "4 nodes of 5, 172 elements, 2 requests, merged by max" in text
    assert "2 groups, 8 contiguous runs, 1 launch: reference on cpu (float32, Fishers float32)" in text
    assert "moves at most 2.58 kB a run" in text
    report = plan.run_()
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "node",
        "from",
        "alpha",
        "lambda",
        "elements",
        "selected",
        "share",
        "zeroed",
        "nonfinite",
    ]
    assert lines[2].startswith("a  ")
    assert lines[-1].startswith("all")
    assert len({len(line) for line in lines}) == 1  # columns line up
    assert json.loads(json.dumps(report.to_dict()))["selected"] == report.selected
    with pytest.raises(ff.DagError, match="no node 'q' in this report"):
        report["q"]


def test_dampen_takes_several_fishers():
    one, two = net(), net()
    original, f, g = (fisher_of(one, seed) for seed in (1, 2, 3))
    ff.dampen_(one, original, [f, g], alpha=1.2)
    report = ff.dampen_(two, original, ff.merge_fishers([f, g]), alpha=1.2)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert report.selected == report["model"].selected


def strided(model: nn.Module) -> None:
    model[0].weight.data = torch.randn(4, 5).t()


def halved(model: nn.Module) -> None:
    model[0].weight.data = torch.zeros(5, 4, dtype=torch.int32)


def elsewhere(model: nn.Module) -> None:
    model[1].to("meta")


def wider(model: nn.Module) -> None:
    model[1] = nn.Linear(5, 4)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            strided,
            ff.LayoutError,
            r"node 'd', parameter '0.weight': not contiguous \(shape \[5, 4\], stride \[1, 5\]\)",
        ),
        (elsewhere, ff.DeviceError, "node 'd', parameter '1.weight': on meta, its original Fisher on cpu"),
        (wider, ff.LayoutError, r"node 'd', parameter '1.weight': shape \[4, 5\] in the model, \[3, 5\] in its Fisher"),
    ],
)
def test_one_bad_node_stops_the_whole_plan(spoil, error, message):
    dag, models, requests = family()
    spoil(models["d"])
    before = snapshot({n: models[n] for n in "abc"})
    with pytest.raises(error, match=message):
        ff.plan(dag, requests).run_()
    assert all(torch.equal(v, before[k]) for k, v in snapshot({n: models[n] for n in "abc"}).items())


def test_a_part_in_torchscript_is_named():
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(torch.jit.script(nn.Linear(2, 2))))
    whole, first = fisher_of(model, 1), fisher_of(model, 1, "0.*")
    with pytest.raises(ff.ArgumentError, match=r"node 'model': '1\.0' is a TorchScript module"):
        ff.dampen_(model, whole, whole)
    ff.dampen_(model, first, first)


def test_shared_memory_between_nodes_or_with_a_fisher():
    dag, models, requests = family()
    models["c"][0].weight = models["b"][0].weight
    with pytest.raises(ff.LayoutError, match="node 'c', parameter '0.weight' and node 'b', parameter '0.weight' share"):
        ff.plan(dag, requests)
    dag, models, requests = family()
    models["c"][0].weight.data = requests[0].fisher["0.weight"]
    with pytest.raises(
        ff.LayoutError, match="node 'c', parameter '0.weight' and the forget Fisher of request 0 share memory"
    ):
        ff.plan(dag, requests)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1}, ff.ArgumentError, "alpha is -1.0"),
        ({"alpha": float("nan")}, ff.ArgumentError, "alpha is nan"),
        ({"alpha": 1e39}, ff.ArgumentError, r"alpha is 1e\+39"),  # beyond float32, the Fishers' dtype
        ({"alpha": "10"}, ff.ArgumentError, "alpha is a str"),
        ({"lam": -0.5}, ff.ArgumentError, "lam is -0.5"),
        ({"lam": float("inf")}, ff.ArgumentError, "lam is inf"),
        ({"exponent": -1}, ff.ArgumentError, "exponent is -1.0"),
        ({"cap": float("nan")}, ff.ArgumentError, "cap is nan"),
        ({"scale": -2}, ff.ArgumentError, "scale is -2.0"),
        ({"merge": "min"}, ff.ArgumentError, "merge is 'min', expected one of max, mean, sum"),
        ({"on_mismatch": "ignore"}, ff.ArgumentError, "on_mismatch is 'ignore'"),
        ({"backend": "warp"}, ff.BackendError, "unknown backend 'warp'"),
        ({"requests": []}, ff.ArgumentError, "no forget requests"),
        ({"requests": ["a"]}, ff.ArgumentError, "request 0 is 'a', expected ForgetRequest"),
        ({"dag": 3}, ff.ArgumentError, "dag is a int"),
    ],
)
def test_bad_options(options, error, message):
    dag, models, requests = family()
    before = snapshot(models)
    with pytest.raises(error, match=message):
        ff.plan(**{"dag": dag, "requests": requests, **options}).run_()
    assert all(torch.equal(v, before[k]) for k, v in snapshot(models).items())


def test_bad_requests_and_fishers():
    dag, models, requests = family()
    with pytest.raises(ff.DagError, match="request 1: unknown origin 'x'; known nodes: a, b, c, d, e"):
        ff.plan(dag, [requests[0], ff.ForgetRequest("x", requests[0].fisher)])
    with pytest.raises(ff.ArgumentError, match=r"request 0 \('a'\): weight is -1.0"):
        ff.plan(dag, [ff.ForgetRequest("a", requests[0].fisher, weight=-1)])
    with pytest.raises(
        ff.DTypeError, match="node 'a': its original Fisher is torch.float32, the forget Fisher of request 0"
    ):
        ff.plan(dag, [ff.ForgetRequest("a", requests[0].fisher.to(dtype=torch.float64))])
    dag.add_model("f", net(), parents=["d"])
    with pytest.raises(ff.ArgumentError, match="node 'f': a request reaches it, but it has no original Fisher"):
        ff.plan(dag, requests)
    with pytest.raises(ff.ArgumentError, match="original is a dict"):
        ff.dampen_(net(), {}, requests[0].fisher)
    state = {k: v.int() for k, v in net().state_dict().items()}
    with pytest.raises(ff.DTypeError, match="parameter '0.weight': torch.int32, expected float32"):
        ff.dampen_(state, fisher_of(net(), 1), requests[0].fisher)
    state = dict.fromkeys(net().state_dict(), 3)
    with pytest.raises(ff.ArgumentError, match="parameter '0.weight': a int, expected a tensor"):
        ff.dampen_(state, fisher_of(net(), 1), requests[0].fisher)


def test_a_plan_that_reaches_only_empty_parameters():
    model = {"empty": torch.zeros(0, 3), "w": torch.ones(2)}
    original, forget = fisher_of(model, 1), fisher_of(model, 2)
    assert ff.dampen_(model, original, forget, alpha=0.1).numel == 2
    only = {"empty": torch.zeros(0, 3)}
    report = ff.dampen_(only, fisher_of(only, 1), fisher_of(only, 2))
    assert report.numel == report.selected == 0
    assert str(report)
