"""The plan of a DAG whose nodes lie on several ranks: all know S(n), forget Fishers travel once, one launch each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ..arguments import MergeRule, OnMismatch
from ..compiling import reached_node
from ..dag import ForgetRequest, InheritanceDAG, Model, check_requests
from ..dtensors import is_dtensor, parameters_of
from ..errors import ArgumentError, LayoutError
from ..fisher import Fisher
from ..gradient import Gradient
from ..kernels.cpu import expect_writes
from ..layout import Layout
from ..live import Links
from ..planning import Plan
from ..provenance import Provenance
from ..ranks import Fact, Ranks, together
from ..report import Facts, Report
from ..spread import Spread
from ..undo import UndoLog
from ..unlearning import Making, Options
from ..values import Number, Numbers, PerGroup, PerNode, Slots, Values
from .graph import joined, reaching


@dataclass(frozen=True)
class Sent:
    """A request, as all ranks hear of it."""

    holder: int  # rank that has the Fisher
    origin: str
    weight: float
    layout: Layout
    dtype: torch.dtype
    signed: bool
    provenance: Provenance


@dataclass(frozen=True)
class Told:
    """What a rank tells all others of what it holds."""

    nodes: list[str]
    edges: list[tuple[str, str]]
    requests: list[Sent]


def plan(
    dag: InheritanceDAG,
    requests: Iterable[ForgetRequest] = (),
    *,
    group: dist.ProcessGroup | None = None,
    alpha: PerGroup | str = 10.0,
    lam: PerGroup = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    merge: MergeRule = "max",
    scale: float = 1.0,
    on_mismatch: OnMismatch = "error",
    backend: str | None = None,
    forget_fraction: PerNode | None = None,
) -> DistributedPlan:
    """Compile the unlearning of all ranks' requests in all models of a DAG that lies on several ranks.

    Every rank of the group calls it, with the nodes and the requests that it holds. Names and edges go to all ranks,
    so that each knows S(n); each forget Fisher goes once to each rank with a node that it reaches. A run then talks to
    nobody.

    Args:
        dag: the nodes that this rank holds, best a `fiun_fast.distributed.InheritanceDAG`, whose nodes may inherit from
            other ranks'. A node on several ranks is spread over them (DTensors), or they have copies, which are all
            dampened and counted once.
        requests: those whose Fishers this rank has, whole; the requests of all ranks together count. Origins may lie
            on other ranks.
        group: the ranks; None: all.
        alpha, lam, exponent, cap, merge, scale, on_mismatch, backend, forget_fraction: as in `fiun_fast.plan`, and the
            same on all ranks; dicts name nodes of all of them.

    Raises:
        FiunError: as `fiun_fast.plan`; the same on all ranks, and names the rank that met it. Nothing has been changed.
        DagError: an origin or a parent that no rank holds, or a cycle.
        LayoutError: a request's Fisher is one rank's part.
        DistributedError: a rank does not answer within the group's timeout.

    """
    ranks = Ranks.of_group(group if group is not None else dist.group.WORLD)
    options = Options(alpha, lam, exponent, cap, merge, scale, on_mismatch, backend, forget_fraction)
    with together(ranks) as facts:
        if not isinstance(dag, InheritanceDAG):
            raise ArgumentError(f"dag is a {type(dag).__name__}, expected an InheritanceDAG")
        listed = _listed(requests)
        held = dag.held()
        told = Told(list(held), list(dag.graph.edges), [_sent(ranks.rank, one) for one in listed])
        facts |= {key: Fact(value) for key, value in vars(options).items() if key != "backend"}
    every = ranks.gather(told)
    sent = [one for said in every for one in said.requests]
    graph = joined((said.nodes, said.edges) for said in every)
    if not sent:
        raise ArgumentError("no forget requests on any rank: nothing to plan")
    reached = reaching(graph, [one.origin for one in sent])
    holders: dict[str, list[int]] = {name: [] for name in graph}
    for rank, said in zip(ranks.members, every, strict=True):
        for name in said.nodes:
            holders[name].append(rank)
    mine = _exchanged(ranks, sent, listed, reached, holders)
    own: Plan | None = None
    with together(ranks):
        making = _making(held, reached, mine, holders, frozenset(graph), options)
        own = None if making is None else making.finished()
    about = {} if own is None else _about(own)
    return DistributedPlan(ranks, own, sent, reached, [*map(dict, ranks.gather(about))], frozenset(graph), options)


class DistributedPlan:
    """What `fiun_fast.distributed.plan` returns: a plan of what lies here, and reports on all nodes of all ranks.

    Attributes:
        local: the plan of the nodes that this rank holds, or parts of; None where no request reaches any.
        ranks: all that take part.

    """

    def __init__(
        self,
        ranks: Ranks,
        local: Plan | None,
        sent: Sequence[Sent],
        reached: Mapping[str, tuple[int, ...]],
        about: Sequence[Mapping[str, tuple[tuple[str, ...], int, Number, Number]]],
        known: frozenset[str],
        options: Options,
    ) -> None:
        """Put together what all ranks have said of their nodes: skipped parameters, elements, alpha and lambda."""
        self.ranks, self.local = ranks, local
        every = {name: one for said in reversed(about) for name, one in said.items()}
        nodes = [
            (name, tuple(sent[k].origin for k in its), every[name][0], every[name][1]) for name, its in reached.items()
        ]
        alpha, lam = [every[name][2] for name in reached], [every[name][3] for name in reached]
        self._values = Values(Numbers.given(alpha), Numbers.given(lam))
        place = {name: i for i, name in enumerate(reached)}
        self._rows = [] if local is None else [place[name] for name in local.nodes]
        numbers = {"exponent": options.exponent, "cap": options.cap, "scale": options.scale, "merge": options.merge}
        requests = tuple((one.origin, float(one.weight), None, None) for one in sent)
        mine = None if local is None else local.facts
        self._facts = Facts(
            nodes,
            known,
            numbers,
            () if mine is None else mine.backends,
            requests,
            {} if mine is None else mine.originals,
            sent[0].signed,
        )

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes that a run dampens, on whatever rank."""
        return [name for name, *_ in self._facts.nodes]

    def run_(self, *, dry_run: bool = False, undo: bool = False, audit: bool = False) -> Report:
        """Dampen what lies here, in place; every rank calls it. No rank waits for another.

        With `undo` or `audit`, whose preparations may fail, ranks wait for one another before any writes.

        Args:
            dry_run, undo, audit: as in `fiun_fast.Plan.run_`. What an audit adds is of this rank's nodes.

        Returns:
            A report on all nodes. It is added up over the ranks when it is first looked at: all have to look.
            `undo_()` undoes what lies here.

        Raises:
            FiunError: as `fiun_fast.Plan.run_`.

        """
        if dry_run and undo:
            raise ArgumentError("a dry run changes nothing, so there is nothing to undo: leave out dry_run or undo")
        if self.local is not None:
            report = self.local.run_among(self.ranks, dry_run=bool(dry_run), undo=undo, audit=audit)
            return report.among(self._facts, self._rows, self._values, self.ranks)
        with together(self.ranks if undo or audit else None):
            log = UndoLog([], Links()) if undo else None
        slots = Slots.plain(len(self._facts.nodes))
        return Report(self._facts, [], self._values, slots, dry_run=bool(dry_run), undo=log, ranks=self.ranks)

    def __str__(self) -> str:
        here = "nothing that a request reaches" if self.local is None else str(self.local)
        return f"{len(self.nodes):,} nodes over {len(self.ranks.members)} ranks; here:\n{here}"

    def __repr__(self) -> str:
        return f"DistributedPlan({len(self.nodes)} nodes over {len(self.ranks.members)} ranks, {len(self._rows)} here)"


