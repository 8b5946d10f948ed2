"""What each loop of the cpu backend takes for a line of 16 elements: with its data in the L2 cache, and in memory.

    python bench/cpu_kernel.py              prints tables and writes bench/results/cpu-kernel.json

One thread, CPU time (others on the machine hardly change it), every instruction set that runs here, beside a copy of as
many float32. Where the first figure is not well below the second, instructions are the limit, not memory. Then one and
two threads, wall time. λ is so large that every factor is 1: θ stays as it is, and no value becomes subnormal.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fiun_fast.arguments import MERGE_RULES
from fiun_fast.bench.files import environment, write_json
from fiun_fast.kernels import cpu
from fiun_fast.kernels.table import BINS, Dampening, Merging, Table

TARGET = Path(__file__).parent / "results" / "cpu-kernel.json"
SIZES = {"L2": (8192, 200), "memory": (1 << 22, 1)}  # elements, and how often a call goes over them
LINE, ROUNDS = 16, 11
F32, F64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = {F32: "fp32", F64: "fp64", BF16: "bf16", FP16: "fp16"}
Work = tuple[str, Callable[[], object], int]  # name, one call, lines that it goes over


def table(thetas: list[torch.Tensor], originals: list[torch.Tensor], forgets: list[torch.Tensor], times: int) -> Table:
    """Rows over the same memory, again and again."""
    rows = np.tile([[originals[0].numel(), 0, len(forgets), 0, len(originals)]], (times, 1))
    sources = np.array([f.data_ptr() for f in forgets])
    places = [t.data_ptr() for t in thetas] or [0] * len(originals)
    targets = np.array([[p, o.data_ptr(), i] for i, (p, o) in enumerate(zip(places, originals, strict=True))])
    dtype = thetas[0].dtype if thetas else None
    return Table(torch.device("cpu"), dtype, originals[0].dtype, [], rows, sources, np.ones(len(forgets)), targets)


def dampening(
    nodes: int, n: int, theta: torch.dtype, fisher: torch.dtype, share: float, k: int, times: int
) -> Callable[[], object]:
    """A run over `nodes` nodes of n elements, of which a share is selected at random."""
    forgets = [torch.rand(n, dtype=fisher) + 0.1 for _ in range(k)]
    merged = torch.stack(forgets).amax(0)
    originals = [torch.where(torch.rand(n) < share, merged * 0.5, merged * 2) for _ in range(nodes)]
    thetas = [torch.randn(n).to(theta) for _ in range(nodes)]
    numbers = Dampening(np.ones(nodes), np.full(nodes, 1e6), 1.0, 1.0)
    launch = cpu.BACKEND.dampen(table(thetas, originals, forgets, times), Merging(), numbers)
    counts = torch.zeros(nodes, 3, dtype=torch.int64)
    kept = thetas, originals, forgets

    def run() -> object:
        launch.run(counts)
        return kept

    return run


def loops(n: int, times: int) -> Iterator[Work]:
    """Each loop over n elements, `times` times."""
    lines = n * times // LINE
    for theta, fisher in ((F32, F32), (BF16, F32), (FP16, F32), (F64, F32), (F64, F64), (F32, F64)):
        for share, label in ((0.5, "half selected"), (0.0, "none selected")):
            name = f"dampen {NAMES[theta]}, {NAMES[fisher]} Fishers, {label}"
            yield name, dampening(1, n, theta, fisher, share, 1, times), lines
    generator = torch.Generator().manual_seed(0)
    sources, out, module = [torch.rand(n, generator=generator) for _ in range(3)], torch.zeros(n), cpu.extension()
    addresses, weights = np.array([s.data_ptr() for s in sources]), np.ones(3)
    for how in ("max", "mean"):
        fixed = addresses.ctypes.data, weights.ctypes.data, 3, out.data_ptr()
        rest = 0, MERGE_RULES.index(how), 1.0, 1
        call = lambda size, fixed=fixed, rest=rest: module.merge(*fixed, size, *rest, cpu.isa())  # noqa: E731
        yield f"merge 3, {how}", repeated(call, n, times), lines
    for dtype in (F32, BF16):
        gradient = torch.randn(n, generator=generator).to(dtype)
        for power, zero, label in ((2, False, "g²"), (1, False, "abs"), (2, True, "g², zeroing")):
            pairs = [gradient] * times, [out] * times, power, zero
            yield f"accumulate {label}, {NAMES[dtype]}", partial(cpu.BACKEND.accumulate, *pairs), lines
    bins, bases = torch.zeros(1, BINS, dtype=torch.int64), np.zeros(1, dtype=np.int64)
    ratios = cpu.BACKEND.histogram(table([], sources[:1], sources[1:2], times), Merging())
    yield "histogram", lambda: ratios.run(bins, bases, 20, True), lines
    products = torch.randn(8, n // 8, generator=generator)
    squares = partial(module.add_squares, out.data_ptr(), products.data_ptr(), 8)
    yield "per-sample squares", repeated(lambda size: squares(size // 8, 0, 1, cpu.isa()), n, times), lines


def repeated(call: Callable[[int], object], n: int, times: int) -> Callable[[], object]:
    """Calls over n elements; where they are short, gives back what as many calls over one line took: see `seconds`."""

    def run() -> object:
        for _ in range(times):
            call(n)
        if times == 1:
            return 0.0
        start = time.thread_time()
        for _ in range(times):
            call(LINE)
        return 2 * (time.thread_time() - start)

    return run


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """What a run takes, less what it gives back as a number: calls that are not the loop's."""
    start = clock()
    extra = run()
    return clock() - start - (extra if isinstance(extra, float) else 0.0)


