"""What a run did: counts a node, read from the device only when somebody looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .errors import DagError

_SHOWN = 40  # rows that print(report) shows


@dataclass(frozen=True)
class NodeReport:
    """Counts of one node, in elements.

    Attributes:
        name: the node.
        sources: origins of the requests that reach it; empty: not touched.
        skipped: parameters left out by on_mismatch="skip".
        alpha, lam: the values used; None where the node is not touched.
        numel: elements compared.
        selected: elements with m > alpha I.
        zeroed: selected elements that are exactly 0 afterwards.
        nonfinite: elements whose m or I is NaN or infinite.

    """

    name: str
    sources: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    alpha: float | None = None
    lam: float | None = None
    numel: int = 0
    selected: int = 0
    zeroed: int = 0
    nonfinite: int = 0

    @property
    def share(self) -> float:
        """Selected elements over elements compared, 0..1."""
        return self.selected / self.numel if self.numel else 0.0


class Report:
    """Result of a run: `report["u1"].selected`, totals as `report.selected`, all nodes by iteration.

    Only nodes that a request reaches are listed; any other node of the DAG can be asked for by name and shows zeros.
    """

    def __init__(
        self,
        nodes: Sequence[tuple],  # what a NodeReport begins with: name, sources, skipped, alpha, lam, numel
        known: frozenset[str],
        counts: list[tuple[torch.Tensor, list[int]]],  # per launch: [slots, 3] counts, index into nodes of each slot
        dry_run: bool,
    ) -> None:
        self.dry_run = dry_run
        self._nodes, self._known, self._pending = nodes, known, counts
        self._read: dict[str, NodeReport] | None = None

    def keep(self) -> None:
        """Take a copy of counts that the next run will overwrite; on a GPU without waiting for it."""
        if self._read is None:
            self._pending = [(counts.clone(), slots) for counts, slots in self._pending]

    @property
    def nodes(self) -> dict[str, NodeReport]:
        """Name -> report of each node reached, in the order of the DAG. The first look waits for the device."""
        if self._read is None:
            totals = [[0, 0, 0] for _ in self._nodes]
            for counts, slots in self._pending:
                for index, row in zip(slots, counts.tolist(), strict=True):
                    totals[index] = [a + b for a, b in zip(totals[index], row, strict=True)]
            self._read = {n[0]: NodeReport(*n, *total) for n, total in zip(self._nodes, totals, strict=True)}
            self._pending = []
        return self._read

    def __getitem__(self, name: str) -> NodeReport:
        """Return the report of a node; one that no request reaches shows zeros.

        Raises:
            DagError: the DAG has no such node.

        """
        if name in self.nodes:
            return self.nodes[name]
        if name in self._known:
            return NodeReport(name)
        raise DagError(f"no node {name!r} in this report; nodes reached: {', '.join(list(self.nodes)[:8])}")

    def __iter__(self) -> Iterator[NodeReport]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def numel(self) -> int:
        """Elements compared in all nodes."""
        return sum(n.numel for n in self)

    @property
    def selected(self) -> int:
        """Elements selected in all nodes."""
        return sum(n.selected for n in self)

    @property
    def zeroed(self) -> int:
        """Elements that became exactly 0, in all nodes."""
        return sum(n.zeroed for n in self)

    @property
    def nonfinite(self) -> int:
        """Elements with a NaN or infinity in m or I, in all nodes."""
        return sum(n.nonfinite for n in self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dump."""
        totals = {key: getattr(self, key) for key in ("numel", "selected", "zeroed", "nonfinite")}
        return {"dry_run": self.dry_run, **totals, "nodes": [{**asdict(n), "share": n.share} for n in self]}

    def __str__(self) -> str:
        nodes = list(self)
        head = ("node", "from", "alpha", "lambda", "elements", "selected", "share", "zeroed", "nonfinite")
        rows = [_row(n) for n in nodes[:_SHOWN]]
        if len(nodes) > _SHOWN:
            rows.append((f"… {len(nodes) - _SHOWN:,} more", *[""] * 8))
        total = NodeReport("all", (), (), None, None, self.numel, self.selected, self.zeroed, self.nonfinite)
        if len(nodes) > 1:
            rows.append(_row(total))
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *rows]
        ]
        lines.insert(1, "─" * len(lines[0]))
        lines += [f"left out of {n.name}: {', '.join(n.skipped)}" for n in nodes[:_SHOWN] if n.skipped]
        if self.dry_run:
            lines.append("dry run: nothing was changed")
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        state = "not read yet" if self._read is None else f"{self.selected:,} of {self.numel:,} elements selected"
        return f"Report({len(self)} nodes, {state})"


def _row(n: NodeReport) -> tuple[str, ...]:
    number = ("" if n.alpha is None else f"{n.alpha:g}", "" if n.lam is None else f"{n.lam:g}")
    counts = (f"{n.numel:,}", f"{n.selected:,}", f"{n.share:.2%}", f"{n.zeroed:,}", f"{n.nonfinite:,}")
    return (n.name, ", ".join(n.sources), *number, *counts)