def _about(own: Plan) -> dict[str, tuple[tuple[str, ...], int, Number, Number]]:
    """What other ranks' reports say of the nodes that lie here: left out, elements, alpha, lambda."""
    rows = zip(own.facts.nodes, own.values.alpha.all(), own.values.lam.all(), strict=True)
    return {name: (skipped, numel, its_alpha, its_lam) for (name, _, skipped, numel), its_alpha, its_lam in rows}


def _listed(requests: Iterable[ForgetRequest]) -> list[ForgetRequest]:
    """Those of this rank, checked; there may be none."""
    if not isinstance(requests, Iterable):
        raise ArgumentError(f"requests is a {type(requests).__name__}, expected a list of ForgetRequests")
    listed = list(requests)
    listed = check_requests(listed) if listed else []
    for k, request in enumerate(listed):
        if request.fisher is None:
            raise ArgumentError(f"request {k} has data in the place of a Fisher: pass ForgetRequest(origin, fisher)")
        if request.fisher.layout.sharded:
            raise LayoutError(f"the forget Fisher of request {k} is one rank's part: pass fisher.full(), on one rank")
    return listed


def _sent(rank: int, request: ForgetRequest) -> Sent:
    fisher = request.fisher
    signed = request.gradient is not None
    provenance = replace(fisher.provenance, how={})
    return Sent(rank, request.origin, float(request.weight), fisher.layout, fisher.dtype, signed, provenance)


