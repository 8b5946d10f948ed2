"""What a forward, a loss or a backward raises inside an estimate: with the batch's number, what it got, and a hint."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.* no closed form")]
ESTIMATORS = ("batch", "softened", "sample", "expected", "label_free")
dice = torch.Generator().manual_seed(0)
X, Y = torch.randn(4, 4, generator=dice), torch.tensor([0, 2, 1, 2])
IDS = torch.randint(3, 9, (4, 6), generator=dice)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Calls(nn.Module):
    """Calls something with its input, beside a layer; keeps count."""

    def __init__(self, then: Callable) -> None:
        super().__init__()
        self.fc, self.then, self.calls = nn.Linear(4, 3), then, 0

    def forward(self, x):
        self.calls += 1
        self.then(x)
        return self.fc(x)


def throw(error: BaseException) -> Callable:
    def thrown(*_):
        raise error

    return thrown


def state(model: nn.Module) -> tuple:
    values = copy.deepcopy(model.state_dict())
    return values, [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()]


def unchanged(model: nn.Module, before: tuple) -> bool:
    values, *rest = state(model)
    return all(map(torch.equal, values.values(), before[0].values())) and tuple(rest) == before[1:]


def refused(model: nn.Module, loader, estimator: str, message: str, **options) -> None:
    """By the estimator, and by the drop-in where it has that."""
    before = state(model)
    with pytest.raises(ff.EstimationError, match=message) as caught:
        ff.estimate_fisher(model, loader, estimator=estimator, **options)
    assert caught.value.__cause__ is not None
    assert unchanged(model, before)
    for mode in ("strict", "corrected") if estimator in ("batch", "label_free") else ():
        with pytest.raises(ff.EstimationError, match=message) as caught:
            ParameterPerturber(model, mode=mode, label_free=estimator == "label_free", **options).calc_importance(
                loader
            )
        assert caught.value.__cause__ is not None


RAISED = (ValueError("mine\nand more"), KeyError("k"), ZeroDivisionError(), RuntimeError("a"), StopIteration("s"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
def test_what_a_forward_raises(estimator, error):
    model, text = Calls(throw(error)), str(error).partition("\n")[0] or "ZeroDivisionError;"
    refused(
        model, [(X, Y)], estimator, rf"batch 0: the model, called with float32 \[4, 4\], raises {type(error).__name__}"
    )
    with pytest.raises(ff.EstimationError, match=text) as caught:
        ff.estimate_fisher(model, [(X, Y)], estimator=estimator)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("oom"), MemoryError(), UserWarning("w")])
def test_what_passes(estimator, error):
    model = Calls(throw(error))
    before = state(model)
    with pytest.raises(type(error)) as caught:
        ff.estimate_fisher(model, [(X, Y)], estimator=estimator)
    assert caught.value is error and unchanged(model, before) and model.calls == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_second_batch_is_named(estimator):
    refused(
        net(), [(X, Y), (X[:, :3], Y)], estimator, r"batch 1: the model, called with float32 \[4, 3\], .*multiplied"
    )


def test_outputs_without_a_length():
    """Whole numbers have no gradient."""
    model = nn.Linear(4, 3)
    model.register_forward_hook(lambda module, given, out: out.argmax(1))
    for run in (
        lambda: ff.estimate_fisher(model, [(X, Y)], estimator="label_free"),
        lambda: ParameterPerturber(model, label_free=True).calc_importance([(X, Y)]),
        lambda: ParameterPerturber(model, mode="corrected", label_free=True).calc_importance([(X, Y)]),
    ):
        with pytest.raises(ff.EstimationError, match=r"batch 0: the outputs are int64 \[4\], expected a tensor"):
            run()


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_what_a_loss_and_a_backward_raise(estimator):
    message = (
        r"batch 0: the loss of outputs and targets of float32 \[\d, 3\] and int64 \[\d\] cannot be computed: KeyError"
    )
    refused(net(), [(X, Y)], estimator, message, loss_fn=throw(KeyError("mine")))

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise KeyError("late")

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return Broken.apply(self.fc(x))

    refused(Late(), [(X, Y)], estimator, "batch 0: KeyError: 'late', raised outside .* such as in a backward")


def test_functions_of_the_users():
    for name in ("forward_fn", "batch_fn"):
        for mode in ("strict", "corrected"):
            with pytest.raises(
                ff.EstimationError, match=rf"batch 0: {name} raises KeyError: 'k', on a batch of .*int64"
            ):
                ParameterPerturber(net(), mode=mode, **{name: throw(KeyError("k"))}).calc_importance([(X, Y)])
    refused(net(), [(X, Y)], "sample", r"batch 0: forward_fn raises KeyError", forward_fn=throw(KeyError("k")))
    double = lambda m, batch: (m(batch[0].double()), batch[1])
    wide = [(X.double(), Y)]
    refused(
        net(),
        wide,
        "batch",
        r"forward_fn raises .* the model is float32 and a part of the batch float64",
        forward_fn=double,
    )


# ---- hints -----------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids, mask):
        return self.fc((self.embed(ids) * mask[..., None]).mean(1))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, left, right):
        return self.fc(torch.cat([left, right], 1))


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 3))


HINTS = [
    (
        net,
        (X.double(), Y),
        r"the model is float32 and a part of the batch float64: pass x.to\(torch.float32\), or model",
    ),
    (net, (X.half(), Y), r"the model is float32 and a part of the batch float16"),
    (net, ((X * 3).long(), Y), r"the batch whole numbers: if these are features, pass x.to\(torch.float32\)"),
    (words, (IDS.float(), Y), r"called with float32 \[4, 6\].*an embedding looks up whole numbers: pass them as int64"),
    (words, (IDS + 4, Y), r"embeddings have 9 rows, and the batch has its numbers \d+ to \d+ in \[4, 6\]"),
    (
        Two,
        (X, X, Y),
        r"of the parts of a batch, float32 \[4, 4\], float32 \[4, 4\], int64 \[4\], the first alone is passed, and "
        r"its forward takes left, right: pass forward_fn=lambda model, batch: "
        r"\(model\(batch\[0\], batch\[1\]\), batch\[-1\]\)",
    ),
    (Two, {"left": X, "labels": Y}, r"its forward takes left, right: name the parts of a batch as these"),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("make", "batch", "message"), HINTS)
def test_hints(estimator, make, batch, message):
    refused(make(), [batch], estimator, message)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_middle_part_of_a_tuple(estimator):
    batch = (IDS, torch.ones_like(IDS), Y)
    with pytest.raises(
        ff.EstimationError,
        match=r"parts \[4, 6\], \[4, 6\], \[4\], .*forward_fn=.*, such as \(model\(batch\[0\], batch\[1\]\)",
    ):
        ff.estimate_fisher(Masked(), [batch], estimator=estimator)
    forward = lambda model, batch: (model(batch[0], batch[1]), batch[2])
    assert ff.estimate_fisher(Masked(), [batch], estimator=estimator, forward_fn=forward).buffer.any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("part", [0, 1])
def test_a_batch_on_meta(estimator, part):
    batch = [X, Y]
    batch[part] = batch[part].to("meta")
    with pytest.raises(ff.EstimationError, match=rf"batch 0: its part \[{part}\] is on meta and has no numbers"):
        ff.estimate_fisher(net(), [batch], estimator=estimator)


# ---- samples that lie one behind the other ---------------------------------------------------------------------------


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.bag, self.fc = nn.EmbeddingBag(9, 4, mode="sum"), nn.Linear(4, 3)

    def forward(self, flat, offsets):
        return self.fc(torch.tanh(self.bag(flat, offsets)))


@pytest.mark.parametrize("params", [None, "last"])
@pytest.mark.parametrize("offsets", [(0, 1, 2, 3), (0, 0, 1, 3), (0, 0, 0, 0), (0, 2, 5, 6)])
def test_bags_whose_offsets_may_be_as_many_as_their_words(params, offsets):
    """The offsets say where a sample begins: a row of each tensor is none, also where their numbers agree."""
    flat = torch.tensor([3, 1, 4, 1, 5, 2, 6])[: 7 if offsets[-1] > 3 else 4]
    batch = {"flat": flat, "offsets": torch.tensor(offsets), "labels": Y}
    twin, bounds = Bag().double(), [*offsets, len(flat)]
    wanted = [torch.zeros_like(p) for p in twin.parameters()]
    for n in range(4):
        out = twin(flat[bounds[n] : bounds[n + 1]], torch.tensor([0]))
        for total, g in zip(
            wanted, torch.autograd.grad(functional.cross_entropy(out, Y[n : n + 1]), [*twin.parameters()])
        ):
            total += g**2 / 4
    for by in ({}, {"forward_fn": lambda m, b: (m(b["flat"], b["offsets"]), b["labels"])}):
        found = ff.estimate_fisher(Bag(), [batch], params, estimator="sample", **by)
        flat_wanted = torch.cat([total.flatten() for total in wanted])[-found.numel :]
        assert torch.allclose(found.buffer.double(), flat_wanted, rtol=1e-4, atol=1e-9)
        assert found.provenance.samples == 4
