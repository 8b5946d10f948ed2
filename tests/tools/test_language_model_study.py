"""The study of language models: its models are what they are named, and the page shows the committed results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import language_models

    yield language_models
    sys.modules.pop("language_models"), sys.modules.pop("small_transformers")


def test_the_page_shows_the_committed_results(study):
    result = json.loads(study.RESULTS.read_text())
    assert study.tables(result) in study.PAGE.read_text(encoding="utf-8")
    methods = {row["method"] for row in result["rows"]}
    assert methods == set(study.METHODS)
    assert {row["model"] for row in result["rows"]} == {"GPT-2-shaped", "Llama-shaped", "LoRA", "BERT-shaped"}
    assert 0 < result["seconds"] < 600  # of one core


def test_what_comes_later_changes_nothing_before(study):
    """Causal are those that say so; an adapter begins as nothing, and is all that is trained."""
    torch.manual_seed(0)
    ids, other = torch.randint(20, (2, 1, 9))
    other[:, :5] = ids[:, :5]
    for llama in (False, True):
        model = study.Language(20, llama)
        assert torch.allclose(model(ids)[:, :5], model(other)[:, :5], atol=1e-6)
        assert not torch.allclose(model(ids)[:, 5:], model(other)[:, 5:], atol=1e-3)
        assert (model.head.weight is model.embed.weight) == (not llama)
    both = study.Classifier(20, 3)
    assert not torch.allclose(both(ids), both(other), atol=1e-4)
    before = model(ids)
    adapted = study.adapt(model)
    assert torch.allclose(adapted(ids), before, atol=1e-6)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(name.endswith(("a.weight", "b.weight")) for name in trained)


def test_a_task_splits_what_is_known(study):
    task = study.language_task("GPT-2-shaped", "facts", lambda: study.Language(study.VOCABULARY), 0, 1)
    assert (len(task.forget), len(task.retain)) == (20, 200)
    assert not {id(item) for item in task.forget} & {id(item) for item in task.retain}
    assert max(int(torch.cat(item).max()) for item in (*task.forget, *task.retain)) < study.VOCABULARY
