"""The benchmarks at tiny sizes: every case and variant runs and agrees with the reference; no number is looked at."""

import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
import textbook_ssd
import torch
from rich.console import Console

from fiun_fast import cli
from fiun_fast.bench import baselines, measure, results, run
from fiun_fast.bench.files import fill, markdown, write_json

CPU = torch.device("cpu")
TINY = run.select(None, "tiny")


# tiny work on several threads of a busy machine waits for the scheduler, not for memory
pytestmark = pytest.mark.usefixtures("one_thread")


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
    families = {mode: {name.split("-")[0] for name in run.listed(mode)} for mode in run.SIZES}
    assert families["full"] == families["tiny"] == set("abcdefghijk") | {"nodes", "parameters"}
    assert families["quick"] == set("abcdefghijk")


def test_a_wrong_variant_is_not_timed():
    case = run.listed("tiny")["d"](CPU, None)
    case.variants[0].run = lambda: None
    with pytest.raises(measure.DisagreementError, match=r"case d: naive differs from the reference in \d+ of"):
        measure.check(case)


def test_the_naive_chain_is_that_of_the_published_classes():
    torch.manual_seed(0)
    found, wanted = textbook_ssd.ResNet(), textbook_ssd.ResNet()
    wanted.load_state_dict(found.state_dict())
    original, forget = ({n: torch.rand_like(p) for n, p in found.named_parameters()} for _ in range(2))
    textbook_ssd.modify(wanted, original, forget, alpha=0.8, lam=1.3)
    thetas = [p.detach() for p in found.parameters()]
    before = [theta.clone() for theta in thetas]
    baselines.dampen_naive(thetas, list(original.values()), list(forget.values()), 0.8, 1.3)
    assert all(map(torch.equal, thetas, wanted.parameters()))
    assert not all(map(torch.equal, thetas, before))


def test_what_bounds_a_case_is_measured_on_its_threads(monkeypatch):
    bench, threads = run.Bench("tiny", CPU, compiler=None, weigh=False), torch.get_num_threads()
    seen = []
    monkeypatch.setattr(run, "race", lambda *a: seen.append(torch.get_num_threads()) or measure.race(*a))
    with measure.on_threads(2):
        for name in ("a-thread", "b-none"):
            case, rows = bench.measure(name)
            (bound,) = (row.bound for row in rows if row.kind == "ours")
            assert set(bound) == {"memory", "instructions", "host"}
            assert bound["memory"] == pytest.approx(case.moved / rows[0].copy_gbps / 1e6)
            assert bound["host"] > 0
    assert seen == [1, 2]
    assert torch.get_num_threads() == threads
    assert case.moved < 0.6 * case.floor, "with nothing selected, theta stays where it is"


def test_ulps():
    one = torch.tensor([1.0, -1.0, 0.0, 2.0])
    next_up = torch.tensor([1.0000001, -1.0000001, -0.0, 2.0])
    assert measure.ulps(one, next_up).tolist() == [1, 1, 0, 0]
    assert measure.ulps(one, one).sum() == 0


def test_floors_are_those_of_the_cost_model():
    p = run.listed("tiny")["a"](CPU, None).elements
    floors = {name: run.listed("tiny")[name](CPU, None).floor for name in ("a", "g", "g-zero", "h-3")}
    assert floors == {"a": 16 * p, "g": 12 * p, "g-zero": 16 * p, "h-3": 16 * p}


def test_memory_of_a_variant_is_seen():
    if not measure.CLEAR.exists():
        pytest.skip("the system does not tell a process its peak memory")
    block = 8 << 20
    variant = measure.Variant("", "", lambda: torch.ones(block).sum(), measure.nothing)
    assert 0.9 * 4 * block < measure.extra_bytes(variant, CPU) < 1.5 * 4 * block
    idle = measure.Variant("", "", measure.nothing, measure.nothing)
    assert measure.extra_bytes(idle, CPU) < 1 << 20


