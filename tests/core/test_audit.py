"""Audited runs: figures of each parameter against an obvious count, hashes, and a report that JSON can hold."""

import hashlib
import json
import math

import pytest
import torch
from cases import CASES, Case, build, textbook
from torch import nn

import fiun_fast as ff
from fiun_fast import tiles

PICKED = (
    "diamond-two-origins",
    "tiles",
    "edges-fp32-fp32",
    "edges-bf16-fp64",
    "per-node",
    "mean-fp32",
    "exponent-2",
    "signed-edges-fp16-fp32",
)


@pytest.mark.parametrize("case", [c for c in CASES if c.id in PICKED], ids=lambda case: case.id)
@pytest.mark.parametrize("dry_run", [False, True])
def test_figures_of_each_parameter(case: Case, backend, dry_run, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 1000)
    problem = build(case, backend.device)
    before, expected = problem.state(), textbook(problem)
    report = problem.plan(backend.name).run_(dry_run=dry_run, audit=True)
    moved = problem.state()
    assert all(torch.equal(moved[k], before[k]) or moved[k].isnan().any() for k in before) or not dry_run
    for node in report:
        assert node.parameters
        for p in node.parameters:
            key = (node.name, p.name)
            old, new = before[key].double(), expected.values[key].double()
            assert (p.shape, p.numel) == (tuple(old.shape), old.numel())
            assert p.dtype == str(case.theta).removeprefix("torch.")
            change = float((new - old)[~((new == old) | (new.isnan() & old.isnan()))].square().sum().sqrt())
            if math.isfinite(change):
                assert p.change == pytest.approx(change, rel=1e-3, abs=1e-30) or math.isnan(p.change)
            band = int(expected.band[key].sum()) if not case.exact else 0
            assert 0 <= p.selected <= p.numel
            assert p.zeroed <= p.selected + band
        for what, total in zip(("selected", "zeroed", "nonfinite"), expected.counts[node.name], strict=True):
            counted = sum(getattr(p, what) for p in node.parameters)
            slack = 0 if case.exact else sum(int(b.sum()) for (n, _), b in expected.band.items() if n == node.name)
            assert abs(counted - total) <= slack, (node.name, what)
            assert abs(counted - getattr(node, what)) <= slack


def small() -> tuple[nn.Module, ff.Fisher, ff.Fisher]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    layout = ff.Layout.from_module(model)
    return model, ff.Fisher(torch.rand(layout.numel), layout), ff.Fisher(torch.rand(layout.numel), layout)


def test_the_record_of_a_run():
    model, original, forget = small()
    expected = {"original": original.sha256(), "forget": forget.sha256()}
    report = ff.dampen_(model, original, forget, alpha=0.5, lam=0.25, cap=0.5, audit=True)
    original.buffer.zero_()  # the record is of what was used
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["fiun_fast"] == ff.__version__
    assert record["torch"] == torch.__version__
    assert len(record["backends"]) == 1
    assert {k: record[k] for k in ("exponent", "cap", "merge", "scale")} == {
        "exponent": 1.0,
        "cap": 0.5,
        "merge": "max",
        "scale": 1.0,
    }
    assert record["time"].endswith("+00:00")
    assert record["requests"] == [{"origin": "model", "weight": 1.0, "sha256": expected["forget"]}]
    (node,) = record["nodes"]
    assert (node["alpha"], node["lam"], node["sources"]) == (0.5, 0.25, ["model"])
    assert node["sha256"] == expected["original"]
    assert [p["name"] for p in node["parameters"]] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert sum(p["selected"] for p in node["parameters"]) == node["selected"] == record["selected"]
    assert node["change"] == pytest.approx(math.hypot(*(p["change"] for p in node["parameters"])))
    assert node["parameters"][0]["share"] == node["parameters"][0]["selected"] / 12


def test_without_audit_hashes_are_taken_when_asked():
    model, original, forget = small()
    report = ff.dampen_(model, original, forget, alpha=0.5)
    record = report.to_dict()
    assert record["nodes"][0]["sha256"] == original.sha256()
    assert "parameters" not in record["nodes"][0]
    assert "time" not in record
    assert "sha256" not in report.to_dict(sha256=False)["nodes"][0]
    del original, forget
    record = report.to_dict()  # a report does not keep Fishers alive
    assert record["nodes"][0]["sha256"] is None
    assert record["requests"][0]["sha256"] is None


