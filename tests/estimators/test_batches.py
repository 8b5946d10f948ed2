"""Every row of the tables of docs/fishers.md that say what is read, in every estimator and in the drop-in."""

from __future__ import annotations

import copy
import re
from collections import UserDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.* no closed form")]

PAGE = Path(__file__).parents[2] / "docs" / "fishers.md"
ESTIMATORS = ("batch", "softened", "sample", "expected", "label_free")
UNLABELLED = ("expected", "label_free")


class Net(nn.Module):
    """Called by one argument, `x`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Labelled(Net):
    """Returns its loss beside the logits."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": functional.cross_entropy(logits, labels), "logits": logits}
        )


class SelfSupervised(Net):
    """Makes its own targets."""

    def forward(self, x, augment=False):
        logits = super().forward(x)
        return {"loss": functional.cross_entropy(logits, (x[:, 0] > 0).long()), "logits": logits}


def pairs(sizes=(4, 3, 1), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)) for n in sizes]


def oracle(estimator: str, loader, model: nn.Module | None = None, own=functional.cross_entropy) -> Tensor:
    """In float64, the obvious way."""
    model = copy.deepcopy(Net() if model is None else model).double()
    total, number = 0.0, 0

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])

    for x, y in loader:
        z = Net.forward(model, x.double())
        if estimator == "batch":
            total, number = total + gradient(own(z, y)) ** 2, number + 1
        elif estimator == "softened":
            total, number = total + gradient(functional.cross_entropy(z / 4, y)) ** 2, number + 1
        elif estimator == "label_free":
            total, number = total + gradient((z**2).sum(1).mean()).abs(), number + 1
        for n in range(len(x)) if estimator in ("sample", "expected") else ():
            if estimator == "sample":
                total = total + gradient(own(z[n : n + 1], y[n : n + 1])) ** 2
            for c, p in enumerate(z[n].softmax(0).detach() if estimator == "expected" else ()):
                total = total + p * gradient(functional.cross_entropy(z[n], torch.tensor(c))) ** 2
            number += 1
    return total / number


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found.double() - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def estimated(estimator: str, loader, model: nn.Module | None = None, **options) -> Tensor:
    exact = {"samples": 0} if estimator == "expected" else {}
    return ff.estimate_fisher(Net() if model is None else model, loader, estimator=estimator, **exact, **options).buffer


def by_drop_in(mode: str, loader, model: nn.Module | None = None, **options) -> Tensor:
    values = ParameterPerturber(Net() if model is None else model, mode=mode, **options).calc_importance(loader)
    return torch.cat([value.flatten() for value in values.values()])


def numpy_of(batch):
    if isinstance(batch, dict):
        return {key: part.numpy() for key, part in batch.items()}
    return tuple(part.numpy()[::-1][::-1] for part in batch)


