"""Case k on a busy machine: CPU seconds on one thread, which others hardly change, and peak extra memory.

    python bench/cpu_time.py                prints tables and writes bench/results/exact-cpu-time.json

`fiun-fast bench --case k` measures wall time on all threads, and needs the machine for itself.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from fiun_fast.bench.files import environment, write_json
from fiun_fast.bench.measure import COPY, Effort, Machine, alone, check, race
from fiun_fast.bench.run import listed, weights_of

ROUNDS = 2
TARGET = Path(__file__).parent / "results" / "exact-cpu-time.json"


def main() -> None:
    """The least of some rounds, all variants in every round, after each was checked."""
    threads, device = torch.get_num_threads(), torch.device("cpu")
    machine = Machine(device, clock=time.process_time)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in ("k-head", "k-sample"):
        torch.set_num_threads(1)
        case = listed("full")[name](device, None)
        case.variants = [v for v in case.variants if v.kind != "reference"]
        check(case)
        times = race(case, machine, Effort(ROUNDS, ROUNDS, 0.0))
        torch.set_num_threads(threads)
        found[name] = {v: {"cpu_seconds": min(seconds)} for v, seconds in times.items() if v != COPY}
        for v, row in found[name].items():
            print(f"{name:9} {v:22} {row['cpu_seconds']:.3f} s", flush=True)
    for v, extra in alone(weights_of, "k-sample", "full", device, None).items():
        if v in found["k-sample"]:
            found["k-sample"][v]["extra_bytes"] = extra
            print(f"k-sample  {v:22} {extra / 2**20:.0f} MiB extra", flush=True)
    write_json(TARGET, {"environment": environment(device) | {"threads": 1}, "rounds": ROUNDS, "cases": found})


if __name__ == "__main__":
    main()
