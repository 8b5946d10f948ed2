"""Rows of a result, the file they are kept in, and the table that is printed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .measure import COPY, Case


@dataclass
class Row:
    """One variant of one case on one device.

    Attributes:
        ms: median, with p20 and p80 beside it, over `rounds` runs.
        floor_bytes: what the work moves at least; gbps is that over the median, whatever was really moved.
        copy_gbps: of a plain copy, in the same rounds; share is gbps over it.
        vs_naive, vs_torch: median of the naive variant, and of the best in plain torch, over this one's.
        extra_bytes: peak memory on top of what was there before the run.
        calls: torch operators, compiled graphs and launches of one run; launches: kernels on a GPU.
        agrees: how the outcome compares with the reference's.

    """

    case: str
    title: str
    variant: str
    kind: str
    device: str
    elements: int
    ms: float
    p20: float
    p80: float
    rounds: int
    copy_gbps: float
    selected: float | None = None
    floor_bytes: int | None = None
    gbps: float | None = None
    share: float | None = None
    vs_naive: float | None = None
    vs_torch: float | None = None
    extra_bytes: int | None = None
    calls: int | None = None
    launches: int | None = None
    agrees: str | None = None


@dataclass
class Record:
    """A results file."""

    mode: str
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)  # case, variant, why

    def save(self, path: Path) -> None:
        """Write it, one row a line, all or nothing."""
        head = {"mode": self.mode, "environment": self.environment, "skipped": self.skipped}
        lines = ",\n".join(f"  {json.dumps(_plain(asdict(row)))}" for row in self.rows)
        text = f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what `save` wrote."""
        found = json.loads(path.read_text())
        return cls(found["mode"], found["environment"], [Row(**row) for row in found["rows"]], found["skipped"])

    def find(self, case: str, variant: str) -> Row | None:
        """The row of a variant."""
        return next((row for row in self.rows if (row.case, row.variant) == (case, variant)), None)

    def ours(self, case: str) -> Row | None:
        """The row of our fastest variant."""
        return min((r for r in self.rows if r.case == case and r.kind == "ours"), key=lambda r: r.ms, default=None)


def rows_of(
    case: Case,
    device: str,
    times: Mapping[str, Sequence[float]],
    copy_bytes: int,
    agreement: Mapping[str, str],
) -> list[Row]:
    """Rows from the seconds of a race."""
    kinds = {v.name: v.kind for v in case.variants}
    copy_gbps = copy_bytes / float(np.median(times[COPY])) / 1e9
    found = []
    for name, seconds in times.items():
        if name == COPY:
            continue
        p20, p50, p80 = np.percentile(seconds, [20, 50, 80]) * 1e3
        base = name.removesuffix(" (graph)")
        row = Row(
            case=case.name,
            title=case.title,
            variant=name,
            kind=kinds[base],
            device=device,
            elements=case.elements,
            ms=p50,
            p20=p20,
            p80=p80,
            rounds=len(seconds),
            copy_gbps=copy_gbps,
            selected=case.selected,
            floor_bytes=case.floor,
            agrees=agreement.get(base),
        )
        if case.floor is not None:
            row.gbps = case.floor / p50 / 1e6
            row.share = row.gbps / row.copy_gbps
        found.append(row)
    naive = min((r.ms for r in found if r.kind == "naive"), default=None)
    best = min((r.ms for r in found if r.kind == "torch"), default=None)
    for row in found:
        row.vs_naive = naive / row.ms if naive else None
        row.vs_torch = best / row.ms if best and row.kind == "ours" else None
    return found


def table(rows: Iterable[Row]) -> Any:
    """What rich prints: a block a case; ours in colour, a bar for the share of the copy bandwidth."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    case = None
    for row in rows:
        if row.case != case:
            case = row.case
            block = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
            for heading, (justify, width) in HEADINGS.items():
                block.add_column(heading, justify=justify, min_width=width, no_wrap=True)
            facts = [row.title]
            facts += [f"floor {size(row.floor_bytes)}"] if row.floor_bytes else []
            facts += [f"copy {row.copy_gbps:.1f} GB/s"]
            shown += [Text(""), Text.assemble((f"{row.case}  ", "bold"), " · ".join(facts)), block]
        cells = [row.variant, short(row.ms), f"{short(row.p20)}–{short(row.p80)}", _or(row.gbps, "{:.1f}")]
        cells += [_or(row.share, "{:.2f}"), bar(row.share), _or(row.vs_naive, "{:.3g}×"), _or(row.vs_torch, "{:.3g}×")]
        cells += [size(row.extra_bytes), _or(row.calls, "{:,}"), _or(row.launches, "{:,}")]
        style = {"ours": "bold green", "naive": "red", "reference": "dim", "floor": "dim"}.get(row.kind, "")
        block.add_row(*(Text(cell, style) for cell in cells))
    return Group(*shown)


HEADINGS: dict[str, tuple[Any, int]] = {  # justification, least width: blocks line up
    "variant": ("left", 17),
    "ms": ("right", 7),
    "p20–p80": ("right", 13),
    "GB/s": ("right", 5),
    "of copy": ("right", 7),
    "": ("left", 8),
    "naive ÷": ("right", 7),
    "torch ÷": ("right", 7),
    "extra": ("right", 7),
    "calls": ("right", 7),
    "kernels": ("right", 7),
}
LEGEND = (
    "GB/s: the least bytes the work moves, over the median. of copy: that, over a plain copy in the same rounds. "
    "naive ÷, torch ÷: how many times faster than existing code, and than the best in plain torch. extra: peak memory."
)
EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float | None, width: int = 8) -> str:
    """A bar as long as the share, in characters; full at 1."""
    if share is None:
        return ""
    eighths = round(min(share, 1.0) * width * 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip().ljust(width)


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


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without what is empty, and with four digits where more would be noise."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items() if v is not None}
