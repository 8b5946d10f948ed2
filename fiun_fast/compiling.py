"""Compile: which nodes meet which forget Fishers over which parameters. Names, shapes, dtypes and numbers only.

No memory is looked at here: a parameter is its shape, dtype and device, wherever it lies. All that can be wrong with
these is raised here; what can be wrong with memory, by `binding.bind`, which makes parts of a program that a backend
runs. One program may be bound again and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from types import MappingProxyType
from typing import Protocol

import torch

from .arguments import MISMATCH_RULES, THETA_DTYPES, OnMismatch, check_one_of, listed
from .dag import ForgetRequest, InheritanceDAG, Model, Node, check_model, check_original
from .errors import ArgumentError, DeviceError, DTypeError, LayoutError
from .fisher import Fisher
from .layout import Layout, Segment
from .naming import Names, lacking, matched
from .provenance import warn_if_unlike
from .values import Slots
from .wrappers import check_gathered

_DTYPE, _FACTS = attrgetter("dtype"), attrgetter("shape", "dtype", "device")


class Described(Protocol):
    """What a program needs to know of a parameter: a tensor will do, and so will the line of a file's header."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def device(self) -> torch.device: ...  # noqa: D102


# (indices of nodes, names) -> for each name a column, what each node has under it; None: has none
Describe = Callable[[Sequence[int], Sequence[str]], Sequence[Sequence[Described | None]]]
# indices of nodes that were described together -> the same columns: whether the elements are counted here
Counted = Callable[[Sequence[int]], Sequence[Sequence[bool]]]


@dataclass(slots=True)
class ReachedNode:
    """A node that at least one request reaches."""

    name: str
    model: Model
    fisher: Fisher  # original
    requests: tuple[int, ...]  # S(n), indices of requests


@dataclass(frozen=True)
class Match:
    """How the forget Fishers of a node fit its own: S segments, the same for all nodes of that layout and S(n)."""

    segments: tuple[Segment, ...]  # [S] of the original Fisher
    names: tuple[str, ...]  # [S]
    requests: tuple[tuple[int, ...], ...]  # [S] requests whose Fisher has the segment
    skipped: tuple[str, ...]  # names left out, by on_mismatch="skip"
    numel: int  # of all parameters that fit together, whole where the segments are parts
    called: Mapping[int, Mapping[str, str]]  # request -> name here -> name in its Fisher, where they differ


@dataclass
class GroupPlan:
    """Nodes that meet the same forget Fishers over the same segments, with one dtype and device, one slot each."""

    device: torch.device
    theta_dtype: torch.dtype
    fisher_dtype: torch.dtype
    requests: tuple[int, ...]
    match: Match
    segments: tuple[int, ...]  # indices into the match
    counted: bool = True  # False: other ranks have the same elements, and one of them counts these
    nodes: list[int] = field(default_factory=list)  # indices into the program's nodes
    slots: list[int] = field(default_factory=list)  # beside the nodes


@dataclass(frozen=True)
class Program:
    """What is to be done to whom; knows no address."""

    nodes: list[ReachedNode]
    requests: list[ForgetRequest]
    groups: list[GroupPlan]
    matches: list[Match]  # [nodes]
    slots: Slots


def reached_nodes(
    dag: InheritanceDAG, requests: Sequence[ForgetRequest], estimated: Mapping[str, Fisher] = MappingProxyType({})
) -> list[ReachedNode]:
    """The nodes that the requests reach, in the order of the DAG.

    Args:
        dag, requests: as in `plan`; the requests have Fishers.
        estimated: original Fishers of nodes that have none of their own.

    Raises:
        DagError: as `InheritanceDAG.reached`.
        ArgumentError: one of them has no original Fisher.

    """
    reached = []
    for node, reaching in dag.reached(requests):
        reached.append(reached_node(node, reaching, estimated.get(node.name)))
    return reached


def reached_node(node: Node, reaching: tuple[int, ...], estimated: Fisher | None = None) -> ReachedNode:
    """A node and its S(n); an ArgumentError where it has no original Fisher, or its model is none."""
    if not isinstance(node.model, (torch.nn.Module, dict)):  # most are; asking for a Mapping takes longer
        check_model(node.name, node.model)
    fisher = node.fisher if node.fisher is not None else estimated
    if not isinstance(fisher, Fisher):
        check_original(node.name, fisher)
        raise ArgumentError(
            f"node {node.name!r}: a request reaches it, but it has no original Fisher: add_model(…, fisher=…), or "
            "add_model(…, data=loader) to have it estimated"
        )
    return ReachedNode(node.name, node.model, fisher, reaching)


