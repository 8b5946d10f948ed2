"""Why the estimators forget differently: the demo's chain of models, its head, each class alone, seeds 0 to 2.

    python bench/estimators.py              prints two tables and writes bench/results/estimators.json

How far F / I reaches at the origin; and how many (class, model) pairs are forgotten, at most 2 % left and 2 points lost
on test data, where alpha alone is chosen (lambda = 1) and where lambda is chosen as well, on validation data.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

import fiun_fast as ff
from fiun_fast.demo.data import Digits, Samples, batches, jittered, join, load_digits
from fiun_fast.demo.networks import Recipe, grow, incremental
from fiun_fast.demo.record import environment

ESTIMATORS = ("batch", "sample", "expected", "label_free")
LAMBDAS = {"lambda = 1": (1.0,), "lambda chosen": (1.0, 0.1, 0.01)}
SEEDS, BATCH, ALPHAS = (0, 1, 2), 16, 60
TARGET = Path(__file__).parent / "results" / "estimators.json"


def fisher(recipe: Recipe, models: dict, node: str, samples: Samples, copies: int, estimator: str) -> ff.Fisher:
    """As in the demo: jittered as in training, batches of 16, last layer."""
    generator = torch.Generator().manual_seed(recipe.seed)
    images, labels = jittered(samples, copies, generator)
    loader = list(batches(Samples(recipe[node].view(images), labels), BATCH, generator))
    return ff.estimate_fisher(models[node], loader, ff.last_layer(models[node]), estimator)


class Judge:
    """A node's features of validation and test data, on which any head can be scored."""

    def __init__(self, recipe: Recipe, digits: Digits, node: str, model: torch.nn.Module) -> None:
        known, generator = recipe.data(node).classes, torch.Generator().manual_seed(recipe.seed)
        validation = digits.validation.only(known)
        parts = join([validation, jittered(validation, 6, generator)]), digits.test.only(known)
        with torch.no_grad():
            self.validation, self.test = ((model.body(recipe[node].view(part.images)), part.labels) for part in parts)
        self.head = torch.cat([model.head.weight.detach().reshape(-1), model.head.bias.detach()])

    @staticmethod
    def scores(heads: Tensor, part: tuple[Tensor, Tensor], label: int) -> tuple[Tensor, ...]:
        """Of heads [A, 650]: accuracy on the class and on the rest, mean probability of the true label on either."""
        features, labels = part
        weight, bias = heads[:, :-10].view(len(heads), 10, -1), heads[:, -10:]
        logits = torch.einsum("nk,ack->anc", features, weight) + bias[:, None]
        right = (logits.argmax(2) == labels).float()
        sure = logits.softmax(2).gather(2, labels.expand(len(heads), -1)[..., None])[..., 0]
        gone = labels == label
        return tuple(of[:, where].mean(1) for of in (right, sure) for where in (gone, ~gone))

    def choose(self, original: Tensor, forget: Tensor, lambdas: tuple[float, ...], label: int) -> tuple[float, float]:
        """Test accuracy left on the class, and points lost on the rest, with the best alpha and lambda."""
        ratio = forget / original
        ranked = ratio[ratio.isfinite() & (ratio > 0)].sort(descending=True).values
        at = torch.logspace(0, torch.tensor(0.7 * len(ranked)).log10().item(), ALPHAS).long().clamp(max=len(ranked) - 1)
        heads = torch.cat(
            [
                torch.where(
                    forget > ranked[at, None] * original, self.head * (lam * original / forget).clamp(max=1), self.head
                )
                for lam in lambdas
            ]
        )
        _, rest_before, _, _ = self.scores(self.head[None], self.validation, label)
        left, rest, sure_left, sure_rest = self.scores(heads, self.validation, label)
        best = (left + (rest_before - rest).clamp(min=0) + 0.1 * sure_left - 0.02 * sure_rest).argmin()
        (left,), (rest,), *_ = self.scores(heads[best : best + 1], self.test, label)
        return float(left), float(self.scores(self.head[None], self.test, label)[1] - rest)


def main() -> None:
    """Run all, print, write."""
    torch.set_num_threads(1)
    ratios, pairs = [], []
    for seed in SEEDS:
        digits = load_digits(seed)
        recipe = incremental(digits, seed)
        models = grow(recipe)
        judges = {node: Judge(recipe, digits, node, model) for node, model in models.items()}
        for estimator in ESTIMATORS:
            own = {node: fisher(recipe, models, node, recipe.data(node), 2, estimator).buffer for node in models}
            for label, origin in recipe.origin.items():
                forget = fisher(recipe, models, origin, recipe.data(origin).only([label]), 6, estimator).buffer
                ratio = forget / own[origin]
                share = float((recipe.data(origin).labels == label).float().mean())
                found = {"share_of_data": share, "largest": float(ratio[ratio.isfinite()].max())}
                ratios.append({"seed": seed, "estimator": estimator, "class": label, "origin": origin} | found)
                for node in recipe.reached([label]):
                    for rule, lambdas in LAMBDAS.items():
                        left, lost = judges[node].choose(own[node], forget, lambdas, label)
                        pair = {"seed": seed, "estimator": estimator, "class": label, "node": node}
                        pairs.append(pair | {"rule": rule, "left": left, "lost": lost})
    for estimator in ESTIMATORS:
        of = [row for row in ratios if row["estimator"] == estimator]
        cells = [f"{statistics.median(r['largest'] for r in of):.1f}"]
        cells.append(f"{statistics.median(r['largest'] * r['share_of_data'] for r in of):.1f}")
        for rule in LAMBDAS:
            mine = [p for p in pairs if p["estimator"] == estimator and p["rule"] == rule]
            good = sum(p["left"] <= 0.02 and p["lost"] <= 0.02 for p in mine)
            mean = statistics.mean(p["left"] for p in mine), statistics.mean(p["lost"] for p in mine)
            cells.append(f"{good} of {len(mine)} ({mean[0]:.1%} left, {100 * mean[1]:.2f} points lost)")
        print(f"| `{estimator}` | {' | '.join(cells)} |")
    TARGET.write_text(json.dumps({"environment": environment(), "ratios": ratios, "pairs": pairs}, indent=0) + "\n")


if __name__ == "__main__":
    main()
