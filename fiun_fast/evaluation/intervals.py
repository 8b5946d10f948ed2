"""A measured number with its interval, and how intervals come about: scipy's bootstrap, or Wilson's for plain shares.

scipy and scikit-learn are imported when they are needed, and are an extra of the package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MissingPackageError

LEVEL = 0.95  # confidence of all intervals
RESAMPLES = 1000
_AT_ONCE = 2**21  # numbers of one batch of resamples


def library(name: str) -> Any:
    """A module of scipy or scikit-learn.

    Raises:
        MissingPackageError: it is not installed.

    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"fiun_fast.evaluation needs {error.name}: pip install 'fiun_fast[evaluation]'"
        ) from error


@dataclass(frozen=True)
class Estimate:
    """A number, and the ends of its 95 % confidence interval; NaN where one sample says nothing about spread."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(true: Any) -> Estimate:
    """The share of what is true in [n] bool, with Wilson's score interval, which also holds at 0 and at n of n."""
    true = np.asarray(true, dtype=bool)
    count = library("scipy.stats").binomtest(int(true.sum()), len(true))
    interval = count.proportion_ci(LEVEL, method="wilson")
    return Estimate(float(true.mean()), float(interval.low), float(interval.high))


def bootstrapped(statistic: Callable[..., Any], *sizes: int, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """A statistic of samples with the percentile interval of the bootstrap.

    Args:
        statistic: takes an array of rows [..., n] for each set of samples, and returns [...].
        sizes: the sets' sizes; each is resampled by itself, with replacement.
        resamples: how many.
        seed: of the draws.

    """
    rows = [np.arange(size) for size in sizes]
    value = float(statistic(*rows))
    if min(sizes) < 2:
        return Estimate(value)
    found = (
        library("scipy.stats")
        .bootstrap(
            rows,
            lambda *drawn, axis: statistic(*drawn),
            n_resamples=resamples,
            batch=max(1, _AT_ONCE // max(sizes)),
            vectorized=True,
            axis=-1,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return Estimate(value, float(found.low), float(found.high))


def mean(values: Any, *, seed: int = 0) -> Estimate:
    """The mean of [n] numbers, bootstrapped over them."""
    values = np.asarray(values, dtype=np.float64)
    return bootstrapped(lambda rows: values[rows].mean(-1), len(values), seed=seed)
