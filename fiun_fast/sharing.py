"""Whether a parameter that a run writes to is also something that the run does not know of.

A run reports what it did to each node. If a parameter of a node lay in the memory of a model that no request reaches,
or of a parameter or buffer that is out of scope, these would change too, and no report would say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from .compiling import ReachedNode
from .dag import Model
from .errors import LayoutError
from .layout import every_name
from .live import LiveMemory
from .memory import flaw_of, span

_ADVICE = "it would change unnoticed; clone one of them, or take both into the plan"


def check_unshared(memory: LiveMemory, nodes: Sequence[ReachedNode], bystanders: Mapping[str, Model]) -> None:
    """Check what was bound against all that the models hold beside it; a look at each tensor, none at its numbers.

    Tied parameters, one tensor under several names of one model, are one parameter; so are entries of a dict with
    exactly the same memory, as `state_dict()` has them.

    Args:
        memory: where the parameters were bound.
        nodes: those of the program.
        bystanders: name -> model of nodes that no request reaches.

    Raises:
        LayoutError: names both.

    """
    owners = memory.owners
    models = [(node.name, i, node.model) for i, node in enumerate(nodes)]
    models += [(name, -1, model) for name, model in bystanders.items()]
    others: list[Any] = []  # what is not bound
    whose: list[int] = []  # index among the models
    for k, (name, index, model) in enumerate(models):
        for held in _mappings(model):
            for tensor in held.values():
                owner = owners.get(id(tensor))
                if owner is None:
                    if tensor is not None:
                        others.append(tensor)
                        whose.append(k)
                elif owner != index:
                    raise LayoutError(f"{memory.label(tensor)} is also {_label(name, model, tensor)}: {_ADVICE}")
    others, whose = _addressable(others, whose)
    bound = memory.parameters
    if not others or not bound:
        return
    start = np.array([tensor.data_ptr() for tensor in bound], dtype=np.int64)
    order = np.argsort(start)
    start = start[order]
    end = start + np.array([tensor.nbytes for tensor in bound], dtype=np.int64)[order]
    spans = np.array([span(tensor) for tensor in others], dtype=np.int64)
    at = np.searchsorted(end, spans[:, 0], side="right")  # the first parameter that ends after each other one begins
    clashes = (at < len(start)) & (start[np.minimum(at, len(start) - 1)] < spans[:, 1]) & (spans[:, 0] < spans[:, 1])
    for k in np.flatnonzero(clashes).tolist():
        name, index, model = models[whose[k]]
        parameter = bound[order[at[k]]]
        same = spans[k, 0] == start[at[k]] and spans[k, 1] == end[at[k]]
        if same and not isinstance(model, nn.Module) and owners[id(parameter)] == index:
            continue
        raise LayoutError(f"{memory.label(parameter)} shares memory with {_label(name, model, others[k])}: {_ADVICE}")


def _mappings(model: Model) -> list[Mapping[str, Any]]:
    """All mappings in which a model keeps parameters and buffers; a plain walk, since its own iterators make names."""
    if not isinstance(model, nn.Module):
        return [model]
    found: list[Mapping[str, Any]] = []
    modules, seen = [model], {id(model)}
    for module in modules:  # which grows meanwhile
        found.append(module._parameters)
        if module._buffers:
            found.append(module._buffers)
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
    return found


def _addressable(tensors: list[Any], whose: list[int]) -> tuple[list[Tensor], list[int]]:
    """Those that have elements in memory, each once for each model."""
    found: dict[tuple[int, int], int] = {}
    for i, (tensor, k) in enumerate(zip(tensors, whose, strict=True)):
        if isinstance(tensor, Tensor) and (id(tensor), k) not in found and flaw_of(tensor) is None and tensor.numel():
            found[id(tensor), k] = i
    return [tensors[i] for i in found.values()], [whose[i] for i in found.values()]


def _label(node: str, model: Model, tensor: Tensor) -> str:
    if not isinstance(model, nn.Module):
        name = next(key for key, value in model.items() if value is tensor)
        return f"node {node!r}, tensor {name!r}"
    for name, parameter in every_name(model):
        if parameter is tensor:
            return f"node {node!r}, parameter {name!r}"
    name = next(name for name, buffer in model.named_buffers(remove_duplicate=False) if buffer is tensor)
    return f"node {node!r}, buffer {name!r}"
