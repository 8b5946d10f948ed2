"""tune(by="layer"): held against a plain loop over copies, one node at a time; what it accepts, shows and refuses."""

from __future__ import annotations

import fnmatch
from types import SimpleNamespace

import pytest
import torch
from small import Tied, net
from torch import nn

import fiun_fast as ff
from fiun_fast.layer_tuning import LAST_POINTS, SHARES
from fiun_fast.scope import layers_of

SHAPES = {"first.weight": (9, 5), "first.bias": (9,), "second": (40,), "head.weight": (4, 15), "head.bias": (4,)}
LAYERS = [["head.weight", "head.bias"], ["second"], ["first.weight", "first.bias"]]
Dict = dict[str, torch.Tensor]


def family(seed: int) -> tuple[ff.InheritanceDAG, list[ff.ForgetRequest]]:
    """A chain of two nodes of random numbers, and one beside it."""
    dice = torch.Generator().manual_seed(seed)

    def tensors() -> Dict:
        return {name: torch.rand(shape, generator=dice) + 0.01 for name, shape in SHAPES.items()}

    dag = ff.InheritanceDAG()
    for name, parents in (("a", []), ("b", ["a"]), ("beside", [])):
        dag.add_model(name, tensors(), ff.Fisher.from_dict(tensors()), parents=parents)
    return dag, [ff.ForgetRequest("a", ff.Fisher.from_dict(tensors()))]


def bits(dag: ff.InheritanceDAG) -> dict[str, Dict]:
    return {name: {key: t.clone() for key, t in dag[name].model.items()} for name in dag}


class Bear:
    """Scores how near the share changed of the head is to 0.3, less what the body lost beyond what it can bear."""

    def __init__(self, dag: ff.InheritanceDAG, measures: bool, most: dict[str, float], dear: float = 0.0) -> None:
        self.start, self.most, self.calls = bits(dag), most, 0
        self.dear = dear  # what changing all of the head costs the rest
        self.last: dict | None = {} if measures else None

    def changed(self, name: str, model: Dict, layer: list[str]) -> float:
        moved = [(model[key] != self.start[name][key]).double().flatten() for key in layer]
        return float(torch.cat(moved).mean())

    def __call__(self, name: str, model: Dict) -> float:
        self.calls += 1
        head = abs(self.changed(name, model, LAYERS[0]) - 0.3)
        body = sum(
            max(0.0, self.changed(name, model, layer) - self.most[layer[0]]) / 10 for layer in LAYERS[1:]
        )  # a tenth of what is too much
        if self.last is not None:
            kept = 1 - body - self.dear * self.changed(name, model, LAYERS[0])
            self.last[name] = SimpleNamespace(left=head, kept=kept, sure_left=0.5, sure_kept=0.9)
            body = 0.0  # what is measured decides, not the score
        return -head - body


def by_hand(
    dag: ff.InheritanceDAG, request: ff.ForgetRequest, name: str, evaluate: Bear, slack: float
) -> tuple[dict[str, float] | None, float, int]:
    """The choice of one node: alpha of each parameter, the score, and how many models were scored."""
    model, original = dag[name].model, dag[name].fisher.as_dict()
    forget, start = request.fisher.as_dict(), {key: t.clone() for key, t in model.items()}
    before, calls = evaluate.calls, {}

    def score(alpha: dict[str, float], head_lam: float = 0.01) -> float:
        for key in SHAPES:
            m, i = forget[key], original[key]
            lam = head_lam if key in LAYERS[0] else 0.1
            model[key].copy_(torch.where(m > i * alpha[key], start[key] * (i * lam / m).clamp(max=1), start[key]))
        found = evaluate(name, model)
        calls[len(calls)] = None if evaluate.last is None else evaluate.last[name]
        for key, t in start.items():
            model[key].copy_(t)
        return found

    def alphas(layer: list[str], shares: list[float]) -> list[float]:
        ratios = torch.cat([(forget[key] / original[key]).flatten() for key in layer]).sort(descending=True).values
        return [float(ratios[min(int(s * len(ratios) + 1e-9), len(ratios) - 1)]) for s in shares]

    nothing = dict.fromkeys(SHAPES, 1e9)
    best, reference, seen = None, score(nothing), None
    count = sum(torch.Size(SHAPES[key]).numel() for key in LAYERS[0])
    steps = [(0.7 * count) ** (k / (LAST_POINTS - 1)) / count for k in range(LAST_POINTS)]
    for alpha in dict.fromkeys(alphas(LAYERS[0], steps)):
        found = score(nothing | dict.fromkeys(LAYERS[0], alpha))
        if found > reference:
            best, reference, seen = nothing | dict.fromkeys(LAYERS[0], alpha), found, calls[len(calls) - 1]
    if best is None:
        return None, reference, evaluate.calls - before
    now = reference
    for layer in LAYERS[1:]:
        for alpha in dict.fromkeys(alphas(layer, list(SHARES))):
            found = score(best | dict.fromkeys(layer, alpha))
            if seen is None:
                good = found >= reference - slack
            else:
                its = calls[len(calls) - 1]
                good = its.left <= seen.left and its.kept >= min(1.0 - slack, seen.kept)
            if good:
                best, now = best | dict.fromkeys(layer, alpha), found
                break
    return best, now, evaluate.calls - before


