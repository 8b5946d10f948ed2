"""The benchmarks at tiny sizes: every case and variant runs and agrees with the reference; no number is looked at."""

import io
import json

import pytest
import torch
from rich.console import Console

from fiun_fast import cli
from fiun_fast.bench import cases, measure, memory, results, run

CPU = torch.device("cpu")
TINY = run.select(None, "tiny")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny work on several threads of a busy machine waits for the scheduler, not for memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench():
    torch._dynamo.reset()
    return run.Bench("tiny", CPU, compiler="eager", weigh=False)


@pytest.mark.parametrize("name", TINY)
def test_every_variant_runs_and_agrees(bench, name):
    case, rows = bench.measure(name)
    assert [row.variant for row in rows] == [variant.name for variant in case.variants]
    for row in rows:
        assert row.p20 <= row.ms <= row.p80
        if row.kind in ("naive", "torch", "ours") and not name.startswith("i-"):
            assert row.agrees is not None, row.variant
            if case.ulps == 0:  # the bit contract
                assert row.agrees == "same bits"
    if not name.startswith("i-"):
        assert {"naive", "ours"} <= {row.kind for row in rows}, "our rows need something to be compared with"


def test_the_modes_have_the_same_cases():
    families = {mode: {name.split("-")[0] for name in cases.listed(mode)} for mode in cases.SIZES}
    assert families["full"] == families["tiny"] == set("abcdefghijk") | {"nodes", "parameters"}
    assert families["quick"] == set("abcdefghijk")


def test_a_wrong_variant_is_not_timed():
    case = cases.listed("tiny")["d"](CPU, None)
    case.variants[0].run = lambda: None
    with pytest.raises(measure.DisagreementError, match=r"case d: naive differs from the reference in \d+ of"):
        measure.check(case)


def test_ulps():
    one = torch.tensor([1.0, -1.0, 0.0, 2.0])
    next_up = torch.tensor([1.0000001, -1.0000001, -0.0, 2.0])
    assert measure.ulps(one, next_up).tolist() == [1, 1, 0, 0]
    assert measure.ulps(one, one).sum() == 0


def test_floors_are_those_of_the_cost_model():
    p = cases.listed("tiny")["a"](CPU, None).elements
    floors = {name: cases.listed("tiny")[name](CPU, None).floor for name in ("a", "g", "g-zero", "h-3")}
    assert floors == {"a": 16 * p, "g": 12 * p, "g-zero": 16 * p, "h-3": 16 * p}


def test_memory_of_a_variant_is_seen():
    if not memory.CLEAR.exists():
        pytest.skip("the system does not tell a process its peak memory")
    block = 8 << 20
    variant = measure.Variant("", "", lambda: torch.ones(block).sum(), lambda: None, None)
    assert 0.9 * 4 * block < memory.extra(variant, CPU) < 1.5 * 4 * block
    idle = measure.Variant("", "", lambda: None, lambda: None, None)
    assert memory.extra(idle, CPU) < 1 << 20


def test_a_record_survives_being_kept_and_has_no_names_of_places(bench, tmp_path):
    if not bench.record.rows:
        bench.measure("a")
    path = run.path_for(bench.record, tmp_path)
    bench.record.save(path)
    again = results.Record.load(path)
    assert [(r.case, r.variant, r.kind) for r in again.rows] == [(r.case, r.variant, r.kind) for r in bench.record.rows]
    assert again.ours("a").kind == "ours"
    assert set(json.loads(path.read_text())) == {"mode", "environment", "skipped", "rows"}
    assert str(tmp_path.home()) not in path.read_text()
    printed = io.StringIO()
    run.show(again, Console(file=printed, width=140))
    assert "dampen one ResNet-18" in printed.getvalue()


def test_command_line(capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(run, "bench", lambda *a, **k: seen.update(a=a) or [])
    assert cli.main(["bench", "--quick", "--case", "a", "--no-compile"]) == 0
    assert seen["a"] == (["a"], "quick", None, None)
    monkeypatch.undo()
    assert cli.main(["bench", "--case", "zebra"]) == 1
    assert "no case 'zebra' in full mode; known are a, a-all" in capsys.readouterr().err
