"""Prepared launches of the GPU backends: their tables in the device's memory, and what is asked before each run.

`cuda` and `triton` add how their kernels are started. A launch allocates nothing and never waits for the device, so it
can be captured in a CUDA graph; the plan has to outlive the graph, because the graph refers to its tables. Work goes to
torch's current stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import numpy as np
import torch

from .interface import Histogram, Launch
from .schedule import Grain, by_node, cut
from .table import BINS, Dampening, Merging, Table, number_type


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

    @property
    def nbytes(self) -> int:
        """Bytes that were uploaded."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def hold_for_stream(self, counts: torch.Tensor) -> int:
        """The current stream; memory of this launch is not reused before that stream is done, even if the plan goes."""
        current = stream(self._device)
        if current != self._uploaded_on:
            for tensor in (*self._read, counts):
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return current


def tables_of(table: Table) -> list[np.ndarray]:
    """What kernels read of a work table, in the order in which they take it: sources, gradients, weights, targets.

    In the place of the gradients of an unsigned table stand the sources; kernels do not read them.
    """
    gradients = table.sources if table.gradients is None else table.gradients
    return [table.sources, gradients, table.weights.astype(number_type(table.fisher_dtype)), table.targets]


class PreparedDampening(Launch):
    """One kernel for all nodes of a table."""

    in_one_call = True

    def __init__(self, table: Table, dampening: Dampening, grain: Grain) -> None:
        """Cut the table into tiles and upload: tiles, as `laid_out` has them, `tables_of`, alpha and lambda."""
        self.table, self.tiles = table, cut(table, grain)
        self._dampening = dampening
        self.tables = DeviceTables(table, (self.laid_out(self.tiles), *tables_of(table), dampening.limits(table)))

    @staticmethod
    @abstractmethod
    def laid_out(tiles: np.ndarray) -> np.ndarray:
        """The tiles as the kernel reads them."""

    @abstractmethod
    def start(self, counts: torch.Tensor, dry_run: bool, stream: int) -> None:
        """Start the kernel on that stream, which is the current one."""

    def run(self, counts: torch.Tensor, dry_run: bool = False) -> None:
        """Dampen every node of the table, or only count."""
        stream = self.tables.hold_for_stream(counts)
        if len(self.tiles):
            self.start(counts, dry_run, stream)

    def refresh(self) -> None:
        """Upload alpha and lam again."""
        self.tables.tensors[-1].copy_(torch.from_numpy(self._dampening.limits(self.table)))


class PreparedHistogram(Histogram):
    """One kernel for all nodes of a table; each node reads its forget Fishers."""

    def __init__(self, table: Table, grain: Grain) -> None:
        """Cut the table into tiles of one node each, put them into runs, and upload: tiles, runs, `tables_of`."""
        tiles = cut(table, grain)
        order, runs = by_node(table.targets[tiles["first_target"], 2], grain.workers)
        self.device, self.runs = table.device, len(runs) - 1
        self.tables = DeviceTables(table, (self.laid_out(tiles[order]), runs, *tables_of(table)))

    @staticmethod
    @abstractmethod
    def laid_out(tiles: np.ndarray) -> np.ndarray:
        """The tiles as the kernel reads them."""

    @abstractmethod
    def start(self, counts: torch.Tensor, bases: torch.Tensor, low: int, nearest: bool, stream: int) -> None:
        """Start the kernel on that stream, which is the current one."""

    def run(self, counts: torch.Tensor, bases: np.ndarray, low: int, nearest: bool) -> None:
        """Add to the counts of every node."""
        assert counts.shape == (len(bases), BINS)
        uploaded = upload(np.asarray(bases, dtype=np.int64), self.device)
        stream = self.tables.hold_for_stream(counts)
        if self.runs:
            self.start(counts, uploaded, low, nearest, stream)


def numbers_of(merging: Merging, dampening: Dampening, fisher_dtype: torch.dtype) -> np.ndarray:
    """Scale, exponent, cap, [3] in the Fishers' dtype."""
    return np.array([merging.scale, dampening.exponent, dampening.cap]).astype(number_type(fisher_dtype))
