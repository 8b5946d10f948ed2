"""Importance without labels, and Fishers recycled from an optimiser, against float64."""

import copy

import pytest
import torch
from test_estimators import batches, close, net
from torch import nn

import fiun_fast as ff


def oracle(model: nn.Module, loader) -> dict[str, torch.Tensor]:
    """(1/B) sum of |gradient of the mean squared length of the outputs|, in float64."""
    model = copy.deepcopy(model).double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, _ in loader:
        lengths = [(model(one[None].double()) ** 2).sum() for one in x]
        for name, gradient in zip(total, torch.autograd.grad(sum(lengths) / len(x), list(model.parameters()))):
            total[name] += gradient.abs()
    return {name: value / len(loader) for name, value in total.items()}


@pytest.mark.parametrize("form", [lambda x, y: (x, y), lambda x, y: x, lambda x, y: [x], lambda x, y: (x, y, "name")])
def test_label_free(form):
    model, loader = net(), batches()
    fisher = ff.estimate_fisher(model, [form(x, y) for x, y in loader], estimator="label_free")
    close(fisher, oracle(model, loader))
    assert fisher.provenance == ff.Provenance("label_free", 3, 12)
    assert set(fisher.provenance.how) == set(fisher.layout.names)
    assert "mean ‖f(x)‖²: 0.weight" in str(fisher.provenance)


def test_label_free_by_hand_and_with_a_forward_of_ones_own():
    model, loader = net().eval(), batches()
    accumulator = ff.FisherAccumulator(model, estimator="label_free")
    for x, _ in loader:
        model.zero_grad()
        model(x).square().sum(1).mean().backward()
        accumulator.update()
    close(accumulator.result(), oracle(model, loader))
    named = [{"image": x} for x, _ in loader]
    own = ff.estimate_fisher(
        model, named, estimator="label_free", forward_fn=lambda m, b: (m(b["image"]), None), params="5.*"
    )
    assert torch.allclose(own["5.weight"], accumulator.result()["5.weight"], rtol=1e-6)


def test_label_free_bad_input():
    with pytest.raises(ff.ArgumentError, match="'label_free' has a loss of its own"):
        ff.estimate_fisher(net(), batches(), estimator="label_free", loss_fn=nn.functional.cross_entropy)
    with pytest.raises(ff.EstimationError, match=r"a batch is a dict of 1, expected \(inputs, targets\)"):
        ff.estimate_fisher(net(), [{"x": 1}], estimator="label_free")
    with pytest.raises(ff.EstimationError, match="the outputs are a dict, expected a tensor"):
        ff.estimate_fisher(net(), batches(), estimator="label_free", forward_fn=lambda m, b: ({"a": m(b[0])}, b[1]))
    with pytest.raises(ff.ArgumentError, match="estimator is 'sample', expected one of batch, label_free"):
        ff.FisherAccumulator(net(), estimator="sample")


# ---- from an optimiser -----------------------------------------------------------------------------------------------

KINDS = {
    "adam": lambda ps: torch.optim.Adam(ps),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-3, betas=(0.8, 0.95), weight_decay=0.1),
    "foreach": lambda ps: torch.optim.AdamW(ps, foreach=True),
    "single": lambda ps: torch.optim.AdamW(ps, foreach=False),
    "fused": lambda ps: torch.optim.AdamW(ps, fused=True),
    "amsgrad": lambda ps: torch.optim.Adam(ps, amsgrad=True),
    "tensor-lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(1e-3), foreach=False),
    "nadam": lambda ps: torch.optim.NAdam(ps),
    "radam": lambda ps: torch.optim.RAdam(ps),
}


def trained(make, model: nn.Module, steps: int = 4) -> tuple[torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """The optimiser after some steps, and the weighted mean of squared gradients that its record stands for."""
    optimizer = make(list(model.parameters()))
    squares: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in batches(3) * 2:
        if not steps:
            break
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            squares[name].append(p.grad.double() ** 2)
        optimizer.step()
        steps -= 1
    beta2 = optimizer.param_groups[0]["betas"][1]
    expected = {}
    for name, terms in squares.items():
        weights = torch.tensor([beta2 ** (len(terms) - 1 - t) for t in range(len(terms))], dtype=torch.float64)
        stacked = torch.stack(terms)
        expected[name] = (stacked * weights.view(-1, *[1] * (stacked.dim() - 1))).sum(0) / weights.sum()
    return optimizer, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 5])
