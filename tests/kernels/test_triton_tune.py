"""Settings of the Triton kernels at tiny sizes under the interpreter: kernels run under changed settings, checked."""

from __future__ import annotations

import pytest
import torch

from fiun_fast.bench import dampening
from fiun_fast.bench.measure import Effort, Machine
from fiun_fast.kernels import load

pytest.importorskip("triton", reason="Triton is not installed")
from fiun_fast.gpu import timed


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if reason := load("triton").why_not("cpu"):
        pytest.skip(f"backend triton: {reason}")
    monkeypatch.setitem(dampening.TIMED, "cpu", ("triton",))


@pytest.mark.parametrize("case", ["f-bf16", "g-zero", "h-3"])
def test_every_kernel_runs_under_a_changed_setting(case):
    machine = Machine(torch.device("cpu"), small=True)
    for setting in (timed.Setting(512, 4, 64, 3), timed.SHIPPED):
        row = timed.measure(case, "tiny", setting, machine, Effort(1, 1, 0.0))
        assert (row["case"], row["block"], row["shipped"]) == (case, setting.block, setting == timed.SHIPPED)
        assert row["gbps"] > 0
        assert row["copy_gbps"] > 0


def test_a_setting_changes_the_launch_and_only_inside():
    host = timed.host
    constants = {"GRADIENT": "fp32", "INTO": "fp32"}
    before = host.options("cuda", constants)
    with timed.Setting(512, 8, 0, 1).applied():
        assert host.block_size() == 512
        inside = host.options("cuda", constants)
        assert (inside["num_warps"], inside["num_stages"], inside.get("maxnreg")) == (8, 1, None)
        assert inside["enable_fp_fusion"] is False
    assert host.options("cuda", constants) == before
    assert host.block_size() != 512


def test_what_is_shipped_is_tried_first():
    tried = timed.settings()
    assert tried[0] == timed.SHIPPED
    assert len(tried) == len(set(tried)) < 100
