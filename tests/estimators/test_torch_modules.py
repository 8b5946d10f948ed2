"""What torch itself makes of modules: computed weights, functional calls, lazy, quantised, scripted, exported; engines.

Each is taken like any module, to the values of an obvious loop, or refused in one sentence that says what to pass.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from small import batches, net
from torch import nn
from torch.ao import quantization
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize, prune

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is (deprecated|not supported)"),
]


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Masked(nn.Module):
    """All weights of a network made of one vector, by `functional_call`: as supermasks and hypernetworks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.mask = net(), nn.Parameter(torch.linspace(0.5, 1.5, 53))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [p.numel() for p in self.net.parameters()]
        parts = zip(self.net.named_parameters(), self.mask.split(sizes), strict=True)
        return torch.func.functional_call(self.net, {n: p * m.view_as(p) for (n, p), m in parts}, (x,))


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.net, dict(self.net.named_parameters()), (x,))


def each(change) -> nn.Module:
    return nn.Sequential(*(change(layer) if isinstance(layer, nn.Linear) else layer for layer in net()))


def own_parametrisation(layer: nn.Linear) -> nn.Linear:
    return parametrize.register_parametrization(layer, "weight", Twice())


def pruned(layer: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(layer, "weight", amount=0.3)


def lazy_after_a_batch() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3))
    model(batches()[0][0])
    return model


TAKEN = {
    "weight_norm, old": lambda: each(nn.utils.weight_norm),
    "spectral_norm, old": lambda: each(nn.utils.spectral_norm),
    "weight_norm": lambda: each(parametrizations.weight_norm),
    "spectral_norm": lambda: each(parametrizations.spectral_norm),
    "orthogonal": lambda: each(parametrizations.orthogonal),
    "own parametrisation": lambda: each(own_parametrisation),
    "pruned": lambda: each(pruned),
    "functional_call": Called,
    "functional_call, computed": Masked,
    "traced by fx": lambda: torch.fx.symbolic_trace(net()),
    "lazy, after a batch": lazy_after_a_batch,
}


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_is_taken_like_any_module(kind, estimator):
    model = TAKEN[kind]().train()
    data = batches()
    size = 4 if estimator == "batch" else 1
    units = [(x[i : i + size], y[i : i + size]) for x, y in data for i in range(0, 4, size)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fisher = ff.estimate_fisher(model, data, estimator=estimator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    expected = torch.zeros(fisher.numel, dtype=torch.float64)
    for x, y in units:
        gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        expected += torch.cat([g.reshape(-1) for g in gradients]).double().square()
    assert torch.allclose(fisher.buffer.double(), expected / len(units), rtol=1e-4, atol=1e-10)
    before = model(data[0][0]).detach()
    report = ff.dampen_(model, fisher, ff.Fisher(fisher.buffer * 50, fisher.layout), alpha=2.0, undo=True)
    assert report.selected > 0
    assert not torch.equal(model(data[0][0]), before)  # it reaches the outputs
    report.undo_()
    assert torch.equal(model(data[0][0]), before)


def static() -> nn.Module:
    model = nn.Sequential(quantization.QuantStub(), *net(), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    quantization.prepare(model, inplace=True)
    model(batches()[0][0])
    return quantization.convert(model)


def engine(model: nn.Module, module: str = "deepspeed.runtime.engine", name: str = "DeepSpeedEngine") -> nn.Module:
    """Of the shape that DeepSpeed's has, which is not installed here."""

    def forward(self, x):
        return self.module(x)

    made = type(name, (nn.Module,), {"__module__": module, "forward": forward})()
    made.module = model
    return made


def cut_up() -> nn.Module:
    """A model whose parameters ZeRO-3 has taken away."""
    model = net()
    for i, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape = i, p.shape
        p.data = torch.empty(0)
    return model


def quietly(make):
    def made() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return made


ENGINE = r"is a \w*Engine of DeepSpeed, .*: pass the model before deepspeed.initialize"
REFUSED = {
    "dynamically quantised": (
        quietly(lambda: quantization.quantize_dynamic(net(), {nn.Linear})),
        "its Linear is quantised and keeps packed integers: pass the model before it was quantised",
    ),
    "statically quantised": (
        quietly(static),
        "its Linear is quantised and keeps packed integers: pass the model before",
    ),
    "scripted": (quietly(lambda: torch.jit.script(net())), "is a TorchScript module; pass the module that it was made"),
    "traced": (
        quietly(lambda: torch.jit.trace(net(), batches()[0][0])),
        "is a TorchScript module; pass the module that it was made from",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3)),
        "has no shape yet: run the lazy module once",
    ),
    "exported": (
        lambda: torch.export.export(net(), (batches()[0][0],)),
        "is a ExportedProgram, expected a .*; pass the module that it was made from",
    ),
    "DeepSpeed": (lambda: engine(net()), ENGINE),
    "DeepSpeed, inference": (
        lambda: engine(net(), "deepspeed.inference.engine", "InferenceEngine"),
        ENGINE,
    ),
    "DeepSpeed, cut up": (cut_up, r"is cut up over ranks by DeepSpeed \(ZeRO-3\): pass a model that is whole"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused_in_one_sentence(kind):
    make, message = REFUSED[kind]
    fisher = ff.estimate_fisher(net(), batches())
    louder = ff.Fisher(fisher.buffer * 50, fisher.layout)
    ways = {
        "layout": lambda m: ff.Layout.from_module(m),
        "flatten_": ff.flatten_,
        "estimate": lambda m: ff.estimate_fisher(m, batches()),
        "accumulate": lambda m: ff.FisherAccumulator(m),
        "dampen_": lambda m: ff.dampen_(m, fisher, louder),
        "drop-in": lambda m: ParameterPerturber(m).calc_importance(batches()),
        "drop-in, dampening": lambda m: ParameterPerturber(m).modify_weight(fisher.as_dict(), louder.as_dict()),
    }
    for way, run in ways.items():
        model = make()
        with pytest.raises(ff.FiunError, match=message):
            pytest.fail(f"{way}: {run(model)}")


def test_what_a_wrapper_that_averages_holds():
    """timm's ModelEmaV2 has no forward. The module inside is called instead, and its names are plain."""
    for name in ("ModelEmaV2", "ModelEmaV3"):
        averaged = type(name, (nn.Module,), {"__module__": "timm.utils.model_ema"})()
        averaged.module = net()
        fisher = ff.estimate_fisher(averaged, batches())
        assert fisher.layout == ff.Layout.from_module(net())
        assert torch.equal(fisher.buffer, ff.estimate_fisher(net(), batches()).buffer)
        assert f"looked through {name}" in str(fisher.provenance)
