"""A work table tile by tile in plain torch: what `audit` and `undo` look at before a run changes anything.

A tile is a stretch of one parameter of one node. The forget Fishers of a stretch are merged once for all nodes of the
group, and temporaries are a few times the size of a tile, whatever the size of the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.reference import merge_elements
from .kernels.table import DampenTable
from .resolve import Batch

TILE = 1 << 18  # elements: temporaries stay in the cache of a CPU
TILE_GPU = 1 << 24  # fewer and larger: each tile waits for the device once


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements `start` to `start + n` of one parameter of one node."""

    node: int  # index among the plan's targets
    name: str
    parameter: Tensor  # whole, in its shape
    start: int
    theta: Tensor  # [n], a view of the parameter
    original: Tensor  # [n] view
    merged: Tensor  # [n]
    alpha: float
    lam: float
    exact: bool  # m has the same bits on every backend


def tiles(table: DampenTable, batches: Sequence[Batch]) -> Iterator[Tile]:
    """All tiles of a table, parameter after parameter; `batches` are what the table's groups were made from."""
    size = TILE if table.device.type == "cpu" else TILE_GPU
    for group, batch in zip(table.groups, batches, strict=True):
        exact = table.merge == "max" or len(group.forgets) == 1
        nodes = list(zip(batch.nodes, group.thetas, group.originals, group.slots.tolist(), strict=True))
        for s, numel in enumerate(group.numels.tolist()):
            name, first = batch.match.names[batch.segments[s]], int(group.original_offsets[s])
            offsets = group.forget_offsets[:, s].tolist()
            for start in range(0, numel, size):
                n = min(size, numel - start)
                forgets = [f[o + start : o + start + n] for f, o in zip(group.forgets, offsets, strict=True)]
                merged = merge_elements(forgets, group.weights, table.merge, table.scale)
                for node, parameters, fisher, slot in nodes:
                    theta = parameters[s].detach().view(-1)[start : start + n]
                    original = fisher[first + start : first + start + n]
                    alpha, lam = float(table.alpha[slot]), float(table.lam[slot])
                    yield Tile(node, name, parameters[s], start, theta, original, merged, alpha, lam, exact)


def selection(tile: Tile) -> Tensor:
    """Elements that a run selects, [n] bool: m > alpha I."""
    return tile.merged > tile.original * tile.alpha


def possible_selection(tile: Tile) -> Tensor:
    """Elements that any backend may select: with merged sums, those within their few ulp of the threshold as well."""
    if tile.exact:
        return selection(tile)
    threshold, tiny = tile.original * tile.alpha, torch.finfo(tile.merged.dtype).tiny
    return (tile.merged * (1 + 1e-5) > threshold) | ((tile.merged > 0) & (tile.merged <= tiny))
