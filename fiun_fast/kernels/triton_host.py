"""What all Triton kernels share on the host: tile, options, constants, whether they run here, launching.

Others read the names here through the module, so that whoever measures other settings (gpu/timed.py) changes
them in one place.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..arguments import short
from .extension import KINDS, kind
from .schedule import Grain

NAME = "triton"
OLDEST_CAPABILITY = (8, 0)

# Fixed on purpose: no tuning at run time. Measured and argued in docs/kernels.md; `fiun-fast gpu` tries others.
BLOCK = 2048  # elements of a tile: 16 per thread, so four 16-byte loads in flight for each stream of fp32
INTERPRETED_BLOCK = 8192  # the interpreter's time goes by programs, hardly by elements
NUM_WARPS = 4
RESIDENT, RESIDENT_WIDE = 5, 3  # programs that fit on an SM at once, by their registers; the latter: in float64
MAX_REGISTERS = 96  # what 5 programs leave each thread; with 80, for 6, some versions of ptxas spill
MAX_REGISTERS_WIDE = 168
ROUNDS = 4  # programs for each that fits at once, where their work is shared out by number and not by cost
OUTER_TILE = {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_T": 32}  # the product and its squares: 64 registers per thread


@lru_cache
def device_code() -> ModuleType:
    """The kernels; imports Triton. Whether they are interpreted is decided by TRITON_INTERPRET at this moment."""
    from . import triton_kernels

    return triton_kernels


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    from triton.runtime.jit import JITFunction

    return not isinstance(device_code().dampen, JITFunction)


def version(text: str) -> tuple[int, ...]:
    """Major and minor version, to be compared."""
    return tuple(int(part) for part in text.split(".")[:2])


def block_size() -> int:
    """Elements of a tile."""
    return INTERPRETED_BLOCK if interpreted() else BLOCK


def histogram_block_size() -> int:
    """Elements of a histogram's tile: half as many, because the counts take registers too."""
    return block_size() if interpreted() else block_size() // 2


def vector_width(*dtypes: torch.dtype) -> int:
    """Elements of one row of a tile: 16 bytes of the narrowest dtype."""
    return 16 // min(dtype.itemsize for dtype in dtypes)


# ------------------------------------------------------------------------------------------------- availability
def why_not(device_type: str) -> str | None:
    """None where these kernels can work on tensors of that device type, else the exact reason."""
    if device_type not in ("cpu", "cuda"):
        return f"it does not work on {device_type} tensors"
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
    return why_no_driver()


def _why_no_interpreter() -> str | None:
    import triton

    if version(triton.__version__) < (3, 7) and version(np.__version__) >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__}: "
            "install numpy<2.4, or Triton 3.7 or newer"
        )
    return None


@lru_cache
def why_no_driver() -> str | None:
    """None where Triton's driver starts on the current GPU, else why not; found out once per process."""
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"the GPU has compute capability {found}; Triton needs 8.0"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # builds Triton's driver stub: needs a C compiler
    except Exception as error:
        return f"Triton's driver does not start: {type(error).__name__}: {error}"
    return None


# -------------------------------------------------------------------------------------------------------- options
def options(backend: str, arch: int, constants: dict[str, Any]) -> dict[str, Any]:
    """What depends on the target: "cuda" with its compute capability, such as 90, or "hip" with any number.

    Products and sums are never contracted: the bits are part of the contract.
    """
    flags: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    if backend == "cuda":
        flags["maxnreg"] = MAX_REGISTERS if _fits(constants) else MAX_REGISTERS_WIDE
    if "MERGE" in constants:
        flags["FLUSHES"] = backend == "cuda" and not interpreted() and division_flushes()
    if "POWER" in constants:  # what is written in PTX
        pairs = 100 <= arch < 120  # instructions of two numbers
        flags["QUICK"] = 0 if backend != "cuda" or interpreted() else 2 if pairs else 1
    return flags


@lru_cache
def division_flushes() -> bool:
    """Whether this Triton's `tl.div_rn` becomes div.rn.ftz.f32, which takes subnormal numbers for zero."""
    import triton

    return version(triton.__version__) < (3, 6)


