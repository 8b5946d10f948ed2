"""State dicts as models and as what Fishers are named after: whoever saved them, and in what the model was wrapped."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from small import Tied, net
from torch import nn

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber
from fiun_fast.naming import Names, matched
from fiun_fast.wrappers import loose_name

PREFIXES = [
    "module.",
    "_orig_mod.",
    "_forward_module.",
    "base_model.model.",
    "model.",
    "model._orig_mod.",
    "module.model.",
]


def fishers(names, model: nn.Module | None = None) -> tuple[ff.Fisher, ff.Fisher]:
    torch.manual_seed(3)
    shapes = [p.shape for p in (model or net()).parameters()]
    made = [{n: scale * torch.rand(s) for n, s in zip(names, shapes, strict=True)} for scale in (1.0, 8.0)]
    return ff.Fisher.from_dict(made[0]), ff.Fisher.from_dict(made[1])


def from_disk(state: dict, one_storage: bool = False) -> dict:
    file = io.BytesIO()
    torch.save(state if one_storage else {name: value.clone() for name, value in state.items()}, file)
    file.seek(0)
    return torch.load(file)


class Lightning(nn.Module):
    """A LightningModule, as far as names go."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("used", ["module", "inside", "dict", "dict with it"])
@pytest.mark.parametrize("with_it", [(True, True), (True, False), (False, True), (False, False)])
def test_a_prefix_is_there_or_not(prefix, used, with_it):
    names = [name for name, _ in net().named_parameters()]
    both = [fishers([prefix * here + name for name in names])[k] for k, here in enumerate(with_it)]
    expected = net()
    ff.dampen_(expected, *fishers(names), alpha=2.0, lam=0.5)
    target = {
        "module": net,
        "inside": Lightning,
        "dict": lambda: from_disk(net().state_dict()),
        "dict with it": lambda: {prefix + name: value for name, value in from_disk(net().state_dict()).items()},
    }[used]()
    report = ff.dampen_(target, *both, alpha=2.0, lam=0.5, undo=True)
    found = target.values() if isinstance(target, dict) else target.parameters()
    assert report.selected > 0
    assert all(map(torch.equal, found, expected.parameters()))
    report.undo.undo_(net().state_dict() | dict(expected.named_parameters()))  # the log fits another such model
    merged = ff.merge_fishers(both)
    assert torch.equal(merged.buffer, torch.maximum(*(one.buffer for one in both)))


@pytest.mark.parametrize("model", [net, Lightning])
def test_the_drop_in_takes_them_too(model):
    names = [name for name, _ in net().named_parameters()]
    expected = net()
    ff.dampen_(expected, *fishers(names), alpha=10.0)
    for prefix in ("", "model.", "module.model."):
        target = model()
        both = (fisher.as_dict() for fisher in fishers([prefix + name for name in names]))
        ParameterPerturber(target).modify_weight(*both)
        assert all(map(torch.equal, target.parameters(), expected.parameters()))


def test_other_prefixes_are_not_guessed_and_near_names_are_shown():
    names = [name for name, _ in net().named_parameters()]
    plain, other = fishers(names), fishers([f"network.{name}" for name in names])
    with pytest.raises(ff.LayoutError, match=r"no parameter 'network\.0\.weight', .*; near names: 0\.weight"):
        ff.dampen_(net(), *other)
    state = {f"network.{name}": value for name, value in net().state_dict().items()}
    with pytest.raises(ff.LayoutError, match=r"no parameter '0\.weight', .*; near names: network\.0\.weight"):
        ff.dampen_(state, *plain)
    with pytest.raises(
        ff.LayoutError, match=r"0\.weight .* only in the original .*network\.0\.weight .* only in the f"
    ):
        ff.dampen_(net(), plain[0], other[1])
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), *net()[1:])
    with pytest.raises(ff.LayoutError, match=r"no parameter '0\.weight', .*0\.parametrizations\.weight\.original0"):
        ff.dampen_(normed, *plain)


def test_a_whole_checkpoint_is_told_from_a_state_dict():
    original, forget = fishers([name for name, _ in net().named_parameters()])
    for key in ("state_dict", "model", "module"):  # Lightning, torchvision's scripts, DeepSpeed
        with pytest.raises(ff.LayoutError, match=f"it is a checkpoint: pass what it has under '{key}'"):
            ff.dampen_({"epoch": 3, key: net().state_dict()}, original, forget)


