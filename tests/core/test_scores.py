"""`ClassScore` against the obvious loop, and that what it keeps of a model is never stale."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fiun_fast as ff
from fiun_fast.answering import Answering
from fiun_fast.scores import Score, Seen

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = 4


class Counter:
    """How often a body ran."""

    calls = 0


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x):
        Counter.calls += 1
        return self.drop(self.norm(self.first(x)).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))


class Scaled(Net):
    def forward(self, x):
        return super().forward(x) * torch.tensor([1.0, 2.0, 0.5, 3.0])


class Clamped(Net):
    """Small logits are as the head gave them."""

    def forward(self, x):
        return super().forward(x).clamp(-4, 4)


class ClampedInPlace(Net):
    def forward(self, x):
        return super().forward(x).clamp_(-4, 4)


class Twice(Net):
    def forward(self, x):
        features = self.body(x)
        return self.head(features) + 0.0 * self.head(-features)


class Feeding(Net):
    """What goes into the head depends on the head."""

    def forward(self, x):
        return self.head(self.body(x) + self.head.weight.sum())


class Deep(nn.Module):
    """A tail that writes to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.tail = nn.Sequential(nn.Hardswish(inplace=True), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES))

    def forward(self, x):
        return self.tail(self.body(x))


def trained(kind: Callable[[], nn.Module] = Net, seed: int = 0) -> nn.Module:
    """With running statistics that are not those of a fresh BatchNorm."""
    torch.manual_seed(seed)
    model = kind()
    model.train()(torch.randn(64, 6) * 2 + 1)
    return model.train()


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(53, 6, generator=generator), torch.randint(CLASSES, (53,), generator=generator)


@pytest.fixture
def loader(data) -> list:
    return [(x, y) for x, y in zip(data[0].split(16), data[1].split(16), strict=True)]


def by_hand(model: nn.Module, data, gone) -> tuple[float, float, float, float]:
    """Sample after sample, in float64."""
    model = copy.deepcopy(model).double().eval()
    right, sure = {True: [], False: []}, {True: [], False: []}
    for x, y, marked in zip(*data, gone, strict=True):
        with torch.no_grad():
            (z,) = model(x[None].double())
        right[bool(marked)].append(float(z.argmax() == y))
        sure[bool(marked)].append(float(z.exp()[y] / z.exp().sum()))
    return tuple(sum(v) / len(v) for kind in (right, sure) for v in (kind[True], kind[False]))


def seen(score: ff.ClassScore, model: nn.Module, name: str = "u0") -> tuple[float, ...]:
    found = score.look(name, model)
    return found.left, found.kept, found.sure_left, found.sure_kept


@pytest.mark.parametrize("kind", [Net, Scaled, Clamped, ClampedInPlace, Twice, Feeding, Deep])
def test_it_sees_what_the_obvious_loop_sees_whatever_changes(kind, data, loader):
    model, gone = trained(kind), data[1] == 2
    score = ff.ClassScore(loader, forget=2)
    last = model.tail[3] if kind is Deep else model.head

    def check():
        assert seen(score, model) == pytest.approx(by_hand(model, data, gone), abs=1e-6)

    check()
    for factor in (0.5, -1.0, 100.0, 0.003):
        with torch.no_grad():
            last.weight.mul_(factor)
        check()
    with torch.no_grad():
        model.body.first.bias.add_(1.0)
    check()
    with torch.no_grad():
        last.bias[2] -= 5
    check()
    model(torch.randn(32, 6) + 3)  # in training mode: running statistics move
    check()


