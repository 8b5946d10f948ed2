"""How a work table is cut into tiles for a GPU, and how the tables of a launch get into its memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from .table import Table

MOST_STEPS = 8  # in a warp's tile: long enough that finding the tile costs nothing, short enough to share out evenly
TILES_PER_WARP = 4  # aimed at, so that no warp is left alone at the end
WARP_TILE = np.dtype(  # `Tile` in csrc/cuda/tables.h
    {
        "names": ["start", "first_source", "first_target", "length", "sources", "targets", "vector"],
        "formats": ["i8"] * 3 + ["i4"] * 4,
    }
)


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
def warp_tiles(table: Table, unit: int, step: int, warps: int, most_targets: int) -> np.ndarray:
    """Cut the table's rows into tiles for the `cuda` backend, each the work of one warp.

    A tile is a chunk of elements times some of the row's nodes. A row whose addresses agree modulo 16 bytes is cut into
    an unaligned head, whole units, and a tail. Chunks get shorter, down to one step, and then nodes are split, until
    there are some tiles for each warp of the device. Each tile merges its forget Fishers by itself, so that splitting
    nodes costs reads, mostly from the L2 cache.

    Args:
        table: what is to be cut.
        unit: elements that a lane loads at once.
        step: elements that a warp holds at once.
        warps: how many the device runs at once.
        most_targets: the most nodes that one tile may have.

    Returns:
        [tiles] of WARP_TILE.

    """
    length, first_source, sources, first_target, targets = table.rows.T
    head, fits = phases(table, unit)
    body = (length - head) // unit * unit
    cut = fits & (body > 0) & ((length > step) | (body == length))
    head, body = np.where(cut, head, 0), np.where(cut, body, length)
    start = np.stack([np.zeros_like(head), head, head + body], axis=1).reshape(-1)  # three pieces per row
    count = np.stack([head, body, length - head - body], axis=1).reshape(-1)
    row = np.repeat(np.arange(len(length)), 3)
    vector = np.stack([~cut, cut, ~cut], axis=1).reshape(-1) & np.repeat(cut, 3)
    start, count, row, vector = (a[count > 0] for a in (start, count, row, vector))

    aim = TILES_PER_WARP * warps
    chunk = step * min(max(int((-(-count // step)).sum()) // aim, 1), MOST_STEPS)
    chunks = -(-count // chunk)
    share = min(max(-(-int((chunks * targets[row]).sum()) // aim), 1), most_targets)
    splits = -(-targets[row] // share)
    piece = np.repeat(np.arange(len(row)), chunks * splits)
    index = ranges(0, chunks * splits)
    nth, split = np.divmod(index, splits[piece])  # tiles of one chunk are neighbours: its Fishers meet in the cache
    row, begin = row[piece], nth * chunk
    node, next_node = (targets[row] * s // splits[piece] for s in (split, split + 1))

    tiles = np.empty(len(piece), dtype=WARP_TILE)
    tiles["start"], tiles["length"] = start[piece] + begin, np.minimum(count[piece] - begin, chunk)
    tiles["first_source"], tiles["sources"] = first_source[row], sources[row]
    tiles["first_target"], tiles["targets"] = first_target[row] + node, next_node - node
    tiles["vector"] = vector[piece]
    return tiles


def program_tiles(table: Table, programs: int, block: int) -> np.ndarray:
    """Cut the table's rows into tiles for the Triton backend, each the work of one program.

    A tile is a chunk of `block` elements times a share of the row's nodes. Nodes are split over tiles only until there
    are about `programs` tiles of even work: each share of nodes merges its chunk of the forget Fishers again, mostly
    from the L2 cache. Tiles of one chunk are neighbours, so that they meet there.

    Returns:
        [T, 7] int64: start, length, first source, K, first target, N, whether all addresses at the start and the length
        are multiples of 16 bytes.

    """
    length, first_source, source_count, first_target, target_count = table.rows.T
    vector = 16 // min(itemsizes(table).values())
    head, alignable = phases(table, vector)
    first_chunk = np.where(alignable & (head > 0), block - vector + head, block)  # later chunks start aligned
    chunks = 1 + np.maximum(0, -(-(length - first_chunk) // block))
    share = max(1, int((chunks * target_count).sum()) // programs)
    splits = -(-target_count // np.minimum(share, target_count))

    per_row = chunks * splits
    row = np.repeat(np.arange(len(length)), per_row)
    chunk, split = np.divmod(ranges(0, per_row), splits[row])
    start = np.where(chunk == 0, 0, first_chunk[row] + (chunk - 1) * block)
    count = np.minimum(length[row], first_chunk[row] + chunk * block) - start
    node = target_count[row] * split // splits[row]  # shares differ by one node at most
    next_node = target_count[row] * (split + 1) // splits[row]
    aligned = alignable[row] & ((start - head[row]) % vector == 0) & (count % vector == 0)
    columns = (start, count, first_source[row], source_count[row], first_target[row] + node, next_node - node, aligned)
    return np.stack(columns, axis=1).astype(np.int64)[count > 0]


def bytes_moved(tiles: np.ndarray, table: Table) -> int:
    """Bytes of F, I, g and theta that `program_tiles` load and store where every 16 bytes have something selected."""
    length, sources, targets = tiles[:, 1], tiles[:, 3] * (2 if table.signed else 1), tiles[:, 5]
    theta = 0 if table.theta_dtype is None else table.theta_dtype.itemsize
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


# ----------------------------------------------------------------------------------------------------- device memory
def stream(device: torch.device) -> int:
    """The current stream, as CUDA calls it; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device; on a CPU the tensor may share its memory."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def upload_ordered(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device without waiting: only work on the current stream may read it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class DeviceTables:
    """Arrays of a launch, uploaded once. Nothing else about a launch is in the device's memory."""

    def __init__(self, table: Table, arrays: Iterable[np.ndarray]) -> None:
        # Blocking copies: whichever stream launches later finds the tables there.
        self.tensors = [upload(array, table.device) for array in arrays]
        self._device = table.device
        sources = [source for group in table.groups for source in (*group.forgets, *(group.gradients or ()))]
        self._read = [*self.tensors, *sources]
        self._uploaded_on = stream(table.device)

    def hold_for_stream(self, counts: torch.Tensor) -> int:
        """The current stream; memory of this launch is not reused before that stream is done, even if the plan goes."""
        current = stream(self._device)
        if current != self._uploaded_on:
            for tensor in (*self._read, counts):
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return current
