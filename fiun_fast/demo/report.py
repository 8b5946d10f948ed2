"""The outcome of a request: a row for each node, summaries of many cases, and the tables that are printed of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
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
