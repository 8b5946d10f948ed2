"""One number for each element of a layout, in one buffer: what Fishers and gradients have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .arguments import FISHER_DTYPES, short
from .dtensors import is_dtensor, local_tensor
from .errors import ArgumentError, DeviceError, DTypeError, LayoutError
from .guards import denormals_kept
from .kernels.cpu import expect_writes
from .layout import Layout
from .memory import all_plain, check_addressable, check_no_mode, check_one_device, flaw_of, has_no_shape

if TYPE_CHECKING:
    from typing_extensions import Self


class Vector:
    """Numbers over a layout, float32 or float64.

    Args:
        buffer: [layout.numel], contiguous; kept, not copied.
        layout: what the numbers belong to.

    Raises:
        DTypeError, LayoutError, DeviceError: the buffer is of another dtype or shape, not contiguous, or has no memory
            of its own (a DTensor, on meta, …).

    """

    def __init__(self, buffer: torch.Tensor, layout: Layout) -> None:
        if not isinstance(layout, Layout):
            raise ArgumentError(f"layout is a {type(layout).__name__}, expected a fiun_fast.Layout")
        check_buffer(f"{type(self).__name__} buffer", buffer, layout)
        self.buffer = buffer.detach()
        self.layout = layout

    def _with(self, buffer: torch.Tensor, layout: Layout | None = None) -> Self:
        """The same over another buffer, or another layout as well."""
        return type(self)(buffer, self.layout if layout is None else layout)

    def part(self, layout: Layout) -> Self:
        """A copy of the parts that a layout's shards say, of the same parameters.

        Raises:
            LayoutError: a parameter is not here, or has another shape than the layout's whole one.

        """
        views = self.as_dict()
        pieces = []
        for s in layout:
            own = self.layout[s.name]
            if own.fits(s):
                pieces.append(views[s.name].reshape(-1))
            elif own.shard is None and s.shard is not None and own.shape == s.shard.shape:
                block = tuple(slice(at, at + n) for at, n in zip(s.shard.start, s.shape, strict=True))
                pieces.append(views[s.name][block].reshape(-1))
            else:
                raise LayoutError(f"{s.name!r} is {own}, and its part {s} is asked for")
        return self._with(torch.cat(pieces), layout)

    def __getitem__(self, name: str) -> torch.Tensor:
        """View of one parameter's entries, in its shape."""
        segment = self.layout[name]
        self.check_memory(type(self).__name__)
        return self.buffer[segment.offset : segment.offset + segment.numel].view(segment.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Float32 or float64."""
        return self.buffer.dtype

    @property
    def device(self) -> torch.device:
        """Where the buffer lies."""
        return self.buffer.device

    @property
    def numel(self) -> int:
        """Elements."""
        return self.layout.numel

    def check_memory(self, where: str) -> None:
        """Raise a FiunError that begins with `where`, if the buffer was replaced by one that does not fit, or freed."""
        check_buffer(f"{where}: its buffer", vars(self).get("buffer"), self.layout)

    def as_dict(self) -> dict[str, torch.Tensor]:
        """Name -> view into the buffer, in the parameter's shape; `torch.save` of one view writes the whole buffer."""
        self.check_memory(type(self).__name__)
        return self.layout.views(self.buffer)

    @denormals_kept()
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same on another device or in float32/float64; itself where nothing changes."""
        self.check_memory(type(self).__name__)
        try:
            moved = self.buffer.to(device=device, dtype=dtype)
        except (RuntimeError, AssertionError, TypeError) as error:  # a device that is not here, or is none
            what, why = type(self).__name__, str(error).partition("\n")[0]
            raise DeviceError(f"{what} cannot be moved to {device!r}: {why}") from error
        return self if moved is self.buffer else self._with(moved)

    def sha256(self) -> str:
        """SHA-256, hex: of dtype and layout as a line of JSON, then of the numbers, little-endian. Reads the buffer.

        The line is `{"dtype": "float32", "layout": [["fc.weight", [10, 64]], …]}` and a newline.
        """
        self.check_memory(type(self).__name__)
        kind = short(self.dtype)
        head = {"dtype": kind, "layout": [[segment.name, list(segment.shape)] for segment in self.layout]}
        digest = hashlib.sha256((json.dumps(head, sort_keys=True) + "\n").encode())
        for piece in self.buffer.split(1 << 24):  # from a GPU piece by piece
            digest.update(piece.detach().cpu().numpy().astype(f"<f{self.buffer.itemsize}", copy=False).data)
        return digest.hexdigest()


def check_buffer(where: str, buffer: Any, layout: Layout) -> None:
    """Raise an error that begins with `where`, unless the buffer is plain memory [layout.numel], float32 or float64."""
    if (flaw := flaw_of(buffer)) is not None:
        raise flaw.raised(where)
    if buffer.dtype not in FISHER_DTYPES:
        raise DTypeError(f"{where} is {buffer.dtype}, expected float32 or float64")
    if buffer.dim() != 1 or buffer.numel() != layout.numel:
        raise LayoutError(f"{where} has shape {list(buffer.shape)}, expected [{layout.numel}] for {layout!r}")
    if not buffer.is_contiguous():
        raise LayoutError(f"{where} is not contiguous; pass buffer.contiguous()")


def all_fit(vectors: Sequence[Vector]) -> bool:
    """Whether each has the memory that its layout needs: `Vector.check_memory` for many; False where unsure."""
    buffers: list[Any] = [vars(vector).get("buffer") for vector in vectors]
    return all_plain(buffers) and all(
        buffer.dtype in FISHER_DTYPES and buffer.shape == (vector.layout.numel,)
        for buffer, vector in zip(buffers, vectors, strict=True)
    )


def flattened(values: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Layout]:
    """Name -> tensor as one buffer, in float32 or float64, and its layout.

    Raises:
        ArgumentError, DTypeError, DeviceError, FiunError: as `Fisher.from_dict`, but for negative entries.

    """
    check_no_mode()
    if not isinstance(values, Mapping) or not values:
        raise ArgumentError(f"expected a non-empty dict of name -> tensor, found {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(f"{name!r} is a {type(value).__name__}, expected a tensor")
    layout = Layout.from_tensors(values) if any(map(is_dtensor, values.values())) else None
    values = {name: local_tensor(value) for name, value in values.items()} if layout is not None else values
    first, like = next(iter(values.items()))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    for name, value in values.items():
        if has_no_shape(value) or value.is_quantized:
            check_addressable(repr(name), value)
        if not value.is_floating_point():
            raise DTypeError(f"{name!r} is {value.dtype}, expected a floating-point tensor")
        if (torch.float64 if value.dtype == torch.float64 else torch.float32) != dtype:
            raise DTypeError(f"{name!r} is {value.dtype}, expected {like.dtype} as {first!r}")
    check_one_device(values, repr)
    for name, value in values.items():
        check_addressable(repr(name), value)
    layout = Layout.from_tensors(values) if layout is None else layout
    buffer = expect_writes(torch.empty(layout.numel, dtype=dtype, device=next(iter(values.values())).device))
    torch.cat([v.detach().reshape(-1).to(dtype) for v in values.values()], out=buffer)
    return buffer, layout
