"""What tuning found: the choice of every node, every point tried, and what there is to say against the choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import DagError
from .planning import Choice
from .report import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TriedPoint:
    """One pair of alpha and lambda at one node.

    Attributes:
        alpha, lam: the pair; alpha is infinite where the node was left alone.
        selected: elements that alpha selects.
        share: the same over the elements compared, 0..1.
        score: what `evaluate` said of the node.

    """

    alpha: float
    lam: float
    selected: int
    share: float
    score: float


class Tuned(dict[str, Choice]):
    """What `tune` and `search_alpha` return: {node: Choice}, which `Plan.set_values_` takes, and how it came about.

    `print` shows a line for each node, `table` every point that was tried, `plot` the scores over the share selected.

    Attributes:
        points: node -> what was tried there, in that order; the first is the node as it was, left alone.
        doubts: node -> what there is to say against the choice, of those nodes where there is something.

    """

    def __init__(
        self,
        chosen: Mapping[str, Choice],
        points: Mapping[str, Iterable[TriedPoint]],
        doubts: Mapping[str, str],
    ) -> None:
        super().__init__(chosen)
        self.points = {name: tuple(tried) for name, tried in points.items()}
        self.doubts = dict(doubts)

    def __str__(self) -> str:
        head = ("node", "alpha", "lambda", "selected", "score", "left alone", "points", "")
        rows = []
        for name, choice in self.items():
            tried = self.points[name]
            share = next((p.share for p in tried if (p.alpha, p.lam) == (choice.alpha, choice.lam)), 0.0)
            numbers = (f"{choice.alpha:g}", f"{choice.lam:g}", f"{share:.2%}", f"{choice.score:g}")
            rows.append((name, *numbers, f"{tried[0].score:g}", f"{len(tried)}", self.doubts.get(name, "")))
        return table(head, rows, left=1)

    def table(self, node: str | None = None) -> str:
        """Every point tried at a node, or at all, in the order tried; `*` marks what was chosen.

        Raises:
            DagError: no request reached such a node.

        """
        rows = []
        for name in self._reached(node):
            choice = self[name]
            for p in self.points[name]:
                mark = "*" if (p.alpha, p.lam, p.score) == (choice.alpha, choice.lam, choice.score) else ""
                numbers = (f"{p.alpha:g}", f"{p.lam:g}", f"{p.selected:,}", f"{p.share:.2%}", f"{p.score:g}")
                rows.append((name, *numbers, mark))
        return table(("node", "alpha", "lambda", "selected", "share", "score", ""), rows, left=1)

    def plot(self, node: str | None = None, axes: Axes | None = None) -> Axes:
        """Draw the score of a node, or of all, over the share selected: a line for each lambda. Needs matplotlib.

        A dashed line is the score of the node left alone, a ring what was chosen.

        Raises:
            DagError: no request reached such a node.

        """
        names = self._reached(node)
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")[1]
        for index, name in enumerate(names):
            alone, *others = self.points[name]
            color, choice = f"C{index % 10}", self[name]
            axes.axhline(alone.score, color=color, linestyle="--", linewidth=1)
            lambdas = list(dict.fromkeys(p.lam for p in others))
            for lam, marker in zip(lambdas, "osv^D<>*" * len(lambdas), strict=False):
                line = sorted((100 * p.share, p.score) for p in others if p.lam == lam)
                label = f"λ = {lam:g}" if len(names) == 1 else f"{name}, λ = {lam:g}"
                axes.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=4, linewidth=1, label=label)
            if best := [p for p in others if (p.alpha, p.lam) == (choice.alpha, choice.lam)]:
                axes.plot(100 * best[0].share, best[0].score, "o", color="black", markersize=11, fillstyle="none")
        axes.set(xlabel="% of the elements selected", ylabel="score")
        if any(p.selected for name in names for p in self.points[name]):
            axes.set_xscale("symlog", linthresh=0.01)
            axes.legend(fontsize="small")
        return axes

    def _reached(self, node: str | None) -> list[str]:
        if node is not None and node not in self:
            raise DagError(f"no node {node!r} among those tuned; nodes reached: {', '.join(list(self)[:8])}")
        return list(self) if node is None else [node]
