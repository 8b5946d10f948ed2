"""Models for the ranks of `spread_work.py`, and the ways in which they are spread; each beside the whole one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fiun_fast as ff


class Net(nn.Module):
    """7 rows over 2, 3 or 4 ranks are uneven, 1 row leaves ranks with nothing; a shape of three dimensions."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(5, hidden)
        self.second = nn.Linear(hidden, 3)
        self.one = nn.Linear(3, 1, bias=False)
        self.cube = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x):
        z = self.second(torch.tanh(self.first(x)))
        return z + self.one(z) * self.cube.sum()


def net(dtype: torch.dtype = torch.float32, hidden: int = 7) -> Net:
    torch.manual_seed(5)
    return Net(hidden).to(dtype)


def world() -> int:
    return dist.get_world_size()


def plain_mesh():
    return init_device_mesh("cpu", (world(),), mesh_dim_names=("tp",))


def square_mesh():
    return init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("dp", "tp"))


def fsdp(model: Net, **options) -> Net:
    for layer in (model.first, model.second):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def by_columns(model: Net) -> Net:
    """FSDP2 by dimension 1 where it can: there it wants even shards."""

    def dimension(p: nn.Parameter) -> Shard | None:
        return Shard(1) if p.dim() == 2 and p.shape[1] % world() == 0 else None

    return fsdp(model, shard_placement_fn=dimension)


def tensor_parallel(model: Net, mesh=None) -> Net:
    """Columns and rows; cube, one and the bias of second stay whole, on every rank."""
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return parallelize_module(model, plain_mesh() if mesh is None else mesh, plan)


def placed(*placements, mesh=None) -> Callable[[Net], Net]:
    """Every parameter a DTensor with these placements, as far as it has the dimensions."""

    def spread(model: Net) -> Net:
        over = plain_mesh() if mesh is None else mesh()
        for module in model.modules():
            for key, p in list(module.named_parameters(recurse=False)):
                fitting = [one if getattr(one, "dim", 0) < p.dim() else Replicate() for one in placements]
                module._parameters[key] = nn.Parameter(distribute_tensor(p.detach(), over, fitting))
        return model

    return spread


def over_both(model: Net) -> Net:
    mesh = square_mesh()
    return fsdp(tensor_parallel(model, mesh["tp"]), mesh=mesh["dp"])


SHARDINGS: dict[str, Callable[[Net], Net]] = {
    "fsdp": fsdp,
    "fsdp, reduced precision": lambda model: fsdp(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "fsdp, on the CPU": lambda model: fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp by columns": by_columns,
    "tensor parallel": tensor_parallel,
    "replicas": placed(Replicate()),
    "by dimension 1": placed(Shard(1)),
    "by dimension 2": placed(Shard(2)),
}
ON_SQUARES: dict[str, Callable[[Net], Net]] = {  # of 2 x 2 ranks
    "fsdp over tensor parallel": over_both,
    "fsdp with replicas": lambda model: fsdp(model, mesh=square_mesh()),
    "both dimensions": placed(Shard(0), Shard(1), mesh=square_mesh),
    "one dimension twice": placed(Shard(0), Shard(0), mesh=square_mesh),
    "a part of the mesh": placed(Shard(0), mesh=lambda: square_mesh()["tp"]),
}


def fishers(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 0, count: int = 2) -> list[ff.Fisher]:
    """An original Fisher and forget Fishers of the whole model, with all edges: zeros, infinities, NaN."""
    layout = ff.Layout.from_module(model)
    dice = torch.Generator().manual_seed(seed)
    found = []
    for k in range(count):
        numbers = torch.rand(layout.numel, dtype=dtype, generator=dice) * (1 if k == 0 else 9)
        for i, edge in enumerate((0.0, torch.inf, torch.nan)):
            numbers[torch.randint(layout.numel, (2 + i,), generator=dice)] = edge
        found.append(ff.Fisher(numbers, layout))
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_same_bits(spread: nn.Module, model: nn.Module) -> None:
    for (name, p), own in zip(spread.named_parameters(), model.parameters(), strict=True):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[own.element_size()]
        assert torch.equal(whole(p).contiguous().view(-1).view(bits), own.detach().view(-1).view(bits)), name


def counts(node) -> tuple:
    return node.numel, node.selected, node.zeroed, node.nonfinite
