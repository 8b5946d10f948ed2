"""Alpha and lambda over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spread_cases import assert_same_bits_after_resharding, data, on, rank, same_everywhere, world
from spread_models import (
    assert_same_bits,
    counts,
    fishers,
    fsdp,
    net,
    whole,
)
from torch import nn
from torch.distributed.fsdp import fully_shard

import fiun_fast as ff


@on(3)
def tuning_comes_to_the_same_choice_everywhere(folder: Path) -> None:
    original, forget = fishers(net())
    x, y = data(3, 1, 40)[0]

    def evaluate(_, model: nn.Module) -> float:
        with torch.no_grad():
            z = model(x)
            return float((z.argmax(1) == y).float().mean() - whole(model.first.bias).abs().sum() * 0.1)

    chosen = []
    for model in (net(), fsdp(net())):
        dag = ff.InheritanceDAG()
        dag.add_model("m", model, original)
        chosen.append(ff.tune(dag, [ff.ForgetRequest("m", forget)], evaluate, points=5, lams=[1.0, 0.1])["m"])
        assert_same_bits_after_resharding(model, net())
    assert chosen[0] == chosen[1]
    shifted = ff.tune(dag, [ff.ForgetRequest("m", forget)], lambda *_: float(rank()), points=2, lams=[1.0])
    assert shifted["m"].score == (world() - 1) / 2
    with same_everywhere(ff.DistributedError, "^rank 1: ZeroDivisionError"):
        ff.tune(dag, [ff.ForgetRequest("m", forget)], lambda *_: 1 / (rank() != 1), points=2)
    assert_same_bits(model, net())


@on(2, 3)
def tuning_by_layer_comes_to_the_choice_of_one_process(folder: Path) -> None:
    """Over ranks of which some have nothing of some layers; the score says what it measured, too."""
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    alone = net()
    with torch.no_grad():
        y = alone(x).argmax(1)
    layout = ff.Layout.from_module(alone)
    dice = torch.Generator().manual_seed(8)
    original, forget = (ff.Fisher(torch.rand(layout.numel, generator=dice) * k, layout) for k in (1, 9))
    where = [(x[i : i + 20], y[i : i + 20]) for i in (0, 20, 40)]
    found = []
    for model in (alone, fsdp(net())):
        dag = ff.InheritanceDAG()
        dag.add_model("m", model, original)
        score = ff.ClassScore(where, forget=int(y.mode().values))
        for by in ("node", "layer"):
            tuned = ff.tune(dag, [ff.ForgetRequest("m", forget)], score, by=by, points=5)
            points = [
                (p.alpha, p.lam, p.selected, p.share, pytest.approx(p.score, abs=1e-5)) for p in tuned.points["m"]
            ]
            found.append((tuned["m"].alpha, tuned["m"].lam, points))
            assert_same_bits_after_resharding(model, net())
    assert len(found[1][2]) > 7, "no layer before the last was tried"
    assert found[2:] == found[:2]
    tried = {"by": ("node", "layer"), "points": (2, 3), "lams": ([0.1], [0.2]), "alphas": ([1.0], [2.0, 3.0])}
    for key, values in tried.items():
        with same_everywhere(ff.ArgumentError, f"^{key} is .* on rank 0 and .* on rank {world() - 1}"):
            ff.tune(dag, [ff.ForgetRequest("m", forget)], score, **{key: values[rank() == world() - 1]})
    nothing = ff.ClassScore(where, forget=99 if rank() else int(y.mode().values))
    with same_everywhere(ff.EstimationError, "^rank 1: validation data of node 'm': none of its 60 samples"):
        ff.tune(dag, [ff.ForgetRequest("m", forget)], nothing)
    assert_same_bits_after_resharding(model, net())


@on(2)
def arguments_of_an_estimate_that_are_wrong_on_one_rank(folder: Path) -> None:
    group, here = dist.group.WORLD, rank() == 1
    for make, options in ((net, {"group": group}), (lambda: fsdp(net()), {})):
        with same_everywhere(ff.ArgumentError, "^rank 1: estimator is 'nope', expected one of"):
            ff.estimate_fisher(make(), data(0, 1), estimator="nope" if here else "batch", **options)
    with same_everywhere(ff.ArgumentError, "^rank 1: model is a int, expected a torch.nn.Module"):
        ff.estimate_fisher(3 if here else net(), data(0, 1), group=group)
    with same_everywhere(ff.ArgumentError, "^rank 1: models is {}, expected a dict"):
        ff.estimate_fishers({} if here else {"a": net()}, data(0, 1), group=group)


@on(2)
def what_is_raised_in_a_forward_leaves_the_model_as_it_was(folder: Path) -> None:
    """FSDP2 takes itself to be inside that forward still, with gathered parameters registered."""
    original, forget = fishers(net())
    good, bad = torch.ones(2, 5), torch.ones(2, 6)
    for spread in (fsdp, fully_shard):
        model, expected, calls = spread(net()), net(), []

        def evaluate(_: str, model: nn.Module, calls: list = calls) -> float:
            calls.append(1)
            with torch.no_grad():
                return float(model(good if len(calls) < 3 else bad).sum().nan_to_num())

        dag = ff.InheritanceDAG()
        dag.add_model("m", model, original)
        with same_everywhere(ff.DistributedError, "^every rank: RuntimeError: mat1 and mat2"):
            ff.tune(dag, [ff.ForgetRequest("m", forget)], evaluate, points=4)
        assert_same_bits_after_resharding(model, net())
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(bad)
        ff.dampen_(model, original, forget, alpha=2.0)
        ff.dampen_(expected, original, forget, alpha=2.0)
        with torch.no_grad():
            assert torch.allclose(model(good), expected(good), equal_nan=True)
        assert_same_bits_after_resharding(model, expected)


@on(2, 3)
def numbers_by_pattern(folder: Path) -> None:
    """Of a spread model alone, and in a DAG with nodes elsewhere; the same on all ranks, the order of patterns too."""
    original, forget = fishers(net())
    alpha = {"first.*": 1.2, "second.weight": 0.3, "*": 2.0}
    lam = {"*.bias": 0.5, "*": 0.9}
    alone = ff.InheritanceDAG()
    here = ff.distributed.InheritanceDAG()
    for dag in (alone, here):
        for name, made, above in (("root", net, []), ("child", lambda: fsdp(net()), ["root"])):
            if dag is alone or name == "child" or rank() == 0:
                dag.add_model(name, net() if dag is alone else made(), original, parents=above)
    expected = ff.plan(alone, [ff.ForgetRequest("root", forget)], alpha={"root": 1.5, "child": alpha}, lam=1.0).run_()
    mine = [ff.ForgetRequest("root", forget)] if rank() == 1 else []
    plan = ff.distributed.plan(here, mine, alpha={"root": 1.5, "child": alpha}, lam=1.0)
    assert [(n.name, n.alpha, *counts(n)) for n in plan.run_()] == [(n.name, n.alpha, *counts(n)) for n in expected]
    assert_same_bits(here["child"].model, alone["child"].model)

    model, own = net(), fsdp(net())
    theirs = ff.dampen_(model, original, forget, alpha=alpha, lam=lam, dry_run=True)
    dag = ff.InheritanceDAG()
    dag.add_model("model", own, original)
    plan = ff.plan(dag, [ff.ForgetRequest("model", forget)], alpha=3.0)
    with same_everywhere(ff.ArgumentError, r"^alpha is \[1.0\] on rank 0 and \[2.0\] on rank 1"):
        plan.set_values_(alpha=1.0 + rank())
    with same_everywhere(ff.LayoutError, "^rank 1: .*no parameter of node 'model' matches 'nothing'"):
        plan.set_values_(alpha={"model": {"nothing" if rank() == 1 else "*.bias": 1.0, "*": 3.0}})
    assert plan.run_(dry_run=True)["model"].alpha == 3.0
    with same_everywhere(ff.ArgumentError, "^alpha is .* on rank 0 and .* on rank 1"):
        plan.set_values_(alpha={"model": alpha if rank() == 0 else dict(sorted(alpha.items()))})
    plan.set_values_(alpha={"model": alpha}, lam={"model": lam})
    found = plan.run_(undo=True)
    assert (found["model"].alpha, found["model"].lam, counts(found)) == (alpha, lam, counts(theirs))
    ff.dampen_(model, original, forget, alpha=alpha, lam=lam)
    assert_same_bits(own, model)
    found.undo_()
    assert_same_bits(own, net())
