"""How robustly alpha and lambda can be chosen: Fisher estimators, grids and objectives on the demo's networks.

    python bench/choosing.py                       bench/results/choosing.json and the tables in docs/choosing.md
    python bench/choosing.py --network federated   another of the demo's networks; may be repeated
    python bench/choosing.py --tables              only the tables, from the committed results

Every class in turn is forgotten in the demo's network, last layer. For each Fisher estimator every point of a
grid is applied once to all nodes, and what the node then does on validation and test data is written down; rules
that choose one point from validation data are compared afterwards. Test data decides nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

import fiun_fast as ff
from fiun_fast.demo.data import Digits, jittered, join, load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.networks import SCENARIOS, grow
from fiun_fast.demo.record import environment, write
from fiun_fast.demo.summary import LEFT, LOST
from fiun_fast.tune import default_grids

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "choosing.json", ROOT / "docs" / "choosing.md"
NETWORKS = ("incremental", "transfer")
SEED = 0
SMOOTHINGS = (0.1, 0.0)  # of the labels, in training: the demo's, and models that are very sure of what they know
ESTIMATORS = {
    "batch of 16": ("batch", 16),
    "batch of 4": ("batch", 4),
    "sample": ("sample", 16),
    "expected": ("expected", 16),
    "label_free": ("label_free", 16),
}
POINTS, LAMBDAS, COPIES = 24, (1.0, 0.1, 0.01), 3


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
RULES: dict[str, tuple[str, int, tuple[float, ...]]] = {  # objective, alphas, lambdas
    "tune, demo's rule": ("margin, jittered", POINTS, LAMBDAS),
    "… 12 alphas": ("margin, jittered", 12, LAMBDAS),
    "… 6 alphas": ("margin, jittered", 6, LAMBDAS),
    "… λ = 1 only": ("margin, jittered", POINTS, (1.0,)),
    "… λ = 0.01 only": ("margin, jittered", POINTS, (0.01,)),
    "… no jittered copies": ("margin", POINTS, LAMBDAS),
    "… accuracy alone": ("accuracy, jittered", POINTS, LAMBDAS),
    "… accuracy alone, no copies": ("accuracy", POINTS, LAMBDAS),
}


class Watch:
    """One node's data as its last layer sees it, which is all that changes: features are computed once."""

    def __init__(self, network: Network, digits: Digits, node: str, label: int) -> None:
        recipe, self._model = network.recipe, network.models[node]
        known = recipe.data(node).classes
        plain, test = digits.validation.only(known), digits.test.only(known)
        copies = jittered(plain, COPIES, torch.Generator().manual_seed(recipe.seed))
        everything = join([plain, copies, test])
        own = recipe.data(node).only([label])  # training data to be forgotten, for the search that sees no other
        with torch.no_grad():
            self._features = self._model.body(recipe[node].view(everything.images))
            self._own = self._model.body(recipe[node].view(own.images))
        self._labels, self._label = everything.labels[:, None], label
        cut, end = len(plain.labels), len(plain.labels) + len(copies.labels)
        sets = {"plain": slice(0, cut), "jittered": slice(0, end), "test": slice(end, None)}
        gone = everything.labels == label
        inside = torch.zeros(
            len(gone), 2 * len(sets)
        )  # of each set the forgotten and the rest; sums of 0 and 1 are exact
        for i, part in enumerate(sets.values()):
            inside[part, 2 * i], inside[part, 2 * i + 1] = gone[part].float(), (~gone[part]).float()
        self._sets, self._inside, self._sizes = list(sets), inside, inside.sum(0)

    @torch.no_grad()
    def see(self) -> dict[str, Seen]:
        """The node as it is now."""
        logits = self._model.head(self._features)
        sure = logits.softmax(1).gather(1, self._labels)[:, 0]
        right = (logits.argmax(1) == self._labels[:, 0]).float()
        (a, b) = (torch.stack([right, sure]) @ self._inside / self._sizes).tolist()
        return {name: Seen(*a[2 * i : 2 * i + 2], *b[2 * i : 2 * i + 2]) for i, name in enumerate(self._sets)}

    @torch.no_grad()
    def forget_accuracy(self) -> float:
        """On the training data to be forgotten."""
        return (self._model.head(self._own).argmax(1) == self._label).double().mean().item()


def sweep(network: Network, digits: Digits, label: int) -> Iterator[tuple[str, dict[str, Point], list[Point], Point]]:
    """For each node that forgets the class: choices without validation data, grid points, and the node untouched."""
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
    found = ff.search_alpha(network.dag, request, lambda node, model: watches[node].forget_accuracy(), step=3.0)
    fixed["search_alpha, λ = 1"] = at({node: choice.alpha for node, choice in found.items()}, 1.0)
    grids = default_grids(compiled, POINTS)
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
    for name, (objective, count, lams) in rules.items():
        indices = {round(k * (POINTS - 1) / (count - 1)) for k in range(count)}  # evenly, with both ends
        allowed = [p for p in points if p.index in indices and p.lam in lams]
        picked[name] = min(allowed, key=lambda p: OBJECTIVES[objective](p, before))
    return picked


def study(networks: Sequence[str] = NETWORKS) -> Iterator[dict]:
    """Network after network: a row for each estimator and rule, over all networks so far."""
    torch.set_num_threads(1)  # these models are too small to share
    pairs: dict[tuple[float, str, str], list[tuple[float, float]]] = {}
    began, digits = time.perf_counter(), load_digits(SEED)
    for count, scenario in enumerate(networks, start=1):
        for smoothing in SMOOTHINGS:
            recipe = replace(SCENARIOS[scenario](digits, SEED), smoothing=smoothing)
            models = grow(recipe)
            for estimator, (name, batch) in ESTIMATORS.items():
                network = Network(recipe, digits, models, "last-layer", name, batch)
                for label in recipe.origin:
                    for _, fixed, points, before in sweep(network, digits, label):
                        for rule, point in (fixed | chosen_by(RULES, points, before)).items():
                            lost = before.test.rest - point.test.rest
                            pairs.setdefault((smoothing, estimator, rule), []).append((point.test.forgotten, lost))
            print(f"{scenario}, smoothing {smoothing}: {time.perf_counter() - began:.0f} s", flush=True)
        yield {
            "settings": {"seed": SEED, "scenarios": networks[:count], "points": POINTS, "copies": COPIES},
            "environment": environment(),
            "seconds": time.perf_counter() - began,
            "rows": [*map(summary, pairs.items())],
        }


def summary(item: tuple[tuple[float, str, str], list[tuple[float, float]]]) -> dict:
    """One row: what came of all pairs of a class and a node."""
    (smoothing, estimator, rule), found = item
    return {
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


def tables(result: dict) -> str:
    """Tables in Markdown: rules with the demo's estimator, estimators with the demo's rule and with a fixed one."""
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
    parser.add_argument("--network", action="append", choices=SCENARIOS)
    arguments = parser.parse_args()
    if not arguments.tables:
        for result in study(arguments.network or NETWORKS):
            write(RESULTS, result)
    text = tables(json.loads(RESULTS.read_text()))
    print(text)
    if PAGE.exists():
        page = PAGE.read_text()
        marked = re.sub(r"(?s)(<!-- tables -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}\n{text}\n{m[2]}", page)
        PAGE.write_text(marked)


if __name__ == "__main__":
    main()
