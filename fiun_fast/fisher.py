"""Diagonal Fisher information over a layout, and the merging of several into one (MFIM)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from . import files, optimizer_state
from .arguments import FISHER_DTYPES, MERGE_RULES, MergeRule, check_number, check_one_of, short
from .errors import ArgumentError, DeviceError, DTypeError, LayoutError
from .guards import denormals_kept
from .kernels import select
from .kernels.cpu import expect_writes
from .kernels.table import Merging
from .layout import Layout
from .memory import all_plain, check_addressable, check_no_mode, check_one_device, flaw_of, has_no_shape
from .provenance import Provenance, merged, warn_if_unlike
from .scope import Params, select_parameters

UNKNOWN = Provenance()


class Fisher:
    """The diagonal of an (empirical) Fisher information matrix: one non-negative number a parameter.

    Args:
        buffer: [layout.numel], float32 or float64, contiguous; kept, not copied.
        layout: what the numbers belong to.
        provenance: how they were obtained.

    Raises:
        DTypeError, LayoutError, DeviceError: the buffer is of another dtype or shape, not contiguous, or has no memory
            of its own (a DTensor, on meta, …).

    """

    def __init__(self, buffer: torch.Tensor, layout: Layout, provenance: Provenance = UNKNOWN) -> None:
        if not isinstance(layout, Layout):
            raise ArgumentError(f"layout is a {type(layout).__name__}, expected a fiun_fast.Layout")
        if not isinstance(provenance, Provenance):
            raise ArgumentError(f"provenance is a {type(provenance).__name__}, expected a fiun_fast.Provenance")
        check_buffer("Fisher buffer", buffer, layout)
        self.buffer = buffer.detach()
        self.layout = layout
        self.provenance = provenance

    @classmethod
    @denormals_kept()
    def from_dict(cls, values: Mapping[str, torch.Tensor], provenance: Provenance = UNKNOWN) -> Fisher:
        """Build from name -> tensor in the parameter's shape. Copies; half precision becomes float32.

        Raises:
            ArgumentError: it is empty, a value is not a tensor, or an entry is negative (NaN and inf pass: they are
                counted when used).
            DTypeError, DeviceError: integers or complex numbers; dtypes or devices that differ from the first one.
            FiunError: a tensor without plain memory of its own.

        """
        if not isinstance(values, Mapping) or not values:
            raise ArgumentError(f"expected a non-empty dict of name -> tensor, found {type(values).__name__}")
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                raise ArgumentError(f"{name!r} is a {type(value).__name__}, expected a tensor")
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
        layout = Layout.from_tensors(values)
        buffer = expect_writes(torch.empty(layout.numel, dtype=dtype, device=next(iter(values.values())).device))
        torch.cat([v.detach().reshape(-1).to(dtype) for v in values.values()], out=buffer)
        check_non_negative(buffer, layout)
        return cls(buffer, layout, provenance)

    @classmethod
    def from_optimizer(cls, optimizer: torch.optim.Optimizer, model: torch.nn.Module, params: Params = None) -> Fisher:
        """An original Fisher for free: Adam's or AdamW's `exp_avg_sq`, corrected for its start at 0 (arXiv 2507.18807).

        That is the `batch` estimator with training's own batch size and mode, averaged over about 1 / (1 - beta2) past
        steps. It stands for a Fisher at the present weights where these have moved little in that time (the end of a
        schedule), gradients were not clipped, and weight decay is decoupled (AdamW); docs/fishers.md says more.

        Args:
            optimizer: one that keeps `exp_avg_sq` and `step`, of any kind (foreach, fused, …), or a wrapper of one.
            model: its parameters are looked up in the optimiser, by identity.
            params: which, as in `Layout.from_module`.

        Raises:
            ArgumentError: an optimiser of another kind.
            LayoutError: it does not optimise one of the parameters; or as in `Layout.from_module`.
            EstimationError: it has taken no step with one of them.
            DeviceError: the parameters lie on several devices.

        """
        selected = select_parameters(model, params)
        moments, how, steps = optimizer_state.second_moments(optimizer, selected)
        return cls.from_dict(moments, Provenance("optimizer", steps, 0, how))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        layout: Layout | None = None,
    ) -> Fisher:
        """Read a file that `save` wrote, into main memory: what becomes of the file later does not matter.

        Args:
            path: the file.
            device: where the buffer is to lie; None: in main memory.
            layout: what is expected; a file that does not fit is refused with the difference.

        Raises:
            FileNotFoundError: there is none.
            FisherFileError: the file is truncated, damaged (its checksum is another; files of version 0.1 have none),
                foreign or from a newer format.
            LayoutError: its layout is another than the one expected.
            ArgumentError: it holds a negative entry, or `path` is no path.
            DeviceError: the device is not there.

        """
        if layout is not None and not isinstance(layout, Layout):
            raise ArgumentError(f"layout is a {type(layout).__name__}, expected a fiun_fast.Layout")
        buffer, found, record = files.read_fisher(path)
        if layout is not None and layout != found:
            found = found.named_as(layout)
        if layout is not None and layout != found:
            difference = found.difference(layout, "the file", "the expected layout") or "the order of the parameters"
            raise LayoutError(f"{os.fspath(path)}: another layout than expected: {difference}")
        check_non_negative(buffer, found)
        loaded = cls(buffer, found, Provenance(**record))
        return loaded if device is None else loaded.to(device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: one tensor a parameter; layout, provenance and a checksum in the metadata.

        All or nothing. A symbolic link is followed and stays; a file that is replaced hands on its mode.

        Raises:
            FileWriteError: the folder does not exist or cannot be written, or the disk is full; an OSError too. What
                was there before is still there, and no partial file is left.
            ArgumentError: a parameter's name that no file can hold, or `path` is no path.

        """
        self.check_memory("the Fisher to be saved")
        record = {key: getattr(self.provenance, key) for key in files.RECORD}
        if isinstance(record["how"], Mapping):
            record["how"] = dict(record["how"])
        files.write_fisher(path, self.as_dict(), record)

    def __getitem__(self, name: str) -> torch.Tensor:
        """View of one parameter's entries, in its shape."""
        segment = self.layout[name]
        self.check_memory("Fisher")
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
        self.check_memory("Fisher")
        return self.layout.views(self.buffer)

    @denormals_kept()
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Fisher:
        """The same Fisher on another device or in float32/float64; itself where nothing changes."""
        self.check_memory("Fisher")
        try:
            moved = self.buffer.to(device=device, dtype=dtype)
        except (RuntimeError, AssertionError, TypeError) as error:  # a device that is not here, or is none
            raise DeviceError(f"Fisher cannot be moved to {device!r}: {str(error).partition(chr(10))[0]}") from error
        return self if moved is self.buffer else Fisher(moved, self.layout, self.provenance)

    def sha256(self) -> str:
        """SHA-256, hex: of dtype and layout as a line of JSON, then of the numbers, little-endian. Reads the buffer.

        The line is `{"dtype": "float32", "layout": [["fc.weight", [10, 64]], …]}` and a newline.
        """
        self.check_memory("Fisher")
        kind = short(self.dtype)
        head = {"dtype": kind, "layout": [[segment.name, list(segment.shape)] for segment in self.layout]}
        digest = hashlib.sha256((json.dumps(head, sort_keys=True) + "\n").encode())
        for piece in self.buffer.split(1 << 24):  # from a GPU piece by piece
            digest.update(piece.detach().cpu().numpy().astype(f"<f{self.buffer.itemsize}", copy=False).data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        p = self.provenance
        return (
            f"Fisher({self.numel:,} elements in {len(self.layout)} parameters, {short(self.dtype)} on {self.device}, "
            f"estimator {p.estimator}, {p.steps} steps, {p.samples} samples)"
        )


def merge_fishers(
    fishers: Sequence[Fisher],
    *,
    how: MergeRule = "max",
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Fisher:
    """Merge forget Fishers into one: m = scale * reduce_k (w_k F_k), reduce one of max (FIUn's MFIM), mean, sum.

    A NaN in any input makes the result NaN there. The inputs are not changed.

    Raises:
        ArgumentError: nothing to merge, unknown `how`, a weight or scale that is negative or not finite.
        LayoutError, DTypeError, DeviceError: the Fishers differ; the message says in what.
        BackendError: the backend cannot be used.

    """
    check_no_mode()
    fishers = listed_fishers("fishers", fishers)
    if not fishers:
        raise ArgumentError("no Fishers to merge")
    check_one_of("how", how, MERGE_RULES)
    if weights is not None and not isinstance(weights, Iterable):
        raise ArgumentError(f"weights is a {type(weights).__name__}, expected a number for each Fisher")
    factors = [1.0] * len(fishers) if weights is None else list(weights)
    if len(factors) != len(fishers):
        raise ArgumentError(f"{len(factors)} weights for {len(fishers)} Fishers")
    first = fishers[0]
    if not isinstance(first, Fisher):
        raise ArgumentError(f"fishers[0] is a {type(first).__name__}, expected a fiun_fast.Fisher")
    for k, fisher in enumerate(fishers):
        check_alike(first, "fishers[0]", fisher, f"fishers[{k}]")
        if fisher.layout.named_as(first.layout) != first.layout:
            raise LayoutError(f"fishers[{k}] has the parameters of fishers[0] in another order")
    factors = [check_number(f"weights[{k}]", weight, first.dtype) for k, weight in enumerate(factors)]
    merging = Merging(how, check_number("scale", scale, first.dtype))
    out = torch.empty_like(first.buffer)
    select(backend, out.device.type).merge([f.buffer for f in fishers], factors, merging, out)
    records = [fisher.provenance for fisher in fishers]
    warn_if_unlike(("fishers[0]", records[0], f"fishers[{k}]", one) for k, one in enumerate(records))
    return Fisher(out, first.layout, merged(how, records))


def listed_fishers(what: str, fishers: Any) -> list[Fisher]:
    """One Fisher or several, as a list; an ArgumentError names `what` where it is neither."""
    if isinstance(fishers, Fisher):
        return [fishers]
    if isinstance(fishers, (str, Mapping)) or not isinstance(fishers, Iterable):
        raise ArgumentError(f"{what} is a {type(fishers).__name__}, expected a fiun_fast.Fisher or a list of them")
    return list(fishers)


def check_alike(fisher: Fisher, its_name: str, other: Fisher, name: str) -> None:
    """Raise an error that says how `other` differs: parameters (not their order), dtype, device; or is no Fisher."""
    for who, one in ((its_name, fisher), (name, other)):
        if not isinstance(one, Fisher):
            raise ArgumentError(f"{who} is a {type(one).__name__}, expected a fiun_fast.Fisher")
        one.check_memory(who)
    if fisher.layout != other.layout and (difference := fisher.layout.difference(other.layout, its_name, name)):
        raise LayoutError(f"{its_name} and {name} do not fit: {difference}; estimate both over the same parameters")
    if other.dtype != fisher.dtype:
        raise DTypeError(
            f"{name} is {other.dtype}, expected {fisher.dtype} as {its_name}: convert one, fisher.to(dtype=…)"
        )
    if other.device != fisher.device:
        raise DeviceError(
            f"{name} is on {other.device}, expected {fisher.device} as {its_name}: move one, fisher.to(…)"
        )


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


def all_fit(fishers: Sequence[Fisher]) -> bool:
    """Whether each has the memory that its layout needs: `Fisher.check_memory` for many; False where unsure."""
    buffers: list[Any] = [vars(fisher).get("buffer") for fisher in fishers]
    return all_plain(buffers) and all(
        buffer.dtype in FISHER_DTYPES and buffer.shape == (fisher.layout.numel,)
        for buffer, fisher in zip(buffers, fishers, strict=True)
    )


def check_non_negative(buffer: torch.Tensor, layout: Layout) -> None:
    """Raise an ArgumentError that names the first parameter with a negative entry; NaN passes."""
    if bool((buffer < 0).any()):
        for name, view in layout.views(buffer).items():
            negative = int((view < 0).sum())
            if negative:
                lowest = float(view[view < 0].min())
                raise ArgumentError(f"{name!r} has {negative} negative entries (lowest {lowest:g}); a Fisher has none")
