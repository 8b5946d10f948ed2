"""The scripts in examples/ forget what they say, keep the rest, and are short."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning"),  # the scripts show it; here the outcome is held
    pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore::FutureWarning:transformers"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "image_class": "sklearn",
    "text_class": "transformers",
    "causal_lm": "transformers",
    "lora": "peft",  # which needs transformers
    "federated": "sklearn",
}
RUNS = [("image_class", 0), ("image_class", 1), ("text_class", 0), ("text_class", 1)]
RUNS += [("causal_lm", 0), ("causal_lm", 1), ("lora", 1), ("federated", 1)]  # the last two take longest


@cache
def main_of(name: str) -> Callable[[int], dict[str, Any]]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_script_is_run_and_short() -> None:
    scripts = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == NEEDS.keys() == {name for name, _ in RUNS}
    assert {name for name, path in scripts.items() if len(path.read_text(encoding="utf-8").splitlines()) > 85} == set()


@pytest.mark.parametrize(("name", "seed"), RUNS)
def test_what_was_learned_is_forgotten_and_the_rest_kept(
    name: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bounds of docs/research.md."""
    pytest.importorskip(NEEDS[name], reason=f"examples/{name}.py needs {NEEDS[name]}")
    found = main_of(name)(seed)
    printed = capsys.readouterr().out
    assert "%" in printed
    if name == "federated":
        reached, before, after = found["reached"], found["before"], found["after"]
        assert len(reached) == 20
        assert not any(node.endswith(("round 1", "round 4", "server 4")) for node in reached)
        assert all(after[node] == before[node] for node in before.keys() - set(reached))
        nines, left = (sum(values[node][0] for node in reached) / 20 for values in (before, after))
        others, kept = (sum(values[node][1] for node in reached) / 20 for values in (before, after))
        assert before["server 8"][0] > 0.6
        assert (nines > 0.4, left < 0.05, others > 0.8, kept > others - 0.02) == (True,) * 4, (
            nines,
            left,
            others,
            kept,
        )
        return
    learned, left = found["forgotten"]
    others, kept = found["retained"]
    assert learned > 0.75
    assert others > 0.9
    assert left <= (0.0 if name == "causal_lm" else 0.05)
    assert kept >= others - 0.02
    assert found.get("base as it was", True)
