"""What each rank of `spread_work.py` runs, at the same time as all others, and asserts; pytest does not import it.

A case takes the folder that the ranks share, and says on how many ranks it runs.
"""

from __future__ import annotations

import copy
import os
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spread_models import (
    ON_SQUARES,
    SHARDINGS,
    Net,
    assert_same_bits,
    counts,
    fishers,
    fsdp,
    net,
    square_mesh,
    tensor_parallel,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fiun_fast as ff

CASES: dict[str, tuple[Callable[[Path], None], tuple[int, ...]]] = {}
DTYPES = {  # of parameters and Fishers, by the number of ranks
    2: [
        (torch.float32, torch.float64),
        *((one, torch.float32) for one in (torch.float64, torch.bfloat16, torch.float16)),
    ],
    3: [(torch.float32, torch.float32), (torch.bfloat16, torch.float64)],
    4: [(torch.float32, torch.float32)],
}


def on(*worlds: int):
    def case(run):
        CASES[run.__name__] = run, worlds
        return run

    return case


def cases(world: int) -> dict[str, Callable[[Path], None]]:
    """Name -> case, the last one being the one in which a rank dies."""
    every = {name: run for name, (run, worlds) in CASES.items() if world in worlds}
    last = {name: every.pop(name) for name in ("a_rank_dies",) if name in every}
    return every | last


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


@contextmanager
def same_everywhere(error: type[Exception], message: str):
    """All ranks raise it, with the same words."""
    with pytest.raises(error, match=message) as caught:
        yield
    said = [None] * world()
    dist.all_gather_object(said, str(caught.value))
    assert len(set(said)) == 1, said


@contextmanager
def calls_counted():
    """How often what communicates is called: all of torch.distributed's functions that do, and the functional ones."""
    called: dict[str, int] = {}

    def counting(name, function):
        def count(*args, **kwargs):
            called[name] = called.get(name, 0) + 1
            return function(*args, **kwargs)

        return count

    names = [
        name
        for name in dir(dist)
        if re.match("(all_|reduce|broadcast|gather|scatter|barrier|send|recv|isend|irecv|batch_isend|monitored)", name)
    ]
    replaced = {n: counting(n, getattr(dist, n)) for n in names if callable(getattr(dist, n))}
    with mock.patch.multiple(dist, **replaced), CommDebugMode() as mode:
        yield called
    if mode.get_total_counts() > sum(called.values()):
        called["functional"] = mode.get_total_counts()


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


def assert_same_bits_after_resharding(model: nn.Module, expected: nn.Module) -> None:
    ff.Layout.from_module(model)
    assert_same_bits(model, expected)


@on(2)
def autograd_hears_of_a_run(folder: Path) -> None:
    model = tensor_parallel(net(hidden=12))
    original, forget = fishers(net(hidden=12))
    loss = model(torch.ones(2, 5)).square().sum()
    ff.dampen_(model, original, forget, alpha=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- errors ----------------------------------------------------------------------------------------------------------


@on(2, 3)
def an_error_on_one_rank_is_raised_on_all(folder: Path) -> None:
    model = fsdp(net())
    original, forget = fishers(net())
    bad = ff.Fisher(torch.ones(4), ff.Layout({"elsewhere": (4,)}))
    last = world() - 1
    here = rank() == last
    with same_everywhere(ff.LayoutError, rf"^rank {last}: node 'model': the forget Fisher .* elsewhere \[4\] only in"):
        ff.dampen_(model, original, bad if here else forget)
    with same_everywhere(ff.ArgumentError, rf"^rank {last}: original is a int, expected a fiun_fast.Fisher"):
        ff.dampen_(model, 3 if here else original, forget)
    with same_everywhere(
        ff.ArgumentError, rf"^alpha is 10.0 on rank 0 and 5.0 on rank {last}; all ranks need the same"
    ):
        ff.dampen_(model, original, forget, alpha=5.0 if here else 10.0)
    with same_everywhere(ff.ArgumentError, r"^lam is 1.0 on rank 0 and 0.5"):
        ff.dampen_(model, original, forget, lam=0.5 if here else 1)
    with same_everywhere(ff.ArgumentError, r"^alpha is that of forget_fraction=\[0.1\] on rank 0 and that of"):
        ff.dampen_(model, original, forget, alpha="auto", forget_fraction=0.5 if here else 0.1)
    with same_everywhere(ff.DTypeError, rf"^rank {last}: node 'model': its original Fisher is torch.float32"):
        ff.dampen_(model, original, forget.to(dtype=torch.float64) if here else forget)
    with same_everywhere(ff.LayoutError, r"^the layout of the original Fisher of 'model' is .* on rank 0 and"):
        part = ff.Layout.from_module(net(), "first.*")
        small = [ff.Fisher(torch.ones(part.numel), part) for _ in range(2)]
        ff.dampen_(model, *(small if here else (original, forget)))
    assert_same_bits(model, net())


@on(2)
def a_fisher_of_another_part_is_refused(folder: Path) -> None:
    model = fsdp(net())
    original, forget = fishers(net())
    mine = ff.Layout.from_module(model)
    shards = {s.name: ff.Shard(s.name, s.whole, tuple(at + 1 for at in s.shard.start)) for s in mine}
    other = ff.Layout({s.name: s.shape for s in mine}, shards)
    wrong = [ff.Fisher(torch.ones(other.numel), other)] * 2
    with same_everywhere(ff.LayoutError, r"the model has .* here; pass the whole Fisher, fisher.full\(\), of which"):
        ff.dampen_(model, *wrong)
    with same_everywhere(ff.LayoutError, r"(and the model has .* whole; pass the whole Fisher|shape .* in the model)"):
        ff.dampen_(tensor_parallel(net()), original.part(mine), forget.part(mine))
    whole_model = net()
    with pytest.raises(ff.LayoutError, match=r"fisher.full\(\)"):
        ff.dampen_(whole_model, original.part(mine), forget.part(mine))
    with pytest.raises(ff.LayoutError, match=r"one rank's part: ff.distributed.save"):
        original.part(mine).save(folder / "no")


@on(2)
def dtensors_that_are_no_blocks(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world(),))
    sums = {"w": DTensor.from_local(torch.ones(3), mesh, [Partial()])}
    fisher = ff.Fisher(torch.ones(3), ff.Layout({"w": (3,)}))
    with same_everywhere(ff.LayoutError, "^every rank: .*'w': a DTensor of partial sums .*; redistribute it first"):
        ff.dampen_(sums, fisher, fisher)
    with pytest.raises(ff.LayoutError, match="'w': a DTensor of partial sums"):
        ff.Layout.from_tensors(sums)


@on(2)
def together_raises_what_one_rank_has_met(folder: Path) -> None:
    ranks = ff.distributed.Ranks.of_group(dist.group.WORLD)
    with same_everywhere(ff.DistributedError, "^rank 1: KeyError: 'gone'$"), ff.distributed.together(ranks):
        if rank() == 1:
            raise KeyError("gone")
    with ff.distributed.together(ranks) as facts:
        facts.clear()
    with pytest.raises(ff.ArgumentError, match="group is 3, expected a torch.distributed process group"):
        ff.estimate_fisher(net(), data(0, 1), group=3)


@on(3)
def a_rank_dies(folder: Path) -> None:
    model = fsdp(net())
    original, forget = fishers(net())
    dist.barrier()
    if rank() == world() - 1:
        return  # and the process with it; the last case
    begun = time.monotonic()

    def until_it_is_noticed() -> None:
        while True:
            ff.dampen_(model, original, forget, dry_run=True)
            time.sleep(0.05)

    with pytest.raises(ff.DistributedError, match="another rank does not answer"):
        until_it_is_noticed()
    assert time.monotonic() - begun < 40


# ---- estimates -------------------------------------------------------------------------------------------------------


def data(seed: int, batches: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dice = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 5, generator=dice), torch.randint(3, (size,), generator=dice)) for _ in range(batches)]


