"""Memory that moved, changed or was exchanged after a plan was made is noticed before anything is read or written."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from memory_kinds import SHAPE, fisher
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fiun_fast as ff
from fiun_fast import homes, memory


@pytest.fixture(params=["torch's C functions", "Python"])
def watch(request, monkeypatch) -> None:
    """Both ways in which moved memory is noticed."""
    if request.param == "Python":
        for module in (memory, homes):
            monkeypatch.setattr(module, "torch_functions", lambda: ())
            monkeypatch.setattr(module, "cpu_extension", lambda: None)
            monkeypatch.setattr(module, "dicts_are_numbered", lambda: False)
        monkeypatch.setattr(homes, "version_function", lambda: 0)
    elif not memory.torch_functions():
        pytest.skip("the extension was not built, or this torch has no such functions")


def half_and_back(model: nn.Module) -> None:
    """The allocator is likely to hand the first address out again, for half the bytes."""
    model.half()
    model.bfloat16()


def shrink(model: nn.Module) -> None:
    model.weight.data = model.weight.data.view(-1)[:2]


def turn(model: nn.Module) -> None:
    model.weight.data = model.weight.data.t()


def reshape(model: nn.Module) -> None:
    model.weight.data = model.weight.data.view(2, 8)


def free(model: nn.Module) -> None:
    model.weight.untyped_storage().resize_(0)


def reinterpret(model: nn.Module) -> None:
    model.weight.data = model.weight.data.view(torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shrink, r"shape \[2\] in the model, \[4, 4\]"),
        (turn, "not contiguous"),
        (reshape, r"shape \[2, 8\] in the model"),
        (free, "its storage holds 0 bytes"),
        (reinterpret, "int32, expected float32"),
    ],
)
def test_what_changed_under_the_same_address_is_noticed(change, message, watch):
    model = nn.Linear(4, 4, bias=False).requires_grad_(False)
    layout = ff.Layout({"weight": (4, 4)})
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, ff.Fisher(torch.ones(16), layout))
    plan = ff.plan(dag, [ff.ForgetRequest("m", ff.Fisher(torch.full((16,), 50.0), layout))])
    plan.run_(dry_run=True)
    address = model.weight.data_ptr()
    change(model)
    assert change is free or model.weight.data_ptr() == address, "the address tells, so this proves nothing"
    for use in (plan.run_, plan.profile, lambda: plan.trials(alpha=1.0).__enter__()):
        with pytest.raises(ff.FiunError, match=f"node 'm', parameter 'weight': .*{message}"):
            use()


def test_swapped_tensors_are_noticed(watch):
    """torch.utils.swap_tensors leaves the object and exchanges what it stands for; the other may be gone by then."""
    model, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    layout = ff.Layout({"weight": (4, 4)})
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, ff.Fisher(torch.ones(16), layout))
    plan = ff.plan(dag, [ff.ForgetRequest("m", ff.Fisher(torch.full((16,), 50.0), layout))], lam=5.0)
    torch.utils.swap_tensors(model.weight, other.weight)
    expected = model.weight.detach() * torch.tensor(0.1)
    untouched = other.weight.detach().clone()
    plan.run_()
    assert torch.equal(model.weight, expected)
    assert torch.equal(other.weight, untouched)


def test_both_ways_agree_on_random_changes():
    if not memory.torch_functions():
        pytest.skip("the extension was not built, or this torch has no such functions")
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

    def tensor() -> torch.Tensor:
        draw = lambda high: int(torch.randint(high, (), generator=generator))
        base = torch.zeros(64, dtype=kinds[draw(4)])
        shaped = base[draw(4) :][: 4 * (1 + draw(8))].view(-1, 2 + 2 * draw(2))
        return shaped.t() if draw(3) == 0 else shaped

    changed = 0
    for _ in range(300):
        tensors = [tensor() for _ in range(3)]
        fast, plain = memory.places(), homes.PlacesInPython()
        fast.take(tensors)
        plain.take(tensors)
        assert fast.unchanged(tensors, 2)
        assert plain.unchanged(tensors, 2)
        at = int(torch.randint(3, (), generator=generator))
        other = tensor()
        base = tensors[at]
        tensors[at].data = (other, base[:1], base.view(other.dtype) if other.itemsize == base.itemsize else other)[at]
        assert fast.unchanged(tensors, 2) == plain.unchanged(tensors, 2)
        changed += not plain.unchanged(tensors, 2)
    assert 200 < changed < 300


def test_counting_versions_up_reaches_views_and_says_so_to_autograd(watch):
    base, own = torch.randn(4, 3), nn.Parameter(torch.randn(4))
    moved = torch.zeros(3)
    moved.data = base[1]
    tensors = [base, own, moved] + [torch.randn(2) for _ in range(3000)]
    view, before = base[2:], [t._version for t in tensors]
    loss = (own * own).sum()
    homes.Counters(tensors).count_up()
    assert [t._version - version for t, version in zip(tensors, before, strict=True)] == [1] * len(tensors)
    assert view._version == base._version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_versions_of_inference_tensors_do_not_stop_a_run(watch):
    with torch.inference_mode():
        model = {"weight": torch.rand(5)}
    fisher = ff.Fisher.from_dict({"weight": torch.rand(5) + 1})
    ff.dampen_(model, fisher, ff.Fisher.from_dict({"weight": torch.full((5,), 100.0)}), alpha=1.0, lam=0.0)
    assert not model["weight"].any()


def test_parameters_without_a_version_counter_are_named_before_anything_is_written(watch):
    with torch.inference_mode():
        models = [nn.Linear(3, 1, bias=False) for _ in range(2048)]
    ff.stack_(models)  # outside: they are of that mode no longer, and have no counter either
    original = ff.Fisher.from_dict({"weight": torch.ones(1, 3)})
    forget = ff.Fisher.from_dict({"weight": torch.full((1, 3), 20.0)})
    dag = ff.InheritanceDAG()
    for i, model in enumerate(models):
        dag.add_model(str(i), model, fisher=original, parents=["0"] if i else [])
    plan = ff.plan(dag, [ff.ForgetRequest("0", forget)], alpha=1.0, lam=0.0)
    with pytest.raises(ff.LayoutError, match="made under torch.inference_mode and moved"):
        plan.run_()
    assert all(bool(model.weight.any()) for model in models)
    with torch.inference_mode():
        plan.run_()
    assert not any(bool(model.weight.any()) for model in models)


def test_tensors_that_were_exchanged_inside_their_objects_are_noticed(watch):
    models = [{"weight": torch.zeros(3)} for _ in range(1500)]
    homes_of = homes.Homes()
    homes_of.add(models, ["weight"] * 1500, [m["weight"] for m in models])
    homes_of.settle()
    assert not homes_of.moved()
    torch.utils.swap_tensors(models[1400]["weight"], torch.zeros(3))
    assert homes_of.moved()


def test_another_dtype_at_the_same_address_builds_the_plan_anew(watch):
    torch.manual_seed(0)
    for _ in range(20):
        model = nn.Linear(64, 64, bias=False)
        layout = ff.Layout({"weight": (64, 64)})
        dag = ff.InheritanceDAG()
        dag.add_model("m", model, ff.Fisher(torch.ones(4096), layout))
        plan = ff.plan(dag, [ff.ForgetRequest("m", ff.Fisher(torch.full((4096,), 50.0), layout))], lam=5.0)
        half_and_back(model)
        expected = (model.weight.detach().float() * torch.tensor(0.1)).bfloat16()
        assert plan.run_().selected == 4096
        assert torch.equal(model.weight, expected)


def test_an_entry_of_a_dict_replaced_by_a_part_of_itself(watch):
    base = torch.ones(1000)
    model = {"w": base}
    layout = ff.Layout({"w": (1000,)})
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, ff.Fisher(torch.ones(1000), layout))
    plan = ff.plan(dag, [ff.ForgetRequest("m", ff.Fisher(torch.full((1000,), 50.0), layout))])
    model["w"] = base[:2]
    with pytest.raises(ff.LayoutError, match=r"shape \[2\] in the model, \[1000\] in its Fisher"):
        plan.run_()
    assert base.eq(1).all()


# ---- Fishers changed in place ----------------------------------------------------------------------------------------


def expand(f: ff.Fisher) -> None:
    f.buffer.data = torch.full((1,), 50.0).expand(1_000_000)


def every_second(f: ff.Fisher) -> None:
    f.buffer.data = torch.zeros(24)[::2]


def one_for_all(f: ff.Fisher) -> None:
    f.buffer.as_strided_((12,), (0,))


def swap_for_fake(f: ff.Fisher) -> None:
    with FakeTensorMode():
        other = torch.ones(12)
    torch.utils.swap_tensors(f.buffer, other)


def swap_for_sparse(f: ff.Fisher) -> None:
    torch.utils.swap_tensors(f.buffer, torch.ones(12).to_sparse())


def integers(f: ff.Fisher) -> None:
    f.buffer.data = torch.ones(12, dtype=torch.int32)


def remove(f: ff.Fisher) -> None:
    del f.buffer


def number(f: ff.Fisher) -> None:
    f.buffer = 5


@pytest.mark.parametrize(
    "spoil", [expand, every_second, one_for_all, swap_for_fake, swap_for_sparse, integers, remove, number]
)
def test_a_buffer_changed_in_place_is_refused(spoil, tmp_path):
    good, bad = fisher(), fisher(50.0)
    model = {"w": torch.ones(SHAPE)}
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, good)
    plan = ff.plan(dag, [ff.ForgetRequest("m", bad)])
    spoil(bad)
    for use in (
        plan.run_,
        plan.profile,
        lambda: ff.dampen_(model, good, bad),
        lambda: ff.merge_fishers([good, bad]),
        lambda: ff.adaptive_alpha(good, bad, forget_fraction=0.1),
        lambda: bad.to(dtype=torch.float64),
        lambda: bad.save(tmp_path / "f"),
        bad.sha256,
        lambda: bad["w"],
    ):
        with pytest.raises(ff.FiunError, match="buffer"):
            use()
    assert model["w"].eq(1).all()
    assert not (tmp_path / "f").exists()


def test_models_may_be_mappings_of_any_kind(watch):
    from collections import OrderedDict, UserDict, defaultdict
    from types import MappingProxyType

    entries = {"w": torch.ones(SHAPE)}
    for model in (OrderedDict(entries), UserDict(entries), MappingProxyType(entries), defaultdict(list, entries)):
        entries["w"].fill_(1.0)
        dag = ff.InheritanceDAG()
        dag.add_model("m", model, fisher())
        plan = ff.plan(dag, [ff.ForgetRequest("m", fisher(50.0))], lam=5.0)
        assert plan.run_().selected == 12
        assert plan.run_().selected == 12
        assert entries["w"].allclose(torch.tensor(0.01))
    del model["w"]  # a defaultdict would make a new entry for whoever looks by index
    with pytest.raises(ff.LayoutError, match="node 'm': the model has no parameter 'w'"):
        plan.run_()
    assert "w" not in model


def test_dicts_of_a_module_that_were_exchanged_are_noticed(watch):
    """As `copy.copy`, `__setstate__` and loaders do it: the objects stay, what they hold is another."""
    for inner in (False, True):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        layout = ff.Layout.from_module(model)
        good, bad = ff.Fisher(torch.ones(layout.numel), layout), ff.Fisher(torch.full((layout.numel,), 50.0), layout)
        dag = ff.InheritanceDAG()
        dag.add_model("m", model, good)
        plan = ff.plan(dag, [ff.ForgetRequest("m", bad)])
        changed = model[0] if inner else model
        changed.__dict__.update(copy.deepcopy(changed).__dict__)
        before = [p.detach().clone() for p in model.parameters()]
        plan.run_()
        assert not any(map(torch.equal, model.parameters(), before))


def test_a_layout_does_not_change_and_another_one_is_noticed(watch):
    good, bad = fisher(), fisher(50.0)
    for name, value in (("numel", 3), ("names", ("v",)), ("other", 1)):
        with pytest.raises(AttributeError, match="does not change"):
            setattr(good.layout, name, value)
    with pytest.raises(AttributeError, match="does not change"):
        del good.layout.numel
    dag = ff.InheritanceDAG()
    dag.add_model("m", {"w": torch.ones(SHAPE)}, good)
    plan = ff.plan(dag, [ff.ForgetRequest("m", bad)])
    bad.layout = ff.Layout({"v": SHAPE})
    with pytest.raises(ff.LayoutError, match="v .* only in the forget Fisher"):
        plan.run_()


def ways_to_replace() -> dict[str, Callable[[nn.Module, nn.Parameter], object]]:
    """Every way that comes to mind to put another parameter into a module, or another module above it."""

    def above(model: nn.Module, new: nn.Parameter) -> None:
        layer = nn.Linear(4, 4, bias=False)
        layer.weight = new
        model[0] = layer

    def state(model: nn.Module, new: nn.Parameter) -> None:
        model[0].load_state_dict({"weight": new}, assign=True)

    return {
        "attribute": lambda model, new: setattr(model[0], "weight", new),
        "dict": lambda model, new: model[0]._parameters.__setitem__("weight", new),
        "update": lambda model, new: model[0]._parameters.update(weight=new),
        "another dict": lambda model, new: vars(model[0]).update(_parameters={"weight": new}),
        "another dict by attribute": lambda model, new: object.__setattr__(model[0], "_parameters", {"weight": new}),
        "register": lambda model, new: model[0].register_parameter("weight", new),
        "delete and set": lambda model, new: (delattr(model[0], "weight"), setattr(model[0], "weight", new)),
        "pop and set": lambda model, new: (
            model[0]._parameters.pop("weight"),
            model[0]._parameters.setdefault("weight", new),
        ),
        "another layer": above,
        "another dict of layers": lambda model, new: vars(model).update(
            _modules=copy.copy(model._modules) | {"0": above(other := nn.Sequential(nn.Identity()), new) or other[0]}
        ),
        "state": state,
        "swap": lambda model, new: torch.utils.swap_tensors(model[0].weight, new),
        "data": lambda model, new: setattr(model[0].weight, "data", new.data),
    }


@pytest.mark.parametrize("way", ways_to_replace())
def test_what_was_replaced_after_many_runs_is_noticed(way, watch):
    """Runs in between have been told that nothing changed, by the numbers of dicts where Python has these."""
    model, others = nn.Sequential(nn.Linear(4, 4, bias=False)), [nn.Linear(4, 4, bias=False) for _ in range(5)]
    layout, thin = ff.Layout({"0.weight": (4, 4)}), ff.Layout({"weight": (4, 4)})
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, ff.Fisher(torch.ones(16), layout))
    for i, other in enumerate(others):
        dag.add_model(f"o{i}", other, ff.Fisher(torch.ones(16), thin))
    requests = [ff.ForgetRequest("m", ff.Fisher(torch.full((16,), 50.0), layout))]
    requests += [ff.ForgetRequest(f"o{i}", ff.Fisher(torch.zeros(16), thin)) for i in range(5)]
    plan = ff.plan(dag, requests, lam=5.0)
    for _ in range(3):
        plan.run_(dry_run=True)
    model[0].note = "touched, and nothing that matters changed"
    plan.run_(dry_run=True)
    new = nn.Parameter(torch.randn(4, 4))
    expected = new.detach() * torch.tensor(0.1)
    ways_to_replace()[way](model, new)
    plan.run_()
    assert torch.equal(model[0].weight, expected)


def test_dicts_are_looked_into_only_where_one_was_touched():
    if not memory.dicts_are_numbered():
        pytest.skip("this Python does not number its dicts")
    dicts = [{"w": object()} for _ in range(5000)]
    objects = [d["w"] for d in dicts]
    held = memory.dict_numbers()
    for _ in range(2):
        assert held.all(dicts, ["w"] * 5000, objects, 2)
    dicts[4321]["other"] = 1
    assert held.all(dicts, ["w"] * 5000, objects, 2)
    dicts[4321]["w"] = object()
    assert not held.all(dicts, ["w"] * 5000, objects, 2)
    assert not held.all(dicts, ["w"] * 5000, objects, 2)
    dicts[4321]["w"] = objects[4321]
    assert held.all(dicts, ["w"] * 5000, objects, 2)
    assert not held.all(dicts, ["w"] * 5001, [*objects, 1], 2)


def test_a_mapping_that_makes_tensors_when_asked_is_refused():
    class Made(dict):
        def get(self, key, default=None):
            return super().get(key, default).clone()

        def __getitem__(self, key):
            return super().__getitem__(key).clone()

    one = fisher(50.0)
    with pytest.raises(ff.LayoutError, match="parameter 'w': the mapping makes it anew"):
        ff.dampen_(Made(w=torch.ones(SHAPE)), fisher(), one)
