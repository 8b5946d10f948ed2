"""What the demo prints: one table of nodes and one of times for each case."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .experiment import Case
from .summary import Summary

TIMES = (  # key in Case.seconds, what to say next to it
    ("retraining every affected node", "really done"),
    ("original Fishers, all nodes", "once a network"),
    ("forget Fisher, at the origin", "once a request"),
    ("choosing alpha and lambda", "the whole grid, once a request"),
    ("compiling the plan", "once a request"),
    ("textbook chain, node by node", "median of 21"),
    ("one plan.run_()", "median of 21"),
)


def nodes_table(case: Case) -> Table:
    """Node, parents, accuracy before -> after, the same after retraining (forgotten / rest), what was chosen."""
    what = " and ".join(f"“{label}” ({origin})" for label, origin in zip(case.classes, case.origins, strict=True))
    numel = max(row.numel for row in case.rows)
    title = f"[bold]{case.scenario}[/]: forget {what}; {case.scope} ({numel:,} elements); seed {case.seed}"
    table = Table(
        title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    table.add_column("node", no_wrap=True)
    table.add_column("parents", style="dim")
    for name in ("forgotten %", "rest %", "retrained %", "α", "λ", "sel."):
        table.add_column(name, justify="right", no_wrap=True)
    for row in case.rows:
        if not row.forget:
            rest = f"{100 * row.before[1]:.1f}"
            table.add_row(row.node, " ".join(row.parents), "not reached", rest, style="dim")
            continue
        retrained = " / ".join(f"{100 * share:.1f}" for share in row.retrained) if row.retrained else ""
        table.add_row(
            f"[bold]{row.node}[/]" if row.node in case.origins else row.node,
            " ".join(row.parents),
            f"{100 * row.before[0]:.1f} → [bold]{100 * row.after[0]:.1f}[/]",
            f"{100 * row.before[1]:.1f} → [bold]{100 * row.after[1]:.1f}[/]",
            retrained,
            f"{row.alpha:.3g}",
            f"{row.lam:g}",
            f"{row.selected:,}",
        )
    return table


def times_table(case: Case) -> Table:
    """Each cost on a row of its own, so that none hides in another."""
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("time")
    table.add_column("ms", justify="right")
    table.add_column("", style="dim")
    for key, remark in TIMES:
        if key in case.seconds:
            ms = 1e3 * case.seconds[key]
            table.add_row(key, f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}", remark)
    return table


def summary_table(summaries: Sequence[Summary]) -> Table:
    """The figures over every class and seed."""
    table = Table(
        title="every class in turn, test split",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("network")
    table.add_column("request")
    for name in ("pairs", "forgotten before %", "left %", "rest before %", "lost, points", "≤ 1 % left, ≤ 2 lost"):
        table.add_column(name, justify="right")
    for s in summaries:
        table.add_row(
            s.scenario,
            s.request,
            f"{s.pairs}",
            f"{100 * s.forgotten_before:.1f}",
            f"{100 * s.forgotten_left:.2f}",
            f"{100 * s.rest_before:.1f}",
            f"{100 * s.rest_lost:.2f}",
            f"{100 * s.within:.1f} %",
        )
    return table
