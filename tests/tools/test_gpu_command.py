"""`fiun-fast gpu`: a dry run of its steps on the CPU, and that nothing that goes wrong in a step ends the run."""

from __future__ import annotations

import inspect
import json
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fiun_fast import cli
from fiun_fast.gpu import child, parity, run
from fiun_fast.gpu.machine import BACKENDS, Gpu, SkippedError, StandIn, machine
from fiun_fast.gpu.page import DRY, page
from fiun_fast.gpu.steps import MINUTES, STEPS, Step

# the others take the rest of a minute, of the shim and the interpreter, and run by `make gpu-dry` in .ci/run
DRY_STEPS = ("bench", "sweep")


def test_a_dry_run_passes_every_step_and_says_that_it_is_one(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "bin" / "compute-sanitizer"  # runs what it is given
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift 2; done\nexec "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    only = [word for step in DRY_STEPS for word in ("--only", step)]
    status = cli.main(["gpu", "--dry", "--out", str(tmp_path / "out"), *only])
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [row["step"] for row in record["rows"]] == list(DRY_STEPS)
    for row in record["rows"]:
        without_triton = row["step"] == "sweep" and find_spec("triton") is None
        assert row["status"] == ("skipped" if without_triton else "passed"), row
        assert f"{row['step']} (dry): {row['status']}" in printed
        for item in row["items"]:
            assert item["status"] != "failed", item
    assert status == 0
    assert record["dry"] is True
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert DRY in text
    titles = re.findall("^#.*", text, re.MULTILINE)
    assert len(titles) == 4  # the page, its steps, the speed of one, the settings of the other
    assert all(title.endswith("(dry run, simulated)") for title in titles)
    rows = [row for item in record["rows"][DRY_STEPS.index("bench")]["items"] for row in item["figures"]["rows"]]
    assert {"ours", "naive", "torch"} <= {row["kind"] for row in rows}


def test_the_steps_fit_into_the_time_and_have_names_of_their_own():
    assert sum(step.seconds for step in STEPS) <= 60 * MINUTES
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all((step.items is None) != (step.command is None) for step in STEPS)
    assert set(DRY_STEPS) <= {step.name for step in STEPS}


def test_an_item_that_fails_is_followed_by_the_next():
    def fails():
        raise ValueError("of this")

    def lacks():
        raise SkippedError("a second device")

    seen: list[dict] = []
    items = [("known", fails), ("fails", fails), ("lacks", lacks), ("passes", lambda: {"found": 3})]
    assert child.work_through(items, seen.append, ["known"], time.monotonic() + 60, lambda: None)
    last = {item["item"]: item for item in seen}
    assert {name: item["status"] for name, item in last.items()} == {
        "fails": "failed",
        "lacks": "skipped",
        "passes": "passed",
    }
    assert last["fails"]["why"] == "ValueError: of this"
    assert last["passes"]["figures"] == {"found": 3}
    assert last["lacks"]["why"] == "a second device"


def test_what_there_is_no_time_for_is_named():
    seen: list[dict] = []
    assert child.work_through([("late", dict)], seen.append, [], time.monotonic() - 1, lambda: None)
    assert seen == [{"item": "late", "status": "skipped", "why": "no time was left"}]


def test_a_device_that_no_longer_answers_ends_the_process():
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    seen: list[dict] = []
    assert not child.work_through([("a", dict), ("b", dict)], seen.append, [], time.monotonic() + 60, broken)
    assert [item["item"] for item in seen] == ["a", "a"]
    assert seen[-1]["status"] == "failed"


def test_a_process_that_dies_is_started_again_for_what_is_left(monkeypatch):
    calls = []

    def dies(words, log, seconds, dry, bare=False):
        skipped = words[words.index("--skip") + 1 :]
        calls.append(skipped)
        with Path(words[words.index("--lines") + 1]).open("a") as lines:
            if not skipped:
                lines.write('{"item": "a", "status": "passed", "figures": {}}\n{"item": "b", "status": "begun"}\n{"it')
                return -11, False
            lines.write('\n{"item": "c", "status": "passed", "figures": {}}\n')
            return 0, False

    monkeypatch.setattr(run, "_run", dies)
    step = next(step for step in STEPS if step.name == "checks")
    result = run.run_step(step, 60, dry=True)
    assert calls == [[], ["a", "b"]]
    assert result["status"] == "failed"
    assert {item["item"]: item["status"] for item in result["items"]} == {"a": "passed", "b": "failed", "c": "passed"}
    assert result["items"][1]["why"] == "the process was ended by signal 11"


def test_a_step_that_takes_too_long_is_ended_with_all_it_started():
    words = [
        sys.executable,
        "-c",
        "import subprocess, sys; print('began', flush=True); subprocess.run(['sleep', '60'])",
    ]
    began = time.monotonic()
    result = run.run_step(Step("slow", "sleeps", 2, command=lambda dry: words), 3.0, dry=True)
    assert time.monotonic() - began < 30
    assert (result["status"], result["why"]) == ("failed", "its time was over")
    assert "began" in result["tail"]


def test_a_command_that_fails_or_is_not_there():
    failing = Step("fails", "", 2, command=lambda dry: [sys.executable, "-c", "print('so'); raise SystemExit(4)"])
    result = run.run_step(failing, 30.0, dry=True)
    assert (result["status"], result["why"], result["tail"]) == ("failed", "exit status 4", "so\n")
    missing = run.run_step(Step("none", "", 2, command=lambda dry: "no such tool"), 30.0, dry=True)
    assert (missing["status"], missing["why"]) == ("skipped", "no such tool")


def test_a_page_of_a_gpu_shows_what_failed_and_what_was_reached():
    row = {"case": "a", "title": "one model", "variant": "cuda (graph)", "kind": "ours", "ms": 0.5, "copy_gbps": 3000.0}
    compiled = row | {"variant": "one graph, flat", "kind": "torch", "ms": 1.0}
    bench = {"item": "a", "status": "passed", "figures": {"rows": [row | {"gbps": 2700.0, "share": 0.9}, compiled]}}
    failed = {"item": "graph, cuda", "status": "failed", "why": "AssertionError: node n0\nof 3 | 4"}
    steps = [
        {"step": "checks", "title": "graphs", "status": "failed", "seconds": 3.0, "items": [failed], "tail": "the end"},
        {"step": "bench", "title": "cases", "status": "passed", "seconds": 9.0, "items": [bench], "tail": ""},
    ]
    found = {"gpu": "NVIDIA H100", "threads": 16, "torch": "2.11.0", "fiun_fast": "0.1.0"}
    record = {"dry": False, "environment": found, "rows": steps, "began": "now", "minutes": 20.0}
    text = page(record)
    assert "dry" not in text
    assert "simulated" not in text
    assert "- **checks, graph, cuda**: AssertionError: node n0 of 3 / 4" in text
    assert "the end" in text
    assert "| a: one model | cuda (graph) 0.5, 2,700, 90% | 3,000 | 2.00 | 2.00 |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert cli.main(["gpu", "--out", str(tmp_path / "out")]) == 1
    assert "torch finds no GPU; --dry shows" in capsys.readouterr().err
    assert cli.main(["gpu", "--dry", "--only", "chekcs"]) == 1
    assert "no step 'chekcs'; known are doctor, parity-cuda" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_that_the_gpu_is_asked_through_torch_exists():
    """A dry run does not come by here."""
    names = set(re.findall(r"torch\.cuda\.(\w+)", inspect.getsource(Gpu)))
    assert len(names) > 10
    assert [name for name in names if not hasattr(torch.cuda, name)] == []
    for name, method in vars(StandIn).items():
        if callable(method) and name != "__init__":
            assert inspect.signature(method) == inspect.signature(getattr(Gpu, name)), name


@pytest.mark.parametrize("case", ["fp32 edges", "sum", "signed bf16"])
def test_the_textbook_sees_a_wrong_result(case):
    problem = parity.Problem(parity.CASES[case], [torch.device("cpu")])
    plan = problem.plan("reference")
    problem.compare(plan.run_())
    problem.refill()
    plan.set_values_(lam=0.9 * parity.CASES[case].lam)
    with pytest.raises(AssertionError):
        problem.compare(plan.run_())
    problem.refill()
    plan.set_values_(alpha=0.5, lam=parity.CASES[case].lam)
    with pytest.raises(AssertionError):
        problem.compare(plan.run_())


def test_every_case_of_the_table_agrees_with_the_reference():
    for name, case in parity.CASES.items():
        if name not in ("many nodes", "many tiles", "many tiles, flat, shifted"):
            problem = parity.Problem(case, [torch.device("cpu")])
            problem.compare(problem.plan("reference").run_())


def test_a_backend_that_is_not_there_is_skipped_with_its_reason():
    gpu = machine(dry=False)
    if not torch.cuda.is_available():
        for name in BACKENDS:
            with pytest.raises(SkippedError, match=f"backend {name}: "):
                gpu.backend(name)
