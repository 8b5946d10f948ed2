"""Networks of the demo are trained once a session: the same recipe gives the same bits, which test_demo.py checks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(scope="session")
def grow_once() -> Callable[..., dict]:
    """`grow` of the demo, which remembers what it made and hands out copies."""
    from fiun_fast.demo.networks import grow

    made: dict[tuple, dict] = {}

    def again(recipe, *, without=(), keep=None, effort=1.0, watch=iter):
        kept = tuple(sorted(keep or ()))
        key = (recipe.scenario, recipe.seed, *sorted(recipe.origin.items()), tuple(without), kept, effort)
        if key not in made:
            made[key] = grow(recipe, without=without, keep=keep, effort=effort, watch=watch)
        return copy.deepcopy(made[key])

    return again


@pytest.fixture(scope="module")
def trained_once(grow_once: Callable[..., dict]) -> Iterator[None]:
    """Inside, the demo trains no network twice."""
    pytest.importorskip("sklearn", reason="the demo's data comes with scikit-learn")
    from fiun_fast.demo import experiment, run

    with pytest.MonkeyPatch.context() as patch:
        for module in (experiment, run):
            patch.setattr(module, "grow", grow_once)
        yield
