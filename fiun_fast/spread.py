"""Models spread over ranks, in a plan: Fishers cut as their models are, and what is added up over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed import get_rank

from .arguments import short
from .compiling import ReachedNode
from .dag import ForgetRequest, Model
from .dtensors import LocalPart, is_dtensor, part_of, reshard_, sharding_modules
from .errors import LayoutError
from .kernels.table import Merging
from .layout import Layout, Shard
from .naming import Names, matched
from .ranks import Fact, Ranks
from .report import Facts, ParameterReport
from .values import Number, Values
from .vectors import Vector

V = TypeVar("V", bound=Vector)
Find = Callable[[str], Any]


class Spread:
    """What a plan has to know of the ranks that its models are spread over.

    Attributes:
        ranks: all that have the same plan, and add up what they count; None: each has its own, and nobody does.
        modules: of FSDP2, whose parameters have to be sharded when they are looked at.

    Args:
        ranks: as above.
        nodes, requests, bystanders: of the plan.
        holders: node -> the ranks that have it, or parts of it; None: all of `ranks` have each.

    """

    def __init__(
        self,
        ranks: Ranks | None,
        nodes: Sequence[ReachedNode],
        requests: Sequence[ForgetRequest],
        bystanders: Mapping[str, Model],
        holders: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        members = () if ranks is None else ranks.members
        self._holders = dict.fromkeys((node.name for node in nodes), members) if holders is None else holders
        self.ranks, self._nodes, self._requests = ranks, nodes, requests
        self.modules = sharding_modules([*(node.model for node in nodes), *bystanders.values()])
        self._taken: list[tuple[Vector, Layout, Tensor, int]] = []  # vectors that were cut, as they were then

    def counts(self, node: str, part: LocalPart | None) -> bool:
        """Whether this rank counts these elements of a node; None: of a plain tensor, whole on all that hold the node.

        Where the mesh of a DTensor is smaller than the ranks that hold the node, others hold copies of it.
        """
        first = min(self._holders[node])
        return first == get_rank() if part is None else part.first and first in part.ranks

    def localised(self) -> tuple[list[ReachedNode], list[ForgetRequest]]:
        """The same nodes and requests, with this rank's parts of their Fishers and gradients.

        A request that nodes want cut in several ways is there several times.

        Raises:
            LayoutError: a Fisher was cut otherwise than its model, or was cut and the model is whole.

        """
        reshard_(self.modules)
        self._taken = []
        parts: dict[tuple[int, Layout], Any] = {}
        requests = list(self._requests)
        places: dict[tuple[int, Layout], int] = {}
        taken: set[int] = set()
        nodes = []
        for node in self._nodes:
            find = _finder(node.model, node.fisher.layout.names)
            where = f"the original Fisher of {node.name!r}"
            own = self._part(node.fisher, _cut(where, node.fisher.layout, find), parts)
            reaching = []
            for k in node.requests:
                request, where = self._requests[k], f"node {node.name!r}, the forget Fisher of request {k}"
                its = request.fisher.layout
                layout = _cut(where, its, _also(node.model, find, its))
                if (k, layout) not in places:
                    places[k, layout] = len(requests) if k in taken else k
                    requests += [request] * (k in taken)
                    taken.add(k)
                    gradient = request.gradient
                    requests[places[k, layout]] = replace(
                        request,
                        fisher=self._part(request.fisher, layout, parts),
                        gradient=None if gradient is None else self._part(gradient, layout, parts),
                    )
                reaching.append(places[k, layout])
            nodes.append(ReachedNode(node.name, node.model, own, tuple(reaching)))
        return nodes, requests

    def _part(self, vector: V, layout: Layout, known: dict[tuple[int, Layout], Any]) -> V:
        if layout == vector.layout:
            return vector
        if (id(vector), layout) not in known:
            known[id(vector), layout] = vector.part(layout)
            self._taken.append((vector, vector.layout, vector.buffer, _version(vector.buffer)))
        return known[id(vector), layout]

    def stale(self) -> bool:
        """Whether a vector that was cut has changed since: parts are copies."""
        return any(
            vector.layout is not layout or vector.buffer is not buffer or _version(buffer) != version
            for vector, layout, buffer, version in self._taken
        )

    def facts(self, facts: Facts) -> Facts:
        """The same of the Fishers and gradients as they were given."""
        requests = tuple(
            (r.origin, float(r.weight), ref(r.fisher), None if r.gradient is None else ref(r.gradient))
            for r in self._requests
        )
        return replace(facts, requests=requests, originals={node.name: ref(node.fisher) for node in self._nodes})

    def said(
        self, merging: Merging, values: Values, shape: tuple[float, float], auto: str, on_mismatch: str
    ) -> dict[str, Fact]:
        """What all ranks must have alike.

        Args:
            merging, values, on_mismatch: of the plan.
            shape: its exponent and cap.
            auto: how alpha will be chosen, where it is not there yet.

        """
        facts = {
            "alpha": Fact(auto or _one(values.alpha.all())),
            "lam": Fact(_one(values.lam.all())),
            "merge": Fact(merging.how),
            "on_mismatch": Fact(on_mismatch),
        }
        facts |= {key: Fact(value) for key, value in
                  (("exponent", shape[0]), ("cap", shape[1]), ("scale", merging.scale))}  # fmt: skip
        facts["the list of nodes"] = Fact([node.name for node in self._nodes])
        facts["the list of requests"] = Fact([(one.origin, one.weight) for one in self._requests])
        for node in self._nodes:
            facts[f"the layout of the original Fisher of {node.name!r}"] = _of_layout(node.fisher)
        for k, request in enumerate(self._requests):
            facts[f"the layout of the forget Fisher of request {k}"] = _of_layout(request.fisher)
        return facts

    def audited(
        self, figures: Mapping[int, Sequence[ParameterReport]], facts: Facts
    ) -> dict[str, tuple[ParameterReport, ...]]:
        """What this rank has found of each node's parameters, added up over the ranks: one all-reduce."""
        rows: list[tuple[int, str, tuple[int, ...], str]] = []
        for i, node in enumerate(self._nodes):
            find, skipped = _finder(node.model, node.fisher.layout.names), facts.nodes[i][2]
            for s in node.fisher.layout.unsharded():
                if s.numel and s.name not in skipped:
                    rows.append((i, s.name, s.shape, short(find(s.name).dtype)))
        at = {row[:2]: r for r, row in enumerate(rows)}
        sums = torch.zeros(len(rows), 5, dtype=torch.float64)
        for i, found in figures.items():
            for p in found:
                row = (p.numel, p.selected, p.zeroed, p.nonfinite, p.change**2)
                sums[at[i, p.name]] = torch.tensor(row, dtype=torch.float64)
        reports: dict[str, list[ParameterReport]] = {node.name: [] for node in self._nodes}
        assert self.ranks is not None
        for (i, name, shape, dtype), row in zip(rows, self.ranks.sum(sums).tolist(), strict=True):
            numel, selected, zeroed, nonfinite = map(int, row[:4])
            report = ParameterReport(name, shape, dtype, numel, selected, zeroed, nonfinite, row[4] ** 0.5)
            reports[self._nodes[i].name].append(report)
        return {name: tuple(found) for name, found in reports.items()}