def _fits(constants: dict[str, Any]) -> bool:
    """Whether MAX_REGISTERS are enough: not where a tile is computed in float64."""
    names = ("FISHER", "THETA", "GRADIENT", "INTO")
    return not (any(str(constants.get(name)) == "fp64" for name in names) or constants.get("POWER", False))


# ------------------------------------------------------------------------------------------------------ constants
def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype.

    Raises:
        DTypeError: it is none of the four floating-point dtypes that the kernels take.

    """
    import triton.language as tl

    kind(NAME, dtype, KINDS)
    return getattr(tl, short(dtype))


def _common(*dtypes: torch.dtype) -> dict[str, Any]:
    return {"BLOCK": block_size(), "VECTOR": vector_width(*dtypes), "SOFT": interpreted()}


def dampen_constants(
    fisher: torch.dtype, theta: torch.dtype, how: str, power: bool, signed: bool = False
) -> dict[str, Any]:
    """Compile-time arguments of the kernel `dampen`."""
    wide = torch.float32 if theta.itemsize == 2 else torch.promote_types(fisher, theta)
    types = {"FISHER": triton_type(fisher), "THETA": triton_type(theta), "COMPUTE": triton_type(wide)}
    step = block_size() // 2 if power or signed or wide == torch.float64 else block_size()
    return types | {"MERGE": how, "POWER": power, "SIGNED": signed, "STEP": step} | _common(fisher, theta)


def merge_constants(dtype: torch.dtype, how: str) -> dict[str, Any]:
    """Compile-time arguments of the kernel `merge`."""
    return {"FISHER": triton_type(dtype), "MERGE": how, "BLOCK": block_size(), "VECTOR": vector_width(dtype)}


def accumulate_constants(gradient: torch.dtype, into: torch.dtype, power: int, zero: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernels `accumulate` and `accumulate_one`."""
    types = {"GRADIENT": triton_type(gradient), "INTO": triton_type(into)}
    return types | {"SQUARE": power == 2, "ZERO": zero} | _common(gradient, into)


def outer_constants() -> dict[str, Any]:
    """Compile-time arguments of the kernel `outer_square`."""
    return {"PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee", **OUTER_TILE}


# -------------------------------------------------------------------------------------------------------- launches
def launch(kernel: Any, device: torch.device, grid: int, *arguments: Any, **constants: Any) -> None:
    """Start `grid` programs of a kernel on the device's current stream."""
    with on(device):
        kernel[(grid,)](*arguments, **constants, **options(*target(device), constants))


def target(device: torch.device) -> tuple[str, int]:
    """What Triton compiles for with this torch: "hip", or "cuda" with the compute capability; 0 where there is none."""
    if torch.version.hip:
        return "hip", 0
    return "cuda", _capability(device) if device.type == "cuda" else 0


@lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def resident(device: torch.device, constants: dict[str, Any]) -> int:
    """How many programs of such a kernel the device runs at once."""
    if device.type != "cuda":
        return 1
    each = RESIDENT if _fits(constants) else RESIDENT_WIDE
    return torch.cuda.get_device_properties(device).multi_processor_count * each


def grain(block: int, workers: int, *dtypes: torch.dtype, most_targets: int = 1 << 30) -> Grain:
    """What a program's tile may be: one block, its unaligned ends included."""
    return Grain(vector_width(*dtypes), block, 1, most_targets, workers, block)


def columns(tiles: np.ndarray) -> np.ndarray:
    """Tiles as the kernels read them, [T, 7] int64: start, length, first source, K, first target, N, aligned."""
    names = ("start", "length", "first_source", "sources", "first_target", "targets", "vector")
    return np.stack([tiles[name] for name in names], axis=1)


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Make a GPU the current device, to which Triton launches; on a CPU, silence NumPy under the interpreter.

    NumPy would warn of 0 / 0 in elements that are not selected.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        with np.errstate(all="ignore"):
            yield
