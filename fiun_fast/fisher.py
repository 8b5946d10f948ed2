"""Diagonal Fisher information over a layout, and the merging of several into one (MFIM)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import fisher_file, optimizer_state
from .arguments import MERGE_RULES, MergeRule, check_fraction, check_number, check_one_of, check_size, short
from .errors import ArgumentError, DeviceError, DTypeError, LayoutError
from .guards import denormals_kept
from .kernels import select
from .kernels.table import Merging
from .layout import Layout
from .memory import check_no_mode
from .provenance import Provenance, merged, warn_if_unlike
from .ranks import Ranks
from .scope import Params, select_parameters
from .vectors import Vector, flattened

UNKNOWN = Provenance()


class Fisher(Vector):
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
        if not isinstance(provenance, Provenance):
            raise ArgumentError(f"provenance is a {type(provenance).__name__}, expected a fiun_fast.Provenance")
        super().__init__(buffer, layout)
        self.provenance = provenance

    def _with(self, buffer: torch.Tensor, layout: Layout | None = None) -> Fisher:
        return Fisher(buffer, self.layout if layout is None else layout, self.provenance)

    def full(self, group: dist.ProcessGroup | None = None) -> Fisher:
        """The whole Fisher, on every rank, of one that is spread over ranks; itself where it is whole. A collective.

        Args:
            group: the ranks that have the parts; None: all.

        Raises:
            ArgumentError: torch.distributed is not initialised.
            LayoutError: the ranks' parts together are not the whole.

        """
        return self if not self.layout.sharded else gathered(self, Ranks.of_group(group or dist.group.WORLD))

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
        buffer, layout = flattened(values)
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
        """Read a file or folder that `save` wrote, into main memory: what becomes of it on disk does not matter then.

        Args:
            path: the file, or the folder of shards.
            device: where the buffer is to lie; None: in main memory.
            layout: what is expected; a file that does not fit is refused with the difference.

        Raises:
            FileNotFoundError: there is none.
            FisherFileError: the file is truncated, damaged (its checksum is another; files of version 0.1 have none),
                foreign or from a newer format; or a shard is.
            LayoutError: its layout is another than the one expected.
            ArgumentError: it holds a negative entry, or `path` is no path.
            DeviceError: the device is not there.

        """
        if layout is not None and not isinstance(layout, Layout):
            raise ArgumentError(f"layout is a {type(layout).__name__}, expected a fiun_fast.Layout")
        with fisher_file.opened(path) as file:
            buffer, found, record = file.read_all(), file.layout, file.record
        if layout is not None and layout != found:
            found = found.named_as(layout)
        if layout is not None and layout != found:
            difference = found.difference(layout, "the file", "the expected layout") or "the order of the parameters"
            raise LayoutError(f"{os.fspath(path)}: another layout than expected: {difference}")
        check_non_negative(buffer, found)
        loaded = cls(buffer, found, Provenance(**record))
        return loaded if device is None else loaded.to(device)

    @denormals_kept()
    def save(
        self,
        path: str | os.PathLike[str],
        *,
        shard_size: int | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a safetensors file, or a folder of them: one tensor a parameter; layout, provenance, checksums.

        All or nothing. A symbolic link is followed and stays; a file that is replaced hands on its mode. In a folder
        what was saved there before counts until the new index is in place; then its shards go, and no other file does.

        Args:
            path: the file, or with `shard_size` the folder, which is made where it is not there.
            shard_size: bytes of a shard, a number or "2GB", "500MB", "1.5GiB"; a larger parameter has one to itself.
            dtype: torch.bfloat16 halves the files. Each number is rounded to nearest even, by at most 1 part in 256;
                read again it is float32. A ratio F / I moves by less than 0.8 %, and elements closer than that to the
                threshold may be selected or not; docs/checkpoints.md. None: as the Fisher is.

        Raises:
            FileWriteError: the folder does not exist or cannot be written, or the disk is full; an OSError too. What
                was there before is still there, and no partial file is left.
            ArgumentError: a parameter's name that no file can hold, `path` is no path, `shard_size` no size.
            DTypeError: another dtype than bfloat16, or a float64 Fisher beside it.
            LayoutError: it is one rank's part of a Fisher.

        """
        self.check_memory("the Fisher to be saved")
        if self.layout.sharded:
            raise LayoutError(
                "this Fisher is one rank's part: ff.distributed.save(fisher, path) writes all parts, "
                "fisher.full().save(path) gathers them first"
            )
        if dtype is not None and (dtype != fisher_file.ROUNDED or self.dtype != torch.float32):
            raise DTypeError(
                f"dtype is {dtype} for a {short(self.dtype)} Fisher, expected None, or torch.bfloat16 for a float32 one"
            )
        size = None if shard_size is None else check_size("shard_size", shard_size)
        record = {key: getattr(self.provenance, key) for key in fisher_file.RECORD}
        if isinstance(record["how"], Mapping):
            record["how"] = dict(record["how"])
        fisher_file.write(path, self.as_dict(), record, shard_size=size, dtype=dtype)

    def __repr__(self) -> str:
        p = self.provenance
        return (
            f"Fisher({self.numel:,} elements in {len(self.layout)} parameters, {short(self.dtype)} on {self.device}, "
            f"estimator {p.estimator}, {p.steps} steps, {p.samples} samples)"
        )