def by_caller(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    return model(batch["a"][0]), batch["a"][1]


def loss_by_caller(model: nn.Module, batch: dict) -> tuple[Tensor, None]:
    return functional.cross_entropy(*by_caller(model, batch)), None


BOTH = ("batch", "sample")
# row of the table -> estimators, forms, model, options of the core and, but for forward_fn, of the drop-in
FORMS = {
    "`(x, y)`, `(x, …, y)`": (
        ESTIMATORS,
        (
            lambda x, y: (x, y),
            lambda x, y: [x, y],
            lambda x, y: (x, y + 50, y),
            lambda x, y: (x, ["a"] * len(y), 3.0, None, y),
        ),
        Net,
        {},
    ),
    "… `target_index=`": (
        ESTIMATORS,
        (lambda x, y: (x, y, y + 50), lambda x, y: (x, y, torch.rand(len(y)), "path")),
        Net,
        {"target_index": 1},
    ),
    "`({…}, y)`": (ESTIMATORS, (lambda x, y: ({"x": x}, y), lambda x, y: [UserDict(x=x), y]), Net, {}),
    "a dict, or another Mapping": (
        ESTIMATORS,
        (
            lambda x, y: {"x": x, "labels": y},
            lambda x, y: UserDict(x=x, labels=y),
            lambda x, y: {"x": x, "label": y},
            lambda x, y: {"label_ids": y, "x": x, "text": ["a"] * len(y)},
        ),
        Labelled,
        {},
    ),
    "a dict with labels, for a model that takes none": (
        ESTIMATORS,
        (lambda x, y: {"x": x, "labels": y}, lambda x, y: {"label": y, "x": x}),
        Net,
        {},
    ),
    "`x`, `[x]`, a dict without labels": (
        UNLABELLED,
        (lambda x, y: x, lambda x, y: [x], lambda x, y: {"x": x}),
        Net,
        {},
    ),
    "numpy arrays in the place of tensors": (
        ESTIMATORS,
        (
            lambda x, y: numpy_of((x.double(), y)),
            lambda x, y: numpy_of((x, y.int())),
            lambda x, y: numpy_of({"x": x, "labels": y}),
        ),
        Net,
        {},
    ),
    "anything else": (
        ("batch", "sample", "expected"),
        (lambda x, y: {"a": (x, y)}, lambda x, y: UserDict(a=[x, y])),
        Net,
        {"forward_fn": by_caller},
    ),
    "… `(loss, None)`": (BOTH, (lambda x, y: {"a": (x, y)},), Net, {"forward_fn": loss_by_caller}),
}


@pytest.mark.parametrize("row", FORMS)
def test_forms_of_batches(row):
    estimators, forms, model, options = FORMS[row]
    for form in forms:
        loader = [form(x, y) for x, y in pairs()]
        for estimator in estimators:
            close(estimated(estimator, loader, model(), **options), oracle(estimator, pairs()))
        for estimator in set(estimators) & {"batch", "label_free"}:
            for mode in ("strict", "corrected"):
                given = options | {"label_free": estimator == "label_free"}
                close(by_drop_in(mode, loader, model(), **given), oracle(estimator, pairs()))


def test_a_model_that_makes_its_own_targets():
    loader = [{"x": x, "augment": False} for x, _ in pairs()]
    made = [(x, (x[:, 0] > 0).long()) for x, _ in pairs()]
    for estimator in ("batch", "sample"):
        close(estimated(estimator, loader, SelfSupervised()), oracle(estimator, made))
    for mode in ("strict", "corrected"):
        close(by_drop_in(mode, loader, SelfSupervised()), oracle("batch", made))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("params", [None, "last"])
def test_batches_that_hold_nothing_are_left_out(estimator, params):
    (x, y), *_ = full = pairs()
    empty = (x[:0], y[:0])
    ignored = (x, torch.full_like(y, -100))
    unlabelled = estimator == "label_free"  # to which labels do not matter
    mixed = [empty, full[0], empty, *([] if unlabelled else [ignored]), *full[1:], empty]
    wanted, found = (ff.estimate_fisher(Net(), loader, params, estimator=estimator) for loader in (full, mixed))
    assert torch.equal(found.buffer, wanted.buffer) and found.provenance == wanted.provenance
    for loader in ([empty], [empty] * 3, [] if unlabelled else [ignored], [{"x": x[:0], "labels": y[:0]}]):
        with pytest.raises(ff.EstimationError, match="the loader is empty: no"):
            ff.estimate_fisher(Labelled(), loader, params, estimator=estimator)
    for mode in ("strict", "corrected") if estimator in ("batch", "label_free") and params is None else ():
        assert torch.equal(
            by_drop_in(mode, mixed, label_free=unlabelled), by_drop_in(mode, full, label_free=unlabelled)
        )
        with pytest.raises(ff.EstimationError, match="the loader is empty: none of its 1 batches"):
            by_drop_in(mode, [empty], label_free=unlabelled)


def test_labels_of_minus_100_do_not_count():
    (x, y), *_ = pairs((6,))
    some = y.clone()
    some[[1, 4]] = -100
    kept = [0, 2, 3, 5]
    for estimator in ("batch", "sample", "expected"):
        for params in (None, "last"):
            found = ff.estimate_fisher(
                Net(), [(x, some)], params, estimator=estimator, **({"samples": 0} if estimator == "expected" else {})
            )
            wanted = oracle(estimator, [(x[kept], y[kept])])
            close(found.buffer, wanted[-found.numel :])
            assert found.provenance.samples == (6 if estimator == "batch" else 4)


# ---- loaders --------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, items) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Dicts(Dataset):
    """Samples as dicts, of which torch's own collator makes a batch."""

    def __init__(self, batches) -> None:
        self.samples = [{"x": a, "label": b, "path": "p"} for x, y in batches for a, b in zip(x, y)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_loaders(estimator):
    x, y = (torch.cat(parts) for parts in zip(*pairs()))
    cut = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]
    wanted = oracle(estimator, cut)
    samples = list(zip(x, y))
    collate = lambda rows: UserDict(x=torch.stack([a for a, _ in rows]), labels=torch.stack([b for _, b in rows]))
    for loader in (
        cut, tuple(cut), iter(cut), (batch for batch in cut), Stream(cut),
        DataLoader(TensorDataset(x, y), batch_size=3), DataLoader(Stream(samples), batch_size=3),
        DataLoader(samples, batch_size=3, collate_fn=collate), DataLoader(Dicts(cut), batch_size=3),
    ):  # fmt: skip
        close(estimated(estimator, loader, progress=isinstance(loader, DataLoader)), wanted)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "give",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: x,
        lambda x, y: {"x": x, "labels": y},
        lambda x, y: UserDict(x=x),
        lambda x, y: x.numpy(),
        lambda x, y: (x.numpy(), y.numpy()),
        lambda x, y: "x",
    ],
)
def test_one_batch_in_the_place_of_a_loader(estimator, give):
    with pytest.raises(
        ff.ArgumentError, match=r"loader is a \w+.*, which looks like one batch; pass a list of .*\[batch\]"
    ):
        ff.estimate_fisher(Net(), give(*pairs()[0]), estimator=estimator)
    with pytest.raises(ff.ArgumentError, match="which looks like one batch"):
        by_drop_in("strict", give(*pairs()[0]), label_free=estimator == "label_free")


