"""An inheritance DAG of which each rank holds some nodes: names and edges are those of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import networkx as nx

from ..dag import InheritanceDAG as LocalDAG
from ..dag import Model
from ..errors import ArgumentError, DagError
from ..fisher import Fisher


class InheritanceDAG(LocalDAG):
    """The nodes that this rank holds; their parents may be other ranks'. For `ff.distributed.plan`."""

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
        """Add a node that lies here, or of which a part does.

        Args:
            name: the same on all ranks that hold it.
            model, fisher, time: as in `fiun_fast.InheritanceDAG`.
            parents: names of nodes, wherever they are; they may be added later.
            data: refused: estimate the Fisher where the model lies, and pass it.

        Raises:
            DagError: this rank has the node already, or a time that runs backwards.
            ArgumentError: an argument of another type.

        """
        if data is not None:
            raise ArgumentError(
                f"node {name!r} of a DAG over ranks has data in the place of a Fisher: pass fisher=estimate_fisher(…)"
            )
        above = [parents] if isinstance(parents, str) else list(parents)
        elsewhere = [one for one in above if isinstance(one, str) and one not in self.graph]
        below = list(self.graph.successors(name)) if self._is_elsewhere(name) else []
        if below:
            self.graph.remove_node(name)
        self.graph.add_nodes_from(elsewhere)
        try:
            super().add_model(name, model, fisher, parents=above, time=time)
        except BaseException:
            self.graph.remove_nodes_from(elsewhere)
            raise
        finally:
            self.graph.add_edges_from((name, child) for child in below)

    def _is_elsewhere(self, name: object) -> bool:
        return isinstance(name, str) and name in self.graph and name not in self.held()


def joined(parts: Iterable[tuple[Sequence[str], Sequence[tuple[str, str]]]]) -> nx.DiGraph:
    """One graph of what each rank holds: names, and edges as (parent, child).

    Raises:
        DagError: a parent that no rank holds, or a cycle.

    """
    graph = nx.DiGraph()
    edges: list[tuple[str, str]] = []
    for names, its in parts:
        graph.add_nodes_from(names)
        edges += its
    for parent, child in edges:
        if parent not in graph:
            raise DagError(f"node {child!r} inherits from {parent!r}, which no rank holds")
    graph.add_edges_from(edges)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = " -> ".join(str(edge[0]) for edge in nx.find_cycle(graph))
        raise DagError(f"the inheritance graph has a cycle: {cycle}")
    return graph


def reaching(graph: nx.DiGraph, origins: Sequence[str]) -> Mapping[str, tuple[int, ...]]:
    """S(n) of each node that has one, in the graph's order: indices of the requests at it or above it.

    Raises:
        DagError: an origin that no rank holds.

    """
    masks = dict.fromkeys(graph, 0)
    for k, origin in enumerate(origins):
        if origin not in masks:
            raise DagError(f"request {k}: unknown origin {origin!r}: no rank holds it")
        masks[origin] |= 1 << k
    children = dict(graph.adjacency())
    for name in nx.topological_sort(graph):
        for child in children[name]:
            masks[child] |= masks[name]
    known = {mask: tuple(k for k in range(len(origins)) if mask >> k & 1) for mask in set(masks.values()) if mask}
    return {name: known[mask] for name, mask in masks.items() if mask}
