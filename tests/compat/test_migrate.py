"""docs/migrate.md: its examples run, and the scripts before and after give the same bits."""

import difflib
import runpy
import warnings
from pathlib import Path

import pytest
import torch

import fiun_fast as ff
from fiun_fast.compat.ssd import differences

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "migrate"


def test_before_and_after_differ_in_one_line_and_give_the_same_weights(monkeypatch, capsys):
    before, after = (
        (EXAMPLES / name).read_text(encoding="utf-8").splitlines()[1:] for name in ("before.py", "after.py")
    )
    changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert changed == [
        "- from ssd import ParameterPerturber",
        "+ from fiun_fast.compat.ssd import ParameterPerturber",
    ]
    monkeypatch.syspath_prepend(EXAMPLES)
    printed = []
    for name in ("before.py", "after.py"):
        with warnings.catch_warnings():
            runpy.run_path(str(EXAMPLES / name))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    lines = printed[0].splitlines()
    assert lines[1].startswith("after:  threes 0.0%")
    assert lines[2].startswith("SHA-256 of the weights: ")


def blocks() -> list[str]:
    text = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


@pytest.mark.parametrize("number", range(len(blocks())))
def test_examples_of_the_page_run(number, tmp_path, monkeypatch):
    """Each block on its own, with the things a script has at that point."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    x, y = torch.randn(40, 8), torch.randint(4, (40,))

    def loader(*parts):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*parts), batch_size=16)

    names = {
        "model": model.eval(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "device": "cpu",
        "parameters": {"selection_weighting": 1.0, "dampening_constant": 0.5},
        "full_loader": loader(x, y),
        "forget_loader": loader(x[y == 0], y[y == 0]),
        "loaders": [loader(x[y == k], y[y == k]) for k in range(3)],
        "torch": torch,
        "ff": ff,
    }
    before = {k: v.clone() for k, v in model.state_dict().items()}
    exec(compile(blocks()[number], "docs/migrate.md", "exec"), names)
    if "modify_weight(" in blocks()[number] and "undo_" not in blocks()[number]:
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_page_lists_what_differs():
    text = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    for point in differences():
        assert f"| {point.topic} | {point.published} | {point.strict} | {point.corrected} |" in text, point.topic
