"""What a model answers: read as the estimators read, and the model left as it was found."""

from __future__ import annotations

import subprocess
import sys

import clouds
import numpy as np
import pytest
import torch
from torch import nn

import fiun_fast as ff
from fiun_fast.evaluation import answers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net() -> nn.Module:
    return clouds.fit(clouds.Net(), clouds.batches(clouds.cloud(60, 0)), epochs=2)


def test_answers_are_those_of_the_obvious_loop(net):
    loader = clouds.batches(clouds.cloud(50, 1))
    seen = answers(net, loader, features=True)
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(x) for x, _ in loader])
        features = torch.cat([net.body(x) for x, _ in loader])
    labels = torch.cat([y for _, y in loader])
    assert torch.equal(seen.logits, logits)
    assert torch.equal(seen.labels, labels)
    assert torch.equal(seen.features, features)
    p = logits.double().softmax(1)
    true = p.gather(1, labels[:, None])[:, 0].numpy()
    assert np.allclose(seen.confidence, true, rtol=1e-12)
    assert np.allclose(seen.margin, np.log(true / (1 - true)), rtol=1e-9)
    assert np.allclose(seen.entropy, -(p * p.log()).sum(1).numpy(), rtol=1e-12)
    assert seen.right.tolist() == (logits.argmax(1) == labels).tolist()


def test_sure_answers_have_finite_figures():
    sure = ff.evaluation.Answers(torch.tensor([[2000.0, 0.0], [0.0, 2000.0]]), torch.tensor([0, 0]))
    assert sure.margin.tolist() == [2000.0, -2000.0]
    assert sure.entropy.tolist() == [0.0, 0.0]
    assert sure.confidence.tolist() == [1.0, 0.0]


def test_a_model_is_left_as_it_was(net):
    net.train()
    net.body[3].eval()
    net.head.weight.requires_grad_(False)
    net(torch.randn(8, 6)).sum().backward()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    modes = [m.training for m in net.modules()]
    for features in (False, True):
        answers(net, clouds.batches(clouds.cloud(20, 2)), features=features)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert {name for name, p in net.named_parameters() if p.grad is not None} == grads.keys()
    assert all(torch.equal(p.grad, grads[name]) for name, p in net.named_parameters() if p.grad is not None)
    assert [m.training for m in net.modules()] == modes
    assert not net.head.weight.requires_grad
    assert not net.head._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_forms_of_batches(net):
    x, y = clouds.cloud(20, 3)
    plain = answers(net, [(x, y)])
    one_hot = nn.functional.one_hot(y, 3)
    for loader in (
        [(x, torch.zeros(20), y)],
        [(x, one_hot)],
        [(x, y[:, None].short())],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=7),
        [(x.numpy(), y.numpy())],
        [(x, torch.full_like(y, -100)), (x, y), (x[:0], y[:0])],
    ):
        seen = answers(net, loader)
        assert torch.allclose(seen.logits, plain.logits, atol=1e-6)
        assert torch.equal(seen.labels, y)
    named = answers(net, [{"x": x, "labels": y}])
    assert torch.equal(named.labels, y)
    halves = [(x, y.masked_fill(torch.arange(20) % 2 == 0, -100))]
    assert torch.equal(answers(net, halves, features=True).labels, y[1::2])
    assert len(answers(net, halves, features=True).features) == 10
    by_caller = answers(net, [(y, x)], forward_fn=lambda model, batch: (model(batch[1]), batch[0]))
    assert torch.equal(by_caller.logits, plain.logits)


class WithLoss(nn.Module):
    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.net, self.smoothing = clouds.Net(), smoothing

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels, label_smoothing=self.smoothing), "logits": logits}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_models_own_loss_does_not_matter(smoothing):
    x, y = clouds.cloud(20, 3)
    model = WithLoss(smoothing)
    assert torch.equal(answers(model, [{"x": x, "labels": y}]).logits, answers(model.net, [(x, y)]).logits)


def test_what_cannot_be_read_is_named(net):
    x, y = clouds.cloud(20, 3)
    for loader, text in (
        ([], "the forget set is empty|forget: it is empty"),
        ([(x, torch.full_like(y, -100))], "forget: it is empty"),
        (iter([]), "forget: it is empty.*iterator can be gone over once"),
        ((x, y), "forget: loader is a tuple of tensors"),
        ([(x, y + 1)], "forget: batch 0: target 3 is out of bounds"),
        ([(x, y), (x, y.float())], "forget: batch 1: .*expected classes"),
        ([(x, torch.rand(20, 3).softmax(1))], "forget: batch 0: .*probabilities of classes"),
    ):
        with pytest.raises(ff.FiunError, match=text):
            answers(net, loader, what="forget")
    net.head.bias.data[0] = torch.nan
    with pytest.raises(ff.EstimationError, match="retain: batch 0: the model's outputs are not finite"):
        answers(net, [(x, y)], what="retain")
    with pytest.raises(ff.EstimationError, match="one prediction a sample"):
        answers(nn.Conv1d(1, 4, 1), [(torch.randn(2, 1, 5), torch.zeros(2, 5, dtype=torch.long))])
    with pytest.raises(ff.EstimationError, match="without features"):
        answers(net, ff.evaluation.Answers(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)), features=True)


def test_a_layer_may_be_named(net):
    loader = [clouds.cloud(20, 3)]
    assert torch.equal(answers(net, loader, features=True, layer=net.body).features, loader[0][0])
    with pytest.raises(ff.EstimationError, match="the layer was given"):
        answers(net, loader, features=True, layer=nn.Linear(3, 3))


def test_nothing_heavy_is_imported_with_the_package():
    code = (
        "import sys, fiun_fast as ff; ff.evaluation.answers;"
        "heavy = {'scipy', 'sklearn', 'matplotlib', 'triton'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_an_error_with_the_line_for_pip(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    loader = [clouds.cloud(20, 3)]
    with pytest.raises(ff.MissingPackageError, match=r"scipy.*pip install 'fiun_fast\[evaluation\]'"):
        ff.evaluation.accuracies(net, forget=loader)
    with pytest.raises(ImportError, match="sklearn.*pip install"):
        ff.evaluation.entropy_attack(net, forget=loader, retain=loader, test=loader)
