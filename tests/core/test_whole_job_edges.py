"""Edges of the whole job: what a model, a loss or a loader may be like, and what must not be used again."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import fiun_fast as ff
from fiun_fast import forgetting
from fiun_fast.centring import roles_of
from fiun_fast.compiling import ReachedNode
from fiun_fast.estimates import MOST
from fiun_fast.estimating import some

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")]
dice = torch.Generator().manual_seed(0)
X = torch.randn(240, 8, generator=dice)
Y = X[:, :4].argmax(1)
LOADER = list(zip(X.split(16), Y.split(16), strict=True))
FORGET = list(zip(X[Y == 0][:32].split(16), Y[Y == 0][:32].split(16), strict=True))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model


def score() -> ff.ClassScore:
    return ff.ClassScore(LOADER, forget=0)


@dataclass
class Smooth:
    """A loss that compares by value, and so has no hash."""

    eps: float = 0.1

    def __call__(self, outputs, targets):
        return functional.cross_entropy(outputs, targets, label_smoothing=self.eps)


def test_a_loss_of_ones_own_is_used_and_needs_no_hash():
    model, loss = net(), Smooth()
    outcome = ff.unlearn_(model, data=LOADER, forget=FORGET, score=score(), estimate={"loss_fn": loss}, samples=None)
    assert outcome["model"].estimator == "batch"
    outcome.undo_()
    f = ff.estimate_fisher(model, LOADER, "last", loss_fn=loss)
    g = ff.estimate_fisher(model, FORGET, "last", loss_fn=loss)
    given = ff.unlearn_(model, data=f, forget=g, score=score())
    assert given["model"].alpha == outcome["model"].alpha
    given.undo_()
    how = {"estimators": ("softened", "expected"), "estimate": {"loss_fn": loss}}
    match = "estimate has a loss_fn, and softened, expected have losses of their own"
    with pytest.raises(ff.ArgumentError, match=match):
        ff.unlearn_(model, data=LOADER, forget=FORGET, score=score(), **how)


@pytest.mark.parametrize(
    "buffer", [torch.empty(0), torch.ones(3, dtype=torch.complex64).conj(), torch.eye(2).to_sparse()]
)
def test_odd_buffers_outside_the_last_layer(buffer):
    model = net()
    wanted = score().look("u", model)
    model.register_buffer("odd", buffer)
    outcome = ff.unlearn_(model, data=LOADER, forget=FORGET, score=score())
    assert outcome["model"].before == wanted
    outcome.undo_()


def test_kept_fishers_are_not_used_after_a_write_past_the_counters_or_another_hook():
    model, dag, request = net(), ff.InheritanceDAG(), ff.ForgetRequest("u", data=FORGET)
    dag.add_model("u", model, data=LOADER)
    hook = model[0].register_forward_hook(lambda *_: None)

    def kept() -> bool:
        ff.plan(dag, [request])
        (found,) = [one.fisher for one in dag["u"].estimates._kept.values()]
        return torch.equal(found.buffer, ff.estimate_fisher(model, LOADER, "last").buffer)

    assert kept()
    model[0].weight.data.mul_(0.5)
    assert kept()
    hook.remove()
    model[0].register_forward_hook(lambda _, given, output: -output)
    assert kept()
    for _ in range(2 * MOST):
        ff.plan(dag, [request], estimate={"loss_fn": lambda z, y: functional.cross_entropy(z, y)})
    assert len(dag["u"].estimates) <= MOST


class Cast(nn.Module):
    """Its logits are those of the last layer in another dtype, and clamped."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = model[:2], model[2]

    def forward(self, x):
        return self.head(self.body(x)).double().clamp(-1, 1)


class Inference(Cast):
    @torch.inference_mode()
    def forward(self, x):
        return self.head(self.body(x)).clamp_(-1, 1)


@pytest.mark.parametrize("kind", [Cast, Inference])
def test_a_clamp_after_the_last_layer_is_seen_whatever_hides_it(kind):
    model = kind(net())
    first = ff.ClassScore([(X[:4] * 1e-3, Y[:4]), *LOADER], forget=0)  # which the clamp leaves alone
    first.look("u", model)
    with torch.no_grad():
        model.head.weight[1] *= 1.1
    found, wanted = first.look("u", model), ff.ClassScore([(X[:4] * 1e-3, Y[:4]), *LOADER], forget=0).look("u", model)
    assert (found.kept, found.sure_kept) == pytest.approx((wanted.kept, wanted.sure_kept), abs=1e-6)