def _exchanged(
    ranks: Ranks,
    sent: Sequence[Sent],
    listed: Sequence[ForgetRequest],
    reached: Mapping[str, tuple[int, ...]],
    holders: Mapping[str, Sequence[int]],
) -> dict[int, ForgetRequest]:
    """The requests that reach this rank's nodes, by index: each Fisher travels once to each rank that needs it.

    All ranks go through the same list of journeys, so that whoever is waited for is on the way.

    Raises:
        ArgumentError: some requests have gradients and others have none; the same on all ranks.

    """
    signed = [one.signed for one in sent]
    if any(signed) and not all(signed):
        raise ArgumentError(
            f"request {signed.index(True)} has a gradient, request {signed.index(False)} has none: signed selection "
            "needs one of each request; plan signed and unsigned requests apart"
        )
    needed: list[set[int]] = [set() for _ in sent]
    for name, its in reached.items():
        for k in its:
            needed[k].update(holders[name])
    own = iter(listed)
    mine: dict[int, ForgetRequest] = {}
    for k, one in enumerate(sent):
        request = next(own) if one.holder == ranks.rank else None
        for rank in sorted(needed[k] - {one.holder}):
            if request is not None:
                for vector in (request.fisher, request.gradient):
                    if vector is not None:
                        ranks.send(vector.buffer, rank)
            elif rank == ranks.rank:
                buffers = []
                for _ in range(2 if one.signed else 1):
                    buffers.append(expect_writes(torch.empty(one.layout.numel, dtype=one.dtype, device=ranks.device)))
                    ranks.receive(buffers[-1], one.holder)
                gradient = Gradient(buffers[1], one.layout) if one.signed else None
                mine[k] = ForgetRequest(
                    one.origin, Fisher(buffers[0], one.layout, one.provenance), one.weight, gradient
                )
        if request is not None and ranks.rank in needed[k]:
            mine[k] = request
    return mine


def _making(
    held: Mapping[str, Any],
    reached: Mapping[str, tuple[int, ...]],
    mine: Mapping[int, ForgetRequest],
    holders: Mapping[str, Sequence[int]],
    known: frozenset[str],
    options: Options,
) -> Making | None:
    """A plan of this rank's nodes; None where no request reaches any."""
    at = {k: i for i, k in enumerate(sorted(mine))}
    nodes = [reached_node(node, tuple(at[k] for k in reached[name])) for name, node in held.items() if name in reached]
    if not nodes:
        return None
    requests = [mine[k] for k in sorted(mine)]
    bystanders: dict[str, Model] = {name: node.model for name, node in held.items() if name not in reached}
    spread = None
    cut = any(map(is_dtensor, parameters_of(node.model for node in nodes)))
    if cut and isinstance(options.alpha, str):
        raise ArgumentError(
            'alpha="auto" with a node that is spread over ranks: plan such models with fiun_fast.plan, or give a number'
        )
    if cut or any(len(holders[node.name]) > 1 for node in nodes):
        spread = Spread(None, nodes, requests, bystanders, holders)
    return Making(nodes, requests, bystanders, known, options, spread)