@on(3)
def data_split_over_ranks(folder: Path) -> None:
    """As of one process over all of it, the same on every rank; rank 0 has no batch, batches have unlike sizes."""
    every = [batch for r in range(world()) for batch in data(r, r, 3 + r)]
    mine = data(rank(), rank(), 3 + rank())
    for estimator in ("batch", "sample", "expected", "label_free"):
        for params in (None, "second.*"):
            options = {"params": params, "estimator": estimator, "samples": 0}
            found = ff.estimate_fisher(net(), mine, group=dist.group.WORLD, **options)
            expected = ff.estimate_fisher(net(), every, **options)
            assert torch.allclose(found.buffer, expected.buffer, rtol=1e-5, atol=1e-9), (estimator, params)
            assert found.provenance == expected.provenance
            said = [None] * world()
            dist.all_gather_object(said, (found.sha256(), found.provenance, dict(found.provenance.how)))
            assert all(one == said[0] for one in said)
    wrapped = ff.estimate_fisher(DistributedDataParallel(net()), mine, group=dist.group.WORLD)
    assert torch.equal(wrapped.buffer, ff.estimate_fisher(net(), mine, group=dist.group.WORLD).buffer)
    both = ff.estimate_fishers({"a": net(), "b": Net(4)}, iter(mine), group=dist.group.WORLD)
    assert torch.allclose(both["a"].buffer, ff.estimate_fisher(net(), every).buffer, rtol=1e-5)


