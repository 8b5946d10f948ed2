"""The work table: what a plan hands to a backend. Tensors and addresses only; no modules, no DAG.

A *group* is a set of nodes that share their forget Fishers and their layout. The parameters of a group are its
segments; neighbours that lie next to each other in the memory of every tensor concerned coalesce into *rows*. The
rows are what a kernel walks: it merges the K forget Fishers of a row once and applies the result to N targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

MERGES = ("max", "mean", "sum")
BINS = 2048  # of a histogram; csrc/element.h says the same


@dataclass(frozen=True)
class Group:
    """Nodes with the same sources and the same segments: N nodes, K sources, S segments (parameters).

    The reference backend works on this, parameter by parameter; the others on the rows packed from it.
    """

    numels: np.ndarray  # [S] int64, elements of each segment
    forgets: list[torch.Tensor]  # [K] flat forget Fishers
    forget_offsets: np.ndarray  # [K, S] int64, where a segment starts in each of them, in elements
    weights: tuple[float, ...]  # [K]
    originals: list[torch.Tensor]  # [N] flat original Fishers
    original_offsets: np.ndarray  # [S] int64
    thetas: list[list[torch.Tensor]]  # [N][S] parameters, contiguous
    theta_addresses: np.ndarray  # [N, S] int64
    slots: np.ndarray  # [N] int64, index of each node in alpha, lam and counts


@dataclass(frozen=True)
class DampenTable:
    """All that one dampening launch needs: one device, one parameter dtype, one Fisher dtype.

    Addresses are int64 and stay valid while `groups` keeps their tensors alive.
    """

    device: torch.device
    theta_dtype: torch.dtype  # float32, float64, bfloat16 or float16
    fisher_dtype: torch.dtype  # float32 or float64
    merge: str  # one of MERGES
    scale: float
    exponent: float
    cap: float
    groups: list[Group]
    rows: np.ndarray  # [R, 5] int64: length in elements, first source, K, first target, N
    sources: np.ndarray  # [sum K] int64: address of each forget Fisher at the start of the row
    weights: np.ndarray  # [sum K] float64: w_k of each source
    targets: np.ndarray  # [sum N, 3] int64: address of theta, address of I, slot
    alpha: np.ndarray  # [slots] float64; it and the next may be written to between launches
    lam: np.ndarray  # [slots] float64
    counts: torch.Tensor  # [slots, 3] int64 on `device`: selected, zeroed, nonfinite; overwritten by each launch

    def limits(self, number: np.dtype | type[np.generic]) -> np.ndarray:
        """Alpha and lambda of each target, [sum N, 2], in the Fishers' dtype."""
        slots = self.targets[:, 2]
        return np.stack([self.alpha[slots], self.lam[slots]], axis=1).astype(number)


class Launch:
    """A prepared dampening whose device keeps a copy of alpha and lambda."""

    def __init__(self, run: Callable[[bool], None], refresh: Callable[[], None]) -> None:
        self._run = run
        self.refresh = refresh  # to be called after table.alpha or table.lam was written to

    def __call__(self, dry_run: bool = False) -> None:
        """Dampen every node of the table, or only count."""
        self._run(dry_run)


def pack_rows(groups: list[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Coalesce each group's segments into rows and write the address tables.

    Returns:
        rows [R, 5], sources [sum K], weights [sum K], targets [sum N, 3] as in `DampenTable`.

    """
    rows, sources, weights, targets = [], [], [], []
    first_source = first_target = 0
    for group in groups:
        fisher_size, theta_size = group.forgets[0].element_size(), group.thetas[0][0].element_size()
        forget = np.array([[f.data_ptr()] for f in group.forgets]) + group.forget_offsets * fisher_size  # [K, S]
        original = np.array([[f.data_ptr()] for f in group.originals]) + group.original_offsets * fisher_size  # [N, S]
        theta = group.theta_addresses  # [N, S]

        joined = np.ones(len(group.numels) - 1, dtype=bool)  # does segment j + 1 follow segment j everywhere?
        for address, size in ((forget, fisher_size), (original, fisher_size), (theta, theta_size)):
            joined &= (address[:, 1:] == address[:, :-1] + group.numels[:-1] * size).all(axis=0)
        starts = np.flatnonzero(np.concatenate(([True], ~joined)))  # [R_g] first segment of each row
        k, n, r = len(group.forgets), len(group.originals), len(starts)

        row = np.empty((r, 5), dtype=np.int64)
        row[:, 0] = np.add.reduceat(group.numels, starts)
        row[:, 1] = first_source + k * np.arange(r)
        row[:, 2] = k
        row[:, 3] = first_target + n * np.arange(r)
        row[:, 4] = n
        rows.append(row)
        sources.append(forget[:, starts].T.reshape(-1))
        weights.append(np.tile(np.asarray(group.weights, dtype=np.float64), r))
        target = np.empty((r, n, 3), dtype=np.int64)
        target[:, :, 0] = theta[:, starts].T
        target[:, :, 1] = original[:, starts].T
        target[:, :, 2] = group.slots
        targets.append(target.reshape(-1, 3))
        first_source += k * r
        first_target += n * r
    return np.concatenate(rows), np.concatenate(sources), np.concatenate(weights), np.concatenate(targets)


def cut_runs(slots: np.ndarray, workers: int) -> np.ndarray:
    """Cut tiles that are in the order of their slots [T] into runs, each of one slot, about as many as workers.

    Returns:
        [runs + 1] int64: the first tile of each run, and the end.

    """
    if not len(slots):
        return np.zeros(1, dtype=np.int64)
    firsts = np.flatnonzero(np.diff(slots, prepend=slots[0] - 1))  # of each slot
    counts = np.diff(firsts, append=len(slots))
    parts = -(-counts // max(1, -(-len(slots) // workers)))
    part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = np.repeat(firsts, parts) + part * np.repeat(counts, parts) // np.repeat(parts, parts)
    return np.append(starts, len(slots)).astype(np.int64)
