"""The bits of one process, and what ranks say to one another meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from spread_cases import CASES, assert_same_bits_after_resharding, calls_counted, data, on, rank, world
from spread_models import (
    ON_SQUARES,
    SHARDINGS,
    Net,
    assert_same_bits,
    counts,
    fishers,
    fsdp,
    net,
    tensor_parallel,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import fiun_fast as ff

DTYPES = {  # of parameters and Fishers, by the number of ranks
    2: [
        (torch.float32, torch.float64),
        *((one, torch.float32) for one in (torch.float64, torch.bfloat16, torch.float16)),
    ],
    3: [(torch.float32, torch.float32), (torch.bfloat16, torch.float64)],
    4: [(torch.float32, torch.float32)],
}


# ---- bits ------------------------------------------------------------------------------------------------------------


def bits(spread: Callable[[Net], Net], folder: Path) -> None:
    """Dampened as one process does it, to the bit, for every dtype; and all that counts is the same on every rank."""
    for dtype, numbers in DTYPES[world()]:
        model = net(dtype)
        original, *forget = fishers(model, numbers, seed=len(str(dtype)), count=3)
        own = spread(copy.deepcopy(model))
        expected = ff.dampen_(model, original, forget, alpha=1.5, lam=0.5)
        found = ff.dampen_(own, original, forget, alpha=1.5, lam=0.5)
        assert counts(found) == counts(expected)
        assert found.selected > 0
        assert_same_bits(own, model)
    if world() == 2 or spread is fsdp or spread in ON_SQUARES.values():
        parts(spread)


def parts(spread: Callable[[Net], Net]) -> None:
    """Fishers that are spread alike; undo, audit, profile, percentiles, alpha="auto", gradients."""
    model = net()
    original, forget = fishers(model)
    own = spread(copy.deepcopy(model))
    before = copy.deepcopy(model)
    layout = ff.Layout.from_module(own)
    assert layout.unsharded() == original.layout
    local = [one.part(layout) for one in (original, forget)]
    for vector, back in zip((original, forget), local, strict=True):
        assert torch.equal(
            back.full().buffer.view(torch.int32) & 0x7F800000, vector.buffer.view(torch.int32) & 0x7F800000
        )
        assert torch.equal(back.full().buffer.nan_to_num(-1), vector.buffer.nan_to_num(-1))
    expected = ff.dampen_(model, original, forget, alpha=2.0, audit=True)
    found = ff.dampen_(own, *local, alpha=2.0, undo=True, audit=True)
    assert counts(found) == counts(expected)
    for one, other in zip(found["model"].parameters, expected["model"].parameters, strict=True):
        assert (one.name, one.shape, one.dtype, *counts(one)) == (other.name, other.shape, other.dtype, *counts(other))
        assert one.change == pytest.approx(other.change, rel=1e-6, nan_ok=True)
    assert_same_bits(own, model)
    found.undo_()
    assert_same_bits(own, before)

    some = ff.Layout.from_module(before, ["first.weight", "one.weight"])
    few = ff.Fisher(torch.rand(some.numel, generator=torch.Generator().manual_seed(4)) * 9, some)
    options = {"on_mismatch": "skip", "audit": True, "dry_run": True}
    skipping, theirs = (ff.dampen_(one, original, few, **options)["model"] for one in (own, before))
    assert (skipping.skipped, counts(skipping)) == (theirs.skipped, counts(theirs))
    assert [p.name for p in skipping.parameters] == [p.name for p in theirs.parameters]

    profile = ff.selection_profile(*local, own)
    theirs = ff.selection_profile(original, forget, before)
    assert np.array_equal(profile.counts, theirs.counts)
    assert (profile.numel, profile.always, profile.never) == (theirs.numel, theirs.always, theirs.never)
    assert np.allclose(profile.squares, theirs.squares)
    options = {"alpha": "auto", "forget_fraction": 0.1, "dry_run": True}
    assert (
        ff.dampen_(own, original, forget, **options)["model"].alpha
        == ff.dampen_(before, original, forget, **options)["model"].alpha
        == ff.adaptive_alpha(original, forget, forget_fraction=0.1)
    )
    gradient = ff.Gradient(torch.randn(original.numel, generator=torch.Generator().manual_seed(1)), original.layout)
    expected = ff.dampen_(before, original, forget, gradient=gradient, alpha=2.0)
    assert counts(ff.dampen_(own, original, forget, gradient=gradient, alpha=2.0)) == counts(expected)
    assert_same_bits(own, before)


for _name, _spread in SHARDINGS.items():
    CASES[f"bits: {_name}"] = partial(bits, _spread), (2, 3, 4)
for _name, _spread in ON_SQUARES.items():
    CASES[f"bits: {_name}"] = partial(bits, _spread), (4,)


@on(3)
def ranks_with_nothing(folder: Path) -> None:
    """One row over three ranks: two of them take part in all of it and have no element."""
    model, alone = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    alone.load_state_dict(model.state_dict())
    own = fully_shard(copy.deepcopy(alone))
    assert ff.Layout.from_module(own).numel == (4 if rank() == 0 else 0)
    batches = [(torch.ones(2, 4) * (rank() + 1), torch.zeros(2, dtype=torch.int64))]
    options = {"loss_fn": lambda z, _: z.square().mean()}
    original = ff.estimate_fisher(own, batches, **options)
    forget = ff.Fisher(torch.ones(4) * 1e9, ff.Layout.from_module(alone))
    expected = ff.dampen_(alone, original.full(), forget, alpha=1.0, audit=True)
    found = ff.dampen_(own, original, forget, alpha=1.0, audit=True, undo=True)
    assert counts(found) == counts(expected)
    assert found.selected == 4
    assert_same_bits(own, alone)
    assert str(found["model"]) == str(expected["model"])
    found.undo_()
    profile = ff.selection_profile(original, forget.part(original.layout), own)
    assert profile.numel == 4
    assert ff.dampen_(own, original, forget, alpha="auto", forget_fraction=0.5, dry_run=True).numel == 4
    ff.distributed.save(original, folder / "nothing")
    assert torch.equal(ff.distributed.load(folder / "nothing", own).buffer, original.buffer)


@on(2)
def a_dict_of_dtensors_and_an_adamw(folder: Path) -> None:
    model = fsdp(net())
    state = dict(model.named_parameters())
    original, forget = fishers(net())
    expected = net()
    ff.dampen_(expected, original, forget, alpha=2.0)
    ff.dampen_(state, original, forget, alpha=2.0)
    assert_same_bits(model, expected)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    x, y = data(0, 1)[0]
    cross_entropy(model(x), y).backward()
    moments = [p.grad.full_tensor().square() for p in model.parameters()]
    optimizer.step()
    fisher = ff.Fisher.from_optimizer(optimizer, model).full()
    assert torch.allclose(fisher.buffer, torch.cat([m.view(-1) for m in moments]), rtol=1e-4)


# ---- communication ---------------------------------------------------------------------------------------------------


@on(2)
def a_run_talks_to_nobody_and_a_report_adds_up_once(folder: Path) -> None:
    model = fsdp(net())
    dag = ff.InheritanceDAG()
    original, forget = fishers(net())
    dag.add_model("m", model, original)
    with calls_counted() as planning:
        plan = ff.plan(dag, [ff.ForgetRequest("m", forget)], alpha=2.0)
    assert planning == {"all_gather": 1}
    for dry_run in (True, False):
        with calls_counted() as running:
            report = plan.run_(dry_run=dry_run)
        assert running == {}
        with calls_counted() as reading:
            assert report.selected > 0
            assert report["m"].numel == original.numel
            str(report)
        assert reading == {"all_reduce": 1}
    with calls_counted() as undoing:
        plan.run_(undo=True).undo_()
    assert undoing == {"all_gather": 1}


@on(2, 3)
def what_a_forward_leaves_gathered_is_sharded_again(folder: Path) -> None:
    model, expected = fsdp(net()), net()
    original, forget = fishers(expected)
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, original)
    plan = ff.plan(dag, [ff.ForgetRequest("m", forget)], alpha=2.0)
    x = torch.ones(2, 5)
    with torch.no_grad():
        model(x)
    report = plan.run_(undo=True)
    ff.dampen_(expected, original, forget, alpha=2.0)
    with torch.no_grad():
        assert torch.allclose(model(x), expected(x))
    report.undo_()
    with torch.no_grad():
        assert torch.allclose(model(x), net()(x))
    assert_same_bits(fsdp(net()), net())
    original.buffer.mul_(0.5)  # parts of it are copies
    twice = net()
    ff.dampen_(twice, original, forget, alpha=2.0)
    plan.run_()
    assert_same_bits_after_resharding(model, twice)


@on(2)
def autograd_hears_of_a_run(folder: Path) -> None:
    model = tensor_parallel(net(hidden=12))
    original, forget = fishers(net(hidden=12))
    loss = model(torch.ones(2, 5)).square().sum()
    ff.dampen_(model, original, forget, alpha=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