def test_a_class_in_the_place_of_a_loader():
    for estimate in (lambda loader: ff.estimate_fisher(Net(), loader), lambda loader: by_drop_in("strict", loader)):
        with pytest.raises(ff.ArgumentError, match="loader is the class list, expected one made of it"):
            estimate(list)
        with pytest.raises(ff.ArgumentError, match="loader is the class TensorDataset"):
            estimate(torch.utils.data.TensorDataset)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_samples_in_the_place_of_batches(estimator):
    x, y = pairs()[0]
    with pytest.raises(
        ff.ArgumentError, match="loader is a TensorDataset, a dataset of single samples; pass torch.utils"
    ):
        ff.estimate_fisher(Net(), TensorDataset(x, y), estimator=estimator)
    with pytest.raises(ff.EstimationError, match="batch 0: .*(one sample, not a batch|expected logits .B, classes)"):
        ff.estimate_fisher(Net(), Stream(list(zip(x, y))), estimator=estimator)
    with pytest.raises(ff.ArgumentError, match="loader is a int, expected an iterable of batches"):
        ff.estimate_fisher(Net(), 3, estimator=estimator)


def test_a_generator_that_is_used_up():
    once = (batch for batch in pairs())
    ff.estimate_fisher(Net(), once)
    with pytest.raises(
        ff.EstimationError, match="the loader is empty: .*an iterator can be gone over once: pass a list"
    ):
        ff.estimate_fisher(Net(), once)


# ---- values that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [None, "last"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_batch_that_is_not_finite_is_named(estimator, params):
    loader = pairs((4,) * 5)
    loader[3][0][1, 2] = float("nan")
    with pytest.raises(
        ff.EstimationError, match=r"batch 3: (its part .0. holds values that are not finite|the outputs are not)"
    ):
        ff.estimate_fisher(Net(), [(loader[0][0][:0], loader[0][1][:0]), *loader][1:], params, estimator=estimator)
    for mode in ("strict", "corrected") if estimator in ("batch", "label_free") and params is None else ():
        with pytest.raises(ff.EstimationError, match="batch 3: its"):
            by_drop_in(mode, loader, label_free=estimator == "label_free")
    model = Net()
    model.body.bias.data[0] = float("inf")
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(
        ff.EstimationError, match="batch 0: (the outputs are not|'body.bias' of the model holds values)"
    ):
        ff.estimate_fisher(model, pairs(), params, estimator=estimator)


def test_a_batch_is_named_by_its_place_in_the_loader():
    (x, y), *_ = pairs()
    with pytest.raises(ff.EstimationError, match="batch 2: its part .0. holds"):
        ff.estimate_fisher(Net(), [(x[:0], y[:0]), (x, y), (x * float("inf"), y)])
    for mode in ("strict", "corrected"):
        with pytest.raises(ff.EstimationError, match="batch 2: its"):
            by_drop_in(mode, [(x[:0], y[:0]), (x, y), (x * float("inf"), y)])


def test_gradients_that_overflow():
    model = Net()
    steep = lambda out, y: (out.square().sum() + 1e-30).sqrt() * 1e30
    with pytest.raises(ff.EstimationError, match="batch 0: its loss or a gradient is not finite"):
        ff.estimate_fisher(model, pairs(), loss_fn=steep)


# ---- the page -------------------------------------------------------------------------------------------------------


ELSEWHERE = {  # rows whose test has a name of its own
    "a dict without labels, for a model that returns a": test_a_model_that_makes_its_own_targets,
    "a batch without a sample, or of which every label is -100": test_batches_that_hold_nothing_are_left_out,
}


def test_every_row_of_the_table_has_a_test():
    table = PAGE.read_text(encoding="utf-8").partition("| a batch |")[2].partition("A model may return")[0]
    rows = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:]
    assert len(rows) == 9
    for row in rows:
        assert row.startswith((*FORMS, *ELSEWHERE)), row
