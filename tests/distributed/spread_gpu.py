"""Two ranks over NCCL, each with a GPU of its own; run by test_spread.py where there are two."""

from __future__ import annotations

import copy
import os
import sys

import torch
import torch.distributed as dist
from spread_models import assert_same_bits, counts, fishers, fsdp, net
from torch import multiprocessing

import fiun_fast as ff


def work(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = net().cuda()
    original, forget = (one.to("cuda") for one in fishers(net()))
    own = fsdp(copy.deepcopy(model))
    expected = ff.dampen_(model, original, forget, alpha=2.0)
    found = ff.dampen_(own, original, forget, alpha=2.0, undo=True)
    assert counts(found) == counts(expected)
    assert_same_bits(own, model)
    found.undo_()
    assert_same_bits(own, net().cuda())
    dag = ff.distributed.InheritanceDAG()
    dag.add_model(f"u{rank}", net().cuda(), original, parents=["u0"] if rank else [])
    report = ff.distributed.plan(dag, [] if rank else [ff.ForgetRequest("u0", forget)], alpha=2.0).run_()
    assert [counts(node) for node in report] == [counts(expected)] * 2
    os.write(1, f"{rank}:well\n".encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
