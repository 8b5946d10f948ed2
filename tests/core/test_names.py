"""Names of parameters: the same whatever a model is wrapped in, was wrapped in, or ties."""

from __future__ import annotations

import copy

import pytest
import torch
from small import Tied, net
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber, mfim
from fiun_fast.naming import matched

pytestmark = pytest.mark.usefixtures("one_thread")


def in_parts(model: nn.Module) -> nn.Module:
    model[0] = nn.DataParallel(model[0])
    model[2] = torch.compile(checkpoint_wrapper(model[2]), backend="eager")
    return model


WRAPS = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "twice": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "parts": in_parts,
}


@pytest.fixture(params=WRAPS)
def wrap(request):
    return WRAPS[request.param]


def paths(model: nn.Module) -> list[str]:
    """What the wrapped model itself calls its parameters, also where a wrapper's `named_parameters` hides it."""
    return [f"{path}.{key}" for path, module in model.named_modules() for key in module._parameters]


def random_fisher(names, scale: float = 1.0) -> ff.Fisher:
    return ff.Fisher.from_dict(
        {name: torch.rand(p.shape) * scale for name, p in zip(names, net().parameters(), strict=True)}
    )


def dampened(model: nn.Module, original: ff.Fisher, forget: ff.Fisher) -> list[torch.Tensor]:
    """Textbook, over parameters in their order."""
    result = []
    for p, (i, f) in zip(
        model.parameters(), zip(original.as_dict().values(), forget.as_dict().values(), strict=True), strict=True
    ):
        result.append(torch.where(f > i * 2.0, p * (i * 0.5 / f).clamp(max=1.0), p))
    return result


def same(model: nn.Module, expected: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, model.parameters(), expected))


def test_layouts(wrap):
    plain, model = net(), wrap(net())
    assert set(paths(model)) != set(ff.Layout.from_module(plain).names)
    assert ff.Layout.from_module(model) == ff.Layout.from_module(plain)
    assert ff.last_layer(model) == ["2.weight", "2.bias"]
    assert list(ff.FisherAccumulator(model, "2.*").layout.names) == ["2.weight", "2.bias"]
    for name, path in zip(ff.Layout.from_module(plain).names, paths(model), strict=True):
        assert ff.Layout.from_module(model, path).names == ff.Layout.from_module(plain, path).names == (name,)
    first = paths(model)[0].rpartition(".")[0]
    assert ff.Layout.from_module(model, f"{first}.*").names == ("0.weight", "0.bias")
    assert ff.Layout.from_module(plain, f"{first}.*").names == ("0.weight", "0.bias")
    assert ff.flatten_(model).numel() == ff.stack_([net(), wrap(net())]).shape[1] == 53


@pytest.mark.parametrize("written", ["plain", "wrapped", "one of each"])
@pytest.mark.parametrize("used", ["plain", "wrapped", "state dict"])
def test_fishers_fit_before_and_after_wrapping(wrap, written, used):
    names = {"plain": list(ff.Layout.from_module(net()).names), "wrapped": paths(wrap(net()))}
    original = random_fisher(names["plain" if written == "one of each" else written])
    forget = random_fisher(names["wrapped" if written == "one of each" else written], 8.0)
    expected = dampened(net(), original, forget)
    model = net() if used == "plain" else wrap(net())
    if used == "state dict":
        target = dict(zip(paths(model), (p.detach() for p in model.parameters()), strict=True))
    else:
        target = model
    report = ff.dampen_(target, original, forget, alpha=2.0, lam=0.5, undo=True, audit=True)
    assert report.selected > 0
    assert same(model, expected)
    other = net() if used == "wrapped" else wrap(net())  # the log knows names: they hold there too
    with torch.no_grad():
        for p, value in zip(other.parameters(), expected, strict=True):
            p.copy_(value)
    report.undo.undo_(other)
    assert same(other, list(net().parameters()))


def test_fishers_fit_each_other(wrap, tmp_path):
    plain = random_fisher(ff.Layout.from_module(net()).names)
    wrapped = random_fisher(paths(wrap(net())), 8.0)
    assert torch.equal(ff.merge_fishers([plain, wrapped]).buffer, torch.maximum(plain.buffer, wrapped.buffer))
    swapped = ff.Fisher(
        wrapped.buffer, ff.Layout({name: s.shape for name, s in zip(plain.layout.names, wrapped.layout)})
    )
    assert ff.adaptive_alpha(plain, wrapped, forget_fraction=0.1) == ff.adaptive_alpha(
        plain, swapped, forget_fraction=0.1
    )
    assert torch.equal(
        torch.cat([t.view(-1) for t in mfim([plain, wrapped]).values()]), ff.merge_fishers([plain, wrapped]).buffer
    )
    wrapped.save(tmp_path / "f")
    loaded = ff.Fisher.load(tmp_path / "f", layout=plain.layout)
    assert loaded.layout == plain.layout
    assert torch.equal(loaded.buffer, wrapped.buffer)