def test_sha256_is_of_layout_and_numbers(tmp_path):
    layout = ff.Layout({"w": (2, 2), "b": ()})
    values = [0.5, 1.0, 2.0, float("inf"), 3.0]
    fisher = ff.Fisher(torch.tensor(values), layout)
    line = b'{"dtype": "float32", "layout": [["w", [2, 2]], ["b", []]]}\n'
    import struct

    assert fisher.sha256() == hashlib.sha256(line + struct.pack("<5f", *values)).hexdigest()
    fisher.save(tmp_path / "f")
    assert ff.Fisher.load(tmp_path / "f").sha256() == fisher.sha256()
    others = [
        ff.Fisher(torch.tensor(values, dtype=torch.float64), layout),
        ff.Fisher(torch.tensor(values), ff.Layout({"w": (4,), "b": ()})),
        ff.Fisher(torch.tensor([*values[:-1], 3.0000002]), layout),
    ]
    assert len({f.sha256() for f in [fisher, *others]}) == 4


def test_prints_are_readable():
    model, original, forget = small()
    report = ff.dampen_(model, original, forget, alpha=0.5, dry_run=True, audit=True)
    lines = str(report).splitlines()
    assert lines[0].split()[-1] == "‖Δθ‖"
    assert lines[-1] == "dry run: nothing was changed"
    lines = str(report["model"]).splitlines()
    assert lines[0].split() == [
        "parameter",
        "shape",
        "dtype",
        "elements",
        "selected",
        "share",
        "zeroed",
        "nonfinite",
        "‖Δθ‖",
    ]
    assert [line.split()[0] for line in lines[2:]] == ["0.weight", "0.bias", "1.weight", "1.bias", "model"]
    assert "3×4" in lines[2]
    assert len({len(line) for line in lines}) == 1
    plain = ff.dampen_(model, original, forget, alpha=0.5, dry_run=True)
    assert str(plain["model"]).startswith("model: ")
    assert "‖Δθ‖" not in str(plain)


def test_a_change_that_is_no_number_is_null_in_json():
    model = {"w": torch.tensor([1.0, float("inf")])}
    layout = ff.Layout.from_tensors(model)
    original, forget = ff.Fisher(torch.tensor([1.0, 0.0]), layout), ff.Fisher(torch.ones(2), layout)
    report = ff.dampen_(model, original, forget, alpha=0.5, audit=True)
    assert math.isnan(report["model"].change)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["nodes"][0]["change"] is None


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_nodes_that_nothing_fitted_are_shown_as_well(order):
    dag = ff.InheritanceDAG()
    fits, other = {"w": torch.rand(4)}, {"w": torch.rand(5)}
    for name in order:
        model = fits if name == "a" else other
        dag.add_model(name, model, fisher=ff.Fisher.from_dict({"w": torch.rand(len(model["w"]))}))
    dag.add_model("root", {"w": torch.rand(4)}, fisher=ff.Fisher.from_dict({"w": torch.rand(4)}))
    for name in order:
        dag.graph.add_edge("root", name)
    request = ff.ForgetRequest("root", ff.Fisher.from_dict({"w": torch.rand(4)}))
    text = str(ff.plan(dag, [request], alpha=0.1, on_mismatch="skip").run_(audit=True))
    assert "left out of b: w" in text
    assert "‖Δθ‖" in text


def test_a_plan_that_nothing_fits_can_be_printed():
    dag = ff.InheritanceDAG()
    dag.add_model("a", {"w": torch.rand(4)}, fisher=ff.Fisher.from_dict({"w": torch.rand(4)}))
    plan = ff.plan(dag, [ff.ForgetRequest("a", ff.Fisher.from_dict({"w": torch.rand(3)}))], on_mismatch="skip")
    assert "0 groups" in str(plan)
    assert "left out" in str(plan)
    assert str(plan.run_())
