"""From models and Fishers to groups: which memory of which node meets which forget Fishers. All validation is here.

Nothing is written before every node has passed, so a call that raises has changed nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from .dag import ForgetRequest, Model
from .errors import ArgumentError, DeviceError, DTypeError, LayoutError
from .fisher import Fisher
from .kernels.table import Group
from .layout import THETA_DTYPES, Layout
from .memory import check_disjoint

Home = tuple[Mapping[str, torch.Tensor], str]  # where a parameter lives: the container that owns it, and its key there
Link = tuple[
    Mapping[str, torch.nn.Module | None], str, torch.nn.Module
]  # a submodule on the way: container, key, itself


@dataclass(frozen=True)
class Target:
    """A node that at least one request reaches."""

    name: str
    model: Model
    fisher: Fisher
    sources: tuple[int, ...]  # S(n), indices of requests
    alpha: float
    lam: float


@dataclass(frozen=True)
class Match:
    """How the Fishers of a node's requests fit its own: S segments, the same for all nodes of that layout and S(n)."""

    names: tuple[str, ...]  # [S]
    shapes: tuple[tuple[int, ...], ...]  # [S]
    numels: np.ndarray  # [S] int64
    offsets: np.ndarray  # [S] int64, in the original Fisher
    sources: tuple[tuple[int, ...], ...]  # [S] requests whose Fisher has the segment
    skipped: tuple[str, ...]  # names left out, by on_mismatch="skip"
    numel: int  # of all segments together


@dataclass
class Batch:
    """A group while it grows, and what its launch is keyed by."""

    device: torch.device
    theta_dtype: torch.dtype
    fisher_dtype: torch.dtype
    sources: tuple[int, ...]
    match: Match
    segments: list[int]  # indices into match
    nodes: list[int] = field(default_factory=list)  # index of each node among the targets
    thetas: list[list[torch.Tensor]] = field(default_factory=list)  # [N][S]
    addresses: list[list[int]] = field(default_factory=list)  # [N][S]


@dataclass(frozen=True)
class Resolved:
    """The outcome: batches of nodes, and what a plan watches and reports."""

    batches: list[Batch]
    homes: list[Home]
    links: list[Link]
    parameters: list[torch.Tensor]  # beside homes
    addresses: list[int]  # beside homes
    numels: list[int]  # elements compared, per target
    skipped: list[tuple[str, ...]]  # per target


def resolve(targets: list[Target], requests: list[ForgetRequest], on_mismatch: str) -> Resolved:
    """Look up, validate and group the parameters of every target.

    Raises:
        LayoutError: names or shapes differ (with on_mismatch="error"), memory is not contiguous or overlaps.
        DTypeError, DeviceError: tensors of a node that do not go together.
        ArgumentError: a model without a parameter that its Fisher has.

    """
    matches: dict[tuple[Layout, tuple[int, ...]], Match] = {}
    batches: dict[tuple, Batch] = {}
    outcome = Resolved([], [], [], [], [], [], [])
    for index, target in enumerate(targets):
        key = (target.fisher.layout, target.sources)
        match = matches.get(key)
        if match is None:
            match = matches[key] = _match(target, requests, on_mismatch)
        _check_fishers(target, requests)
        own = _find(target.model, match.names, outcome.links)
        thetas: list[torch.Tensor] = []
        addresses: list[int] = []
        parts: dict[tuple, list[int]] = {}
        for s, name in enumerate(match.names):
            if name not in own:
                raise LayoutError(f"node {target.name!r}: its original Fisher has {name!r}, its model has not")
            theta = own[name][0][own[name][1]]
            _check_theta(target, name, theta, match.shapes[s])
            thetas.append(theta)
            addresses.append(theta.data_ptr())
            outcome.homes.append(own[name])
            parts.setdefault((theta.dtype, match.sources[s]), []).append(s)
        outcome.parameters.extend(thetas)
        outcome.addresses.extend(addresses)
        fisher = target.fisher.buffer
        for (dtype, sources), segments in parts.items():
            batch_key = (*key, fisher.device, fisher.dtype, dtype, sources, *segments)
            batch = batches.get(batch_key)
            if batch is None:
                batch = batches[batch_key] = Batch(fisher.device, dtype, fisher.dtype, sources, match, segments)
            whole = len(segments) == len(thetas)
            batch.nodes.append(index)
            batch.thetas.append(thetas if whole else [thetas[s] for s in segments])
            batch.addresses.append(addresses if whole else [addresses[s] for s in segments])
        outcome.numels.append(match.numel)
        outcome.skipped.append(match.skipped)
    outcome.batches.extend(batches.values())
    _check_memory(targets, requests, outcome)
    return outcome


def make_group(
    batch: Batch,
    targets: list[Target],
    forgets: Mapping[int, Fisher],
    weights: Mapping[int, float],
    slots: Mapping[int, int],
) -> Group:
    """Turn a batch into the group that backends see; `forgets` are the requests' Fishers on the batch's device."""
    names = [batch.match.names[s] for s in batch.segments]
    return Group(
        numels=batch.match.numels[batch.segments],
        forgets=[forgets[k].buffer for k in batch.sources],
        forget_offsets=np.array([[forgets[k].layout[n].offset for n in names] for k in batch.sources], dtype=np.int64),
        weights=tuple(weights[k] for k in batch.sources),
        originals=[targets[i].fisher.buffer for i in batch.nodes],
        original_offsets=batch.match.offsets[batch.segments],
        thetas=batch.thetas,
        theta_addresses=np.array(batch.addresses, dtype=np.int64),
        slots=np.array([slots[i] for i in batch.nodes], dtype=np.int64),
    )


