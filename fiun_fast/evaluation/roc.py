"""How well scores tell members from non-members: area under the ROC curve, and hits at few false alarms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..arguments import check_fraction
from .intervals import RESAMPLES, Estimate, bootstrapped, library


@dataclass(frozen=True, eq=False)
class Attack:
    """What an attack that gives scores achieves; nothing is learned from scores where `auc` is 0.5.

    Attributes:
        auc: probability that a member scores higher than a non-member, ties counting half.
        tpr: share of the members that are found where at most `fpr` of the non-members are taken for members.
        fpr: see there.
        members, others: the scores.

    """

    auc: Estimate
    tpr: Estimate
    fpr: float
    members: np.ndarray
    others: np.ndarray

    def __str__(self) -> str:
        return f"AUC {self.auc}, TPR {self.tpr} at {self.fpr:.2g} FPR"


def auc(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of scores [..., n] and [..., m]: [...]; ties count half."""
    n, m = members.shape[-1], others.shape[-1]
    ranks = library("scipy.stats").rankdata(np.concatenate([members, others], -1), axis=-1)
    return (ranks[..., :n].sum(-1) - n * (n + 1) / 2) / (n * m)


def tpr_at(members: np.ndarray, others: np.ndarray, fpr: float) -> np.ndarray:
    """Share of the members [..., n] above the lowest threshold that at most `fpr` of the others [..., m] exceed."""
    m = others.shape[-1]
    allowed = min(int(fpr * m + 1e-9), m - 1)
    threshold = -np.partition(-others, allowed, axis=-1)[..., allowed]
    return (members > threshold[..., None]).mean(-1)


def attack(members: np.ndarray, others: np.ndarray, fpr: float, seed: int = 0) -> Attack:
    """Both figures of scores [n] and [m], bootstrapped over members and others."""
    check_fraction("fpr", fpr, "a share of false alarms in (0, 1]")
    figures: tuple[Callable[..., np.ndarray], ...] = (auc, lambda a, b: tpr_at(a, b, fpr))

    def of(figure: Callable[..., np.ndarray]) -> Estimate:
        return bootstrapped(lambda i, j: figure(members[i], others[j]), len(members), len(others), seed=seed)

    return Attack(of(figures[0]), of(figures[1]), fpr, members, others)


def clustered_attack(scores: np.ndarray, member: np.ndarray, fpr: float, seed: int = 0) -> Attack:
    """Both figures of scores [S, n] that were given in S independent trials, bootstrapped over the trials.

    Args:
        scores: of every sample in every trial.
        member: which are members, bool of the same shape.
        fpr: false alarms allowed.
        seed: of the bootstrap.

    """
    check_fraction("fpr", fpr, "a share of false alarms in (0, 1]")
    trial = np.broadcast_to(np.arange(len(scores))[:, None], scores.shape).ravel()
    values, place = np.unique(scores.ravel(), return_inverse=True)
    inside = member.ravel()

    def curve(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Members and others at each value, in ascending order, as often as their trial was drawn."""
        weight = np.bincount(rows, minlength=len(scores))[trial].astype(np.float64)
        return tuple(np.bincount(place, weight * of, len(values)) for of in (inside, ~inside))  # type: ignore[return-value]

    def area(rows: np.ndarray) -> float:
        members, others = curve(rows)
        return (members * (others.cumsum() - others / 2)).sum() / (members.sum() * others.sum())

    def hits(rows: np.ndarray) -> float:
        members, others = (of[::-1].cumsum() for of in curve(rows))
        allowed = members[others <= fpr * others[-1] + 1e-9]
        return allowed.max(initial=0.0) / members[-1]

    def of(figure: Callable[[np.ndarray], float]) -> Estimate:
        each = lambda rows: np.apply_along_axis(figure, -1, rows)  # noqa: E731
        return bootstrapped(each, len(scores), resamples=RESAMPLES // 4, seed=seed)

    return Attack(of(area), of(hits), fpr, scores[member], scores[~member])
