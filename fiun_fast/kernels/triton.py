"""The Triton backend: host side. One launch dampens every node of a work table; triton_kernels.py has the device code.

On a GPU it runs on the tensors' device and the current stream, and can be captured in a CUDA graph. Under
TRITON_INTERPRET=1 the same kernels run on the CPU, slowly, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import DTypeError
from .table import DampenTable

name = "triton"

# Fixed on purpose: no tuning at run time. Measured and argued in docs/kernels.md; bench/tune_triton.py tries others.
BLOCK = 2048  # elements of a tile: 16 a thread, so four 16-byte loads in flight for each stream of fp32
INTERPRETED_BLOCK = 8192  # the interpreter pays by the program, hardly by the element
NUM_WARPS = 4
PROGRAMS_PER_SM = 5 * 4  # 5 programs fit on an SM at once (registers); 4 rounds of them even out the tail
MAX_REGISTERS = 96  # what 5 programs leave each thread; with 80, for 6, some versions of ptxas spill
MAX_REGISTERS_WIDE = 168  # for 3 programs, where a tile is computed in float64
OLDEST_CAPABILITY = (8, 0)
TILE_FIELDS = ("start", "length", "first_source", "sources", "first_target", "targets", "aligned")

LIMITS = 4  # alpha and lambda among the arguments of `dampen`

_TYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# ---------------------------------------------------------------------------------------------------- availability
@lru_cache
def device_code() -> ModuleType:
    """The kernels; imports Triton. Whether they are interpreted is decided by TRITON_INTERPRET at this moment."""
    from . import triton_kernels

    return triton_kernels


@lru_cache
def squares_code() -> ModuleType:
    """The kernel of outer_square_accumulate; imports Triton."""
    from . import triton_squares

    return triton_squares


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    from triton.runtime.jit import JITFunction

    return not isinstance(device_code().dampen, JITFunction)


def block_size() -> int:
    """Elements of a tile."""
    return INTERPRETED_BLOCK if interpreted() else BLOCK


def why_not(device_type: str) -> str | None:
    """None where these kernels can work on tensors of that device type, else the exact reason."""
    if device_type not in ("cpu", "cuda"):
        return f"it has no path for {device_type} tensors"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    asked = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if device_type == "cpu" and not asked:
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before starting Python"
    try:
        interprets = interpreted()
    except Exception as error:  # a broken or too old Triton fails in ways of its own; doctor shows which
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    if device_type == "cpu":
        if not interprets:
            return "TRITON_INTERPRET was set after the kernels were imported; set it earlier"
        return _why_no_interpreter()
    if interprets:
        return "TRITON_INTERPRET is set, and the interpreter cannot reach GPU memory"
    return _why_no_driver()


def _version(text: str) -> tuple[int, ...]:
    """Major and minor, to be compared."""
    return tuple(int(part) for part in text.split(".")[:2])


def _why_no_interpreter() -> str | None:
    import triton

    if _version(triton.__version__) < (3, 7) and _version(np.__version__) >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__}: "
            "install numpy<2.4, or Triton 3.7 or newer"
        )
    return None


@lru_cache
def _why_no_driver() -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"the GPU has compute capability {found}; Triton needs 8.0"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # builds Triton's driver stub: needs a C compiler
    except Exception as error:
        return f"Triton's driver does not start: {type(error).__name__}: {error}"
    return None


# --------------------------------------------------------------------------------------------------------- schedule
def vector_width(*dtypes: torch.dtype) -> int:
    """Elements of one row of a tile: 16 bytes of the narrowest type."""
    return 16 // min(dtype.itemsize for dtype in dtypes)


def schedule(table: DampenTable, programs: int, block: int | None = None) -> np.ndarray:
    """Cut the table's rows into tiles: chunks of `block` elements times shares of the row's nodes.

    Nodes are split over tiles only until there are about `programs` tiles of even work: each share of nodes merges
    its chunk of the forget Fishers again, mostly from L2. Tiles of one chunk are neighbours, so that they meet there.

    Returns: [T, 7] int64, columns as in TILE_FIELDS.

    """
    block = block or block_size()
    length, first_source, source_count, first_target, target_count = table.rows.T
    vector = vector_width(table.theta_dtype, table.fisher_dtype)
    head, alignable = _phases(table, vector)
    first_chunk = np.where(alignable & (head > 0), block - vector + head, block)  # later chunks start aligned
    chunks = 1 + np.maximum(0, -(-(length - first_chunk) // block))
    share = max(1, int((chunks * target_count).sum()) // programs)
    splits = -(-target_count // np.minimum(share, target_count))

    per_row = chunks * splits
    row = np.repeat(np.arange(len(length)), per_row)
    index = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    chunk, split = np.divmod(index, splits[row])
    start = np.where(chunk == 0, 0, first_chunk[row] + (chunk - 1) * block)
    count = np.minimum(length[row], first_chunk[row] + chunk * block) - start
    node = target_count[row] * split // splits[row]  # shares differ by one node at most
    next_node = target_count[row] * (split + 1) // splits[row]
    aligned = alignable[row] & ((start - head[row]) % vector == 0) & (count % vector == 0)
    columns = (start, count, first_source[row], source_count[row], first_target[row] + node, next_node - node, aligned)
    return np.stack(columns, axis=1).astype(np.int64)[count > 0]


def _phases(table: DampenTable, vector: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row: elements before the first 16-byte boundary, and whether all its tensors agree on that."""
    theta_size, fisher_size = table.theta_dtype.itemsize, table.fisher_dtype.itemsize
    _, first_source, source_count, first_target, target_count = table.rows.T
    narrowest = 0 if theta_size <= fisher_size else 1
    head = -(table.targets[first_target, narrowest] // min(theta_size, fisher_size)) % vector
    sources = (table.sources[_spans(first_source, source_count)] + np.repeat(head, source_count) * fisher_size) % 16
    targets = table.targets[_spans(first_target, target_count)]
    target_head = np.repeat(head, target_count)
    misfits = (targets[:, 0] + target_head * theta_size) % 16 + (targets[:, 1] + target_head * fisher_size) % 16
    alignable = np.add.reduceat(sources, np.cumsum(source_count) - source_count) == 0
    alignable &= np.add.reduceat(misfits, np.cumsum(target_count) - target_count) == 0
    return head, alignable


def _spans(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Indices first[0] .. first[0] + count[0] - 1, first[1] .. and so on."""
    return np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)


def bytes_moved(tiles: np.ndarray, table: DampenTable) -> int:
    """Bytes of F, I and theta that these tiles load and store where something is selected in every 16 bytes."""
    length, sources, targets = tiles[:, 1], tiles[:, 3], tiles[:, 5]
    fisher = table.fisher_dtype.itemsize * length * (sources + targets)
    return int((fisher + 2 * table.theta_dtype.itemsize * length * targets).sum())


# ----------------------------------------------------------------------------------------------------------- launch
class DampenLaunch:
    """A prepared dampening: call it as often as wanted. It allocates nothing and never waits for the device."""

    def __init__(self, table: DampenTable, programs: int | None = None) -> None:
        """Upload the tables, once; `programs` is how many tiles to aim at (None: what fills the device)."""
        self.table = table
        self.tiles = schedule(table, programs or _programs(table.device))
        number = torch.empty(0, dtype=table.fisher_dtype).numpy().dtype
        host = (
            self.tiles,
            table.sources,
            table.weights.astype(number),
            table.targets,
            table.limits(number),
            np.array([table.scale, table.exponent, table.cap]).astype(number),
        )
        # a blocking copy: whichever stream launches later finds the tables there
        self._arguments = [torch.from_numpy(np.ascontiguousarray(a)).to(table.device) for a in host] + [table.counts]
        self._uploaded_on = _stream(table.device)
        self._constants = dampen_constants(table.fisher_dtype, table.theta_dtype, table.merge, table.exponent != 1)

    def __call__(self, dry_run: bool = False) -> None:
        """Dampen every node of the table, or only count."""
        device = self.table.device
        if _stream(device) != self._uploaded_on:  # keeps their memory for this stream, should the plan go away first
            for tensor in self._arguments:
                tensor.record_stream(torch.cuda.current_stream(device))
        self.table.counts.zero_()
        if len(self.tiles):
            _launch("dampen", device, len(self.tiles), *self._arguments, int(not dry_run), **self._constants)

    def refresh(self) -> None:
        """Upload table.alpha and table.lam again, after they were written to."""
        limits = self._arguments[LIMITS]
        limits.copy_(torch.from_numpy(self.table.limits(torch.empty(0, dtype=limits.dtype).numpy().dtype)))

    def warmup(self) -> None:
        """Compile the kernel that this table needs and load it, without running it: the first run may be captured."""
        if not interpreted():
            with torch.cuda.device(self.table.device):
                flags = options(_backend(), self._constants)
                kernel = device_code().dampen.warmup(*self._arguments, 1, grid=(1,), **self._constants, **flags)
                kernel[(1, 1, 1)]  # asking for a launcher loads the machine code, which a capture would not allow


def dampen(table: DampenTable) -> DampenLaunch:
    """Prepare a launch: the returned object dampens every node of the table, or with dry_run only counts."""
    return DampenLaunch(table)


def histogram(table: DampenTable) -> Callable[[np.ndarray, int, bool, torch.Tensor], None]:
    """Prepare a count of the ratios m / I of every node, as `reference.histogram`."""
    from .triton_histogram import HistogramLaunch

    return HistogramLaunch(table)


def merge(sources: Sequence[torch.Tensor], weights: Sequence[float], how: str, scale: float, out: torch.Tensor) -> None:
    """Write m = scale * reduce_k (w_k F_k) to `out`; all are flat [n], contiguous, of one dtype and device."""
    if out.numel() == 0:
        return
    number = torch.empty(0, dtype=out.dtype).numpy().dtype
    addresses = np.array([f.data_ptr() for f in sources], dtype=np.int64)
    aligned = not (addresses % 16).any() and out.data_ptr() % 16 == 0
    tables = [
        _upload(a, out.device) for a in (addresses, np.array(weights).astype(number), np.array([scale]).astype(number))
    ]
    grid = -(-out.numel() // block_size())
    numbers = (out.data_ptr(), out.numel(), len(addresses), int(aligned))
    _launch("merge", out.device, grid, *tables, *numbers, **merge_constants(out.dtype, how))


def accumulate(gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor], power: int, zero: bool) -> None:
    """For each pair: into += |g| (power 1) or g^2 (power 2), in the accumulator's dtype; with `zero`, g becomes 0.

    One launch for all pairs that share device and dtypes. `into` are contiguous.
    """
    groups: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for gradient, total in zip(gradients, into, strict=True):
        if gradient.numel() == 0:
            continue
        flat = gradient.detach().reshape(-1)  # a copy where the gradient's memory is in another order
        key = (total.device, flat.dtype, total.dtype, zero and flat.data_ptr() == gradient.data_ptr())
        groups.setdefault(key, []).append((flat, total))
    for (device, gradient_dtype, total_dtype, zeroes), pairs in groups.items():
        constants = accumulate_constants(gradient_dtype, total_dtype, power, zeroes)
        if len(pairs) == 1:  # from a hook: gradients arrive one by one, and addresses need no table
            (flat, total), numel = pairs[0], pairs[0][0].numel()
            numbers = (flat.data_ptr(), total.data_ptr(), numel)
            _launch("accumulate_one", device, -(-numel // block_size()), *numbers, **constants)
        else:
            rows = tuple((flat.data_ptr(), total.data_ptr(), flat.numel()) for flat, total in pairs)
            tiles, table = _pair_tables(rows, device)
            _launch("accumulate", device, len(tiles), tiles, table, **constants)
    if zero:
        for gradient in gradients:
            if not gradient.is_contiguous():
                gradient.detach().zero_()


OUTER_TILE = {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_T": 32}  # the product and its squares: 64 registers a thread


def outer_square_accumulate(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
    """into += sum_b (sum_t left_bgmt right_bgkt)^2; products stay in registers. triton_squares.py says how.

    With one position and one group it is torch's product of squares; float64, which Triton does not multiply on every
    GPU, is torch's batched product.

    Args:
        left: [B, G, M, T], any strides; dtype of `into`.
        right: [B, G, K, T], the same.
        into: flat [G * M * K], contiguous, fp32 or fp64.

    Raises:
        DTypeError: dtypes that differ.

    """
    samples, groups, m, t = left.shape
    k = right.shape[2]
    if left.dtype != into.dtype or right.dtype != into.dtype:
        raise DTypeError(f"outer_square_accumulate: {left.dtype} and {right.dtype}, expected {into.dtype}")
    if into.numel() == 0 or samples == 0 or t == 0:
        return
    if t == 1 and groups == 1:
        into.view(m, k).addmm_(left.reshape(samples, m).square().t(), right.reshape(samples, k).square())
    elif into.dtype == torch.float64:
        for a, b in zip(left, right, strict=True):
            into.view(groups, m, k).add_(torch.bmm(a, b.transpose(1, 2)).square_())
    else:
        tiles = -(-m // OUTER_TILE["BLOCK_M"]) * -(-k // OUTER_TILE["BLOCK_K"])
        share = max(1, samples * tiles * groups // _programs(into.device))
        grid = (tiles, groups, -(-samples // share))
        sizes = (samples, groups, m, k, t, *left.stride(), *right.stride(), share)
        with _on(into.device):
            squares_code().outer_square[grid](left, right, into, *sizes, **outer_constants())


def outer_constants() -> dict[str, Any]:
    """Compile-time arguments of the kernel `outer_square`."""
    return {"PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee", **OUTER_TILE}


_pair_cache: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()
_PAIR_CACHE_SIZE = 32


def _pair_tables(rows: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of `accumulate` for these addresses. Allocators repeat themselves, so most steps upload nothing."""
    key = (device, _stream(device), rows)  # the upload is ordered with the stream that it was made on, and no other
    if key not in _pair_cache:
        pairs = np.array(rows, dtype=np.int64)
        chunks = -(-pairs[:, 2] // block_size())
        pair = np.repeat(np.arange(len(pairs)), chunks)
        start = (np.arange(len(pair)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * block_size()
        _pair_cache[key] = (_upload(np.stack([pair, start], axis=1), device), _upload(pairs, device))
        if len(_pair_cache) > _PAIR_CACHE_SIZE:
            _pair_cache.popitem(last=False)
    _pair_cache.move_to_end(key)
    return _pair_cache[key]


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    """The current stream, as CUDA calls it; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _programs(device: torch.device) -> int:
    """How many programs fill the device."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_SM


def _launch(kernel: str, device: torch.device, grid: int, *arguments: Any, **constants: Any) -> None:
    launch(getattr(device_code(), kernel), device, grid, *arguments, **constants)


def launch(kernel: Any, device: torch.device, grid: int, *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the device's current stream."""
    with _on(device):
        kernel[(grid,)](*arguments, **constants, **options(_backend(), constants))


def _backend() -> str:
    return "hip" if torch.version.hip else "cuda"


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device; numpy, under the interpreter, would warn of 0/0 in unselected elements."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        with np.errstate(all="ignore"):
            yield


# -------------------------------------------------------------------------------------------- compile-time constants
def options(backend: str, constants: dict[str, Any]) -> dict[str, Any]:
    """What depends on the target. Products and sums are never contracted: the bits are part of the contract."""
    flags: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    if backend == "cuda":
        flags["maxnreg"] = MAX_REGISTERS if _fits(constants) else MAX_REGISTERS_WIDE
    if "MERGE" in constants:
        flags["FLUSHES"] = backend == "cuda" and not interpreted() and _division_flushes()
    return flags


@lru_cache
def _division_flushes() -> bool:
    """Whether this Triton's `tl.div_rn` becomes div.rn.ftz.f32, which takes subnormal numbers for zero."""
    import triton

    return _version(triton.__version__) < (3, 6)


def _fits(constants: dict[str, Any]) -> bool:
    """Whether MAX_REGISTERS are enough: not where a tile is computed in float64."""
    names = ("FISHER", "THETA", "GRADIENT", "INTO")
    return not (any(str(constants.get(name)) == "fp64" for name in names) or constants.get("POWER", False))


def _common(*dtypes: torch.dtype) -> dict[str, Any]:
    return {"BLOCK": block_size(), "VECTOR": vector_width(*dtypes), "SOFT": interpreted()}


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype.

    Raises:
        DTypeError: it is none of the four floating-point types that the kernels take.

    """
    import triton.language as tl

    if dtype not in _TYPES:
        raise DTypeError(f"the triton backend takes {', '.join(_TYPES.values())}, not {dtype}")
    return getattr(tl, _TYPES[dtype])


def dampen_constants(fisher: torch.dtype, theta: torch.dtype, how: str, power: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernel `dampen`."""
    wide = torch.float32 if theta.itemsize == 2 else torch.promote_types(fisher, theta)
    types = {"FISHER": triton_type(fisher), "THETA": triton_type(theta), "COMPUTE": triton_type(wide)}
    step = block_size() // 2 if power or wide == torch.float64 else block_size()
    return types | {"MERGE": how, "POWER": power, "STEP": step} | _common(fisher, theta)


def merge_constants(dtype: torch.dtype, how: str) -> dict[str, Any]:
    """Compile-time arguments of the kernel `merge`."""
    return {"FISHER": triton_type(dtype), "MERGE": how, "BLOCK": block_size(), "VECTOR": vector_width(dtype)}


def accumulate_constants(gradient: torch.dtype, into: torch.dtype, power: int, zero: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernels `accumulate` and `accumulate_one`."""
    types = {"GRADIENT": triton_type(gradient), "INTO": triton_type(into)}
    return types | {"SQUARE": power == 2, "ZERO": zero} | _common(gradient, into)
