"""A run changes what its report names and nothing else: memory shared with what it does not know of is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fiun_fast as ff


def fisher(model, params=None) -> ff.Fisher:
    layout = ff.Layout.from_module(model, params) if isinstance(model, nn.Module) else ff.Layout.from_tensors(model)
    return ff.Fisher(torch.rand(layout.numel), layout)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def planned(reached, other, params=None) -> None:
    dag = ff.InheritanceDAG()
    dag.add_model("reached", reached, fisher(reached, params))
    dag.add_model("other", other)
    ff.plan(dag, [ff.ForgetRequest("reached", fisher(reached, params))])


def same_parameter(reached: nn.Module) -> object:
    other = net()
    other[2] = reached[2]
    return other


def parameter_over_it(reached: nn.Module) -> object:
    other = net()
    other[0].weight = nn.Parameter(reached[0].weight.data[:])
    return other


def buffer_over_it(reached: nn.Module) -> object:
    other = net()
    other.register_buffer("kept", reached[2].weight.detach()[1:])
    return other


def dict_over_it(reached: nn.Module) -> object:
    return {"w": reached[2].weight.detach().view(-1)[3:7]}


def array_over_it(reached: nn.Module) -> object:
    return {"w": torch.from_numpy(reached[0].weight.detach().numpy())}


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (same_parameter, r"'reached', parameter '2\.\w+' is also node 'other', parameter '2\.\w+'"),
        (parameter_over_it, "'reached', parameter '0.weight' shares memory with node 'other', parameter '0.weight'"),
        (buffer_over_it, "'reached', parameter '2.weight' shares memory with node 'other', buffer 'kept'"),
        (dict_over_it, "'reached', parameter '2.weight' shares memory with node 'other', tensor 'w'"),
        (array_over_it, "'reached', parameter '0.weight' shares memory with node 'other', tensor 'w'"),
    ],
)
def test_memory_of_a_model_that_no_request_reaches(share, words):
    reached = net()
    other = share(reached)
    with pytest.raises(ff.LayoutError, match=words):
        planned(reached, other)
    planned(net(), other)  # a model on its own is no matter


def test_memory_out_of_scope_in_the_same_model():
    model = net()
    model.register_buffer("first", model[2].weight.detach()[0])
    with pytest.raises(ff.LayoutError, match="parameter '2.weight' shares memory with node 'model', buffer 'first'"):
        ff.dampen_(model, fisher(model), fisher(model))
    model = net()
    model[0].bias = nn.Parameter(model[1].weight.data)
    head = fisher(model, "1.*")
    with pytest.raises(
        ff.LayoutError, match="parameter '1.weight' shares memory with node 'model', parameter '0.bias'"
    ):
        ff.dampen_(model, head, head, dry_run=True)
    ff.dampen_(model, fisher(model, "2.*"), fisher(model, "2.*"))
    state = {"a": torch.rand(6), "b": torch.rand(2)}
    state["b"] = state["a"][2:5]
    one = ff.Fisher.from_dict({"a": torch.rand(6)})
    with pytest.raises(ff.LayoutError, match="parameter 'a' shares memory with node 'model', tensor 'b'"):
        ff.dampen_(state, one, one)


def test_tied_parameters_and_what_has_no_memory_are_fine():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.register_buffer("empty", torch.empty(0))
    model.register_buffer("none", None)
    model.register_buffer("meta", torch.empty(3, device="meta"))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    ff.dampen_(model, fisher(model), fisher(model))
    state = {key: value for key, value in model.state_dict().items() if "." in key}
    one = ff.Fisher.from_dict({"0.weight": torch.rand(4, 4), "0.bias": torch.rand(4)})
    ff.dampen_(state, one, one)  # its '1.weight' is the same memory: one parameter, as in the model
    model[0].owner = model  # modules may refer to each other
    model[0].add_module("above", model)
    ff.dampen_(model, one, one)
