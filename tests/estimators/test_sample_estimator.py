"""The empirical and the expected Fisher, for every layer kind, against a float64 backward for every sample."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from fisher_models import LAYERS, NETWORKS, Subject, settled
from torch import nn
from torch.nn import functional

import fiun_fast as ff


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(subject: Subject, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settled(subject.make())


def oracle(model: nn.Module, loader, loss_fn=functional.cross_entropy) -> dict[str, torch.Tensor]:
    """(1/N) sum of squared gradients in float64, sample by sample."""
    model = copy.deepcopy(model).double().eval()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    samples = 0
    for x, y in loader:
        for n in range(len(x)):
            one = x[n : n + 1]
            loss = loss_fn(model(one.double() if one.is_floating_point() else one), y[n : n + 1])
            model.zero_grad()
            loss.backward()
            for name, p in parameters.items():
                if p.grad is not None:
                    total[name] += p.grad.to_dense() ** 2
            samples += 1
    return {name: value / samples for name, value in total.items()}


def expected_oracle(model: nn.Module, loader) -> dict[str, torch.Tensor]:
    """(1/N) sum over samples and classes of p(y|x) g(y)^2 in float64."""
    model = copy.deepcopy(model).double().eval()
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    samples = 0
    for x, _ in loader:
        for n in range(len(x)):
            one = x[n : n + 1]
            logits = model(one.double() if one.is_floating_point() else one)
            p = logits.detach().softmax(1)[0]
            for c in range(len(p)):
                losses = functional.cross_entropy(logits, torch.tensor([c]))
                found = torch.autograd.grad(losses, list(parameters.values()), retain_graph=True, allow_unused=True)
                for name, g in zip(parameters, found, strict=True):
                    if g is not None:
                        total[name] += p[c] * g.to_dense() ** 2
            samples += 1
    return {name: value / samples for name, value in total.items()}


def close(fisher: ff.Fisher, wanted: dict[str, torch.Tensor], within: float = 2e-5) -> None:
    assert set(fisher.layout.names) == set(wanted)
    for name in fisher.layout.names:
        error = (fisher[name].double() - wanted[name]).abs().max()
        assert error <= within * wanted[name].abs().max() + 1e-13, (name, fisher.provenance.how[name])


def warned(subject: Subject):
    """What falls back to per-sample gradients says so."""
    return pytest.warns(ff.FallbackWarning, match="no closed form") if subject.fallback else nullcontext()


def check_record(fisher: ff.Fisher, subject: Subject) -> None:
    """Closed forms where they are expected, and nowhere else."""
    for name, how in fisher.provenance.how.items():
        by_sample = how.startswith("per-sample gradients")
        assert by_sample == name.startswith(subject.fallback or ("none",)), (name, how)
        assert by_sample or how.startswith("closed form") or how == "no gradient reached it", (name, how)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("subject", LAYERS + NETWORKS, ids=lambda s: s.id)
def test_sample(subject):
    model, loader = made(subject), subject.batches((4, 3, 5))
    with warned(subject):
        fisher = ff.estimate_fisher(model, loader, estimator="sample")
    close(fisher, oracle(model, loader))
    check_record(fisher, subject)
    assert fisher.provenance == ff.Provenance("sample", 3, 12)


@pytest.mark.parametrize("subject", [s for s in LAYERS + NETWORKS if s.id in (
    "linear", "linear-positions", "conv2d", "embedding", "called-twice", "resnet", "vit", "gpt-tied", "lstm")],
    ids=lambda s: s.id)  # fmt: skip
def test_expected_over_every_class(subject):
    model, loader = made(subject), subject.batches((4, 1, 5))
    with warned(subject):
        fisher = ff.estimate_fisher(model, loader, estimator="expected", samples=0)
    close(fisher, expected_oracle(model, loader))


def test_expected_by_drawing_labels():
    model, subject = made(LAYERS[0]), LAYERS[0]
    loader = subject.batches((6, 6))
    wanted = expected_oracle(model, loader)
    fisher = ff.estimate_fisher(model, loader, estimator="expected", samples=250)
    assert "exact over classes" in fisher.provenance.how["3.weight"]
    for name in ("3.weight", "3.bias"):
        assert torch.allclose(fisher[name].double(), wanted[name], rtol=1e-4)
    for name in ("0.weight", "0.bias"):  # 3,000 draws
        error = (fisher[name].double() - wanted[name]).abs().max() / wanted[name].max()
        assert 1e-6 < error < 0.15
    again, other = (
        ff.estimate_fisher(model, loader, estimator="expected", samples=3, seed=seed).buffer for seed in (5, 6)
    )
    assert torch.equal(again, ff.estimate_fisher(model, loader, estimator="expected", samples=3, seed=5).buffer)
    assert not torch.equal(again, other)


def test_the_model_is_left_as_it_was():
    model = made(NETWORKS[0]).train()
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = torch.randn_like(model[0].weight)
    kept = {name: (p.grad, p.requires_grad) for name, p in model.named_parameters()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    loader = NETWORKS[0].batches((4, 3))
    for estimator in ("sample", "expected"):
        ff.estimate_fisher(model, loader, params="*", estimator=estimator)
    assert all(p.grad is kept[name][0] and p.requires_grad == kept[name][1] for name, p in model.named_parameters())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_part_of_the_model():
    subject = NETWORKS[0]
    model, loader = made(subject), subject.batches((4, 3))
    whole = oracle(model, loader)
    for params in ("4.*", "*conv2*", "3.bn1.bias", "0.weight"):
        part = ff.estimate_fisher(model, loader, params=params, estimator="sample")
        close(part, {name: whole[name] for name in part.layout.names})


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (1, 6), (2, 5, 1)])
def test_small_batches(sizes):
    model, loader = made(LAYERS[0]), LAYERS[0].batches(sizes)
    close(ff.estimate_fisher(model, loader, estimator="sample"), oracle(model, loader))


def test_losses_of_ones_own():
    model, loader = made(LAYERS[2]), LAYERS[2].batches((4, 3))
    smooth = lambda out, y: functional.cross_entropy(out, y, label_smoothing=0.2)
    wanted = oracle(model, loader, smooth)
    close(ff.estimate_fisher(model, loader, estimator="sample", loss_fn=smooth), wanted)
    each = lambda out, y: functional.cross_entropy(out, y, label_smoothing=0.2, reduction="none")
    close(ff.estimate_fisher(model, loader, estimator="sample", loss_fn=each), wanted)
    decayed = lambda out, y: functional.cross_entropy(out, y) + model[0].weight.square().sum()
    with pytest.warns(ff.FallbackWarning, match=r"1 of 4 parameters .* '0.weight': used by square"):
        fisher = ff.estimate_fisher(model, loader, estimator="sample", loss_fn=decayed)
    close(fisher, oracle_with_decay(model, loader))
    assert fisher.provenance.how["0.weight"].startswith("per-sample gradients")
    assert fisher.provenance.how["0.bias"].startswith("closed form")


def oracle_with_decay(model, loader):
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in loader:
        for n in range(len(x)):
            model.zero_grad()
            loss = functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) + model[0].weight.square().sum()
            loss.backward()
            for name, p in model.named_parameters():
                total[name] += p.grad**2
    model.zero_grad()
    return {name: value / sum(len(y) for _, y in loader) for name, value in total.items()}


def test_dense_targets_and_positions_that_do_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    x, y = torch.randn(4, 3, 5, 5), torch.randint(5, (4, 5, 5))
    y[:, 0] = -100
    y[1, 1:3] = -100
    close(ff.estimate_fisher(model, [(x, y)], estimator="sample"), oracle(model, [(x, y)]))


def test_batches_of_other_forms():
    subject = NETWORKS[2]
    model, loader = made(subject), subject.batches((4, 3))
    named = [{"ids": x, "labels": y, "scale": torch.tensor(1.0)} for x, y in loader]
    forward = lambda m, b: ({"logits": m(b["ids"]) * b["scale"]}, b["labels"])
    loss = lambda out, y: functional.cross_entropy(out["logits"], y)
    fisher = ff.estimate_fisher(model, named, estimator="sample", forward_fn=forward, loss_fn=loss)
    close(fisher, oracle(model, loader))
    assert fisher.provenance.how["out.weight"] == "closed form, linear weight"


def test_batches_that_cannot_be_cut():
    class Opaque:
        def __init__(self, x, y):
            self.x, self.y = x, y

    model, loader = made(LAYERS[0]), LAYERS[0].batches((4, 3))
    with pytest.warns(ff.FallbackWarning, match="4 of 4 parameters .*: a batch cannot be cut into samples"):
        fisher = ff.estimate_fisher(
            model, [Opaque(*b) for b in loader], estimator="sample", forward_fn=lambda m, b: (m(b.x), b.y)
        )
    close(fisher, oracle(model, loader))
    assert "cannot be cut into samples: it holds no tensor" in fisher.provenance.how["0.weight"]
    assert fisher.provenance.samples == 7


def test_samples_that_depend_on_one_another():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 5))
    model = nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2, track_running_stats=False),
                          nn.Flatten(), nn.Linear(4, 5))  # fmt: skip
    loader = [(torch.randn(5, 6), torch.randint(5, (5,)))]
    with pytest.warns(ff.FallbackWarning, match="depend on the others"):
        fisher = ff.estimate_fisher(model, loader, estimator="sample")
    close(fisher, oracle(model, loader), 1e-4)
    assert "depend on the others of its batch" in fisher.provenance.how["0.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    subject = next(s for s in LAYERS if s.id == "conv2d-dilation-groups")
    model, loader = made(subject), subject.batches((4, 3))
    wanted = oracle(model.to(dtype), loader)
    cast = [(x.to(dtype), y) for x, y in loader]
    fisher = ff.estimate_fisher(model, cast, estimator="sample")
    assert fisher.buffer.dtype == torch.float32
    close(fisher, wanted, 2e-5 if dtype == torch.float64 else 0.05 if dtype == torch.bfloat16 else 0.01)


def test_autocast():
    model, loader = made(NETWORKS[1]), NETWORKS[1].batches((4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        fisher = ff.estimate_fisher(model, loader, estimator="sample")
    close(fisher, oracle(model, loader), 0.2)
    assert fisher.provenance.how["patch.weight"] == "closed form, conv weight"


def test_a_layer_that_only_some_batches_use():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.more, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x):
            x = torch.tanh(self.fc(x))
            return self.head(torch.tanh(self.more(x)) if len(x) == 4 or x.shape[0] < 3 else x)

    torch.manual_seed(0)
    model = Sometimes()
    loader = LAYERS[0].batches((4, 5, 4))
    loader = [(x[:, :6], y) for x, y in loader]
    with pytest.warns(ff.FallbackWarning, match="'more.weight', 'more.bias': not used alike"):
        fisher = ff.estimate_fisher(model, loader, estimator="sample")
    assert "more.weight" in str(fisher.provenance)
    assert "not used alike in every batch" in fisher.provenance.how["more.weight"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loader": []}, ff.EstimationError, "the loader is empty"),
        ({"loader": [{"x": 1}]}, ff.EstimationError, r"a batch is a dict of 1, expected \(inputs, targets\)"),
        (
            {"loss_fn": lambda out, y: out},
            ff.EstimationError,
            r"the loss is shape \[\d, 5\], expected a scalar, ",
        ),
        ({"loss_fn": lambda out, y: 1.0}, ff.EstimationError, "the loss is a float, expected a scalar"),
        ({"loss_fn": lambda out, y: out.detach().sum()}, ff.EstimationError, "the loss does not depend on 0.weight"),
        ({"backend": "warp"}, ff.BackendError, "unknown backend 'warp'"),
        ({"samples": -1, "estimator": "expected"}, ff.ArgumentError, "samples is -1, expected a whole number"),
        (
            {"loss_fn": functional.cross_entropy, "estimator": "expected"},
            ff.ArgumentError,
            "estimator 'expected' has a loss of its own, cross entropy",
        ),
        (
            {"estimator": "expected", "forward_fn": lambda m, b: (m(b[0])[..., None], b[1])},
            ff.EstimationError,
            r"targets are int64 \[2\], expected classes, int64 \[2, 5\] or \[2, 1\], as the outputs are",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    subject = LAYERS[0]
    model = made(subject)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        ff.estimate_fisher(model, **{"loader": subject.batches((4,)), "estimator": "sample", **arguments})
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