def test_memory_is_weighed_in_a_process_of_its_own():
    if not measure.CLEAR.exists():
        pytest.skip("the system does not tell a process its peak memory")
    found = measure.alone(run.weights_of, "a", "tiny", CPU, None)
    assert set(found) == {variant.name for variant in run.listed("tiny")["a"](CPU, None).variants}
    with pytest.raises(KeyError, match="zebra"):
        measure.alone(run.weights_of, "zebra", "tiny", CPU, None)


def test_cases_are_selected_by_name_and_by_family():
    assert run.select(["g", "h-2"], "tiny") == ["g", "g-zero", "g-hooks", "h-2"]
    assert run.select(["k-head", "a"], "tiny") == ["a", "a-thread", "k-head"]


def test_a_record_survives_being_kept_and_has_no_names_of_places(bench, tmp_path):
    if bench.record.ours("a") is None:
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


def test_pictures_and_tables_from_a_record(bench, tmp_path):
    plots = load("plots")
    for name in ("a", "c", "g", "nodes-1", "nodes-3", "parameters-100", "parameters-1000", "f-fp32"):
        if bench.record.ours(name) is None:
            bench.measure(name)
    with plots.plt.rc_context(plots.STYLE):
        for draw in (plots.speed, plots.roofline, plots.scaling):
            draw(bench.record).savefig(tmp_path / "picture.svg")
            assert (tmp_path / "picture.svg").stat().st_size > 5000
            plots.plt.close("all")
    text = plots.reach([bench.record])
    (row,) = (line for line in text.splitlines() if line.startswith("| a |"))
    assert f"| a | {bench.record.ours('a').title} | 60× |" in row
    assert f"{bench.record.ours('a').vs_torch:.3g}×" in row
    assert set(re.findall(r"(\w+) \d+%", row)) == {"memory", "instructions", "host"}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    assert fill(page, "bench", plots.table([bench.record], few=True))
    assert "old" not in page.read_text()
    assert "| a | dampen one ResNet-18" in page.read_text()
    assert page.read_text().endswith("<!-- /bench -->\nafter\n")


def test_the_pages_have_the_numbers_of_the_committed_results(tmp_path, monkeypatch):
    plots = load("plots")
    copies = {tmp_path / path.name: few for path, few in plots.TABLES.items()}
    for page, copy in zip(plots.TABLES, copies, strict=True):
        copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    pages = {copy: page.read_text(encoding="utf-8") for page, copy in zip(plots.TABLES, copies, strict=True)}
    monkeypatch.setattr(plots, "TABLES", copies)
    assert list(plots.fill_pages(plots.chosen([]))) == list(copies)
    for copy, text in pages.items():
        assert copy.read_text(encoding="utf-8") == text, f"{copy.name}: `make plots` was not run"


def test_the_table_of_real_nets_is_that_of_the_results():
    nets = load("real_nets")
    result = json.loads(nets.TARGET.read_text(encoding="utf-8"))
    assert f"<!-- nets -->\n{nets.table(result)}<!-- /nets -->" in nets.PAGE.read_text(encoding="utf-8")
    assert not any(row["without_closed_form"] for row in result["networks"].values())


def test_cases_that_were_not_measured_are_kept_from_the_same_commit_only(tmp_path):
    def record(commit, *cases):
        rows = [results.Row(case, case, "cpu", "ours", "cpu", 1, 1.0, 1.0, 1.0, 5, 1.0) for case in cases]
        return results.Record(
            "tiny", {"commit": commit}, rows, [{"case": case, "variant": "x", "why": "y"} for case in cases]
        )

    path = tmp_path / "partial.json"
    record("one", "a", "c", "gone").save(path)
    again = record("one", "b", "c")
    assert again.keep(path, ["a", "b", "c"]) == ["a"]
    assert again.cases == ["a", "b", "c"]
    assert sorted(entry["case"] for entry in again.skipped) == ["a", "b", "c"]
    other = record("two", "b")
    assert other.keep(path, ["a", "b", "c"]) == [] and other.cases == ["b"]
    assert other.keep(tmp_path / "none.json", ["a", "b"]) == []


def test_the_tables_of_costs_are_those_of_the_results():
    costs = load("cpu_time")
    result = json.loads(costs.TARGET.read_text(encoding="utf-8"))
    assert f"<!-- cost -->\n{costs.tables(result)}<!-- /cost -->" in costs.PAGE.read_text(encoding="utf-8")


