"""Adaptive alpha as the ASSD scripts compute it (arXiv 2402.10098): a percentile of all finite ratios F / I."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

import fiun_fast as ff


def ratio_percentile(original: Mapping[str, Tensor], forget: Mapping[str, Tensor], q: float) -> float:
    """numpy.percentile(R, q), R the finite ratios F / I over all parameters together, in the importances' dtype.

    Raises:
        ArgumentError: no ratio is finite.

    """
    ratios = []
    for name, i in original.items():
        ratio = forget[name].to(i.device).div(i)
        ratios.append(ratio[ratio.isfinite()].reshape(-1))
    every = torch.cat([r.cpu().float() if r.itemsize == 2 else r.cpu() for r in ratios])
    if every.numel() == 0:
        raise ff.ArgumentError("no finite ratio F / I: there is no percentile to take for alpha")
    return float(np.percentile(every.numpy(), q))
