"""Bind: from a compiled program and a source of memory to parts, each a table that a backend has made ready to run.

It may be repeated for one program, with other memory or with part of it: the Fishers that a source hands out say which
elements are there, a whole model or a window of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .compiling import GroupPlan, Program
from .errors import LayoutError
from .fisher import Fisher
from .gradient import Gradient
from .kernels import select
from .kernels.interface import Backend, Histogram, Launch
from .kernels.table import Dampening, Group, Merging, Table
from .memory import check_disjoint


class Memory(Protocol):
    """Where the numbers of a program are. Names and indices are those of the program."""

    def originals(self, nodes: Sequence[int]) -> list[Fisher]:
        """The original Fisher of each node, whole or over a window; names of the program that it lacks are left out."""

    def forget(self, request: int, device: torch.device) -> Fisher:
        """The forget Fisher of a request, over the same elements, on that device."""

    def gradient(self, request: int, device: torch.device) -> Gradient:
        """The gradient of a request that has one, laid out as its forget Fisher, on that device."""

    def thetas(self, nodes: Sequence[int], names: Sequence[str]) -> list[list[Tensor]]:
        """For each name the parameter of each node, contiguous, with the elements that the original Fishers have.

        The nodes are of one layout.
        """


@dataclass(frozen=True)
class Part:
    """One launch: a table, and the backend that has made it ready."""

    table: Table
    merging: Merging
    dampening: Dampening
    backend: Backend
    launch: Launch
    node: np.ndarray  # [slots] int64: whose node each slot of the dampening is
    counted: bool = True  # False: another rank counts the same elements
    tally: int = 0  # which counts it adds to, of each device and of what is counted there; as the parts come

    def histogram(self) -> Histogram:
        """Made ready to count the ratios m / I of the same table."""
        return self.backend.histogram(self.table, self.merging)


def bind(
    program: Program, memory: Memory, merging: Merging, dampening: Dampening, backend: str | None = None
) -> list[Part]:
    """Take addresses and prepare launches: a part for each device, parameter dtype and Fisher dtype.

    Where models are spread over ranks, what this one counts and what it does not are parts of their own.

    Args:
        program: what is to be done.
        memory: where.
        merging, dampening: how; alpha and lam of each slot of the program may be written to between runs.
        backend: name of one, None for the default.

    Raises:
        LayoutError: memory that overlaps, or is not contiguous.
        FiunError: a tensor without plain memory of its own.
        BackendError: the backend cannot be used, or a call to it failed.

    """
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype, bool], list[Group]] = {}
    for plan in program.groups:
        if (group := _group(program, plan, memory)) is not None:
            kind = (plan.device, plan.theta_dtype, plan.fisher_dtype, plan.counted)
            groups.setdefault(kind, []).append(group)
    _check_overlaps(program, memory, list(chain.from_iterable(groups.values())))
    chosen = [select(backend, device.type) for device, *_ in groups]
    parts = []
    tallies: dict[tuple[torch.device, bool], int] = {}
    for one, ((device, theta_dtype, fisher_dtype, counted), found) in zip(chosen, groups.items(), strict=True):
        tally = tallies.setdefault((device, counted), len(tallies))
        table = Table.pack(device, theta_dtype, fisher_dtype, found)
        launch = one.dampen(table, merging, dampening)
        parts.append(Part(table, merging, dampening, one, launch, program.slots.node, counted, tally))
    return parts


def _group(program: Program, plan: GroupPlan, memory: Memory) -> Group | None:
    """What backends see of a group; None where the memory has none of its elements now."""
    originals = memory.originals(plan.nodes)
    layout = originals[0].layout
    segments = [plan.match.segments[s] for s in plan.segments]
    if layout is not program.nodes[plan.nodes[0]].fisher.layout:
        segments = [layout[segment.name] for segment in segments if segment.name in layout]
    if not segments:
        return None
    whole = len(segments) == len(plan.match.segments)
    names = plan.match.names if whole else tuple(segment.name for segment in segments)
    forgets = [memory.forget(k, plan.device) for k in plan.requests]
    signed = all(program.requests[k].gradient is not None for k in plan.requests)
    gradients = [memory.gradient(k, plan.device).buffer for k in plan.requests] if signed else None
    thetas = memory.thetas(plan.nodes, names)
    return Group(
        names=names,
        numels=np.array([segment.numel for segment in segments], dtype=np.int64),
        forgets=[fisher.buffer for fisher in forgets],
        forget_offsets=np.array([_offsets(f, names, plan, k) for k, f in zip(plan.requests, forgets, strict=True)]),
        weights=tuple(float(program.requests[k].weight) for k in plan.requests),
        originals=[fisher.buffer for fisher in originals],
        original_offsets=np.array([segment.offset for segment in segments], dtype=np.int64),
        nodes=np.array(plan.slots, dtype=np.int64),
        thetas=thetas,
        addresses=np.array([list(map(Tensor.data_ptr, tensors)) for tensors in thetas], dtype=np.int64).T.copy(),
        gradients=gradients,
    )


def _offsets(fisher: Fisher, names: Sequence[str], plan: GroupPlan, request: int) -> list[int]:
    """Where these parameters of the nodes lie in a forget Fisher, which may call them otherwise."""
    called = plan.match.called.get(request, {})
    return [fisher.layout[called.get(name, name)].offset for name in names]


def _check_overlaps(program: Program, memory: Memory, groups: Sequence[Group]) -> None:
    """No parameter may lie on another, or on a Fisher or gradient: which write came first would decide the result."""
    if not groups:
        return
    starts, ends, owners = [], [], []
    for group in groups:
        assert group.addresses is not None
        assert group.thetas is not None
        size = group.thetas[0][0].element_size()
        starts.append(group.addresses.ravel())
        ends.append((group.addresses + group.numels * size).ravel())
        owners.append(group.addresses.size)
    start, end, first = np.concatenate(starts), np.concatenate(ends), np.cumsum(owners)

    def label(i: int) -> str:
        g = int(np.searchsorted(first, i, side="right"))
        n, s = divmod(int(i - (first[g] - owners[g])), len(groups[g].names))
        return f"node {program.nodes[program.slots.node[groups[g].nodes[n]]].name!r}, parameter {groups[g].names[s]!r}"

    check_disjoint(start, end, label)
    order = np.argsort(start)
    start, end = start[order], end[order]
    fishers = [f for group in groups for f in group.originals] + [f for group in groups for f in _requested(group)]
    begin = np.array([fisher.data_ptr() for fisher in fishers])
    stop = begin + np.array([fisher.nbytes for fisher in fishers])
    at = np.searchsorted(end, begin, side="right")  # the first parameter that ends after each Fisher begins
    clash = np.flatnonzero((at < len(start)) & (start[np.minimum(at, len(start) - 1)] < stop))
    if clash.size:
        k = int(clash[0])
        whose = _whose(program, groups, k)
        raise LayoutError(f"{label(int(order[at[k]]))} and {whose} share memory; clone one of them")


def _whose(program: Program, groups: Sequence[Group], k: int) -> str:
    """Name the k-th of all originals, then of what the requests have, of the groups."""
    originals = [node for group in groups for node in group.nodes.tolist()]
    if k < len(originals):
        return f"the original Fisher of {program.nodes[program.slots.node[originals[k]]].name!r}"
    buffer = [f for group in groups for f in _requested(group)][k - len(originals)]
    for r, request in enumerate(program.requests):
        if request.fisher.buffer is buffer:
            return f"the forget Fisher of request {r}"
        if request.gradient is not None and request.gradient.buffer is buffer:
            return f"the gradient of request {r}"
    return "a forget Fisher"


def _requested(group: Group) -> list[Tensor]:
    """What a group has of its requests: forget Fishers, then gradients."""
    return [*group.forgets, *(group.gradients or ())]
