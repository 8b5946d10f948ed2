"""Figures of a run for each parameter, for an auditor.

`run_` itself counts a node only, without waiting for the device. These figures come from a pass of their own in plain
torch, before the run, over the same tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.reference import dampen_elements
from .kernels.table import DampenTable
from .report import ParameterReport
from .resolve import Batch
from .tiles import selection, tiles


@torch.no_grad()
def examine(tables: Sequence[DampenTable], batches: Sequence[Sequence[Batch]]) -> dict[int, list[ParameterReport]]:
    """What a run would do to each parameter of each node; nothing is changed.

    One pass over Fishers and parameters, with temporaries of a few tiles; it ends by waiting for the devices.

    Args:
        tables: the plan's launches.
        batches: for each table, what its groups were made from.

    Returns:
        Index of the node among the plan's targets -> its parameters, grouped by dtype and sources.

    """
    sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # -> the parameter; selected, zeroed, nonfinite, change^2
    for table, parts in zip(tables, batches, strict=True):
        for tile in tiles(table, parts):
            chosen = selection(tile)
            new, _ = dampen_elements(
                tile.theta, tile.original, tile.merged, tile.alpha, tile.lam, table.exponent, table.cap
            )
            finite = tile.merged.isfinite() & tile.original.isfinite()
            change = (new.double() - tile.theta.double()).masked_fill(~chosen, 0)
            terms = [chosen.sum(), (chosen & (new == 0)).sum(), (~finite).sum(), change.square().sum()]
            figures = torch.stack([term.double() for term in terms])
            _, so_far = sums.get((tile.node, tile.name), (tile.parameter, None))
            sums[tile.node, tile.name] = tile.parameter, figures if so_far is None else so_far + figures
    found: dict[int, list[ParameterReport]] = {}
    by_device: dict[torch.device, list[tuple[int, str]]] = {}
    for key, (_, figures) in sums.items():
        by_device.setdefault(figures.device, []).append(key)
    for keys in by_device.values():  # one wait a device
        for (node, name), row in zip(keys, torch.stack([sums[key][1] for key in keys]).tolist(), strict=True):
            parameter = sums[node, name][0]
            dtype = str(parameter.dtype).removeprefix("torch.")
            selected, zeroed, nonfinite = (int(count) for count in row[:3])
            size = tuple(parameter.shape), dtype, parameter.numel()
            found.setdefault(node, []).append(
                ParameterReport(name, *size, selected, zeroed, nonfinite, change=row[3] ** 0.5)
            )
    return found
