"""Case k on a busy machine: CPU seconds on one thread, which others hardly change, and peak extra memory.

    python bench/cpu_time.py                prints tables and writes bench/results/exact-cpu-time.json

`fiun-fast bench --case k` measures wall time on all threads, and needs the machine for itself.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from fiun_fast.bench import memory
from fiun_fast.bench.cases import listed
from fiun_fast.demo.record import environment

ROUNDS = 2
TARGET = Path(__file__).parent / "results" / "exact-cpu-time.json"


def main() -> None:
    """The least of some rounds, all variants in every round, after a run to warm up."""
    threads = torch.get_num_threads()
    device, results = torch.device("cpu"), {}
    for name in ("k-head", "k-sample"):
        torch.set_num_threads(1)
        case = listed("full")[name](device, None)
        variants = [v for v in case.variants if v.kind != "reference"]
        seconds: dict[str, list[float]] = {v.name: [] for v in variants}
        for round_ in range(ROUNDS + 1):
            for v in variants:
                v.restore()
                began = time.process_time()
                v.run()
                if round_:
                    seconds[v.name].append(time.process_time() - began)
        torch.set_num_threads(threads)
        rows = {v: {"cpu_seconds": min(times)} for v, times in seconds.items()}
        results[name] = rows
        for v, row in rows.items():
            print(f"{name:9} {v:22} {row['cpu_seconds']:.3f} s", flush=True)
    record = {"environment": environment() | {"threads": 1}, "rounds": ROUNDS, "cases": results}
    TARGET.write_text(json.dumps(record, indent=1) + "\n")
    for variant, extra in memory.peaks("k-sample", "full", device, None).items():
        if variant in results["k-sample"]:
            results["k-sample"][variant]["extra_bytes"] = extra
            print(f"k-sample  {variant:22} {extra / 2**20:.0f} MiB extra", flush=True)
    TARGET.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
