"""Models that share parts, or whose forward changes them: estimated as if alone, and put back as they were."""

from __future__ import annotations

import copy
import pickle
import warnings
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from small import batches, net
from test_sample_estimator import close, oracle
from torch import nn

import fiun_fast as ff

pytestmark = pytest.mark.usefixtures("one_thread")
ESTIMATORS = ("batch", "softened", "sample", "expected", "label_free")


# ---- models that share a part ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::fiun_fast.ScopeWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("params", [None, "last", "0.*"])
def test_models_that_share_a_part_are_estimated_as_if_alone(estimator, params):
    model, other = net(), net(1)
    other[0] = model[0]
    inside = nn.Sequential(model[0], nn.Tanh(), nn.Linear(5, 3))
    tied = net(3)
    tied[0].weight = model[0].weight
    models = {"model": model, "other": other, "inside": inside, "whole": nn.Sequential(model), "tied": tied}
    chosen = params if params != "0.*" else lambda name, _: name.split(".")[0] == "0"
    for p in other[2].parameters():
        p.requires_grad_(False)
    before = {name: [(p.requires_grad, p.grad) for p in m.parameters()] for name, m in models.items()}
    alone = {name: ff.estimate_fisher(m, batches(), chosen, estimator=estimator) for name, m in models.items()}
    together = ff.estimate_fishers(models, batches(), chosen, estimator=estimator)
    for name, fisher in together.items():
        assert fisher.layout == alone[name].layout
        assert torch.allclose(fisher.buffer, alone[name].buffer, rtol=1e-5), name
        assert fisher.buffer.any()
        assert fisher.provenance.how == alone[name].provenance.how
        assert [(p.requires_grad, p.grad) for p in models[name].parameters()] == before[name]