@on(2)
def an_error_in_one_ranks_loader(folder: Path) -> None:
    def loader():
        yield data(0, 1)[0]
        if rank() == 1:
            raise KeyError("gone")
        yield data(0, 1)[0]

    with same_everywhere(ff.DistributedError, "^rank 1: .*KeyError: 'gone'"):
        ff.estimate_fisher(net(), loader(), group=dist.group.WORLD)
    with same_everywhere(ff.DistributedError, "^rank 1: .*KeyError: 'gone'"):
        ff.estimate_fisher(fsdp(net()), loader())
    with same_everywhere(ff.EstimationError, "empty"):
        ff.estimate_fisher(net(), [], group=dist.group.WORLD)
    with same_everywhere(ff.ArgumentError, "^the estimator is "):
        ff.estimate_fisher(net(), data(0, 1), seed=rank(), group=dist.group.WORLD)
    with same_everywhere(ff.EstimationError, f"^rank {world() - 1}: batch 1: its part .* not finite"):
        batches = data(0, 2)
        if rank() == world() - 1:
            batches[1][0][0, 0] = torch.nan
        ff.estimate_fisher(net(), batches, group=dist.group.WORLD)


@on(2, 3)
def a_model_that_is_spread(folder: Path) -> None:
    """FSDP2: the square of the gradient that it has averaged over ranks, and the model as it was afterwards."""
    rounds = [data(10 * r, 3) for r in range(world())]
    model = fsdp(net())
    expected, steps = {}, 3
    for estimator, power in (("batch", 2), ("label_free", 1)):
        expected[estimator] = torch.zeros(sum(p.numel() for p in net().parameters()))
        for k in range(steps):
            alone = net().eval()
            for r in range(world()):
                x, y = rounds[r][k]
                z = alone(x)
                loss = cross_entropy(z, y) if power == 2 else z.square().sum(1).mean()
                (loss / world()).backward()
            expected[estimator] += torch.cat([p.grad.view(-1) for p in alone.parameters()]).abs() ** power / steps
        found = ff.estimate_fisher(model, rounds[rank()], estimator=estimator)
        assert found.layout == ff.Layout.from_module(model)
        assert "averaged over ranks by fully_shard" in found.provenance.how["cube"]
        assert torch.allclose(found.full().buffer, expected[estimator], rtol=1e-4, atol=1e-9)
        assert_same_bits(model, net())
        assert model.training
        assert all(p.grad is None for p in model.parameters())
    head = ff.estimate_fisher(model, rounds[rank()], "second.*").full()
    its = expected["batch"][ff.Layout.from_module(net()).slice("second.weight")]
    assert torch.allclose(head["second.weight"].flatten(), its, rtol=1e-4, atol=1e-9)
    x, y = rounds[rank()][0]
    accumulator = ff.FisherAccumulator(model)
    cross_entropy(model(x), y).backward()
    accumulator.update()
    once = ff.estimate_fisher(model, rounds[rank()][:1])
    assert torch.allclose(accumulator.result().buffer, once.buffer, rtol=1e-4, atol=1e-9)
    with pytest.raises(ff.LayoutError, match="spread over ranks are reduced first"), accumulator.streaming():
        pass
    for estimator in ("sample", "expected"):
        with same_everywhere(ff.EstimationError, f"^every rank: estimator '{estimator}' takes each sample's gradient"):
            ff.estimate_fisher(model, rounds[rank()], estimator=estimator)
        with same_everywhere(ff.EstimationError, "^every rank: batch 0: .*here: the outputs are not the layer"):
            ff.estimate_fisher(model, rounds[rank()], "second.*", estimator=estimator)
    with same_everywhere(ff.EstimationError, "^the next batch is .* all ranks need the same"):
        ff.estimate_fisher(model, rounds[rank()][: 3 - (rank() == 1)])