def test_a_dag_of_models_wrapped_and_not():
    originals = [random_fisher(ff.Layout.from_module(net()).names) for _ in range(4)]
    forget = random_fisher(paths(nn.DataParallel(net())), 8.0)
    wraps = [lambda model: model, nn.DataParallel, WRAPS["twice"], in_parts]
    models = [wrap(net(i)) for i, wrap in enumerate(wraps)]
    dag = ff.InheritanceDAG()
    for i, model in enumerate(models):
        dag.add_model(f"m{i}", model, originals[i], parents=["m0"] * (i > 0))
    plan = ff.plan(dag, [ff.ForgetRequest("m0", forget)], alpha=2.0, lam=0.5)
    assert len(plan.parts) == 1
    expected = [dampened(net(i), original, forget) for i, original in enumerate(originals)]
    plan.run_()
    assert all(map(same, models, expected))
    models[1].module[0] = nn.Linear(6, 5)  # behind the wrapper
    before = models[1].module[0].weight.detach().clone()
    original = originals[1]["0.weight"]
    plan.run_()
    f = forget["module.0.weight"]
    assert torch.equal(models[1].module[0].weight, torch.where(f > original * 2, before * (original * 0.5 / f), before))


@pytest.mark.parametrize("mode", ["strict", "corrected"])
@torch.compiler.set_stance("force_eager")  # strict mode runs a compiled model as it is, and that takes seconds
def test_the_drop_in(wrap, mode):
    batches = [(torch.randn(4, 6), torch.randint(3, (4,)))] * 2
    model = wrap(net())
    own = [name for name, _ in model.named_parameters()]
    importances = ParameterPerturber(model, mode=mode).calc_importance(batches)
    assert list(importances) == own
    head = ParameterPerturber(model, parameters={"train_layer": "last"}, mode=mode).calc_importance(batches)
    assert {name for name, value in head.items() if value.any()} == set(own[2:])
    plain = ParameterPerturber(net(), mode=mode).calc_importance(batches)
    assert all(map(torch.equal, importances.values(), plain.values()))
    for given, target in ((importances, net()), (plain, wrap(net())), (importances, wrap(net()))):
        original = {name: torch.rand_like(value) for name, value in given.items()}
        forget = dict(zip(plain if given is importances else own, (8 * torch.rand_like(v) for v in original.values())))
        expected = dampened(net(), ff.Fisher.from_dict(original), ff.Fisher.from_dict(forget))
        numbers = {"selection_weighting": 2.0, "dampening_constant": 0.5}
        ParameterPerturber(target, parameters=numbers, mode=mode).modify_weight(original, forget)
        assert same(target, expected)