def check_part(node: ReachedNode) -> None:
    """Raise a LayoutError where a node's Fisher is one rank's part, and its model, of plain tensors, has another part.

    One's own cut of a model is taken: tensors of the parts' shapes.
    """
    find = _finder(node.model, node.fisher.layout.names)
    for s in node.fisher.layout:
        if s.shard is not None and (p := find(s.name)) is not None and tuple(p.shape) != s.shape:
            raise LayoutError(
                f"the original Fisher of {node.name!r}: {s.name!r} is {s}, and the model has {list(p.shape)}; pass the "
                "whole Fisher, fisher.full()"
            )


def _finder(model: Model, names: Sequence[str]) -> Find:
    """Name -> the model's parameter, whatever wrappers either has; None where there is none."""
    if isinstance(model, nn.Module):
        known = Names(model)
        return lambda name: known.first.get(known.find(name) or "")
    return partial(_in_dict, model, matched(names, model))


def _also(model: Model, find: Find, layout: Layout) -> Find:
    """The same for the names of another layout."""
    return find if isinstance(model, nn.Module) else _finder(model, layout.names)


def _in_dict(model: Mapping[str, Tensor], called: Mapping[str, str], name: str) -> Any:
    return model.get(called.get(name, name))


def _cut(where: str, layout: Layout, find: Find) -> Layout:
    """A Fisher's layout as its model is cut up here; what does not fit is left as it is, for others to name."""
    shapes: dict[str, tuple[int, ...]] = {}
    shards: dict[str, Shard] = {}
    for s in layout:
        shapes[s.name], p = s.shape, find(s.name)
        if s.shard is not None:
            shards[s.name] = s.shard
        part = part_of(f"{where}: {s.name!r}", p) if is_dtensor(p) else None
        if part is not None and part.cut and s.shard is None and s.shape == part.shape:
            shapes[s.name] = tuple(part.tensor.shape)
            shards[s.name] = Shard(s.name, part.shape, part.start)
        elif s.shard is not None and p is not None:
            here = (part.shape, part.start) if part is not None and part.cut else None
            if s.place != here or (part is not None and s.shape != tuple(part.tensor.shape)):
                theirs = (
                    f"the model has {list(p.shape)} whole"
                    if part is None or not part.cut
                    else f"the model has {list(part.tensor.shape)} of {list(part.shape)} from {list(part.start)} here"
                )
                raise LayoutError(
                    f"{where}: {s.name!r} is {s}, and {theirs}; pass the whole Fisher, fisher.full(), of which each "
                    "rank takes its part"
                )
    return Layout(shapes, shards) if shards != {s.name: s.shard for s in layout if s.shard is not None} else layout


def _version(buffer: Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version


def _one(values: Sequence[Number]) -> object:
    """The value of all nodes where it is one."""
    return values[0] if all(value == values[0] for value in values) else values


def _of_layout(vector: Vector) -> Fact:
    return Fact([(short(vector.dtype), s.name, s.whole) for s in vector.layout], LayoutError)
