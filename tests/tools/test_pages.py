"""The examples of the pages run, each by itself; test_migrate.py has those of migrate.md."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import fiun_fast as ff

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = [
    (page, number, part.split("```")[0])
    for page in ("fishers.md", "models.md", "choosing.md", "audit.md")
    for number, part in enumerate((DOCS / page).read_text(encoding="utf-8").split("```python\n")[1:])
]


@pytest.mark.parametrize("text", [pytest.param(text, id=f"{page}-{number}") for page, number, text in BLOCKS])
def test_examples_of_the_pages_run(text, tmp_path, monkeypatch):
    """With the names that a reader has by then: two models, u1 a child of u0, and a request at u0."""
    if "plot()" in text:
        pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    m0 = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    m1 = copy.deepcopy(m0)
    x, y = torch.randn(40, 8), torch.randint(4, (40,))
    loader = [(x[:20], y[:20]), (x[20:], y[20:])]
    forgotten, rest = [(x[y == 0], y[y == 0])], [(x[y != 0], y[y != 0])]
    original, forget = ff.estimate_fisher(m0, loader), ff.estimate_fisher(m0, forgotten)
    dag = ff.InheritanceDAG()
    dag.add_model("u0", m0, fisher=original)
    dag.add_model("u1", m1, fisher=original, parents=["u0"])
    requests = [ff.ForgetRequest("u0", forget)]
    optimizer = torch.optim.SGD(m0.parameters(), lr=0.1)

    def accuracy(model, batches):
        return sum((model(x).argmax(1) == y).float().mean().item() for x, y in batches) / len(batches)

    def train(model, optimizer):
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    names = {
        **{"ff": ff, "model": m0, "m0": m0, "m1": m1, "dag": dag, "requests": requests, "optimizer": optimizer},
        **{"loader": loader, "forgotten": forgotten, "rest": rest, "original": original, "forget": forget},
        **{"loss_fn": functional.cross_entropy, "accuracy": accuracy, "train": train},
        "plan": ff.plan(dag, requests, alpha=1.0),
        "before": {"u0": accuracy(m0, rest), "u1": accuracy(m1, rest)},
        "score": lambda name, model: -accuracy(model, forgotten),
    }
    exec(compile(text, "docs", "exec"), names)


def test_every_promise_of_the_safety_page_has_a_test_that_exists():
    rows = [line for line in (DOCS / "safety.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| promise", "| ---"))]
    assert len(promises) > 10
    for row in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            assert f"\ndef {name}(" in (DOCS.parent / path).read_text(encoding="utf-8"), f"{path} has no {name}"