def main() -> None:
    """Medians of interleaved rounds; the least of them between one and two threads, which share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    isas = [isa for isa, usable in cpu.isas().items() if usable]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for place, (n, times) in SIZES.items():
        a, b = (torch.ones(n) for _ in range(2))
        addresses = a.data_ptr(), b.data_ptr()
        copy = repeated(lambda size, addresses=addresses: ctypes.memmove(*addresses, 4 * size), n, times)
        for name, run, lines in loops(n, times):
            taken: dict[str, list[float]] = {"copy": []}
            for _ in range(ROUNDS):
                taken["copy"].append(seconds(copy, time.thread_time) / (n * times // LINE))
                for isa in isas:
                    os.environ[cpu.ISA_ENVIRONMENT] = isa
                    taken.setdefault(isa, []).append(seconds(run, time.thread_time) / lines)
            row = {key: round(float(np.median(value)) * 1e9, 2) for key, value in taken.items()}
            found.setdefault(name, {})[place] = row
            print(f"{place:7} {name:42}" + "".join(f"  {key} {value:6.2f}" for key, value in row.items()), flush=True)
    os.environ.pop(cpu.ISA_ENVIRONMENT, None)
    threads: dict[str, dict[str, float]] = {}
    shapes = {"one model of 11.7 M, half selected": (1, 11_700_000, F32, F32, 0.5, 1, 1),
              "one model of 11.7 M, none selected": (1, 11_700_000, F32, F32, 0.0, 1, 1),
              "1,000 heads of 51,300, 3 sources": (1000, 51_300, F32, F32, 0.5, 3, 1)}  # fmt: skip
    for name, shape in shapes.items():
        run, least = dampening(*shape), {"1": 1e9, "2": 1e9}
        for _ in range(2 * ROUNDS):
            for count in (1, 2):
                torch.set_num_threads(count)
                run()  # cut anew for this number of threads
                least[str(count)] = min(least[str(count)], seconds(run, time.perf_counter))
        threads[name] = {count: round(value * 1e3, 2) for count, value in least.items()}
        print(f"{name:42}  {threads[name]} ms", flush=True)
    torch.set_num_threads(before)
    what = {"environment": environment(torch.device("cpu")), "ns_per_line": found, "milliseconds_by_threads": threads}
    write_json(TARGET, what)


if __name__ == "__main__":
    main()
