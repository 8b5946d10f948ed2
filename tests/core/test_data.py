"""Data in the place of Fishers: estimated when needed, once, in one sweep over what is shared, and kept."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from small import batches, net
from torch import nn

import fiun_fast as ff

pytestmark = pytest.mark.usefixtures("one_thread")


class Counted:
    """A loader that counts how often it is gone over."""

    def __init__(self, batches: list) -> None:
        self.batches, self.times = batches, 0

    def __iter__(self):
        self.times += 1
        return iter(self.batches)


class BodyWithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("a backward ran through the body")


class HeadOnly(nn.Module):
    forwards = 0

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        HeadOnly.forwards += 1
        return self.head(BodyWithoutBackward.apply(self.body(x)).tanh())


def family(**first) -> ff.InheritanceDAG:
    """u0, and u1 that was made of it; their Fishers and data are given."""
    dag = ff.InheritanceDAG()
    dag.add_model("u0", net(0), **first)
    dag.add_model("u1", net(1), parents=["u0"], **first)
    return dag


@pytest.fixture
def shared() -> Counted:
    return Counted(batches(5, seed=1))


def test_a_plan_is_that_of_fishers_estimated_by_hand(shared):
    forget = batches(2, seed=2)
    dag, same = family(data=shared), ff.InheritanceDAG()
    for name, parents in (("u0", []), ("u1", ["u0"])):
        fisher = ff.estimate_fisher(dag[name].model, shared, params="last")
        same.add_model(name, copy.deepcopy(dag[name].model), fisher=fisher, parents=parents)
    by_hand = ff.estimate_fisher(dag["u0"].model, forget, params="last")
    shared.times = 0
    report = ff.plan(dag, [ff.ForgetRequest("u0", data=forget)], alpha=0.5).run_()
    wanted = ff.plan(same, [ff.ForgetRequest("u0", by_hand)], alpha=0.5).run_()
    assert shared.times == 1, "two nodes, one loader, one sweep"
    assert {n.name: n.selected for n in report} == {n.name: n.selected for n in wanted}
    assert 0 < report.selected < report.numel
    for name in dag:
        pairs = zip(dag[name].model.parameters(), same[name].model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")
def test_what_was_estimated_is_kept_for_plan_and_tune(shared):
    dag, forget = family(data=shared), Counted(batches(2, seed=2))
    request = ff.ForgetRequest("u0", data=forget)

    def score(name, model):
        return -sum(p.square().sum().item() for p in model.parameters())

    chosen = ff.tune(dag, [request], score, alphas=[3.0, 1.0], lams=[0.1])
    plan = ff.plan(dag, [request])
    plan.set_values_(chosen)
    plan.run_()
    ff.plan(dag, [request]).run_()  # dampened models have the original Fisher that they had
    assert (shared.times, forget.times) == (1, 1)
    ff.plan(dag, [request], estimate={"estimator": "expected"})
    assert (shared.times, forget.times) == (2, 2)
    ff.plan(dag, [request], estimate={"params": None})
    ff.plan(dag, [request], estimate={"params": "*"})  # the same parameters
    assert (shared.times, forget.times) == (3, 3)


@pytest.mark.parametrize("change", ["body", "buffer", "module", "data"])
def test_a_model_that_was_trained_is_estimated_anew(shared, change):
    dag = ff.InheritanceDAG()
    torch.manual_seed(0)
    dag.add_model("u0", nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)), data=shared)
    request = ff.ForgetRequest("u0", data=Counted(batches(2, seed=2)))
    first = ff.plan(dag, [request], alpha=0.0).profile()["u0"].counts
    ff.plan(dag, [request])
    assert shared.times == 1
    if change == "body":
        with torch.no_grad():
            dag["u0"].model[0].weight.mul_(2.0)
    elif change == "buffer":
        dag["u0"].model(torch.randn(8, 6) * 5)
    elif change == "module":
        dag["u0"].model[3] = nn.Linear(5, 3)
    else:
        dag["u0"].data = batches(4, seed=9)
    again = ff.plan(dag, [request], alpha=0.0).profile()["u0"].counts
    assert shared.times == (1 if change == "data" else 2)
    assert list(first) != list(again)
    dag["u0"].estimates.clear()
    ff.plan(dag, [request])
    assert request.data.times == 1 + (change != "data")


def test_a_head_is_estimated_without_a_backward(monkeypatch):
    model = HeadOnly()
    monkeypatch.setattr(HeadOnly, "forwards", 0)
    dag = ff.InheritanceDAG()
    dag.add_model("u0", model, data=batches(5, seed=1))
    request = ff.ForgetRequest("u0", data=batches(2, seed=2))
    ff.plan(dag, [request], estimate={"estimator": "expected"})
    ff.plan(dag, [request])
    assert model.forwards == 14
    with pytest.raises(ff.EstimationError, match="a backward ran through the body"):
        ff.plan(dag, [request], estimate={"params": None})


def test_fishers_that_are_given_are_used_as_they_are(shared):
    model = net(0)
    given = ff.estimate_fisher(model, batches(3, seed=5))  # of all parameters
    dag = ff.InheritanceDAG()
    dag.add_model("u0", model, fisher=given, data=shared)
    dag.add_model("u1", net(1), data=shared, parents=["u0"])
    plan = ff.plan(dag, [ff.ForgetRequest("u0", data=batches(2, seed=2))], alpha=0.0)
    assert shared.times == 1
    assert len(dag["u0"].estimates) == 0
    assert plan.run_(dry_run=True)["u1"].numel == given.numel, "the others are over the same parameters"


def test_options_go_to_the_estimate(shared):
    dag, seen = family(data=shared), []

    def loss_fn(outputs, targets):
        seen.append(len(targets))
        return nn.functional.cross_entropy(outputs, targets) * 3

    request = ff.ForgetRequest("u0", data=batches(2, seed=2))
    plain = ff.plan(dag, [request], alpha=0.0)
    scaled = ff.plan(dag, [request], alpha=0.0, estimate={"loss_fn": loss_fn, "params": "last"})
    assert seen
    assert plain.profile()["u1"].counts.tolist() == scaled.profile()["u1"].counts.tolist()  # ratios are the same
    ff.plan(dag, [request], estimate={"progress": True, "seed": 3, "estimator": "expected", "backend": "reference"})
    with pytest.raises(ff.ArgumentError, match=r"estimate has 'estimators', expected keywords of estimate_fisher: par"):
        ff.plan(dag, [request], estimate={"estimators": ("batch",)})
    with pytest.raises(ff.ArgumentError, match="estimate is a str"):
        ff.plan(dag, [request], estimate="batch")


def test_an_iterator_serves_once_and_says_so_then():
    dag = family(data=iter(batches(3, seed=1)))
    dag["u1"].data = batches(3, seed=1)
    request = ff.ForgetRequest("u0", data=(batch for batch in batches(2, seed=2)))
    ff.plan(dag, [request])
    ff.plan(dag, [request])  # kept
    with pytest.raises(
        ff.EstimationError,
        match=r"data of node 'u0': the loader is empty: .*iterator can be gone over once: pass a list or a DataLoader",
    ):
        ff.plan(dag, [request], estimate={"estimator": "expected"})


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (ff.ForgetRequest("u0"), r"request 0 \('u0'\) has no Fisher and no data: pass fisher=, or data="),
        (ff.ForgetRequest("u0", data=[]), r"data of request 0 \('u0'\): the loader is empty"),
        (ff.ForgetRequest("u0", data=3), r"data of request 0 \('u0'\): loader is a int, expected an iterable of batch"),
        (ff.ForgetRequest("u0", data=[(torch.zeros(2, 6), "a")]), r"data of request 0 \('u0'\): batch 0: the targets"),
    ],
)
def test_errors_say_whose_data_it_is(shared, request_, match):
    dag = family(data=shared)
    before = copy.deepcopy(dag["u0"].model.state_dict())
    with pytest.raises(ff.FiunError, match=match):
        ff.plan(dag, [request_])
    assert all(torch.equal(value, before[key]) for key, value in dag["u0"].model.state_dict().items())


def test_no_log_shows_what_is_to_be_forgotten(shared):
    secret = [(torch.full((2, 6), 12.25), torch.tensor([0, 1]))]
    dag = family(data=secret)
    assert "12.25" not in repr(ff.ForgetRequest("u0", data=secret)) + repr(dag["u0"])


def test_models_and_fishers_in_the_wrong_place(shared):
    dag, fisher = ff.InheritanceDAG(), ff.estimate_fisher(net(0), shared)
    with pytest.raises(ff.ArgumentError, match="node 'u0': data is a Fisher, expected a loader"):
        dag.add_model("u0", net(0), data=fisher)
    dag.add_model("u0", dict(net(0).state_dict()), data=shared)
    with pytest.raises(ff.ArgumentError, match="data of node 'u0': the model of node 'u0' is a dict of tensors"):
        ff.plan(dag, [ff.ForgetRequest("u0", fisher)])
    with pytest.raises(ff.ArgumentError, match="has a Fisher as data"):
        ff.plan(dag, [ff.ForgetRequest("u0", data=fisher)])
    dag = family()
    with pytest.raises(ff.ArgumentError, match=r"no original Fisher: .*add_model\(…, data=loader\)"):
        ff.plan(dag, [ff.ForgetRequest("u0", fisher)])


def test_copies_estimate_anew(shared):
    dag = family(data=shared)
    request = ff.ForgetRequest("u0", data=batches(2, seed=2))
    ff.plan(dag, [request])
    other, same = copy.deepcopy((dag, request))
    assert len(other["u0"].estimates) == len(same.estimates) == 0
    assert len(dag["u0"].estimates) == 1
    ff.plan(other, [same])
    assert len(pickle.loads(pickle.dumps(request)).estimates) == 0


@pytest.mark.parametrize("params", ["last", None])
def test_several_estimators_in_one_sweep_give_what_each_gives_alone(params):
    from fiun_fast.estimators.estimate import Wanted, sweep
    from fiun_fast.estimators.job import Options

    data, kinds = Counted(batches(4, seed=3)), ("expected", "batch", "sample")
    models = {"a": net(0), "b": net(1)}
    found = sweep({name: Wanted(m, params, [Options(kind) for kind in kinds]) for name, m in models.items()}, data)
    assert data.times == 1
    for name, model in models.items():
        for kind, fisher in zip(kinds, found[name], strict=True):
            alone = ff.estimate_fisher(model, data, params, estimator=kind)
            assert torch.equal(fisher.buffer, alone.buffer), (name, kind)
            assert fisher.provenance == alone.provenance
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_loader_that_refills_one_batch_is_seen_anew_each_time():
    class Refilled:
        def __iter__(self):
            batch = [torch.empty(4, 6), torch.empty(4, dtype=torch.int64)]
            for x, y in batches(3, seed=3):
                batch[0].copy_(x)
                batch[1].copy_(y)
                yield batch

    dag = ff.InheritanceDAG()
    dag.add_model("u0", net(0), data=Refilled())
    request = ff.ForgetRequest("u0", data=batches(1, seed=4))
    found = ff.plan(dag, [request], alpha=0.0).profile()["u0"].counts
    dag["u0"].data = batches(3, seed=3)
    assert found.tolist() == ff.plan(dag, [request], alpha=0.0).profile()["u0"].counts.tolist()


@pytest.mark.parametrize(
    ("count", "size", "samples"), [(40, 4, 100), (40, 4, 10), (20, 64, 1024), (10, 1, 5), (97, 3, 150)]
)
def test_some_of_a_loader_is_spread_over_all_of_it(count, size, samples):
    from fiun_fast.estimating import FEWEST, some

    loader = [(torch.full((size, 2), float(k)), torch.zeros(size, dtype=torch.int64)) for k in range(count)]
    taken = [int(x[0, 0]) for x, _ in some(loader, samples)]
    assert len(taken) == min(count, max(FEWEST, -(-samples // size)))
    assert taken == sorted(set(taken))
    steps = [b - a for a, b in zip(taken, [*taken[1:], count], strict=True)]
    assert max(steps) - min(steps) <= 1
    assert some(iter(loader), samples) is not None
    lengthless = (batch for batch in loader)
    assert some(lengthless, samples) is lengthless


ANY = lambda name, model: 0.0


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        *(
            (partial(call, **{what: value}), error, match)
            for what, value, error, match in (
                ("merge", "min", ff.ArgumentError, "merge is 'min', expected one of max"),
                ("on_mismatch", "warn", ff.ArgumentError, "on_mismatch is 'warn', expected one of error, skip"),
                ("scale", -1.0, ff.ArgumentError, "scale is -1.0, expected a finite number"),
                ("backend", "gpu", ff.BackendError, "unknown backend 'gpu'; known are reference"),
                ("backend", "cuda", ff.BackendError, "backend 'cuda' cannot be used for cpu tensors"),
            )
            for call in (
                ff.plan,
                partial(ff.tune, evaluate=ANY),
                partial(ff.search_alpha, evaluate=ANY),
                partial(ff.unlearn_, score=ANY),
            )
        ),
        (partial(ff.plan, exponent="1"), ff.ArgumentError, "exponent is a str"),
        (partial(ff.plan, cap=float("nan")), ff.ArgumentError, "cap is nan"),
        (partial(ff.plan, alpha=-1.0), ff.ArgumentError, "alpha is -1.0"),
        (partial(ff.plan, alpha=None), ff.ArgumentError, "alpha is a NoneType"),
        (partial(ff.plan, alpha="best"), ff.ArgumentError, "alpha is a str, 'best'"),
        (partial(ff.plan, alpha={"u0": 1.0}), ff.ArgumentError, "alpha has no value for node 'u1'"),
        (partial(ff.plan, lam={"u0": 1.0, "u1": {"*": -1.0}}), ff.ArgumentError, r"lam\['u1'\]\['\*'\] is -1"),
        (partial(ff.plan, lam={"u0": 1.0, "u1": 1.0, "u2": 1.0}), ff.ArgumentError, "'u2', which is no node"),
        (partial(ff.plan, forget_fraction=0.1), ff.ArgumentError, "forget_fraction is for"),
        (partial(ff.plan, alpha="auto", forget_fraction=2.0), ff.ArgumentError, "forget_fraction is 2"),
        (partial(ff.plan, alpha="auto", forget_fraction={"u0": 0.1}), ff.ArgumentError, "no value for node 'u1'"),
        (partial(ff.tune, evaluate=ANY, by="model"), ff.ArgumentError, "by is 'model'"),
        (partial(ff.tune, evaluate=ANY, points=0), ff.ArgumentError, "points is 0"),
        (partial(ff.tune, evaluate=ANY, slack=-1), ff.ArgumentError, "slack is -1"),
        (partial(ff.tune, evaluate=ANY, lams=[]), ff.ArgumentError, "lams is empty"),
        (partial(ff.tune, evaluate=ANY, alphas={"u0": [1.0]}), ff.ArgumentError, "alphas has no grid for node 'u1'"),
        (partial(ff.tune, evaluate=ANY, alphas=[1.0], by="layer"), ff.ArgumentError, "alphas are of whole nodes"),
    ],
)
def test_arguments_are_checked_before_any_loader_is_gone_over(shared, call, error, match):
    with pytest.raises(error, match=match):
        call(family(data=shared), [ff.ForgetRequest("u0", data=shared)])
    assert shared.times == 0


def test_a_node_with_neither_fisher_nor_data_is_named_before_any_loader_is_gone_over(shared):
    dag = family(data=shared)
    dag.add_model("u2", net(2), parents=["u1"])
    for call in (ff.plan, partial(ff.unlearn_, score=ANY)):
        with pytest.raises(ff.ArgumentError, match="node 'u2': a request reaches it, but it has no original Fisher"):
            call(dag, [ff.ForgetRequest("u0", data=shared)])
    assert shared.times == 0


def test_a_model_on_meta_is_told_from_a_backend_that_does_not_work(shared):
    dag = ff.InheritanceDAG()
    dag.add_model("u0", net(0).to("meta"), data=shared)
    for call in (ff.plan, partial(ff.unlearn_, score=ANY)):
        with pytest.raises(ff.DeviceError, match="it is on meta"):
            call(dag, [ff.ForgetRequest("u0", data=shared)])


@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")
def test_grids_may_be_iterators(shared):
    found = []
    for form in (list, iter):
        how = {"alphas": {name: form([0.0, 0.1]) for name in ("u0", "u1")}, "lams": form([0.1, 0.01])}
        requests = form([ff.ForgetRequest("u0", data=shared)])
        found.append(
            ff.tune(family(data=shared), requests, lambda name, model: float(model[2].bias.detach().sum()), **how)
        )
    assert found[0].points == found[1].points
    assert all(len(points) > 1 for points in found[0].points.values())
