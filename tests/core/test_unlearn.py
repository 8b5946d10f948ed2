"""`unlearn_` against the same job by hand, its bound, its way back, and what it says."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import fiun_fast as ff
from fiun_fast import estimating
from fiun_fast.estimating import complete_for
from fiun_fast.estimators.job import Options
from fiun_fast.tuning import default_grids

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 4
ENOUGH = {"left": 0.05, "lost": 0.05}  # for classes that overlap a little
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def clouds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes, each a cloud around its own corner of 12 dimensions."""
    dice = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = torch.randn(count, 12, generator=dice)
    x[torch.arange(count), y] += 4
    return x, y


def batched(x: torch.Tensor, y: torch.Tensor, size: int = 20) -> Batches:
    return list(zip(x.split(size), y.split(size), strict=True))


def only(data: tuple[torch.Tensor, torch.Tensor], *classes: int) -> Batches:
    keep = torch.isin(data[1], torch.tensor(classes))
    return batched(data[0][keep], data[1][keep])


TRAIN, VALIDATION, TEST = (clouds(n, seed) for n, seed in ((400, 1), (200, 2), (200, 3)))
LOADER, CHECK = batched(*TRAIN), batched(*VALIDATION)


def fit(model: nn.Module, epochs: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in LOADER * epochs:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def grown() -> dict[str, nn.Module]:
    """A chain of three."""
    torch.manual_seed(0)
    models = {"u0": fit(nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, CLASSES)), 6)}
    for name in ("u1", "u2"):
        models[name] = fit(copy.deepcopy(list(models.values())[-1]), 1)
    return models


@pytest.fixture
def models(grown) -> dict[str, nn.Module]:
    return copy.deepcopy(grown)


def chain(models: dict[str, nn.Module], **fishers: ff.Fisher) -> ff.InheritanceDAG:
    """With data where no Fisher is given."""
    dag, names = ff.InheritanceDAG(), list(models)
    for k, name in enumerate(names):
        given = {"fisher": fishers[name]} if name in fishers else {"data": LOADER}
        dag.add_model(name, models[name], parents=names[k - 1 : k] if k else [], **given)
    return dag


def accuracy(model: nn.Module, gone: int, data=TEST) -> tuple[float, float]:
    with torch.no_grad():
        right = copy.deepcopy(model).eval()(data[0]).argmax(1) == data[1]
    return float(right[data[1] == gone].float().mean()), float(right[data[1] != gone].float().mean())


def same(models, others) -> bool:
    pairs = [(a.state_dict(), b.state_dict()) for a, b in zip(models.values(), others.values(), strict=True)]
    return all(torch.equal(value, b[key]) for a, b in pairs for key, value in a.items())


DEFAULT = ("softened", "expected")


def by_hand(models, label: int, estimators=DEFAULT, points: int = 12) -> dict[str, tuple]:
    """What a user wrote before: estimate, tune, compare, plan; node -> estimator, alpha, lambda. It dampens."""
    before = {name: accuracy(model, label, VALIDATION)[1] for name, model in models.items()}

    def score(name, model):
        left, kept = accuracy(model, label, VALIDATION)
        with torch.no_grad():
            sure = copy.deepcopy(model).eval()(VALIDATION[0]).softmax(1).gather(1, VALIDATION[1][:, None])[:, 0]
        gone = VALIDATION[1] == label
        return -(left + max(0, before[name] - kept) + 0.1 * sure[gone].mean() - 0.02 * sure[~gone].mean())

    found, plans = {}, {}
    for estimator in estimators:
        options = {"params": "last", "estimator": estimator}
        dag = chain(models, **ff.estimate_fishers(models, LOADER, **options))
        request = ff.ForgetRequest("u0", ff.estimate_fisher(models["u0"], only(TRAIN, label), **options))
        plans[estimator] = ff.plan(dag, [request])
        found[estimator] = ff.tune(dag, [request], score, points=points, lams=[0.01])
    best = {name: max(estimators, key=lambda e: found[e][name].score) for name in models}
    for estimator, plan in plans.items():
        nothing = ff.Choice(float("inf"), 1.0, 0.0)
        plan.set_values_({n: found[estimator][n] if best[n] == estimator else nothing for n in models})
        plan.run_()
    return {n: (best[n], found[best[n]][n].alpha, found[best[n]][n].lam) for n in models}


