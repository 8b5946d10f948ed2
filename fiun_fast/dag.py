"""The inheritance DAG: models as nodes, an edge from a model to each that started from, averaged or distilled it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import torch

from .errors import ArgumentError, DagError
from .fisher import Fisher, check_number

Model = torch.nn.Module | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ForgetRequest:
    """Everything that `origin` and its descendants learned from some data goes.

    Attributes:
        origin: the node where the data entered.
        fisher: forget Fisher F of that data, taken at the origin.
        weight: w_k, what F is multiplied by before it is merged with those of other requests.

    """

    origin: str
    fisher: Fisher
    weight: float = 1.0


class InheritanceDAG:
    """Models and who inherited from whom; the networkx graph itself is at `graph`.

    Node attributes are `model`, `fisher` (the original Fisher I, or None) and `time`. Parents come before children, so
    a DAG built with `add_model` has no cycle; a graph edited by hand is checked again when it is planned.
    """

    def __init__(self) -> None:
        self.graph = nx.DiGraph()

    def add_model(
        self,
        name: str,
        model: Model,
        fisher: Fisher | None = None,
        parents: Iterable[str] = (),
        time: float | None = None,
    ) -> None:
        """Add a node.

        Args:
            name: unique name of the node.
            model: a module, or a dict of tensors (a state dict); referred to, not copied.
            fisher: original Fisher over the data the model was trained on; needed where a request reaches the node.
            parents: names of nodes already added.
            time: when the model came to be, in any unit; a child may not be older than an ancestor.

        Raises:
            DagError: duplicate name, unknown parent, or a time that runs backwards.
            ArgumentError: an argument of another type.

        """
        if not isinstance(name, str):
            raise ArgumentError(f"node name {name!r} is a {type(name).__name__}, expected a string")
        if name in self.graph:
            raise DagError(f"node {name!r} exists already")
        if not isinstance(model, (torch.nn.Module, Mapping)):
            found = type(model).__name__
            raise ArgumentError(f"node {name!r}: model is a {found}, expected a module or a dict of tensors")
        if fisher is not None and not isinstance(fisher, Fisher):
            raise ArgumentError(f"node {name!r}: fisher is a {type(fisher).__name__}, expected a fiun_fast.Fisher")
        above = [parents] if isinstance(parents, str) else list(parents)
        for parent in above:
            if parent not in self.graph:
                known = ", ".join(list(self.graph)[:8]) or "none yet"
                raise DagError(f"node {name!r}: unknown parent {parent!r}; known nodes: {known}")
        latest = max((self.graph.nodes[p]["latest"] for p in above), default=-math.inf)
        if time is not None and not time >= latest:
            raise DagError(f"node {name!r} has time {time}, but inherits from a model of time {latest}")
        newest = latest if time is None else float(time)
        self.graph.add_node(name, model=model, fisher=fisher, time=time, latest=newest)
        self.graph.add_edges_from((parent, name) for parent in above)

    def parents(self, name: str) -> list[str]:
        """Names of the models this one inherited from directly."""
        return list(self.graph.predecessors(name))

    def __contains__(self, name: object) -> bool:
        return name in self.graph

    def __iter__(self):
        return iter(self.graph)

    def __len__(self) -> int:
        return len(self.graph)

    def __repr__(self) -> str:
        return f"InheritanceDAG({len(self)} models, {self.graph.number_of_edges()} edges)"

    def reached_by(self, requests: Sequence[ForgetRequest]) -> dict[str, tuple[int, ...]]:
        """S(n) for every node that has one: node -> indices of the requests whose origin is the node or an ancestor.

        Raises:
            DagError: an origin is unknown; or the graph, edited by hand, has a cycle, a node without a model, or a time
                that runs backwards.

        """
        own: dict[str, int] = {}
        for k, request in enumerate(requests):
            if request.origin not in self.graph:
                known = ", ".join(list(self.graph)[:8]) or "none yet"
                raise DagError(f"request {k}: unknown origin {request.origin!r}; known nodes: {known}")
            own[request.origin] = own.get(request.origin, 0) | 1 << k
        try:
            order = list(nx.topological_sort(self.graph))
        except nx.NetworkXUnfeasible:
            cycle = " -> ".join(str(edge[0]) for edge in nx.find_cycle(self.graph))
            raise DagError(f"the inheritance graph has a cycle: {cycle}") from None
        nodes, children = dict(self.graph.nodes(data=True)), dict(self.graph.adjacency())  # plain dicts: views are slow
        masks = dict.fromkeys(nodes, 0) | own
        newest = dict.fromkeys(nodes, -math.inf)
        for name in order:
            node = nodes[name]
            if "model" not in node:
                raise DagError(f"node {name!r} has no model: add it with add_model")
            mask, latest, time = masks[name], newest[name], node.get("time")
            if time is not None:
                if time < latest:
                    raise DagError(f"node {name!r} has time {time}, but inherits from a model of time {latest}")
                latest = time
            for child in children[name]:
                masks[child] |= mask
                if newest[child] < latest:
                    newest[child] = latest
        indices: dict[int, tuple[int, ...]] = {}  # few distinct masks, many nodes
        reached = {}
        for name in self.graph:
            if mask := masks[name]:
                if mask not in indices:
                    indices[mask] = tuple(k for k in range(len(requests)) if mask >> k & 1)
                reached[name] = indices[mask]
        return reached


def check_requests(requests: Iterable[ForgetRequest]) -> list[ForgetRequest]:
    """The requests as a list; an ArgumentError where there are none or one is malformed."""
    listed = list(requests)
    if not listed:
        raise ArgumentError("no forget requests: nothing to plan")
    for k, request in enumerate(listed):
        if not isinstance(request, ForgetRequest) or not isinstance(request.fisher, Fisher):
            raise ArgumentError(f"request {k} is {request!r:.80}, expected ForgetRequest(origin, Fisher)")
        check_number(f"request {k} ({request.origin!r}): weight", request.weight)
    return listed
