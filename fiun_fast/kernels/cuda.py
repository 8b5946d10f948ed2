"""The `cuda` backend: the kernels of csrc/cuda over a work table, compiled ahead of time, for NVIDIA GPUs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..arguments import MERGE_RULES
from ..errors import BackendError
from . import extension as extensions
from .extension import FISHER_KINDS, KINDS, kind, merge_kind, outer_square_without_kernel, pairs_of
from .interface import Backend
from .prepared import PreparedDampening, PreparedHistogram, stream
from .schedule import Grain
from .table import Dampening, Merging, Table

DRIVERS = {12: "525", 13: "580"}  # the first Linux driver for each major version of the toolkit
MOST_STEPS = 8  # of a tile: long enough that finding it costs nothing, short enough to share out evenly
AMD = "this torch is built for AMD GPUs, which the triton backend is for"
PRODUCTS_BYTES = 16 << 20  # multiplied at a time: still in the L2 cache when the squares are added


# --------------------------------------------------------------------------------------------------- the extension
@functools.cache
def load() -> ModuleType | str:
    """The extension module, or the reason why there is none."""
    return extensions.load(
        "_cuda",
        "its extension",
        "its extension was not built: there was no nvcc, or no GPU on the machine that built the package; install the "
        "CUDA toolkit (docs/clusters.md), then run `FIUN_FAST_CUDA=1 pip install --force-reinstall --no-deps "
        "--no-cache-dir` on fiun_fast's source again",
    )


def runs_on(capability: int, inside: Sequence[str], ptx: bool = True) -> bool:
    """Whether a GPU of that compute capability (90 for 9.0) can run one of these architectures.

    Machine code runs on its own capability and later minor ones, PTX on all that came after. `ptx` is False where the
    driver is older than the toolkit: then PTX does not count.
    """
    for architecture in inside:
        number, _, is_ptx = architecture.partition("+")
        if capability >= int(number) and (ptx if is_ptx else capability // 10 == int(number) // 10):
            return True
    return False


class CudaExtension:
    """An extension module of csrc/cuda that is loaded when it is first needed.

    Args:
        backend: its name in error messages.
        find: gives the module, or the reason why there is none.

    """

    def __init__(self, backend: str, find: Callable[[], ModuleType | str]) -> None:
        self.backend = backend
        self._find = find

    def module(self) -> ModuleType:
        """The extension module; a BackendError where there is none."""
        return extensions.require(self.backend, self._find())

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the module; a BackendError names the CUDA call that failed."""
        try:
            return function(*arguments)
        except RuntimeError as error:
            raise BackendError(f"backend {self.backend!r}: {error}") from None

    def architectures(self) -> list[str]:
        """The architectures that the extension has code for, as ["80", "90", "90+PTX"].

        Raises:
            BackendError: it is missing.

        """
        return self.module().architectures.split(",")

    def driver(self) -> str:
        """Version of the NVIDIA driver, and the newest CUDA it is for; "none" where there is none.

        Raises:
            BackendError: the extension is missing, or a CUDA call failed.

        """
        newest = self.call(self.module().driver_version)
        if newest == 0:
            return "none"
        kernel_module = Path("/proc/driver/nvidia/version")
        found = re.search(r"(\d+\.\d+(\.\d+)?)  ", kernel_module.read_text()) if kernel_module.exists() else None
        return f"{found[1] if found else 'of unknown version'}, for CUDA up to {_dotted(newest)}"

    def toolkit(self) -> str:
        """Version of the CUDA toolkit that the extension was built with, and the driver it needs.

        Raises:
            BackendError: it is missing.

        """
        version = self.module().toolkit_version
        return f"CUDA {_dotted(version)}, which needs driver {DRIVERS.get(version // 1000, 'of that version')} or newer"

    def why_not(self) -> str | None:
        """None where the extension is there and a GPU of this machine can run it, else why not."""
        found = self._find()
        if isinstance(found, str):
            return found if torch.version.hip is None else AMD
        return self._reason

    @functools.cached_property
    def _reason(self) -> str | None:
        return self.why_not_here()

    def why_not_here(self) -> str | None:
        """None where a GPU of this machine can run what the extension has inside, else why not.

        Raises:
            BackendError: the extension is missing.

        """
        module = self.module()
        if torch.version.hip is not None:
            return AMD
        driver, needed = module.driver_version(), module.toolkit_version
        if driver == 0:
            return "no NVIDIA driver is installed"
        if driver // 1000 < needed // 1000:
            return (
                f"the driver is for CUDA {_dotted(driver)}; the extension is built with {self.toolkit()} "
                "(docs/clusters.md: building for older drivers)"
            )
        if not torch.cuda.is_available():
            return "torch finds no GPU" if torch.version.cuda else "this torch is built without CUDA"
        try:
            found = module.capabilities()
        except RuntimeError as error:
            return str(error)
        inside = self.architectures()
        if not any(runs_on(capability, inside, driver >= needed) for capability in found):
            listed = ", ".join(f"{capability / 10:.1f}" for capability in found)
            old = "" if driver >= needed else f" by a driver for CUDA {_dotted(driver)}, which takes no newer PTX"
            return f"it has code for {', '.join(inside)}, and none that runs on compute capability {listed}{old}"
        return None


