"""Estimates of tensors of odd kinds, under odd modes and with odd numbers: right, or an error."""

from __future__ import annotations

import warnings

import pytest
import torch
from small import batches, net
from torch import nn
from torch.nn.functional import cross_entropy

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber, mfim

pytestmark = pytest.mark.usefixtures("one_thread")
ESTIMATORS = ("batch", "softened", "sample", "expected", "label_free")


# ---- kinds of tensors and modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("params", [None, "last"])
def test_inference_mode(estimator, params):
    wanted = ff.estimate_fisher(net(), batches(), params, estimator=estimator).buffer
    with torch.inference_mode():
        made, data = net(), batches()
        model = net().requires_grad_(False)
    model = net()
    with torch.inference_mode():
        inside = ff.estimate_fisher(model, batches(), params, estimator=estimator).buffer
    assert torch.allclose(inside, wanted, rtol=1e-5) and not inside.is_inference()
    assert torch.allclose(ff.estimate_fisher(model, data, params, estimator=estimator).buffer, wanted, rtol=1e-5)
    with pytest.raises(
        ff.EstimationError, match=r"was made under torch.inference_mode\(\), which no gradient may pass"
    ):
        ff.estimate_fisher(made, batches(), params, estimator=estimator)


def test_inference_mode_elsewhere(backend):
    layout = ff.Layout.from_module(net())
    with torch.inference_mode():
        made = net().to(backend.device)
        fishers = [ff.Fisher(torch.rand(layout.numel).to(backend.device), layout) for _ in range(2)]
    plain = net().to(backend.device)
    for model in (made, plain):
        report = ff.dampen_(model, *fishers, alpha=0.5, undo=True, backend=backend.name)
        assert report.selected
    for a, b in zip(made.parameters(), plain.parameters()):
        assert torch.equal(a, b)
    report.undo_()


