"""Which tile, how many warps, registers and stages? Sweeps the Triton kernels on a GPU. Nothing is tuned at run time.

    python bench/tune_triton.py                       every kernel; table, and bench/results/tune-triton-<GPU>.json
    python bench/tune_triton.py --kernel dampen       one kernel
    python bench/tune_triton.py --mode quick          smaller sizes

Each setting is checked against the reference before it is timed, in rounds with a plain copy, by CUDA events; a
replayed CUDA graph counts where there is one, so that the host's part stays out. What the kernels are shipped with is
marked; if another wins clearly on several GPUs, change the constants at the top of fiun_fast/kernels/triton_host.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from fiun_fast.bench.files import environment, machine_kind, write_json
from fiun_fast.bench.measure import COPY, Effort, Machine, check, race
from fiun_fast.bench.run import listed
from fiun_fast.kernels import load
from fiun_fast.kernels import triton_host as host

RESULTS = Path(__file__).parent / "results"
CASES = {
    "dampen": ("a", "c", "d", "f-fp32", "f-bf16"),
    "accumulate": ("g", "g-zero"),
    "merge": ("h-8",),
}
BLOCKS, WARPS, REGISTERS, STAGES = (512, 1024, 2048, 4096), (1, 2, 4, 8), (0, 64, 80, 96, 128), (1, 2, 3)
ELEMENTS_A_THREAD = (8, 32)  # fewer leave too little in flight, more do not fit the registers


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to launch; registers 0: as many as the compiler likes."""

    block: int
    warps: int
    registers: int
    stages: int

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the backend launches this way."""
        shipped = host.options

        def options(target: str, constants: dict[str, Any]) -> dict[str, Any]:
            flags = shipped(target, constants) | {"num_warps": self.warps, "num_stages": self.stages}
            flags.pop("maxnreg", None)
            return flags | ({"maxnreg": self.registers} if self.registers and target == "cuda" else {})

        with mock.patch.multiple(host, options=options, block_size=lambda: self.block):
            yield


SHIPPED = Setting(host.BLOCK, host.NUM_WARPS, host.MAX_REGISTERS, 3)


def settings() -> list[Setting]:
    """Every tile, warps and registers with Triton's usual three stages; other stages for what is shipped."""
    least, most = ELEMENTS_A_THREAD
    found = [
        Setting(block, warps, registers, 3)
        for block, warps, registers in itertools.product(BLOCKS, WARPS, REGISTERS)
        if least <= block // (32 * warps) <= most
    ]
    return found + [dataclasses.replace(SHIPPED, stages=stages) for stages in STAGES if stages != SHIPPED.stages]


def measure(name: str, mode: str, setting: Setting, machine: Machine, effort: Effort) -> dict[str, Any]:
    """Time one case under one setting.

    Raises:
        DisagreementError: a kernel launched this way does not compute what the reference computes.

    """
    with setting.applied():
        case = listed(mode)[name](machine.device, None)
        case.variants = [variant for variant in case.variants if variant.name == "triton"]
        check(case)
        times = {variant: statistics.median(found) for variant, found in race(case, machine, effort).items()}
    seconds = times.get("triton (graph)", times["triton"])
    row = {"case": name, **dataclasses.asdict(setting), "microseconds": seconds * 1e6}
    if case.floor is not None:
        gbps, copy = case.floor / seconds / 1e9, machine.copy_bytes / times[COPY] / 1e9
        row |= {"floor_bytes": case.floor, "gbps": gbps, "copy_gbps": copy, "share": gbps / copy}
    return row


def sweep(
    kernels: Iterable[str], mode: str, device: torch.device, over: Iterable[Setting], effort: Effort, console: Console
) -> list[dict[str, Any]]:
    """All rows; a setting that does not compile (too much of something) is named and left out."""
    machine, over, rows = Machine(device, small=mode == "tiny"), list(over), []
    names = [name for kernel in kernels for name in CASES[kernel] if name in listed(mode)]
    with console.status("") as status:
        for name, (i, setting) in itertools.product(names, enumerate(over, start=1)):
            status.update(f"case {name}, setting {i} of {len(over)}")
            try:
                rows.append(measure(name, mode, setting, machine, effort))
            except (RuntimeError, ValueError) as error:
                console.print(f"case {name}, {setting}: {str(error).strip().splitlines()[0]}")
    return rows


def show(rows: list[dict[str, Any]], console: Console, best: int = 5) -> None:
    """The fastest settings of each case, and the shipped one."""
    table = Table(box=None, header_style="dim")
    for title in ("case", "tile", "warps", "registers", "stages", "µs", "GB/s", "of a copy", ""):
        table.add_column(title, justify="left" if title in ("case", "") else "right")
    for name in dict.fromkeys(row["case"] for row in rows):
        ranked = sorted((row for row in rows if row["case"] == name), key=lambda row: row["microseconds"])
        for i, row in enumerate(ranked):
            shipped = all(row[key] == value for key, value in dataclasses.asdict(SHIPPED).items())
            if i >= best and not shipped:
                continue
            speed = (f"{row['gbps']:,.0f}", f"{row['share']:.0%}") if "gbps" in row else ("", "")
            launch = (f"{row['block']:,}", str(row["warps"]), str(row["registers"] or "free"), str(row["stages"]))
            table.add_row(name if i == 0 else "", *launch, f"{row['microseconds']:,.1f}", *speed, "shipped" * shipped)
    console.print(table)


def main() -> int:
    """Exit status 2 where there is no GPU to tune for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", action="append", choices=CASES, help="may be repeated; default: all")
    parser.add_argument("--mode", choices=("full", "quick", "tiny"), default="full", help="sizes of the benchmarks")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results file")
    arguments = parser.parse_args()
    console = Console()
    if reason := load("triton").why_not("cuda"):
        console.print(f"nothing to tune: the triton backend cannot run on a GPU here: {reason}")
        return 2
    device = torch.device("cuda")
    rows = sweep(arguments.kernel or CASES, arguments.mode, device, settings(), Effort(5, 20, 0.3), console)
    show(rows, console)
    found = environment(device)
    path = arguments.out / f"tune-triton-{machine_kind(found)}.json"
    write_json(path, {"mode": arguments.mode, "environment": found, "rows": rows})
    console.print(f"written: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