@on(2, 3)
def the_head_of_a_model_that_is_spread(folder: Path) -> None:
    """`sample` and `expected` over all ranks' samples: the forward meets the gathered layer, nothing is reduced."""
    every = [data(20 + r, 2) for r in range(world())]

    def made() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    model = made()
    fully_shard(model[0])
    for spread in (fully_shard(model), fully_shard(made())):  # the head belongs to the root in both
        for estimator in ("sample", "expected"):
            found = ff.estimate_fisher(spread, every[rank()], "last", estimator=estimator)
            alone = ff.estimate_fisher(made(), [one for its in every for one in its], "last", estimator=estimator)
            assert found.layout == ff.Layout.from_module(spread, "last")
            assert torch.allclose(found.full().buffer, alone.buffer, rtol=1e-4)
            assert found.provenance.samples == alone.provenance.samples
    with same_everywhere(ff.EstimationError, "here: the layer is cut up in its forward, too"):
        mesh = init_device_mesh("cpu", (world(),))
        cut = parallelize_module(made(), mesh, {"2": ColwiseParallel()})
        ff.estimate_fisher(cut, every[0], "last", estimator="sample")


@on(2)
def tensor_parallel_and_what_is_dampened_by_it(folder: Path) -> None:
    model, alone = tensor_parallel(net(hidden=12)), net(hidden=12)
    pairs = [(ff.estimate_fisher(one, data(k, 3)) for k in (0, 1)) for one in (model, alone)]
    (original, forget), expected = pairs[0], list(pairs[1])
    for found, own in zip((original, forget), expected, strict=True):
        assert torch.allclose(found.full().buffer, own.buffer, rtol=1e-3, atol=1e-8)
    report = ff.dampen_(model, original, forget, alpha=1.0)
    own = ff.dampen_(alone, original.full(), forget.full(), alpha=1.0)
    assert counts(report) == counts(own)
    assert_same_bits(model, alone)


@on(4)
def data_parallel_beside_tensor_parallel(folder: Path) -> None:
    """Each pair of ranks has a copy, cut in two, and data of its own; what one rank meets, all four raise."""
    mesh = square_mesh()
    model, alone = tensor_parallel(net(hidden=12), mesh["tp"]), net(hidden=12)
    pair = rank() // 2
    found = ff.estimate_fisher(model, data(pair, 1 + pair), group=mesh["dp"].get_group())
    expected = ff.estimate_fisher(alone, [*data(0, 1), *data(1, 2)])
    assert torch.allclose(found.full(mesh["tp"].get_group()).buffer, expected.buffer, rtol=1e-3, atol=1e-8)
    assert found.provenance.steps == 3

    def loader():
        yield data(0, 1)[0]
        if rank() == 3:
            raise KeyError("gone")

    with pytest.raises(ff.DistributedError, match="^rank 3: .*KeyError: 'gone'|rank 3: "):
        ff.estimate_fisher(model, loader(), group=mesh["dp"].get_group())


