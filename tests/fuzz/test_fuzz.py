"""A little of the fuzzing, always the same, and all that fuzzing has found so far."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import run

from fiun_fast import kernels

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))


def test_live_objects() -> None:
    """Twelve sequences of some thirty operations; `make fuzz` does more."""
    found = run.sequences(seed=0, examples=12, length=30)
    assert found is None, f"{found['error']}: {json.dumps(found['steps'])}"


@pytest.mark.parametrize(("part", "plans"), [("values", 6), ("interpreted", 1)])
def test_random_cases(part: str, plans: int) -> None:
    """Bit for bit as the textbook, by the cpu backend, the reference, and Triton's interpreter."""
    for backend in run.BACKENDS[part]:
        if (reason := kernels.load(backend).why_not("cpu")) is not None:
            pytest.skip(f"backend {backend}: {reason}")
    number = 0
    for seed in range(plans):
        done, found = run.cases(part, seed)
        assert found is None, found
        number += done
    assert number >= 400


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_was_found_stays_away(path: Path) -> None:
    run.again(json.loads(path.read_text()))
