"""What a launch works on, and what it does there: two objects. Tensors and addresses only; no modules, no DAG.

A *group* is a set of nodes that share their forget Fishers and their layout. The parameters of a group are its
segments; neighbours that lie next to each other in the memory of every tensor concerned coalesce into *rows*. The
rows are what a kernel walks: it merges the K forget Fishers of a row once and applies the result to N targets.

`Table` says what meets what. `Merging` and `Dampening` say what is done to it; a histogram of ratios needs the first
two only, and no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import MergeRule

BINS = 2048  # of a histogram; csrc/element.h has the same number


@dataclass(frozen=True)
class Group:
    """Nodes with the same sources and the same segments: N nodes, K sources, S segments (parameters).

    The reference backend works on this, parameter by parameter; the others on the rows packed from it.
    """

    names: tuple[str, ...]  # [S] parameters
    numels: np.ndarray  # [S] int64, elements of each segment
    forgets: list[torch.Tensor]  # [K] flat forget Fishers
    forget_offsets: np.ndarray  # [K, S] int64, where a segment starts in each of them, in elements
    weights: tuple[float, ...]  # [K]
    originals: list[torch.Tensor]  # [N] flat original Fishers
    original_offsets: np.ndarray  # [S] int64
    nodes: np.ndarray  # [N] int64, index of each node in alpha, lam and counts: the slot of these parameters of it
    thetas: list[list[torch.Tensor]] | None = None  # [S][N] parameters, contiguous; None: Fishers only
    addresses: np.ndarray | None = None  # [N, S] int64, of the parameters
    gradients: list[torch.Tensor] | None = (
        None  # [K] flat, element by element beside the forget Fishers; None: unsigned
    )

    def forget(self, s: int, start: int = 0, stop: int | None = None) -> list[torch.Tensor]:
        """Elements start..stop of segment s in every forget Fisher: K views, [stop - start]."""
        stop = int(self.numels[s]) if stop is None else stop
        return [f[o + start : o + stop] for f, o in zip(self.forgets, self.forget_offsets[:, s].tolist(), strict=True)]

    def gradient(self, s: int, start: int = 0, stop: int | None = None) -> list[torch.Tensor]:
        """The same of every gradient: K views, [stop - start]."""
        assert self.gradients is not None, "an unsigned table has no gradients"
        stop = int(self.numels[s]) if stop is None else stop
        return [
            g[o + start : o + stop] for g, o in zip(self.gradients, self.forget_offsets[:, s].tolist(), strict=True)
        ]

    def original(self, n: int, s: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start..stop of segment s in the original Fisher of the group's n-th node: a view."""
        stop = int(self.numels[s]) if stop is None else stop
        at = int(self.original_offsets[s])
        return self.originals[n][at + start : at + stop]

    def theta(self, n: int, s: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start..stop of segment s of the parameters of the group's n-th node: a flat view."""
        assert self.thetas is not None, "a table of Fishers only has no parameters"
        return self.thetas[s][n].detach().view(-1)[start:stop]


@dataclass(frozen=True)
class Table:
    """What meets what in one launch: one device, one parameter dtype, one Fisher dtype.

    Addresses are int64 and stay valid while `groups` keeps their tensors alive.
    """

    device: torch.device
    theta_dtype: torch.dtype | None  # one of THETA_DTYPES; None: Fishers only, addresses of theta are 0
    fisher_dtype: torch.dtype  # one of FISHER_DTYPES
    groups: list[Group]
    rows: np.ndarray  # [R, 5] int64: length in elements, first source, K, first target, N
    sources: np.ndarray  # [sum K] int64: address of each forget Fisher at the start of the row
    weights: np.ndarray  # [sum K] float64: w_k of each source
    targets: np.ndarray  # [sum N, 3] int64: address of theta, address of I, node (its slot)
    gradients: np.ndarray | None = None  # [sum K] int64: address of the gradient beside each source; None: unsigned

    @classmethod
    def pack(
        cls, device: torch.device, theta_dtype: torch.dtype | None, fisher_dtype: torch.dtype, groups: list[Group]
    ) -> Table:
        """The table of these groups; all their tensors are on `device` and of these dtypes."""
        return cls(device, theta_dtype, fisher_dtype, groups, *pack_rows(groups))

    @property
    def signed(self) -> bool:
        """Whether only elements are selected whose gradient and parameter have opposite signs."""
        return self.gradients is not None


@dataclass(frozen=True)
class Merging:
    """m = scale * reduce_k (w_k F_k); the weights are the table's, because each source has its own."""

    how: MergeRule = "max"
    scale: float = 1.0


@dataclass(frozen=True)
class Dampening:
    """theta *= min((lam I / m)^exponent, cap) where m > alpha I, in a signed table only where g * theta < 0 as well.

    `alpha` and `lam` may be written to between launches; `Launch.refresh` tells a backend that keeps copies.
    """

    alpha: np.ndarray  # [slots] float64; a node has one slot, or several where its parameters are told apart
    lam: np.ndarray  # [slots] float64
    exponent: float = 1.0
    cap: float = 1.0

    def limits(self, table: Table) -> np.ndarray:
        """Alpha and lambda of each target of the table, [sum N, 2], in the Fishers' dtype."""
        nodes = table.targets[:, 2]
        return np.stack([self.alpha[nodes], self.lam[nodes]], axis=1).astype(number_type(table.fisher_dtype))


def number_type(fisher_dtype: torch.dtype) -> type[np.floating]:
    """NumPy's type for the numbers that meet Fishers of this dtype."""
    return np.float32 if fisher_dtype == torch.float32 else np.float64


def pack_rows(groups: list[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Coalesce each group's segments into rows and write the address tables.

    Returns:
        rows [R, 5], sources [sum K], weights [sum K], targets [sum N, 3], gradients [sum K] or None, as in `Table`.

    """
    rows, sources, weights, targets, gradients = [], [], [], [], []
    first_source = first_target = 0
    for group in groups:
        size = group.forgets[0].element_size()
        forget = np.array([[f.data_ptr()] for f in group.forgets]) + group.forget_offsets * size  # [K, S]
        original = np.array([[f.data_ptr()] for f in group.originals]) + group.original_offsets * size  # [N, S]
        streams = [(forget, size), (original, size)]
        if group.thetas is not None and group.addresses is not None:
            streams.append((group.addresses, group.thetas[0][0].element_size()))

        joined = np.ones(len(group.numels) - 1, dtype=bool)  # does segment j + 1 follow segment j everywhere?
        for address, itemsize in streams:
            joined &= (address[:, 1:] == address[:, :-1] + group.numels[:-1] * itemsize).all(axis=0)
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
        if (
            group.gradients is not None
        ):  # its segments lie as those of the forget Fisher, so that they coalesce as these do
            gradient = np.array([[g.data_ptr()] for g in group.gradients]) + group.forget_offsets * size
            gradients.append(gradient[:, starts].T.reshape(-1))
        weights.append(np.tile(np.asarray(group.weights, dtype=np.float64), r))
        target = np.zeros((r, n, 3), dtype=np.int64)
        if group.addresses is not None:
            target[:, :, 0] = group.addresses[:, starts].T
        target[:, :, 1] = original[:, starts].T
        target[:, :, 2] = group.nodes
        targets.append(target.reshape(-1, 3))
        first_source += k * r
        first_target += n * r
    arrays = (np.concatenate(one) for one in (rows, sources, weights, targets))
    return (*arrays, np.concatenate(gradients) if gradients else None)  # type: ignore[return-value]
