"""What is wrong on one rank is raised on all."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spread_cases import data, on, rank, same_everywhere, world
from spread_models import (
    assert_same_bits,
    fishers,
    fsdp,
    net,
    tensor_parallel,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import fiun_fast as ff


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
