"""One picture a case: the inheritance DAG, every node coloured by its accuracy on the forgotten classes, twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .experiment import Case, Row

INK, FAINT, ORIGIN = "#1b1f24", "#8c959f", "#d55e00"
RADIUS, COLUMN, GAP, HEADER, FOOTER = 0.24, 1.3, 0.45, 1.05, 0.5  # inches
Position = tuple[float, float]


def layout(rows: Sequence[Row]) -> dict[str, Position]:
    """Generations left to right, siblings top to bottom: node -> (x, y), in inches."""
    depth: dict[str, int] = {}
    for row in rows:
        depth[row.node] = 1 + max((depth[parent] for parent in row.parents), default=-1)
    columns: dict[int, list[str]] = {}
    for node, column in depth.items():
        columns.setdefault(column, []).append(node)
    return {
        node: (COLUMN * column, (len(nodes) - 1) / 2 - k)
        for column, nodes in columns.items()
        for k, node in enumerate(nodes)
    }


def draw(case: Case, path: Path) -> None:
    """Write the picture; the suffix of `path` names the format."""
    import matplotlib  # heavy, and only the demo needs it
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    where = layout(case.rows)
    xs, ys = zip(*where.values(), strict=True)
    # One unit of the drawing is one inch, so the page is as large as the network asks for.
    panel_width, panel_height = max(xs) + 1.2, max(ys) - min(ys) + 1.05
    stacked = panel_width > 4.5  # long networks stack before over after, compact ones stand side by side
    body_width = panel_width if stacked else 2 * panel_width + 2 * GAP
    body_height = 2 * panel_height + GAP if stacked else panel_height
    width, height = max(8.6, body_width + 1.5), body_height + HEADER + FOOTER
    left = 0.2 + (width - 1.5 - body_width) / 2
    colours, scale = matplotlib.colormaps["cividis"], Normalize(0, 100)

    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "svg.hashsalt": "fiun_fast", "text.color": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), facecolor="white")

        def place(x: float, y: float, w: float, h: float) -> Any:
            return figure.add_axes((x / width, y / height, w / width, h / height))

        for moment in ("before", "after"):
            first = moment == "before"
            x = left if stacked or first else left + panel_width + 2 * GAP
            y = FOOTER if not (stacked and first) else FOOTER + panel_height + GAP
            axes = place(x, y, panel_width, panel_height)
            axes.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.6, max(ys) + 0.45))
            axes.set_axis_off()
            axes.set_title(f"{moment} unlearning", loc="left", fontsize=11, weight="bold", pad=4)
            _panel(axes, case, where, moment, lambda share: colours(scale(share)))

        bar = figure.colorbar(ScalarMappable(scale, colours), cax=place(width - 0.95, FOOTER + 0.1, 0.16, body_height))
        bar.set_label("accuracy on what is to be forgotten, %", fontsize=9)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, color=FAINT)

        figure.text(0.2 / width, 1 - 0.16 / height, _title(case), fontsize=13.5, weight="bold", va="top")
        figure.text(0.2 / width, 1 - 0.46 / height, _subtitle(case), fontsize=9, color="#57606a", va="top")
        marks = [
            Line2D([], [], **_dot(colours(1.0), ORIGIN, 2.6), label="where the data entered"),
            Line2D([], [], **_dot(colours(1.0), INK, 1.0), label="descendant"),
            Line2D([], [], **_dot("white", FAINT, 1.0), label="not reached, not touched"),
            Line2D([], [], color=FAINT, marker=">", markersize=5, linewidth=1.2, label="inherits"),
        ]
        figure.legend(
            handles=marks, loc="lower center", ncols=4, frameon=False, fontsize=9,
            bbox_to_anchor=(0.5 * (width - 0.9) / width, 0.0),
        )  # fmt: skip
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, case: Case, where: Mapping[str, Position], moment: str, colour: Any) -> None:
    """One state of the network: arrows, discs with the forgotten accuracy inside, name and rest accuracy below."""
    from matplotlib.patches import Circle, FancyArrowPatch
    from matplotlib.path import Path as Curve

    for row in case.rows:
        x, y = where[row.node]
        for parent in row.parents:
            px, py = where[parent]
            start, end = px + RADIUS + 0.05, x - RADIUS - 0.05
            middle = (start + end) / 2  # leaves and arrives level, so that it keeps clear of the names below the discs
            curve = Curve([(start, py), (middle, py), (middle, y), (end, y)], [1, 4, 4, 4])
            axes.add_patch(FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=9, color=FAINT, linewidth=1.1))
        gone, rest = (100 * share for share in (row.before if moment == "before" else row.after))
        edge, line = (ORIGIN, 2.8) if row.node in case.origins else (INK if row.forget else FAINT, 1.0)
        fill = colour(gone) if row.forget else "white"
        axes.add_patch(Circle((x, y), RADIUS, facecolor=fill, edgecolor=edge, linewidth=line, zorder=2))
        ink = INK if not row.forget or gone > 55 else "white"
        text = f"{gone:.0f}" if row.forget else "–"
        axes.text(x, y, text, ha="center", va="center_baseline", fontsize=11, weight="bold", color=ink, zorder=3)
        axes.text(x, y - RADIUS - 0.07, f"{row.node}  {rest:.1f}", ha="center", va="top", fontsize=8.5)


def _dot(fill: Any, edge: str, line: float) -> dict[str, Any]:
    return {
        "linestyle": "none", "marker": "o", "markersize": 10,
        "markerfacecolor": fill, "markeredgecolor": edge, "markeredgewidth": line,
    }  # fmt: skip


def _title(case: Case) -> str:
    what = " and ".join(f"“{label}”" for label in case.classes)
    noun = "digit" if len(case.classes) == 1 else "digits"
    return f"{case.scenario}: {len(case.touched)} models forget the {noun} {what} in one run"


def _subtitle(case: Case) -> str:
    scope = "last layer" if case.scope == "last-layer" else "all parameters"
    return (
        f"{scope}, seed {case.seed}; inside a node: test accuracy (%) on what is to be forgotten; "
        "below it: name and accuracy (%) on the rest"
    )
