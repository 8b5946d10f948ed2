"""Rows picked from several samples, as a router hands them to its experts, and the sample that each is of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .made import tensors


class Picked:
    """Follows tensors whose rows were picked by an index from one that has the samples, one after another, in its rows.

    That they lie so is assumed, and tried out on the first batch, like everything else here.

    Args:
        samples: how many there are.

    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._owners: dict[int, tuple[Tensor, Tensor]] = {}  # id of a tensor -> the sample of each row, and the tensor

    def owners(self, t: Tensor) -> Tensor | None:
        """The sample of each row; None for a tensor that was not picked."""
        found = self._owners.get(id(t))
        return found[0] if found is not None else None

    def note(self, name: str, args: tuple, given: list[Tensor], result: Any) -> None:
        """A call of a function of this name, and what came of it."""
        rows = self._rows(args[0], args[1]) if name == "__getitem__" else None
        if rows is not None:
            each = args[0].shape[0] // self._samples
            before = self._owners.get(id(args[0]))
            owners = torch.div(rows, each, rounding_mode="floor") if before is None else before[0][rows]
            self._owners[id(result)] = owners, result
        elif self._owners:
            for t in given:
                if (found := self._owners.get(id(t))) is not None:
                    alike = (one for one in tensors(result) if one.dim() and len(one) == len(found[0]))
                    self._owners.update((id(one), (found[0], one)) for one in alike)
                    return

    def _rows(self, source: Any, index: Any) -> Tensor | None:
        """The numbers of the rows that an index picks; None where it does something else."""
        first = index[0] if isinstance(index, tuple) and index else index
        if not isinstance(source, Tensor) or not isinstance(first, Tensor) or first.is_floating_point():
            return None
        if source.dim() < 2 or not source.shape[0] or source.shape[0] % self._samples:
            return None
        if first.dtype == torch.bool:
            return first.nonzero()[:, 0] if first.dim() else None
        return first if first.dim() == 1 else None


def apart(t: Tensor, groups: Tensor, count: int) -> Tensor:
    """Rows [n, ...] by the group of each: [count, most, ...], filled with zeros; a negative group is none."""
    order = groups.argsort(stable=True)
    order = order[groups[order] >= 0]
    group = groups[order]
    sizes = torch.bincount(group, minlength=count)
    place = torch.arange(len(group), device=t.device) - (sizes.cumsum(0) - sizes)[group]
    found = t.new_zeros(count, max(1, int(sizes.max())), *t.shape[1:])
    found[group, place] = t[order]
    return found
