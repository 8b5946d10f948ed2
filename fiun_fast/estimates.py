"""Fishers that were estimated of somebody's data when they were needed, and kept with it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .fisher import Fisher
from .watching import Watched


@dataclass(frozen=True, eq=False)
class _Kept:
    fisher: Fisher
    data: Any
    model: nn.Module
    watched: Watched


MOST = 16  # that are kept of one model and set of data; a lambda is another function each time


class Estimates:
    """The Fishers estimated of one model and one set of data, by how they were estimated and of which parameters.

    One is good as long as the data are the same object and nothing has changed outside the parameters it is of. That
    these were dampened does not matter: an original Fisher stays the one of before. Whoever has trained nothing but
    them calls `clear`.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}

    def find(self, how: Hashable, model: nn.Module, data: object) -> Fisher | None:
        """One that was kept and is good."""
        kept = self._kept.get(how)
        if kept is None or kept.data is not data or kept.model is not model:
            return None
        return None if kept.watched.changed() or kept.watched.rewritten() else kept.fisher

    def keep(self, how: Hashable, model: nn.Module, data: object, scope: Sequence[Tensor], fisher: Fisher) -> None:
        """Keep one; `scope`: the parameters that it is of."""
        while len(self._kept) >= MOST:
            del self._kept[next(iter(self._kept))]
        self._kept[how] = _Kept(fisher, data, model, Watched(model, free={id(p) for p in scope}, bits=True))

    def clear(self) -> None:
        """Forget all: the next plan estimates anew."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins empty: its model is another."""
        return {"_kept": {}}

    def __repr__(self) -> str:
        return f"Estimates({len(self)} kept)"
