"""Models over ranks: one process forks 2, 3 and 4 of them over gloo, and they run all cases of `spread_cases.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WORLDS = (2, 3, 4)
needs_ranks = pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="no fork, or torch without gloo",
)


def names() -> list[tuple[int, str]]:
    """Every case with the number of ranks, read from the source: importing it would load half of torch.distributed."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(HERE.glob("spread_*.py")))
    models = (HERE / "spread_models.py").read_text(encoding="utf-8")
    found = [
        (int(world), name)
        for worlds, name in re.findall(r"^@on\((.*)\)\ndef (\w+)", text, re.MULTILINE)
        for world in worlds.split(",")
    ]
    everywhere, squares = models.split("ON_SQUARES: ")
    shardings = r'^    "(.+?)": '
    found += [(w, f"bits: {name}") for w in WORLDS for name in re.findall(shardings, everywhere, re.MULTILINE)]
    found += [(4, f"bits: {name}") for name in re.findall(shardings, squares, re.MULTILINE)]
    return sorted(found)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict[int, list[dict[str, str]]], str]:
    """World -> for each rank {case: "" or a traceback}; and what the processes have printed."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_LOGS": "-all"}
    command = [sys.executable, str(HERE / "spread_work.py"), str(folder), *map(str, WORLDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    found = {
        world: [
            json.loads(path.read_text()) if path.exists() else {}
            for path in (folder / f"{world}-{rank}.json" for rank in range(world))
        ]
        for world in WORLDS
    }
    return found, done.stderr


@needs_ranks
@pytest.mark.parametrize(("world", "case"), names())
def test_on_all_ranks(world, case, results):
    found, said = results
    for rank, its in enumerate(found[world]):
        assert case in its, f"rank {rank} did not get that far: {said[-2000:]}"
        assert its[case] == "", f"rank {rank}: {its[case]}"


@needs_ranks
def test_no_other_case_was_run(results):
    found, _ = results
    for world in WORLDS:
        assert sorted(found[world][0]) == sorted(case for its, case in names() if its == world)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_on_two_gpus(tmp_path):
    """The same calls over NCCL: a model that is spread, against the whole one."""
    script = HERE / "spread_gpu.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["0:well", "1:well"]), done.stderr


def test_the_page_says_what_was_measured():
    root = HERE.parents[1]
    spec = importlib.util.spec_from_file_location("bench_distributed", root / "bench" / "distributed.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    record = json.loads(bench.RESULTS.read_text(encoding="utf-8"))
    page = (root / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert f"<!-- measured -->\n{bench.tables(record)}<!-- /measured -->" in page
    assert [row["run_bytes"] for row in record["rows"]] == [0, 0]
    assert bench.on_paper(100, 4, theta=2, fisher=4, requests=3) == {
        "elements": 25, "held": 25 * (2 + 4 * 4), "moved": 25 * (2 * 2 + 4 * 4), "sent": 24, "gathered": 75 * 18
    }  # fmt: skip


def test_an_import_brings_no_dtensors():
    """`torch.distributed.tensor` takes half a second to import; whoever has no DTensor does not wait for it."""
    heavy = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint")
    check = f"import sys, fiun_fast; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
