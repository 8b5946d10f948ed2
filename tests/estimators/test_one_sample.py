"""One sample or one batch in the place of what is expected: an error that says so, in every way in."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

pytestmark = pytest.mark.usefixtures("one_thread")
ESTIMATORS = ("batch", "softened", "sample", "expected", "label_free")
WAYS = {
    **{e: lambda m, loader, e=e: ff.estimate_fisher(m, loader, estimator=e) for e in ESTIMATORS},
    "several": lambda m, loader: ff.estimate_fishers({"a": m}, loader, estimator="label_free"),
    **{
        f"{mode}, {free}": lambda m, loader, mode=mode, free=free: ParameterPerturber(
            m, mode=mode, label_free=free
        ).calc_importance(loader)
        for mode in ("strict", "corrected")
        for free in (False, True)
    },
}
UNLABELLED = ("expected", "label_free", "several", "strict, True", "corrected, True")
X, Y = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 2])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Named(nn.Module):
    """Called by keywords; its own loss, where it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = net()

    def forward(self, x, labels=None):
        out = self.fc(x)
        return {"logits": out} if labels is None else {"logits": out, "loss": functional.cross_entropy(out, labels)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "one",
    [
        {"x": X[0], "labels": Y[0]},
        UserDict(x=X[0], label=Y[0]),
        {"x": X[0].numpy(), "labels": Y.numpy()[0:1].reshape(())},
        {"x": X, "labels": Y[0]},
    ],
)
def test_a_dict_that_is_one_sample(way, one):
    with pytest.raises(ff.EstimationError, match=r"batch 0: the labels are one number, in .* one sample, not a batch"):
        WAYS[way](Named(), [one])


@pytest.mark.parametrize("way", UNLABELLED)
@pytest.mark.parametrize("one", [{"x": X[0]}, X[0], [X[0]], (X[0], Y[0])])
def test_inputs_of_one_sample_where_no_labels_are_needed(way, one):
    model = Named() if isinstance(one, dict) else net()
    with pytest.raises(ff.EstimationError, match=r"batch 0: .*(one sample, not a batch|there is no batch dimension)"):
        WAYS[way](model, [one])


@pytest.mark.parametrize("way", [way for way in UNLABELLED if way != "expected"])
def test_one_sample_that_only_a_trial_tells(way):
    """The outputs of one sample have its shape, or a first dimension of their own."""
    for model, one in (
        (nn.Linear(4, 4), X[0]),
        (nn.Conv2d(3, 5, 3), torch.randn(3, 8, 8)),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU()), torch.randn(2, 9)),
    ):
        with pytest.raises(ff.EstimationError, match=r"batch 0: the inputs are .*: this is one sample, not a batch"):
            WAYS[way](model, [one])
    # and what looks like that and is a batch
    WAYS[way](nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1), nn.Flatten(0)), [X[0]])
    time_first = nn.RNN(4, 3)
    last = lambda module, given, out: out[0][-1]
    time_first.register_forward_hook(last)
    if "corrected" not in way:
        WAYS[way](time_first, [torch.randn(7, 2, 4)])


GIVEN = {
    "x, y": [X, Y],
    "x, float y": [X, Y.float()],
    "x, float y [B, 1]": [X, Y.float()[:, None]],
    "x, one-hot": [X, functional.one_hot(Y, 4).float()],
    "x, one-hot of 3": [X, functional.one_hot(Y, 3).float()],
    "x, y, more": [X, Y, torch.arange(4)],
    "ids, labels": [torch.arange(8).view(2, 4), torch.tensor([[0, 1, 2, -100], [4, 5, 6, -100]])],
    "ids, mask": [torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.int64)],
    "ids, y [B, 1]": [torch.arange(8).view(2, 4), torch.zeros(2, 1, dtype=torch.int64)],
    "x, nothing": [X, None],
    "x, names": [X, ["a", "b", "c", "d"]],
    "dict, y": [{"x": X}, Y],
    "numpy": [X.numpy(), Y.numpy()],
    "numpy float y": [X.numpy(), np.float32(Y.numpy())[:, None]],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", [list, tuple])
@pytest.mark.parametrize("given", GIVEN)
def test_one_batch_in_the_place_of_a_loader(way, form, given):
    with pytest.raises(
        ff.ArgumentError, match=r"loader is a \w+ of .*which looks like one batch; pass a list of batch"
    ):
        WAYS[way](net(), form(GIVEN[given]))


@pytest.mark.parametrize("way", UNLABELLED)
def test_one_batch_that_an_iterator_yields(way):
    with pytest.raises(ff.EstimationError, match=r"batch 1: it is int64 \[4\], after float32 \[4, 4\]: .* one batch\?"):
        WAYS[way](net(), iter([X, Y]))


@pytest.mark.parametrize("way", UNLABELLED)
def test_lists_of_inputs_alone_are_loaders(way):
    WAYS[way](net(), [X, X[:3] + 1])
    WAYS[way](net(), [[X], [X]])
    tokens = [torch.randint(9, (2, n), generator=torch.Generator().manual_seed(n)) for n in (5, 6)]
    torch.manual_seed(1)
    WAYS[way](nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), tokens)
