"""Whether a parameter that a run writes to is also something that the run does not know of.

A run reports what it did to each node. If a parameter of a node lay in the memory of a model that no request reaches,
or of a parameter or buffer that is out of scope, these would change too, and no report would say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .compiling import ReachedNode
from .dag import Model
from .errors import LayoutError, ScopeWarning, warn
from .live import LiveMemory
from .memory import flaw_of
from .overlaps import held_by, name_in, overlaps

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
        for held in held_by(model) if isinstance(model, nn.Module) else [model]:
            for tensor in held.values():
                owner = owners.get(id(tensor))
                if owner is None:
                    if tensor is not None:
                        others.append(tensor)
                        whose.append(k)
                elif owner != index:
                    raise LayoutError(f"{memory.label(tensor)} is also {_label(name, model, tensor)}: {_ADVICE}")
    if not others:
        return
    bound = memory.parameters
    start = np.array([tensor.data_ptr() for tensor in bound], dtype=np.int64)
    size = np.array([tensor.nbytes for tensor in bound], dtype=np.int64)
    for i, j, same in overlaps(start, start + size, others):
        name, index, model = models[whose[j]]
        if same and not isinstance(model, nn.Module) and owners[id(bound[i])] == index:
            continue
        raise LayoutError(f"{memory.label(bound[i])} shares memory with {_label(name, model, others[j])}: {_ADVICE}")


def warn_of_copies(memory: LiveMemory, nodes: Sequence[ReachedNode]) -> None:
    """Warn where a dict keeps what will be dampened a second time, out of scope: a tied weight that a file took apart.

    Numbers are compared, so that only the first nodes are looked at: families are saved alike.

    Args:
        memory: where the parameters were bound.
        nodes: those of the program.

    Warns:
        ScopeWarning: names both.

    """
    owners = memory.owners
    dicts = ((i, node.model) for i, node in enumerate(nodes[:64]) if not isinstance(node.model, nn.Module))
    others: list[tuple[int, str, Tensor]] = [
        (i, name, tensor)
        for i, model in dicts
        if len(model) > len(nodes[i].fisher.layout.names)  # else it is all in scope, as in most plans of many dicts
        for name, tensor in model.items()
        if isinstance(tensor, Tensor) and id(tensor) not in owners and flaw_of(tensor) is None
    ]
    bound: dict[tuple, list[Tensor]] = {}
    for tensor in memory.parameters if others else ():
        bound.setdefault((owners[id(tensor)], *_kind(tensor)), []).append(tensor)
    for i, name, other in others:
        for tensor in bound.get((i, *_kind(other)), ()):
            if other.data_ptr() != tensor.data_ptr() and _same_numbers(tensor, other):
                warn(
                    f"{memory.label(tensor)} has the numbers of {name!r}, which stays as it is: if they are one tied "
                    "weight, copy the former to the latter afterwards",
                    ScopeWarning,
                )


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.device


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are the same and not constant; as new layers are, and pairs of them by chance."""
    if one.dim() < 2 or one.numel() < 2 or not bool((one[0] == other[0]).all()):
        return False
    return torch.equal(one, other) and not bool((one == one.reshape(-1)[0]).all())


def _label(node: str, model: Model, tensor: Tensor) -> str:
    if isinstance(model, nn.Module):
        return f"node {node!r}, {name_in(model, tensor)}"
    return f"node {node!r}, tensor {next(key for key, value in model.items() if value is tensor)!r}"
