"""The demo with `--backend triton`, interpreted where there is no GPU, gives the bits of `--backend cpu`."""

from __future__ import annotations

import json

import pytest
import torch

from fiun_fast import cli
from fiun_fast.demo import experiment, run
from fiun_fast.demo.experiment import Network
from fiun_fast.kernels import load


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """What every run left of the parameters, before they are put back, as integers: equal only where the bits are."""
    recorded, restore = [], Network.restore

    def recording(network: Network) -> None:
        written = [model.get_parameter(name) for model in network.models.values() for name in network.params]
        recorded.append([p.detach().view(torch.int32).clone() for p in written])
        restore(network)

    monkeypatch.setattr(Network, "restore", recording)
    monkeypatch.setattr(experiment, "ROUNDS", 4)  # the interpreter takes a tenth of a second a launch
    monkeypatch.setattr(run, "QUICK_POINTS", 4)
    return recorded


@pytest.mark.usefixtures("trained_once")
def test_the_demo_gives_the_same_bits_on_triton_and_cpu(runs, tmp_path):
    for name in ("cpu", "triton"):
        if reason := load(name).why_not("cpu"):
            pytest.skip(f"backend {name}: {reason}")
    after, rows = {}, {}
    for name in ("cpu", "triton"):
        runs.clear()
        out = tmp_path / name
        arguments = ["demo", "--quick", "--scenario", "data-parallel", "--backend", name, "--out", str(out)]
        assert cli.main(arguments) == 0
        after[name] = list(runs)
        report = json.loads((out / "report.json").read_text())
        assert report["settings"]["backend"] == name
        rows[name] = [case["rows"] for case in report["cases"]]
    assert rows["triton"] == rows["cpu"]
    assert len(after["triton"]) == len(after["cpu"]) > 10
    for ours, theirs in zip(after["triton"], after["cpu"], strict=True):
        assert len(ours) == len(theirs) > 0
        assert all(map(torch.equal, ours, theirs))
    first = after["cpu"][0]
    changed = [state for state in after["cpu"] if not all(map(torch.equal, first, state))]
    assert len(changed) > 10, "the runs that are compared change nothing"
