"""What the features still know: classifiers fitted anew on what goes into the last layer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..errors import EstimationError
from ..estimators.reading import Forward
from .intervals import Estimate, library, share
from .outputs import Answers, Data, answers


@dataclass(frozen=True)
class Probe:
    """Accuracy of two classifiers on features of samples that neither was fitted on.

    Attributes:
        linear: of logistic regression, on the forgotten data; nearest_mean: of the nearest class mean.
        linear_rest, nearest_mean_rest: the same on retained data.

    """

    linear: Estimate
    nearest_mean: Estimate
    linear_rest: Estimate
    nearest_mean_rest: Estimate


def probe(
    model: nn.Module,
    *,
    forget: Data,
    retain: Data,
    layer: nn.Module | None = None,
    forward_fn: Forward | None = None,
    seed: int = 0,
) -> Probe:
    """Fit a linear classifier on the model's features, forgotten data included: what it finds has not left the body.

    A random half of forget and retain is fitted on, the other half judged. Logistic regression (L2, C = 1) on features
    standardised over the first half; the nearest class mean on the features as they are. A retrained model's figure is
    what to compare with: features learned without a class separate it too. Source: linear probes, arXiv 1610.01644;
    for unlearning, arXiv 2402.16835 among others. Wilson's intervals, of the judged half.

    Args:
        model: a classifier, [B, C].
        forget: the data that was to be forgotten.
        retain: the rest of the training data, or enough of it.
        layer: whose input the features are; None: the last layer (`ff.last_layer`).
        forward_fn: as for `ff.estimate_fisher`.
        seed: of the halves.

    Raises:
        EstimationError: as `answers`, naming the set; fewer than two samples in a set; fewer than two classes.
        MissingPackageError: without scikit-learn.

    """
    sets = {"forget": forget, "retain": retain}
    found = {
        what: answers(model, data, features=True, layer=layer, what=what, forward_fn=forward_fn)
        for what, data in sets.items()
    }
    return probe_of(found["forget"], found["retain"], seed=seed)


def probe_of(forget: Answers, retain: Answers, *, seed: int = 0) -> Probe:
    """`probe` of answers with features."""
    dice = np.random.default_rng(seed)
    fitted, judged = [], []
    for what, one in (("forget", forget), ("retain", retain)):
        if len(one) < 2:
            raise EstimationError(f"{what} has one sample, expected two at the least: to fit on, and to judge")
        rows = dice.permutation(len(one))
        fitted.append(one.take(rows[: len(rows) // 2]))
        judged.append(one.take(rows[len(rows) // 2 :]))
    x, y = (torch.cat([getattr(one, of) for one in fitted]).numpy() for of in ("features", "labels"))
    if len(np.unique(y)) < 2:
        raise EstimationError("forget and retain hold one class, and a probe tells classes apart: two are needed")
    linear = library("sklearn.pipeline").make_pipeline(
        library("sklearn.preprocessing").StandardScaler(),
        library("sklearn.linear_model").LogisticRegression(max_iter=1000),
    )
    nearest = library("sklearn.neighbors").NearestCentroid()
    with warnings.catch_warnings():  # of features that are dead in every class; no mean is shrunk by their deviation
        warnings.filterwarnings("ignore", r"self\.within_class_std_dev_ has at least 1 zero", UserWarning)
        nearest.fit(x, y)
    figures = []
    for judge in (linear.fit(x, y), nearest):
        figures.append([share(judge.predict(one.features.numpy()) == one.labels.numpy()) for one in judged])  # type: ignore[union-attr]
    (forgotten, rest), (near_forgotten, near_rest) = figures
    return Probe(forgotten, near_forgotten, rest, near_rest)
