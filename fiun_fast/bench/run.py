"""Measuring the cases, one after another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from . import memory, results
from .cases import listed
from .environment import environment, machine_kind
from .measure import Case, Effort, Machine, check, kernel_launches, operator_calls, race
from .results import Record, Row

EFFORTS = {"full": Effort(5, 30, 1.5), "quick": Effort(3, 15, 0.3), "tiny": Effort(1, 2, 0.0)}
WEIGHED = {  # cases whose memory is measured
    "full": ("a", "c", "d", "e", "g", "g-hooks", "h-8", "j-resnet", "k-sample", "k-head"),
    "quick": ("a", "d", "g-hooks"),
    "tiny": ("a", "g-hooks"),
}


class Bench:
    """A run of the benchmarks on one device.

    Args:
        mode: "full", "quick" or "tiny".
        device: where.
        compiler: backend of torch.compile; None leaves its variants out.
        weigh: measure memory as well.

    """

    def __init__(self, mode: str, device: torch.device, compiler: str | None = "inductor", weigh: bool = True) -> None:
        self.mode, self.device, self.weigh = mode, device, weigh
        self.makers = listed(mode)
        self.machine = Machine(device, small=mode == "tiny")
        self.record = Record(mode, environment(device))
        self.compiler = compiler
        reason = why_not_compile(compiler, device) if compiler else "left out by request"
        if reason:
            self.compiler = None
            self.record.skipped.append({"case": "all", "variant": "compiled", "why": reason})

    def measure(self, name: str) -> tuple[Case, list[Row]]:
        """Check, time, count and weigh one case; its rows are added to the record.

        Raises:
            DisagreementError: a variant computes something else than the reference.

        """
        gc.collect()
        case = self.makers[name](self.device, self.compiler)
        agreement = check(case)
        times = race(case, self.machine, EFFORTS[self.mode])
        rows = results.rows_of(case, self.device.type, times, self.machine.copy_bytes, agreement)
        weights = (
            memory.peaks(name, self.mode, self.device, self.compiler)
            if self.weigh and name in WEIGHED[self.mode]
            else {}
        )
        by_name = {variant.name: variant for variant in case.variants}
        for row in rows:
            row.extra_bytes = weights.get(row.variant)
            if row.variant in by_name:
                row.calls = operator_calls(by_name[row.variant])
                row.launches = kernel_launches(by_name[row.variant], self.device)
        self.record.rows += rows
        self.record.skipped += [{"case": name, "variant": v, "why": why} for v, why in case.skipped.items()]
        return case, rows


def why_not_compile(compiler: str, device: torch.device) -> str | None:
    """None where torch.compile works here; else the first line of what it says."""
    try:
        torch.compile(lambda x: x * 2 + 1, backend=compiler)(torch.ones(64, device=device))
    except Exception as error:  # whatever the toolchain throws is the reason
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0][:200]}"
    return None


def bench(
    names: Iterable[str] | None = None,
    mode: str = "full",
    devices: Iterable[str] | None = None,
    compiler: str | None = "inductor",
    weigh: bool = True,
    tick: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Run cases (all of the mode by default) on each device: by default the CPU, and a GPU where there is one.

    A name stands for every case that it begins: "g" for g, g-zero and g-hooks.

    Raises:
        ArgumentError: a name that begins no case of this mode.

    """
    chosen = select(names, mode)
    records = []
    for device in devices or present():
        run = Bench(mode, torch.device(device), compiler, weigh)
        for i, name in enumerate(chosen):
            tick(f"{device}: case {name} ({i + 1} of {len(chosen)})")
            run.measure(name)
        records.append(run.record)
    return records


def main(
    names: Iterable[str] | None, mode: str, devices: Iterable[str] | None, compiler: str | None, out: Path | None
) -> int:
    """What `fiun-fast bench` does: measure, print, keep."""
    from rich.console import Console

    console = Console()
    with console.status("benchmarks") as status:
        records = bench(names, mode, devices, compiler, tick=status.update)
    for record in records:
        show(record, console)
        if out is not None:
            path = path_for(record, out)
            record.save(path)
            console.print(f"written to {path}")
    return 0


def show(record: Record, console: Any) -> None:
    """Print the table of a record, what it was measured on, and what is missing from it."""
    console.print(results.table(record.rows))
    machine = record.environment
    console.print(f"\n{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    console.print(results.LEGEND, style="dim")
    for missing in record.skipped:
        console.print(f"left out: {missing['variant']} of case {missing['case']}: {missing['why']}")


def select(names: Iterable[str] | None, mode: str) -> list[str]:
    """Cases of the mode that the names begin."""
    known = list(listed(mode))
    if not names:
        return known
    for name in names:
        if not any(_begins(name, case) for case in known):
            raise ArgumentError(f"no case {name!r} in {mode} mode; known are {', '.join(known)}")
    return [case for case in known if any(_begins(name, case) for name in names)]


def present() -> list[str]:
    """The devices of this machine."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def path_for(record: Record, folder: Path) -> Path:
    """Where a record is kept: one file for each kind of machine and mode."""
    mode = "" if record.mode == "full" else f"-{record.mode}"
    return folder / f"{machine_kind(record.environment)}{mode}.json"


def _begins(name: str, case: str) -> bool:
    return case == name or case.startswith(f"{name}-")
