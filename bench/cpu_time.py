"""Case k on a busy machine: CPU seconds on one thread, which others hardly change, and peak extra memory.

    python bench/cpu_time.py                prints tables and writes bench/results/exact-cpu-time.json

`fiun-fast bench --case k` measures wall time on all threads, and needs the machine for itself.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.bench.measure import COPY, Effort, Machine, alone, check, race
from fiun_fast.bench.run import listed, weights_of

ROUNDS = 2
TARGET = Path(__file__).parent / "results" / "exact-cpu-time.json"
PAGE = Path(__file__).parents[1] / "docs" / "fishers.md"
NET = "convolutional network, 2.4 M parameters, two batches of 64, 32x32"
HEADS = {
    "k-sample": [NET, "CPU time", "of forward + backward", "extra memory", "of forward + backward"],
    "k-head": ["head of the same network", "CPU time", "of a forward"],
}
LABELS = {
    ("k-sample", "forward + backward"): "one forward and backward",
    ("k-sample", "vmap"): "torch.func, `vmap`",
    ("k-sample", "vmap, chunks of 8"): "torch.func, `vmap` in chunks of 8",
    ("k-sample", "BackPACK"): "BackPACK, `SumGradSquared`",
    ("k-sample", "cpu"): '**`estimator="sample"`**',
    ("k-head", "forward"): "one forward",
    ("k-head", "backward, all of it"): "a backward through all of it, as existing code",
    ("k-head", "backward, body frozen"): "a backward, body frozen",
    ("k-head", "cpu"): "**the head alone, `batch`**",
}


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
    fill(PAGE, "cost", tables(json.loads(TARGET.read_text(encoding="utf-8"))))


def tables(result: dict[str, Any]) -> str:
    """Markdown: what each way takes, and that over the first of its case."""
    text = ""
    for case, heads in HEADS.items():
        rows, first = [], next(iter(result["cases"][case].values()))
        for variant, row in result["cases"][case].items():
            cells = [LABELS.get((case, variant), variant), f"{row['cpu_seconds']:.3g} s"]
            cells.append(f"{row['cpu_seconds'] / first['cpu_seconds']:.2f}")
            if "extra_bytes" in row:
                cells += [f"{row['extra_bytes'] / 2**20:.0f} MiB", f"{row['extra_bytes'] / first['extra_bytes']:.2f}"]
            rows.append(cells)
        text += markdown(heads, rows) + "\n"
    return text.removesuffix("\n")


if __name__ == "__main__":
    main()
