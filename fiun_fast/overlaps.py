"""What else lies in the memory of some tensors: a search among all that models hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from .memory import flaw_of, span


def held_by(model: nn.Module) -> list[Mapping[str, Any]]:
    """All mappings in which a module keeps parameters and buffers; a plain walk, its own iterators make names."""
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


def overlaps(start: np.ndarray, end: np.ndarray, others: Sequence[Any]) -> Iterator[tuple[int, int, bool]]:
    """Pairs that share memory: index of a range, index of another tensor, whether both are exactly the same memory.

    Args:
        start, end: [n] int64, first byte and one past the last byte of ranges that do not overlap one another.
        others: what has no memory that can be addressed, and what is no tensor, overlaps nothing.

    """
    kept = [j for j, t in enumerate(others) if isinstance(t, Tensor) and flaw_of(t) is None and t.numel()]
    if not kept or not len(start):
        return
    order = np.argsort(start)
    start, end = start[order], end[order]
    spans = np.array([span(others[j]) for j in kept], dtype=np.int64)
    at = np.searchsorted(end, spans[:, 0], side="right")  # the first range that ends after each other one begins
    clashes = (at < len(start)) & (start[np.minimum(at, len(start) - 1)] < spans[:, 1]) & (spans[:, 0] < spans[:, 1])
    for k in np.flatnonzero(clashes).tolist():
        i = at[k]
        yield int(order[i]), kept[k], bool(spans[k, 0] == start[i] and spans[k, 1] == end[i])


def name_in(model: nn.Module, tensor: Tensor) -> str:
    """What an error message calls a parameter or buffer of a module."""
    for path, module in model.named_modules():
        for what, held in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, value in held.items():
                if value is tensor:
                    return f"{what} {(f'{path}.{key}' if path else key)!r}"
    raise AssertionError("the module holds it")