@on(2)
def parts_are_not_taken_for_the_whole(folder: Path) -> None:
    parts = [one.part(ff.Layout.from_module(fsdp(net()))) for one in fishers(net())]
    for ask in (
        lambda: ff.adaptive_alpha(*parts, forget_fraction=0.1),
        lambda: ff.selection_profile(*parts),
        lambda: ff.top_overlap(*parts),
    ):
        with pytest.raises(ff.LayoutError, match=r"one rank's parts: pass fisher.full\(\)"):
            ask()


# ---- choosing --------------------------------------------------------------------------------------------------------


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


# ---- a DAG over ranks ------------------------------------------------------------------------------------------------


def small(name: int, numel: int = 6) -> tuple[dict[str, torch.Tensor], ff.Fisher]:
    dice = torch.Generator().manual_seed(name)
    model = {"w": torch.randn(numel, generator=dice)}
    return model, ff.Fisher(torch.rand(numel, generator=dice), ff.Layout({"w": (numel,)}))


def forgotten(seed: int, numel: int = 6, signed: bool = False) -> tuple[ff.Fisher, ff.Gradient | None]:
    dice = torch.Generator().manual_seed(10**6 + seed)
    layout = ff.Layout({"w": (numel,)})
    fisher = ff.Fisher(torch.rand(numel, generator=dice) * 3, layout)
    return fisher, ff.Gradient(torch.randn(numel, generator=dice), layout) if signed else None


def random_dag(nodes: int, seed: int) -> list[list[int]]:
    dice = np.random.default_rng(seed)
    return [sorted({int(dice.integers(i)) for _ in range(dice.integers(3))}) if i else [] for i in range(nodes)]


@on(2, 3, 4)
def a_dag_over_ranks(folder: Path) -> None:
    for seed, signed in ((0, False), (1, True)):
        parents, origins = random_dag(60, seed), (0, 3, 3, 17, 59)
        alone = ff.InheritanceDAG()
        here = ff.distributed.InheritanceDAG()
        models = {}
        for i, above in enumerate(parents):
            model, original = small(i)
            alone.add_model(f"u{i}", model, original, parents=[f"u{p}" for p in above])
            models[i] = alone[f"u{i}"].model
        order = [i for i in range(60) if i % world() == rank() or i == 20]  # 20: a copy on every rank
        for i in reversed(order):  # children before their parents
            model, original = small(i)
            here.add_model(f"u{i}", model, original, parents=[f"u{p}" for p in parents[i]])
        requests = [ff.ForgetRequest(f"u{k}", *_request(n, signed)) for n, k in enumerate(origins)]
        mine = [one for n, one in enumerate(requests) if n % world() == rank()]
        ordered = [one for r in range(world()) for n, one in enumerate(requests) if n % world() == r]
        options = {"alpha": 1.2, "lam": 0.7, "merge": "mean" if signed else "max"}
        with calls_counted() as called:
            plan = ff.distributed.plan(here, mine, **options)
        needing = alone.reached_by(ordered)
        wanted = {
            (k, r)
            for name, its in needing.items()
            for k in its
            for r in range(world())
            if int(name[1:]) % world() == r or name == "u20"
        }
        journeys = [(k, r) for k, r in wanted if _holder(k, len(origins)) != r]
        times = 2 if signed else 1
        assert called.get("send", 0) == times * sum(_holder(k, len(origins)) == rank() for k, _ in journeys)
        assert called.get("recv", 0) == times * sum(r == rank() for _, r in journeys)
        with calls_counted() as running:
            report = plan.run_()
        assert running == {}
        with calls_counted() as reading:
            found = {node.name: (node.sources, node.alpha, *counts(node)) for node in report}
        assert reading == {"all_reduce": 1}
        expected = ff.plan(alone, ordered, **options).run_()
        assert found == {node.name: (node.sources, node.alpha, *counts(node)) for node in expected}
        assert (report.selected, report.numel) == (expected.selected, expected.numel)
        for i in order:
            assert torch.equal(here[f"u{i}"].model["w"], models[i]["w"]), i
        assert [one["weight"] for one in report.to_dict()["requests"]] == [one.weight for one in ordered]
        assert str(plan).startswith(f"{len(found)} nodes over {world()} ranks; here:\n")
    again = plan.run_(undo=True)
    changed = again.selected
    assert changed > 0
    again.undo_()
    for i in order:
        assert torch.equal(here[f"u{i}"].model["w"], models[i]["w"])


