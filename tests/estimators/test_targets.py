"""Targets of every kind that cross entropy takes, and a message that helps for those that it does not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from test_batches import ESTIMATORS, PAGE, Net, by_drop_in, close, estimated, oracle, pairs
from torch import nn
from torch.nn import functional

import fiun_fast as ff

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.* no closed form")]

# outputs, targets -> what they are to cross entropy in torch's own form
LABELS = {
    "classes of any integer dtype, `[B]` or `[B, 1]`": [
        *(lambda y, dtype=dtype: y.to(dtype) for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8)),
        lambda y: y[:, None],
        lambda y: y.int()[:, None],
    ],
    "one-hot, or probabilities that add up to 1, `[B, C]`": [
        lambda y: functional.one_hot(y, 3),
        lambda y: functional.one_hot(y, 3).float(),
        lambda y: functional.one_hot(y, 3).double(),
        lambda y: functional.one_hot(y, 3).bool(),
    ],
}


@pytest.mark.parametrize("row", LABELS)
@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_labels(estimator, row):
    for form in LABELS[row]:
        loader = [(x, form(y)) for x, y in pairs()]
        for params in (None, "last"):
            found = ff.estimate_fisher(Net(), loader, params, estimator=estimator).buffer
            close(found, oracle(estimator, pairs())[-len(found) :])
        if estimator == "batch":
            for mode in ("strict", "corrected"):
                close(by_drop_in(mode, loader), oracle("batch", pairs()))


def test_probabilities():
    soft = [(x, torch.rand(len(y), 3).softmax(1)) for x, y in pairs()]
    for estimator in ("batch", "sample"):
        close(
            estimated(estimator, soft),
            oracle(estimator, soft, own=lambda z, y: functional.cross_entropy(z, y.double())),
        )


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("estimator", ["batch", "sample", "expected"])
def test_positions(estimator):
    """The loss of a sample is the mean over its positions that count."""
    x, y = torch.randn(3, 2, 4, 4), torch.randint(3, (3, 4, 4))
    y[:, 1] = -100
    y[2, 2] = -100
    model = Pixels()
    total = torch.zeros(3 * 2 * 9 + 3, dtype=torch.float64)
    twin = Pixels().double()
    gradient = lambda loss: torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True)]
    )
    z = twin(x.double())
    if estimator == "batch":
        total = gradient(functional.cross_entropy(z, y)) ** 2
    for n in range(3) if estimator == "sample" else ():
        total += gradient(functional.cross_entropy(z[n : n + 1], y[n : n + 1])) ** 2 / 3
    for n in range(3) if estimator == "expected" else ():
        scores = z[n].flatten(1).t()[y[n].flatten() != -100]
        for row in scores:
            for c, p in enumerate(row.softmax(0).detach()):
                total += p * gradient(functional.cross_entropy(row, torch.tensor(c))) ** 2 / len(scores) ** 2 / 3
    for targets in (y, y.int(), y[:, None]):
        close(estimated(estimator, [(x, targets)], model), total)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (3, lambda y: y.float(), r"the targets are float32 \[4\], expected classes, .*ers, .* targets.long\(\)"),
        (3, lambda y: y.double()[:, None], r"the targets are float64 \[4, 1\], expected classes, which are integers"),
        (3, lambda y: torch.tensor([[1, 1, 0]] * 4), "which as probabilities of classes would be pos.*binary_"),
        (3, lambda y: torch.randn(4, 3), "would be positive and add up to 1; pass loss_fn"),
        (3, lambda y: y + 1, "target 3 is out of bounds, expected classes 0 to 2, .*; classes count from 0"),
        (3, lambda y: y - 1, "target -1 is out of bounds"),
        (3, lambda y: y[:2], r"the targets are int64 \[2\], expected classes, int64 \[4\], as the out"),
        (3, lambda y: y[:, None].expand(4, 2), r"int64 \[4, 2\], expected classes, int64 \[4\]"),
        (1, lambda y: y % 2, r"\[\d, 1\], one number a sample, whose cross entropy is always 0; pass loss_fn"),
        (1, lambda y: torch.randn(4), "one number a sample, whose cross entropy is always 0; pass loss_fn, such as"),
        (1, lambda y: torch.randn(4, 1), "one number a sample, whose cross entropy is always 0"),
        (1, lambda y: (y % 2)[:, None], "one number a sample, whose cross entropy is always 0"),
        (0, lambda y: torch.randn(4), r"the outputs are float32 \[\d\], expected \[B, classes\]; one number a sample"),
        (0, lambda y: y % 2, r"the outputs are float32 \[\d\], expected \[B, classes\]"),
        (3, lambda y: torch.complex(y * 1.0, y * 1.0), r"the targets are complex64 \[4\], expected classes"),
    ],
)
@pytest.mark.parametrize("way", ["batch", "sample", "strict", "corrected"])
def test_targets_that_do_not_fit(outputs, targets, message, way):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, max(outputs, 1)), nn.Identity() if outputs else nn.Flatten(0))
    x, y = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    good = [(x, y)] if outputs == 3 else []
    loader = [*good, (x, targets(y))]
    with pytest.raises(ff.EstimationError, match=f"batch {len(good)}: .*{message}"):
        ff.estimate_fisher(model, loader, estimator=way) if way in ESTIMATORS else by_drop_in(way, loader, model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) or way == "strict"


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_one_output_a_sample_with_the_right_loss(estimator):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    for y, loss in (
        (torch.randn(6), lambda z, y: functional.mse_loss(z.squeeze(1), y)),
        ((torch.randn(6) > 0).float(), lambda z, y: functional.binary_cross_entropy_with_logits(z.squeeze(1), y)),
    ):
        x = torch.randn(6, 4)
        found = ff.estimate_fisher(model, [(x, y)], estimator=estimator, loss_fn=loss)
        assert found.buffer.all()
    with pytest.raises(ff.EstimationError, match=r"batch 0: the outputs are \[\d, 1\], one number a sample"):
        ff.estimate_fisher(model, [(x, y)], estimator="expected")


# ---- what sample cannot cut -----------------------------------------------------------------------------------------


class ReturnsItsLoss(Net):
    def forward(self, x):
        return super().forward(x).square().mean()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_that_returns_one_number(estimator):
    message = {"expected": r"the model returns outputs \[\], expected logits", "label_free": "the outputs are a scalar"}
    with pytest.raises(
        ff.EstimationError, match="batch 0: .*" + message.get(estimator, "the model returns one number")
    ):
        ff.estimate_fisher(ReturnsItsLoss(), pairs(), estimator=estimator)
    if estimator in ("batch", "sample"):
        with pytest.raises(ff.EstimationError, match=r"batch 0: .*(expected \[B, …\], from which|loss is shape)"):
            ff.estimate_fisher(ReturnsItsLoss(), pairs(), estimator=estimator, loss_fn=lambda out, y: out * y)
        given = lambda model, batch: (model(batch[0]), None)
        found = ff.estimate_fisher(ReturnsItsLoss(), pairs(), estimator=estimator, forward_fn=given)
        close(found.buffer, oracle(estimator, pairs(), own=lambda z, y: z.square().mean()))


def test_a_loss_that_does_not_take_one_sample():
    squeezed = lambda out, y: functional.cross_entropy(out.squeeze(), y)
    with pytest.raises(
        ff.EstimationError, match=r"outputs \[1, …\] and targets \[1, …\], which a squeeze\(\) would change"
    ):
        ff.estimate_fisher(Net(), pairs((4,)), estimator="sample", loss_fn=squeezed)
    close(ff.estimate_fisher(Net(), pairs((4, 3)), loss_fn=squeezed).buffer, oracle("batch", pairs((4, 3))))
    with pytest.raises(ff.EstimationError, match="batch 1: the loss .* cannot be computed: .*squeeze"):
        ff.estimate_fisher(Net(), pairs((4, 1)), loss_fn=squeezed)
    binary = lambda out, y: functional.binary_cross_entropy_with_logits(out.squeeze(), y)
    model, loader = nn.Linear(4, 1), [(x, (y > 0).float()) for x, y in pairs((4,))]
    assert ff.estimate_fisher(model, loader, loss_fn=binary).buffer.any()
    with pytest.raises(ff.EstimationError, match=r"batch 0: the loss of .* \[1, 1\] and float32 \[1\] cannot be"):
        ff.estimate_fisher(model, loader, estimator="sample", loss_fn=binary)
    mine = lambda out, y: (_ for _ in ()).throw(KeyError("mine"))
    with pytest.raises(ff.EstimationError, match="batch 0: the loss of .* cannot be computed: KeyError: 'mine'"):
        ff.estimate_fisher(Net(), pairs((4,)), loss_fn=mine)


def test_every_row_of_the_table_has_a_test():
    table = PAGE.read_text(encoding="utf-8").partition("| outputs | targets | loss |")[2].partition("Other targets")[0]
    rows = set(re.findall(r"^\| (?:.+?) \| (.+?) \|", table, re.MULTILINE)[1:])
    positions = {"classes `[B, …]` or `[B, 1, …]`": test_positions, "classes `[B, T]`": test_tokens}
    assert rows == {*LABELS, *positions, "-100"}


def test_tokens():
    """Classes on the last axis: as on axis 1, transposed."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(5, 2, 4), torch.randint(3, (5, 2))
    for estimator in ("batch", "sample"):
        transposed = lambda m, batch: (m(batch[0]).transpose(1, 2), batch[1])
        wanted = ff.estimate_fisher(model, [(x, y)], estimator=estimator, forward_fn=transposed)
        for targets in (y, y[..., None]):
            found = ff.estimate_fisher(model, [(x, targets)], estimator=estimator)
            assert torch.allclose(found.buffer, wanted.buffer, rtol=1e-5)


