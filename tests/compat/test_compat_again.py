"""`modify_weight` called again: the plan of the last call serves, and whatever changed meanwhile is noticed."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from textbook_ssd import modify
from torch import nn

import fiun_fast as ff
from fiun_fast.compat import dampening
from fiun_fast.compat.ssd import ParameterPerturber

pytestmark = pytest.mark.usefixtures("one_thread", "size")


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch) -> str:
    """Importances of small models are copied into a plan's own memory, those of large ones read in place."""
    if request.param == "large":
        monkeypatch.setattr(dampening, "SMALL", 0)
    return request.param


class Scene:
    """A model, its perturber and importances, as a script has them."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
        self.parameters = {"selection_weighting": 1.0, "dampening_constant": 0.4}
        self.perturber = ParameterPerturber(self.model, None, "cpu", self.parameters)
        self.original, self.forget = (self.perturber.zerolike_params_dict(self.model) for _ in range(2))
        for values in (self.original, self.forget):
            for value in values.values():
                value.uniform_(0.01, 1)

    def run(self, **options) -> ff.Report:
        return self.perturber.modify_weight(self.original, self.forget, **options)

    def fresh(self) -> None:
        """As if nothing had been called before."""
        attributes = ("selection_weighting", "dampening_constant", "exponent", "lower_bound", "train_layer")
        old = {key: getattr(self.perturber, key) for key in attributes}
        self.perturber = ParameterPerturber(self.perturber.model, None, "cpu", self.parameters)
        for key, value in old.items():
            setattr(self.perturber, key, value)


@pytest.fixture
def plans(monkeypatch) -> list[weakref.ref[ff.Plan]]:
    """Every plan that is made."""
    made, plan = [], ff.plan

    def counted(*args, **kwargs):
        found = plan(*args, **kwargs)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(ff, "plan", counted)
    return made


def bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


def test_calls_with_the_same_tensors_share_a_plan_and_have_the_published_bits(plans):
    scene = Scene()
    start = copy.deepcopy(scene.model.state_dict())
    for k in range(6):
        alpha, lam = (1.0, 0.4) if k % 2 else (0.5 + k, 0.9)
        scene.perturber.selection_weighting, scene.perturber.dampening_constant = alpha, lam
        for value in (*scene.original.values(), *scene.forget.values()):
            value.uniform_(0, 1)  # values may change; where they lie does not
        wanted = copy.deepcopy(scene.model)
        modify(wanted, scene.original, scene.forget, alpha=alpha, lam=lam)
        expected = sum(int((scene.forget[n] > i * alpha).sum()) for n, i in scene.original.items())
        assert scene.run(dry_run=True).selected == expected
        report = scene.run(undo=k == 3)
        assert report.selected == expected > 0
        assert report["model"].alpha == alpha and report["model"].lam == lam
        assert all(map(torch.equal, bits(scene.model), bits(wanted)))
        if k == 3:
            report.undo_()
        scene.model.load_state_dict(start)
    assert len(plans) == 1


def test_no_importances_are_kept(plans, size):
    scene = Scene()
    scene.run()
    gc.collect()
    assert plans[0]() is not None
    old = [weakref.ref(value) for values in (scene.original, scene.forget) for value in values.values()]
    memory = weakref.ref(scene.forget["3.bias"].untyped_storage())
    for values in (scene.original, scene.forget):
        for name in values:
            values[name] = values[name].clone()
    gc.collect()
    assert not any(reference() is not None for reference in (*old, memory))
    assert (plans[0]() is None) == (size == "large"), "it would keep the memory of importances that nobody else has"


def test_new_importances_have_the_published_bits(plans, size):
    scene = Scene()
    for k in range(6):
        for values in (scene.original, scene.forget):
            for name, old in list(values.items()):  # a script makes new ones for each request
                new = torch.rand(2, *old.shape)[1] if k % 2 else torch.rand_like(old)
                new.view(-1)[:2] = torch.tensor([0.0, 1e-45])
                values[name] = new.requires_grad_(k == 4)
        wanted, values = (
            copy.deepcopy(scene.model),
            [{n: v.detach() for n, v in d.items()} for d in (scene.original, scene.forget)],
        )
        modify(wanted, *values, alpha=1.0, lam=0.4)
        with torch.inference_mode(k == 5):
            scene.run()
        assert all(map(torch.equal, bits(scene.model), bits(wanted)))
    assert len(plans) == (1 if size == "small" else 6)


def test_a_plan_made_in_inference_mode_is_followed_by_one_outside():
    scene = Scene()
    wanted = copy.deepcopy(scene.model)
    for k in range(3):
        modify(wanted, scene.original, scene.forget, alpha=1.0, lam=0.4)
        with torch.inference_mode(k == 0):
            scene.run()
        assert all(map(torch.equal, bits(scene.model), bits(wanted)))


def replaced(scene: Scene) -> None:
    scene.model[3].weight = nn.Parameter(torch.ones(4, 5))


def swapped_module(scene: Scene) -> None:
    scene.model[3] = nn.Linear(5, 4)


def another_model(scene: Scene) -> None:
    scene.perturber.model = scene.model = copy.deepcopy(scene.model)


def renamed(scene: Scene) -> None:
    scene.forget["zebra"] = scene.forget.pop("3.bias")


def shared_buffer(scene: Scene) -> None:
    scene.model[1].running_mean = scene.model[0].bias.detach()


def shared_by_data(scene: Scene) -> None:
    scene.model[1].running_mean.data = scene.model[0].bias.data


def negative(scene: Scene) -> None:
    scene.forget["0.weight"].numpy()[2, 3] = -1.0  # which no version counter sees


CHANGES = {
    "nothing": lambda s: None,
    "negative entry": negative,
    "negative zero": lambda s: s.original["0.weight"].data.view(-1)[:3].fill_(-0.0),
    "NaN with a sign": lambda s: s.forget["0.weight"].data.view(-1)[:3].copy_(-torch.tensor(float("nan"))),
    "NaN": lambda s: s.forget["0.weight"].data.view(-1)[:3].fill_(float("nan")),
    "importance replaced": lambda s: s.forget.update({"3.bias": torch.rand(4)}),
    "importance moved": lambda s: setattr(s.forget["3.bias"], "data", torch.rand(4)),
    "importance of another shape": lambda s: setattr(s.forget["3.bias"], "data", torch.rand(5)),
    "importance in float64": lambda s: setattr(s.forget["3.bias"], "data", torch.rand(4).double()),
    "importance freed": lambda s: s.forget["3.bias"].untyped_storage().resize_(0),
    "importances all new": lambda s: s.forget.update({n: torch.rand_like(v) for n, v in s.forget.items()}),
    "new importances in float64": lambda s: s.forget.update({n: v.double() for n, v in s.forget.items()}),
    "new importances in bfloat16": lambda s: s.forget.update({n: v.bfloat16() for n, v in s.forget.items()}),
    "new importance, not contiguous": lambda s: s.forget.update({"3.weight": torch.rand(5, 4).t()}),
    "new importance, sparse": lambda s: s.forget.update({"3.weight": torch.rand(4, 5).to_sparse()}),
    "new importance on meta": lambda s: s.forget.update({"3.weight": torch.rand(4, 5, device="meta")}),
    "new importance of another shape": lambda s: s.forget.update({"3.weight": torch.rand(5, 4)}),
    "new importance, a list": lambda s: s.forget.update({"3.bias": [0.1, 0.2, 0.3, 0.4]}),
    "importance that is a parameter": lambda s: s.forget.update({"3.bias": s.model[3].bias.data.abs_()}),
    "importance missing": lambda s: s.forget.pop("3.bias"),
    "importance of another name": renamed,
    "importance of no parameter": lambda s: s.original.update({"zebra": torch.rand(4)}),
    "parameter replaced": replaced,
    "module replaced": swapped_module,
    "parameter moved": lambda s: setattr(s.model[3].weight, "data", s.model[3].weight.data.clone()),
    "parameter not contiguous": lambda s: setattr(s.model[3].weight, "data", torch.randn(5, 4).t()),
    "parameter of another shape": lambda s: setattr(s.model[3].weight, "data", torch.randn(5, 4)),
    "parameter in float64": lambda s: s.model.double(),
    "parameter in bfloat16": lambda s: s.model[3].bfloat16(),
    "parameter freed": lambda s: s.model[3].weight.untyped_storage().resize_(0),
    "parameters that share memory": lambda s: setattr(s.model[3].bias, "data", s.model[0].bias.data[:4]),
    "buffer in a parameter's memory": shared_buffer,
    "buffer in a parameter's memory, by data": shared_by_data,
    "model replaced": another_model,
    "flattened": lambda s: ff.flatten_(s.model),
    "alpha": lambda s: setattr(s.perturber, "selection_weighting", 0.3),
    "alpha out of range": lambda s: setattr(s.perturber, "selection_weighting", -1.0),
    "lambda": lambda s: setattr(s.perturber, "dampening_constant", 0.0),
    "exponent": lambda s: setattr(s.perturber, "exponent", 2.0),
    "cap": lambda s: setattr(s.perturber, "lower_bound", 0.1),
    "scope": lambda s: setattr(s.perturber, "train_layer", ["3.weight", "3.bias"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_two_calls_is_as_in_a_first_call(change):
    def second_call(fresh: bool) -> tuple:
        scene = Scene()
        scene.run()
        torch.manual_seed(1)
        CHANGES[change](scene)
        if fresh:
            scene.fresh()
        try:
            report = scene.run(audit=True)
            figures = [(n.name, n.selected, n.zeroed, n.nonfinite, n.alpha, n.lam, n.change) for n in report]
        except ff.FiunError as error:
            figures = [type(error), str(error)]
        present = [p for p in scene.model.parameters() if p.untyped_storage().nbytes()]  # reading freed memory crashes
        return figures, [p.detach().double().tolist() for p in present]

    assert second_call(fresh=False) == second_call(fresh=True)


def test_the_backend_in_use_is_the_one_that_runs():
    scene = Scene()
    usual = scene.run().to_dict()["backends"]
    with ff.use_backend("reference"):
        assert scene.run().to_dict()["backends"] == ["reference"]
    assert scene.run().to_dict()["backends"] == usual


def test_a_list_of_importances_is_kept_as_well(plans, size):
    scene, other = Scene(0), Scene(5)
    for k in range(3):
        forgets = [scene.forget, other.forget] if k < 2 else [other.forget, scene.forget]
        wanted = copy.deepcopy(scene.model)
        larger = {name: torch.maximum(value, other.forget[name]) for name, value in scene.forget.items()}
        modify(wanted, scene.original, larger, alpha=1.0, lam=0.4)
        scene.perturber.modify_weight(scene.original, forgets)
        assert all(map(torch.equal, bits(scene.model), bits(wanted)))
    assert len(plans) == (1 if size == "small" else 2)