def test_what_is_ambiguous_with_a_prefix_is_not_guessed():
    assert matched(["model.w"], ["w"]) == {"model.w": "w"}
    assert matched(["w"], ["model.w"]) == {"w": "model.w"}
    assert matched(["model.w", "w"], ["w"]) == {}
    assert matched(["w"], ["model.w", "model.module.w"]) == {}
    assert matched(["module.model.w"], ["model.w", "w"]) == {"module.model.w": "model.w"}
    assert matched(["x.lora_A.weight"], ["x.lora_A.one.weight", "x.lora_A.two.weight"]) == {}
    assert matched(["x.lora_A.one.weight"], ["x.lora_A.two.weight"]) == {}
    assert matched(["x.lora_A.weight"], ["x.lora_A.two.weight"]) == {"x.lora_A.weight": "x.lora_A.two.weight"}
    known = Names(nn.ModuleDict({"model": nn.Linear(2, 2), "other": nn.ModuleDict({"model": nn.Linear(2, 2)})}))
    assert known.find("weight") == "model.weight"
    assert known.find("model.other.model.bias") == "other.model.bias"
    assert known.find("other.weight") is None


@pytest.mark.parametrize(
    ("name", "plain", "adapters"),
    [
        ("base_model.model.fc.lora_A.default.weight", "fc.lora_A.weight", ("default",)),
        ("base_model.model.fc.lora_A.weight", "fc.lora_A.weight", ()),
        ("wte.lora_embedding_B.default", "wte.lora_embedding_B", ("default",)),
        ("fc.lora_magnitude_vector.a.weight", "fc.lora_magnitude_vector", ("a",)),
        ("fc.ia3_l.default", "fc.ia3_l", ("default",)),
        ("fc.hada_w1_a.mine", "fc.hada_w1_a", ("mine",)),
        ("ln.ln_tuning_layers.default.bias", "ln.ln_tuning_layers.bias", ("default",)),
        ("model.head.modules_to_save.default.dense.weight", "head.dense.weight", ("default",)),
        ("head.modules_to_save.default.lora_A.default.weight", "head.lora_A.weight", ("default", "default")),
        ("explora_x.fc.weight", "explora_x.fc.weight", ()),
        ("model", "model", ()),
    ],
)
def test_names_as_files_have_them(name, plain, adapters):
    assert loose_name(name) == (plain, adapters)


# ---- tied weights, which a file may have taken apart -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_one_name_of_a_tied_weight(name):
    both = fishers([name], Tied())
    expected = Tied()
    with torch.no_grad():
        expected.embedding.weight.copy_(torch.linspace(-1, 1, 35).view(7, 5))
    before = {key: value.clone() for key, value in expected.state_dict().items()}
    ff.dampen_(expected, *both, alpha=2.0)
    shared = from_disk(Tied().state_dict(), one_storage=True)
    shared["head.weight"].copy_(before["head.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ff.ScopeWarning)
        ff.dampen_(shared, *both, alpha=2.0)
    assert torch.equal(shared["embedding.weight"], expected.embedding.weight)
    apart, other = before, {"embedding.weight": "head.weight", "head.weight": "embedding.weight"}[name]
    message = f"'{name}' has the numbers of '{other}', which stays as it is: if they are one tied weight, copy"
    with pytest.warns(ff.ScopeWarning, match=message):
        ff.dampen_(apart, *both, alpha=2.0)
    assert torch.equal(apart[name], expected.embedding.weight)
    assert not torch.equal(apart[name], apart[other])


def test_both_names_of_a_tied_weight():
    torch.manual_seed(3)
    state = from_disk(Tied().state_dict())
    original = ff.Fisher.from_dict({name: torch.rand(value.shape) for name, value in state.items()})
    forget = ff.Fisher(original.buffer * 50, original.layout)
    for model in (Tied(), from_disk(Tied().state_dict(), one_storage=True)):
        with pytest.raises(
            ff.LayoutError, match="'embedding.weight' and .*'head.weight' share memory.*or leave it out"
        ):
            ff.dampen_(model, original, forget)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ff.ScopeWarning)
        assert ff.dampen_(state, original, forget).selected == 70


def test_layers_that_are_alike_by_design_are_no_copies():
    zeros = {"a": torch.zeros(3, 3), "b": torch.zeros(3, 3), "c": torch.ones(3), "d": torch.ones(3)}
    fisher = ff.Fisher.from_dict({"a": torch.ones(3, 3), "c": torch.ones(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error", ff.ScopeWarning)
        ff.dampen_(zeros, fisher, ff.Fisher(fisher.buffer * 50, fisher.layout))
        ff.dampen_(net(), *fishers([name for name, _ in net().named_parameters()]))
