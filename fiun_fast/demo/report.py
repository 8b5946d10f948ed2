"""The outcome of a request: a row for each node, summaries of many cases, the printed tables, a picture of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

LEFT, LOST = 0.01, 0.02  # a pair is within: at most 1 % accuracy left on the forgotten, 2 points lost on the rest
TIMES = {  # key in Case.seconds -> what to say next to it
    "retraining every affected node": "really done",
    "original Fishers, all nodes": "once a network",
    "forget Fisher, at the origin": "once a request",
    "choosing alpha and lambda": "the whole grid, once a request",
    "compiling the plan": "once a request",
    "textbook chain, node by node": "median of 21",
    "one plan.run_()": "median of 21",
}
INK, FAINT, ORIGIN = "#1b1f24", "#8c959f", "#d55e00"
RADIUS, COLUMN, GAP, HEADER, FOOTER = 0.24, 1.3, 0.45, 1.05, 0.5  # inches
STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "svg.hashsalt": "fiun_fast", "text.color": INK}
TITLE: dict[str, Any] = {"fontsize": 13.5, "weight": "bold"}
SUBTITLE: dict[str, Any] = {"fontsize": 9, "color": "#57606a"}
Position = tuple[float, float]


@dataclass
class Row:
    """One node before and after. Accuracies are shares of the test split, over the classes the node knows."""

    node: str
    parents: tuple[str, ...]
    forget: tuple[int, ...]  # the classes that reach this node; empty: not touched
    before: tuple[float, float]  # accuracy on the forgotten classes, on the rest
    after: tuple[float, float]
    alpha: float | None = None
    lam: float | None = None
    selected: int = 0
    numel: int = 0
    retrained: tuple[float, float] | None = None


@dataclass
class Case:
    """One request, or several merged, in one network."""

    scenario: str
    seed: int
    scope: str
    classes: tuple[int, ...]
    origins: tuple[str, ...]
    rows: list[Row]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def touched(self) -> list[Row]:
        """The nodes that the request reaches."""
        return [row for row in self.rows if row.forget]


@dataclass(frozen=True)
class Summary:
    """Shares (0..1) over `pairs` = nodes reached, each once for every request."""

    scenario: str
    request: str
    pairs: int
    within: float
    forgotten_before: float
    forgotten_left: float
    rest_before: float
    rest_lost: float


def summarise(scenario: str, request: str, cases: Sequence[Case], *, merged_only: bool = False) -> Summary:
    """Over every reached node; with `merged_only`, over nodes that more than one request reaches."""
    rows = [row for case in cases for row in case.touched if not merged_only or len(row.forget) > 1]
    lost = [row.before[1] - row.after[1] for row in rows]
    return Summary(
        scenario,
        request,
        pairs=len(rows),
        within=mean(row.after[0] <= LEFT and fall <= LOST for row, fall in zip(rows, lost, strict=True)),
        forgotten_before=mean(row.before[0] for row in rows),
        forgotten_left=mean(row.after[0] for row in rows),
        rest_before=mean(row.before[1] for row in rows),
        rest_lost=mean(lost),
    )


# ---- Tables ----------------------------------------------------------------------------------------------------------


def nodes_table(case: Case) -> Table:
    """Node, parents, accuracy before -> after, the same after retraining (forgotten / rest), what was chosen."""
    what = " and ".join(f"“{label}” ({origin})" for label, origin in zip(case.classes, case.origins, strict=True))
    numel = max(row.numel for row in case.rows)
    table = _table(f"[bold]{case.scenario}[/]: forget {what}; {case.scope} ({numel:,} elements); seed {case.seed}")
    table.title_style = ""
    table.add_column("node", no_wrap=True)
    table.add_column("parents", style="dim")
    for name in ("forgotten %", "rest %", "retrained %", "α", "λ", "sel."):
        table.add_column(name, justify="right", no_wrap=True)
    for row in case.rows:
        parents = " ".join(row.parents)
        if not row.forget:
            table.add_row(row.node, parents, "not reached", f"{100 * row.before[1]:.1f}", style="dim")
            continue
        node = f"[bold]{row.node}[/]" if row.node in case.origins else row.node
        pairs = zip(row.before, row.after, strict=True)
        moved = [f"{100 * before:.1f} → [bold]{100 * after:.1f}[/]" for before, after in pairs]
        retrained = " / ".join(f"{100 * share:.1f}" for share in row.retrained or ())
        table.add_row(node, parents, *moved, retrained, f"{row.alpha:.3g}", f"{row.lam:g}", f"{row.selected:,}")
    return table


def times_table(case: Case) -> Table:
    """Each cost on a row of its own, so that none hides in another."""
    table = Table("time", box=None, padding=(0, 2), pad_edge=False)
    table.add_column("ms", justify="right")
    table.add_column("", style="dim")
    for key, remark in TIMES.items():
        if key in case.seconds:
            ms = 1e3 * case.seconds[key]
            table.add_row(key, f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}", remark)
    return table


def summary_table(summaries: Sequence[Summary]) -> Table:
    """The figures over every class and seed."""
    table = _table("every class in turn, test split")
    table.add_column("network")
    table.add_column("request")
    for name in ("pairs", "forgotten before %", "left %", "rest before %", "lost, points", "≤ 1 % left, ≤ 2 lost"):
        table.add_column(name, justify="right")
    for s in summaries:
        before, left = f"{100 * s.forgotten_before:.1f}", f"{100 * s.forgotten_left:.2f}"
        rest, lost = f"{100 * s.rest_before:.1f}", f"{100 * s.rest_lost:.2f}"
        table.add_row(s.scenario, s.request, f"{s.pairs}", before, left, rest, lost, f"{100 * s.within:.1f} %")
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)


# ---- Pictures --------------------------------------------------------------------------------------------------------


def positions(rows: Sequence[Row]) -> dict[str, Position]:
    """Generations left to right, siblings top to bottom: node -> (x, y), in inches."""
    depth: dict[str, int] = {}
    columns: dict[int, list[str]] = {}
    for row in rows:
        depth[row.node] = 1 + max((depth[parent] for parent in row.parents), default=-1)
        columns.setdefault(depth[row.node], []).append(row.node)
    ranked = [(node, x, k, len(nodes)) for x, nodes in columns.items() for k, node in enumerate(nodes)]
    return {node: (COLUMN * x, (count - 1) / 2 - k) for node, x, k, count in ranked}


def draw(case: Case, path: Path) -> None:
    """Write the picture; the suffix of `path` names the format."""
    import matplotlib  # heavy, and only the demo needs it
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    where = positions(case.rows)
    xs, ys = zip(*where.values(), strict=True)
    # One unit of the drawing is one inch, so the page is as large as the network asks for.
    panel_width, panel_height = max(xs) + 1.2, max(ys) - min(ys) + 1.05
    stacked = panel_width > 4.5  # long networks stack before over after, compact ones stand side by side
    body_width = panel_width if stacked else 2 * panel_width + 2 * GAP
    body_height = 2 * panel_height + GAP if stacked else panel_height
    width, height = max(8.6, body_width + 1.5), body_height + HEADER + FOOTER
    left = 0.2 + (width - 1.5 - body_width) / 2
    colours, scale = matplotlib.colormaps["cividis"], Normalize(0, 100)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), facecolor="white")

        def place(x: float, y: float, w: float, h: float) -> Any:
            return figure.add_axes((x / width, y / height, w / width, h / height))

        for moment in ("before", "after"):
            first = moment == "before"
            x = left if stacked or first else left + panel_width + 2 * GAP
            y = FOOTER + panel_height + GAP if stacked and first else FOOTER
            axes = place(x, y, panel_width, panel_height)
            axes.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.6, max(ys) + 0.45))
            axes.set_axis_off()
            axes.set_title(f"{moment} unlearning", loc="left", fontsize=11, weight="bold", pad=4)
            _panel(axes, case, where, moment, lambda share: colours(scale(share)))

        bar = figure.colorbar(ScalarMappable(scale, colours), cax=place(width - 0.95, FOOTER + 0.1, 0.16, body_height))
        bar.set_label("accuracy on what is to be forgotten, %", fontsize=9)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, color=FAINT)
        for text, y, look in zip(_words(case), (0.16, 0.46), (TITLE, SUBTITLE), strict=True):
            figure.text(0.2 / width, 1 - y / height, text, va="top", **look)
        dot: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 10}
        marks = [
            Line2D([], [], **dot, mfc=fill, mec=edge, mew=line, label=label)
            for fill, edge, line, label in (
                (colours(1.0), ORIGIN, 2.6, "where the data entered"),
                (colours(1.0), INK, 1.0, "descendant"),
                ("white", FAINT, 1.0, "not reached, not touched"),
            )
        ]
        marks.append(Line2D([], [], color=FAINT, marker=">", markersize=5, linewidth=1.2, label="inherits"))
        at = (0.5 * (width - 0.9) / width, 0.0)
        figure.legend(handles=marks, loc="lower center", ncols=4, frameon=False, fontsize=9, bbox_to_anchor=at)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, case: Case, where: Mapping[str, Position], moment: str, colour: Callable[[float], Any]) -> None:
    """One state of the network: arrows, discs with the forgotten accuracy inside, name and rest accuracy below."""
    from matplotlib.patches import Circle, FancyArrowPatch
    from matplotlib.path import Path as Curve

    for row in case.rows:
        x, y = where[row.node]
        for px, py in (where[parent] for parent in row.parents):
            start, end = px + RADIUS + 0.05, x - RADIUS - 0.05
            middle = (start + end) / 2  # leaves and arrives level, so that it keeps clear of the names below the discs
            curve = Curve([(start, py), (middle, py), (middle, y), (end, y)], [1, 4, 4, 4])
            axes.add_patch(FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=9, color=FAINT, linewidth=1.1))
        gone, rest = (100 * share for share in (row.before if moment == "before" else row.after))
        edge, line = (ORIGIN, 2.8) if row.node in case.origins else (INK if row.forget else FAINT, 1.0)
        fill, text = (colour(gone), f"{gone:.0f}") if row.forget else ("white", "–")
        ink = INK if not row.forget or gone > 55 else "white"
        axes.add_patch(Circle((x, y), RADIUS, facecolor=fill, edgecolor=edge, linewidth=line, zorder=2))
        axes.text(x, y, text, ha="center", va="center_baseline", fontsize=11, weight="bold", color=ink, zorder=3)
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
