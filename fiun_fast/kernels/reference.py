"""The executable specification: plain torch, one operation at a time, on any device. Slow on purpose, and obvious.

docs/semantics.md states the same rules in formulas. Every other backend is tested against this one, bit for bit where
the contract says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .table import BINS, DampenTable

name = "reference"


def why_not(device_type: str) -> str | None:
    """Nothing stands in the way of plain torch."""
    return None


def merge_elements(sources: Sequence[torch.Tensor], weights: Sequence[float], how: str, scale: float) -> torch.Tensor:
    """m = scale * reduce_k (w_k F_k), element by element; a NaN in any F_k makes m NaN. Inputs: [n] each, one dtype."""
    terms = [f if w == 1 else f * w for f, w in zip(sources, weights, strict=True)]
    merged = terms[0]
    for term in terms[1:]:
        merged = torch.maximum(merged, term) if how == "max" else merged + term
    if how == "mean" and len(terms) > 1:
        merged = merged / len(terms)
    return merged if scale == 1 else merged * scale


def dampen_elements(
    theta: torch.Tensor,  # [n] fp32, fp64, bf16 or fp16
    original: torch.Tensor,  # [n] fp32 or fp64
    merged: torch.Tensor,  # [n] like original
    alpha: float,
    lam: float,
    exponent: float,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Textbook chain of SSD (arXiv 2308.07707) and FIUn (arXiv 2408.08493).

    Returns: the dampened theta [n], to be used only where selected, and the selection [n], bool.
    """
    selected = merged > original * alpha
    factor = original * lam / merged
    if exponent != 1:
        factor = (factor**exponent).masked_fill(original == 0, 0)
    factor = factor.clamp(max=cap).masked_fill(merged.isinf(), 0)
    if theta.dtype in (torch.float16, torch.bfloat16):
        factor = factor.float()  # half precision is computed in fp32 and rounded once, whatever the Fisher's dtype
    return (theta * factor).to(theta.dtype), selected


def dampen(table: DampenTable) -> Callable[[bool], None]:
    """Prepare a launch: the returned function dampens every node of the table, or with dry_run only counts."""

    def launch(dry_run: bool) -> None:
        table.counts.zero_()
        for group in table.groups:
            for s, numel in enumerate(group.numels.tolist()):
                forgets = [f[o : o + numel] for f, o in zip(group.forgets, group.forget_offsets[:, s], strict=True)]
                merged = merge_elements(forgets, group.weights, table.merge, table.scale)
                at = int(group.original_offsets[s])
                for parameters, fisher, slot in zip(group.thetas, group.originals, group.slots.tolist(), strict=True):
                    theta, original = parameters[s].detach().view(-1), fisher[at : at + numel]
                    new, selected = dampen_elements(
                        theta, original, merged, table.alpha[slot], table.lam[slot], table.exponent, table.cap
                    )
                    finite = merged.isfinite() & original.isfinite()
                    table.counts[slot] += torch.stack([selected.sum(), (selected & (new == 0)).sum(), (~finite).sum()])
                    if not dry_run:
                        theta.copy_(torch.where(selected, new, theta))

    return launch


def merge(sources: Sequence[torch.Tensor], weights: Sequence[float], how: str, scale: float, out: torch.Tensor) -> None:
    """Write m = scale * reduce_k (w_k F_k) to `out`; all are flat [n], contiguous, of one dtype and device."""
    out.copy_(merge_elements(sources, weights, how, scale))


def accumulate(gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor], power: int, zero: bool) -> None:
    """For each pair: into += |g| (power 1) or g^2 (power 2), in the accumulator's dtype; with `zero`, g becomes 0."""
    for gradient, total in zip(gradients, into, strict=True):
        g = gradient.reshape(-1).to(total.dtype)
        total += g.abs() if power == 1 else g * g
        if zero:
            gradient.zero_()


def ratio_bins(original: torch.Tensor, merged: torch.Tensor, base: int, low: int, nearest: bool) -> torch.Tensor:
    """Bins of those ratios m / I that have one: int64, [n] or shorter; both inputs [n], fp32 or fp64.

    A bin is the ratio's bits (which, read as an integer, ascend with the ratio) above the lowest `low`, less `base`.
    NaN (0 / 0 among them) has no bin. Bins below 0 or from BINS on are left out, or with `nearest` moved to that end.
    """
    ratio = merged / original
    bits = ratio[ratio >= 0].abs().view(torch.int32 if ratio.dtype == torch.float32 else torch.int64).long()
    bins = (bits >> low) - base
    return bins.clamp(0, BINS - 1) if nearest else bins[(bins >= 0) & (bins < BINS)]


def histogram(table: DampenTable) -> Callable[[np.ndarray, int, bool, torch.Tensor], None]:
    """Prepare a count of the ratios m / I of every node: launch(bases, low, nearest, counts).

    bases: [slots] int64, `base` of each slot; counts: [slots, BINS] int64, contiguous, on the table's device,
    overwritten. Parameters are not touched.
    """

    def launch(bases: np.ndarray, low: int, nearest: bool, counts: torch.Tensor) -> None:
        counts.zero_()
        for group in table.groups:
            for s, numel in enumerate(group.numels.tolist()):
                forgets = [f[o : o + numel] for f, o in zip(group.forgets, group.forget_offsets[:, s], strict=True)]
                merged = merge_elements(forgets, group.weights, table.merge, table.scale)
                at = int(group.original_offsets[s])
                for fisher, slot in zip(group.originals, group.slots.tolist(), strict=True):
                    bins = ratio_bins(fisher[at : at + numel], merged, int(bases[slot]), low, nearest)
                    counts[slot] += torch.bincount(bins, minlength=BINS)

    return launch


def outer_square_accumulate(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
    """into += sum_b (sum_t left_bgmt right_bgkt)^2: the squared per-sample gradients of a linear layer, summed.

    Args:
        left: [B, G, M, T], any strides; dtype and device of `into`.
        right: [B, G, K, T], the same.
        into: flat [G * M * K], contiguous, fp32 or fp64.

    """
    for one, other in zip(left, right, strict=True):
        into += torch.einsum("gmt,gkt->gmk", one, other).square().reshape(-1)
