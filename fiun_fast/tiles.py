"""A plan's tables tile by tile in plain torch: what an audit and an undo log look at before a run changes anything.

A tile is a stretch of one parameter of one node. The forget Fishers of a stretch are merged once for all nodes of the
group, and temporaries are a few times the size of a tile, whatever the size of the models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import short
from .binding import Part
from .guards import denormals_kept
from .kernels.reference import dampen_elements, merge_elements, merged_gradient, not_finite, opposed
from .kernels.table import Dampening
from .report import ParameterReport

TILE = 1 << 18  # elements: temporaries stay in the cache of a CPU
TILE_GPU = 1 << 24  # fewer and larger: each tile waits for the device once


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements `start` to `start + n` of one parameter of one node."""

    node: int  # index among the program's nodes
    name: str
    parameter: Tensor  # whole, in its shape
    start: int
    theta: Tensor  # [n], a view of the parameter
    original: Tensor  # [n] view
    merged: Tensor  # [n]
    alpha: float
    lam: float
    how: Dampening
    exact: bool  # m has the same bits on every backend
    gradient: Tensor | None  # [n], merged; None: unsigned


def tiles(parts: Iterable[Part]) -> Iterator[Tile]:
    """All tiles of these parts, parameter after parameter."""
    for part in parts:
        table, merging, how = part.table, part.merging, part.dampening
        size = TILE if table.device.type == "cpu" else TILE_GPU
        for group in table.groups:
            assert group.thetas is not None
            exact = merging.how == "max" or len(group.forgets) == 1
            for s, numel in enumerate(group.numels.tolist()):
                for start in range(0, numel, size):
                    stop = min(start + size, numel)
                    merged = merge_elements(group.forget(s, start, stop), group.weights, merging)
                    gradient = merged_gradient(group, s, start, stop)
                    for n, slot in enumerate(group.nodes.tolist()):
                        theta, original = group.theta(n, s, start, stop), group.original(n, s, start, stop)
                        alpha, lam = float(how.alpha[slot]), float(how.lam[slot])
                        where = (int(part.node[slot]), group.names[s], group.thetas[s][n], start)
                        yield Tile(*where, theta, original, merged, alpha, lam, how, exact, gradient)


def selection(tile: Tile) -> Tensor:
    """Elements that a run selects, [n] bool: m > alpha I, and g * theta < 0 where there is a gradient."""
    return (tile.merged > tile.original * tile.alpha) & admitted(tile)


def admitted(tile: Tile) -> Tensor:
    """Elements that the sign does not rule out, [n] bool; all of an unsigned tile."""
    if tile.gradient is None:
        return torch.ones_like(tile.merged, dtype=torch.bool)
    return opposed(tile.gradient, tile.theta)


def possible_selection(tile: Tile) -> Tensor:
    """Elements that any backend may select: with merged sums, those within their few ulp of the threshold as well."""
    if tile.exact:
        return selection(tile)
    threshold, tiny = tile.original * tile.alpha, torch.finfo(tile.merged.dtype).tiny
    near = (tile.merged * (1 + 1e-5) > threshold) | ((tile.merged > 0) & (tile.merged <= tiny))
    return near & admitted(tile)


@torch.no_grad()
@denormals_kept()
def examine(parts: Iterable[Part]) -> dict[int, list[ParameterReport]]:
    """What a run would do to each parameter of each node; nothing is changed.

    One pass over Fishers and parameters, with temporaries of a few tiles; it ends by waiting for the devices.

    Returns:
        Index of the node among the program's nodes -> its parameters, grouped by dtype and forget Fishers.

    """
    sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}  # -> the parameter; selected, zeroed, nonfinite, change^2
    for tile in tiles(parts):
        chosen, how = selection(tile), tile.how
        new, _ = dampen_elements(tile.theta, tile.original, tile.merged, tile.alpha, tile.lam, how.exponent, how.cap)
        nonfinite = not_finite(tile.original, tile.merged, tile.gradient)
        change = (new.double() - tile.theta.double()).masked_fill(~chosen, 0)
        terms = [chosen.sum(), (chosen & (new == 0)).sum(), nonfinite.sum(), change.square().sum()]
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
            selected, zeroed, infinite = (int(count) for count in row[:3])
            size = tuple(parameter.shape), short(parameter.dtype), parameter.numel()
            found.setdefault(node, []).append(
                ParameterReport(name, *size, selected, zeroed, infinite, change=row[3] ** 0.5)
            )
    return found
