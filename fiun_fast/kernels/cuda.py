"""The `cuda` backend: the kernels of csrc/cuda over the plan's work table, compiled ahead of time, for NVIDIA GPUs.

A prepared launch allocates nothing and never waits for the device, so it can be captured in a CUDA graph; the plan has
to outlive the graph, because the graph refers to its tables. Work goes to torch's current stream.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import BackendError, DTypeError
from .cpu import FISHER_KINDS, KINDS  # csrc/cuda numbers the dtypes as csrc/cpu does
from .table import BINS, MERGES, DampenTable, Launch, cut_runs

name = "cuda"

DEVICE = "cuda"
DRIVERS = {12: "525", 13: "580"}  # the first Linux driver for each major version of the toolkit
MOST_STEPS = 8  # of a tile: long enough that finding the tile costs nothing, short enough to share out evenly
TILES_PER_WARP = 4  # aimed at, so that no warp is left alone at the end
TILE = np.dtype(  # csrc/cuda/tables.h
    {
        "names": ["start", "first_source", "first_target", "length", "sources", "targets", "vector"],
        "formats": ["i8"] * 3 + ["i4"] * 4,
    }
)


# ---------------------------------------------------------------------------------------------------- availability
@functools.cache
def _load() -> ModuleType | str:
    """The extension module, or the reason why there is none."""
    try:
        from .. import _cuda
    except ImportError as error:
        if getattr(error, "name", None) == "fiun_fast._cuda" or "cannot import name" in str(error):
            return (
                "its extension was not built, because nvcc was not there; install the CUDA toolkit (docs/clusters.md), "
                "then run `FIUN_FAST_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir` on fiun_fast's "
                "source again"
            )
        return f"its extension does not load: {error}"
    return _cuda


def why_not(device_type: str) -> str | None:
    """None for "cuda" where the extension has code for a GPU of this machine; else the reason why it cannot be used."""
    if device_type != DEVICE:
        return "it works on tensors in GPU memory only"
    extension = _load()
    return extension if isinstance(extension, str) else _why_not_here()


def architectures() -> list[str]:
    """What the extension has inside, as ["80", "90", "90+PTX"].

    Raises:
        BackendError: it is missing.

    """
    return _extension().architectures.split(",")


def driver() -> str:
    """Version of the NVIDIA driver, and the newest CUDA it is for; "none" where there is none.

    Raises:
        BackendError: the extension is missing, or a CUDA call failed.

    """
    newest = _call(_extension().driver_version)
    if newest == 0:
        return "none"
    kernel_module = Path("/proc/driver/nvidia/version")
    found = re.search(r"(\d+\.\d+(\.\d+)?)  ", kernel_module.read_text()) if kernel_module.exists() else None
    return f"{found[1] if found else 'of unknown version'}, for CUDA up to {_dotted(newest)}"


def toolkit() -> str:
    """Version of the CUDA toolkit that the extension was built with, and the driver it needs.

    Raises:
        BackendError: it is missing.

    """
    version = _extension().toolkit_version
    return f"CUDA {_dotted(version)}, which needs driver {DRIVERS.get(version // 1000, 'of that version')} or newer"


def runs_on(capability: int, inside: Sequence[str], ptx: bool = True) -> bool:
    """Whether a GPU of that compute capability (90 for 9.0) can run one of these architectures.

    Machine code runs on its own capability and later minor ones, PTX on all that came after; without `ptx` it does not
    count, because the driver is older than the toolkit.
    """
    for architecture in inside:
        number, _, is_ptx = architecture.partition("+")
        if capability >= int(number) and (ptx if is_ptx else capability // 10 == int(number) // 10):
            return True
    return False


@functools.cache
def _why_not_here() -> str | None:
    extension = _extension()
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs"
    driver, needed = extension.driver_version(), extension.toolkit_version
    if driver == 0:
        return "no NVIDIA driver is installed"
    if driver // 1000 < needed // 1000:
        return (
            f"the driver is for CUDA {_dotted(driver)}; the extension is built with {toolkit()} "
            "(docs/clusters.md: building for older drivers)"
        )
    if not torch.cuda.is_available():
        return "torch finds no GPU" if torch.version.cuda else "this torch is built without CUDA"
    try:
        found = extension.capabilities()
    except RuntimeError as error:
        return str(error)
    inside = architectures()
    if not any(runs_on(capability, inside, driver >= needed) for capability in found):
        listed = ", ".join(f"{capability / 10:.1f}" for capability in found)
        old = "" if driver >= needed else f" by a driver for CUDA {_dotted(driver)}, which takes no newer PTX"
        return f"it has code for {', '.join(inside)}, and none that runs on compute capability {listed}{old}"
    return None


# --------------------------------------------------------------------------------------------------------- schedule
def schedule(table: DampenTable, unit: int, step: int, warps: int, most_targets: int) -> np.ndarray:
    """Cut the table's rows into tiles, each the work of one warp: a chunk of elements times some of the row's nodes.

    A row whose addresses agree modulo 16 bytes is cut into an unaligned head, whole units, and a tail. Chunks get
    shorter, down to one step, and then nodes are split, until there are some tiles for each warp of the device. Each
    tile merges its forget Fishers by itself, so that splitting nodes costs reads, mostly from the L2 cache.

    Args:
        table: what is to be cut.
        unit, step: elements that a lane loads at once, and that a warp holds at once.
        warps: that the device runs at once.
        most_targets: nodes of one tile, at most.

    Returns:
        [tiles] of TILE.

    """
    length, first_source, sources, first_target, targets = table.rows.T
    head, fits = _phases(table, unit)
    body = (length - head) // unit * unit
    cut = fits & (body > 0) & ((length > step) | (body == length))
    head, body = np.where(cut, head, 0), np.where(cut, body, length)
    start = np.stack([np.zeros_like(head), head, head + body], axis=1).reshape(-1)  # three pieces a row
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
    index = np.arange(len(piece)) - np.repeat(np.cumsum(chunks * splits) - chunks * splits, chunks * splits)
    nth, split = np.divmod(index, splits[piece])  # tiles of one chunk are neighbours: its Fishers meet in the cache
    row, begin = row[piece], nth * chunk
    node, next_node = (targets[row] * s // splits[piece] for s in (split, split + 1))

    tiles = np.empty(len(piece), dtype=TILE)
    tiles["start"], tiles["length"] = start[piece] + begin, np.minimum(count[piece] - begin, chunk)
    tiles["first_source"], tiles["sources"] = first_source[row], sources[row]
    tiles["first_target"], tiles["targets"] = first_target[row] + node, next_node - node
    tiles["vector"] = vector[piece]
    return tiles


def _phases(table: DampenTable, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row: elements before the first whole unit, and whether all its tensors agree on that."""
    theta_size, fisher_size = table.theta_dtype.itemsize, table.fisher_dtype.itemsize
    theta_width, fisher_width = min(16, unit * theta_size), min(16, unit * fisher_size)  # bytes of one access
    _, first_source, sources, first_target, targets = table.rows.T
    narrower, size = (0, theta_size) if theta_size <= fisher_size else (1, fisher_size)
    head = -(table.targets[first_target, narrower] // size) % unit
    source = (table.sources[_ranges(first_source, sources)] + np.repeat(head, sources) * fisher_size) % fisher_width
    target, its_head = table.targets[_ranges(first_target, targets)], np.repeat(head, targets)
    off = (target[:, 0] + its_head * theta_size) % theta_width + (target[:, 1] + its_head * fisher_size) % fisher_width
    fits = np.add.reduceat(source, np.cumsum(sources) - sources) == 0
    fits &= np.add.reduceat(off, np.cumsum(targets) - targets) == 0
    return head, fits


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Indices first[0] .. first[0] + count[0] - 1, first[1] .. and so on."""
    return np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)


# --------------------------------------------------------------------------------------------------------- launches
def dampen(table: DampenTable) -> Launch:
    """Prepare a launch: the returned object dampens every node of the table, or with dry_run only counts.

    Raises:
        DTypeError: parameters or Fishers of a dtype that the backend does not take.
        BackendError: the extension has no code for the table's device, or a CUDA call failed.

    """
    extension = _extension()
    device = _index(table.device)
    theta, fisher = _kind(table.theta_dtype, KINDS), _kind(table.fisher_dtype, FISHER_KINDS)
    number = np.float32 if table.fisher_dtype == torch.float32 else np.float64
    warps = _call(extension.resident_warps, device, theta, fisher, table.exponent != 1)
    unit, step = extension.tile_shape(theta, fisher)
    tiles = schedule(table, unit, step, warps, extension.tile_targets)
    host = (
        tiles.view(np.uint8),
        table.sources.astype(np.int64),
        table.weights.astype(number),
        table.targets.astype(np.int64),
        table.limits(number),
    )
    # Blocking copies: whichever stream launches later finds the tables there.
    tables = [torch.from_numpy(np.ascontiguousarray(array)).to(table.device) for array in host]
    addresses = [uploaded.data_ptr() for uploaded in tables]
    owned = [*tables, table.counts, *(forget for group in table.groups for forget in group.forgets)]
    uploaded_on = _stream(table.device)

    def launch(dry_run: bool) -> None:
        stream = _stream(table.device)
        if stream != uploaded_on:  # should the plan go away, this memory is not handed out before the stream is done
            for tensor in owned:
                tensor.record_stream(torch.cuda.current_stream(table.device))
        _call(
            extension.dampen,
            device,
            addresses[0],
            len(tiles),
            *addresses[1:],
            table.counts.data_ptr(),
            len(table.alpha),
            theta,
            fisher,
            MERGES.index(table.merge),
            table.scale,
            table.exponent,
            table.cap,
            dry_run,
            stream,
        )

    def refresh() -> None:
        tables[-1].copy_(torch.from_numpy(table.limits(number)))

    return Launch(launch, refresh)


def histogram(table: DampenTable) -> Callable[[np.ndarray, int, bool, torch.Tensor], None]:
    """Prepare a count of the ratios m / I of every node, as `reference.histogram`. Each node reads its forget Fishers.

    Raises:
        DTypeError: Fishers of a dtype that the backend does not take.
        BackendError: the extension has no code for the table's device, or a CUDA call failed.

    """
    extension, device = _extension(), _index(table.device)
    kind = _kind(table.fisher_dtype, FISHER_KINDS)
    number = np.float32 if table.fisher_dtype == torch.float32 else np.float64
    warps = _call(extension.histogram_warps, device, kind)
    # Parameters are not touched, so that their alignment does not matter.
    fishers = replace(table, theta_dtype=table.fisher_dtype, targets=table.targets[:, [1, 1, 2]])
    unit, step = extension.tile_shape(kind, kind)
    tiles = schedule(fishers, unit, step, warps, 1)
    slots = table.targets[tiles["first_target"], 2]
    order = np.argsort(slots, kind="stable")
    runs = cut_runs(slots[order], warps)
    host = (
        tiles[order].view(np.uint8),
        runs,
        table.sources.astype(np.int64),
        table.weights.astype(number),
        table.targets.astype(np.int64),
    )
    tables = [torch.from_numpy(np.ascontiguousarray(array)).to(table.device) for array in host]

    def launch(bases: np.ndarray, low: int, nearest: bool, counts: torch.Tensor) -> None:
        assert counts.shape == (len(table.alpha), BINS)
        uploaded = torch.from_numpy(np.ascontiguousarray(bases, dtype=np.int64)).to(table.device)
        tiles_at, runs_at, *others = (part.data_ptr() for part in (*tables, uploaded, counts))
        _call(
            extension.histogram,
            device,
            tiles_at,
            runs_at,
            len(runs) - 1,
            *others,
            len(table.alpha),
            kind,
            MERGES.index(table.merge),
            table.scale,
            low,
            nearest,
            _stream(table.device),
        )

    return launch


def merge(sources: Sequence[torch.Tensor], weights: Sequence[float], how: str, scale: float, out: torch.Tensor) -> None:
    """Write m = scale * reduce_k (w_k F_k) to `out`; all are flat [n], contiguous, fp32 or all fp64, on one device.

    Raises:
        DTypeError: a dtype that the backend does not take, or not the same everywhere.
        BackendError: a CUDA call failed.

    """
    kind = _kind(out.dtype, FISHER_KINDS)
    if any(source.dtype != out.dtype for source in sources):
        raise DTypeError(
            f"merge: sources of {[str(s.dtype) for s in sources]}, output of {out.dtype}; expected one dtype"
        )
    addresses = np.array([source.data_ptr() for source in sources], dtype=np.int64)
    factors = np.array(weights, dtype=np.float64)
    _call(
        _extension().merge,
        _index(out.device),
        addresses.ctypes.data,
        factors.ctypes.data,
        len(addresses),
        out.data_ptr(),
        out.numel(),
        kind,
        MERGES.index(how),
        scale,
        _stream(out.device),
    )


def accumulate(gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor], power: int, zero: bool) -> None:
    """For each pair: into += |g| (power 1) or g^2 (power 2); with `zero`, g becomes 0 in the same pass.

    Args:
        gradients: of any shape and strides, in fp32, fp64, bf16 or fp16, on one device.
        into: flat accumulators, contiguous, fp32 or fp64, of as many elements as their gradient.
        power: 1 or 2.
        zero: set the gradients to zero.

    Raises:
        DTypeError: a dtype that the backend does not take.
        BackendError: a CUDA call failed.

    """
    if not gradients:
        return
    dense = [gradient.detach().contiguous() for gradient in gradients]
    pairs = np.array(
        [
            (g.data_ptr(), total.data_ptr(), total.numel(), _kind(g.dtype, KINDS), _kind(total.dtype, FISHER_KINDS))
            for g, total in zip(dense, into, strict=True)
        ],
        dtype=np.int64,
    )
    device = into[0].device
    _call(_extension().accumulate, _index(device), pairs.ctypes.data, len(pairs), power == 2, zero, _stream(device))
    if zero:
        for gradient, copy in zip(gradients, dense, strict=True):
            if gradient.data_ptr() != copy.data_ptr():
                gradient.detach().zero_()


PRODUCTS_BYTES = 16 << 20  # multiplied at a time: still in the L2 cache when the squares are added


def outer_square_accumulate(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
    """into += sum_b (sum_t left_bgmt right_bgkt)^2: torch's batched product (cuBLAS), then the squares of what it left.

    Products are exact fp32 unless torch.backends.cuda.matmul.allow_tf32 lets the tensor cores round their inputs.

    Args:
        left: [B, G, M, T], any strides; dtype of `into`.
        right: [B, G, K, T], the same.
        into: flat [G * M * K], contiguous, fp32 or fp64.

    Raises:
        DTypeError: dtypes that differ or that the backend does not take.
        BackendError: a CUDA call failed.

    """
    samples, groups, m, t = left.shape
    k = right.shape[2]
    kind = _kind(into.dtype, FISHER_KINDS)
    if left.dtype != into.dtype or right.dtype != into.dtype:
        raise DTypeError(f"outer_square_accumulate: {left.dtype} and {right.dtype}, expected {into.dtype}")
    if into.numel() == 0 or samples == 0 or t == 0:
        return
    if t == 1 and groups == 1:  # one position: a product of squares
        into.view(m, k).addmm_(left.reshape(samples, m).square().t(), right.reshape(samples, k).square())
        return
    step = min(samples, max(1, PRODUCTS_BYTES // (into.numel() * into.element_size())))
    products = left.new_empty(step * groups, m, k)
    device, stream = _index(into.device), _stream(into.device)
    for at in range(0, samples, step):
        rows = min(step, samples - at)
        a, b = (x[at : at + rows].flatten(0, 1) for x in (left, right))
        torch.bmm(a, b.transpose(1, 2), out=products[: rows * groups])
        arguments = (device, into.data_ptr(), products.data_ptr(), rows, into.numel(), kind, stream)
        _call(_extension().add_squares, *arguments)


# ------------------------------------------------------------------------------------------------------------ helpers
def _extension() -> ModuleType:
    extension = _load()
    if isinstance(extension, str):
        raise BackendError(f"backend {name!r} cannot be used: {extension}")
    return extension


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except RuntimeError as error:  # names the CUDA call
        raise BackendError(f"backend {name!r}: {error}") from None


def _kind(dtype: torch.dtype, kinds: dict[torch.dtype, int]) -> int:
    if dtype not in kinds:
        raise DTypeError(f"backend {name!r} takes {', '.join(map(str, kinds))} here, found {dtype}")
    return kinds[dtype]


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