def gathered(fisher: Fisher, ranks: Ranks) -> Fisher:
    """The whole of what these ranks have parts of: an all-reduce, to which each part is added by one rank."""
    said = [(s.name, s.shape, s.place) for s in fisher.layout]
    whole = fisher.layout.unsharded()
    every = ranks.gather((said, [(s.name, s.shape) for s in whole], fisher.dtype))
    for rank, (_, shapes, dtype) in zip(ranks.members, every, strict=True):
        if (shapes, dtype) != every[0][1:]:
            raise LayoutError(f"ranks {ranks.members[0]} and {rank} have parts of unlike Fishers")
    first: dict[tuple, int] = {}
    for rank, (parts, *_) in zip(ranks.members, every, strict=True):
        for part in parts:
            first.setdefault(part, rank)
    held = dict.fromkeys(whole.names, 0)
    for name, shape, _ in first:
        held[name] += math.prod(shape)
    for s in whole:
        if held[s.name] != s.numel:
            raise LayoutError(f"the ranks have {held[s.name]:,} of the {s.numel:,} elements of {s.name!r} between them")
    buffer = torch.zeros(whole.numel, dtype=fisher.dtype, device=fisher.device)
    for name, view in whole.views(buffer).items():
        own = fisher.layout[name]
        if first[name, own.shape, own.place] == ranks.rank:
            start = (0,) * view.dim() if own.shard is None else own.shard.start
            view[tuple(slice(at, at + n) for at, n in zip(start, own.shape, strict=True))] = fisher[name]
    ranks.sum_(buffer)
    return Fisher(buffer, whole, fisher.provenance)


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


def top_overlap(fisher: Fisher, other: Fisher, *, share: float = 0.01) -> float:
    """Share (0..1) of the largest entries of one Fisher that are among the largest of the other; by chance `share`.

    A check before dampening. Where the data to be forgotten and data to be kept share as many of their largest entries
    as two halves of the data to be kept do, a diagonal cannot tell them apart, and one shot takes both.

    Args:
        fisher, other: over one layout; Fishers for each sequence or sample (`estimator="sample"`) say most.
        share: of the elements, in (0, 1]; at least one.

    Raises:
        ArgumentError: a share out of range.
        LayoutError, DTypeError, DeviceError: the Fishers differ; the message says in what.

    """
    share = check_fraction("share", share, "a share of the elements, in (0, 1]")
    check_alike(fisher, "fisher", other, "other")
    if fisher.layout != other.layout:
        raise LayoutError("other has the parameters of fisher in another order")
    if fisher.layout.sharded:
        raise LayoutError("these Fishers are one rank's parts: pass fisher.full()")
    count = max(1, int(share * fisher.numel))
    both = [torch.zeros(fisher.numel, dtype=torch.bool, device=fisher.device) for _ in range(2)]
    for among, one in zip(both, (fisher, other), strict=True):
        among[one.buffer.topk(count).indices] = True
    return int((both[0] & both[1]).sum()) / count


def listed_fishers(what: str, fishers: Any) -> list[Fisher]:
    """One Fisher or several, as a list; an ArgumentError names `what` where it is neither."""
    if isinstance(fishers, Fisher):
        return [fishers]
    if isinstance(fishers, (str, Mapping)) or not isinstance(fishers, Iterable):
        raise ArgumentError(f"{what} is a {type(fishers).__name__}, expected a fiun_fast.Fisher or a list of them")
    return list(fishers)


def check_alike(fisher: Fisher, its_name: str, other: Vector, name: str) -> None:
    """Raise an error that says how `other` differs: parameters (not their order), dtype, device; or is no Fisher."""
    for who, one in ((its_name, fisher), (name, other)):
        if not isinstance(one, Vector):
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


def check_non_negative(buffer: torch.Tensor, layout: Layout) -> None:
    """Raise an ArgumentError that names the first parameter with a negative entry; NaN passes."""
    if bool((buffer < 0).any()):
        for name, view in layout.views(buffer).items():
            negative = int((view < 0).sum())
            if negative:
                lowest = float(view[view < 0].min())
                raise ArgumentError(f"{name!r} has {negative} negative entries (lowest {lowest:g}); a Fisher has none")
