"""Work tables over random tensors, packed without a DAG or a plan: what a backend is handed, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cases import EDGES

from fiun_fast.kernels.table import BINS, Dampening, Group, Merging, Table

WEIGHTS = (1.0, 0.5, 3.0, 1.0)


@dataclass
class Work:
    """A table of groups that are given as (nodes, K, sizes of the segments); `nodes` are indices in the counts."""

    table: Table
    nodes: int  # of the whole plan, which may have more than this table

    def counts(self) -> torch.Tensor:
        """Zeros, one line for each node of the plan."""
        return torch.zeros(self.nodes, 3, dtype=torch.int64, device=self.table.device)

    def bins(self) -> torch.Tensor:
        """Zeros, a histogram for each node of the plan."""
        return torch.zeros(self.nodes, BINS, dtype=torch.int64, device=self.table.device)

    def dampening(self, alpha: float = 1.5, lam: float = 0.7, exponent: float = 1.0, cap: float = 1.0) -> Dampening:
        """The same numbers for all nodes."""
        return Dampening(np.full(self.nodes, alpha), np.full(self.nodes, lam), exponent, cap)

    def thetas(self) -> list[torch.Tensor]:
        """All parameters of the table."""
        return [tensor for group in self.table.groups for node in group.thetas or () for tensor in node]

    def numels(self) -> torch.Tensor:
        """Elements of each node of the plan in this table, [nodes]."""
        found = torch.zeros(self.nodes, dtype=torch.int64)
        for group in self.table.groups:
            found[torch.from_numpy(group.nodes)] += int(group.numels.sum())
        return found


def work(
    groups: Sequence[tuple[Sequence[int], int, Sequence[int]]],
    nodes: int,
    *,
    theta: torch.dtype | None = torch.float32,
    fisher: torch.dtype = torch.float32,
    edges: bool = True,
    signed: bool = False,
    shift: int = 0,
    device: str = "cpu",
    seed: int = 0,
) -> Work:
    """Fresh values; parameters and Fishers lie `shift` elements off the alignment of their storage."""
    generator = torch.Generator().manual_seed(seed)

    def values(n: int, dtype: torch.dtype) -> torch.Tensor:
        found = torch.rand(n + shift, dtype=torch.float64, generator=generator).square().square()
        if edges:
            edge = torch.tensor(EDGES, dtype=found.dtype)[torch.randint(len(EDGES), found.shape, generator=generator)]
            found = torch.where(torch.rand(found.shape, generator=generator) < 0.4, edge, found)
        return found.to(device, dtype)[shift:]

    def either_sign(values: torch.Tensor) -> torch.Tensor:
        negative = torch.rand(values.shape, generator=generator) < 0.5
        return values.copy_(torch.where(negative.to(device), -values, values))

    def group(its_nodes: Sequence[int], k: int, sizes: Sequence[int]) -> Group:
        numels = np.array(sizes, dtype=np.int64)
        offsets = np.cumsum(numels) - numels
        total = int(numels.sum())
        forgets, originals = ([values(total, fisher) for _ in range(count)] for count in (k, len(its_nodes)))
        thetas, addresses = None, None
        if theta is not None:
            thetas = [[values(n, theta) for _ in its_nodes] for n in sizes]
            addresses = np.array([[tensor.data_ptr() for tensor in column] for column in thetas]).T.copy()
        names = tuple(f"p{s}" for s in range(len(sizes)))
        places = np.tile(offsets, (k, 1))
        its = np.array(its_nodes, dtype=np.int64)
        gradients = [either_sign(values(total, fisher)) for _ in range(k)] if signed else None
        if signed and thetas is not None:
            for tensor in (tensor for column in thetas for tensor in column):
                either_sign(tensor)
        of_nodes = (originals, offsets, its, thetas, addresses)
        return Group(names, numels, forgets, places, WEIGHTS[:k], *of_nodes, gradients)

    table = Table.pack(torch.device(device), theta, fisher, [group(*each) for each in groups])
    return Work(table, nodes)


def dampened(backend, work: Work, merging: Merging, dampening: Dampening) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Counts and parameters after a run; the parameters are put back as they were."""
    before, counts = [tensor.clone() for tensor in work.thetas()], work.counts()
    backend.dampen(work.table, merging, dampening).run(counts)
    after = [tensor.clone() for tensor in work.thetas()]
    for tensor, value in zip(work.thetas(), before, strict=True):
        tensor.copy_(value)
    return counts, after


def make_ordinary(work: Work, seed: int = 0) -> Work:
    """Fill a table with what the quick ways of the GPU kernels take: nothing tiny, large or not finite, either zero.

    Parameters are of any bits: half of them random bits, half numbers that dampening can bring to 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    for group in work.table.groups:
        for tensor in (*group.forgets, *group.originals):
            values = torch.exp2(drawn(tensor.numel()) * 12 - 6)
            far = torch.exp2(drawn(tensor.numel()) * 90 - 86)
            values = torch.where(drawn(tensor.numel()) < 0.3, far, values)
            sign = torch.where(drawn(tensor.numel()) < 0.5, -1.0, 1.0)
            tensor.copy_(torch.where(drawn(tensor.numel()) < 0.2, sign * 0.0, values))
        for tensor in (tensor for column in group.thetas or () for tensor in column):
            raw = torch.randint(256, (tensor.numel() * tensor.itemsize,), generator=generator, dtype=torch.uint8)
            least = torch.finfo(tensor.dtype).smallest_normal * torch.finfo(tensor.dtype).eps
            small = ((drawn(tensor.numel()) * 64 - 32).round() * least).to(tensor.dtype)
            tensor.copy_(torch.where(drawn(tensor.numel()) < 0.5, raw.view(tensor.dtype), small))
    return work
