"""Every Python example of README.md and of the pages in docs/ runs, as docs/examples.md says; promises are tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[2] / "docs"
FIRST = DOCS / "examples.md"
README = DOCS.parent / "README.md"


def blocks(page: Path) -> list[str]:
    """The Python examples of a page, each with empty lines before it, so that a traceback has the page's lines."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(?:python|py)\b.*\n((?:.*\n)*?)\1```", text, re.MULTILINE)
    return ["\n" * text[: match.start(2)].count("\n") + match[2] for match in found]


PAGES = [page for page in (README, *sorted(DOCS.glob("*.md"))) if blocks(page)]


def test_pages_are_read_as_they_are_written():
    assert {page.name for page in PAGES} >= {"README.md", "examples.md", "fishers.md", "choosing.md", "audit.md"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(blocks(page)) == len(re.findall(r"^ *```py", text, re.MULTILINE)), page.name
        for block in blocks(page):
            last = block.rstrip().count("\n")
            assert text.splitlines()[last] == block.rstrip().splitlines()[-1], page.name


@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")  # so few data are learned that choices are doubtful
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_runs(page, tmp_path, monkeypatch):
    """One after another, as a reader would paste them; README.md needs nothing before it."""
    if "plot(" in page.read_text(encoding="utf-8"):
        pytest.importorskip("matplotlib").use("agg")
    if "ff.evaluation." in page.read_text(encoding="utf-8"):
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    begins_elsewhere = page not in (README, FIRST)
    for source in [FIRST] * begins_elsewhere + [page]:
        for block in blocks(source):
            exec(compile(block, str(source), "exec"), names)
    if begins_elsewhere:
        assert f"]({FIRST.name})" in page.read_text(encoding="utf-8"), "what do its examples begin with?"


def test_readme_shows_what_its_first_example_prints(capsys):
    """To three points: other versions of torch round otherwise."""
    shown = re.search(r"^```text\n(.*?)\n```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    exec(compile(blocks(README)[0], str(README), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out.strip()
    number = r"\d+\.\d+"
    assert re.sub(number, "", printed) == re.sub(number, "", shown)
    found, said = (list(map(float, re.findall(number, text))) for text in (printed, shown))
    assert found == pytest.approx(said, abs=3)
    assert said[1] < 3 < 90 < said[0]
    assert said[3] > said[2] - 2


def test_every_promise_of_the_safety_page_has_a_test_that_exists():
    rows = [line for line in (DOCS / "safety.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| promise", "| ---"))]
    assert len(promises) > 10
    for row in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            assert f"\ndef {name}(" in (DOCS.parent / path).read_text(encoding="utf-8"), f"{path} has no {name}"
