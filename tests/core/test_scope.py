"""Which parameters are meant: submodules, parameters, and the last layer of models that freeze or tie theirs."""

from __future__ import annotations

import pytest
import torch
from small import batches, net
from torch import nn
from torch.nn.utils import parametrizations

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber


class Named(nn.Module):
    """A model that says which its head is, as timm's and transformers' do, and registers something after it."""

    def __init__(self, getter: str, head: object) -> None:
        super().__init__()
        self.head, self.second, self.extra = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 3)
        setattr(self, getter, lambda: {"one": self.head, "two": (self.head, self.second)}.get(head, head))


def names(model: nn.Module, params: object) -> list[str]:
    return list(ff.Layout.from_module(model, params).names)


def test_submodules_and_parameters():
    model = nn.Sequential(net(), nn.Linear(3, 3), nn.ReLU())
    assert names(model, model[1]) == names(model, [model[1]]) == names(model, model[1].parameters())
    assert names(model, model[1]) == ["1.weight", "1.bias"]
    assert names(model, model[0]) == names(model, "0.*")
    assert names(model, model[1].bias) == ["1.bias"]
    assert names(model, [model[0][2], "1.bias", model[1].weight]) == ["0.2.weight", "0.2.bias", "1.weight", "1.bias"]
    assert names(model, [model[0][0], "last"]) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert names(nn.DataParallel(model), model[1]) == ["1.weight", "1.bias"]
    assert names(model, nn.DataParallel(model[1])) == ["1.weight", "1.bias"]


def test_of_a_submodule_what_requires_grad_or_all():
    model = nn.Sequential(net(), nn.Linear(3, 3))
    model[0][0].requires_grad_(False)
    assert names(model, model[0]) == ["0.2.weight", "0.2.bias"]
    assert names(model, model[0][0]) == ["0.0.weight", "0.0.bias"]
    assert names(model, "0.*") == ["0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (nn.Linear(2, 2), "params has a Linear that is not the model's; it has 0.weight, 0.bias, 2.weight, 2.bias"),
        ([nn.Parameter(torch.ones(2))], r"params has a tensor of shape \[2\] that is not the model's"),
        (nn.ReLU(), "params has a ReLU, which has no parameters"),
        ([5], "params holds a int, expected a name, glob, submodule or parameter, or a list of these"),
        (5, "params is a int"),
        (lambda name: True, r"params takes \(name\) and is called as params\(name, parameter\): too many"),
        (nn.Linear, "params is the class Linear, expected a function"),
        ([], "no parameter of Sequential is selected"),
    ],
)
def test_what_is_not_the_models(params, message):
    for model in (net(), nn.DataParallel(net())):
        with pytest.raises(ff.FiunError, match=message):
            ff.Layout.from_module(model, params)


def test_a_submodule_as_scope_everywhere():
    model = net()
    expected = ff.estimate_fisher(model, batches(), "2.*")
    for fisher in (
        ff.estimate_fisher(model, batches(), model[2]),
        ff.estimate_fisher(nn.DataParallel(model), batches(), [model[2]]),
    ):
        assert fisher.layout == expected.layout
        assert torch.equal(fisher.buffer, expected.buffer)
    drop_in = ParameterPerturber(model, parameters={"train_layer": model[2]}, mode="corrected")
    assert torch.equal(drop_in.calc_importance(batches())["2.weight"], expected["2.weight"])
    assert ff.flatten_(model, model[2]).numel() == expected.numel


@pytest.mark.parametrize("getter", ["get_classifier", "get_output_embeddings"])
def test_the_head_that_a_model_names(getter):
    assert ff.last_layer(Named(getter, "one")) == ["head.weight", "head.bias"]
    assert ff.last_layer(nn.DataParallel(Named(getter, "one"))) == ["head.weight", "head.bias"]
    both = ["head.weight", "head.bias", "second.weight", "second.bias"]  # as timm's distilled models
    assert ff.last_layer(Named(getter, "two")) == both
    for nothing in (None, nn.Identity(), 5, nn.Linear(3, 2)):  # timm without classes; a head that is not the model's
        assert ff.last_layer(Named(getter, nothing)) == ["extra.weight", "extra.bias"]
    other = Named(getter, "one")
    setattr(other, getter, lambda which: other.head)
    assert ff.last_layer(other) == ["extra.weight", "extra.bias"]


def test_a_layer_whose_weight_is_computed_is_one_layer():
    model = nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 2)))
    layer = ["1.bias", "1.parametrizations.weight.original0", "1.parametrizations.weight.original1"]
    assert ff.last_layer(model) == layer
    assert ff.last_layer(model[1]) == [name[2:] for name in layer]


def test_frozen_and_tied_heads_are_said():
    model = net()
    model[2].requires_grad_(False)
    with pytest.warns(
        ff.ScopeWarning, match=r"the last layer is frozen \(2.weight, 2.bias\), and other layers are not"
    ):
        assert ff.last_layer(model) == ["2.weight", "2.bias"]
    with pytest.warns(ff.ScopeWarning, match="is frozen"):
        ff.estimate_fisher(model, batches(), "last")
    assert names(model, "2.*") == ["2.weight", "2.bias"]  # who names it is not warned
    model.requires_grad_(False)
    assert ff.last_layer(model) == ["2.weight", "2.bias"]
    inside = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"decoder": nn.Linear(3, 2)}))
    inside[1].bias = inside[1]["decoder"].bias  # as in BERT: tied within the head, which is no news
    assert ff.last_layer(inside) == ["1.decoder.weight", "1.bias"]


def test_where_nothing_requires_grad_that_is_said():
    model = net().requires_grad_(False)
    message = r"no parameter of Sequential is selected \(4 exist\): none requires grad; name them with params="
    for run in (ff.Layout.from_module, ff.flatten_, ff.FisherAccumulator, lambda m: ff.estimate_fisher(m, batches())):
        with pytest.raises(ff.LayoutError, match=message):
            run(nn.DataParallel(model))
    with pytest.raises(ff.LayoutError, match="no parameter of Sequential requires grad"):
        ParameterPerturber(model).calc_importance(batches())
    assert ff.estimate_fisher(model, batches(), "*").numel == 53
