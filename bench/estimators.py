"""Why the estimators forget differently: how far F / I reaches in the demo's chain of models, head only, seed 0.

python bench/estimators.py              prints a table and writes bench/results/estimators.json
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

from fiun_fast.demo.data import load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.networks import grow, incremental
from fiun_fast.demo.record import environment

ESTIMATORS = ("batch", "sample", "expected", "label_free")
TARGET = Path(__file__).parent / "results" / "estimators.json"


def main() -> None:
    """Each class at its origin: the largest F / I, its upper hundredth, and the share of elements with F > I."""
    torch.set_num_threads(1)
    digits = load_digits(0)
    recipe = incremental(digits, 0)
    models = grow(recipe)
    rows = []
    for estimator in ESTIMATORS:
        network = Network(recipe, digits, models, "last-layer", estimator)
        for label, origin in recipe.origin.items():
            data = recipe.data(origin)
            own = network.originals[origin].buffer
            ratio = network._forget_fisher(label).buffer / own
            ratio = ratio[ratio.isfinite()]
            rows.append(
                {
                    "estimator": estimator,
                    "class": label,
                    "origin": origin,
                    "share_of_data": float((data.labels == label).float().mean()),
                    "largest": float(ratio.max()),
                    "upper_hundredth": float(ratio.quantile(0.99)),
                    "above_one": float((ratio > 1).float().mean()),
                }
            )
    print(f"{'estimator':12} {'F / I, largest':>16} {'upper 1 %':>10} {'F > I':>7}   medians over the classes")
    for estimator in ESTIMATORS:
        of = [row for row in rows if row["estimator"] == estimator]
        largest, upper, above = (
            statistics.median(float(row[key]) for row in of) for key in ("largest", "upper_hundredth", "above_one")
        )
        print(f"{estimator:12} {largest:16.1f} {upper:10.1f} {above:7.1%}")
    TARGET.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
