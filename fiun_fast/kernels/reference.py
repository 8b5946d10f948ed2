"""The executable specification: plain torch, one operation at a time, on any device. Slow on purpose, and obvious.

docs/semantics.md states the same rules in formulas. Every other backend is tested against this one, bit for bit where
the contract says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..guards import denormals_kept
from .interface import Backend, Histogram, Launch
from .table import BINS, Dampening, Group, Merging, Table


def merge_elements(sources: Sequence[torch.Tensor], weights: Sequence[float], merging: Merging) -> torch.Tensor:
    """m = scale * reduce_k (w_k F_k), element by element; a NaN in any F_k makes m NaN. Inputs: [n] each, one dtype."""
    terms = [f if w == 1 else f * w for f, w in zip(sources, weights, strict=True)]
    merged = terms[0]
    for term in terms[1:]:
        merged = torch.maximum(merged, term) if merging.how == "max" else merged + term
    if merging.how == "mean" and len(terms) > 1:
        merged = merged / len(terms)
    return merged if merging.scale == 1 else merged * merging.scale


def opposed(gradient: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Where g * theta < 0, [n] bool: signs differ, and neither is 0 or NaN. No product, which could underflow to 0."""
    return ((gradient < 0) & (theta > 0)) | ((gradient > 0) & (theta < 0))


def merged_gradient(group: Group, s: int, start: int = 0, stop: int | None = None) -> torch.Tensor | None:
    """g = sum_k (w_k g_k) of elements start..stop of segment s, in the order of the sources; None: unsigned."""
    if group.gradients is None:
        return None
    return merge_elements(group.gradient(s, start, stop), group.weights, Merging("sum"))


def not_finite(original: torch.Tensor, merged: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    """Where m, I or, if there is one, g is NaN or infinite, [n] bool."""
    finite = merged.isfinite() & original.isfinite()
    return ~finite if gradient is None else ~(finite & gradient.isfinite())


def dampen_elements(
    theta: torch.Tensor,  # [n] fp32, fp64, bf16 or fp16
    original: torch.Tensor,  # [n] fp32 or fp64
    merged: torch.Tensor,  # [n] like original
    alpha: float,
    lam: float,
    exponent: float,
    cap: float,
    gradient: torch.Tensor | None = None,  # [n] like original; None: unsigned
) -> tuple[torch.Tensor, torch.Tensor]:
    """Textbook chain of SSD (arXiv 2308.07707) and FIUn (arXiv 2408.08493), with the sign asked for if there is one.

    Returns: the dampened theta [n], to be used only where selected, and the selection [n], bool.
    """
    selected = merged > original * alpha
    if gradient is not None:
        selected &= opposed(gradient, theta)
    factor = original * lam / merged
    if exponent != 1:
        factor = (factor**exponent).masked_fill(original == 0, 0)
    factor = factor.clamp(max=cap).masked_fill(merged.isinf(), 0)
    if theta.dtype in (torch.float16, torch.bfloat16):
        factor = factor.float()  # half precision is computed in fp32 and rounded once, whatever the Fisher's dtype
    return (theta * factor).to(theta.dtype), selected


def ratio_bins(original: torch.Tensor, merged: torch.Tensor, base: int, low: int, nearest: bool) -> torch.Tensor:
    """Bins of those ratios m / I that have one: int64, [n] or shorter; both inputs [n], fp32 or fp64.

    A bin is the ratio's bits (which, read as an integer, ascend with the ratio) above the lowest `low`, less `base`.
    NaN (0 / 0 among them) has no bin. Bins below 0 or from BINS on are left out, or with `nearest` moved to that end.
    """
    ratio = merged / original
    bits = ratio[ratio >= 0].abs().view(torch.int32 if ratio.dtype == torch.float32 else torch.int64).long()
    bins = (bits >> low) - base
    return bins.clamp(0, BINS - 1) if nearest else bins[(bins >= 0) & (bins < BINS)]


class _Dampening(Launch):
    def __init__(self, table: Table, merging: Merging, dampening: Dampening) -> None:
        self._table, self._merging, self._dampening = table, merging, dampening

    @denormals_kept()
    def run(self, counts: torch.Tensor, dry_run: bool = False) -> None:
        how = self._dampening
        for group in self._table.groups:
            for s in range(len(group.numels)):
                merged = merge_elements(group.forget(s), group.weights, self._merging)
                gradient = merged_gradient(group, s)
                for n, node in enumerate(group.nodes.tolist()):
                    theta, original = group.theta(n, s), group.original(n, s)
                    new, selected = dampen_elements(
                        theta, original, merged, how.alpha[node], how.lam[node], how.exponent, how.cap, gradient
                    )
                    nonfinite = not_finite(original, merged, gradient)
                    counts[node] += torch.stack([selected.sum(), (selected & (new == 0)).sum(), nonfinite.sum()])
                    if not dry_run:
                        with torch.inference_mode() if theta.is_inference() else torch.no_grad():
                            theta.copy_(torch.where(selected, new, theta))


class _Histogram(Histogram):
    def __init__(self, table: Table, merging: Merging) -> None:
        self._table, self._merging = table, merging

    @denormals_kept()
    def run(self, counts: torch.Tensor, bases: np.ndarray, low: int, nearest: bool) -> None:
        for group in self._table.groups:
            for s in range(len(group.numels)):
                merged = merge_elements(group.forget(s), group.weights, self._merging)
                gradient = merged_gradient(group, s)
                for n, node in enumerate(group.nodes.tolist()):
                    original, its = group.original(n, s), merged
                    if gradient is not None:
                        here = opposed(gradient, group.theta(n, s))
                        original, its = original[here], merged[here]
                    bins = ratio_bins(original, its, int(bases[node]), low, nearest)
                    counts[node] += torch.bincount(bins, minlength=BINS)


class ReferenceBackend(Backend):
    """Plain torch."""

    name = "reference"

    def why_not(self, device_type: str) -> str | None:
        """Nothing stands in the way of plain torch."""
        return None

    def dampen(self, table: Table, merging: Merging, dampening: Dampening) -> Launch:
        """Parameter by parameter."""
        return _Dampening(table, merging, dampening)

    def histogram(self, table: Table, merging: Merging) -> Histogram:
        """Parameter by parameter, by bincount."""
        return _Histogram(table, merging)

    @denormals_kept()
    def merge(
        self, sources: Sequence[torch.Tensor], weights: Sequence[float], merging: Merging, out: torch.Tensor
    ) -> None:
        """One operation per source."""
        out.copy_(merge_elements(sources, weights, merging))

    @denormals_kept()
    def accumulate(
        self, gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor], power: int, zero: bool
    ) -> None:
        """One gradient after another."""
        for gradient, total in zip(gradients, into, strict=True):
            g = gradient.reshape(-1).to(total.dtype)
            total += g.abs() if power == 1 else g * g
            if zero:
                gradient.zero_()

    @denormals_kept()
    def outer_square_accumulate(self, left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
        """One sample after another."""
        for one, other in zip(left, right, strict=True):
            into += torch.einsum("gmt,gkt->gmk", one, other).square().reshape(-1)


BACKEND = ReferenceBackend()
