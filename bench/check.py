"""Have we become slower? Measures quick mode and compares ratios, never times, with the committed quick results.

A ratio is what our fastest variant gains over the naive chain and over the best in plain torch. Where one dropped by
more than 30 %, the case is measured once more, and only a drop seen twice counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fiun_fast.bench.results import Record
from fiun_fast.bench.run import Bench, path_for, present

RESULTS = Path(__file__).parent / "results"
ALLOWED = 0.30
RATIOS = {"vs_naive": "naive", "vs_torch": "best torch"}


def ratios(record: Record) -> dict[tuple[str, str], float]:
    """(case, ratio) -> value, of our fastest variant."""
    ours = [row for case in record.cases if (row := record.ours(case))]
    return {(row.case, r): value for row in ours for r in RATIOS if (value := getattr(row, r)) is not None}


def dropped(before: dict, now: dict) -> Iterator[tuple[str, str]]:
    """Ratios that fell by more than is allowed."""
    return (key for key in before if key in now and now[key] < (1 - ALLOWED) * before[key])


def main() -> int:
    """Exit status 1 where a ratio dropped, 2 where there is nothing to compare with."""
    console, measured = Console(), Bench("quick", torch.device(present()[-1]), weigh=False)
    path = path_for(measured.record, RESULTS)
    if not path.exists():
        console.print(f"no {path.name} in bench/results: `make bench-quick` writes it; commit it to compare with later")
        return 2
    before = ratios(Record.load(path))
    with console.status("quick mode"):
        for name in dict.fromkeys(case for case, _ in before):
            measured.measure(name)
        now = ratios(measured.record)
        again = set(dropped(before, now))
        for name in {case for case, _ in again}:
            measured.record.rows = [row for row in measured.record.rows if row.case != name]
            measured.measure(name)
        second = ratios(measured.record)
        now |= {key: max(now[key], second[key]) for key in again}
    bad = set(dropped(before, now))
    table = Table("case", "against", "committed", "now", "change", box=None)
    for key, value in before.items():
        cells = (key[0], RATIOS[key[1]], f"{value:.3g}×", f"{now[key]:.3g}×", f"{now[key] / value - 1:+.0%}")
        table.add_row(*cells, style="bold red" if key in bad else "")
    console.print(table)
    console.print(f"{len(bad)} of {len(before)} ratios dropped by more than {ALLOWED:.0%}, compared with {path.name}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
