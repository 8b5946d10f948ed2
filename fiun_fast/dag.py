"""The inheritance DAG: models as nodes, an edge from a model to each that started from, averaged or distilled it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, NoneType
from typing import Any

import networkx as nx
import torch

from .arguments import check_number
from .errors import ArgumentError, DagError, LayoutError
from .estimates import Estimates
from .fisher import Fisher, check_alike
from .gradient import Gradient
from .scope import check_module

Model = torch.nn.Module | Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class ForgetRequest:
    """Everything that `origin` and its descendants learned from some data goes.

    Attributes:
        origin: the node where the data entered.
        fisher: forget Fisher F of that data, taken at the origin; or leave it out and pass `data`.
        weight: w_k, what F is multiplied by before it is merged with those of other requests.
        gradient: g_k of the loss on that data, at the origin, over the layout of F, for signed selection; all requests
            of a plan have one, or none. Merged it is g = Σ_k w_k g_k, the gradient of Σ_k w_k (loss of request k).
        data: the data itself: a loader, of which the first plan that needs F estimates it at the origin. A Fisher that
            is given is used as it is.
        estimates: what was estimated of the data; kept here.

    """

    origin: str
    fisher: Fisher = None  # type: ignore[assignment]  # what is compiled has one: `estimating` sees to it
    weight: float = 1.0
    gradient: Gradient | None = None
    data: Iterable[Any] | None = field(default=None, repr=False)  # no log is to show what is to be forgotten
    estimates: Estimates = field(default_factory=Estimates, init=False, repr=False)


@dataclass
class Node:
    """A model of the DAG: `dag[name]`.

    Attributes:
        name: unique in its DAG.
        model: a module, or a dict of tensors.
        fisher: original Fisher I over the data the model was trained on, or None.
        time: when the model came to be, or None.
        data: loader over the data the model was trained on, or None: of it the first plan that needs the original
            Fisher estimates it. A Fisher that is given is used as it is.

    """

    name: str
    model: Model
    fisher: Fisher | None = None
    time: float | None = None
    data: Iterable[Any] | None = field(default=None, repr=False)
    _estimates: Estimates | None = field(default=None, init=False, repr=False)  # nodes may be 100,000

    @property
    def estimates(self) -> Estimates:
        """What was estimated of the data; kept here.

        A model of which nothing but the parameters in scope was trained further needs `estimates.clear()`; other
        training is noticed.
        """
        if self._estimates is None:
            self._estimates = Estimates()
        return self._estimates


class InheritanceDAG:
    """Models and who inherited from whom: nodes by name (`dag["u1"]` is a `Node`), edges in the networkx graph `graph`.

    Parents come before children, so a DAG built with `add_model` has no cycle; a graph edited by hand is checked again
    when it is planned.
    """

    def __init__(self) -> None:
        self.graph = nx.DiGraph()  # names and edges; what belongs to a node is in its Node
        self._nodes: dict[str, Node] = {}
        self._newest: dict[str, float] = {}  # name -> latest time of the node and its ancestors, when it was added

    def add_model(
        self,
        name: str,
        model: Model,
        fisher: Fisher | None = None,
        *,
        parents: Iterable[str] = (),
        time: float | None = None,
        data: Iterable[Any] | None = None,
    ) -> None:
        """Add a node.

        Args:
            name: unique name of the node.
            model: a module, or a dict of tensors (a state dict); referred to, not copied.
            fisher: original Fisher over the data the model was trained on; needed where a request reaches the node.
            parents: names of nodes already added.
            time: when the model came to be, in any unit; a child may not be older than an ancestor.
            data: in place of the Fisher, the data: a loader such as `estimate_fisher` takes. The Fisher is estimated
                when a plan needs it, once; nodes that share a loader are estimated in one sweep over it.

        Raises:
            DagError: duplicate name, unknown parent, or a time that runs backwards.
            ArgumentError: an argument of another type.

        """
        if not isinstance(name, str):
            raise ArgumentError(f"node name {name!r} is a {type(name).__name__}, expected a string")
        if name in self.graph:
            raise DagError(f"node {name!r} exists already")
        check_model(name, model)
        check_original(name, fisher)
        check_time(name, time)
        if isinstance(data, Fisher):
            raise ArgumentError(f"node {name!r}: data is a Fisher, expected a loader; pass it as fisher=")
        if not isinstance(parents, Iterable):
            raise ArgumentError(f"node {name!r}: parents is a {type(parents).__name__}, expected a list of names")
        above = [parents] if isinstance(parents, str) else list(parents)
        for parent in above:
            if parent not in self.graph:
                raise DagError(f"node {name!r}: unknown parent {parent!r}; known nodes: {self._known()}")
        latest = max((self._newest.get(p, -math.inf) for p in above), default=-math.inf)
        if time is not None and not time >= latest:
            raise DagError(f"node {name!r} has time {time}, but inherits from a model of time {latest}")
        self._newest[name] = latest if time is None else float(time)
        self._nodes[name] = Node(name, model, fisher, time, data)
        self.graph.add_node(name)
        self.graph.add_edges_from((parent, name) for parent in above)

    def __getitem__(self, name: str) -> Node:
        """Return the node of that name.

        Raises:
            DagError: there is none, or it was added to the graph by hand and has no model.

        """
        node = self._nodes.get(name) if isinstance(name, str) else None
        if not isinstance(name, str) or name not in self.graph.adj:
            raise DagError(f"no node {name!r} in the DAG; known nodes: {self._known()}")
        if node is None:
            raise DagError(f"node {name!r} has no model: add it with add_model")
        return node

    @property
    def lacks_fishers(self) -> bool:
        """Whether any node has data in the place of a Fisher."""
        return any(node.fisher is None and node.data is not None for node in self._nodes.values())

    def held(self) -> Mapping[str, Node]:
        """The nodes that were added with a model, by name: all but those that were put into `graph` by hand."""
        return MappingProxyType(self._nodes)

    def parents(self, name: str) -> list[str]:
        """Names of the models this one inherited from directly."""
        return list(self.graph.predecessors(name))

    def __contains__(self, name: object) -> bool:
        return name in self.graph

    def _known(self) -> str:
        return ", ".join(map(str, list(self.graph)[:8])) or "none yet"

    def __iter__(self) -> Iterator[str]:
        return iter(self.graph)

    def __len__(self) -> int:
        return len(self.graph)

    def __repr__(self) -> str:
        return f"InheritanceDAG({len(self)} models, {self.graph.number_of_edges()} edges)"

    def reached_by(self, requests: Sequence[ForgetRequest]) -> dict[str, tuple[int, ...]]:
        """S(n) for every node that has one: node -> indices of the requests whose origin is the node or an ancestor.

        Raises:
            DagError: as `reached`.

        """
        return {node.name: reaching for node, reaching in self.reached(requests)}

    def reached(self, requests: Sequence[ForgetRequest]) -> list[tuple[Node, tuple[int, ...]]]:
        """Every node that has a non-empty S(n), with it, in the order of the DAG.

        Raises:
            DagError: an origin is unknown; or the graph, edited by hand, has a cycle, a node without a model, or a time
                that runs backwards.

        """
        own: dict[str, int] = {}
        for k, request in enumerate(requests):
            if request.origin not in self.graph:
                raise DagError(f"request {k}: unknown origin {request.origin!r}; known nodes: {self._known()}")
            own[request.origin] = own.get(request.origin, 0) | 1 << k
        try:
            order = list(nx.topological_sort(self.graph))
        except nx.NetworkXUnfeasible:
            cycle = " -> ".join(str(edge[0]) for edge in nx.find_cycle(self.graph))
            raise DagError(f"the inheritance graph has a cycle: {cycle}") from None
        children = dict(self.graph.adjacency())  # a plain dict: views are slow
        masks = dict.fromkeys(order, 0) | own
        newest = dict.fromkeys(order, -math.inf)
        for name in order:
            node = self._nodes.get(name) or self[name]  # the latter says what is wrong
            mask, latest, time = masks[name], newest[name], node.time
            if time is not None:
                check_time(name, time)
                if time < latest:
                    raise DagError(f"node {name!r} has time {time}, but inherits from a model of time {latest}")
                latest = time
            for child in children[name]:
                masks[child] |= mask
                if newest[child] < latest:
                    newest[child] = latest
        indices: dict[int, tuple[int, ...]] = {}  # few distinct masks, many nodes
        reached = []
        for name in self.graph:
            if mask := masks[name]:
                if mask not in indices:
                    indices[mask] = tuple(k for k in range(len(requests)) if mask >> k & 1)
                reached.append((self._nodes[name], indices[mask]))
        return reached


def check_model(name: str, model: object) -> None:
    """Raise an ArgumentError where the model of that node is none."""
    if not isinstance(model, (torch.nn.Module, Mapping)):
        found = type(model).__name__
        hint = "; pass the module that it was made from" if found == "ExportedProgram" else ""
        raise ArgumentError(f"node {name!r}: model is a {found}, expected a module or a dict of tensors{hint}")
    if isinstance(model, torch.nn.Module):
        check_module(f"node {name!r}: model", model)


def check_original(name: str, fisher: object) -> None:
    """Raise an ArgumentError where the original Fisher of that node is neither None nor a Fisher."""
    if fisher is not None and not isinstance(fisher, Fisher):
        raise ArgumentError(f"node {name!r}: fisher is a {type(fisher).__name__}, expected a fiun_fast.Fisher")


def check_time(name: str, time: object) -> None:
    """Raise an ArgumentError where the time of that node is neither None nor a number that a float holds."""
    if time is None:
        return
    if isinstance(time, bool) or not isinstance(time, numbers.Real):
        raise ArgumentError(f"node {name!r}: time is a {type(time).__name__}, expected a number")
    try:
        float(time)
    except OverflowError:
        raise ArgumentError(f"node {name!r}: time is too large for a float") from None


def check_requests(requests: Iterable[ForgetRequest]) -> list[ForgetRequest]:
    """The requests as a list; an ArgumentError where there are none or one is malformed."""
    if not isinstance(requests, Iterable):
        raise ArgumentError(f"requests is a {type(requests).__name__}, expected a list of ForgetRequests")
    listed = list(requests)
    if not listed:
        raise ArgumentError("no forget requests: nothing to plan")
    for k, request in enumerate(listed):
        if not isinstance(request, ForgetRequest) or not isinstance(request.fisher, (Fisher, NoneType)):
            raise ArgumentError(
                f"request {k} is {request!r:.80}, expected ForgetRequest(origin, Fisher), or ForgetRequest(origin, "
                "data=loader)"
            )
        what = f"request {k} ({request.origin!r})"
        if isinstance(request.data, Fisher) or (request.fisher is None and request.data is None):
            found = "no Fisher and no data" if request.data is None else "a Fisher as data"
            raise ArgumentError(f"{what} has {found}: pass fisher=, or data= and a loader over what is to be forgotten")
        if request.fisher is not None:
            request.fisher.check_memory(f"the forget Fisher of request {k}")
        check_number(
            f"{what}: weight", request.weight, torch.float32 if request.fisher is None else request.fisher.dtype
        )
        if request.gradient is not None and request.fisher is None:
            raise ArgumentError(
                f"{what} has a gradient and no Fisher: they lie element by element beside each other, so estimate the "
                "Fisher and pass both"
            )
        if request.gradient is not None:
            _check_gradient(
                f"the gradient of request {k}", request.gradient, f"the forget Fisher of request {k}", request
            )
    signed = [request.gradient is not None for request in listed]
    if any(signed) and not all(signed):
        raise ArgumentError(
            f"request {signed.index(True)} has a gradient, request {signed.index(False)} has none: signed selection "
            "needs one of each request; plan signed and unsigned requests apart"
        )
    return listed


def _check_gradient(what: str, gradient: object, beside: str, request: ForgetRequest) -> None:
    """Raise an error where a gradient does not lie element by element beside its forget Fisher."""
    if not isinstance(gradient, Gradient):
        raise ArgumentError(f"{what} is a {type(gradient).__name__}, expected a fiun_fast.Gradient")
    check_alike(request.fisher, beside, gradient, what)
    if gradient.layout != request.fisher.layout:
        raise LayoutError(f"{what} has the parameters of {beside} in another order")
