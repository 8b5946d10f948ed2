"""Live models and Fishers as a source of memory: where each tensor lives, and whether any has moved since."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .compiling import ReachedNode
from .dag import ForgetRequest, Model
from .dtensors import HeldPart, LocalPart, is_dtensor, part_of, reshard_
from .errors import ArgumentError, LayoutError
from .fisher import Fisher
from .gradient import Gradient
from .homes import Container, Counters, Held, Home, Homes
from .memory import all_plain, check_addressable, check_writable, has_no_shape
from .naming import Names, matched
from .vectors import Vector, all_fit
from .wrappers import check_no_engine, check_not_merged, is_wrapper, wrapper_of

_IS_NESTED = attrgetter("is_nested")
_PLAIN = {nn.Parameter, Tensor, type(None)}
V = TypeVar("V", bound=Vector)


class Links:
    """What is on the way to parameters: the mapping that holds each, its key there, itself; column by column.

    Submodules, and the dicts that modules keep them and their parameters in.
    """

    def __init__(self) -> None:
        self._containers: list[Mapping[str, Any]] = []
        self._keys: list[str] = []
        self._modules: list[Any] = []
        self._held = Held()
        self.resharding: Sequence[Any] = ()  # modules of FSDP2: a forward may put gathered parameters there meanwhile

    def add(self, containers: Sequence[Mapping[str, Any]], key: str, modules: Sequence[Any]) -> None:
        """Take these down: each mapping holds one of the objects under that key."""
        self._containers += containers
        self._keys += [key] * len(modules)
        self._modules += modules

    def replaced(self) -> str | None:
        """The key of one that was replaced or removed since; None where none was."""
        if self.resharding:
            reshard_(self.resharding)
        if self._held.all(self._containers, self._keys, self._modules):
            return None
        held = zip(self._containers, self._keys, self._modules, strict=True)
        return next(key for container, key, module in held if container.get(key) is not module)


@dataclass
class Described:
    """Nodes of one layout, and where their models keep the parameters of its names: a column for each name."""

    nodes: Sequence[int]
    names: Sequence[str]
    containers: list[list[Container | None]]  # [names][nodes]
    keys: list[list[str]]  # [names][nodes]

    def columns(self) -> list[list[Tensor | None]]:
        """What the models have there, [names][nodes]; None: nothing."""
        places = zip(self.containers, self.keys, strict=True)
        return [[None if c is None else c.get(key) for c, key in zip(cs, ks, strict=True)] for cs, ks in places]


class LiveMemory:
    """Models and Fishers of this process, as `binding.Memory` wants them.

    It remembers the home of all that was asked for. Submodules on the way to a parameter are remembered too: after
    `model.fc = nn.Linear(…)` the old parameters live on, at the old addresses, in a layer that is dead. Everything is
    asked and kept in columns: nodes may be 100,000. Of a DTensor it hands out the local part.

    Raises:
        FiunError: the buffer of a Fisher was replaced by one that does not fit, or freed.

    """

    def __init__(
        self, nodes: Sequence[ReachedNode], requests: Sequence[ForgetRequest], resharding: Sequence[Any] = ()
    ) -> None:
        self._nodes, self._requests = nodes, requests
        self.links = Links()
        self.links.resharding = resharding
        self._layouts = Links()  # of Fishers
        self.parameters: list[Tensor] = []  # all that were bound
        self.owners: dict[int, int] = {}  # id of each of them -> index of its node
        self._described: list[Described] = []
        self._place = np.zeros((len(nodes), 2), dtype=np.int64)  # of each node: which of those, and where in it
        self._homes = Homes()  # of parameters, Fishers and gradients
        self._watched: set[int] = set()  # ids of the Fishers and gradients whose homes are known
        self._copies: dict[tuple[int, torch.device], Vector] = {}  # by the id of what was copied
        self._foreign: list[tuple[str, Tensor]] = []  # parameters in memory that torch did not allocate
        self._wholes: list[Tensor] = []  # DTensors of which local parts were handed out
        self._wrapped = False  # a wrapper was met on the way to a parameter
        self._check_fishers()

    def describe(self, nodes: Sequence[int], names: Sequence[str]) -> list[list[Tensor | None]]:
        """For each name the tensor in each node's model, None where there is none; its memory is not looked at.

        Raises:
            ArgumentError: what is there is no tensor.
            LayoutError: it has no shape.

        """
        described = Described(nodes, names, *self._places(nodes, names))
        self._place[nodes, 0] = len(self._described)
        self._place[nodes, 1] = np.arange(len(nodes))
        self._described.append(described)
        columns = described.columns()
        if self._wrapped or any(type(None) in set(map(type, column)) for column in columns):
            self._place_by_meaning(described, columns)
            columns = described.columns()
        flat = list(chain.from_iterable(columns))
        if not (kinds := set(map(type, flat))) <= _PLAIN and any(map(is_dtensor, flat)):
            columns = self._local(described, columns)
            flat = list(chain.from_iterable(columns))
            kinds = set(map(type, flat))
        if not kinds <= {nn.Parameter, Tensor} or any(map(_IS_NESTED, flat)):
            for name, column in zip(names, columns, strict=True):
                for i, tensor in zip(nodes, column, strict=True):
                    if tensor is not None and (not isinstance(tensor, Tensor) or has_no_shape(tensor)):
                        check_addressable(self._label(i, name), tensor)
        return columns

    def _local(self, described: Described, columns: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
        """Put local parts in the place of DTensors, in `described` and in the columns that are returned."""
        containers = [list(column) for column in described.containers]
        keys = [list(column) for column in described.keys]
        for s, column in enumerate(columns):
            for i, tensor in enumerate(column):
                if is_dtensor(tensor):
                    assert tensor is not None
                    self.links.add([containers[s][i]], keys[s][i], [tensor])  # type: ignore[list-item]
                    part = part_of(self._label(described.nodes[i], described.names[s]), tensor)
                    containers[s][i], keys[s][i] = HeldPart(tensor, part), HeldPart.KEY
                    self._wholes.append(tensor)
        described.containers, described.keys = containers, keys
        return described.columns()

    def counted(self, counts: Callable[[str, LocalPart | None], bool], nodes: Sequence[int]) -> list[list[bool]]:
        """Which of these nodes' parameters this rank counts, [names][nodes] of what was described together.

        Args:
            counts: (node, part of a DTensor or None) -> whether it does.
            nodes: all of one `describe`.

        """
        described, names = self._described[self._place[nodes[0], 0]], [self._nodes[i].name for i in nodes]
        return [
            [
                counts(name, held.part if isinstance(held, HeldPart) else None)
                for name, held in zip(names, column, strict=True)
            ]
            for column in described.containers
        ]

    def thetas(self, nodes: Sequence[int], names: Sequence[str]) -> list[list[Tensor]]:
        """For each name the parameters of these nodes, which were described together; their homes are remembered.

        Raises:
            FiunError: a tensor without plain memory of its own.
            LayoutError: one that is not contiguous.

        """
        described = self._described[self._place[nodes[0], 0]]
        at = None if len(nodes) == len(described.nodes) else self._place[nodes, 1].tolist()
        of = {name: s for s, name in enumerate(described.names)}
        containers: list[Container] = []
        keys: list[str] = []
        for s in (of[name] for name in names):
            column, its_keys = described.containers[s], described.keys[s]
            containers += column if at is None else [column[i] for i in at]
            keys += its_keys if at is None else [its_keys[i] for i in at]
        found: list[Tensor] = [container.get(key) for container, key in zip(containers, keys, strict=True)]  # type: ignore[misc]
        self._check(nodes, names, containers, keys, found)
        self._homes.add(containers, keys, found)
        self.parameters += found
        self.owners.update(zip(map(id, found), cycle(nodes)))
        return [found[i : i + len(nodes)] for i in range(0, len(found), len(nodes))]

    def _check(
        self,
        nodes: Sequence[int],
        names: Sequence[str],
        containers: Sequence[Container],
        keys: Sequence[str],
        tensors: list[Tensor],
    ) -> None:
        """Refuse what has no plain memory or is not contiguous; note what torch did not allocate. [names x nodes]."""

        def label(k: int) -> str:
            return self._label(nodes[k % len(nodes)], names[k // len(nodes)])

        for k, container in enumerate(containers):
            if type(container) is not dict and container.get(keys[k]) is not tensors[k]:
                raise LayoutError(f"{label(k)}: the mapping makes it anew when it is asked for; pass what holds it")
        if not all_plain(tensors):
            for k, tensor in enumerate(tensors):
                check_addressable(label(k), tensor)
                if not tensor.is_contiguous():
                    raise LayoutError(
                        f"{label(k)}: not contiguous (shape {list(tensor.shape)}, stride {list(tensor.stride())}); "
                        "call fiun_fast.flatten_(model) or make it contiguous"
                    )
        for k, tensor in enumerate(tensors):
            if not tensor.untyped_storage().resizable():
                self._foreign.append((label(k), tensor))

    def originals(self, nodes: Sequence[int]) -> list[Fisher]:
        """The original Fisher of each node; their homes are remembered."""
        fishers = [self._nodes[i].fisher for i in nodes]
        self._watch(fishers)
        return fishers

    def forget(self, request: int, device: torch.device) -> Fisher:
        """The forget Fisher of a request on that device, copied there if it was taken elsewhere."""
        return self._there(self._requests[request].fisher, device)

    def gradient(self, request: int, device: torch.device) -> Gradient:
        """The gradient of a request that has one, likewise."""
        gradient = self._requests[request].gradient
        assert gradient is not None
        return self._there(gradient, device)

    def _there(self, vector: V, device: torch.device) -> V:
        self._watch([vector])
        if vector.device == device:
            return vector
        if (id(vector), device) not in self._copies:
            self._copies[id(vector), device] = vector.to(device)
        return self._copies[id(vector), device]  # type: ignore[return-value]

    def home(self, node: int, name: str) -> Home:
        """Where a described parameter lives, and how it lies there now."""
        block, i = self._place[node].tolist()
        described = self._described[block]
        s = described.names.index(name)
        container = described.containers[s][i]
        assert container is not None
        return Home.of(container, described.keys[s][i])

    def settle(self) -> None:
        """Take down how all that was asked for lies now. Nothing more is asked for afterwards."""
        self._homes.settle()
        self._counters = Counters(self.parameters)

    def moved(self) -> bool:
        """Whether any submodule, parameter or Fisher was replaced, or lies otherwise than it did at `settle`."""
        return self.links.replaced() is not None or self._layouts.replaced() is not None or self._homes.moved()

    def count_up(self) -> None:
        """Tell autograd that all parameters that were bound are about to be written to."""
        self._counters.count_up()
        if self._wholes:
            torch.autograd.graph.increment_version(self._wholes)

    def check_writable(self) -> None:
        """Raise a LayoutError where a parameter lies in memory that is mapped read-only."""
        if self._foreign:
            check_writable((label for label, _ in self._foreign), (tensor for _, tensor in self._foreign))

    def label(self, parameter: Tensor) -> str:
        """What an error message calls one of the parameters."""
        node = self.owners[id(parameter)]
        block, i = self._place[node].tolist()
        described = self._described[block]
        held = zip(described.names, described.containers, described.keys, strict=True)
        name = next(n for n, c, k in held if (c[i] or {}).get(k[i]) is parameter)
        return self._label(node, name)

    def _label(self, node: int, name: str) -> str:
        return f"node {self._nodes[node].name!r}, parameter {name!r}"

    def _check_fishers(self) -> None:
        named: list[tuple[Vector, str]] = []
        named += [(node.fisher, f"the original Fisher of {node.name!r}") for node in self._nodes]
        for k, request in enumerate(self._requests):
            named.append((request.fisher, f"the forget Fisher of request {k}"))
            if request.gradient is not None:
                named.append((request.gradient, f"the gradient of request {k}"))
        unique = {id(vector): (vector, where) for vector, where in reversed(named)}
        if not all_fit([vector for vector, _ in unique.values()]):
            for vector, where in named:
                vector.check_memory(where)

    def _watch(self, vectors: Sequence[Vector]) -> None:
        new = {id(vector): vector for vector in vectors if id(vector) not in self._watched}
        self._watched |= new.keys()
        self._layouts.add([vars(f) for f in new.values()], "layout", [f.layout for f in new.values()])
        self._homes.add(
            [vars(vector) for vector in new.values()], ["buffer"] * len(new), [vector.buffer for vector in new.values()]
        )

    def _places(
        self, nodes: Sequence[int], names: Sequence[str]
    ) -> tuple[list[list[Container | None]], list[list[str]]]:
        """For each name and node the mapping that holds such a tensor, and its key there; None where no mapping does.

        In a module that is the `_parameters` of a submodule, and the last part of the name.
        """
        models: list[Model] = [self._nodes[i].model for i in nodes]
        containers: list[list[Container | None]] = []
        keys: list[list[str]] = []
        inside = [isinstance(model, nn.Module) for model in models]
        owned: dict[str, list[Container | None]] = {}
        if any(map(is_wrapper, set(map(type, models)))):
            for i, model in zip(nodes, models, strict=True):
                if isinstance(model, nn.Module):
                    check_no_engine(f"the model of node {self._nodes[i].name!r}", model)
        bare: list[nn.Module | None] = [model if i else None for model, i in zip(models, inside, strict=True)]  # type: ignore[misc]
        while (key := _wrapped_alike(bare)) is not None:
            bare = self._owners({"": bare}, key)
        owners = {"": bare}
        self._wrapped = any(map(is_wrapper, set(map(type, bare))))
        for name in names:
            path, _, key = name.rpartition(".")
            if path not in owned:
                owned[path] = self._owned(nodes, owners, path)
            if all(inside):
                containers.append(owned[path])
                keys.append([key] * len(models))
            else:
                containers.append([o if i else m for o, i, m in zip(owned[path], inside, models, strict=True)])  # type: ignore[misc]
                keys.append([key if i else name for i in inside])
        return containers, keys

    def _owned(
        self, nodes: Sequence[int], owners: dict[str, list[nn.Module | None]], path: str
    ) -> list[Container | None]:
        """Where the modules at that path keep their parameters; None where there is no module."""
        its = self._owners(owners, path)
        above = path if self._wrapped else ""
        while above:
            for i, module in zip(nodes, owners[above], strict=True):
                if module is not None:
                    check_not_merged(f"the model of node {self._nodes[i].name!r}", above, module)
            above = above.rpartition(".")[0]
        if any(isinstance(owner, torch.jit.ScriptModule) for owner in its):
            i = next(i for i, o in zip(nodes, its, strict=True) if isinstance(o, torch.jit.ScriptModule))
            raise ArgumentError(
                f"node {self._nodes[i].name!r}: {path!r} is a TorchScript module; "
                "put the module that it was made from in its place"
            )
        there = [owner for owner in its if owner is not None]
        self.links.add([vars(o) for o in there], "_parameters", [o._parameters for o in there])
        return [None if owner is None else owner._parameters for owner in its]

    def _place_by_meaning(self, described: Described, columns: Sequence[Sequence[Tensor | None]]) -> None:
        """Find what a model that is or was wrapped calls otherwise than a Fisher; it stands in `described` then."""
        containers = [list(column) for column in described.containers]  # names of one module share a column
        keys = [list(column) for column in described.keys]
        for i, node in enumerate(described.nodes):
            model = self._nodes[node].model
            wanted = [s for s, column in enumerate(columns) if self._wrapped or column[i] is None]
            if not isinstance(model, nn.Module):
                called = matched(described.names, model)
                for s in wanted:
                    keys[s][i] = called.get(described.names[s], described.names[s])
                continue
            known, owners = Names(model), {"": [model]}
            for s in wanted:
                if (first := known.find(described.names[s])) is not None:
                    path, _, keys[s][i] = known.path(first).rpartition(".")
                    (containers[s][i],) = self._owned([node], owners, path)  # type: ignore[arg-type]
        described.containers, described.keys = containers, keys

    def _owners(self, owners: dict[str, list[nn.Module | None]], path: str) -> list[nn.Module | None]:
        """The modules at that path, None where there is none; they and those above them become owners, and links."""
        if path not in owners:
            above, _, key = path.rpartition(".")
            parents = self._owners(owners, above)
            held = [None if parent is None else parent._modules for parent in parents]
            there = [parent for parent in parents if parent is not None]
            self.links.add([vars(p) for p in there], "_modules", [p._modules for p in there])
            children = [None if mapping is None else mapping.get(key) for mapping in held]
            self._wrapped = self._wrapped or any(map(is_wrapper, set(map(type, children))))
            if all(isinstance(child, nn.Module) for child in children):
                self.links.add(held, key, children)  # type: ignore[arg-type]
            else:
                children = [child if isinstance(child, nn.Module) else None for child in children]
                both = [(h, c) for h, c in zip(held, children, strict=True) if h is not None and c is not None]
                self.links.add([mapping for mapping, _ in both], key, [child for _, child in both])
            owners[path] = children
        return owners[path]


def _wrapped_alike(modules: Sequence[nn.Module | None]) -> str | None:
    """The key of what is wrapped, where all are wrappers of one kind that a model may be called without."""
    if not any(map(is_wrapper, set(map(type, modules)))):  # as a rule
        return None
    found = {None if module is None else wrapper_of(module) for module in modules}
    (wrapper, *more) = found
    return None if more or wrapper is None or not wrapper.bypassed else wrapper.key
