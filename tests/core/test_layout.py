"""Layouts: selection of parameters, order, ties, views and messages; flatten_ and stack_."""

import copy

import pytest
import torch
from small import Tied
from torch import nn

import fiun_fast as ff


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))


def test_offsets_follow_the_module():
    model = net()
    layout = ff.Layout.from_module(model)
    expected, offset = {}, 0
    for name, p in model.named_parameters():
        expected[name] = (offset, p.numel(), tuple(p.shape))
        offset += p.numel()
    assert {s.name: (s.offset, s.numel, s.shape) for s in layout} == expected
    assert layout.numel == offset
    assert layout.names == tuple(expected)


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("3.*", ["3.weight", "3.bias"]),
        ("*.bias", ["0.bias", "1.bias", "3.bias"]),
        (["3.bias", "0.weight"], ["0.weight", "3.bias"]),  # the module's order, not the list's
        (lambda name, p: p.dim() == 4, ["0.weight"]),
    ],
)
def test_selection(params, names):
    assert list(ff.Layout.from_module(net(), params).names) == names


def test_default_leaves_out_frozen_but_a_name_reaches_them():
    model = net()
    model[0].requires_grad_(False)
    assert list(ff.Layout.from_module(model).names) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert list(ff.Layout.from_module(model, "0.*").names) == ["0.weight", "0.bias"]


def test_tied_parameters_appear_once_and_under_either_name():
    model = Tied()
    assert list(ff.Layout.from_module(model).names) == ["embedding.weight"]
    assert list(ff.Layout.from_module(model, "head.*").names) == ["embedding.weight"]
    with pytest.warns(ff.ScopeWarning, match=r"tied: its 'embedding.weight' is also 'head.weight'"):
        assert ff.last_layer(model) == ["embedding.weight"]


def test_last_layer():
    assert ff.last_layer(net()) == ["3.weight", "3.bias"]
    assert ff.last_layer(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ["0.weight", "0.bias"]
    with pytest.raises(ff.LayoutError, match="ReLU has no parameters"):
        ff.last_layer(nn.ReLU())


def test_views_write_through():
    layout = ff.Layout.from_module(net())
    buffer = torch.zeros(layout.numel)
    layout.views(buffer)["3.weight"].fill_(2)
    assert buffer[layout.slice("3.weight")].eq(2).all()
    assert buffer.sum() == 2 * 160
    with pytest.raises(ff.LayoutError, match=r"buffer of shape \[3\], expected \[290\]"):
        layout.views(torch.zeros(3))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("3.weigth", r"no parameter matches '3.weigth'; near names: 3.weight"),
        (["3.*", "head.*"], r"no parameter matches 'head.\*'"),
        (lambda name, p: False, "no parameter of Sequential is selected"),
        (3, "params is a int"),
        ([3], "params holds a int"),
    ],
)
def test_selection_that_makes_no_sense(params, message):
    with pytest.raises(ff.FiunError, match=message):
        ff.Layout.from_module(net(), params)


def test_other_bad_input():
    with pytest.raises(ff.LayoutError, match="run the lazy module once"):
        ff.Layout.from_module(nn.LazyLinear(3))
    with pytest.raises(ff.ArgumentError, match="expected a torch.nn.Module"):
        ff.Layout.from_module({"w": torch.zeros(3)})
    with pytest.raises(ff.LayoutError, match="at least one parameter"):
        ff.Layout({})
    with pytest.raises(ff.LayoutError, match="no parameter 'wieght' in this layout; near names: weight"):
        ff.Layout({"weight": (3,)})["wieght"]
    with pytest.raises(ff.DTypeError, match=r"'weight' is torch.complex64, expected one of float32"):
        ff.Layout.from_module(nn.Linear(2, 2, dtype=torch.complex64))


def test_equality_and_difference():
    a = ff.Layout({"w": (2, 3), "b": (3,)})
    assert a == ff.Layout({"w": [2, 3], "b": [3]})
    assert hash(a) == hash(ff.Layout({"w": (2, 3), "b": (3,)}))
    swapped = ff.Layout({"b": (3,), "w": (2, 3)})
    assert a != swapped
    assert a.difference(swapped, "one", "two") is None  # order is not a difference in content
    other = ff.Layout({"w": (2, 4), "c": (1,)})
    assert (
        a.difference(other, "one", "two")
        == "b [3] only in one; c [1] only in two; w is [2, 3] in one and [2, 4] in two"
    )


def test_flatten_keeps_values_objects_and_training():
    torch.manual_seed(1)
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    objects = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    flat = ff.flatten_(model)
    layout = ff.Layout.from_module(model)
    assert flat.numel() == layout.numel
    for name, p in model.named_parameters():
        assert p is objects[name]
        assert torch.equal(p, before[name])
        assert p.data_ptr() == flat.data_ptr() + 4 * layout[name].offset
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(flat[layout.slice("3.bias")], before["3.bias"])  # the optimiser writes to the buffer


