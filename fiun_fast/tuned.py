"""What tuning found: the choice of every node, every point tried, and what there is to say against the choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import DagError
from .report import shown, table
from .values import Choice, Number

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
        layer: the patterns of the layer that was tried, where tuning goes layer by layer; alpha and lam then have a
            number for each layer.

    """

    alpha: Number
    lam: Number
    selected: int
    share: float
    score: float
    layer: str = ""


class Tuned(dict[str, Choice]):
    """What `tune` and `search_alpha` return: {node: Choice}, which `Plan.set_values_` takes, and how it came about.

    `print` shows a line for each node, and below it one for each of its layers that were told apart; `table` every
    point that was tried, `plot` the scores over the share selected.

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
            numbers = (shown(choice.alpha), shown(choice.lam), f"{share:.2%}", f"{choice.score:g}")
            rows.append((name, *numbers, f"{tried[0].score:g}", f"{len(tried)}", self.doubts.get(name, "")))
            if isinstance(choice.alpha, Mapping):
                lams = choice.lam if isinstance(choice.lam, Mapping) else dict.fromkeys(choice.alpha, choice.lam)
                rows += [
                    (f"  {pattern}", f"{alpha:g}", f"{lams[pattern]:g}", "", "", "", "", "")
                    for pattern, alpha in choice.alpha.items()
                ]
        return table(head, rows, left=1)

    def table(self, node: str | None = None) -> str:
        """Every point tried at a node, or at all, in the order tried; `*` marks what was chosen.

        Tuned layer by layer, alpha and lambda are those of the layer that was tried.

        Raises:
            DagError: no request reached such a node.

        """
        rows: list[tuple[str, ...]] = []
        for name in self._reached(node):
            choice = self[name]
            for p in self.points[name]:
                mark = "*" if (p.alpha, p.lam, p.score) == (choice.alpha, choice.lam, choice.score) else ""
                numbers = (_here(p, p.alpha), _here(p, p.lam), f"{p.selected:,}", f"{p.share:.2%}", f"{p.score:g}")
                rows.append((name, *numbers, p.layer, mark))
        head: tuple[str, ...] = ("node", "alpha", "lambda", "selected", "share", "score", "layer", "")
        if not any(row[-2] for row in rows):
            head, rows = (*head[:-2], ""), [(*row[:-2], row[-1]) for row in rows]
        return table(head, rows, left=1)

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
            lines: dict[str, list[tuple[float, float]]] = {}  # for each lambda, or each layer
            for p in others:
                lines.setdefault(p.layer or f"λ = {p.lam:g}", []).append((100 * p.share, p.score))
            for (what, line), marker in zip(lines.items(), "osv^D<>*" * len(lines), strict=False):
                line.sort()
                label = what if len(names) == 1 else f"{name}, {what}"
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


def _here(point: TriedPoint, number: Number) -> str:
    """Alpha or lambda of the layer that was tried, if there was one."""
    return shown(number[point.layer.split(", ")[0]] if isinstance(number, Mapping) else number)
