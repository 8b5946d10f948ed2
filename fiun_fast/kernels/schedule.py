"""How a work table is cut into tiles for a GPU, the same way for `cuda` and `triton`.

A tile is a chunk of a row's elements times some of its nodes: the work of one warp, or of one Triton program. Each tile
merges its forget Fishers by itself, so that splitting nodes costs reads, mostly from the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .table import Table

TILE = np.dtype(  # `Tile` in csrc/cuda/tables.h
    {
        "names": ["start", "first_source", "first_target", "length", "sources", "targets", "vector"],
        "formats": ["i8"] * 3 + ["i4"] * 4,
    }
)
SHORTEST = 4  # a node takes a worker at least 1 / 4 of the time of a whole step: latency, however few its elements are
SLIVER = 0.02  # of a worker's whole work: for less than that, forget Fishers are not merged once more
ROUNDS = (2, 3, 4, 5, 6, 8, 12)  # tiles a worker that are tried; the more, the more often are forget Fishers merged


@dataclass(frozen=True)
class Grain:
    """What one tile of a kernel may be, and how many of its workers (warps, programs) the device runs at once."""

    unit: int  # elements of one wide access
    step: int  # elements of each stream that a worker holds at once
    most_steps: int  # that a tile may have
    most_targets: int  # nodes that a tile may have
    workers: int
    end: int  # elements of a tile at an end of a row that is out of step: at least a unit, which the body then lacks


# --------------------------------------------------------------------------------------------------------- alignment
def ranges(first: np.ndarray | int, count: np.ndarray) -> np.ndarray:
    """Indices first[0] .. first[0] + count[0] - 1, first[1] .. and so on: [sum count] int64; both [n]."""
    return np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)


def itemsizes(table: Table) -> dict[int, int]:
    """Column of each address in the targets -> bytes of an element there; theta, if there is one, comes first."""
    fisher = {1: table.fisher_dtype.itemsize}
    return fisher if table.theta_dtype is None else {0: table.theta_dtype.itemsize} | fisher


def phases(table: Table, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of a table can be read in wide accesses: 16 bytes, or a whole unit where that is less.

    Args:
        table: parameters count only where it has some.
        unit: elements that are read at once.

    Returns:
        For each row [R]: elements before the first unit, int64; whether all tensors of the row agree on that, bool.

    """
    _, first_source, sources, first_target, targets = table.rows.T
    sizes, fisher = itemsizes(table), table.fisher_dtype.itemsize
    narrowest = min(sizes, key=lambda column: sizes[column])
    head = -(table.targets[first_target, narrowest] // sizes[narrowest]) % unit

    def off(addresses: np.ndarray, count: np.ndarray, size: int) -> np.ndarray:
        """By how many bytes each address, after the head of its row, misses an aligned one."""
        return (addresses + np.repeat(head, count) * size) % min(16, unit * size)

    source = off(table.sources[ranges(first_source, sources)], sources, fisher)
    if table.gradients is not None:
        source += off(table.gradients[ranges(first_source, sources)], sources, fisher)
    addresses = table.targets[ranges(first_target, targets)]
    target = np.sum([off(addresses[:, column], targets, size) for column, size in sizes.items()], axis=0)
    fits = np.add.reduceat(source, np.cumsum(sources) - sources) == 0
    fits &= np.add.reduceat(target, np.cumsum(targets) - targets) == 0
    return head, fits


# ------------------------------------------------------------------------------------------------------------- tiles
def cut(table: Table, grain: Grain) -> np.ndarray:
    """Cut the table's rows into tiles that cost about the same, so many that all workers end at about the same time.

    A row whose addresses agree modulo 16 bytes is cut into an unaligned head, whole units, and a tail; these into
    chunks; then all nodes of all chunks stand in one line, which is divided evenly. What the ends of chunks leave over
    are smaller tiles. The costly ones come first, and every second round goes backwards, so that workers that take
    tiles in turn (a persistent grid) end together, as do those that take the next one when they are free (a grid of
    all tiles).

    Returns:
        [tiles] of TILE.

    """
    start, count, row, vector = _pieces(table, grain)
    if not len(count):
        return np.empty(0, dtype=TILE)
    _, first_source, sources, first_target, targets = table.rows.T
    pieces, costs = np.stack([count, sources[row], targets[row]], axis=1), _Cost.of(table, grain.step)
    best, soonest, least = None, np.inf, np.inf
    for rounds in ROUNDS if grain.workers > 1 else (1,):
        parts = _divided(pieces, costs, grain, rounds)
        its = row[parts.piece]
        cost = costs(parts.length, sources[its], parts.nodes, targets[its])
        order = np.argsort(-cost, kind="stable")
        end = _last_end(cost[order], grain.workers)
        if end < 0.99 * soonest:
            best, soonest = (parts, order), end
        least = min(least, float(cost.sum()))
        if end * grain.workers < 1.03 * least:
            break
    assert best is not None
    parts, order = best
    piece, begin, length, node, nodes = (column[order[_to_and_fro(len(order), grain.workers)]] for column in parts)
    row = row[piece]
    tiles = np.empty(len(piece), dtype=TILE)
    tiles["start"], tiles["length"] = start[piece] + begin, length
    tiles["first_source"], tiles["sources"] = first_source[row], sources[row]
    tiles["first_target"], tiles["targets"] = first_target[row] + node, nodes
    tiles["vector"] = vector[piece]
    return tiles


def _pieces(table: Table, grain: Grain) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Parts of rows that take one path: start in the row, length, row, whether it is the wide one; [pieces] each."""
    length = table.rows[:, 0]
    head, fits = phases(table, grain.unit)
    head = np.where(head > 0, np.minimum(head + grain.end - grain.unit, length), 0)
    rest = length - head
    body = np.where(rest % grain.unit > 0, rest // grain.end * grain.end, rest)
    wide = fits & (body > 0) & ((length > grain.step) | (body == length))
    head, body = np.where(wide, head, 0), np.where(wide, body, length)
    start = np.stack([np.zeros_like(head), head, head + body], axis=1).reshape(-1)
    count = np.stack([head, body, length - head - body], axis=1).reshape(-1)
    row = np.repeat(np.arange(len(length)), 3)
    vector = np.repeat(wide, 3) & (np.arange(3 * len(length)) % 3 == 1)
    there = count > 0
    return start[there], count[there], row[there], vector[there]


class _Cost(NamedTuple):
    """What a tile costs: the bytes of its streams where everything is selected, and no less than those of a latency."""

    source: int  # bytes an element
    target: int
    least: int  # elements

    @classmethod
    def of(cls, table: Table, step: int) -> _Cost:
        theta, fisher = 0 if table.theta_dtype is None else table.theta_dtype.itemsize, table.fisher_dtype.itemsize
        return cls(fisher * (2 if table.signed else 1), fisher + 2 * theta, step // SHORTEST)

    def __call__(self, length: np.ndarray, sources: np.ndarray, targets: np.ndarray, all_: np.ndarray) -> np.ndarray:
        """Of tiles with some of all targets: sources that others merge too come from the L2 cache, at half the cost."""
        merging = np.where(targets < all_, (self.source + 1) // 2, self.source) * sources
        return np.maximum(length, self.least) * (merging + self.target * targets)


class _Parts(NamedTuple):
    """Tiles of pieces: which piece; first element there, elements; first node, nodes; [tiles] int64 each."""

    piece: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    node: np.ndarray
    nodes: np.ndarray


def _divided(pieces: np.ndarray, cost: _Cost, grain: Grain, rounds: int) -> _Parts:
    """Divide pieces, [P, 3]: elements, sources, nodes, evenly into about `rounds` tiles for each worker.

    What is divided is a line of units: a piece's steps, each with all nodes, where that is little; else the nodes of
    each of its chunks. A share of the line that is longer than a tile may be becomes several.
    """
    count, sources, targets = pieces.T
    few, one = np.minimum(targets, grain.most_targets), np.minimum(count, grain.step)
    share = float((cost(count, sources, few, targets) * (targets / few)).sum()) / grain.workers
    unit = cost(one, sources, few, targets)
    by_step = (targets == few) & (unit <= 4 * SLIVER * share)
    steps = np.where(by_step, -(-count // grain.step), np.clip(share / rounds // unit, 1, grain.most_steps))
    chunk = steps.astype(np.int64) * grain.step  # the whole of a piece that is divided by step

    lines = -(-count // chunk)
    piece, begin = np.repeat(np.arange(len(pieces)), lines), ranges(0, lines) * np.repeat(chunk, lines)
    length, by_step = np.minimum(count[piece] - begin, chunk[piece]), by_step[piece]
    units = np.where(by_step, steps[piece].astype(np.int64), targets[piece])
    each = cost(np.where(by_step, one[piece], length), sources[piece], few[piece], targets[piece])
    each = np.where(by_step, each, each / few[piece])  # a node of a chunk has its part of the merging

    ends = np.cumsum(each * units)
    share = ends[-1] / grain.workers
    marks = share / rounds * np.arange(1, grain.workers * rounds)
    at = np.minimum(np.searchsorted(ends, marks, side="right"), len(ends) - 1)
    before = np.rint(units[at] - (ends[at] - marks) / each[at]).astype(np.int64)
    least = np.where(by_step[at], 0, SLIVER * share)
    inside = np.minimum(before, units[at] - before) * each[at] > least
    wide = int(units.max()) + 1
    within = at[inside] * wide + before[inside]
    within = within[np.diff(within, prepend=-1) > 0]
    firsts = np.sort(np.concatenate([np.arange(len(piece)) * wide, within]), kind="stable")  # two runs, merged
    line, first = np.divmod(firsts, wide)
    number = np.where(np.append(line[1:] == line[:-1], False), np.append(first[1:], 0), units[line]) - first

    splits = -(-number // np.where(by_step[line], grain.most_steps, grain.most_targets))
    of, nth = np.repeat(np.arange(len(line)), splits), ranges(0, splits)
    line, (low, high) = line[of], (first[of] + number[of] * k // splits[of] for k in (nth, nth + 1))
    stepped, piece = by_step[line], piece[line]
    offset = np.where(stepped, low * grain.step, 0)
    return _Parts(
        piece,
        begin[line] + offset,
        np.where(stepped, np.minimum(high * grain.step, length[line]) - offset, length[line]),
        np.where(stepped, 0, low),
        np.where(stepped, targets[piece], high - low),
    )


def _to_and_fro(count: int, workers: int) -> np.ndarray:
    """0 .. count - 1 in rounds of `workers`, every second one backwards; of the whole ones, the last one is."""
    order, whole = np.arange(count), count // workers
    if workers > 1:
        rounds = order[: whole * workers].reshape(whole, workers)
        rounds[(whole - 1) % 2 :: 2] = rounds[(whole - 1) % 2 :: 2, ::-1].copy()
    return order


def _last_end(costs: np.ndarray, workers: int) -> float:
    """What the worker has to do that has the most, where tiles of these costs are given out to and fro."""
    whole = np.zeros(-(-len(costs) // workers) * workers)
    whole[: len(costs)] = costs[_to_and_fro(len(costs), workers)]
    return float(whole.reshape(-1, workers).sum(axis=0).max())


def bytes_moved(tiles: np.ndarray, table: Table) -> int:
    """Bytes of F, I, g and theta that these tiles load and store where every 16 bytes have something selected."""
    length, sources, targets = (tiles[name].astype(np.int64) for name in ("length", "sources", "targets"))
    theta = 0 if table.theta_dtype is None else table.theta_dtype.itemsize
    sources *= 2 if table.signed else 1
    return int((table.fisher_dtype.itemsize * length * (sources + targets) + 2 * theta * length * targets).sum())


# -------------------------------------------------------------------------------------------------------------- runs
def by_node(nodes: np.ndarray, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Put tiles of one node each, [T], in the order of their nodes, and cut them into runs.

    Returns:
        the order, [T] int64; the runs as from `cut_runs`.

    """
    order = np.argsort(nodes, kind="stable")
    return order, cut_runs(nodes[order], workers)


def cut_runs(nodes: np.ndarray, workers: int) -> np.ndarray:
    """Cut tiles that are in the order of their nodes, [T], into about as many runs as workers, each of one node.

    Returns:
        [runs + 1] int64: the first tile of each run, and the end.

    """
    if not len(nodes):
        return np.zeros(1, dtype=np.int64)
    firsts = np.flatnonzero(np.diff(nodes, prepend=nodes[0] - 1))  # of each node
    counts = np.diff(firsts, append=len(nodes))
    parts = -(-counts // max(1, -(-len(nodes) // workers)))
    starts = np.repeat(firsts, parts) + ranges(0, parts) * np.repeat(counts, parts) // np.repeat(parts, parts)
    return np.append(starts, len(nodes)).astype(np.int64)