def test_flatten_makes_channels_last_contiguous():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()
    before = model.weight.detach().clone()
    ff.flatten_(model)
    assert model.weight.is_contiguous()
    assert torch.equal(model.weight, before)


def test_flatten_refuses_what_one_buffer_cannot_hold():
    model = net()
    model[3].half()
    with pytest.raises(
        ff.DTypeError, match=r"'3.weight' is torch.float16, expected torch.float32 as parameter '0.weight'"
    ):
        ff.flatten_(model)
    shared = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    shared[1].weight.data = shared[0].weight.data
    address = shared[0].weight.data_ptr()
    with pytest.raises(ff.LayoutError, match=r"'0.weight' and parameter '1.weight' share memory"):
        ff.flatten_(shared)
    assert shared[0].weight.data_ptr() == address


def test_stacked_models_keep_values_objects_and_training():
    models = [net() for _ in range(3)]
    before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in models]
    objects = [dict(m.named_parameters()) for m in models]
    layout = ff.Layout.from_module(models[0])
    stacked = ff.stack_(models)
    assert stacked.shape == (3, layout.numel)
    assert len({row.data_ptr() % 64 for row in stacked}) == 1
    for row, model, values, its in zip(stacked, models, before, objects, strict=True):
        for name, p in model.named_parameters():
            assert p is its[name]
            assert torch.equal(p, values[name])
            assert torch.equal(row[layout.slice(name)].view(p.shape), values[name])
    stacked[1].zero_()
    assert all(not p.any() for p in models[1].parameters())
    torch.optim.SGD(models[2].parameters(), lr=0.5).step()
    fishers = [ff.Fisher(torch.rand(layout.numel), layout) for _ in range(4)]
    apart = [copy.deepcopy(m) for m in models]
    dag = ff.InheritanceDAG()
    for i, model in enumerate(models):
        dag.add_model(f"m{i}", model, fishers[i], parents=["m0"] * (i > 0))
    plan = ff.plan(dag, [ff.ForgetRequest("m0", fishers[3])], alpha=0.5)
    assert [len(part.table.rows) for part in plan.parts] == [1]  # one run of memory for each model
    plan.run_()
    for i, model in enumerate(apart):
        ff.dampen_(model, fishers[i], fishers[3], alpha=0.5)
        assert all(map(torch.equal, model.parameters(), models[i].parameters()))


def test_stack_takes_a_scope_and_refuses_models_that_differ():
    models = {"a": net(), "b": net()}
    assert ff.stack_(models, "3.*").shape == (2, ff.Layout.from_module(models["a"], "3.*").numel)
    models["b"][3] = nn.Linear(models["b"][3].in_features, 7)
    addresses = [p.data_ptr() for m in models.values() for p in m.parameters()]
    with pytest.raises(ff.LayoutError, match=r"3.weight is .* in model 'a' and \[7, .* in model 'b'"):
        ff.stack_(models)
    half = {"a": net(), "b": net().half()}
    with pytest.raises(
        ff.DTypeError, match=r"model 'b', parameter '0.weight' is torch.float16, expected torch.float32"
    ):
        ff.stack_(half)
    one = net()
    with pytest.raises(ff.LayoutError, match=r"model 0, parameter '.*' and model 1, parameter '.*' share memory"):
        ff.stack_([one, one])
    for bad in ([], {}):
        with pytest.raises(ff.ArgumentError, match="no models"):
            ff.stack_(bad)
    with pytest.raises(ff.ArgumentError, match="expected several models"):
        ff.stack_(one)
    with pytest.raises(ff.ArgumentError, match="expected a torch.nn.Module"):
        ff.stack_([one, 5])
    assert addresses == [p.data_ptr() for m in models.values() for p in m.parameters()]


def test_modules_may_refer_to_each_other():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2)))
    model[1].add_module("above", model)
    model[0].add_module("self", model[0])
    assert ff.Layout.from_module(model).names == ("0.weight", "0.bias", "1.0.weight", "1.0.bias")
    ff.flatten_(model)
    shared = nn.Linear(2, 2)
    twice = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    assert ff.Layout.from_module(twice, "second.*").names == ("first.weight", "first.bias")


def test_what_stays_behind_may_not_share_memory():
    model = nn.Linear(4, 4)
    model.register_buffer("seen", model.weight.data.view(-1)[2:])
    address = model.weight.data_ptr()
    with pytest.raises(ff.LayoutError, match="parameter 'weight' and buffer 'seen' share memory, and only the former"):
        ff.flatten_(model)
    with pytest.raises(ff.LayoutError, match="model 1, parameter 'weight' and buffer 'seen' share memory"):
        ff.stack_([nn.Linear(4, 4), model])
    assert model.weight.data_ptr() == address


def test_names_are_strings():
    for name in (5, ("a", 1), b"w", None):
        with pytest.raises(ff.ArgumentError, match="expected a string"):
            ff.Layout({name: (1,)})
        with pytest.raises(ff.ArgumentError, match="expected a string"):
            ff.Fisher.from_dict({name: torch.ones(1)})