@pytest.mark.parametrize(
    ("measures", "dear"), [(False, 0.0), (True, 0.0), (True, 0.02), (True, 0.1)], ids=["score", "free", "cheap", "dear"]
)
def test_each_node_finds_what_a_plain_loop_finds(measures, dear):
    """A head that costs the rest more than the slack leaves the body nothing to lose, a cheaper one what is left."""
    dag, requests = family(3)
    how = (measures, {"second": 0.12, "first.weight": 0.0}, dear)
    slack = 0.0101
    expected = {name: by_hand(dag, requests[0], name, Bear(dag, *how), slack) for name in ("a", "b")}
    evaluate, start = Bear(dag, *how), bits(dag)
    chosen = ff.tune(dag, requests, evaluate, by="layer", slack=slack)
    assert all(torch.equal(t, start[name][key]) for name in dag for key, t in dag[name].model.items())
    assert list(chosen) == ["a", "b"]
    for name, (alpha, score, calls) in expected.items():
        found = chosen[name]
        assert found.score == score
        assert len(chosen.points[name]) == calls
        for key in SHAPES:
            its = next(value for pattern, value in found.alpha.items() if fnmatch.fnmatchcase(key, pattern))
            (forget, original) = (fisher.as_dict()[key] for fisher in (requests[0].fisher, dag[name].fisher))
            assert ((forget > original * its) == (forget > original * alpha[key])).all(), (name, key)
    assert evaluate.calls == sum(calls for *_, calls in expected.values())
    assert 0 < evaluate.changed("a", ran(dag, requests, chosen)["a"], LAYERS[1]) <= 0.12 + 0.1


def ran(dag: ff.InheritanceDAG, requests: list[ff.ForgetRequest], chosen: ff.Tuned) -> dict[str, Dict]:
    """The models after a plan with these values, which is taken back."""
    plan = ff.plan(dag, requests)
    plan.set_values_(chosen)
    report = plan.run_(undo=True)
    after = bits(dag)
    report.undo_()
    return after


def test_a_dict_called_last_that_measures_nothing_is_left_alone():
    def found(last):
        dag, requests = family(3)
        evaluate = Bear(dag, False, {"second": 0.15, "first.weight": 0.05})

        def score(name, model):
            return evaluate(name, model)

        score.last = last
        return ff.tune(dag, requests, score, by="layer")

    assert found({"a": 0.9, "b": None}) == found(None)


def test_what_is_shown(monkeypatch):
    dag, requests = family(5)
    evaluate = Bear(dag, False, {"second": 0.1, "first.weight": 0.05})
    chosen = ff.tune(dag, requests, evaluate, by="layer", points=5, lams=[0.0, 0.5])
    printed = str(chosen).splitlines()
    assert [line.split()[0] for line in printed[2:6]] == ["a", "first.*", "second", "head.*"]
    head = next(line for line in printed if line.startswith("  head.*")).split()
    assert head[1:] == [f"{chosen['a'].alpha['head.*']:g}", f"{chosen['a'].lam['head.*']:g}"]
    rows = chosen.table("a").splitlines()
    assert rows[0].split()[-1] == "layer"
    assert len(rows) - 2 == len(chosen.points["a"])
    tried = [point.layer for point in chosen.points["a"]]
    assert tried == sorted(tried, key=["", "head.*", "second", "first.*"].index)
    assert sum(row.endswith("*") and not row.endswith(".*") for row in rows[2:]) == 1
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    labels = {line.get_label() for line in chosen.plot("a").lines}
    assert {"head.*", "second", "first.*"} <= labels
    pyplot.close("all")


def test_a_node_that_is_best_left_alone_is_left_alone():
    dag, requests = family(6)
    start = bits(dag)

    def score(name: str, model: Dict) -> float:
        return -float(name == "a" and any((model[key] != start[name][key]).any() for key in SHAPES))

    with pytest.warns(ff.TuningWarning, match="node 'a': at the last layer no point beats leaving it alone"):
        chosen = ff.tune(dag, requests, score, by="layer")
    assert all((ran(dag, requests, chosen)["a"][key] == start["a"][key]).all() for key in SHAPES)