def test_a_shared_buffer_that_forwards_change():
    """Each model sees what it did itself, and not what the other did."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    counting = Counting()
    models = {"a": nn.Sequential(counting, *net()), "b": nn.Sequential(counting, nn.ReLU(), *net(1))}
    alone = {name: ff.estimate_fisher(m, batches(4)).buffer for name, m in models.items()}
    together = ff.estimate_fishers(models, batches(4))
    for name, buffer in alone.items():
        assert torch.allclose(together[name].buffer, buffer, rtol=1e-5)
    assert counting.calls == 0


# ---- forwards that change the model ----------------------------------------------------------------------------------


class Restless(nn.Module):
    def __init__(self, change: Callable[[Restless], object]) -> None:
        super().__init__()
        self.fc = net()
        self.register_buffer("kept", torch.tensor([0.0, -0.0, float("nan")]))
        self.register_buffer("none", None)
        self.register_buffer("transient", torch.arange(4), persistent=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for layout in ("sparse_coo", "sparse_csr", "sparse_csc", "strided"):
                self.register_buffer(layout, torch.eye(3).to_sparse(layout=getattr(torch, layout)))
        self.change = change

    def forward(self, x):
        self.change(self)
        return self.fc(x)


def once(change: Callable[[Restless], object], key: str = "kept") -> Callable[[Restless], object]:
    return lambda m: change(m) if hasattr(m, key) else None


def shadowed(m: Restless) -> None:
    if "kept" in m._buffers:
        del m.kept
        m.kept = 5


def set_sparse(m: Restless) -> None:
    m.sparse_coo.mul_(3)
    m.sparse_csr.values().add_(1)
    m.sparse_csc = torch.zeros(2)


CHANGES: dict[str, Callable[[Restless], object]] = {
    "nothing": lambda m: None,
    "in place": lambda m: m.transient.add_(1),
    "sign of zero": lambda m: m.kept.neg_(),
    "reassigned": lambda m: setattr(m, "kept", torch.ones(3)),
    "resized": lambda m: m.kept.resize_(70).fill_(3),
    "shortened": lambda m: m.kept.resize_(2),
    "other data": lambda m: setattr(m.kept, "data", torch.ones(2, 2, dtype=torch.float64)),
    "freed": lambda m: m.kept.untyped_storage().resize_(0),
    "removed": once(lambda m: delattr(m, "kept")),
    "hidden by an attribute": shadowed,
    "added": lambda m: None if hasattr(m, "new") else m.register_buffer("new", torch.ones(2)),
    "filled": lambda m: setattr(m, "none", torch.ones(2)),
    "emptied": lambda m: setattr(m, "kept", None),
    "another dtype": lambda m: setattr(m, "kept", m.kept.half()),
    "persistent": lambda m: m._non_persistent_buffers_set.clear(),
    "sparse": set_sparse,
    "submodule added": lambda m: None if hasattr(m, "more") else m.add_module("more", nn.Linear(2, 2)),
    "train mode": lambda m: m.train(),
}


def pieces(m: nn.Module) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            (key, None if b is None else (b.layout, b.dtype, b.shape, b.to_dense().clone().view(torch.uint8)))
            for key, b in m._buffers.items()
        ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_itself_is_put_back(change, fails):
    model = Restless(CHANGES[change])
    held = {key: id(b) for key, b in model._buffers.items()}
    children, transient = list(model.named_children()), set(model._non_persistent_buffers_set)
    before, place = pieces(model), model.strided.data_ptr()

    def forward(m, batch):
        out = m(batch[0])
        if fails:
            raise KeyError("the user's own")
        return out, batch[1]

    if fails:
        with pytest.raises(ff.EstimationError, match="batch 0: forward_fn raises KeyError: .the user's own") as caught:
            ff.estimate_fisher(model, batches(), forward_fn=forward)
        assert isinstance(caught.value.__cause__, KeyError)
    else:
        fisher = ff.estimate_fisher(model, batches(), forward_fn=forward)
        assert torch.allclose(fisher.buffer, ff.estimate_fisher(net(), batches()).buffer, rtol=1e-5)
    assert {key: id(b) for key, b in model._buffers.items()} == held
    after = pieces(model)
    assert [key for key, _ in after] == [key for key, _ in before]
    for (key, now), (_, then) in zip(after, before):
        assert (now is None) == (then is None), key
        assert now is None or (now[:3] == then[:3] and torch.equal(now[3], then[3])), key
    assert list(model.named_children()) == children
    assert model._non_persistent_buffers_set == transient
    assert model.training and model.strided.data_ptr() == place
    assert "kept" not in vars(model)


def test_parameters_that_a_forward_replaces():
    model = net()
    bias = model[0].bias

    def forward(m, batch):
        m[0].register_parameter("bias", nn.Parameter(torch.zeros(5)))
        return m(batch[0]), batch[1]

    ff.estimate_fisher(model, batches(), "2.*", forward_fn=forward)
    assert model[0].bias is bias and bias.requires_grad


class Bags(nn.Module):
    """Tables whose forward shrinks the rows that it looks up, for good."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.bags = nn.Embedding(9, 5, max_norm=0.5), nn.EmbeddingBag(9, 5, max_norm=0.4, mode="sum")
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rows(x).sum(1) + self.bags(x))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("params", [None, "last"])
@pytest.mark.filterwarnings("ignore::fiun_fast.FallbackWarning")
def test_tables_with_a_max_norm_are_put_back(estimator, params):
    torch.manual_seed(0)
    model, data = Bags(), [(torch.randint(8, (4, 3)), torch.randint(3, (4,))) for _ in range(2)]
    before = copy.deepcopy(model.state_dict())
    found = ff.estimate_fisher(model, data, params, estimator=estimator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if estimator == "sample" and params is None:
        close(found, oracle(model, data))
    for x, _ in data:
        model(x)
    assert not torch.equal(model.rows.weight, before["rows.weight"])
    assert not torch.equal(model.bags.weight, before["bags.weight"])


def test_what_cannot_be_put_back_is_said_and_keeps_nothing_else_from_it():
    for fails, error, text in (
        (True, ff.EstimationError, "batch 0: forward_fn raises KeyError: .the user's own"),
        (False, ff.EstimationError, "not all of the model could be put back as it was: .*size"),
    ):
        model = net()
        model.register_buffer("calls", torch.zeros(()))
        model[0].weight.grad = torch.ones(5, 6)
        bias_grad = model[2].bias.grad = torch.ones(3)

        def forward(m, batch, fails=fails):
            m.calls += 1
            m[0].weight.data = torch.ones(1, 6)  # which the gradient of before does not fit any more
            if fails:
                raise KeyError("the user's own")
            return m[2](batch[0][:, :5]), batch[1]

        with pytest.raises(error, match=text):
            ff.estimate_fisher(model, batches(), "2.*", forward_fn=forward)
        assert model.calls == 0 and model.training and model[0].weight.requires_grad
        assert model[2].bias.grad is bias_grad


class Shared(nn.Module):
    """A layer under two names, and control flow that torch.func refuses; keeps what it has computed."""

    def __init__(self, refused: bool = True) -> None:
        super().__init__()
        self.fc, self.head, self.refused = nn.Linear(6, 6), nn.Linear(6, 5), refused
        self.same, self.kept, self.all, self.calls = self.fc, None, [], 0

    def forward(self, x):
        self.kept = torch.tanh(self.same(torch.tanh(self.fc(x))))
        self.calls += 1
        self.all.append(self.kept)
        if self.refused and float(self.kept.detach().sum()) > 1e9:
            return self.head(x)
        return self.head(self.kept * self.fc.weight.sum(0).relu_())  # written to: no closed form


@pytest.mark.filterwarnings("ignore::fiun_fast.FallbackWarning")
@pytest.mark.parametrize("refused", [True, False], ids=["one by one", "vmap"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_shared_layer_and_what_a_forward_keeps(estimator, refused):
    torch.manual_seed(0)
    model = Shared(refused)
    loader = [(torch.randn(n, 6), torch.randint(5, (n,))) for n in (4, 3)]
    held = [(module, dict(vars(module)), dict(module._parameters)) for module in model.modules()]
    fisher = ff.estimate_fisher(model, loader, estimator=estimator)
    for module, attributes, parameters in held:
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items())
        assert all(module._parameters[key] is p for key, p in parameters.items())
    assert (model.kept, model.all, model.calls) == (None, [], 0)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    if estimator == "sample":
        close(fisher, oracle(again, loader))


class Keeping(nn.Module):
    """Keeps plain containers, configs and hooks, and changes them all in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = net()
        self.config = SimpleNamespace(problem=None, sizes=[1, 2], inner=Namespace(seen=0))
        self.plans = {"a": Settings(), "b": [3]}
        self.last, self.named = deque([1, 2], maxlen=2), OrderedDict(x=1)
        self.counted = defaultdict(int, {"calls": 0})

    def forward(self, x):
        self.config.problem, self.config.more = "classes", 1
        self.config.inner.seen += 1
        self.config.sizes.append(3)
        self.plans["a"].chosen = "fast"
        self.plans["b"].clear()
        self.last.append(7)
        self.named.move_to_end("x")
        self.named["y"] = 2
        self.counted["calls"] += 1
        self.fc[0].register_forward_hook(lambda *_: None)
        return self.fc(x)


@dataclass
class Settings:
    chosen: str | None = None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_containers_configs_and_hooks_are_put_back(estimator):
    model = Keeping()
    held = (model.config, model.config.inner, model.config.sizes, model.plans["a"], model.plans["b"], model.last)
    fisher = ff.estimate_fisher(model, batches(2), estimator=estimator)
    assert torch.allclose(fisher.buffer, ff.estimate_fisher(net(), batches(2), estimator=estimator).buffer, rtol=1e-5)
    now = (model.config, model.config.inner, model.config.sizes, model.plans["a"], model.plans["b"], model.last)
    assert all(a is b for a, b in zip(now, held))
    assert vars(model.config) == {"problem": None, "sizes": [1, 2], "inner": Namespace(seen=0)}
    assert model.plans == {"a": Settings(), "b": [3]} and model.last == deque([1, 2]) and model.last.maxlen == 2
    assert model.named == OrderedDict(x=1) and model.counted == {"calls": 0} and not model.fc[0]._forward_hooks
