"""How fast: the benchmark cases in GB/s beside a copy; launch settings of the Triton kernels against the fixed ones.

A setting is checked against the reference before it is timed, in rounds with a plain copy; a replayed graph counts
where there is one, so that the host's part stays out. Nothing is tuned at run time: if another setting wins clearly on
several GPUs, the constants at the top of kernels/triton_host.py are to be changed.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

from ..bench import baselines, dampening
from ..bench.measure import COPY, Effort, Machine, check, race
from ..bench.run import Bench, listed
from ..kernels import triton_host as host
from .machine import Gpu

Items = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
CASES = (  # the first ones tell most
    "f-fp32", "d", "e", "a", "f-bf16", "c", "g", "h-8", "e-stack", "b-scattered", "b-clustered", "b-none", "g-zero",
    "h-2", "h-32", "g-hooks", "k-head", "k-sample", "j-resnet", "j-demo", "i-1000", "i-10000",
)  # fmt: skip
SWEPT = ("f-fp32", "c", "d", "f-bf16", "g", "h-8")
BLOCKS, WARPS, REGISTERS, STAGES = (512, 1024, 2048, 4096), (1, 2, 4, 8), (0, 64, 80, 96, 128), (1, 2, 3)
ELEMENTS_A_THREAD = (8, 32)  # fewer leave too little in flight, more do not fit the registers
EFFORT = Effort(5, 15, 0.5)


# ---- benchmark cases -------------------------------------------------------------------------------------------------


def cases(gpu: Gpu) -> Items:
    """Each benchmark case with all its variants: existing code, plain torch, torch.compile, both backends, a copy."""
    if gpu.dry:
        stand_in: Any = gpu.backend("cuda")
        dampening.TIMED["cpu"] = ("reference", stand_in)
    bench = Bench("tiny" if gpu.dry else "full", gpu.device(), "eager" if gpu.dry else "inductor", weigh=False)
    bench.effort = Effort(1, 1, 0.0) if gpu.dry else EFFORT
    for name in ("f-fp32", "d", "g", "h-3") if gpu.dry else CASES:
        yield name, partial(_case, bench, name)
        for slow in [name for name in baselines.COMPILED if name.startswith("max-autotune")]:
            del baselines.COMPILED[slow]  # for the first case only: compiling takes longer than measuring


def _case(bench: Bench, name: str) -> dict[str, Any]:
    _, rows = bench.measure(name)
    return {"rows": [{k: v for k, v in dataclasses.asdict(row).items() if v is not None} for row in rows]}


# ---- settings of the Triton kernels ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to launch; registers 0: as many as the compiler likes."""

    block: int
    warps: int
    registers: int
    stages: int

    def __str__(self) -> str:
        registers = self.registers or "free"
        return f"tile {self.block}, {self.warps} warps, {registers} registers, {self.stages} stages"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the backend launches this way."""
        shipped = host.options

        def options(target: str, arch: int, constants: dict[str, Any]) -> dict[str, Any]:
            flags = shipped(target, arch, constants) | {"num_warps": self.warps, "num_stages": self.stages}
            flags.pop("maxnreg", None)
            return flags | ({"maxnreg": self.registers} if self.registers and target == "cuda" else {})

        with mock.patch.multiple(host, options=options, block_size=lambda: self.block):
            yield


SHIPPED = Setting(host.BLOCK, host.NUM_WARPS, host.MAX_REGISTERS, 3)


def settings() -> list[Setting]:
    """What is shipped, then what is next to it, then the rest; other stages last."""
    least, most = ELEMENTS_A_THREAD
    found = [
        Setting(block, warps, registers, SHIPPED.stages)
        for block, warps, registers in itertools.product(BLOCKS, WARPS, REGISTERS)
        if least <= block // (32 * warps) <= most
    ]
    found.sort(key=_distance)
    return found + [dataclasses.replace(SHIPPED, stages=stages) for stages in STAGES if stages != SHIPPED.stages]


def _distance(one: Setting) -> int:
    return sum(getattr(one, name) != getattr(SHIPPED, name) for name in ("block", "warps", "registers"))


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
    row = {"case": name, **dataclasses.asdict(setting), "microseconds": seconds * 1e6, "shipped": setting == SHIPPED}
    if case.floor is not None:
        gbps, copy = case.floor / seconds / 1e9, machine.copy_bytes / times[COPY] / 1e9
        row |= {"floor_bytes": case.floor, "gbps": gbps, "copy_gbps": copy, "share": gbps / copy}
    return row


def sweep(gpu: Gpu) -> Items:
    """Case after case under a setting, so that what was not reached is a setting, not a case."""
    gpu.backend("triton")
    if gpu.dry:
        dampening.TIMED["cpu"] = ("triton",)
    mode, device = ("tiny", gpu.device()) if gpu.dry else ("full", gpu.device())
    machine, effort = Machine(device, small=gpu.dry), Effort(1, 1, 0.0) if gpu.dry else Effort(5, 15, 0.1)
    over, names = ([Setting(512, 4, 64, 3), SHIPPED], ("g",)) if gpu.dry else (settings(), SWEPT)
    for setting, name in itertools.product(over, names):
        yield f"{name}, {setting}", partial(measure, name, mode, setting, machine, effort)
