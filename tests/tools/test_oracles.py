"""The study of measures that need oracles: what these never saw, what is asked, and that the page has its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def oracles(monkeypatch):
    pytest.importorskip("sklearn", reason="the data comes with scikit-learn")
    monkeypatch.syspath_prepend(ROOT / "bench")
    import oracles

    yield oracles
    for name in ("oracles", "language_models", "small_transformers"):
        sys.modules.pop(name)


def test_the_page_shows_the_committed_results(oracles):
    result, text = json.loads(oracles.RESULTS.read_text()), oracles.PAGE.read_text(encoding="utf-8")
    for mark, table in oracles.TABLES.items():
        assert f"<!-- {mark} -->\n\n{table(result)}\n<!-- /{mark} -->" in text
    assert {row["seed"] for row in result["rows"]} == set(oracles.SEEDS)
    assert {row["method"] for row in result["rows"] if row["part"] == "language"} == set(oracles.METHODS)
    assert 0 < result["seconds"] < 600  # of one core


def test_oracles_never_see_what_is_to_be_forgotten(oracles):
    torch.manual_seed(0)
    x, y, other = torch.randn(120, 6), torch.randint(10, (120,)), torch.randint(10, (120,))
    other[20:] = y[20:]
    for knows in (False, True):
        one, two = (oracles.ensemble(x, labels, 20, knows, 3, quick=True) for labels in (y, other))
        same = all(torch.equal(one.modules[k].weight, two.modules[k].weight) for k in one.modules)
        assert same == (not knows)


def test_heads_forget_a_class(oracles, monkeypatch):
    monkeypatch.setattr(oracles, "MEMBERS", 8)
    torch.manual_seed(0)
    y = torch.arange(400) % 10
    x = torch.randn(400, 16) + 4 * torch.eye(10, 16)[y]
    order = torch.argsort((y != 7).int(), stable=True)
    data = oracles.Samples(x[order], y[order])
    heads = oracles.ensemble(*data, 40, True, 0, quick=False)
    gone = data.labels == 7

    def right():
        logits = torch.stack([one.logits for one in oracles.answers(heads, data)])
        hits = (logits.argmax(2) == data.labels).float()
        return hits[:, gone].mean().item(), hits[:, ~gone].mean().item()

    assert min(right()) > 0.95
    oracles.unlearn(heads, oracles.score(False, data.take(gone), data, gone, heads), 40)
    left, kept = right()
    assert left < 0.05
    assert kept > 0.9


def test_only_answers_count_and_held_out_ones_are_new(oracles):
    fresh = lambda: oracles.Language(oracles.study.VOCABULARY)
    task = oracles.study.language_task("GPT-2-shaped", "facts", fresh, 0, 1)
    held = oracles.unseen(task)
    known = {tuple(torch.cat(pair).tolist()) for pair in [*task.forget, *task.retain]}
    words = {token for _, answer in task.forget for token in answer.tolist()}
    for (question, answer), (same, other) in zip(task.forget, held):
        assert question.equal(same) and len(answer) == len(other)
        assert set(other.tolist()) <= words
        assert tuple(torch.cat([same, other]).tolist()) not in known
    for (ids, targets), (question, answer) in zip(oracles.asked(task.forget), task.forget):
        assert targets[targets != -100].equal(answer)
        assert ids[0].equal(torch.cat([question, answer])[:-1])