def test_values_of_a_plan_are_as_before_and_bad_arguments_are_refused():
    from fiun_fast.tuning import tune_plan

    dag, requests = family(7)
    plan = ff.plan(dag, requests, alpha={"a": 3.0, "b": {"head.*": 2.0, "*": 9.0}}, lam=0.3)
    evaluate = Bear(dag, True, {"second": 0.1, "first.weight": 0.05})
    tune_plan(plan, evaluate, by="layer", points=3)
    report = plan.run_(dry_run=True)
    assert [(n.alpha, n.lam) for n in report] == [(3.0, 0.3), ({"head.*": 2.0, "*": 9.0}, 0.3)]
    for bad, message in (
        ({"by": "tensor"}, "by is 'tensor', expected one of node, layer"),
        ({"by": "layer", "alphas": [1.0]}, "alphas are of whole nodes"),
        ({"by": "layer", "points": 0}, "points is 0"),
        ({"by": "layer", "slack": -1.0}, "slack is -1.0"),
        ({"by": "layer", "lams": []}, "lams is empty"),
    ):
        with pytest.raises(ff.ArgumentError, match=message):
            ff.tune(dag, requests, evaluate, **bad)


def test_layers_are_modules_that_own_parameters_the_last_first():
    model = nn.ModuleDict(
        {"head": nn.Linear(3, 2), "body": nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))}
    )
    names = ff.Layout.from_module(model).names
    assert layers_of(model, names) == [
        ["body.1.weight", "body.1.bias"],
        ["body.0.weight"],
        ["head.weight", "head.bias"],
    ]
    model.get_classifier = lambda: model["head"]
    assert layers_of(model, names)[0] == ["head.weight", "head.bias"]
    assert [layer[0] for layer in layers_of(model, ["body.1.bias", "head.bias"])] == ["head.bias", "body.1.bias"]
    tied = Tied()
    assert layers_of(tied, ff.Layout.from_module(tied).names) == [["embedding.weight"]]
    tensors = dict(net().state_dict())
    assert layers_of(tensors, list(tensors)) == [["2.weight", "2.bias"], ["0.weight", "0.bias"]]


@pytest.mark.parametrize(("what", "by"), [("sure_left", 0.02), ("sure_kept", -0.02)])
def test_a_step_that_makes_the_model_surer_of_the_wrong_things_is_not_borne(what, by):
    """However small the step: nothing but the last layer is dampened then."""
    dag, requests = family(3)

    class Wary(Bear):
        def __call__(self, name: str, model: Dict) -> float:
            score = super().__call__(name, model)
            body = any((model[key] != self.start[name][key]).any() for layer in LAYERS[1:] for key in layer)
            setattr(self.last[name], what, getattr(self.last[name], what) + by * body)
            return score

    chosen = ff.tune(dag, requests, Wary(dag, True, {"second": 1.0, "first.weight": 1.0}), by="layer")
    after, before = ran(dag, requests, chosen), bits(dag)
    for name in ("a", "b"):
        assert [torch.equal(after[name][key], before[name][key]) for key in SHAPES] == [True, True, True, False, False]


def test_skipped_and_empty_parameters_are_left_out():
    """Each needs an alpha in the choice, as any parameter of the Fisher does, and none is tried for it."""
    dag, requests = family(5)
    shapes = SHAPES | {"void": (0, 3), "first.more": (7,)}
    dice = torch.Generator().manual_seed(6)
    model, numbers = ({key: torch.rand(shape, generator=dice) for key, shape in shapes.items()} for _ in range(2))
    dag.add_model("wider", model, ff.Fisher.from_dict(numbers), parents=["b"])
    start = bits(dag)
    tuned = ff.tune(
        dag,
        requests,
        Bear(dag, False, {"second": 0.5, "first.weight": 0.5}),
        by="layer",
        on_mismatch="skip",
        points=3,
        slack=10.0,
    )
    assert {p.layer for p in tuned.points["wider"]} == {"", "head.*", "second", "first.*"}
    assert set(tuned["wider"].alpha) == {"head.*", "second", "first.*", "void"}
    plan = ff.plan(dag, requests, on_mismatch="skip")
    plan.set_values_(tuned)
    node = plan.run_()["wider"]
    assert set(node.skipped) >= {"first.more"}
    assert node.selected == next(p.selected for p in tuned.points["wider"] if p.alpha == tuned["wider"].alpha)
    assert torch.equal(model["first.more"], start["wider"]["first.more"])
