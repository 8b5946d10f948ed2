"""Fishers over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spread_cases import data, on, rank, same_everywhere, world
from spread_models import (
    Net,
    assert_same_bits,
    counts,
    fishers,
    fsdp,
    net,
    square_mesh,
    tensor_parallel,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fiun_fast as ff


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
