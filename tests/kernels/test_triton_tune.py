"""bench/tune_triton.py at tiny sizes under the interpreter: every kernel runs under changed settings and is checked."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fiun_fast.bench import dampening
from fiun_fast.bench.measure import Effort
from fiun_fast.kernels import load

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def tune(monkeypatch):
    if reason := load("triton").why_not("cpu"):
        pytest.skip(f"backend triton: {reason}")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    monkeypatch.setitem(dampening.TIMED, "cpu", ("triton",))
    import tune_triton

    yield tune_triton
    del sys.modules["tune_triton"]


def test_a_sweep_runs_every_kernel_and_shows_what_is_shipped(tune, monkeypatch):
    monkeypatch.setattr(tune, "CASES", {"dampen": ("f-bf16",), "accumulate": ("g-zero",), "merge": ("h-3",)})
    printed = io.StringIO()
    console = Console(file=printed, width=140)
    over = [tune.Setting(512, 4, 64, 3), tune.SHIPPED]
    rows = tune.sweep(tune.CASES, "tiny", torch.device("cpu"), over, Effort(1, 1, 0.0), console)
    assert [(row["case"], row["block"]) for row in rows] == [
        (case, block) for case in ("f-bf16", "g-zero", "h-3") for block in (512, 2048)
    ]
    assert all(row["gbps"] > 0 and row["copy_gbps"] > 0 for row in rows)
    tune.show(rows, console)
    assert printed.getvalue().count("shipped") == 3


def test_a_setting_changes_the_launch_and_only_inside(tune):
    host = tune.host
    constants = {"GRADIENT": "fp32", "INTO": "fp32"}
    before = host.options("cuda", constants)
    with tune.Setting(512, 8, 0, 1).applied():
        assert host.block_size() == 512
        inside = host.options("cuda", constants)
        assert (inside["num_warps"], inside["num_stages"], inside.get("maxnreg")) == (8, 1, None)
        assert inside["enable_fp_fusion"] is False
    assert host.options("cuda", constants) == before
    assert host.block_size() != 512


def test_the_shipped_setting_is_among_those_tried(tune):
    tried = tune.settings()
    assert tune.SHIPPED in tried
    assert len(tried) == len(set(tried)) < 100


def test_without_a_gpu_it_says_so(tune, monkeypatch, capsys):
    monkeypatch.setattr(load("triton"), "why_not", lambda kind: "torch finds no GPU")
    monkeypatch.setattr(sys, "argv", ["tune_triton.py"])
    assert tune.main() == 2
    assert "torch finds no GPU" in capsys.readouterr().out
