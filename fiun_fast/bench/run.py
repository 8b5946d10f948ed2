"""The list of cases and their sizes, and the command: one case after another, checked, timed and weighed.

A case is a line of `_cases`: its name, its title, what makes it, and of what. Modes: "full", "quick" (some
minutes in all), "tiny" (shows that all runs).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from . import fishers, results, whole
from .dampening import RUN, dampen, head, resnet18
from .files import describe, environment, machine_kind
from .measure import (
    CLEAR,
    Case,
    Effort,
    Machine,
    alone,
    check,
    extra_bytes,
    kernel_launches,
    on_threads,
    operator_calls,
    race,
)
from .results import Record, Row

Make = Callable[[torch.device, str | None], Case]  # device, compiler (None: without torch.compile)


@dataclass(frozen=True)
class Size:
    """What a mode measures; the defaults are those of "full"."""

    width: int = 64  # of the ResNet-18s
    nodes: int = 13  # case c
    heads: int = 1000  # case d
    many: int = 10_000  # case e
    features: tuple[int, int] = (512, 512)  # of the heads in d and e
    flat: int = 100_000_000  # case f
    merged: tuple[int, ...] = (2, 8, 32)  # case h
    planned: tuple[int, ...] = (1_000, 10_000, 100_000)  # case i
    whole: int = 8  # case j, ResNet-18s
    batch: int = 16  # images in each of their mini-batches
    exact: tuple[int, int] = (32, 64)  # case k: width of the network, images in a mini-batch
    scale_nodes: tuple[int, ...] = (1, 10, 100, 1_000, 10_000)
    scale_parameters: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)


SIZES = {
    "full": Size(),
    "quick": Size(
        nodes=4, heads=200, many=2_000, flat=20_000_000, merged=(2, 8), planned=(10_000,), whole=2,
        scale_nodes=(), scale_parameters=(),
    ),
    "tiny": Size(
        width=2, nodes=5, heads=6, many=7, features=(16, 8), flat=10_001, merged=(2, 3), planned=(5, 40), whole=3,
        batch=2, exact=(2, 4), scale_nodes=(1, 3), scale_parameters=(100, 1_000),
    ),
}  # fmt: skip
EFFORTS = {"full": Effort(5, 30, 1.5), "quick": Effort(3, 15, 0.3), "tiny": Effort(1, 2, 0.0)}
WEIGHED = {  # cases whose memory is measured
    "full": ("a", "c", "d", "e", "g", "g-hooks", "h-8", "j-resnet", "k-sample", "k-head"),
    "quick": ("a", "d", "g-hooks"),
    "tiny": ("a", "g-hooks"),
}


def _cases(size: Size) -> Iterator[tuple[Any, ...]]:
    """Name, title, what makes it, its arguments."""
    resnet, flat = resnet18(size.width), {"weight": (size.flat,)}
    wide, narrow = head(size.features[0], 100), head(size.features[1], 10)
    bf16, scaling = partial(dampen, dtype=torch.bfloat16), partial(dampen, only=("naive", "ours"))
    one_thread, stacked = partial(dampen, threads=1), partial(dampen, stacked=True)
    images = f"2 batches of {size.exact[1]} through a conv net"

    yield "a", "dampen one ResNet-18, half selected", dampen, resnet, 1, 1
    yield "a-thread", "dampen one ResNet-18, half selected, on one thread", one_thread, resnet, 1, 1
    yield "b-none", "dampen one ResNet-18, nothing selected", dampen, resnet, 1, 1, 0.0
    yield "b-clustered", "dampen one ResNet-18, 1 % selected, in runs", dampen, resnet, 1, 1, 0.01, RUN
    yield "b-scattered", "dampen one ResNet-18, 1 % selected, anywhere", dampen, resnet, 1, 1, 0.01
    yield "c", f"dampen {size.nodes} ResNet-18s, 3 requests", dampen, resnet, size.nodes, 3
    yield "d", f"dampen {size.heads:,} heads of 51,300, 3 requests", dampen, wide, size.heads, 3
    yield "e", f"dampen {size.many:,} heads of 5,130, 3 requests", dampen, narrow, size.many, 3
    yield "e-stack", f"the same {size.many:,} heads, put into one storage by stack_", stacked, narrow, size.many, 3
    yield "f-fp32", f"dampen one flat model of {size.flat / 1e6:g} M, fp32", dampen, flat, 1, 1
    yield "f-bf16", f"dampen one flat model of {size.flat / 1e6:g} M, bf16", bf16, flat, 1, 1
    yield "g", "accumulate g² of a ResNet-18", fishers.accumulate, resnet, False
    yield "g-zero", "accumulate g² of a ResNet-18 and zero it", fishers.accumulate, resnet, True
    yield "g-hooks", "backward and accumulate, after it or in hooks", fishers.in_hooks, resnet
    for k in size.merged:
        yield f"h-{k}", f"merge {k} Fishers of a ResNet-18", fishers.merge, resnet, k
    for n in size.planned:
        yield f"i-{n}", f"compile a plan for {n:,} nodes", whole.compile_plan, n
    yield "j-demo", "end to end, the demo's 13 models", whole.demo, 2 * size.batch
    yield "j-resnet", f"end to end, {size.whole} ResNet-18s", whole.resnets, size.whole, size.width, size.batch
    yield "k-sample", f"sample Fisher, {images}", fishers.sample, *size.exact
    yield "k-head", f"Fisher of the head, {images}", fishers.head, *size.exact
    for n in size.scale_nodes:
        yield f"nodes-{n}", f"scaling: heads of 5,130, {n:,} nodes", scaling, narrow, n, 1
    for n in size.scale_parameters:
        yield f"parameters-{n}", f"scaling: one model of {n:,}", scaling, {"weight": (n,)}, 1, 1


def listed(mode: str) -> dict[str, Make]:
    """Case name -> how to make it, in the order of the table."""

    def make(name: str, title: str, how: Callable[..., Case], *of: Any) -> Make:
        def made(device: torch.device, compiler: str | None) -> Case:
            case = how(device, compiler, *of)
            case.name, case.title = name, title
            return case

        return made

    return {case[0]: make(*case) for case in _cases(SIZES[mode])}


def select(names: Iterable[str] | None, mode: str) -> list[str]:
    """The cases of the mode with one of the names, or one of them and a dash: "g" is g, g-zero, g-hooks; None: all.

    Raises:
        ArgumentError: a name that selects no case of this mode.

    """
    known = list(listed(mode))
    found = {name: {case for case in known if f"{case}-".startswith(f"{name}-")} for name in names or known}
    if missing := [name for name, cases in found.items() if not cases]:
        raise ArgumentError(f"no case {missing[0]!r} in {mode} mode; known are {', '.join(known)}")
    return [case for case in known if case in set().union(*found.values())]


class Bench:
    """A run of the benchmarks in one mode on one device; `weigh` measures memory as well.

    compiler: backend of torch.compile; None leaves its variants out. `effort` may be set to another than the mode's.
    """

    def __init__(self, mode: str, device: torch.device, compiler: str | None = "inductor", weigh: bool = True) -> None:
        self.mode, self.device, self.weigh = mode, device, weigh
        self.makers, self.effort = listed(mode), EFFORTS[mode]
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
            DisagreementError: a variant does not compute what the reference computes.

        """
        gc.collect()
        case = self.makers[name](self.device, self.compiler)
        with on_threads(case.threads):
            agreement = check(case)
            times = race(case, self.machine, self.effort)
            limits = case.limits() if case.limits else {}
        rows = results.rows_of(case, self.device.type, times, self.machine.copy_bytes, agreement)
        weigh = self.weigh and name in WEIGHED[self.mode] and (self.device.type != "cpu" or CLEAR.exists())
        weights = alone(weights_of, name, self.mode, self.device, self.compiler) if weigh else {}
        by_name = {row.variant: row for row in rows}
        for variant in case.variants:
            row = by_name[variant.name]
            row.extra_bytes = weights.get(variant.name)
            if limits and case.moved and row.kind == "ours":
                row.bound = {"memory": case.moved / row.copy_gbps / 1e6, **limits}
            row.calls, row.launches = operator_calls(variant), kernel_launches(variant, self.device)
        self.record.rows += rows
        self.record.skipped += [{"case": name, "variant": v, "why": why} for v, why in case.skipped.items()]
        return case, rows


