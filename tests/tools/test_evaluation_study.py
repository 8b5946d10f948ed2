"""The study of whether it is gone: its page says what its results say, and a run that was stopped goes on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from statistics import mean

import pytest

pytest.importorskip("sklearn", reason="the data comes with scikit-learn")
from fiun_fast.demo.report import Gone
from fiun_fast.evaluation import Estimate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study():
    specification = importlib.util.spec_from_file_location("bench_evaluation", ROOT / "bench" / "evaluation.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def result(study) -> dict:
    return json.loads(study.RESULTS.read_text(encoding="utf-8"))


def test_the_page_has_the_table_of_the_committed_results(study, result):
    page = study.PAGE.read_text(encoding="utf-8")
    shown = page.partition("<!-- tables -->\n")[2].partition("<!-- /tables -->")[0]
    assert shown == f"\n{study.tables(result)}\n"
    assert result["settings"]["effort"] == 1.0
    measured = [(row["seed"], row["scenario"], row["request"]) for row in result["rows"]]
    assert len(set(measured)) == len(measured) == 5 * len(study.SEEDS)
    assert {seed for seed, *_ in measured} == set(study.SEEDS)


def test_what_the_page_says_of_its_table_holds(result):
    def figures(name: str, side: int = 0, random: bool = False) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for row in result["rows"]:
            if (row["request"] == "random tenth") == random:
                found.setdefault(row["scenario"], []).append(row["measured"][name][side]["value"])
        return found

    assert min(map(min, figures("tow").values())) >= 0.98
    for name in ("forget", "int8", "int4", "relearned"):
        assert max(map(max, figures(name).values())) < 0.012, name  # one sample
    assert min(map(min, figures("probe").values())) == 1
    assert min(map(mean, figures("probe", 1).values())) > 0.94
    spread, again = figures("zrf"), figures("zrf", 1)
    apart = {name for name in spread if min(spread[name]) > max(again[name])}
    assert apart == set(spread) - {"federated"}
    rmia = [mean(of) for of in (*figures("rmia").values(), *figures("rmia", random=True).values())]
    assert 0.435 < min(rmia) < 0.5 < max(rmia) < 0.555
    few, again = figures("relearned_few"), figures("relearned_few", 1)
    more = [mean(few[name]) - mean(again[name]) for name in few]
    assert max(map(mean, few.values())) < 0.075
    assert sorted(one > 0.04 for one in more) == [False, False, True, True]
    assert sum(one < -0.04 for one in more) == 1
    trained, unlearned = figures("ulira_trained"), figures("ulira_unlearned")
    assert all(mean(trained[name]) > mean(unlearned[name]) > 0.5 for name in trained)
    (before,), (after,) = (figures(f"ulira_{of}", random=True).values() for of in ("trained", "unlearned"))
    assert mean(after) == pytest.approx(mean(before), abs=0.02)
    (stays,), (again,) = (figures("forget", side, random=True).values() for side in (0, 1))
    assert mean(stays) > mean(again) > 0.94


def gone(scenario: str, seed: int, own: float, again: float | None) -> Gone:
    of = [None if value is None else Estimate(value, 0.0, 1.0) for value in (own, again)]
    return Gone(scenario, "u", f"“{scenario}”", {"forget": tuple(of)}, 1.0, 1.0)


def test_cells_are_means_and_deviations_over_seeds(study):
    rows = [
        {"seed": seed, "scenario": "a", "node": "u", "request": "b", "measured": of}
        for seed, of in enumerate(
            [
                {"forget": [{"value": 0.1}, {"value": 0.5}], "tow": [{"value": 0.25}, None]},
                {"forget": [{"value": 0.3}, {"value": 0.5}], "tow": [{"value": 0.75}, None]},
            ]
        )
    ]
    lines = study.tables({"rows": rows}).splitlines()
    assert lines[0] == "| measure | a, u: b |"
    assert lines[2] == "| accuracy, forgotten | 0.20 ± 0.14 / 0.50 ± 0.00 |"
    assert "| ToW | 0.50 ± 0.35 |" in lines
    assert "| ZRF |  |" in lines
    assert "| accuracy, forgotten | 0.10 / 0.50 |" in study.tables({"rows": rows[:1]})


def test_a_run_that_was_stopped_goes_on_and_one_of_another_commit_begins_anew(study, monkeypatch, tmp_path):
    asked, out, names = [], tmp_path / "found.json", list(study.REQUESTS)

    def measured(scenario, seed, effort):
        asked.append(scenario)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return [gone(scenario, seed, 0.1, None)]

    monkeypatch.setattr(study, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        study.study(out, [4])
    study.study(out, [4])
    assert asked == [*names[:3], *names[2:]]
    result = json.loads(out.read_text())
    assert [row["scenario"] for row in result["rows"]] == names
    assert result["rows"][0]["measured"] == {"forget": [{"value": 0.1, "low": 0.0, "high": 1.0}, None]}
    monkeypatch.setattr(study, "environment", lambda: result["environment"] | {"commit": "another"})
    study.study(out, [4])
    assert asked[5:] == names
    assert json.loads(out.read_text())["environment"]["commit"] == "another"
