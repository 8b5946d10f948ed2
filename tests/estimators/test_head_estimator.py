"""The last layer's Fishers without a backward, equal to autograd's; and several models in one sweep."""

from __future__ import annotations

import copy

import pytest
import torch
from fisher_models import LAYERS, NETWORKS
from test_estimators import oracle as batch_oracle
from test_label_free import oracle as label_free_oracle
from test_sample_estimator import close, expected_oracle, made, one_thread, oracle  # noqa: F401
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import fiun_fast as ff

HEAD = "closed form at the head, no backward through the model"


def softened_oracle(model, loader):
    """In float64: the mean over batches of the squared gradient of the cross entropy of logits / 4."""
    model = copy.deepcopy(model).double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in loader:
        loss = functional.cross_entropy(model(x.double()) / 4, y)
        for name, g in zip(total, torch.autograd.grad(loss, list(model.parameters()))):
            total[name] += g**2 / len(loader)
    return total


ORACLES = {
    "softened": softened_oracle,
    "batch": batch_oracle,
    "sample": oracle,
    "expected": expected_oracle,
    "label_free": label_free_oracle,
}
RESNET = NETWORKS[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("estimator", ORACLES)
def test_head_equals_autograd(estimator, bias):
    model = made(RESNET)
    if not bias:
        model[-1] = nn.Linear(8, 5, bias=False)
    loader = RESNET.batches((4, 3, 1))
    head = ff.last_layer(model)
    fisher = ff.estimate_fisher(model, loader, params=head, estimator=estimator)
    wanted = ORACLES[estimator](model, loader)
    close(fisher, {name: wanted[name] for name in head})
    assert set(fisher.provenance.how.values()) == {HEAD}
    assert fisher.provenance == ff.Provenance(estimator, 3, 8)
    if bias:
        only = ff.estimate_fisher(model, loader, params=[head[1]], estimator=estimator)
        assert torch.equal(only.buffer, fisher[head[1]])


LOSSES = {
    "batch": functional.cross_entropy,
    "label_free": lambda out, y: out.square().sum(1).mean(),
}


@pytest.mark.parametrize("estimator", LOSSES)
def test_a_head_has_the_bits_of_autograd(estimator):
    model, loader = made(RESNET).eval(), RESNET.batches((8, 5))
    accumulator = ff.FisherAccumulator(model, params=ff.last_layer(model), estimator=estimator)
    for x, y in loader:
        model.zero_grad()
        LOSSES[estimator](model(x), y).backward()
        accumulator.update()
    fisher = ff.estimate_fisher(model, loader, params=ff.last_layer(model), estimator=estimator)
    assert torch.equal(fisher.buffer, accumulator.result().buffer)


def test_a_head_needs_no_labels_where_none_are_asked_for():
    model, loader = made(RESNET), RESNET.batches((4, 3))
    labelled = ff.estimate_fisher(model, loader, params="last", estimator="label_free")
    for bare in ([x for x, _ in loader], [(x,) for x, _ in loader]):
        fisher = ff.estimate_fisher(model, bare, params="last", estimator="label_free")
        assert torch.equal(fisher.buffer, labelled.buffer)
        assert set(fisher.provenance.how.values()) == {HEAD}


@pytest.mark.parametrize("estimator", ORACLES)
def test_no_gradient_is_ever_computed(estimator):
    model = made(RESNET)
    seen = []
    model[0].register_forward_hook(lambda m, i, output: seen.append(output.requires_grad))
    ff.estimate_fisher(model, RESNET.batches((4,)), params=ff.last_layer(model), estimator=estimator)
    assert seen == [False]


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_losses_of_ones_own(estimator):
    model, loader = made(RESNET), RESNET.batches((4, 3))
    smooth = lambda out, y: functional.cross_entropy(out, y, label_smoothing=0.3)
    fisher = ff.estimate_fisher(model, loader, params="7.*", estimator=estimator, loss_fn=smooth)
    whole = ff.estimate_fisher(model, loader, estimator=estimator, loss_fn=smooth)
    assert set(fisher.provenance.how.values()) == {HEAD}
    assert torch.allclose(fisher["7.weight"], whole["7.weight"], rtol=1e-5)


class Scaled(nn.Module):
    """The logits are not the last layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x):
        return 2 * self.fc(torch.tanh(self.body(x)))


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x.round())


@pytest.mark.parametrize("estimator", ORACLES)
def test_where_it_is_no_head_the_record_says_so(estimator):
    torch.manual_seed(0)
    loader = LAYERS[0].batches((4, 3))
    model = Scaled()
    fisher = ff.estimate_fisher(model, loader, params=ff.last_layer(model), estimator=estimator)
    wanted = ORACLES[estimator](model, loader)
    if estimator != "expected":
        close(fisher, {name: wanted[name] for name in fisher.layout.names})
    assert all("not at the head: the outputs are not the layer's own" in h for h in fisher.provenance.how.values())
    model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), Quantised(6, 5))
    fisher = ff.estimate_fisher(model, loader, params="2.*", estimator=estimator)
    assert all(how != HEAD for how in fisher.provenance.how.values())


def test_a_loss_that_sees_the_weight_is_not_the_heads():
    model, loader = made(LAYERS[0]), LAYERS[0].batches((4, 3))
    decayed = lambda out, y: functional.cross_entropy(out, y) + model[3].weight.square().sum()
    fisher = ff.estimate_fisher(model, loader, params=ff.last_layer(model), loss_fn=decayed)
    assert "the loss also depends directly on the layer's parameters" in fisher.provenance.how["3.weight"]
    total = torch.zeros_like(model[3].weight)
    for x, y in loader:
        (g,) = torch.autograd.grad(decayed(model(x), y), [model[3].weight])
        total += g**2 / 2
    assert torch.allclose(fisher["3.weight"], total, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["batch", "softened", "sample", "expected", "label_free"])
def test_many_models_in_one_sweep(estimator):
    models = {f"u{i}": made(RESNET, seed=i) for i in range(3)}
    calls = []

    def loader():
        for batch in RESNET.batches((4, 3)):
            calls.append(1)
            yield batch

    fishers = ff.estimate_fishers(models, loader(), estimator=estimator, seed=3)
    assert len(calls) == 2
    for name, model in models.items():
        alone = ff.estimate_fisher(model, RESNET.batches((4, 3)), estimator=estimator, seed=3)
        assert torch.equal(fishers[name].buffer, alone.buffer)
    heads = ff.estimate_fishers(models, RESNET.batches((4, 3)), params="7.*", estimator=estimator)
    assert all(fisher.layout.names == ("7.weight", "7.bias") for fisher in heads.values())


def test_many_models_bad_input():
    model = made(RESNET)
    with pytest.raises(ff.ArgumentError, match="models is {}, expected a dict"):
        ff.estimate_fishers({}, [])
    with pytest.raises(ff.ArgumentError, match="one model is given under several names"):
        ff.estimate_fishers({"a": model, "b": model}, [])
    with pytest.raises(ff.EstimationError, match="the loader is empty"):
        ff.estimate_fishers({"a": model}, [], params="7.*", estimator="sample")


@pytest.mark.parametrize("estimator", ORACLES)
def test_autocast_in_the_forward_alone(estimator):
    model, loader = made(RESNET), RESNET.batches((4, 3))

    def forward(m, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return m(batch[0]), batch[1]

    fisher = ff.estimate_fisher(model, loader, ff.last_layer(model), estimator=estimator, forward_fn=forward)
    exact = ff.estimate_fisher(model, loader, ff.last_layer(model), estimator=estimator)
    assert set(fisher.provenance.how.values()) == {HEAD}
    assert (fisher.buffer - exact.buffer).abs().max() < 0.1 * exact.buffer.max()


def reparametrised(how):
    model = made(RESNET)
    if how == "pruned":
        prune.l1_unstructured(model[-1], "weight", 0.3)
    elif how == "spectral_norm":
        nn.utils.spectral_norm(model[-1])
    elif how == "hook":
        model[-1].register_forward_hook(lambda module, given, output: 10 * output)
    else:
        model[-1].register_forward_pre_hook(lambda module, given: (given[0] * 10,))
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", ["pruned", "spectral_norm", "hook", "pre-hook"])
def test_heads_whose_output_is_not_their_parameters_alone(how):
    model, loader = reparametrised(how), RESNET.batches((4, 3))
    model.eval()
    fisher = ff.estimate_fisher(model, loader, params="7.*")
    whole = ff.estimate_fisher(model, loader)
    for name in fisher.layout.names:
        assert fisher[name].any(), name
        assert torch.allclose(fisher[name], whole[name], rtol=1e-5), name
        assert HEAD not in fisher.provenance.how[name]


class ByName(Scaled):
    def forward(self, x):
        return self.fc(input=torch.tanh(self.body(x)))


def test_a_head_called_by_keyword():
    torch.manual_seed(0)
    model, loader = ByName(), LAYERS[0].batches((4, 3))
    fisher = ff.estimate_fisher(model, loader, params="fc.*")
    assert torch.allclose(fisher["fc.weight"], ff.estimate_fisher(model, loader)["fc.weight"], rtol=1e-5)


@pytest.mark.parametrize("estimator", ["batch", "softened", "sample", "expected", "label_free"])
def test_last_means_the_last_layer(estimator):
    model, loader = made(LAYERS[0]), LAYERS[0].batches((4, 3))
    by_name = ff.estimate_fisher(model, loader, params=ff.last_layer(model), estimator=estimator)
    last = ff.estimate_fisher(model, loader, params="last", estimator=estimator)
    many = ff.estimate_fishers({"a": model}, loader, params="last", estimator=estimator)["a"]
    assert by_name.layout == last.layout == many.layout == ff.FisherAccumulator(model, params="last").layout
    assert torch.equal(by_name.buffer, last.buffer) and torch.equal(last.buffer, many.buffer)
