"""Two processes over gloo, run by tests/estimators/test_wrapped.py: models that are wrapped for several ranks.

Started alone, it forks before any thread is there; each rank prints "0:well" or "1:well" at its end.
"""

from __future__ import annotations

import copy
import os
import re
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

ESTIMATORS = ("batch", "sample", "expected", "label_free")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def refused(run, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        run()


def reduced_gradients(model: nn.Module, batch: tuple) -> list[torch.Tensor]:
    """The gradients of a step, flat, as each rank has them."""
    model.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    own = torch.cat([p.grad.view(-1) for p in model.parameters()])
    found = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(found, own)
    return found


def distributed_data_parallel(rank: int) -> None:
    """A rank's own data, whatever the scope and the number of batches; training goes on as before."""
    dice = torch.Generator().manual_seed(rank)
    batches = [(torch.randn(4, 6, generator=dice), torch.randint(3, (4,), generator=dice)) for _ in range(2 + rank)]
    model = DistributedDataParallel(net())
    part = nn.Sequential(DistributedDataParallel(net()[:3]), net()[3:])
    for estimator in ESTIMATORS:
        for params in (None, "last", "0.*", "module.3.weight"):
            own = ff.estimate_fisher(net(), batches, params, estimator=estimator)
            fisher = ff.estimate_fisher(model, batches, params, estimator=estimator)
            assert fisher.layout == own.layout
            assert torch.equal(fisher.buffer, own.buffer), (estimator, params)
            assert "looked through DistributedDataParallel" in str(fisher.provenance)
        alone = ff.estimate_fisher(nn.Sequential(net()[:3], net()[3:]), batches, estimator=estimator)
        inside = ff.estimate_fisher(part, batches, estimator=estimator)
        assert inside.layout == alone.layout
        assert torch.allclose(inside.buffer, alone.buffer, rtol=1e-5), estimator
    model(batches[0][0])  # and no backward: the reducer would take the estimate's for it
    refused(lambda: ff.estimate_fisher(model, batches[:2]), ff.EstimationError, "of an earlier forward")
    with torch.no_grad():
        model.eval()(batches[0][0])
    model.train()
    own = ff.estimate_fisher(copy.deepcopy(model.module), batches)
    assert torch.equal(ff.estimate_fisher(model, batches).buffer, own.buffer)
    mine, theirs = reduced_gradients(model, batches[0])
    assert torch.equal(mine, theirs)
    accumulator = ff.FisherAccumulator(model)  # in a loop of one's own gradients are those that DDP has reduced
    accumulator.update()
    assert torch.equal(accumulator.result().buffer, mine.square())


def fully_sharded(use_orig_params: bool) -> None:
    """FSDP1 is refused by name, and dampened while its parameters are gathered."""
    batches = [(torch.randn(4, 6), torch.randint(3, (4,)))]
    torch.manual_seed(1)
    layout = ff.Layout.from_module(net())
    original, forget = (ff.Fisher(torch.rand(layout.numel) * scale, layout) for scale in (1.0, 9.0))
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    ways = {
        "layout": lambda: ff.Layout.from_module(model),
        "last": lambda: ff.last_layer(model),
        "accumulate": lambda: ff.FisherAccumulator(model),
        "dampen": lambda: ff.dampen_(model, original, forget),
        "drop-in": lambda: ParameterPerturber(model).modify_weight(original, forget),
    }
    for_good = {
        "estimate": lambda: ff.estimate_fisher(model, batches),
        "flatten": lambda: ff.flatten_(model),
        "stack": lambda: ff.stack_([model]),
        "importance": lambda: ParameterPerturber(model).calc_importance(batches),
    }
    for run in (*ways.values(), *for_good.values()):
        refused(run, ff.LayoutError, "is a FullyShardedDataParallel (FSDP1)")
    expected = net()
    ff.dampen_(expected, original, forget, alpha=2.0)
    with FullyShardedDataParallel.summon_full_params(model):
        for run in for_good.values():
            refused(run, ff.LayoutError, "pass the model before it is wrapped")
        assert ff.Layout.from_module(model) == layout
        assert ff.dampen_(model, original, forget, alpha=2.0).selected > 0
    with FullyShardedDataParallel.summon_full_params(model):
        assert all(map(torch.equal, model.parameters(), expected.parameters()))
    nested = nn.Sequential(copy.deepcopy(net()), model)
    refused(lambda: ff.estimate_fisher(nested, batches), ff.LayoutError, "submodule '1' of model is a FullyShardedData")


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    distributed_data_parallel(rank)
    for use_orig_params in (True, False):
        fully_sharded(use_orig_params)
    os.write(1, f"{rank}:well\n".encode())  # at once: the ranks share it
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        work(int(child == 0), f"{folder}/store")
        if child == 0:
            os._exit(0)
        _, status = os.waitpid(child, 0)
    raise SystemExit(os.waitstatus_to_exitcode(status))