# -------------------------------------------------------------------------------------------------------- launches
def grain(module: ModuleType, theta: int, fisher: int, most_targets: int, warps: int) -> Grain:
    """What a warp's tile may be, for parameters and Fishers of these kinds."""
    unit, step = module.tile_shape(theta, fisher)
    return Grain(unit, step, MOST_STEPS, most_targets, warps, unit)


def _as_bytes(tiles: np.ndarray) -> np.ndarray:
    return tiles.view(np.uint8)


def _with_gradients(table: Table, uploaded: Sequence[int]) -> list[int]:
    """Addresses of `tables_of`, with a null pointer in the place of gradients for none."""
    return list(uploaded) if table.signed else [uploaded[0], 0, *uploaded[2:]]


class CudaLaunch(PreparedDampening):
    """A persistent grid: each warp takes tile after tile."""

    def __init__(self, extension: CudaExtension, table: Table, merging: Merging, dampening: Dampening) -> None:
        module, device = extension.module(), _index(table.device)
        theta = kind(extension.backend, table.theta_dtype, KINDS)
        fisher = kind(extension.backend, table.fisher_dtype, FISHER_KINDS)
        warps = extension.call(module.resident_warps, device, theta, fisher, dampening.exponent != 1, table.signed)
        super().__init__(table, dampening, grain(module, theta, fisher, module.tile_targets, warps))
        self._extension = extension
        tiles, *others = (tensor.data_ptr() for tensor in self.tables.tensors)
        self._before = (device, tiles, len(self.tiles), *_with_gradients(table, others))
        self._after = (theta, fisher, MERGE_RULES.index(merging.how), merging.scale, dampening.exponent, dampening.cap)

    laid_out = staticmethod(_as_bytes)

    def start(self, counts: torch.Tensor, dry_run: bool, stream: int) -> None:
        """One call into the extension."""
        dampen = self._extension.module().dampen
        self._extension.call(dampen, *self._before, counts.data_ptr(), *self._after, dry_run, stream)


class CudaHistogram(PreparedHistogram):
    """A persistent grid: each warp takes run after run."""

    def __init__(self, extension: CudaExtension, table: Table, merging: Merging) -> None:
        module, device = extension.module(), _index(table.device)
        fisher = kind(extension.backend, table.fisher_dtype, FISHER_KINDS)
        theta = kind(extension.backend, table.theta_dtype, KINDS) if table.signed else 0  # looked at for its sign alone
        warps = extension.call(module.histogram_warps, device, theta, fisher, table.signed)
        super().__init__(table, grain(module, fisher, fisher, 1, warps))
        self._extension = extension
        tiles, runs, *others = (tensor.data_ptr() for tensor in self.tables.tensors)
        self._before = (device, tiles, runs, self.runs, *_with_gradients(table, others))
        self._after = (theta, fisher, MERGE_RULES.index(merging.how), merging.scale)

    laid_out = staticmethod(_as_bytes)

    def start(self, counts: torch.Tensor, bases: torch.Tensor, low: int, nearest: bool, stream: int) -> None:
        """One call into the extension."""
        addresses, how = (bases.data_ptr(), counts.data_ptr()), (low, nearest, stream)
        self._extension.call(self._extension.module().histogram, *self._before, *addresses, *self._after, *how)


