"""The outcome of a request: a row for each node, summaries of many cases, the printed tables, a picture of a case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..evaluation import Estimate
from ..values import Number

GONE = {  # measure -> what to call it
    "forget": "forgotten",
    "retain": "retained",
    "test": "test",
    "tow": "ToW",
    "entropy": "entropy MIA",
    "confidence": "SVC efficacy",
    "rmia": "RMIA AUC",
    "zrf": "ZRF",
    "probe": "linear probe",
    "int4": "int4",
    "relearned_few": "relearned",
}
LEFT, LOST = 0.01, 0.02  # a pair is within: at most 1 % accuracy left on the forgotten, 2 points lost on the rest
TIMES = {  # key in Case.seconds -> what to say next to it
    "retraining every affected node": "really done",
    "original Fishers, all nodes": "once a network",
    "forget Fisher, at the origin": "once a request",
    "choosing alpha and lambda": "compiling, the whole grid, measuring; once a request",
    "textbook chain, node by node": "median of 21",
    "one plan.run_()": "median of 21",
}


@dataclass
class Row:
    """One node before and after. Accuracies are shares of the test split, over the classes the node knows."""

    node: str
    parents: tuple[str, ...]
    forget: tuple[int, ...]  # the classes that reach this node; empty: not touched
    before: tuple[float, float]  # accuracy on the forgotten classes, on the rest
    after: tuple[float, float]
    alpha: Number | None = None  # {pattern: number} where it went by layer
    lam: Number | None = None
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


@dataclass
class Gone:
    """What a node still knows of what it forgot: {measure: (unlearned, retrained)}, with intervals."""

    scenario: str
    node: str
    request: str
    measured: dict[str, tuple[Estimate, Estimate | None]]
    alpha: Number  # infinite: left alone
    lam: Number


def summarise(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Shares (0..1) over pairs of a request and a node that it reaches whole: of each network, and of all of them."""
    found = []
    for size, request in ((1, "one class"), (2, "two origins, merged")):
        pairs: dict[str, list[Row]] = {}
        for case in cases:
            if rows := [row for row in case.touched if len(row.forget) == len(case.classes) == size]:
                pairs.setdefault(case.scenario, []).extend(rows)
        if len(pairs) > 1:
            pairs["all networks"] = [*chain(*pairs.values())]
        found += [{"scenario": scenario, "request": request, **_shares(rows)} for scenario, rows in pairs.items()]
    return found


def _shares(rows: Sequence[Row]) -> dict[str, float]:
    lost = [row.before[1] - row.after[1] for row in rows]
    return {
        "pairs": len(rows),
        "within": mean(row.after[0] <= LEFT and fall <= LOST for row, fall in zip(rows, lost, strict=True)),
        "forgotten_before": mean(row.before[0] for row in rows),
        "forgotten_left": mean(row.after[0] for row in rows),
        "rest_before": mean(row.before[1] for row in rows),
        "rest_lost": mean(lost),
    }


def nodes_table(case: Case) -> Table:
    """Node, parents, accuracy before -> after, the same after retraining (forgotten / rest), what was chosen."""
    what = " and ".join(f"“{label}” ({origin})" for label, origin in zip(case.classes, case.origins, strict=True))
    numel = max(row.numel for row in case.rows)
    table = _table(
        f"[not italic][bold]{case.scenario}[/]: forget {what}; {case.scope} ({numel:,} elements); seed {case.seed}[/]",
        ("node", "parents"),
        ("forgotten %", "rest %", "retrained %", "α", "λ", "sel."),
    )
    for row in case.rows:
        parents = " ".join(row.parents)
        if not row.forget:
            table.add_row(row.node, parents, "not reached", f"{100 * row.before[1]:.1f}", style="dim")
            continue
        node = f"[bold]{row.node}[/]" if row.node in case.origins else row.node
        pairs = zip(row.before, row.after, strict=True)
        moved = [f"{100 * before:.1f} → [bold]{100 * after:.1f}[/]" for before, after in pairs]
        retrained = " / ".join(f"{100 * share:.1f}" for share in row.retrained or ())
        table.add_row(node, parents, *moved, retrained, _shown(row.alpha), _shown(row.lam), f"{row.selected:,}")
    return table


def _shown(number: Number | None) -> str:
    return "by layer" if isinstance(number, Mapping) else f"{number:.3g}"


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


def gone_table(found: Sequence[Gone], scope: str) -> Table:
    """What one node of each network still knows of what it forgot, and what a retrained one does: a row a measure."""
    table = _table("is it gone? unlearned / retrained; docs/evaluation.md says what the rows are", ("",), ())
    for one in found:
        table.add_column(f"{one.scenario}\n{one.node}\n{one.request}", justify="right", no_wrap=True)
    for name, head in GONE.items():
        cells = [one.measured.get(name) for one in found]
        table.add_row(head, *(" / ".join(f"{e.value:.2f}" for e in cell or () if e is not None) for cell in cells))
    if scope == "last-layer":
        table.caption = (
            "Only the last layer was changed: the body's features are those of before. The linear probe, fitted anew, "
            "says how well the forgotten can be told in them, and in the retrained network's, which never saw it."
        )
        table.caption_justify = "left"
    return table


def summary_table(summaries: Iterable[Mapping[str, Any]]) -> Table:
    """The figures over every class and seed."""
    columns = {
        "forgotten before %": ("forgotten_before", 1),
        "left %": ("forgotten_left", 2),
        "rest before %": ("rest_before", 1),
        "lost, points": ("rest_lost", 2),
        "≤ 1 % left, ≤ 2 lost, %": ("within", 1),
    }
    table = _table("every class in turn, test split", ("network", "request"), ("pairs", *columns))
    for row in summaries:
        cells = [f"{100 * row[key]:.{digits}f}" for key, digits in columns.values()]
        table.add_row(row["scenario"], row["request"], f"{row['pairs']}", *cells)
    return table


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    """An empty table with columns that stand on the left, and on the right."""
    table = Table(*left, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for head in right:
        table.add_column(head, justify="right", no_wrap=True)
    return table


# ---- Pictures: the network before and after ----

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
