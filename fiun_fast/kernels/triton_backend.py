"""The Triton backend: host side. One launch dampens every node of a work table; triton_kernels.py has the device code.

On a GPU it runs on the tensors' device and the current stream, and can be captured in a CUDA graph. Under
TRITON_INTERPRET=1 the same kernels run on the CPU, slowly, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from . import triton_host as host
from .extension import FISHER_KINDS, KINDS, kind, merge_kind, outer_square_without_kernel
from .interface import Backend, Histogram
from .prepared import PreparedDampening, numbers_of, stream, upload, upload_ordered
from .schedule import ranges
from .table import Dampening, Merging, Table, number_type

CACHE_SIZE = 32

_pairs_seen: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()


class TritonLaunch(PreparedDampening):
    """One program per tile."""

    def __init__(self, table: Table, merging: Merging, dampening: Dampening, workers: int | None = None) -> None:
        """Upload the tables, once; `workers` is how many programs run at once (None: what the device has room for)."""
        kind(host.NAME, table.theta_dtype, KINDS)
        kind(host.NAME, table.fisher_dtype, FISHER_KINDS)
        assert table.theta_dtype is not None
        power, dtypes = dampening.exponent != 1, (table.fisher_dtype, table.theta_dtype)
        self._constants = host.dampen_constants(*dtypes, merging.how, power, table.signed)
        workers = workers or host.resident(table.device, self._constants)
        super().__init__(table, dampening, host.grain(host.block_size(), workers, *dtypes))
        self._numbers = upload(numbers_of(merging, dampening, table.fisher_dtype), table.device)
        self._arguments = (*self.tables.tensors, self._numbers)

    laid_out = staticmethod(host.columns)

    def start(self, counts: torch.Tensor, dry_run: bool, stream: int) -> None:
        """One launch."""
        arguments = (*self._arguments, counts, int(not dry_run))
        host.launch(host.device_code().dampen, self.table.device, len(self.tiles), *arguments, **self._constants)

    def warmup(self) -> None:
        """Compile the kernel that this table needs and load it, without running it: the first run may be captured."""
        if not host.interpreted():
            with torch.cuda.device(self.table.device):
                flags = host.options(*host.target(self.table.device), self._constants)
                arguments = (*self._arguments, torch.int64, 1)
                kernel = host.device_code().dampen.warmup(*arguments, grid=(1,), **self._constants, **flags)
                kernel[(1, 1, 1)]  # asking for a launcher loads the machine code, which a capture would not allow


class TritonBackend(Backend):
    """Kernels that Triton compiles when they are first needed."""

    name = host.NAME

    def why_not(self, device_type: str) -> str | None:
        """None where these kernels can work on tensors of that device type, else the exact reason."""
        return host.why_not(device_type)

    def dampen(self, table: Table, merging: Merging, dampening: Dampening) -> TritonLaunch:
        """Prepare a dampening: cut the table into tiles, and upload them."""
        return TritonLaunch(table, merging, dampening)

    def histogram(self, table: Table, merging: Merging) -> Histogram:
        """Prepare a histogram: the same, in tiles of one node."""
        from .triton_histogram import TritonHistogram

        return TritonHistogram(table, merging)

    def merge(
        self, sources: Sequence[torch.Tensor], weights: Sequence[float], merging: Merging, out: torch.Tensor
    ) -> None:
        """One program per tile of `out`."""
        merge_kind(self.name, sources, out)
        if out.numel() == 0:
            return
        number = number_type(out.dtype)
        addresses = np.array([f.data_ptr() for f in sources], dtype=np.int64)
        aligned = not (addresses % 16).any() and out.data_ptr() % 16 == 0
        arrays = (addresses, np.array(weights).astype(number), np.array([merging.scale]).astype(number))
        tables = [upload_ordered(array, out.device) for array in arrays]
        grid = -(-out.numel() // host.block_size())
        numbers = (out.data_ptr(), out.numel(), len(addresses), int(aligned))
        constants = host.merge_constants(out.dtype, merging.how)
        host.launch(host.device_code().merge, out.device, grid, *tables, *numbers, **constants)

    def accumulate(
        self, gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor], power: int, zero: bool
    ) -> None:
        """One launch for all pairs that share a device and dtypes."""
        groups: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for gradient, total in zip(gradients, into, strict=True):
            kind(host.NAME, gradient.dtype, KINDS)
            kind(host.NAME, total.dtype, FISHER_KINDS)
            if gradient.numel() == 0:
                continue
            flat = gradient.detach().reshape(-1)  # a copy where the gradient's memory is in another order
            key = (total.device, flat.dtype, total.dtype, zero and flat.data_ptr() == gradient.data_ptr())
            groups.setdefault(key, []).append((flat, total))
        for (device, gradient_dtype, total_dtype, zeroes), pairs in groups.items():
            constants = host.accumulate_constants(gradient_dtype, total_dtype, power, zeroes)
            if len(pairs) == 1:  # from a hook: gradients arrive one by one, and addresses need no table
                (flat, total), numel = pairs[0], pairs[0][0].numel()
                numbers = (flat.data_ptr(), total.data_ptr(), numel)
                grid = -(-numel // host.block_size())
                host.launch(host.device_code().accumulate_one, device, grid, *numbers, **constants)
            else:
                rows = tuple((flat.data_ptr(), total.data_ptr(), flat.numel()) for flat, total in pairs)
                tiles, table = _pair_tables(rows, device)
                host.launch(host.device_code().accumulate, device, len(tiles), tiles, table, **constants)
        if zero:
            for gradient in gradients:
                if not gradient.is_contiguous():
                    gradient.detach().zero_()

    def outer_square_accumulate(self, left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
        """Products stay in registers; float64, which Triton cannot multiply on every GPU, is left to torch's bmm."""
        if outer_square_without_kernel(self.name, left, right, into):
            return
        samples, groups, m, t = left.shape
        k = right.shape[2]
        if into.dtype == torch.float64:
            for a, b in zip(left, right, strict=True):
                into.view(groups, m, k).add_(torch.bmm(a, b.transpose(1, 2)).square_())
            return
        constants = host.outer_constants()
        tiles = -(-m // constants["BLOCK_M"]) * -(-k // constants["BLOCK_K"])
        programs = host.ROUNDS * host.resident(into.device, constants)
        share = max(1, samples * tiles * groups // programs)
        grid = (tiles, groups, -(-samples // share))
        sizes = (samples, groups, m, k, t, *left.stride(), *right.stride(), share)
        with host.on(into.device):
            host.device_code().outer_square[grid](left, right, into, *sizes, **constants)


def _pair_tables(rows: tuple[tuple[int, int, int], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of `accumulate` for these addresses. Allocators repeat themselves, so most steps upload nothing."""
    block = host.block_size()
    key = (device, stream(device), block, rows)  # an upload is ordered with the stream it was made on alone
    if key not in _pairs_seen:
        pairs = np.array(rows, dtype=np.int64)
        chunks = -(-pairs[:, 2] // block)
        tiles = np.stack([np.repeat(np.arange(len(pairs)), chunks), ranges(0, chunks) * block], axis=1)
        _pairs_seen[key] = (upload_ordered(tiles, device), upload_ordered(pairs, device))
        if len(_pairs_seen) > CACHE_SIZE:
            _pairs_seen.popitem(last=False)
    _pairs_seen.move_to_end(key)
    return _pairs_seen[key]


BACKEND = TritonBackend()
