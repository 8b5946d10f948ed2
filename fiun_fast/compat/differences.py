"""What `mode="strict"` and `mode="corrected"` do where SSD's published class is surprising."""

from __future__ import annotations

from typing import NamedTuple


class Difference(NamedTuple):
    """One point: what the published class does, and what each mode does."""

    topic: str
    published: str
    strict: str
    corrected: str


SAME = "the same"

DIFFERENCES = (
    Difference("model's train/eval mode", "as the caller left it", SAME, "eval mode; put back afterwards"),
    Difference("BatchNorm statistics, random state", "change in train mode", SAME, "as before"),
    Difference("gradients afterwards", "those of the last batch", SAME, "as before"),
    Difference(
        "gradients of parameters that the optimiser does not hold",
        "pile up from batch to batch",
        SAME,
        "cleared each batch",
    ),
    Difference(
        "half-precision parameters",
        "summed and compared in half precision",
        "the same, tensor by tensor in torch",
        "importances in float32; the product is rounded once",
    ),
    Difference("frozen parameters", "zeros in the dict", SAME, "not in the dict, unless named in train_layer"),
    Difference("frozen integer parameters (quantised)", "an error", "not in the dict", "not in the dict"),
    Difference("train_layer (FIUn)", "freezes the others for good", "freezes them meanwhile", "freezes them meanwhile"),
    Difference("importances and parameters", "matched by position", "matched by name", "matched by name"),
    Difference("importances on another device", "an error", "moved", "moved"),
    Difference("negative importances", "used", "an error", "an error"),
    Difference("exponent 0 where the original importance is 0", "factor 1", "factor 0", "factor 0"),
    Difference("infinite forget importance, λI overflows", "NaN", "factor 0", "factor 0"),
    Difference(
        "exponent other than 1",
        "torch.pow",
        "torch.pow (backend reference)",
        "the backend's pow, a few ulp from it",
    ),
    Difference(
        "adaptive percentile (ASSD)",
        "numpy, over a copy of all ratios",
        SAME,
        "ff.adaptive_alpha: no copy, interpolated in float64",
    ),
    Difference("loader without a length", "an error", "batches are counted", "batches are counted"),
    Difference("batches without a sample, or without a label that counts", "count", "left out", "left out"),
    Difference("a batch whose loss is not finite", "every importance NaN", "an error", "an error"),
    Difference("dicts given to merge (MFIM)", "the first is overwritten", "none is changed", "none is changed"),
    Difference("output", "prints its parameters", "silent", "silent"),
)


class Differences(tuple):
    """The points, as named tuples; prints as a table."""

    def __str__(self) -> str:
        head = Difference("", "published class", 'mode="strict"', 'mode="corrected"')
        widths = [max(len(row[i]) for row in (head, *self)) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (head, *self)]
        lines.insert(1, "─" * (sum(widths) + 6))
        return "\n".join(line.rstrip() for line in lines)


def differences() -> Differences:
    """What differs from SSD's published class in each mode; `print(differences())` shows a table."""
    return Differences(DIFFERENCES)