def weights_of(name: str, mode: str, device: torch.device, compiler: str | None) -> dict[str, int]:
    """Peak extra memory of each variant of a case, in bytes; to be called in a process of its own."""
    return {variant.name: extra_bytes(variant, device) for variant in listed(mode)[name](device, compiler).variants}


def why_not_compile(compiler: str, device: torch.device) -> str | None:
    """None where torch.compile works here; else the first line of what it says."""
    try:
        torch.compile(lambda x: x * 2 + 1, backend=compiler)(torch.ones(64, device=device))
    except Exception as error:  # whatever the toolchain throws is the reason
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0][:200]}"
    return None


def bench(
    names: Iterable[str] | None,
    mode: str,
    devices: Iterable[str] | None,
    compiler: str | None,
    tick: Callable[[str], None],
) -> list[Record]:
    """Run the cases that `select` finds on each device: by default the CPU, and a GPU where there is one.

    Raises:
        ArgumentError: a name that selects no case of this mode.

    """
    chosen = select(names, mode)
    records = []
    for device in devices or present():
        run = Bench(mode, torch.device(device), compiler)
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
    console.print(f"\n{describe(record.environment)}")
    console.print(results.LEGEND, style="dim")
    for missing in record.skipped:
        console.print(f"left out: {missing['variant']} of case {missing['case']}: {missing['why']}")


def present() -> list[str]:
    """The devices of this machine."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def path_for(record: Record, folder: Path) -> Path:
    """Where a record is kept: one file for each kind of machine and mode."""
    mode = "" if record.mode == "full" else f"-{record.mode}"
    return folder / f"{machine_kind(record.environment)}{mode}.json"
