"""What tuning tries and how it asks: alphas by the share that they select, leaving alone, scores that are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from .dag import Model
from .errors import ArgumentError
from .planning import Plan
from .profile import Profiles, SelectionProfile
from .ranks import Ranks, together
from .ratios import Ratios
from .scores import Score
from .tuned import TriedPoint

Evaluate = Callable[[str, Model], float]
MOST = 0.7  # the largest share that the default grid selects


def default_grids(compiled: Plan, points: int) -> dict[str, list[float]]:
    """Of each node the alphas that select from one element to 70 % of its profile, evenly in the logarithm."""
    profiles = compiled.profile()
    return dict(zip(profiles, even_grids(compiled.ratios(), list(profiles.values()), points), strict=True))


def even_grids(ratios: Ratios, profiles: Sequence[SelectionProfile], points: int) -> list[list[float]]:
    """For each row of ratios such alphas, [rows][points], descending; [1.0] where nothing can be selected."""
    counts = [int(profile.counts[1:].sum()) for profile in profiles]
    return alphas_of(ratios, profiles, [np.logspace(-math.log10(n or 1), math.log10(MOST), points) for n in counts])


def alphas_of(
    ratios: Ratios, profiles: Sequence[SelectionProfile], shares: Sequence[Sequence[float] | np.ndarray]
) -> list[list[float]]:
    """The alphas that select these shares of what can be selected: [rows][shares] -> [rows][shares], or [1.0].

    The profile says how many elements there are to select. Its bins are too wide where all ratios of a row are alike,
    so that the alphas themselves are exact: ratios of the row, found as `adaptive_alpha` finds its percentile.
    """
    ranks = np.zeros((len(profiles), len(shares[0]) if shares else 0), dtype=np.int64)
    for row, profile, its in zip(ranks, profiles, shares, strict=True):
        if selectable := int(profile.counts[1:].sum()):
            above = np.minimum((np.asarray(its) * selectable + 1e-9).astype(np.int64), selectable - 1)
            row[:] = int(profile.counts[0]) + selectable - 1 - above
    grids = ratios.smallest(ranks).tolist()
    return [grid if profile.counts[1:].any() else [1.0] for profile, grid in zip(profiles, grids, strict=True)]


def alpha_above(profile: SelectionProfile) -> float:
    """An alpha that selects nothing: from the bin above all ratios, at least 1; infinite where no finite one does."""
    filled = np.flatnonzero(profile.counts)
    edge = int(filled[-1]) + 2 if len(filled) else 0
    return math.inf if profile.always or edge >= len(profile.counts) else max(1.0, float(profile.alphas[edge]))


def ranks_of_plan(compiled: Plan) -> Ranks | None:
    """The ranks that its models are spread over, which tune together; None where there are none."""
    return None if compiled.spread is None else compiled.spread.ranks


def left_alone(compiled: Plan, profiles: Profiles, evaluate: Evaluate) -> dict[str, list[TriedPoint]]:
    """The first point of each node: as it is, with an alpha that selects nothing."""
    if isinstance(evaluate, Score):
        with together(ranks_of_plan(compiled)):
            evaluate.begin(compiled.models)
    return {
        name: [TriedPoint(alpha_above(profile), 1.0, 0, 0.0, score_of(compiled, evaluate, name))]
        for name, profile in profiles.items()
    }


def score_of(compiled: Plan, evaluate: Evaluate, name: str) -> float:
    """What `evaluate` says of a node; the same on all ranks that its model is spread over: the mean where they differ.

    Raises:
        ArgumentError: no number, or NaN.

    """
    ranks = ranks_of_plan(compiled)
    with together(ranks):
        score = _number(name, evaluate(name, compiled.models[name]))
    if ranks is None:
        return score
    every = ranks.gather(score)
    return score if len(set(every)) == 1 else sum(every) / len(every)


def _number(name: str, score: object) -> float:
    if isinstance(score, torch.Tensor) and score.numel() == 1:
        score = score.item()
    try:
        number = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"evaluate({name!r}, …) gave a {type(score).__name__}, expected a number") from None
    if math.isnan(number):
        raise ArgumentError(f"evaluate({name!r}, …) gave NaN, which no score compares with")
    return number


def watched(steps: Sequence[int], progress: bool) -> Iterable[int]:
    """The steps, with a progress bar if one is wanted."""
    if not progress:
        return steps
    from rich.progress import track

    return track(steps, description="Tuning")
