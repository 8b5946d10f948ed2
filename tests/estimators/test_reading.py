"""The forms of batches and of outputs that are read, by every estimator alike."""

from __future__ import annotations

from collections import OrderedDict, UserDict

import pytest
import torch
from fisher_models import LAYERS
from test_sample_estimator import close, expected_oracle, made, oracle
from torch import nn
from torch.nn.functional import cross_entropy

import fiun_fast as ff

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::fiun_fast.FallbackWarning")]

SUBJECT = LAYERS[0]
ESTIMATORS = ("batch", "softened", "sample", "expected", "label_free")


class Output(OrderedDict):
    """As transformers' ModelOutput: a dict whose entries are attributes too."""

    __getattr__ = OrderedDict.__getitem__


class Labelled(nn.Module):
    """Called with keywords, and with labels has a loss; returns one of several things."""

    def __init__(self, returns: str, factor: float = 1.0) -> None:
        super().__init__()
        self.net, self.returns, self.factor = made(SUBJECT), returns, factor

    def forward(self, pixels, labels=None, label=None, label_ids=None, **others):
        logits = self.net(pixels)
        labels = next((given for given in (labels, label, label_ids) if given is not None), None)
        loss = None if labels is None else self.factor * cross_entropy(logits, labels)
        if self.returns == "tuple":
            return (logits, pixels) if loss is None else (loss, logits, pixels)
        if self.returns == "loss alone":
            return {"loss": loss}
        found = {"logits": logits} if loss is None else {"loss": loss, "logits": logits}
        return Output(found) if self.returns == "ModelOutput" else found


def batches() -> list:
    return SUBJECT.batches((4, 3, 1))


def plain(estimator: str, **options) -> ff.Fisher:
    return ff.estimate_fisher(made(SUBJECT), batches(), estimator=estimator, **options)


def same(fisher: ff.Fisher, wanted: ff.Fisher) -> None:
    """Equal up to the order of sums."""
    assert torch.allclose(fisher.buffer, wanted.buffer, rtol=1e-4, atol=1e-9)
    assert fisher.provenance == wanted.provenance


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "form",
    [lambda x, y: (x, y + 50, y), lambda x, y: [x, ["name"] * len(y), y], lambda x, y: [x, y]],
)
def test_tuples_whose_last_part_is_the_target(estimator, form):
    fisher = ff.estimate_fisher(made(SUBJECT), [form(x, y) for x, y in batches()], estimator=estimator)
    assert torch.equal(fisher.buffer, plain(estimator).buffer)


@pytest.mark.parametrize("estimator", ["expected", "label_free"])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x], lambda x: (x,), lambda x: {"pixels": x}])
def test_inputs_alone(estimator, form):
    given = [form(x) for x, _ in batches()]
    model = Labelled("tuple") if isinstance(given[0], dict) else made(SUBJECT)
    assert torch.equal(ff.estimate_fisher(model, given, estimator=estimator).buffer, plain(estimator).buffer)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("returns", ["tuple", "dict", "ModelOutput"])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_dicts_with_labels(estimator, returns, kind):
    """UserDict is what a tokenizer's BatchEncoding is."""
    keys = {"tuple": "label", "dict": "label_ids", "ModelOutput": "labels"}
    given = [kind({"pixels": x, keys[returns]: y, "flag": True, "scale": torch.tensor(1.0)}) for x, y in batches()]
    model = Labelled(returns)
    fisher = ff.estimate_fisher(model, given, estimator=estimator)
    assert [name.removeprefix("net.") for name in fisher.layout.names] == list(plain(estimator).layout.names)
    same(fisher, plain(estimator))
    if estimator == "batch":
        assert torch.equal(fisher.buffer, plain(estimator).buffer)
    if estimator == "sample":  # the model's own loss is recognised as the cross entropy that it is
        assert fisher.provenance.how["net.0.weight"].startswith("closed form")
    head = ff.estimate_fisher(model, given, params=ff.last_layer(model), estimator=estimator)
    same(head, plain(estimator, params="3.*"))
    own = estimator in ("batch", "sample")  # their loss is what the model returns, not one of its logits
    assert all(way.startswith("closed form at the head") != own for way in head.provenance.how.values())


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_the_models_own_loss_is_what_counts(estimator):
    given = [{"pixels": x, "labels": y} for x, y in batches()]
    for returns in ("ModelOutput", "loss alone"):
        fisher = ff.estimate_fisher(Labelled(returns, factor=2.0), given, estimator=estimator)
        assert torch.allclose(fisher.buffer, 4 * plain(estimator).buffer, rtol=1e-4)
        assert fisher.provenance.samples == 8


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_a_loss_of_the_callers_comes_before_the_models(estimator):
    given = [{"pixels": x, "labels": y} for x, y in batches()]
    smooth = lambda out, y: cross_entropy(out, y, label_smoothing=0.3)
    fisher = ff.estimate_fisher(Labelled("ModelOutput", factor=2.0), given, estimator=estimator, loss_fn=smooth)
    same(fisher, plain(estimator, loss_fn=smooth))
    assert estimator != "sample" or fisher.provenance.how["net.0.weight"].startswith("closed form")