@pytest.mark.parametrize("label", [0, 2])
@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")
def test_it_does_what_a_user_did_by_hand(models, label):
    other, before = copy.deepcopy(models), copy.deepcopy(models)
    wanted = by_hand(other, label)
    dag, request = chain(models), ff.ForgetRequest("u0", data=only(TRAIN, label))
    outcome = ff.unlearn_(dag, [request], ff.ClassScore(CHECK, forget=label), points=12, **ENOUGH)
    assert {node.name: (node.estimator, node.alpha, node.lam) for node in outcome} == wanted
    assert same(models, other)
    for node in outcome:
        assert node.met
        assert node.before.left > 0.9
        assert (node.after.left, node.after.kept) == pytest.approx(accuracy(models[node.name], label, VALIDATION))
        assert node.selected == outcome.report[node.name].selected > 0
        left, kept = accuracy(models[node.name], label)
        assert left <= 0.05
        assert kept >= accuracy(before[node.name], label)[1] - 0.03
    outcome.undo_()
    assert same(models, before)
    with pytest.raises(ff.UndoError):
        outcome.undo_()


def test_two_kinds_of_fishers_are_one_launch(models):
    """The score wants one kind of Fishers at each node: the weights that dampening by it gives."""
    want, before = {"u0": "expected", "u1": "softened", "u2": "expected"}, copy.deepcopy(models)
    forget, goal = only(TRAIN, 1), {}
    for kind in DEFAULT:
        other, options = copy.deepcopy(models), {"params": "last", "estimator": kind}
        dag = chain(other, **ff.estimate_fishers(other, LOADER, **options))
        plan = ff.plan(dag, [ff.ForgetRequest("u0", ff.estimate_fisher(other["u0"], forget, **options))], alpha=0.0)
        middle = {name: grid[len(grid) // 2] for name, grid in default_grids(plan, 8).items()}
        plan.set_values_({name: ff.Choice(alpha, 0.1, 0.0) for name, alpha in middle.items()})
        plan.run_()
        goal |= {name: model[3].weight.detach() for name, model in other.items() if want[name] == kind}

    def score(name, model):
        return -(model[3].weight - goal[name]).abs().sum().item()

    outcome = ff.unlearn_(chain(models), [ff.ForgetRequest("u0", data=forget)], score, points=8, lams=[0.1])
    assert len(outcome.plan.parts) == 1
    assert {node.name: node.estimator for node in outcome} == want
    for node in outcome:
        assert node.met
        assert node.before is None
        assert node.after is None
        assert torch.equal(models[node.name][3].weight, goal[node.name])
    outcome.undo_()
    assert same(models, before)


@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")
def test_the_whole_model_is_tuned_layer_by_layer(models):
    other, kinds = copy.deepcopy(models), DEFAULT
    request, found = ff.ForgetRequest("u0", data=only(TRAIN, 1)), {}
    for kind in kinds:
        how = {"estimate": {"params": None, "estimator": kind}}
        found[kind] = ff.tune(chain(other), [request], ff.ClassScore(CHECK, forget=1), by="layer", points=8, **how)
    score, before = ff.ClassScore(CHECK, forget=1), copy.deepcopy(models)
    outcome = ff.unlearn_(chain(models), [request], score, params=None, points=8, left=1.0, lost=1.0)
    for node in outcome:
        assert list(node.alpha) == ["0.*", "1.*", "3.*"]
        assert node.numel == sum(p.numel() for p in models[node.name].parameters())
        best = max(kinds, key=lambda kind, name=node.name: found[kind][name].score)
        assert (node.estimator, node.alpha, node.lam) == (
            best,
            found[best][node.name].alpha,
            found[best][node.name].lam,
        )
        assert node.after.left < 0.1 * node.before.left
    assert "by layer" in str(outcome)
    json.dumps(outcome.to_dict())
    outcome.undo_()
    assert same(models, before)
    one = ff.unlearn_(chain(models), [request], score, params=None, by="node", points=4, left=1.0, lost=1.0)
    assert all(isinstance(node.alpha, float) for node in one)


def test_one_model(models):
    model, same_one = models["u0"], copy.deepcopy(models)
    data, forget = LOADER, only(TRAIN, 3)
    score = ff.ClassScore(CHECK, forget=[3])
    outcome = ff.unlearn_(model, data=data, forget=forget, score=score, points=12, **ENOUGH)
    assert [node.name for node in outcome] == ["model"]
    assert outcome["model"].after.left <= 0.05
    dag = ff.InheritanceDAG()
    dag.add_model("model", same_one["u0"], data=data)
    ff.unlearn_(dag, [ff.ForgetRequest("model", data=forget)], ff.ClassScore(CHECK, forget=[3]), points=12, **ENOUGH)
    assert same({"u0": model}, {"u0": same_one["u0"]})
    outcome.undo_()
    own, other = (ff.estimate_fisher(model, loader, params="last") for loader in (data, forget))
    again = ff.unlearn_(model, data=own, forget=other, score=score, points=12, **ENOUGH)
    assert again["model"].estimator == "batch"
    assert list(again.tuned) == ["batch"]


def test_merged_requests_from_two_origins(models):
    dag = chain(models)
    requests = [ff.ForgetRequest("u0", data=only(TRAIN, 0)), ff.ForgetRequest("u1", data=only(TRAIN, 1))]
    score = ff.ClassScore(CHECK, forget={"u0": [0], "u1": [0, 1], "u2": [0, 1]})
    outcome = ff.unlearn_(dag, requests, score, points=24, left=0.1, lost=0.1)
    assert outcome.report["u2"].sources[:2] == ("u0", "u1")
    assert not outcome.unmet
    for name in models:
        assert accuracy(models[name], 0)[0] <= 0.1
        assert (accuracy(models[name], 1)[0] > 0.8) == (name == "u0")


def test_each_loader_is_gone_over_once_for_all_nodes_and_estimators(models):
    class Counted:
        def __init__(self, batches):
            self.batches, self.times = batches, 0

        def __iter__(self):
            self.times += 1
            return iter(self.batches)

    data, forget, check = Counted(LOADER), Counted(only(TRAIN, 0)), Counted(CHECK)
    calls = dict.fromkeys(models, 0)
    for name, model in models.items():
        model[0].register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    dag = ff.InheritanceDAG()
    for k, name in enumerate(models):
        dag.add_model(name, models[name], data=data, parents=[f"u{k - 1}"] if k else [])
    request = ff.ForgetRequest("u0", data=forget)
    outcome = ff.unlearn_(dag, [request], ff.ClassScore(check, forget=0), points=8, **ENOUGH)
    assert (data.times, forget.times, check.times) == (1, 1, 3)
    features = (
        len(CHECK) + 1
    )  # of the validation data, and one batch to see that the last layer still makes the answers
    assert calls == {
        "u0": len(LOADER) + len(forget.batches) + features,
        "u1": len(LOADER) + features,
        "u2": len(LOADER) + features,
    }
    outcome.undo_()
    ff.unlearn_(dag, [request], ff.ClassScore(check, forget=0), points=8, **ENOUGH)
    assert (data.times, forget.times) == (1, 1), "what was estimated is kept"


def test_estimators_in_one_sweep_leave_out_the_batches_that_each_would_leave_out_alone(models):
    """A batch in which no label counts is nothing to `batch`, and a batch like others to `label_free`."""
    ignored = (LOADER[0][0], torch.full_like(LOADER[0][1], -100))
    found = {}
    for kind in ("batch", "expected", "label_free"):
        node = chain({"u0": models["u0"]}, u0=ff.estimate_fisher(models["u0"], LOADER, "last", estimator=kind))
        forget = [ignored, *only(TRAIN, 0)]
        alone = ff.estimate_fisher(models["u0"], forget, "last", estimator=kind)
        (found[kind],) = complete_for(node, [ff.ForgetRequest("u0", data=forget)], "last", [Options(estimator=kind)])
        assert torch.equal(found[kind].requests[0].fisher.buffer, alone.buffer)
        assert alone.provenance.steps == len(forget) - (kind != "label_free")
    request = ff.ForgetRequest("u0", data=[ignored, *only(TRAIN, 0)])
    together = complete_for(node, [request], "last", [Options(estimator=kind) for kind in found])
    for one, alone in zip(together, found.values(), strict=True):
        assert torch.equal(one.requests[0].fisher.buffer, alone.requests[0].fisher.buffer)
        assert one.requests[0].fisher.provenance == alone.requests[0].fisher.provenance


@pytest.mark.parametrize("samples", [None, 64])
def test_of_long_loaders_some_samples_will_do(models, samples):
    data, seen = batched(*TRAIN, size=4), []
    models["u0"].register_forward_hook(lambda _, given, out: seen.append(len(out)))
    score = ff.ClassScore(CHECK, forget=0)
    score.begin({"u0": models["u0"]})
    seen.clear()
    model = {"data": data, "forget": only(TRAIN, 0), "estimators": "expected"}
    ff.unlearn_(models["u0"], score=score, samples=samples, points=4, left=1.0, lost=1.0, **model)
    assert seen.count(4) == (16 if samples else 100)


def test_what_meets_no_bound_is_named_or_an_error_before_anything_changes(models):
    before = copy.deepcopy(models)
    args = {"points": 3, "lams": [1.0], "left": 0.0, "lost": 0.0, "estimators": "expected"}
    request = ff.ForgetRequest("u0", data=only(TRAIN, 0))
    with pytest.raises(ff.NotForgottenError, match=r"node 'u0': .* left of .*; node 'u1': .* No model has changed"):
        ff.unlearn_(chain(models), [request], ff.ClassScore(CHECK, forget=0), strict=True, **args)
    assert same(models, before)
    with pytest.warns(ff.TuningWarning, match="unlearn_: node 'u0': .* wanted at most 0 left and 0 lost"):
        outcome = ff.unlearn_(chain(models), [request], ff.ClassScore(CHECK, forget=0), **args)
    assert outcome.unmet[:2] == ["u0", "u1"]
    assert not outcome["u0"].met
    assert "not met: node 'u0': " in str(outcome)
    outcome.undo_()
    with pytest.raises(ff.NotForgottenError, match="node 'u0': no candidate beats leaving it alone, score 1"):
        ff.unlearn_(chain(models), [request], lambda name, model: 1.0, strict=True, points=2)
    assert same(models, before)


def test_what_meets_the_bound_is_taken_before_what_scores_higher(models):
    """A score that wants everything kept, whatever is left, still gives way to the bound."""

    class Lazy(ff.ClassScore):
        def loss(self, seen, before):
            return super().loss(seen, before) + 10 * (seen.left < 0.5)

    request = ff.ForgetRequest("u0", data=only(TRAIN, 0))
    outcome = ff.unlearn_(chain(models), [request], Lazy(CHECK, forget=0), points=12, left=0.02, lost=0.05)
    assert all(node.met and node.after.left <= 0.02 for node in outcome)


@pytest.mark.parametrize("params", ["last", None])
@pytest.mark.parametrize("last", [{}, None])
def test_a_score_whose_call_notes_nothing_is_judged_by_what_it_looks_at(models, params, last):
    class Own(ff.ClassScore):
        def __call__(self, name, model):
            return -self.loss(self.look(name, model), self.before[name])

    request, start, found = ff.ForgetRequest("u0", data=only(TRAIN, 0)), copy.deepcopy(models), []
    for kind in (Own, ff.ClassScore):
        score = kind(CHECK, forget=0)
        score.last = {} if kind is ff.ClassScore else last
        outcome = ff.unlearn_(chain(models), [request], score, points=6, params=params, **ENOUGH)
        found.append(outcome.to_dict() | {"seconds": 0, "report": 0})
        assert all(node.met and node.before.left > 0.9 > node.after.left for node in outcome)
        outcome.undo_()
    assert found[0] == found[1]
    how = {"points": 2, "lams": [1.0], "left": 0.0, "lost": 0.0, "strict": True}
    with pytest.raises(ff.NotForgottenError, match="node 'u0': .* left of .* wanted at most 0 left and 0 lost"):
        ff.unlearn_(chain(models), [request], Own(CHECK, forget=0), **how)
    assert same(models, start)


def test_some_fishers_given(models):
    given = ff.estimate_fisher(models["u1"], LOADER, params="last", estimator="sample")
    request = ff.ForgetRequest("u0", data=only(TRAIN, 0))
    outcome = ff.unlearn_(chain(models, u1=given), [request], ff.ClassScore(CHECK, forget=0), points=12, **ENOUGH)
    assert {node.estimator for node in outcome} == {"sample"}
    with pytest.raises(ff.ArgumentError, match="estimate has 'params', which is an argument of unlearn_"):
        ff.unlearn_(chain(models), [request], ff.ClassScore(CHECK, forget=0), estimate={"params": None})


def test_options_that_an_estimator_does_not_take_are_left_out_for_it(models):
    request, seen = ff.ForgetRequest("u0", data=only(TRAIN, 0)), []

    def loss_fn(outputs, targets):
        seen.append(len(targets))
        return nn.functional.cross_entropy(outputs, targets)

    score = ff.ClassScore(CHECK, forget=0)
    kinds = (*DEFAULT, "batch", "sample", "label_free")
    outcome = ff.unlearn_(
        chain(models), [request], score, points=6, estimators=kinds, estimate={"loss_fn": loss_fn}, left=0.1, lost=0.1
    )
    assert seen
    assert list(outcome.tuned) == list(kinds)


def test_what_is_said(models):
    request = ff.ForgetRequest("u1", data=only(TRAIN, 0))
    outcome = ff.unlearn_(chain(models), [request], ff.ClassScore(CHECK, forget=0), points=8, **ENOUGH)
    lines = str(outcome).splitlines()
    assert lines[0].split() == ["node", "Fishers", "alpha", "lambda", "selected", "left", "kept", "score"]
    assert [line.split()[0] for line in lines[2:4]] == ["u1", "u2"]
    assert "% → " in lines[2]
    assert lines[-1].startswith("Fishers ")
    assert set(outcome.seconds) == {"Fishers", "choosing", "run"}
    assert all(seconds > 0 for seconds in outcome.seconds.values())
    plain = json.loads(json.dumps(outcome.to_dict()))
    assert [node["name"] for node in plain["nodes"]] == ["u1", "u2"]
    assert plain["nodes"][0]["after"]["left"] == outcome["u1"].after.left
    assert plain["report"]["nodes"][0]["selected"] == outcome["u1"].selected
    assert repr(outcome) == "Outcome(2 nodes, 2 within the bound)"
    with pytest.raises(ff.DagError, match="no node 'u0' among those reached: u1, u2"):
        outcome["u0"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda dag, r, s: ff.unlearn_(dag, score=s), "requests are missing"),
        (lambda dag, r, s: ff.unlearn_(dag, r), "score is missing"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, data=[]), "data= and forget= are for one model"),
        (lambda dag, r, s: ff.unlearn_(dag["u0"].model, r, s), "requests are for a DAG"),
        (lambda dag, r, s: ff.unlearn_(dag["u0"].model, data=LOADER, score=s), "forget is missing: for one model pass"),
        (lambda dag, r, s: ff.unlearn_("u0", r, s), "dag is a str, expected an InheritanceDAG or a module"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, estimators=["bathc"]), "estimator is 'bathc', expected one of batch"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, estimators=[]), "estimators is empty"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, left=-0.1), "left is -0.1, expected a finite number"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, estimate={"lossfn": 1}), "estimate has 'lossfn'"),
        (lambda dag, r, s: ff.unlearn_(dag, r, lambda model: 0), "score takes"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, estimators=3), "estimators is a int, expected some of batch"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, estimators=[["batch"]]), "estimator is .*batch.*, expected one of"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, estimate={"group": None}), "estimate has 'group', expected keywords"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, by=""), "by is '', expected one of node, layer"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, points=0), "points is 0, expected a whole number"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, lams=[]), "lams is empty"),
        (lambda dag, r, s: ff.unlearn_(dag, r, s, lams=0.1), "lams is a float, expected numbers"),
        (
            lambda dag, r, s: ff.unlearn_(dag, r, ff.ClassScore(CHECK, forget=9)),
            "node 'u0': none of its 200 samples are",
        ),
        (lambda dag, r, s: ff.unlearn_(dag, r, ff.ClassScore([], forget=0)), "validation data of node 'u0': "),
    ],
)
def test_arguments(grown, call, match, monkeypatch):
    def early(*arguments, **options):
        raise AssertionError("arguments are checked before the loaders are gone over")

    before = copy.deepcopy(grown)
    monkeypatch.setattr(estimating, "sweep", early)
    with pytest.raises(ff.FiunError, match=match):
        call(chain(grown), [ff.ForgetRequest("u0", data=LOADER)], ff.ClassScore(CHECK, forget=0))
    assert same(grown, before)