def test_the_rule(data, loader):
    model, gone = trained(), data[1] == 2
    score, plain = ff.ClassScore(loader, forget=[2]), ff.ClassScore(loader, forget=[2], margins=(0, 0))
    before = by_hand(model, data, gone)
    assert score("u0", model) == pytest.approx(-(before[0] + 0.1 * before[2] - 0.02 * before[3]), abs=1e-6)
    plain("u0", model)
    with torch.no_grad():
        model.head.bias[2] += 3
    after = by_hand(model, data, gone)
    lost = before[1] - after[1]
    assert lost > 0
    assert score("u0", model) == pytest.approx(-(after[0] + lost + 0.1 * after[2] - 0.02 * after[3]), abs=1e-6)
    assert plain("u0", model) == pytest.approx(-(after[0] + lost), abs=1e-6)
    assert (score.before["u0"].kept, score.last["u0"].kept) == pytest.approx((before[1], after[1]))
    with torch.no_grad():
        model.head.bias[2] -= 6  # the rest may gain: that counts for nothing beside the margins
    assert plain("u0", model) == pytest.approx(
        -(score.look("u0", model).left + max(0, before[1] - score.look("u0", model).kept))
    )
    score.begin({"u0": model})
    assert score.before["u0"] == score.look("u0", model)


def test_only_the_last_layer_runs_while_only_it_changes(loader, monkeypatch):
    model, score = trained(), ff.ClassScore(loader, forget=2)
    monkeypatch.setattr(Counter, "calls", 0)
    score("u0", model)
    assert Counter.calls == len(loader)
    for _ in range(5):
        with torch.no_grad():
            model.head.weight.mul_(0.9)
        score("u0", model)
    assert Counter.calls == len(loader) + 1, "one batch more, to see that the tail still fits"
    whole = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = torch.cat([whole(x) for x, _ in loader])
    found = Answering(model, loader, lambda _, y: y == 2, "data")
    found()
    assert torch.equal(
        found().logits, torch.nn.functional.linear(found._kept.given[0], model.head.weight, model.head.bias)
    )
    assert torch.allclose(found().logits, logits, atol=1e-6)


def test_what_was_written_and_taken_back_costs_nothing(data, loader, monkeypatch):
    """As the layers before the last are, while only that one is tried out of a plan for all."""
    model, score = trained(), ff.ClassScore(loader, forget=2)
    score("u0", model)
    weight, scale = model.body.first.weight, (1 + torch.rand(8, 1)).detach()
    old = weight.detach().clone()
    monkeypatch.setattr(Counter, "calls", 0)
    found = []
    for _ in range(3):
        with torch.no_grad():
            weight.mul_(scale)
            weight.copy_(old)
        found.append(seen(score, model))
    assert Counter.calls == 0
    assert found == [pytest.approx(by_hand(model, data, data[1] == 2), abs=1e-6)] * 3
    with torch.no_grad():
        weight.mul_(scale)
    assert seen(score, model) == pytest.approx(by_hand(model, data, data[1] == 2), abs=1e-6)


def test_a_tail_of_several_layers_runs_alone_too(loader, monkeypatch):
    model, score = trained(Deep), ff.ClassScore(loader, forget=2)
    score("u0", model)
    with torch.no_grad():
        model.tail[1].weight.mul_(0.5)
    score("u0", model)  # the tail grows to all of `tail`
    monkeypatch.setattr(Counter, "calls", 0)
    for _ in range(3):
        with torch.no_grad():
            model.tail[1].weight.mul_(0.9)
        score("u0", model)
    assert Counter.calls == 1


