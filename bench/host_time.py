"""What `run_` takes on the host: the time of a plan of one table whose launch does nothing.

    python bench/host_time.py               prints a table and writes bench/results/host-time.json

All that a run does before and after its kernel is in it: whether anything moved, version counters, the counts, the
report. A GPU's launch adds its driver's time. Figures in microseconds; the least of many calls, since others use this
machine too, and the median.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import fiun_fast as ff
from fiun_fast import memory
from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.kernels import load
from fiun_fast.kernels.interface import Launch

TARGET = Path(__file__).parent / "results" / "host-time.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NODES, CALLS = (1, 10, 100, 1_000, 10_000), 200
KINDS = {
    "one tensor": "models of one tensor",
    "linear": "`nn.Linear`s: weight and bias",
    "stacked": "the same, put into one storage by `stack_`",
}


class Nothing(Launch):
    """A launch that returns at once."""

    in_one_call = True

    def run(self, counts: torch.Tensor, dry_run: bool = False) -> None:
        """Do nothing."""


def plan_of(kind: str, nodes: int) -> ff.Plan:
    """One table: a root and its children, a Fisher each, one request; its launch does nothing."""
    models: list[Any] = [{"w": torch.zeros(6)} if kind == "one tensor" else nn.Linear(2, 2) for _ in range(nodes)]
    if kind == "stacked":
        ff.stack_(models)
    layout = ff.Layout({"w": (6,)} if kind == "one tensor" else {"weight": (2, 2), "bias": (2,)})
    dag = ff.InheritanceDAG()
    for i, model in enumerate(models):
        dag.add_model(f"n{i}", model, fisher=ff.Fisher(torch.ones(6), layout), parents=["n0"] if i else [])
    with mock.patch.object(type(load("cpu")), "dampen", return_value=Nothing()):
        plan = ff.plan(dag, [ff.ForgetRequest("n0", ff.Fisher(torch.zeros(6), layout))], backend="cpu")
    assert len(plan.parts) == 1
    return plan


def measure(kind: str, nodes: int, calls: int = CALLS) -> dict[str, Any]:
    """Microseconds of one `run_`."""
    plan, times = plan_of(kind, nodes), []
    for _ in range(calls):
        began = time.perf_counter()
        plan.run_()
        times.append(1e6 * (time.perf_counter() - began))
    return {"kind": kind, "nodes": nodes, "least": min(times), "median": statistics.median(times)}


def main() -> None:
    """Measure, print, write, fill the page."""
    torch.set_num_threads(1)  # others use this machine too: a second thread would wait for them
    rows = [measure(kind, nodes) for kind in KINDS for nodes in NODES]
    for row in rows:
        print(f"{row['kind']:12} {row['nodes']:7,} nodes {row['least']:9.1f} {row['median']:9.1f}", flush=True)
    numbered = memory.dicts_are_numbered()
    write_json(TARGET, {"environment": environment(), "dicts_are_numbered": numbered, "rows": rows})
    lines = [[title, *(f"{row['least']:,.0f}" for row in rows if row["kind"] == kind)] for kind, title in KINDS.items()]
    fill(PAGE, "host-time", "\n" + markdown(["µs", *(f"{n:,} nodes" for n in NODES)], lines) + "\n")


if __name__ == "__main__":
    main()
