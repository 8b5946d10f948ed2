"""The study of whether it is gone: its page says what its results say, and a run that was stopped goes on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

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