CHANGES = {
    "written to": lambda model: model.body.first.weight.data_ptr() and model.body.first.weight.detach().mul_(2),
    "order of rows": lambda model: model.body.first.weight.copy_(model.body.first.weight.flip(0)),
    "buffer": lambda model: model.body.norm.running_mean.add_(1),
    "parameter replaced": lambda model: setattr(model.body.first, "bias", nn.Parameter(torch.full((8,), 2.0))),
    "module replaced": lambda model: setattr(model.body, "norm", nn.Identity()),
    "memory replaced": lambda model: setattr(model.body.first.weight, "data", model.body.first.weight.data * 3),
    "head replaced": lambda model: setattr(model, "head", nn.Linear(8, CLASSES)),
    "attribute": lambda model: setattr(model.body.norm, "eps", 5.0),
    "forward": lambda model: setattr(model.body, "forward", lambda x: model.body.first(x).relu()),
    "hook": lambda model: model.body.register_forward_hook(lambda _, given, out: out * 2),
    "hook on the head": lambda model: model.head.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
    "head's hook": lambda model: model.head.register_forward_hook(lambda _, given, out: out * torch.arange(4.0)),
    "loaded": lambda model: model.load_state_dict(trained(seed=5).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_seen_after(change, data, loader):
    model, score = trained(), ff.ClassScore(loader, forget=2)
    for _ in range(2):
        with torch.no_grad():
            model.head.bias.mul_(0.9)
        before = seen(score, model)
    with torch.no_grad():
        CHANGES[change](model)
    wanted = ff.ClassScore(loader, forget=2)
    assert seen(score, model) == pytest.approx(seen(wanted, model), abs=1e-6)
    assert seen(score, model) != pytest.approx(before, abs=1e-6)
    if change not in ("forward", "hook", "hook on the head", "head's hook"):  # which a copy has of the original
        assert seen(score, model) == pytest.approx(by_hand(model, data, data[1] == 2), abs=1e-6)


def test_a_model_is_left_as_it_was(loader):
    model = trained()
    model.body.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    ff.ClassScore(loader, forget=2)("u0", model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not model.head._forward_pre_hooks


def test_classes_by_node_a_function_and_loaders_by_node(data, loader):
    models = {"u0": trained(seed=0), "u1": trained(seed=1)}
    score = ff.ClassScore(loader, forget={"u0": [1, 3], "u1": torch.tensor([0])})
    for name, gone in (("u0", (data[1] == 1) | (data[1] == 3)), ("u1", data[1] == 0)):
        assert seen(score, models[name], name) == pytest.approx(by_hand(models[name], data, gone), abs=1e-6)
    score = ff.ClassScore(loader, forget=lambda x, y: (x[:, 0] > 0) & (y < 3))
    gone = (data[0][:, 0] > 0) & (data[1] < 3)
    assert seen(score, models["u0"]) == pytest.approx(by_hand(models["u0"], data, gone), abs=1e-6)
    score = ff.ClassScore(
        {"u0": loader[:2], "u1": DataLoader(TensorDataset(*data), batch_size=9, shuffle=True)}, forget=2
    )
    some = tuple(torch.cat(parts) for parts in zip(*loader[:2], strict=True))
    assert seen(score, models["u0"]) == pytest.approx(by_hand(models["u0"], some, some[1] == 2), abs=1e-6)
    assert seen(score, models["u1"], "u1") == pytest.approx(by_hand(models["u1"], data, data[1] == 2), abs=1e-6)


def test_labels_that_do_not_count_are_left_out(data, loader):
    model = trained()
    holes = [(x, torch.where(torch.arange(len(y)) % 3 == 0, -100, y)) for x, y in loader]
    kept = torch.cat([torch.arange(len(y)) % 3 != 0 for _, y in loader])
    some = data[0][kept], data[1][kept]
    score = ff.ClassScore(holes, forget=2)
    for _ in range(2):
        assert seen(score, model) == pytest.approx(by_hand(model, some, some[1] == 2), abs=1e-6)
        with torch.no_grad():
            model.head.weight.mul_(-0.7)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        (lambda data: (iter(data), 2), ff.ArgumentError, "loader is a list_iterator, which can be gone over once"),
        (lambda data: ({"u0": (b for b in data)}, 2), ff.ArgumentError, r"loader\['u0'\] is a generator"),
        (lambda data: (3, 2), ff.ArgumentError, "loader is a int, expected a loader"),
        (lambda data: (data, "3"), ff.ArgumentError, "forget is a str"),
        (lambda data: (data, [1.5]), ff.ArgumentError, "forget holds 1.5, expected classes"),
        (lambda data: (data, {"u0": [True]}), ff.ArgumentError, r"forget\['u0'\] holds True"),
        (lambda data: (data, lambda x: x), ff.ArgumentError, r"forget takes \(x\) and is called as forget\(x, y\)"),
        (lambda data: (data, {"u1": [2]}), ff.ArgumentError, "forget has no classes for node 'u0'; it has them for u1"),
        (lambda data: ({"u1": data}, 2), ff.ArgumentError, "no validation data for node 'u0'; there are some for u1"),
        (lambda data: (data, lambda x, y: y), ff.ArgumentError, r"gave int64 \[16\], expected bool \[16\]"),
        (lambda data: (data, lambda x, y: "some"), ff.ArgumentError, r"gave a str, expected bool \[16\]"),
        (lambda data: (data, lambda x, y: None), ff.ArgumentError, r"gave a NoneType, expected bool \[16\]"),
        (lambda data: (data, torch.tensor(1.5)), ff.ArgumentError, "forget is a Tensor, expected classes"),
        (lambda data: (data, 2**70), ff.ArgumentError, "forget holds 1180591620717411303424, expected classes"),
        (lambda data: (data, [9]), ff.EstimationError, "validation data of node 'u0': none of its 53 samples"),
        (lambda data: (data, range(4)), ff.EstimationError, "node 'u0': all of its 53 samples are to be forgotten"),
        (lambda data: ([], 2), ff.EstimationError, "validation data of node 'u0': it is empty"),
    ],
)  # fmt: skip
def test_errors(args, error, match, loader):
    given, forget = args(loader)
    with pytest.raises(error, match=match):
        ff.ClassScore(given, forget=forget)("u0", trained())


@pytest.mark.parametrize("forget", [torch.tensor(2), np.array(2), np.int64(2), np.array([2]), torch.tensor([2])])
def test_a_class_comes_in_any_form(forget, loader):
    model = trained()
    assert ff.ClassScore(loader, forget=forget)("u0", model) == ff.ClassScore(loader, forget=2)("u0", model)


@pytest.mark.parametrize("margins", [(0.1,), (0.1, 0.2, 0.3), 0.3, "ab", {0.1, 0.2}])
def test_margins_are_two(margins, loader):
    with pytest.raises(ff.ArgumentError, match="margins is .* expected two weights"):
        ff.ClassScore(loader, forget=2, margins=margins)


def test_a_dict_of_tensors_cannot_be_run(loader):
    with pytest.raises(ff.ArgumentError, match=r"node 'u0' is a OrderedDict of tensors|node 'u0' is a dict of tensors"):
        ff.ClassScore(loader, forget=2)("u0", trained().state_dict())


@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")
def test_tune_chooses_what_it_chooses_by_the_obvious_function(data, loader):
    models, gone = {"u0": trained(seed=0), "u1": trained(seed=1)}, data[1] == 2
    dag = ff.InheritanceDAG()
    for name, parents in (("u0", []), ("u1", ["u0"])):
        dag.add_model(name, models[name], data=loader, parents=parents)
    request = ff.ForgetRequest("u0", data=[(data[0][gone], data[1][gone])])
    before = {name: by_hand(model, data, gone) for name, model in models.items()}

    def slow(name, model):
        left, kept, sure_left, sure_kept = by_hand(model, data, gone)
        return -(left + max(0.0, before[name][1] - kept) + 0.1 * sure_left - 0.02 * sure_kept)

    fast = ff.ClassScore(loader, forget=2)
    fast("u0", trained(seed=9))  # whatever it saw before
    found, wanted = (ff.tune(dag, [request], score, points=6) for score in (fast, slow))
    for name in models:
        assert (found[name].alpha, found[name].lam) == (wanted[name].alpha, wanted[name].lam)
        assert math.isclose(found[name].score, wanted[name].score, abs_tol=1e-6)
        assert [p.selected for p in found.points[name]] == [p.selected for p in wanted.points[name]]


def test_one_score_serves_several_requests_and_begins_anew_only_where_something_changed(data, loader, monkeypatch):
    model, score = trained(), ff.ClassScore(loader, forget=2)
    score.begin({"u0": model})
    monkeypatch.setattr(Counter, "calls", 0)
    other = score.forgetting({"u0": [1, 3]})
    score.begin({"u0": model})
    other.begin({"u0": model})
    assert Counter.calls == 0
    assert seen(other, model) == pytest.approx(by_hand(model, data, (data[1] == 1) | (data[1] == 3)), abs=1e-6)
    assert seen(score, model) == pytest.approx(by_hand(model, data, data[1] == 2), abs=1e-6)
    model.body.first.weight.data.mul_(2)  # past autograd's counter
    Counter.calls = 0
    score.begin({"u0": model})
    assert Counter.calls == len(loader)
    assert seen(score, model) == pytest.approx(by_hand(model, data, data[1] == 2), abs=1e-6)
    with pytest.raises(ff.ArgumentError, match="a score whose forget is a function is made anew"):
        score.forgetting(lambda x, y: y == 2)


class Keywords(Net):
    """As transformers' models: called by keywords, returns a loss beside the logits."""

    def forward(self, inputs, labels=None):
        logits = self.head(self.body(inputs))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_batches_by_keywords_and_wrapped_models(data, loader, monkeypatch):
    model = trained(Net)
    inner = Keywords()
    inner.load_state_dict(model.state_dict())
    wrapped = nn.DataParallel(inner)
    by_name = [{"inputs": x, "labels": y} for x, y in loader]
    score = ff.ClassScore(by_name, forget=lambda batch, labels: (labels == 2) & (batch["inputs"][:, 0] > 0))
    gone = (data[1] == 2) & (data[0][:, 0] > 0)
    for _ in range(3):
        assert seen(score, wrapped) == pytest.approx(by_hand(model, data, gone), abs=1e-6)
        with torch.no_grad():
            for one in (model, inner):
                one.head.weight.mul_(-0.6)
    monkeypatch.setattr(Counter, "calls", 0)
    score("u0", wrapped)
    assert Counter.calls == 0


class Graph(Net):
    """Its features pass over a graph, which is a sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", (torch.eye(8) + torch.ones(8, 8).tril(-1)).to_sparse())

    def forward(self, x):
        return self.head((self.graph @ self.body(x).T).T)


def test_a_model_with_a_sparse_buffer_is_never_taken_for_unchanged(data, loader):
    model = trained(Graph)
    score, gone = ff.ClassScore(loader, forget=2), data[1] == 2
    assert seen(score, model) == pytest.approx(by_hand(model, data, gone), abs=1e-6)
    model.graph = (model.graph.to_dense() * torch.rand(8, 8).round()).to_sparse()
    assert seen(score, model) == pytest.approx(by_hand(model, data, gone), abs=1e-6)
    outcome = ff.unlearn_(model, data=loader, forget=[(data[0][gone], data[1][gone])], score=score, left=1, lost=1)
    assert seen(score, model) == pytest.approx(by_hand(model, data, gone), abs=1e-6)
    outcome.undo_()


@dataclass
class Dummy(Score):
    """A dataclass, whose __init__ knows nothing of its base."""

    says: Any
    loses: Any = 0.0

    def look(self, name, model):
        return self.says

    def loss(self, seen, before):
        return self.loses


@pytest.mark.parametrize(
    ("score", "match"),
    [
        (Dummy(None), r"look\('u0', …\) gave a NoneType, expected a Seen"),
        (Dummy((0.1, 0.9)), r"look\('u0', …\) gave a tuple, expected a Seen"),
        (Dummy(Seen(float("nan"), 1.0)), r"look\('u0', …\) gave NaN for what is left"),
        (Dummy(Seen(0.0, torch.tensor(1.0))), r"look\('u0', …\) gave a Tensor for what is kept"),
        (Dummy(Seen(0.0, None)), r"look\('u0', …\) gave a NoneType for what is kept"),
        (Dummy(Seen(0.0, 1.0), None), r"loss\(…\) for node 'u0' gave a NoneType, expected a number"),
    ],
)
def test_what_a_score_of_ones_own_gets_wrong_is_said(score, match):
    with pytest.raises(ff.ArgumentError, match=match):
        score("u0", nn.Linear(2, 2))


def test_a_score_of_ones_own_need_not_call_its_base():
    first, second = Dummy(Seen(0.2, 0.9), 0.3), Dummy(Seen(0.1, 0.8), torch.tensor(0.5))
    assert (first("u0", None), float(second("u0", None))) == (-0.3, -0.5)
    assert (first.last, second.before) == ({"u0": Seen(0.2, 0.9)}, {"u0": Seen(0.1, 0.8)})