class OwnLossOfAZeroHead(torch.nn.Module):
    """All logits are 0, where many losses have the value of a plain cross entropy, and none its gradient."""

    def __init__(self, own: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.own, self.body, self.head = own, torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.body(x)))
        return SimpleNamespace(logits=logits, loss=self.own(logits, labels))


@pytest.mark.filterwarnings("ignore::fiun_fast.FallbackWarning")
@pytest.mark.parametrize(
    "own",
    [
        functional.cross_entropy,
        lambda o, y: functional.cross_entropy(o, y, label_smoothing=0.3),
        lambda o, y: functional.cross_entropy(o / 4, y),
        lambda o, y: functional.cross_entropy(o, y) + 3e-6 * torch.sin(1e5 * o).mean(),
        lambda o, y: functional.cross_entropy(o, y) + o.mean(),
    ],
)
def test_a_loss_that_only_has_the_value_of_a_known_one_is_not_taken_for_it(own):
    model, x, y = OwnLossOfAZeroHead(own), torch.randn(7, 5), torch.randint(0, 3, (7,))
    found = ff.estimate_fisher(model, [{"x": x, "labels": y}], estimator="sample")
    twin = copy.deepcopy(model).double()
    wanted = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for i in range(7):
        gradients = torch.autograd.grad(twin(x[i : i + 1].double(), y[i : i + 1]).loss, list(twin.parameters()))
        for total, gradient in zip(wanted.values(), gradients, strict=True):
            total += gradient**2 / 7
    for name, value in wanted.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-4, atol=1e-9), name


@pytest.mark.parametrize(
    "parts",
    [
        (torch.randn(4, 5, 3), torch.rand(4, 5) < 0.7, torch.zeros(4, dtype=torch.int64)),
        (torch.randint(2, 9, (4, 5)), torch.ones(4, 5), torch.zeros(4, dtype=torch.int64)),
        (torch.randint(2, 9, (4, 5)), torch.ones(4, 1, 1, 5, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_masks_of_any_dtype_beside_the_inputs_are_not_dropped(parts):
    with pytest.raises(ff.EstimationError, match="batch 0: .* has an entry for each token"):
        ff.estimate_fisher(torch.nn.Linear(3, 2), [parts])