class CudaBackend(Backend):
    """Launches of an extension that was built from csrc/cuda.

    Args:
        extension: the one that has the kernels; the backend has its name.
        device_type: of the tensors that the kernels work on.

    """

    def __init__(self, extension: CudaExtension, device_type: str = "cuda") -> None:
        self.name = extension.backend
        self.extension = extension
        self.device_type = device_type

    def why_not(self, device_type: str) -> str | None:
        """None where the extension has code for a GPU of this machine; else the reason why it cannot be used."""
        if device_type != self.device_type:
            return "it works on tensors in GPU memory only"
        return self.extension.why_not()

    def dampen(self, table: Table, merging: Merging, dampening: Dampening) -> CudaLaunch:
        """Prepare a dampening: cut the table into tiles for the GPU it is on, and upload them."""
        return CudaLaunch(self.extension, table, merging, dampening)

    def histogram(self, table: Table, merging: Merging) -> CudaHistogram:
        """Prepare a histogram."""
        return CudaHistogram(self.extension, table, merging)

    def merge(
        self, sources: Sequence[torch.Tensor], weights: Sequence[float], merging: Merging, out: torch.Tensor
    ) -> None:
        """Addresses travel as arguments of the kernel: nothing is uploaded."""
        number = merge_kind(self.name, sources, out)
        addresses = np.array([source.data_ptr() for source in sources], dtype=np.int64)
        factors = np.array(weights, dtype=np.float64)
        self.extension.call(
            self.extension.module().merge,
            _index(out.device),
            addresses.ctypes.data,
            factors.ctypes.data,
            len(addresses),
            out.data_ptr(),
            out.numel(),
            number,
            MERGE_RULES.index(merging.how),
            merging.scale,
            stream(out.device),
        )

    def accumulate(
        self, gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor], power: int, zero: bool
    ) -> None:
        """A kernel for each pair of dtypes; addresses travel as its arguments."""
        if not gradients:
            return
        dense = [gradient.detach().contiguous() for gradient in gradients]
        pairs = pairs_of(self.name, dense, into)
        device, module = into[0].device, self.extension.module()
        arguments = (_index(device), pairs.ctypes.data, len(pairs), power == 2, zero, stream(device))
        self.extension.call(module.accumulate, *arguments)
        if zero:
            for gradient, copy in zip(gradients, dense, strict=True):
                if gradient.data_ptr() != copy.data_ptr():
                    gradient.detach().zero_()

    def outer_square_accumulate(self, left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
        """torch's batched product (cuBLAS), then a kernel that adds up the squares of the products.

        Products are exact fp32 unless torch.backends.cuda.matmul.allow_tf32 lets the tensor cores round their inputs.
        """
        if outer_square_without_kernel(self.name, left, right, into):
            return
        samples, groups, m, _ = left.shape
        step = min(samples, max(1, PRODUCTS_BYTES // (into.numel() * into.element_size())))
        products = left.new_empty(step * groups, m, right.shape[2])
        number, device, current = FISHER_KINDS[into.dtype], _index(into.device), stream(into.device)
        add_squares = self.extension.module().add_squares
        for at in range(0, samples, step):
            rows = min(step, samples - at)
            a, b = (x[at : at + rows].flatten(0, 1) for x in (left, right))
            torch.bmm(a, b.transpose(1, 2), out=products[: rows * groups])
            arguments = (device, into.data_ptr(), products.data_ptr(), rows, into.numel(), number, current)
            self.extension.call(add_squares, *arguments)


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


BACKEND = CudaBackend(CudaExtension("cuda", load))