def test_exact_fishers_of_dicts_against_float64():
    given = [{"pixels": x, "labels": y} for x, y in batches()]
    for estimator, samples, wanted in (("sample", 1, oracle), ("expected", 0, expected_oracle)):
        fisher = ff.estimate_fisher(Labelled("dict"), given, estimator=estimator, samples=samples)
        values = wanted(made(SUBJECT), batches())
        close(fisher, {f"net.{name}": value for name, value in values.items()})


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.net, self.make = made(SUBJECT), make

    def forward(self, x):
        return self.make(self.net(x), x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "make",
    [
        lambda out, x: (out, x),
        lambda out, x: [out],
        lambda out, x: Output(logits=out),
        lambda out, x: {"features": x, "out": out},
    ],
)
def test_what_models_return(estimator, make):
    fisher = ff.estimate_fisher(Returns(make), batches(), estimator=estimator)
    assert torch.equal(fisher.buffer, plain(estimator).buffer)


X, Y = SUBJECT.batches((4,))[0]


@pytest.mark.parametrize(
    ("model", "batch", "options", "message"),
    [
        (
            None,
            ("x", "y", "z", "w"),
            {},
            r"a batch is a tuple of 4, expected \(inputs, targets\), \(inputs, …, targets\), or a",
        ),
        (None, (X,), {}, "a batch is a tuple of 1, expected"),
        (None, (), {}, "a batch is a tuple, expected"),
        (
            None,
            ("a", "b"),
            {"estimator": "label_free"},
            r"tuple of 2, expected \(inputs, targets\), inputs alone, or a",
        ),
        (None, ([X], Y), {}, "the inputs of a batch are a list, expected a tensor; pass forward_fn="),
        (None, (X, ["b"]), {}, "the targets of a batch are a list, expected a tensor"),
        (Labelled("dict"), {"pixels": X}, {}, "a batch is a dict with pixels, without labels; .* pass forward_fn="),
        (Returns(lambda out, x: out), {"x": X, "y": Y, "label": Y}, {}, "a batch holds 'y', which the model does not"),
        (
            Labelled("loss alone"),
            {"pixels": X, "labels": Y},
            {"estimator": "expected"},
            r"returns a dict of loss float32 \[\], expected logits .B, classes.; pass forward_fn=",
        ),
        (
            Returns(lambda out, x: {"x": x}),
            (X, Y),
            {},
            r"returns a dict of x float32 \[.*, expected a tensor, a tuple .*, or .logits; say which "
            r".*model, batch: \(model\(batch\[0\]\)\[\"x\"\], targets",
        ),
        (
            Returns(lambda out, x: {"x": x}),
            {"x": X},
            {"estimator": "label_free"},
            r"returns a dict of x float32 \[.*model, batch: \(model\(\*\*batch\)\[\"x\"\], targets",
        ),
        (
            Labelled("dict", factor=torch.ones(2)),
            {"pixels": X, "labels": Y},
            {},
            "called with the keywords pixels, labels and returned a dict of .* without a scalar .loss; pass forward_fn",
        ),
    ],
)
def test_what_is_not_understood(model, batch, options, message):
    with pytest.raises((ff.EstimationError, TypeError), match=message):
        ff.estimate_fisher(made(SUBJECT) if model is None else model, [batch], **options)


class Fussy(Labelled):
    def forward(self, pixels, labels):
        if len(pixels) == 1:
            raise ValueError("a single sample")
        return super().forward(pixels, labels)


def test_a_loss_of_the_models_own_needs_samples_that_can_be_cut_or_a_form_that_is_known():
    batch = {"pixels": X, "labels": Y}
    fisher = ff.estimate_fisher(Fussy("dict"), [batch], estimator="sample")
    close(fisher, {f"net.{name}": value for name, value in oracle(made(SUBJECT), [(X, Y)]).items()})
    with pytest.raises(
        ff.EstimationError, match="the model's own loss is one number for 4 samples that cannot be told"
    ):
        ff.estimate_fisher(Fussy("dict", factor=2.0), [batch], estimator="sample")


def test_an_epoch_without_samples_is_empty():
    for estimator in ("sample", "expected"):
        with pytest.raises(ff.EstimationError, match="the loader is empty"):
            ff.estimate_fisher(made(SUBJECT), [(X[:0], Y[:0])], params="3.*", estimator=estimator)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: ff.estimate_fisher(model, [], None, "batch"),
        lambda model: ff.estimate_fishers({"a": model}, [], None, "batch"),
        lambda model: ff.FisherAccumulator(model, None, torch.float64),
        lambda model: ff.FisherAccumulator(model).update(True),
        lambda model: ff.FisherAccumulator(model).result(True),
        lambda model: ff.FisherAccumulator(model).streaming(2),
    ],
)
def test_options_are_keywords(call):
    with pytest.raises(TypeError, match="positional argument"):
        call(nn.Linear(2, 2))
