"""Adaptive alpha as the ASSD scripts compute it (arXiv 2402.10098): a percentile of all finite ratios F / I."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

import fiun_fast as ff

from .importances import as_fisher

LOWEST = 100 - math.log(101)  # ASSD's q for a share of 1; below it no share stands for q


def published(original: Mapping[str, Tensor], forget: Mapping[str, Tensor], q: float) -> float:
    """numpy.percentile(R, q) over a copy of R, the finite ratios of all parameters, in the importances' dtype.

    Raises:
        ArgumentError: no ratio is finite.

    """
    ratios = []
    for name, i in original.items():
        ratio = forget[name].to(i.device).div(i)
        ratios.append(ratio[ratio.isfinite()].reshape(-1).cpu())
    every = torch.cat([r.float() if r.itemsize == 2 else r for r in ratios])
    if every.numel() == 0:
        raise ff.ArgumentError("no finite ratio F / I: there is no percentile to take for alpha")
    return float(np.percentile(every.numpy(), q))


def streamed(
    original: Mapping[str, Tensor], forget: Mapping[str, Tensor], q: float, backend: str | None = None
) -> float:
    """The same by `ff.adaptive_alpha`, without a copy of R and interpolated in float64, where q stands for a share."""
    devices = {value.device for values in (original, forget) for value in values.values()}
    if not LOWEST <= q < 100 or len(devices) > 1:
        return published(original, forget, q)
    share = math.expm1(100 - q) / 100
    return ff.adaptive_alpha(as_fisher(original), as_fisher(forget), min(share, 1.0), backend=backend)