def _request(n: int, signed: bool) -> tuple[ff.Fisher, float, ff.Gradient | None]:
    fisher, gradient = forgotten(n, signed=signed)
    return fisher, 1.0 + n / 2, gradient


def _holder(k: int, requests: int) -> int:
    """The rank that has the k-th of all requests, which are counted rank by rank."""
    return [r for r in range(world()) for n in range(requests) if n % world() == r][k]


@on(2, 3)
def a_dag_with_models_that_are_spread(folder: Path) -> None:
    """Its root on one rank alone, a child over all, a grandchild on the last."""
    original, forget = fishers(net())
    alone = ff.InheritanceDAG()
    for name, above in (("root", []), ("child", ["root"]), ("grandchild", ["child"])):
        alone.add_model(name, net(), original, parents=above)
    expected = ff.plan(alone, [ff.ForgetRequest("root", forget)], alpha=2.0).run_()
    here = ff.distributed.InheritanceDAG()
    if rank() == 0:
        here.add_model("root", net(), original)
    here.add_model("child", fsdp(net()), original, parents=["root"])
    if rank() == world() - 1:
        here.add_model("grandchild", net(), original, parents=["child"])
    mine = [ff.ForgetRequest("root", forget)] if rank() == world() - 1 else []
    report = ff.distributed.plan(here, mine, alpha=2.0).run_()
    assert [(one.name, *counts(one)) for one in report] == [(one.name, *counts(one)) for one in expected]
    assert_same_bits(here["child"].model, alone["child"].model)
    if rank() == 0:
        assert_same_bits(here["root"].model, alone["root"].model)


@on(3)
def what_is_wrong_with_a_dag_over_ranks(folder: Path) -> None:
    def dag(parents=()):
        made = ff.distributed.InheritanceDAG()
        made.add_model(f"u{rank()}", *small(rank()), parents=parents)
        return made

    def planned(made, *requests, **options):
        return ff.distributed.plan(made, requests if rank() == 0 else (), **options)

    fisher, _ = forgotten(0)
    below = [f"u{rank() - 1}"] if rank() else []
    with same_everywhere(ff.DagError, r"request 0: unknown origin 'nobody': no rank holds it"):
        planned(dag(), ff.ForgetRequest("nobody", fisher))
    with same_everywhere(ff.DagError, r"node 'u0' inherits from 'nobody', which no rank holds"):
        planned(dag(["nobody"]), ff.ForgetRequest("u0", fisher))
    with same_everywhere(ff.DagError, r"the inheritance graph has a cycle: "):
        planned(dag([f"u{(rank() + 1) % world()}"]), ff.ForgetRequest("u0", fisher))
    with same_everywhere(ff.ArgumentError, "no forget requests on any rank"):
        planned(dag())
    with same_everywhere(ff.ArgumentError, r"^alpha is 2.0 on rank 0 and 3.0 on rank 1"):
        planned(dag(), ff.ForgetRequest("u0", fisher), alpha=2.0 + rank())
    made = dag(below)
    if rank() == 1:
        made[f"u{rank()}"].fisher = ff.Fisher(torch.ones(2), ff.Layout({"w": (2,)}))
    before = made[f"u{rank()}"].model["w"].clone()
    with same_everywhere(ff.LayoutError, r"^rank 1: node 'u1': the forget Fisher of request 0 .* does not fit"):
        planned(made, ff.ForgetRequest("u0", fisher))
    assert torch.equal(made[f"u{rank()}"].model["w"], before)
    with pytest.raises(ff.DagError, match="exists already"):
        made.add_model(f"u{rank()}", *small(rank()))