def test_the_tables_of_evaluation_are_those_of_the_results():
    study = load("evaluation")
    result = json.loads(study.RESULTS.read_text(encoding="utf-8"))
    table = study.tables(result)
    assert f"<!-- tables -->\n\n{table}\n<!-- /tables -->" in study.PAGE.read_text(encoding="utf-8")
    seeds = {one["seed"] for one in result["rows"]}
    assert [one["request"] for one in result["rows"]].count("random tenth") == len(seeds)
    assert all(one["measured"].keys() == study.ROWS.keys() for one in result["rows"])


def test_files_are_plain_json_with_a_row_a_line(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_json(path, {"rows": [{"a": 1 / 3}, (1, float("nan"))], "settings": {7: "x"}}, digits=3)
    assert json.loads(path.read_text()) == {"settings": {"7": "x"}, "rows": [{"a": 0.333}, [1, None]]}
    assert '  {"a": 0.333},\n' in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["result.json"], "no temporary file is left"
    with pytest.raises(TypeError):
        write_json(path, {"rows": [object()]})
    assert json.loads(path.read_text())["rows"][0] == {"a": 0.333}


def test_a_page_without_the_mark_stays(tmp_path):
    page = tmp_path / "page.md"
    assert not fill(page, "bench", "text")
    page.write_text("<!-- other -->\nold\n<!-- /other -->\n")
    assert not fill(page, "bench", "text")
    assert fill(page, "other", markdown(["name", "ms"], [("a", 1.5)]))
    assert page.read_text() == "<!-- other -->\n| name | ms |\n| --- | ---: |\n| a | 1.5 |\n<!-- /other -->\n"


def test_a_machine_can_count_by_another_clock():
    ticks = iter([3.0, 5.5])
    assert measure.Machine(CPU, small=True, clock=lambda: next(ticks)).seconds(lambda: None) == 2.5


def test_the_guard_sees_a_drop_and_only_that(bench):
    check = load("check")
    if bench.record.ours("a") is None:
        bench.measure("a")
    before = check.ratios(bench.record)
    assert ("a", "vs_naive") in before
    assert ("a", "vs_torch") in before
    assert not list(check.dropped(before, {key: 0.71 * value for key, value in before.items()}))
    now = {**before, ("a", "vs_torch"): 0.69 * before["a", "vs_torch"]}
    assert list(check.dropped(before, now)) == [("a", "vs_torch")]


def load(name):
    """A script of bench/; it is no part of the installed package."""
    path = Path(__file__).parents[2] / "bench" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_on_models_on_disk_has_the_committed_figures():
    disk = load("checkpoints")
    kept = json.loads(disk.TARGET.read_text())
    assert kept["bytes_of_models"] > 6e9
    assert kept["rounds"] >= 3
    assert f"<!-- measured -->\n{disk.tables(kept)}<!-- /measured -->" in disk.PAGE.read_text()


def test_command_line(capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(run, "bench", lambda *a, **k: seen.update(a=a) or [])
    assert cli.main(["bench", "--quick", "--case", "a", "--no-compile"]) == 0
    assert seen["a"] == (["a"], "quick", None, None)
    monkeypatch.undo()
    assert cli.main(["bench", "--case", "zebra"]) == 1
    assert "no case 'zebra' in full mode; known are a, a-thread" in capsys.readouterr().err


def test_the_page_says_what_the_whole_call_took_beside_training():
    unlearn = load("unlearn")
    result = json.loads(unlearn.RESULTS.read_text())
    page = unlearn.PAGE.read_text(encoding="utf-8")
    assert page.partition("<!-- unlearn -->\n")[2].partition("<!-- /unlearn -->")[0] == unlearn.sentence(result) + "\n"
    assert len(result["rows"]) == 10
    for row in result["rows"]:
        assert row["share"] == pytest.approx(row["seconds"] / result["training_seconds"], rel=1e-4)
        assert row["share"] <= 0.05
        assert sum(row["parts"].values()) == pytest.approx(1, abs=1e-4)