def _find(model: Model, names: tuple[str, ...], links: list[Link]) -> Mapping[str, Home]:
    """Where each parameter lives, as far as it exists; `links` gets the submodules on the way.

    A plan watches both, so that neither a parameter nor a whole submodule is replaced without its notice.
    """
    if not isinstance(model, torch.nn.Module):
        return {name: (model, name) for name in names if name in model}
    found: dict[str, Home] = {}
    owners: dict[str, torch.nn.Module | None] = {"": model}
    for name in names:
        path, _, key = name.rpartition(".")
        if path not in owners:
            owner, walked = model, ""
            for part in path.split("."):
                walked = f"{walked}.{part}" if walked else part
                child = owner._modules.get(part)
                if child is None:
                    break
                if walked not in owners:
                    links.append((owner._modules, part, child))
                    owners[walked] = child
                owner = child
            owners.setdefault(path, None)
        if (module := owners[path]) is not None and module._parameters.get(key) is not None:
            found[name] = (cast(Mapping[str, torch.Tensor], module._parameters), key)
    return found


def _match(target: Target, requests: list[ForgetRequest], on_mismatch: str) -> Match:
    layout, where = target.fisher.layout, f"node {target.name!r}"
    skipped: dict[str, None] = {}
    for k in target.sources:
        forget = requests[k].fisher.layout
        difference = layout.difference(forget, f"the original Fisher of {target.name!r}", "the forget Fisher")
        if difference is None:
            continue
        if on_mismatch == "error":
            raise LayoutError(
                f"{where}: the forget Fisher of request {k} (from {requests[k].origin!r}) does not fit: {difference}; "
                'estimate both over the same parameters, or pass on_mismatch="skip" to leave these out'
            )
        skipped.update(dict.fromkeys(s.name for s in forget if s.name not in layout or layout[s.name].shape != s.shape))
    kept, sources = [], []
    for segment in layout:
        fit = tuple(
            k
            for k in target.sources
            if segment.name in (forget := requests[k].fisher.layout) and forget[segment.name].shape == segment.shape
        )
        if not fit:
            skipped[segment.name] = None
        elif segment.numel:
            kept.append(segment)
            sources.append(fit)
    return Match(
        names=tuple(s.name for s in kept),
        shapes=tuple(s.shape for s in kept),
        numels=np.array([s.numel for s in kept], dtype=np.int64),
        offsets=np.array([s.offset for s in kept], dtype=np.int64),
        sources=tuple(sources),
        skipped=tuple(skipped),
        numel=sum(s.numel for s in kept),
    )


def _check_fishers(target: Target, requests: list[ForgetRequest]) -> None:
    dtype = target.fisher.buffer.dtype
    for k in target.sources:
        found = requests[k].fisher.buffer.dtype
        if found != dtype:
            raise DTypeError(
                f"node {target.name!r}: its original Fisher is {dtype}, the forget Fisher of request {k} is {found}; "
                f"convert one with fisher.to(dtype=…)"
            )


def _check_theta(target: Target, name: str, theta: object, shape: tuple[int, ...]) -> None:
    where = f"node {target.name!r}, parameter {name!r}"
    if not isinstance(theta, torch.Tensor):
        raise ArgumentError(f"{where}: a {type(theta).__name__}, expected a tensor")
    if theta.shape != shape:
        raise LayoutError(f"{where}: shape {list(theta.shape)} in the model, {list(shape)} in its Fisher")
    if theta.dtype not in THETA_DTYPES:
        raise DTypeError(f"{where}: {theta.dtype}, expected float32, float64, bfloat16 or float16")
    if theta.device != (device := target.fisher.buffer.device):
        raise DeviceError(f"{where}: on {theta.device}, its original Fisher on {device}; move it with fisher.to(…)")
    if theta.layout != torch.strided or not theta.is_contiguous():
        raise LayoutError(
            f"{where}: not contiguous (shape {list(theta.shape)}, stride {list(theta.stride())}); "
            "call fiun_fast.flatten_(model) or make it contiguous"
        )


def _check_memory(targets: list[Target], requests: list[ForgetRequest], outcome: Resolved) -> None:
    """No parameter may lie on another, or on a Fisher: which write came first would decide the result."""
    labels: list[str] = []
    starts, ends = [], []
    for batch in outcome.batches:
        start = np.array(batch.addresses, dtype=np.int64)  # [N, S] bytes
        starts.append(start.ravel())
        ends.append((start + batch.match.numels[batch.segments] * batch.theta_dtype.itemsize).ravel())
        names = [batch.match.names[s] for s in batch.segments]
        labels += [f"node {targets[i].name!r}, parameter {n!r}" for i in batch.nodes for n in names]
    if not labels:
        return
    start, end = np.concatenate(starts), np.concatenate(ends)
    check_disjoint(start, end, labels)
    order = np.argsort(start)
    start, end = start[order], end[order]
    fishers = [t.fisher for t in targets] + [r.fisher for r in requests]
    first = np.array([fisher.buffer.data_ptr() for fisher in fishers])
    last = first + np.array([fisher.buffer.nbytes for fisher in fishers])
    at = np.searchsorted(end, first, side="right")  # the first parameter that ends after each Fisher begins
    clash = np.flatnonzero((at < len(start)) & (start[np.minimum(at, len(start) - 1)] < last))
    if clash.size:
        k = int(clash[0])
        own = [f"the original Fisher of {t.name!r}" for t in targets]
        other = [*own, *(f"the forget Fisher of request {k}" for k in range(len(requests)))][k]
        raise LayoutError(f"{labels[order[at[k]]]} and {other} share memory; clone one of them")