class Own(nn.Module):
    """Its own loss is one of sigmoids; trained so that 0 wins."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        with torch.no_grad():
            self.net[2].weight.sub_(0.5)
            self.net[2].bias.sub_(12)

    def forward(self, x, labels=None):
        z = self.net(x)
        if labels is None:
            return SimpleNamespace(logits=z)
        target = functional.one_hot(labels, 4).float()
        return SimpleNamespace(logits=z, loss=functional.binary_cross_entropy_with_logits(z, target))


def named(loader):
    return [{"x": x, "labels": y} for x, y in loader]


@pytest.mark.parametrize("estimators", [None, "batch"])
def test_what_sigmoids_are_taken_of_is_not_centred(estimators):
    model, plain = Own(), ff.ClassScore(named(LOADER), forget=0)
    how = {"data": named(LOADER), "forget": named(FORGET), "left": 0, "lost": 0, "estimators": estimators}
    outcome = ff.unlearn_(model, score=plain, **how)
    assert not outcome["model"].met
    assert not outcome["model"].centered
    outcome.undo_()

    def bce(model, batch):
        return functional.binary_cross_entropy_with_logits(
            model(batch[0]), functional.one_hot(batch[1], 4).float()
        ), None

    estimate = {"estimators": "batch", "estimate": {"forward_fn": bce}}
    outcome = ff.unlearn_(model.net, data=LOADER, forget=FORGET, score=score(), left=0, lost=0, **estimate)
    assert not outcome["model"].met
    assert not outcome["model"].centered
    outcome.undo_()


def test_every_fisher_has_to_say_what_it_is_of():
    model = net()
    told = ff.estimate_fisher(model, LOADER, "last")
    label_free = ff.estimate_fisher(model, LOADER, "last", estimator="label_free")
    silent = ff.Fisher.from_dict({key: t.clone() for key, t in label_free.as_dict().items()})
    pairs = ((told, told, True), (silent, told, False), (told, silent, False), (told, label_free, False))
    for original, forget, may in pairs:
        node, requests = ReachedNode("u", model, original, (0,)), [ff.ForgetRequest("u", forget)]
        assert (roles_of(node, requests, model[2]) is not None) == may


def test_rows_that_overflow_when_centred_are_left_alone():
    model = net().half()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, 0  # a feature that is 0: no logit overflows
        model[2].weight[:, 0] = torch.tensor([6e4, -6e4, -6e4, -6e4])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    half = [(x.half(), y) for x, y in LOADER]
    how = {"data": half, "forget": [(x.half(), y) for x, y in FORGET], "left": 0, "lost": 0, "points": 4}
    outcome = ff.unlearn_(model, score=ff.ClassScore(half, forget=0), estimators="softened", **how)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    outcome.undo_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_interruption_while_the_outcome_is_made_takes_the_run_back(monkeypatch):
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def made(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(forgetting, "NodeOutcome", made)
    with pytest.raises(KeyboardInterrupt):
        ff.unlearn_(model, data=LOADER, forget=FORGET, score=score())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "batch",
    [{"x": torch.zeros(8, 3)}, UserDict({"x": torch.zeros(8, 3)}), (np.zeros((8, 3)), np.zeros(8))],
    ids=["dict", "UserDict", "numpy"],
)
def test_about_so_many_samples_of_any_form_of_batch(batch):
    assert sum(1 for _ in some([batch] * 250, 512)) == 64


def test_a_dataset_in_the_place_of_a_loader_is_told_so():
    with pytest.raises(ff.ArgumentError, match="a dataset of single samples"):
        ff.unlearn_(net(), data=TensorDataset(X, Y), forget=FORGET, score=score())


class Flat(nn.Module):
    """A tagger whose logits are [B * T, C] and whose labels are [B, T], of a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.fc = nn.Embedding(9, 6), nn.Linear(6, 5)

    def forward(self, ids, labels=None):
        z = self.fc(self.embed(ids)).flatten(0, 1)
        return {"logits": z} if labels is None else {"logits": z, "loss": functional.cross_entropy(z, labels.flatten())}


def test_softened_of_flattened_predictions_and_of_a_loss_of_sigmoids():
    model, ids, labels = Flat(), torch.randint(9, (4, 3), generator=dice), torch.randint(5, (4, 3), generator=dice)
    found = ff.estimate_fisher(model, [{"ids": ids, "labels": labels}], estimator="softened")
    loss = functional.cross_entropy(model(ids)["logits"] / 4, labels.flatten())
    for name, g in zip(found.layout.names, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.allclose(found[name], g**2, rtol=1e-4, atol=1e-12)