def warn_of_unlike(nodes: Sequence[ReachedNode], requests: Sequence[ForgetRequest]) -> None:
    """Warn where a node's original Fisher and one that meets it were made in unlike ways."""
    warn_if_unlike(
        (f"the original Fisher of {n.name!r}", n.fisher.provenance, f"the forget Fisher of request {k}", r.provenance)
        for n in nodes
        for k, r in ((k, requests[k].fisher) for k in n.requests)
    )


def compile_program(
    nodes: list[ReachedNode],
    requests: list[ForgetRequest],
    on_mismatch: OnMismatch,
    describe: Describe,
    slots: Slots | None = None,
    counted: Counted | None = None,
) -> Program:
    """Match names and shapes, and put nodes that may share a launch into groups.

    Args:
        nodes: with their original Fishers.
        requests: what `ReachedNode.requests` counts.
        on_mismatch: "error", or "skip" to leave out what a forget Fisher does not have in that shape.
        describe: what the models of some nodes have under some names. Asked once for all nodes of a layout.
        slots: where parameters find their numbers; None: one slot a node. What differs in its slot differs in its
            group.
        counted: where models are spread over ranks: which of that counts here. None: all.

    Raises:
        LayoutError: names or shapes differ, or a model has no parameter of a name that its Fisher has.
        DTypeError, DeviceError: dtypes or devices of a node that do not go together.
        ArgumentError: `on_mismatch` is neither.

    """
    check_one_of("on_mismatch", on_mismatch, MISMATCH_RULES)
    alike: dict[tuple[Layout, tuple[int, ...], torch.dtype, torch.device], list[int]] = {}
    for index, node in enumerate(nodes):
        fisher = node.fisher
        alike.setdefault((fisher.layout, node.requests, fisher.dtype, fisher.device), []).append(index)
    slots = Slots.plain(len(nodes)) if slots is None else slots
    groups: list[GroupPlan] = []
    matches: list[Match | None] = [None] * len(nodes)
    for (_, _, dtype, device), indices in alike.items():
        first = nodes[indices[0]]
        match = _match(first, requests, on_mismatch)
        for node in (nodes[i] for i in indices[1:]) if match.called else ():
            if any(_called(node, requests[k].fisher.layout) != called for k, called in match.called.items()):
                raise LayoutError(
                    f"nodes {first.name!r} and {node.name!r} have Fishers over the same names, and tie different "
                    "parameters: estimate the forget Fisher over the names of the original ones"
                )
        _check_dtypes(first, requests)
        columns = describe(indices, match.names)
        _check_parameters([nodes[i] for i in indices], match, columns)
        found: dict[tuple, GroupPlan] = {}
        kinds: Sequence[Sequence] = [list(map(_DTYPE, column)) for column in columns]
        if counted is not None and match.names:
            kinds = [list(zip(*pair, strict=True)) for pair in zip(kinds, counted(indices), strict=True)]
        alike_nodes = [
            (its, apart, some)
            for its, members in _by_kinds(indices, kinds).items()
            for apart, some in slots.alike(members, match.names).items()
        ]
        for its, apart, members in alike_nodes:
            parts: dict[tuple, list[int]] = {}
            for s, part in enumerate(zip(its, match.requests, apart, strict=True)):
                parts.setdefault(part, []).append(s)
            for (kind, reaching, offset), segments in parts.items():
                theta_dtype, counts = (kind, True) if counted is None else kind
                key = (theta_dtype, reaching, counts, *segments)
                if key not in found:
                    found[key] = GroupPlan(device, theta_dtype, dtype, reaching, match, tuple(segments), counts)
                found[key].nodes += members
                found[key].slots += slots.at(members, offset)
        groups += found.values()
        for index in indices:
            matches[index] = match
    return Program(nodes, requests, groups, matches, slots)  # type: ignore[arg-type]


def _by_kinds(indices: Sequence[int], columns: Sequence[Sequence]) -> dict[tuple, list[int]]:
    """Nodes by the kinds of their parameters, [names][nodes]: dtypes, and whether they are counted."""
    found: dict[tuple, list[int]] = {}
    for index, one in zip(indices, zip(*columns, strict=True), strict=bool(columns)):
        found.setdefault(one, []).append(index)
    return found