@on(4)
def ten_thousand_nodes(folder: Path) -> None:
    """Against whole columns of numbers: m is the largest F of all origins above a node."""
    nodes, numel, origins = 10_000, 4, (0, 7, 100)
    dice = torch.Generator().manual_seed(9)
    theta, original = torch.randn(nodes, numel, generator=dice), torch.rand(nodes, numel, generator=dice)
    forget = torch.rand(len(origins), numel, generator=dice) * 3
    parents = (np.arange(nodes) - 1) // 2
    reached = np.zeros((nodes, len(origins)), dtype=bool)
    for i in range(nodes):
        reached[i] = reached[parents[i]] if i else False
        reached[i] |= np.array(origins) == i
    mask = torch.from_numpy(reached)
    merged = torch.where(mask[:, :, None], forget, 0.0).amax(1)
    chosen = (merged > original * 2.0) & mask.any(1)[:, None]
    expected = torch.where(chosen, theta * torch.clamp(original / merged, max=1), theta)
    layout = ff.Layout({"w": (numel,)})
    mine = range(rank(), nodes, world())
    rows = theta[rank() :: world()].clone()
    dag = ff.distributed.InheritanceDAG()
    begun = time.monotonic()
    for i, row in zip(mine, rows, strict=True):
        dag.add_model(f"u{i}", {"w": row}, ff.Fisher(original[i], layout), parents=[f"u{parents[i]}"] if i else [])
    requests = [ff.ForgetRequest(f"u{k}", ff.Fisher(forget[n], layout)) for n, k in enumerate(origins)]
    plan = ff.distributed.plan(dag, [one for n, one in enumerate(requests) if n % 4 == rank()], alpha=2.0)
    report = plan.run_()
    assert torch.equal(rows, expected[rank() :: world()])
    assert report.selected == int(chosen.sum())
    assert report.numel == numel * int(mask.any(1).sum())
    assert time.monotonic() - begun < 60, "seconds, on a machine that has the time"


# ---- files -----------------------------------------------------------------------------------------------------------


@on(2, 3, 4)
def saved_by_some_ranks_and_loaded_by_others(folder: Path) -> None:
    original, _ = fishers(net())
    clean = ff.Fisher(original.buffer.nan_to_num(1.0), original.layout, ff.Provenance("batch", 3, 12, {"cube": "so"}))
    for name, spread in (("fsdp", fsdp), ("tp", tensor_parallel)):
        model = spread(net())
        layout = ff.Layout.from_module(model)
        ff.distributed.save(clean.part(layout), folder / f"{name}-{world()}")
        for other in range(2, world() + 1):
            for path in filter(Path.is_dir, (folder / f"{name}-{other}", folder / f"fsdp-{other}")):
                found = ff.distributed.load(path, model)
                assert found.layout == layout
                assert torch.equal(found.buffer, clean.part(layout).buffer)
                assert (found.provenance, found.provenance.how) == (clean.provenance, {"cube": "so"})
    whole_again = ff.distributed.load(folder / f"tp-{world()}", net())
    assert torch.equal(whole_again.buffer, clean.buffer)
    with same_everywhere(ff.ArgumentError, "is not a new or empty folder"):
        ff.distributed.save(clean, folder / f"tp-{world()}")
    with same_everywhere(ff.LayoutError, "another layout than expected"):
        ff.distributed.load(folder / f"tp-{world()}", nn.Linear(2, 2))
    with same_everywhere(ff.FisherFileError, "not a Fisher that ranks have saved"):
        ff.distributed.load(folder / "nowhere", net())
    damaged = folder / f"damaged-{world()}"
    ff.distributed.save(clean, damaged)
    if rank() == 0:
        for path in damaged.glob("*.distcp"):
            os.truncate(path, 10)
    dist.barrier()
    with pytest.raises(ff.FisherFileError, match="not read"):
        ff.distributed.load(damaged, net())


# ---- the page --------------------------------------------------------------------------------------------------------


@on(2)
def every_example_of_the_page_runs(folder: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    text = page.read_text(encoding="utf-8")
    found = list(re.finditer(r"^```python3\n((?:.*\n)*?)```", text, re.MULTILINE))
    assert len(found) >= 4
    names: dict = {"__name__": "__main__"}
    (folder / "page").mkdir(exist_ok=True)
    os.chdir(folder / "page")
    for match in found:
        block = "\n" * text[: match.start(1)].count("\n") + match[1]
        exec(compile(block, str(page), "exec"), names)
