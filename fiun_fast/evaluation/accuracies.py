"""Accuracies on what is to be forgotten, to be kept and was never seen; and how close to a retrained model's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from ..errors import ArgumentError
from ..estimators.reading import Forward
from .intervals import Estimate, bootstrapped, share
from .outputs import Answers, Data, answers, check_again


@dataclass(frozen=True)
class Accuracies:
    """Shares of right answers, 0..1; None where the set was not given."""

    forget: Estimate | None = None
    retain: Estimate | None = None
    test: Estimate | None = None


def accuracies(
    model: nn.Module,
    *,
    forget: Data | None = None,
    retain: Data | None = None,
    test: Data | None = None,
    forward_fn: Forward | None = None,
) -> Accuracies:
    """Accuracy on each of the sets that are given, with Wilson's score interval.

    Args:
        model: a classifier, [B, C].
        forget: the data that was to be forgotten.
        retain: the rest of the training data.
        test: data that was never trained on.
        forward_fn: as for `ff.estimate_fisher`.

    Raises:
        ArgumentError: no set is given.
        EstimationError: as `answers`, naming the set.

    """
    given = {"forget": forget, "retain": retain, "test": test}
    if all(data is None for data in given.values()):
        raise ArgumentError("no data: pass forget=, retain= or test=")
    found = {
        name: share(answers(model, data, what=name, forward_fn=forward_fn).right)
        for name, data in given.items()
        if data is not None
    }
    return Accuracies(**found)


def tow(
    model: nn.Module,
    retrained: nn.Module,
    *,
    forget: Data,
    retain: Data,
    test: Data,
    forward_fn: Forward | None = None,
    seed: int = 0,
) -> Estimate:
    """Tug-of-war: prod over forget, retain, test of (1 - |accuracy - accuracy of the retrained model|).

    1 for a model whose accuracies are those of the retrained one, 0 for one that is wrong about everything in one set.
    Source: RUM, arXiv 2406.01257, its ToW. The interval is bootstrapped over the samples of each set, the two models'
    answers to a sample staying together.

    Args:
        model: the one that was made to forget.
        retrained: trained without the forgotten data.
        forget, retain, test: as for `accuracies`; loaders, since two models go over them.
        forward_fn: as for `ff.estimate_fisher`.
        seed: of the bootstrap.

    Raises:
        EstimationError: as `answers`, naming the set.

    """
    sets = {"forget": forget, "retain": retain, "test": test}
    for name, data in sets.items():
        check_again(name, data)
    return tow_of(
        *(
            [answers(one, data, what=name, forward_fn=forward_fn) for name, data in sets.items()]
            for one in (model, retrained)
        ),
        seed=seed,
    )


def tow_of(own: list[Answers], retrained: list[Answers], *, seed: int = 0) -> Estimate:
    """`tow` of what two models answered, set by set in the same order."""
    pairs = [(a.right.astype(float), b.right.astype(float)) for a, b in zip(own, retrained, strict=True)]
    for a, b in pairs:
        if len(a) != len(b):
            raise ArgumentError(f"{len(a)} answers of one model and {len(b)} of the other: the sets are not the same")

    def statistic(*rows: np.ndarray) -> np.ndarray:
        differences = [np.abs(a[of].mean(-1) - b[of].mean(-1)) for of, (a, b) in zip(rows, pairs, strict=True)]
        return np.prod([1 - d for d in differences], axis=0)

    return bootstrapped(statistic, *(len(a) for a, _ in pairs), seed=seed)