def test_what_can_be_gone_over_once_serves_every_model_and_estimator(models):
    requests, score = [ff.ForgetRequest("u0", data=only(TRAIN, 0))], ff.ClassScore(CHECK, forget=0)
    chosen = []
    for form in (list, iter):
        how = {"params": form(["3.weight", "3.bias"]), "lams": form([0.1, 0.01]), "points": 4}
        outcome = ff.unlearn_(chain(models), requests, score, **how, left=1, lost=1)
        chosen.append([(node.name, node.estimator, node.alpha, node.lam, node.score) for node in outcome])
        outcome.undo_()
    assert chosen[0] == chosen[1]
    both = {"a": models["u0"], "b": models["u1"]}
    for fisher in ff.estimate_fishers(both, LOADER, iter(["3.bias"])).values():
        assert fisher.layout.names == ("3.bias",)


@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")
def test_a_score_without_end_is_plain_data(models):
    request = ff.ForgetRequest("u0", data=only(TRAIN, 0))
    outcome = ff.unlearn_(chain(models), [request], lambda name, model: float("-inf"), points=2)
    assert json.loads(json.dumps(outcome.to_dict(), allow_nan=False))["nodes"][0]["score"] is None


def test_an_error_after_the_run_takes_it_back(models):
    class Falls(ff.ClassScore):
        def look(self, name, model):
            if ended and name == "u1":
                raise KeyboardInterrupt
            return super().look(name, model)

    before, ended = copy.deepcopy(models), []

    score = Falls(CHECK, forget=0)
    run_ = ff.Plan.run_

    def run(self, **options):
        report = run_(self, **options)
        if options.get("undo"):
            ended.append(report)
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ff.Plan, "run_", run)
        with pytest.raises(KeyboardInterrupt):
            ff.unlearn_(chain(models), [ff.ForgetRequest("u0", data=only(TRAIN, 0))], score, points=6, **ENOUGH)
    assert ended
    assert ended[0]["u1"].selected > 0
    assert same(models, before)
