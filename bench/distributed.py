"""Weak scaling: 1 and 2 ranks over gloo, each with a shard of the same size, and what is sent.

    python bench/distributed.py     prints tables, writes bench/results/distributed.json, fills docs/distributed.md

Each rank is a process with one thread and a shard of one FSDP2 model. Of `run_` the time is the least of some runs,
since others use this machine too, on the slowest rank; bytes are what a rank hands to torch.distributed. The rest of
the page is arithmetic, `on_paper`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import fiun_fast as ff
from fiun_fast.bench.files import describe, environment, fill, markdown, write_json

RESULTS = Path(__file__).parent / "results" / "distributed.json"
PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
LAYERS, WIDTH = 4, 2048  # of a rank's shard: 16.8 million parameters
RUNS = 40
SENDING = ("all_reduce", "all_gather", "send")


class Sent:
    """Bytes that this rank hands to torch.distributed."""

    def __init__(self) -> None:
        self.bytes = 0

    def counting(self, name: str) -> Callable[..., Any]:
        """The function, counting; of an all-gather what this rank gives."""
        function = getattr(dist, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            self.bytes += args[1 if name == "all_gather" else 0].nbytes
            return function(*args, **kwargs)

        return count


def measure(world: int, width: int = WIDTH, runs: int = RUNS) -> dict[str, Any]:
    """One row: times in seconds of the slowest rank, bytes of one rank; in this process group."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(*(nn.Linear(width, width * world, bias=False) for _ in range(LAYERS)))
    for layer in model:
        fully_shard(layer)
    layout = ff.Layout.from_module(model)
    original, forget = (ff.Fisher(torch.rand(layout.numel) * scale, layout) for scale in (1.0, 2.0))
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, original)
    before = [p.to_local().detach().clone() for p in model.parameters()]
    sent, found = Sent(), {}
    with mock.patch.multiple(dist, **{name: sent.counting(name) for name in SENDING}):
        began = time.perf_counter()
        plan = ff.plan(dag, [ff.ForgetRequest("m", forget)], alpha=1.0)
        found["plan"], found["plan_bytes"] = time.perf_counter() - began, sent.bytes
        times, sent.bytes = [], 0
        for _ in range(runs):
            with torch.no_grad():
                for p, old in zip(model.parameters(), before, strict=True):  # dampened again and again it goes denormal
                    p.to_local().copy_(old)
            dist.barrier()
            began = time.perf_counter()
            report = plan.run_()
            times.append(time.perf_counter() - began)
        found["run"], found["run_bytes"] = min(times), sent.bytes // runs
        began, sent.bytes = time.perf_counter(), 0
        selected = report.selected
        found["report"], found["report_bytes"] = time.perf_counter() - began, sent.bytes
    slowest = torch.tensor([found[key] for key in ("plan", "run", "report")], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    found |= dict(zip(("plan", "run", "report"), slowest.tolist(), strict=True))
    return {"ranks": world, "elements": report.numel, "here": layout.numel, "share": selected / report.numel, **found}


def _rank(rank: int, world: int, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    row = measure(world, width)
    if rank == 0:
        (Path(folder) / "row").write_text(json.dumps(row), encoding="utf-8")
    dist.destroy_process_group()


def on_ranks(world: int, width: int) -> dict[str, Any]:
    """The row of that many processes."""
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        ranks = [fork.Process(target=_rank, args=(rank, world, width, folder)) for rank in range(world)]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join()
        return json.loads((Path(folder) / "row").read_text(encoding="utf-8"))


def on_paper(parameters: float, ranks: int, *, theta: int = 2, fisher: int = 4, requests: int = 1) -> dict[str, float]:
    """What one rank has, moves and sends, in bytes: arithmetic, nothing of it was measured.

    A rank has n = parameters / ranks elements. A run moves n (2 theta + fisher (1 + requests)) bytes where everything
    is selected, and sends none; a report sends 24. Who gathers first instead gets (ranks - 1) / ranks of all parameters
    and Fishers.
    """
    here, each = parameters / ranks, theta + fisher * (1 + requests)
    return {
        "elements": here,
        "held": here * each,
        "moved": here * (each + theta),
        "sent": 24,
        "gathered": parameters * (ranks - 1) / ranks * each,
    }


def tables(record: dict[str, Any]) -> str:
    """What stands between the marks of the page."""
    rows, base = [], record["rows"][0]["run"]
    for row in record["rows"]:
        rows.append(
            [
                row["ranks"],
                f"{row['elements'] / 1e6:.1f} M",
                f"{row['run'] * 1e3:.1f} ms",
                f"{row['run'] / base:.2f}",
                row["run_bytes"],
                f"{row['report'] * 1e3:.1f} ms",
                row["report_bytes"],
                f"{row['plan'] * 1e3:.0f} ms",
                row["plan_bytes"],
            ]
        )
    heads = [
        "ranks",
        "parameters",
        "`run_`",
        "of one rank's",
        "bytes sent",
        "report",
        "bytes sent",
        "plan",
        "bytes sent",
    ]
    first, machine = record["rows"][0], record["environment"] | {"threads": record["environment"]["processors"]}
    paper = {key: value / 1e9 for key, value in on_paper(70e9, 64).items()}
    return f"""
## Measured, and on paper

Weak scaling, `python bench/distributed.py`: {first["here"] / 1e6:.1f} million float32 parameters on each rank, one
FSDP2 model, {first["share"]:.0%} selected, gloo, one thread a rank; {describe(machine)}.
The ranks share one machine's processors and memory, which others used too (load {record["load"]:.1f} when it began).
Nothing is sent.

{markdown(heads, rows)}
On paper, not measured: 70 billion bfloat16 parameters on 64 GPUs, float32 Fishers, one request. A rank has n = P / R =
{paper["elements"]:.2f} billion elements and holds n (s + 4 + 4 K) = {paper["held"]:.1f} GB of parameters (s = 2 bytes
each) and Fishers (K requests and the original). A run moves at most n (2 s + 4 + 4 K) = {paper["moved"]:.1f} GB of a
GPU's own memory and sends nothing; a report sends 24 bytes. Gathering first would bring {paper["gathered"]:.0f} GB to
every GPU, more than it holds.

"""


def main() -> None:
    """Measure, print, write, fill the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=WIDTH, help="of a layer; with another nothing is written")
    width = parser.parse_args().width
    load = os.getloadavg()[0]
    rows = [on_ranks(world, width) for world in (1, 2)]
    record = {"environment": environment("cpu") | {"threads": 1}, "load": load, "runs": RUNS, "rows": rows}
    print(tables(record))
    if width == WIDTH:
        write_json(RESULTS, record)
        fill(PAGE, "measured", tables(record))


if __name__ == "__main__":
    main()
