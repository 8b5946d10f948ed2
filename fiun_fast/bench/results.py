"""Rows of a result, the file they are kept in, and the table that is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.bar import Bar

from .files import write_json
from .measure import COPY, Case


@dataclass
class Row:
    """One variant of one case on one device."""

    case: str
    title: str
    variant: str
    kind: str
    device: str
    elements: int
    ms: float  # median
    p20: float
    p80: float
    rounds: int
    copy_gbps: float  # of a plain copy, in the same rounds
    selected: float | None = None
    floor_bytes: int | None = None  # what the work moves at least
    gbps: float | None = None  # that over the median, whatever was really moved
    share: float | None = None  # that over copy_gbps
    vs_naive: float | None = None  # median of the naive variant over this one's
    vs_torch: float | None = None  # the same for the best in plain torch
    bound: dict[str, float] | None = None  # ms that its memory, its instructions and the host take by themselves
    extra_bytes: int | None = None  # peak memory on top of what was there before the run
    calls: int | None = None  # torch operators, compiled graphs and launches of one run
    launches: int | None = None  # kernels on a GPU
    agrees: str | None = None  # how the outcome compares with the reference's


@dataclass
class Record:
    """A results file."""

    mode: str
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)  # case, variant, why

    def save(self, path: Path) -> None:
        """Write it, one row a line, without what is empty, with four digits where more would be noise."""
        rows = [{key: value for key, value in asdict(row).items() if value is not None} for row in self.rows]
        write_json(path, asdict(self) | {"rows": rows}, digits=4)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote."""
        found = json.loads(path.read_text())
        return cls(found["mode"], found["environment"], [Row(**row) for row in found["rows"]], found["skipped"])

    def keep(self, path: Path, order: Sequence[str]) -> list[str]:
        """Take over cases that were not measured now from a file of the same mode, machine and commit; which ones."""
        before = Record.load(path) if path.exists() else None
        if before is None or before.mode != self.mode or before.environment != self.environment:
            return []
        kept = [case for case in before.cases if case in order and case not in self.cases]
        rows = self.rows + [row for row in before.rows if row.case in kept]
        self.rows = sorted(rows, key=lambda row: order.index(row.case))
        self.skipped += [entry for entry in before.skipped if entry["case"] in kept]
        return kept

    def best(self, case: str, kind: str) -> Row | None:
        """The fastest row of a kind."""
        return min((r for r in self.rows if r.case == case and r.kind == kind), key=lambda r: r.ms, default=None)

    def ours(self, case: str) -> Row | None:
        """The row of our fastest variant."""
        return self.best(case, "ours")

    @property
    def cases(self) -> list[str]:
        """The cases measured, in order."""
        return list(dict.fromkeys(row.case for row in self.rows))


def rows_of(
    case: Case, device: str, times: Mapping[str, Sequence[float]], copy_bytes: int, agreement: Mapping[str, str]
) -> list[Row]:
    """Rows from the seconds of a race."""
    kinds = {v.name: v.kind for v in case.variants}
    copy_gbps = copy_bytes / float(np.median(times[COPY])) / 1e9
    found = []
    for name, seconds in times.items():
        if name == COPY:
            continue
        base = name.removesuffix(" (graph)")
        p20, ms, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
        row = Row(
            case.name, case.title, name, kinds[base], device, case.elements, 1e3 * ms, 1e3 * p20, 1e3 * p80,
            len(seconds), copy_gbps, case.selected, case.floor, agrees=agreement.get(base),
        )  # fmt: skip
        if case.floor is not None:
            row.gbps = case.floor / row.ms / 1e6
            row.share = row.gbps / copy_gbps
        found.append(row)
    naive, torch = (min((r.ms for r in found if r.kind == kind), default=None) for kind in ("naive", "torch"))
    for row in found:
        row.vs_naive = naive / row.ms if naive else None
        row.vs_torch = torch / row.ms if torch and row.kind == "ours" else None
    return found


def table(rows: Iterable[Row]) -> Any:
    """What rich prints: a block a case; ours in colour, a bar for the share of the copy bandwidth."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    for case, block in groupby(rows, key=lambda row: row.case):
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
        for heading, (width, _) in COLUMNS.items():
            side: Any = "left" if heading in ("variant", "") else "right"
            table.add_column(heading, justify=side, min_width=width, no_wrap=True)
        first, *others = block
        for row in (first, *others):
            table.add_row(*(cell(row) for _, cell in COLUMNS.values()), style=STYLES.get(row.kind, ""))
        floor = f" · floor {size(first.floor_bytes)}" if first.floor_bytes else ""
        line = f"{first.title}{floor} · copy {first.copy_gbps:.1f} GB/s"
        shown += [Text(""), Text.assemble((f"{case}  ", "bold"), line), table]
    return Group(*shown)


STYLES = {"ours": "bold green", "naive": "red", "reference": "dim", "floor": "dim"}
COLUMNS: dict[str, tuple[int, Callable[[Row], Any]]] = {  # heading -> least width, so that blocks line up; the cell
    "variant": (17, lambda row: row.variant),
    "ms": (7, lambda row: short(row.ms)),
    "p20–p80": (13, lambda row: f"{short(row.p20)}–{short(row.p80)}"),
    "GB/s": (5, lambda row: _or(row.gbps, "{:.1f}")),
    "of copy": (7, lambda row: _or(row.share, "{:.2f}")),
    "": (8, lambda row: "" if row.share is None else Bar(1.0, 0.0, row.share, width=8)),
    "naive ÷": (7, lambda row: _or(row.vs_naive, "{:.3g}×")),
    "torch ÷": (7, lambda row: _or(row.vs_torch, "{:.3g}×")),
    "extra": (7, lambda row: size(row.extra_bytes)),
    "calls": (7, lambda row: _or(row.calls, "{:,}")),
    "kernels": (7, lambda row: _or(row.launches, "{:,}")),
}
LEGEND = (
    "GB/s: the least bytes the work moves, over the median. of copy: that, over a plain copy in the same rounds. "
    "naive ÷, torch ÷: how many times faster than existing code, and than the best in plain torch. extra: peak memory."
)


def short(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def size(n: int | None) -> str:
    """Bytes in a readable unit."""
    if n is None:
        return ""
    value = float(n)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _or(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