def test_what_is_made_inside_inference_mode_is_used_outside():
    model = net()
    with torch.inference_mode():
        accumulator = ff.FisherAccumulator(model)
        ff.flatten_(model)
    with accumulator.streaming():
        for x, y in batches():
            cross_entropy(model(x), y).backward()
    accumulator.result(in_place=True)
    with torch.inference_mode():
        made = net()
    for run in (ff.FisherAccumulator, lambda m: ParameterPerturber(m).calc_importance(batches())):
        with pytest.raises(ff.EstimationError, match="was made under torch.inference_mode"):
            run(made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_or_device(dtype):
    model, data = net(), batches()
    wanted = {e: ff.estimate_fisher(model, data, estimator=e).buffer for e in ESTIMATORS}
    try:
        torch.set_default_dtype(dtype)
        for estimator, buffer in wanted.items():
            found = ff.estimate_fisher(model, data, estimator=estimator).buffer
            assert found.dtype == torch.float32 and torch.allclose(found, buffer, rtol=1e-5)
            with torch.device("meta"):
                found = ff.estimate_fisher(model, data, estimator=estimator).buffer
            assert torch.allclose(found, buffer, rtol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_torchscript_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = torch.jit.script(net()), torch.jit.trace(net(), batches()[0][0])
    for model in (scripted, traced):
        for run in (
            lambda m: ff.estimate_fisher(m, batches()),
            lambda m: ff.estimate_fishers({"a": m}, batches()),
            ff.FisherAccumulator,
            ff.Layout.from_module,
            ff.last_layer,
            ff.flatten_,
            lambda m: ff.Fisher.from_optimizer(torch.optim.AdamW(m.parameters()), m),
            lambda m: ff.InheritanceDAG().add_model("a", m),
            ParameterPerturber,
        ):
            with pytest.raises(
                ff.ArgumentError, match="is a TorchScript module; pass the module that it was made from"
            ):
                run(model)


def test_inside_vmap():
    model, data = net(), batches()

    def inside(run):
        torch.func.vmap(lambda x: (run(x), x)[1])(torch.rand(2, 4, 6))

    for run in (
        lambda x: ff.estimate_fisher(model, data),
        lambda x: ff.estimate_fisher(model, [(x, data[0][1])], estimator="sample"),
        lambda x: ff.Fisher.from_dict({"w": x}),
        lambda x: mfim([{"w": x}, {"w": x}]),
    ):
        with pytest.raises(ff.LayoutError, match="torch.func"):
            inside(run)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sparse_inputs(layout, estimator):
    torch.manual_seed(0)
    head, (x, y) = nn.Linear(6, 3), batches(1)[0]
    x = x * (x > 0)
    sparse = x.to_sparse(layout=getattr(torch, layout))
    for model in (head, nn.Sequential(head, nn.Tanh(), nn.Linear(3, 3))):
        wanted = ff.estimate_fisher(model, [(x, y)], estimator=estimator).buffer
        if estimator in ("sample", "expected"):
            with pytest.raises(ff.EstimationError, match="batch 0: it holds a sparse tensor, which cannot be cut"):
                ff.estimate_fisher(model, [(sparse, y)], estimator=estimator)
        else:
            found = ff.estimate_fisher(model, [(sparse, y)], estimator=estimator).buffer
            assert torch.allclose(found, wanted, rtol=1e-5)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [10**400, -(10**400), float("nan"), "1", None, True])
def test_numbers_that_are_none(number):
    model, data = net(), batches()
    fisher = ff.estimate_fisher(model, data)
    held = [p.detach().clone() for p in model.parameters()]
    for run in (
        *(
            lambda key=key: ff.dampen_(model, fisher, fisher, **{key: number})
            for key in ("alpha", "lam", "cap", "scale")
        ),
        lambda: ff.dampen_(model, fisher, fisher, exponent=number),
        lambda: ff.merge_fishers([fisher], weights=[number]),
        lambda: ff.adaptive_alpha(fisher, fisher, forget_fraction=number),
        lambda: ff.FisherAccumulator(model).streaming(scale=number).__enter__(),
        lambda: ff.FisherAccumulator(model).streaming(every=-1 if number == 10**400 else number).__enter__(),
        lambda: ff.estimate_fisher(model, data, estimator="expected", samples=number),
        lambda: ff.estimate_fisher(model, data, estimator="expected", seed=number),
        lambda: mfim([fisher, fisher], divisor=number),
        lambda: ff.Layout({"w": (number if number is not True else 0.5,)}),
        lambda: ParameterPerturber(model, parameters={"dampening_constant": number if number != "1" else "x"}),
    ):
        with pytest.raises(ff.FiunError):
            run()
    assert all(map(torch.equal, model.parameters(), held))


@pytest.mark.parametrize("scale", [0, 0.0, float("inf"), -1.0, "x", None])
def test_a_scale_that_is_none_is_refused_when_it_is_asked_for(scale):
    model = net()
    accumulator = ff.FisherAccumulator(model)
    with pytest.raises(ff.ArgumentError, match="scale is"), accumulator.streaming(scale=lambda: scale):
        cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    assert accumulator.steps == 0
    with pytest.raises(ff.ArgumentError, match="scale is"), accumulator.streaming(scale=scale):
        pass


def test_numbers_of_an_optimiser_and_of_an_update():
    model = net()
    optimizer, accumulator = torch.optim.AdamW(model.parameters()), ff.FisherAccumulator(model)
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    optimizer.step()
    for samples in ("x", 1.5, -1, None):
        with pytest.raises(ff.ArgumentError, match="samples is"):
            accumulator.update(samples=samples)
    accumulator.update(samples=4)
    assert accumulator.steps == 1
    state, group = optimizer.state[model[0].weight], optimizer.param_groups[0]
    for bad in (10**400, "x", None, float("nan"), -1.0, 1.0):
        group["betas"] = (0.9, bad)
        with pytest.raises(ff.ArgumentError, match="beta2 is"):
            ff.Fisher.from_optimizer(optimizer, model)
    group["betas"] = (0.9, 0.999)
    for bad in (10**400, "x", None, float("nan"), float("inf"), -3):
        state["step"] = bad
        with pytest.raises(ff.ArgumentError, match="step is"):
            ff.Fisher.from_optimizer(optimizer, model)


def replaced_layer(model):
    model[0] = nn.Linear(6, 5)


def replaced_parameter(model):
    model[2].bias = nn.Parameter(torch.zeros(3))


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("replace", [replaced_layer, replaced_parameter, assigned])
def test_parameters_that_were_replaced_since_an_accumulator_was_made(replace):
    """Their gradients go elsewhere: those held would count as zero."""
    model, (x, y) = net(), batches()[0]
    accumulator = ff.FisherAccumulator(model)
    replace(model)
    cross_entropy(model(x), y).backward()
    with pytest.raises(ff.LayoutError, match="is not the model's any more: it was replaced"):
        accumulator.update()
    assert accumulator.steps == 0
    with pytest.raises(ff.LayoutError, match="replaced"), accumulator.streaming():
        pass
    with (
        pytest.raises(ff.LayoutError, match="replaced"),
        accumulator.during(torch.optim.SGD(model.parameters(), lr=0.1)),
    ):
        pass
    ff.FisherAccumulator(model).update()


def test_parameters_that_only_moved_since_an_accumulator_was_made():
    model, (x, y) = net(), batches()[0]
    accumulator = ff.FisherAccumulator(model)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    inner = model[2]
    model[2] = nn.Sequential(inner)
    cross_entropy(model(x), y).backward()
    accumulator.update()
    found = accumulator.result().as_dict()
    assert torch.allclose(found["0.weight"], model[0].parametrizations.weight.original.grad.square())
    assert torch.allclose(found["2.bias"], inner.bias.grad.square())
