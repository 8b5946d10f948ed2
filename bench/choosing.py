"""How robustly alpha and lambda can be chosen: Fisher estimators, grids and objectives on the demo's networks.

    python bench/choosing.py             all: bench/results/choosing.json and the tables in docs/choosing.md
    python bench/choosing.py --tables    only the tables, from the committed results

Every class in turn is forgotten in the demo's four networks, last layer. For each Fisher estimator every point of a
grid is applied once to all nodes, and what the node then does on validation and test data is written down; rules
that choose one point from validation data are compared afterwards. Test data decides nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

import fiun_fast as ff
from fiun_fast.demo.data import Digits, jittered, join, load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.networks import SCENARIOS, grow
from fiun_fast.demo.record import environment, write
from fiun_fast.demo.summary import LEFT, LOST
from fiun_fast.tune import default_grid

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "choosing.json", ROOT / "docs" / "choosing.md"
SEEDS = (0,)
SMOOTHINGS = (0.0,)  # of the labels, in training: the demo's, and models that are very sure of what they know
ESTIMATORS = {
    "batch of 16": ("batch", 16),
    "batch of 4": ("batch", 4),
    "sample": ("sample", 16),
    "expected": ("expected", 16),
    "label_free": ("label_free", 16),
}
POINTS, LAMBDAS, COPIES = 40, (1.0, 0.1, 0.01), 6


@dataclass(frozen=True)
class Seen:
    """What a node does on one set of data: shares of 0..1."""

    forgotten: float  # accuracy
    rest: float
    sure_forgotten: float  # mean probability of the true label
    sure_rest: float


@dataclass(frozen=True)
class Point:
    """One grid point at one node."""

    index: int  # of alpha in the grid; -1: not of the grid
    lam: float
    plain: Seen  # on validation data
    jittered: Seen  # on validation data and jittered copies
    test: Seen


Rule = Callable[[Point, Point], float]  # what to minimise, given the untouched node


def accuracy(seen: Seen, before: Seen) -> float:
    """What is left of the forgotten, and what was lost on the rest."""
    return seen.forgotten + max(0.0, before.rest - seen.rest)


def margin(seen: Seen, before: Seen) -> float:
    """The same; among equals, the one that is furthest from the line."""
    return accuracy(seen, before) + 0.1 * seen.sure_forgotten - 0.02 * seen.sure_rest


OBJECTIVES: dict[str, Rule] = {
    "accuracy": lambda point, before: accuracy(point.plain, before.plain),
    "accuracy, jittered": lambda point, before: accuracy(point.jittered, before.jittered),
    "margin": lambda point, before: margin(point.plain, before.plain),
    "margin, jittered": lambda point, before: margin(point.jittered, before.jittered),
}
RULES: dict[str, tuple[str, int, tuple[float, ...]]] = {  # objective, every n-th alpha, lambdas
    "tune, demo's rule": ("margin, jittered", 1, LAMBDAS),
    "… 20 alphas": ("margin, jittered", 2, LAMBDAS),
    "… 10 alphas": ("margin, jittered", 4, LAMBDAS),
    "… λ = 1 only": ("margin, jittered", 1, (1.0,)),
    "… λ = 0.01 only": ("margin, jittered", 1, (0.01,)),
    "… no jittered copies": ("margin", 1, LAMBDAS),
    "… accuracy alone": ("accuracy, jittered", 1, LAMBDAS),
    "… accuracy alone, no copies": ("accuracy", 1, LAMBDAS),
}


class Watch:
    """Features of all data of one node, computed once: the last layer is all that changes."""

    def __init__(self, network: Network, digits: Digits, node: str, label: int) -> None:
        recipe, self._model = network.recipe, network.models[node]
        known = recipe.data(node).classes
        parts = {"plain": digits.validation.only(known), "test": digits.test.only(known)}
        generator = torch.Generator().manual_seed(recipe.seed)
        parts["jittered"] = join([parts["plain"], jittered(parts["plain"], COPIES, generator)])
        own = recipe.data(node).only([label])  # training data to be forgotten, for the search that sees no other
        with torch.no_grad():
            self._features = {k: self._model.body(recipe[node].view(p.images)) for k, p in parts.items()}
            self._own = self._model.body(recipe[node].view(own.images))
        self._labels = {k: p.labels for k, p in parts.items()}
        self._label = label

    @torch.no_grad()
    def see(self) -> dict[str, Seen]:
        """The node as it is now."""
        return {k: self._seen(self._model.head(f), self._labels[k]) for k, f in self._features.items()}

    @torch.no_grad()
    def forget_accuracy(self) -> float:
        """On the training data to be forgotten."""
        return (self._model.head(self._own).argmax(1) == self._label).double().mean().item()

    def _seen(self, logits: Tensor, labels: Tensor) -> Seen:
        right = (logits.argmax(1) == labels).double()
        sure = logits.softmax(1).gather(1, labels[:, None])[:, 0].double()
        gone = labels == self._label
        return Seen(
            *(float(x) for x in (right[gone].mean(), right[~gone].mean(), sure[gone].mean(), sure[~gone].mean()))
        )


def sweep(network: Network, digits: Digits, label: int) -> Iterator[tuple[str, dict[str, Point], list[Point], Point]]:
    """Node by node where the class goes: fixed and automatic choices by name, grid points, the node untouched."""
    recipe = network.recipe
    request = [ff.ForgetRequest(recipe.origin[label], network._forget_fisher(label))]
    watches = {node: Watch(network, digits, node, label) for node in recipe.reached([label])}
    compiled = ff.plan(network.dag, request, 0.0)
    undo = compiled._recorded()

    def at(alphas: Mapping[str, float], lam: float, index: int = -1) -> dict[str, Point]:
        compiled.set_values_(alphas, lam)
        compiled.run_()
        points = {node: Point(index, lam, **watch.see()) for node, watch in watches.items()}
        undo()
        return points

    before = {node: Point(-1, 1.0, **watch.see()) for node, watch in watches.items()}
    shares = {}
    for node in watches:
        labels = recipe.data(node).labels
        shares[node] = float((labels == label).double().mean())
    fixed = {"α = 10, λ = 1": at(dict.fromkeys(watches, 10.0), 1.0)}
    auto = ff.plan(network.dag, request, "auto", share=shares).run_(dry_run=True)
    fixed["adaptive α, λ = 1"] = at({node: float(auto[node].alpha or 0) for node in watches}, 1.0)
    found = ff.search_alpha(network.dag, request, lambda node, model: watches[node].forget_accuracy(), step=1.0)
    fixed["search_alpha, λ = 1"] = at({node: choice.alpha for node, choice in found.items()}, 1.0)
    grids = {node: default_grid(profile, POINTS) for node, profile in compiled.profile().items()}
    points: dict[str, list[Point]] = {node: [] for node in watches}
    for lam in LAMBDAS:
        for k in range(max(map(len, grids.values()))):
            tried = at({node: grid[min(k, len(grid) - 1)] for node, grid in grids.items()}, lam, k)
            for node, point in tried.items():
                points[node].append(point)
    for node in watches:
        yield node, {name: chosen[node] for name, chosen in fixed.items()}, points[node], before[node]


def chosen_by(rules: Mapping[str, tuple], points: list[Point], before: Point) -> dict[str, Point]:
    """What each rule picks; the first of equals, as `ff.tune`."""
    picked = {}
    for name, (objective, every, lams) in rules.items():
        allowed = [p for p in points if p.index % every == 0 and p.lam in lams]
        picked[name] = min(allowed, key=lambda p: OBJECTIVES[objective](p, before))
    return picked


def study() -> dict:
    """All networks, estimators and rules; a row for each estimator and rule."""
    torch.set_num_threads(1)  # these models are too small to share
    pairs: dict[tuple[float, str, str], list[tuple[float, float]]] = {}
    began = time.perf_counter()
    for smoothing in SMOOTHINGS:
        for seed in SEEDS:
            digits = load_digits(seed)
            for scenario, build in SCENARIOS.items():
                recipe = replace(build(digits, seed), smoothing=smoothing)
                models = grow(recipe)
                for estimator, (name, batch) in ESTIMATORS.items():
                    network = Network(recipe, digits, models, "last-layer", name, batch)
                    for label in recipe.origin:
                        for _, fixed, points, before in sweep(network, digits, label):
                            for rule, point in (fixed | chosen_by(RULES, points, before)).items():
                                lost = before.test.rest - point.test.rest
                                pairs.setdefault((smoothing, estimator, rule), []).append((point.test.forgotten, lost))
                print(
                    f"smoothing {smoothing}, seed {seed}, {scenario}: {time.perf_counter() - began:.0f} s", flush=True
                )
    rows = [
        {
            "smoothing": smoothing,
            "estimator": estimator,
            "rule": rule,
            "pairs": len(found),
            "within": mean(left <= LEFT and lost <= LOST for left, lost in found),
            "left": mean(left for left, _ in found),
            "lost": mean(lost for _, lost in found),
            "most_left": max(left for left, _ in found),
            "most_lost": max(lost for _, lost in found),
        }
        for (smoothing, estimator, rule), found in pairs.items()
    ]
    settings = {"seeds": SEEDS, "points": POINTS, "lambdas": LAMBDAS, "copies": COPIES}
    return {"settings": settings, "environment": environment(), "seconds": time.perf_counter() - began, "rows": rows}


def tables(result: dict) -> str:
    """Two tables in Markdown: rules with the demo's estimator, estimators with the demo's rule."""
    rows = {(r["smoothing"], r["estimator"], r["rule"]): r for r in result["rows"]}
    first = next(iter(ESTIMATORS))
    rules = list(dict.fromkeys(r["rule"] for r in result["rows"]))
    out = []
    for head, keys in (
        ("rule", {rule: (first, rule) for rule in rules}),
        ("estimator", {estimator: (estimator, "tune, demo's rule") for estimator in ESTIMATORS}),
        ("estimator, α = 10, λ = 1", {estimator: (estimator, "α = 10, λ = 1") for estimator in ESTIMATORS}),
    ):
        out += [f"| {head} | within, smooth | left | lost | within, sure | left | lost |", "| --- |" + " ---: |" * 6]
        for name, key in keys.items():
            cells = []
            for smoothing in SMOOTHINGS:
                r = rows[(smoothing, *key)]
                cells += [f"{100 * r['within']:.1f} %", f"{100 * r['left']:.2f} %", f"{100 * r['lost']:.2f}"]
            out.append(f"| {name} | {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out)


def main() -> None:
    """Run the study, or only write its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", action="store_true")
    if not parser.parse_args().tables:
        write(RESULTS, study())
    text = tables(json.loads(RESULTS.read_text()))
    print(text)
    if PAGE.exists():
        page = PAGE.read_text()
        marked = re.sub(r"(?s)(<!-- tables -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}\n{text}\n{m[2]}", page)
        PAGE.write_text(marked)


if __name__ == "__main__":
    main()
