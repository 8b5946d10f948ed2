"""Why the estimators forget differently: the demo's chain of models, its head, each class alone, seeds 0 to 2.

    python bench/estimators.py              prints a table and writes bench/results/estimators.json

How far F / I reaches at the origin; and how many (class, model) pairs are forgotten, at most 2 % left and 2 points lost
on test data, where alpha alone is chosen (lambda = 1) and where lambda is chosen as well, on validation data.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median

import torch

import fiun_fast as ff
from fiun_fast.bench.files import environment, markdown, write_json
from fiun_fast.demo.data import load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.networks import grow, incremental
from fiun_fast.tuning import tune_plan

ESTIMATORS = ("batch", "sample", "expected", "label_free")
LAMBDAS = {"lambda = 1": (1.0,), "lambda chosen": (1.0, 0.1, 0.01)}
SEEDS, ALPHAS, ENOUGH = (0, 1, 2), 60, 0.02
TARGET = Path(__file__).parent / "results" / "estimators.json"


def study(seed: int) -> tuple[list[dict], list[dict]]:
    """Ratios at the origin, and what is left and lost of each pair, of every estimator."""
    digits, ratios, pairs = load_digits(seed), [], []
    recipe = incremental(digits, seed)
    models = grow(recipe)
    for estimator in ESTIMATORS:
        network = Network(recipe, digits, models, "last-layer", estimator)
        for label, origin in recipe.origin.items():
            request, of = network.request(label), {"seed": seed, "estimator": estimator, "class": label}
            ratio = request.fisher.buffer / network.originals[origin].buffer
            share = float((recipe.data(origin).labels == label).float().mean())
            largest = float(ratio[ratio.isfinite()].max())
            ratios.append(of | {"origin": origin, "share_of_data": share, "largest": largest})
            reached = recipe.reached([label])
            plan = ff.plan(network.dag, [request], alpha=0.0)
            before = {node: network.accuracy(node, [label])[1] for node in reached}
            for rule, lams in LAMBDAS.items():
                plan.set_values_(tune_plan(plan, network.score([label]), points=ALPHAS, lams=lams))
                plan.run_()
                for node in reached:
                    left, rest = network.accuracy(node, [label])
                    pairs.append(of | {"node": node, "rule": rule, "left": left, "lost": before[node] - rest})
                network.restore()
    return ratios, pairs


def table(ratios: list[dict], pairs: list[dict]) -> str:
    """Markdown, a line for each estimator."""
    rows = []
    for estimator in ESTIMATORS:
        of = [row for row in ratios if row["estimator"] == estimator]
        cells = [f"`{estimator}`", f"{median(r['largest'] for r in of):.1f}"]
        cells.append(f"{median(r['largest'] * r['share_of_data'] for r in of):.1f}")
        for rule in LAMBDAS:
            mine = [p for p in pairs if p["estimator"] == estimator and p["rule"] == rule]
            good = sum(p["left"] <= ENOUGH and p["lost"] <= ENOUGH for p in mine)
            left, lost = mean(p["left"] for p in mine), mean(p["lost"] for p in mine)
            cells.append(f"{good} of {len(mine)} ({left:.1%} left, {100 * lost:.2f} points lost)")
        rows.append(cells)
    return markdown(["estimator", "largest F / I", "times share of the data", *LAMBDAS], rows)


def main() -> None:
    """Run all, print, write."""
    torch.set_num_threads(1)
    found = [study(seed) for seed in SEEDS]
    ratios, pairs = ([row for part in parts for row in part] for parts in zip(*found, strict=True))
    print(table(ratios, pairs))
    write_json(TARGET, {"environment": environment(), "ratios": ratios, "pairs": pairs})


if __name__ == "__main__":
    main()
