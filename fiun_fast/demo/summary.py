"""What many cases come to: means over all (request, node) pairs, and the share that is within the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from .experiment import Case

LEFT, LOST = 0.01, 0.02  # a pair is within: at most 1 % accuracy left on the forgotten, 2 points lost on the rest


@dataclass(frozen=True)
class Summary:
    """Shares (0..1) over `pairs` = nodes reached, each once for every request."""

    scenario: str
    request: str
    pairs: int
    within: float
    forgotten_before: float
    forgotten_left: float
    rest_before: float
    rest_lost: float


def summarise(scenario: str, request: str, cases: Sequence[Case], *, merged_only: bool = False) -> Summary:
    """Over every reached node; with `merged_only`, over nodes that more than one request reaches."""
    rows = [row for case in cases for row in case.touched if not merged_only or len(row.forget) > 1]
    lost = [row.before[1] - row.after[1] for row in rows]
    return Summary(
        scenario,
        request,
        pairs=len(rows),
        within=mean(row.after[0] <= LEFT and fall <= LOST for row, fall in zip(rows, lost, strict=True)),
        forgotten_before=mean(row.before[0] for row in rows),
        forgotten_left=mean(row.after[0] for row in rows),
        rest_before=mean(row.before[1] for row in rows),
        rest_lost=mean(lost),
    )
