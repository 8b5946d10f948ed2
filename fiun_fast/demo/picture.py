"""The picture of a case: the network before and after, each node with its accuracy on what is to be forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import Case, Row

INK, FAINT, ORIGIN = "#1b1f24", "#8c959f", "#d55e00"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "figure.constrained_layout.w_pad": 0.15,
    "figure.constrained_layout.h_pad": 0.1,
    "svg.hashsalt": "fiun_fast",
}
RADIUS, COLUMN, MARGIN = 0.24, 1.3, 0.55  # inches; one unit of the drawing is one inch
Position = tuple[float, float]


def positions(rows: Sequence[Row]) -> dict[str, Position]:
    """Generations left to right, siblings top to bottom: node -> (x, y), in inches."""
    depth: dict[str, int] = {}
    for row in rows:
        depth[row.node] = 1 + max((depth[parent] for parent in row.parents), default=-1)
    columns = [[node for node in depth if depth[node] == x] for x in range(1 + max(depth.values()))]
    return {
        node: (COLUMN * x, (len(nodes) - 1) / 2 - k) for x, nodes in enumerate(columns) for k, node in enumerate(nodes)
    }


def draw(case: Case, path: Path) -> None:
    """Write the picture; the suffix of `path` names the format."""
    import matplotlib as mpl  # heavy, and only the demo needs it
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    where = positions(case.rows)
    xs, ys = zip(*where.values(), strict=True)
    width, height = max(xs) + 2 * MARGIN, max(ys) - min(ys) + 2 * MARGIN
    shape = (2, 1) if width > 4.5 else (1, 2)  # long networks stack before over after, compact ones stand side by side
    size = max(8.6, shape[1] * width + 1.5), shape[0] * (height + 0.3) + 1.5
    colours = ScalarMappable(mpl.colors.Normalize(0, 100), "cividis")
    with mpl.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        panels = figure.subplots(*shape, subplot_kw={"aspect": "equal", "frame_on": False, "xticks": [], "yticks": []})
        for axes, moment in zip(panels, ("before", "after"), strict=True):
            axes.set(xlim=(min(xs) - MARGIN, max(xs) + MARGIN), ylim=(min(ys) - MARGIN, max(ys) + MARGIN))
            axes.set_title(f"{moment} unlearning", loc="left", fontsize=11, weight="bold")
            _panel(axes, case, where, moment, colours)
        bar = figure.colorbar(colours, ax=panels, aspect=30, label="accuracy on what is to be forgotten, %")
        bar.outline.set_visible(False)
        title, subtitle = _words(case)
        figure.suptitle(f"{title}\n\n", x=0.02, ha="left", fontsize=13.5, weight="bold")
        figure.text(0.02, 1 - 0.42 / size[1], subtitle, va="top", fontsize=9, color="#57606a")
        marks = [
            Line2D([], [], ls="", marker="o", ms=10, mfc=fill, mec=edge, mew=line, label=label)
            for label, fill, edge, line in (
                ("where the data entered", colours.cmap(1.0), ORIGIN, 2.6),
                ("descendant", colours.cmap(1.0), INK, 1.0),
                ("not reached, not touched", "white", FAINT, 1.0),
            )
        ]
        marks.append(Line2D([], [], color=FAINT, marker=">", ms=5, lw=1.2, label="inherits"))
        figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, case: Case, where: Mapping[str, Position], moment: str, colours: Any) -> None:
    """One state of the network: arrows, discs with the forgotten accuracy inside, name and rest accuracy below."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    for row in case.rows:
        x, y = where[row.node]
        for px, py in (where[parent] for parent in row.parents):
            start, end = px + RADIUS + 0.05, x - RADIUS - 0.05
            middle = (start + end) / 2  # leaves and arrives level, so that it keeps clear of the names below the discs
            curve = Curve([(start, py), (middle, py), (middle, y), (end, y)], [1, 4, 4, 4])
            axes.add_patch(FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=9, color=FAINT, linewidth=1.1))
        gone, rest = (100 * share for share in getattr(row, moment))
        edge, line = (ORIGIN, 2.8) if row.node in case.origins else (INK if row.forget else FAINT, 1.0)
        fill, text = (colours.to_rgba(gone), f"{gone:.0f}") if row.forget else ("white", "–")
        ink = INK if not row.forget or gone > 55 else "white"
        axes.plot(x, y, "o", ms=2 * 72 * RADIUS, mfc=fill, mec=edge, mew=line)
        axes.text(x, y, text, ha="center", va="center_baseline", fontsize=11, weight="bold", color=ink)
        axes.text(x, y - RADIUS - 0.07, f"{row.node}  {rest:.1f}", ha="center", va="top", fontsize=8.5)


def _words(case: Case) -> tuple[str, str]:
    """Title and subtitle."""
    what = " and ".join(f"“{label}”" for label in case.classes)
    noun = "digit" if len(case.classes) == 1 else "digits"
    scope = "last layer" if case.scope == "last-layer" else "all parameters"
    return (
        f"{case.scenario}: {len(case.touched)} models forget the {noun} {what} in one run",
        f"{scope}, seed {case.seed}; inside a node: test accuracy (%) on what is to be forgotten; "
        "below it: name and accuracy (%) on the rest",
    )
