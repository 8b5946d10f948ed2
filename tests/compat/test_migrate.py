"""docs/migrate.md: the scripts before and after give the same bits, and it lists what differs."""

import difflib
import runpy
import warnings
from pathlib import Path

import pytest

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


def test_the_page_lists_what_differs():
    text = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    for point in differences():
        assert f"| {point.topic} | {point.published} | {point.strict} | {point.corrected} |" in text, point.topic
