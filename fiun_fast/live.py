"""Live models and Fishers as a source of memory: where each tensor lives, and whether any has moved since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .compiling import ReachedNode
from .dag import ForgetRequest
from .errors import LayoutError
from .fisher import Fisher
from .memory import Container, Home, Homes, all_held, check_addressable, check_writable, flaw_of, has_no_shape


class Links:
    """Submodules on the way to parameters: the mapping that holds each, its key there, itself; column by column."""

    def __init__(self) -> None:
        self._containers: list[Mapping[str, nn.Module | None]] = []
        self._keys: list[str] = []
        self._modules: list[nn.Module] = []

    def add(self, container: Mapping[str, nn.Module | None], key: str, module: nn.Module) -> None:
        """Take one down."""
        self._containers.append(container)
        self._keys.append(key)
        self._modules.append(module)

    def replaced(self) -> str | None:
        """The key of one that was replaced or removed since; None where none was."""
        if all_held(self._containers, self._keys, self._modules):
            return None
        held = zip(self._containers, self._keys, self._modules, strict=True)
        return next(key for container, key, module in held if container.get(key) is not module)


class LiveMemory:
    """Models and Fishers of this process, as `binding.Memory` wants them.

    It remembers the home of all that was asked for. Submodules on the way to a parameter are remembered too: after
    `model.fc = nn.Linear(…)` the old parameters live on, at the old addresses, in a layer that is dead.

    Raises:
        FiunError: the buffer of a Fisher was replaced by one that does not fit, or freed.

    """

    def __init__(self, nodes: Sequence[ReachedNode], requests: Sequence[ForgetRequest]) -> None:
        self._nodes, self._requests = nodes, requests
        self.links = Links()
        self.parameters: list[Tensor] = []  # all that were bound
        self._described: list[tuple[Sequence[str], int]] = [((), 0)] * len(nodes)  # names, and where the first is below
        self._containers: list[Container | None] = []
        self._paths: dict[int, tuple[Sequence[str], list[str], list[str]]] = {}  # by id of the names, which are kept
        self._keys: list[str] = []
        self._homes = Homes()  # of parameters and Fishers
        self._fishers: set[int] = set()  # ids of those whose homes are known
        self._copies: dict[tuple[int, torch.device], Fisher] = {}
        self._foreign: list[tuple[str, Tensor]] = []  # parameters in memory that torch did not allocate
        self._check_fishers()

    def describe(self, node: int, names: Sequence[str]) -> list[Tensor | None]:
        """The tensor under each name in the node's model, None where there is none; its memory is not looked at.

        Raises:
            ArgumentError: what is there is no tensor.
            LayoutError: it has no shape.

        """
        self._described[node] = names, len(self._keys)
        containers, keys = self._places(node, names)
        found = [
            None if container is None else container.get(key) for container, key in zip(containers, keys, strict=True)
        ]
        for name, tensor in zip(names, found, strict=True):
            if (type(tensor) is nn.Parameter and not tensor.is_nested) or tensor is None:
                continue
            if not isinstance(tensor, Tensor) or has_no_shape(tensor):
                check_addressable(self._label(node, name), tensor)
        self._containers += containers
        self._keys += keys
        return found

    def thetas(self, node: int, names: Sequence[str]) -> list[Tensor]:
        """The parameters under these names, among those described; their homes are remembered.

        Raises:
            FiunError: a tensor without plain memory of its own.
            LayoutError: one that is not contiguous.

        """
        described, first = self._described[node]
        containers = self._containers[first : first + len(described)]
        keys = self._keys[first : first + len(described)]
        if names is not described:
            at = [described.index(name) for name in names]
            containers, keys = [containers[i] for i in at], [keys[i] for i in at]
        found: list[Tensor] = [container[key] for container, key in zip(containers, keys, strict=True)]  # type: ignore[index]
        for name, tensor in zip(names, found, strict=True):
            if (flaw := flaw_of(tensor)) is not None:
                raise flaw.raised(self._label(node, name))
            if not tensor.is_contiguous():
                raise LayoutError(
                    f"{self._label(node, name)}: not contiguous (shape {list(tensor.shape)}, stride "
                    f"{list(tensor.stride())}); call fiun_fast.flatten_(model) or make it contiguous"
                )
            if not tensor.untyped_storage().resizable():
                self._foreign.append((self._label(node, name), tensor))
        self._homes.add(containers, keys, found)
        self.parameters += found
        return found

    def original(self, node: int) -> Fisher:
        """The node's original Fisher; its home is remembered."""
        return self._watch(self._nodes[node].fisher)

    def forget(self, request: int, device: torch.device) -> Fisher:
        """The forget Fisher of a request on that device, copied there if it was taken elsewhere."""
        fisher = self._watch(self._requests[request].fisher)
        if fisher.device == device:
            return fisher
        if (request, device) not in self._copies:
            self._copies[request, device] = fisher.to(device)
        return self._copies[request, device]

    def home(self, node: int, name: str) -> Home:
        """Where a described parameter lives, and how it lies there now."""
        described, first = self._described[node]
        i = first + described.index(name)
        container = self._containers[i]
        assert container is not None
        return Home.of(container, self._keys[i])

    def settle(self) -> None:
        """Take down how all that was asked for lies now."""
        self._homes.settle()

    def moved(self) -> bool:
        """Whether any submodule, parameter or Fisher was replaced, or lies otherwise than it did at `settle`."""
        return self.links.replaced() is not None or self._homes.moved()

    def check_writable(self) -> None:
        """Raise a LayoutError where a parameter lies in memory that is mapped read-only."""
        check_writable((label for label, _ in self._foreign), (tensor for _, tensor in self._foreign))

    def _label(self, node: int, name: str) -> str:
        return f"node {self._nodes[node].name!r}, parameter {name!r}"

    def _check_fishers(self) -> None:
        checked: set[int] = set()
        named = [(node.fisher, f"the original Fisher of {node.name!r}") for node in self._nodes]
        named += [(request.fisher, f"the forget Fisher of request {k}") for k, request in enumerate(self._requests)]
        for fisher, where in named:
            if id(fisher) not in checked:
                checked.add(id(fisher))
                fisher.check_memory(where)

    def _watch(self, fisher: Fisher) -> Fisher:
        if id(fisher) not in self._fishers:
            self._fishers.add(id(fisher))
            self._homes.add([vars(fisher)], ["buffer"], [fisher.buffer])
        return fisher

    def _places(self, node: int, names: Sequence[str]) -> tuple[list[Container | None], list[str]]:
        """For each name the mapping that holds such a tensor, None where there is no such module, and the key there."""
        model = self._nodes[node].model
        if not isinstance(model, nn.Module):
            return [model] * len(names), list(names)
        if id(names) not in self._paths:  # one tuple serves all nodes of a layout
            split = [name.rpartition(".") for name in names]
            self._paths[id(names)] = names, [path for path, _, _ in split], [key for _, _, key in split]
        _, paths, keys = self._paths[id(names)]
        owners: dict[str, nn.Module | None] = {"": model}
        containers: list[Container | None] = []
        for path in paths:
            owner = owners[path] if path in owners else self._owner(owners, path)
            containers.append(None if owner is None else owner._parameters)
        return containers, keys

    def _owner(self, owners: dict[str, nn.Module | None], path: str) -> nn.Module | None:
        """The module at that path, None where there is none; it and those above it become owners, and links."""
        above, _, key = path.rpartition(".")
        parent = owners[above] if above in owners else self._owner(owners, above)
        child = None if parent is None else parent._modules.get(key)
        if not isinstance(child, nn.Module):
            child = None
        if parent is not None and child is not None:
            self.links.add(parent._modules, key, child)
        owners[path] = child
        return child