class Own(nn.Module):
    """Modules of one's own that are called like those in wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.module = nn.Linear(3, 1, bias=False)
        self._orig_mod = nn.Linear(3, 3, bias=False)
        self.base_model = nn.ModuleDict({"model": nn.Linear(3, 2, bias=False)})


def test_names_of_ones_own_stay():
    names = ("weight", "module.weight", "_orig_mod.weight", "base_model.model.weight")
    assert ff.Layout.from_module(Own()).names == names
    assert ff.Layout.from_module(nn.DataParallel(Own())).names == names
    assert ff.Layout.from_module(Own(), "module.weight").names == ("module.weight",)
    model = nn.DataParallel(Own())
    forget = ff.Fisher.from_dict({name: torch.ones(p.shape) for name, p in Own().named_parameters()})
    original = ff.Fisher.from_dict({name: torch.full(p.shape, 0.1) for name, p in Own().named_parameters()})
    ff.dampen_(model, original, forget, alpha=1.0, lam=0.0)
    assert not any(p.any() for p in model.parameters())
    inner, outer = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    tower = nn.DataParallel(nn.ModuleDict({"module": nn.ModuleDict({"x": inner}), "x": outer}))
    given = [ff.Fisher.from_dict({"module.x.weight": torch.full((3, 3), value)}) for value in (0.1, 1.0)]
    ff.dampen_(tower, *given, alpha=1.0, lam=0.0)  # as layouts have it, not as the wrapper does
    assert not inner.weight.any()
    assert outer.weight.all()


def test_what_is_ambiguous_is_not_guessed():
    assert matched(["module.w"], ["w"]) == {"module.w": "w"}
    assert matched(["module.w", "w"], ["w"]) == {}
    assert matched(["w"], ["module.w", "_orig_mod.w"]) == {}
    both = {"module.0.weight": torch.ones(5, 6), "0.weight": torch.ones(5, 6)}
    fisher = ff.Fisher.from_dict(both)
    model = net()
    with pytest.raises(ff.LayoutError, match=r"'module.0.weight' and .* '0.weight' share memory|'0.weight' and .*"):
        ff.dampen_(model, fisher, fisher)
    with pytest.raises(ff.LayoutError, match="'0.weight' and 'module.0.weight', which are one parameter"):
        ParameterPerturber(model).modify_weight(both, both)
    one = ff.Fisher.from_dict({"0.weight": torch.ones(5, 6)})
    with pytest.raises(ff.LayoutError, match="module.0.weight .* only in the forget Fisher"):
        ff.dampen_(model, one, fisher)
    with pytest.raises(ff.LayoutError, match="the model has no parameter 'module.3.weight'"):
        ff.dampen_(model, *[ff.Fisher.from_dict({"module.3.weight": torch.ones(5, 6)})] * 2)


@pytest.mark.parametrize("wrapped", [False, True])
def test_tied_parameters_under_their_second_name(wrapped):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.DataParallel(Tied()) if wrapped else Tied()

    first, second = "embedding.weight", "module.head.weight" if wrapped else "head.weight"
    i, f = torch.rand(7, 5), torch.rand(7, 5) * 8
    theta = next(make().parameters())
    expected = torch.where(f > i * 2.0, theta * (i * 0.5 / f).clamp(max=1.0), theta)
    for mine, theirs in ((first, second), (second, first), (second, second)):
        model = make()
        original, forget = {mine: i}, {theirs: f}
        report = ff.dampen_(model, ff.Fisher.from_dict(original), ff.Fisher.from_dict(forget), alpha=2.0, lam=0.5)
        assert report.selected > 0
        assert same(model, [expected])
        model = make()
        numbers = {"selection_weighting": 2.0, "dampening_constant": 0.5}
        ParameterPerturber(model, parameters=numbers).modify_weight(original, forget)
        assert same(model, [expected])
    untied = make()
    inner = untied.module if wrapped else untied
    inner.head.weight = nn.Parameter(inner.head.weight.detach().clone())
    with pytest.raises(ff.LayoutError, match=r"only in the original .*; .*head.weight .* only in the forget"):
        ff.dampen_(untied, ff.Fisher.from_dict({first: i}), ff.Fisher.from_dict({second: f}))


def test_nodes_that_tie_different_parameters():
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)

    original = ff.Fisher.from_dict({"embedding.weight": torch.ones(7, 5)})
    forget = ff.Fisher.from_dict({"head.weight": torch.ones(7, 5)})
    dag = ff.InheritanceDAG()
    dag.add_model("tied", Tied(), original)
    dag.add_model("free", Free(), original, parents=["tied"])
    with pytest.raises(ff.LayoutError, match="nodes 'tied' and 'free' have Fishers over the same names"):
        ff.plan(dag, [ff.ForgetRequest("tied", forget)])


def test_a_copy_of_a_plan_is_not_needed_when_a_model_is_wrapped_later():
    model = net()
    original, forget = (random_fisher(ff.Layout.from_module(model).names, s) for s in (1.0, 8.0))
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, original)
    plan = ff.plan(dag, [ff.ForgetRequest("m", forget)], alpha=2.0, lam=0.5)
    wrapped = nn.DataParallel(model)
    expected = dampened(copy.deepcopy(model), original, forget)
    plan.run_()
    assert same(wrapped, expected)


def test_nodes_that_are_wrapped_alike_or_not_are_dampened_as_bare_ones_and_what_is_put_inside_is_noticed():
    def small_net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

    layout = ff.Layout.from_module(small_net(0))
    original, forget = (ff.Fisher(torch.rand(layout.numel) + 0.1, layout) for _ in range(2))

    def planned(models):
        dag = ff.InheritanceDAG()
        for i, model in enumerate(models):
            dag.add_model(f"n{i}", model, fisher=original, parents=["n0"] if i else [])
        return ff.plan(dag, [ff.ForgetRequest("n0", forget)], alpha=1.0, lam=0.5)

    for wrappers in ([nn.DataParallel] * 2, [nn.DataParallel, lambda m: m]):
        models, bare = [small_net(1), small_net(2)], [small_net(1), small_net(2), small_net(3)]
        wrapped = [wrap(model) for wrap, model in zip(wrappers, models)]
        plan = planned(wrapped)
        assert plan.run_().selected == planned(bare[:2]).run_().selected > 0
        wrapped[0].module = new = small_net(3)
        plan.run_()
        planned(bare[1:]).run_()
        for model, wanted in zip((new, models[1]), (bare[2], bare[1])):
            assert all(map(torch.equal, model.parameters(), wanted.parameters()))