def _check_parameters(
    nodes: Sequence[ReachedNode], match: Match, columns: Sequence[Sequence[Described | None]]
) -> None:
    """Parameters must have the shape and device of their Fishers, and a dtype that kernels know."""
    device = nodes[0].fisher.device
    for segment, column in zip(match.segments, columns, strict=True):
        if type(None) not in set(map(type, column)) and all(
            shape == segment.shape and dtype in THETA_DTYPES and where == device
            for shape, dtype, where in set(map(_FACTS, column))
        ):
            continue
        for node, theta in zip(nodes, column, strict=True):
            _check_parameter(node, segment, theta)


def _match(node: ReachedNode, requests: list[ForgetRequest], on_mismatch: str) -> Match:
    layout = node.fisher.layout
    skipped: dict[str, None] = {}
    forgets: dict[int, Layout] = {}
    calls: dict[int, dict[str, str]] = {}
    for k in node.requests:
        forgets[k] = forget = requests[k].fisher.layout
        if called := _called(node, forget):
            calls[k] = called
            forgets[k] = forget = forget.renamed({theirs: own for own, theirs in called.items()})
        difference = layout.difference(forget, f"the original Fisher of {node.name!r}", "the forget Fisher", {})
        if difference is None:
            continue
        if on_mismatch == "error":
            raise LayoutError(
                f"node {node.name!r}: the forget Fisher of request {k} (from {requests[k].origin!r}) does not fit: "
                f'{difference}; estimate both over the same parameters, or pass on_mismatch="skip" to leave these out'
            )
        skipped.update(dict.fromkeys(s.name for s in forget if s.name not in layout or not layout[s.name].fits(s)))
    kept, reaching, numel = [], [], 0
    for segment in layout:
        fit = tuple(k for k in node.requests if segment.name in forgets[k] and forgets[k][segment.name].fits(segment))
        if not fit:
            skipped[segment.name] = None
            continue
        numel += math.prod(segment.whole)
        if segment.numel:
            kept.append(segment)
            reaching.append(fit)
    names = tuple(segment.name for segment in kept)
    return Match(tuple(kept), names, tuple(reaching), tuple(skipped), numel, calls)


def _called(node: ReachedNode, forget: Layout) -> dict[str, str]:
    """Name in the node's own Fisher -> name in a forget Fisher, where both mean one parameter of the model."""
    own = node.fisher.layout
    if forget == own or set(forget.names) <= set(own.names):
        return {}
    first_of = Names(node.model).first_of if isinstance(node.model, torch.nn.Module) else {}
    return {mine: theirs for theirs, mine in matched(forget.names, own.names, first_of).items()}


def _check_dtypes(node: ReachedNode, requests: list[ForgetRequest]) -> None:
    for k in node.requests:
        if requests[k].fisher.dtype != node.fisher.dtype:
            raise DTypeError(
                f"node {node.name!r}: its original Fisher is {node.fisher.dtype}, the forget Fisher of request {k} is "
                f"{requests[k].fisher.dtype}; convert one with fisher.to(dtype=…)"
            )


def _check_parameter(node: ReachedNode, segment: Segment, theta: Described | None) -> None:
    where, device = f"node {node.name!r}, parameter {segment.name!r}", node.fisher.device
    if isinstance(node.model, torch.nn.Module) and (theta is None or theta.shape != segment.shape):
        check_gathered(f"the model of node {node.name!r}", node.model)
    if theta is None:
        raise LayoutError(
            f"node {node.name!r}: the model has no parameter {segment.name!r}, its original Fisher has"
            f"{lacking(node.model, segment.name)}"
        )
    if theta.shape != segment.shape:
        raise LayoutError(f"{where}: shape {list(theta.shape)} in the model, {list(segment.shape)} in its Fisher")
    if theta.dtype not in THETA_DTYPES:
        raise DTypeError(f"{where}: {theta.dtype}, expected {listed(THETA_DTYPES)}")
    if theta.device == device:
        return
    advice = "move it with fisher.to(…)"
    if theta.device.type == "meta":
        advice = (
            "its weights are offloaded or were never loaded; load them first (Accelerate: "
            "accelerate.hooks.remove_hook_from_submodules(model))"
        )
    raise DeviceError(f"{where}: on {theta.device}, its original Fisher on {device}; {advice}")