def test_from_optimizer(kind, steps):
    model = net()
    optimizer, expected = trained(KINDS[kind], model, steps)
    fisher = ff.Fisher.from_optimizer(optimizer, model)
    for name in fisher.layout.names:  # 1 - beta2^t cancels three digits of fp32 that the optimiser has lost already
        torch.testing.assert_close(fisher[name].double(), expected[name], rtol=2e-4, atol=1e-12)
    assert fisher.provenance == ff.Provenance("optimizer", steps, 0)
    assert fisher.buffer.data_ptr() != optimizer.state[model[0].weight]["exp_avg_sq"].data_ptr()


def test_from_optimizer_groups_capturable_state_and_weight_decay():
    model = net()
    optimizer, expected = trained(
        lambda ps: torch.optim.Adam([{"params": ps[:2], "weight_decay": 0.1}, {"params": ps[2:], "betas": (0.9, 0.9)}]),
        model,
    )
    fisher = ff.Fisher.from_optimizer(optimizer, model)
    assert "weight decay inside" in fisher.provenance.how["0.weight"]
    assert "weight decay" not in fisher.provenance.how["5.weight"]
    raw = optimizer.state[model[5].weight]["exp_avg_sq"]
    torch.testing.assert_close(fisher["5.weight"], raw / (1 - 0.9**4))
    for state in optimizer.state.values():  # capturable optimisers keep `step` as a tensor of one element on the device
        state["step"] = torch.tensor([4.0])
    again = ff.Fisher.from_optimizer(optimizer, model, params="5.*")
    assert torch.equal(again["5.weight"], fisher["5.weight"])
    assert again.layout.names == ("5.weight", "5.bias")


def test_from_optimizer_after_loading_a_checkpoint(tmp_path):
    model = net().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model.eval()(batches(1)[0][0].bfloat16()).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    resumed = torch.optim.AdamW(model.parameters())
    resumed.load_state_dict(torch.load(tmp_path / "o.pt"))
    a, b = (ff.Fisher.from_optimizer(o, model) for o in (optimizer, resumed))
    assert a.buffer.dtype == torch.float32
    assert torch.equal(a.buffer, b.buffer)
    a.save(tmp_path / "f.safetensors")
    assert dict(ff.Fisher.load(tmp_path / "f.safetensors").provenance.how) == dict(a.provenance.how)


def test_from_optimizer_bad_input():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ff.EstimationError, match="AdamW has no state for '0.weight', .* and 2 more: no gradient"):
        ff.Fisher.from_optimizer(optimizer, model)
    with pytest.raises(ff.LayoutError, match="AdamW does not optimise '0.weight'.*by identity"):
        ff.Fisher.from_optimizer(optimizer, copy.deepcopy(model))
    with pytest.raises(ff.ArgumentError, match="optimizer is a dict, expected a torch.optim.Optimizer"):
        ff.Fisher.from_optimizer(optimizer.state_dict(), model)
    adamax = trained(torch.optim.Adamax, model)[0]
    with pytest.raises(ff.ArgumentError, match="Adamax keeps no exp_avg_sq, expected Adam, AdamW"):
        ff.Fisher.from_optimizer(adamax, model)
    with pytest.raises(ff.ArgumentError, match="SGD keeps no second moments"):
        ff.Fisher.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    for name, p in model.named_parameters():
        p.grad = None if name.startswith("5") else torch.ones_like(p)
    optimizer.step()
    assert ff.Fisher.from_optimizer(optimizer, model, params="0.*").buffer.allclose(torch.ones(40))
    with pytest.raises(ff.EstimationError, match="no state for '5.weight', '5.bias'"):
        ff.Fisher.from_optimizer(optimizer, model)
