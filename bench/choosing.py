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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

import fiun_fast as ff
from fiun_fast.answering import Answered
from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.demo.data import DigitNet, Samples, load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.networks import SCENARIOS, grow
from fiun_fast.demo.report import LEFT, LOST
from fiun_fast.scores import ClassesSeen, accuracy_loss, class_loss, seen
from fiun_fast.tuning import default_grids

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
class Point:
    """One grid point at one node."""

    index: int  # of alpha in the grid; -1: not of the grid
    lam: float
    plain: ClassesSeen  # on validation data
    jittered: ClassesSeen  # on validation data and jittered copies
    test: ClassesSeen


Rule = tuple[Callable[[ClassesSeen, ClassesSeen], float], str, int, tuple[float, ...]]
RULES: dict[str, Rule] = {  # what to minimise, given the untouched node; on which data; alphas; lambdas
    "tune, demo's rule": (class_loss, "jittered", POINTS, LAMBDAS),
    "… 12 alphas": (class_loss, "jittered", 12, LAMBDAS),
    "… 6 alphas": (class_loss, "jittered", 6, LAMBDAS),
    "… λ = 1 only": (class_loss, "jittered", POINTS, (1.0,)),
    "… λ = 0.01 only": (class_loss, "jittered", POINTS, (0.01,)),
    "… no jittered copies": (class_loss, "plain", POINTS, LAMBDAS),
    "… accuracy alone": (accuracy_loss, "jittered", POINTS, LAMBDAS),
    "… accuracy alone, no copies": (accuracy_loss, "plain", POINTS, LAMBDAS),
}


class Watch:
    """One node's data as its last layer sees it, which is all that changes."""

    def __init__(self, network: Network, node: str, label: int) -> None:
        known = network.recipe.data(node)
        model, self._label = network.models[node], label
        self._head = model.head
        self.share = float((known.labels == label).double().mean())
        self._sets = {
            "plain": self._features(model, network.split(node, "validation")),
            "jittered": self._features(model, network.split(node, "validation", COPIES)),
            "test": self._features(model, network.split(node, "test")),
        }
        # for the search that sees no other data
        self._own = self._features(model, network.seen(node, known.only([label])))

    @staticmethod
    @torch.no_grad()
    def _features(model: DigitNet, samples: Samples) -> Samples:
        return samples._replace(images=model.body(samples.images))

    @torch.no_grad()
    def _look(self, data: Samples) -> ClassesSeen:
        return seen(Answered(self._head(data.images), data.labels, data.labels == self._label))

    def see(self, index: int = -1, lam: float = 1.0) -> Point:
        """The node as it is now."""
        return Point(index, lam, **{name: self._look(data) for name, data in self._sets.items()})

    @torch.no_grad()
    def forget_accuracy(self) -> float:
        """On the training data to be forgotten."""
        return float((self._head(self._own.images).argmax(1) == self._label).double().mean())


def sweep(network: Network, label: int) -> Iterator[tuple[str, dict[str, Point], list[Point], Point]]:
    """For each node that forgets the class: choices without validation data, grid points, and the node untouched."""
    requests, dag = [network.request(label)], network.dag
    watches = {node: Watch(network, node, label) for node in network.recipe.reached([label])}
    before = {node: watch.see() for node, watch in watches.items()}
    shares = {node: watch.share for node, watch in watches.items()}
    auto = ff.plan(dag, requests, alpha="auto", forget_fraction=shares).run_(dry_run=True)
    found = ff.search_alpha(dag, requests, lambda node, model: watches[node].forget_accuracy(), step=3.0)
    fixed: dict[str, dict[str, float]] = {
        "α = 10, λ = 1": dict.fromkeys(watches, 10.0),
        "adaptive α, λ = 1": {node: float(auto[node].alpha or 0) for node in watches},
        "search_alpha, λ = 1": {node: choice.alpha for node, choice in found.items() if found.points[node][1:]},
    }
    plan = ff.plan(dag, requests, alpha=0.0)
    grids = default_grids(plan, POINTS)
    with plan.trials(alpha=None) as trials:

        def at(alphas: Mapping[str, float], lam: float, index: int = -1) -> dict[str, Point]:
            trials.run(alpha=dict.fromkeys(watches, 1.0) | alphas, lam=lam)
            seen = {node: watch.see(index, lam) for node, watch in watches.items()}
            trials.restore()
            return seen

        without = {
            name: before | {n: p for n, p in at(alphas, 1.0).items() if n in alphas} for name, alphas in fixed.items()
        }
        tried = [
            at({node: grid[min(k, len(grid) - 1)] for node, grid in grids.items()}, lam, k)
            for lam in LAMBDAS
            for k in range(max(map(len, grids.values())))
        ]
    for node in watches:
        yield node, {name: seen[node] for name, seen in without.items()}, [seen[node] for seen in tried], before[node]


def chosen_by(rule: Rule, points: list[Point], before: Point) -> Point:
    """What a rule picks; the first of equals, as `ff.tune`."""
    objective, data, count, lams = rule
    indices = {round(k * (POINTS - 1) / (count - 1)) for k in range(count)}  # evenly, with both ends
    allowed = [p for p in points if p.index in indices and p.lam in lams]
    return min(allowed, key=lambda p: objective(getattr(p, data), getattr(before, data)))


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
                    for _, fixed, points, before in sweep(network, label):
                        chosen = {name: chosen_by(rule, points, before) for name, rule in RULES.items()}
                        for rule, point in (fixed | chosen).items():
                            lost = before.test.kept - point.test.kept
                            pairs.setdefault((smoothing, estimator, rule), []).append((point.test.left, lost))
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
    left, lost = zip(*found, strict=True)
    return {
        "smoothing": smoothing,
        "estimator": estimator,
        "rule": rule,
        "pairs": len(found),
        "within": mean(a <= LEFT and b <= LOST for a, b in found),
        "left": mean(left),
        "lost": mean(lost),
        "most_left": max(left),
        "most_lost": max(lost),
    }


def tables(result: dict) -> str:
    """Tables in Markdown: rules with the demo's estimator, estimators with the demo's rule and with a fixed one."""
    rows = {(r["smoothing"], r["estimator"], r["rule"]): r for r in result["rows"]}
    first = next(iter(ESTIMATORS))
    rules = dict.fromkeys(r["rule"] for r in result["rows"])
    out = []
    for head, keys in (
        ("rule", {rule: (first, rule) for rule in rules}),
        ("estimator", {estimator: (estimator, "tune, demo's rule") for estimator in ESTIMATORS}),
        ("estimator, α = 10, λ = 1", {estimator: (estimator, "α = 10, λ = 1") for estimator in ESTIMATORS}),
    ):
        lines = []
        for name, key in keys.items():
            both = [rows[(smoothing, *key)] for smoothing in SMOOTHINGS]
            cells = [(f"{r['within']:.1%}", f"{r['left']:.2%}", f"{100 * r['lost']:.2f}") for r in both]
            lines.append([name, *(cell.replace("%", " %") for of in cells for cell in of)])
        out.append(markdown([head, "within, smooth", "left", "lost", "within, sure", "left", "lost"], lines))
    return "\n".join(out)


def main() -> None:
    """Run the study, or only write its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--network", action="append", choices=SCENARIOS)
    arguments = parser.parse_args()
    if not arguments.tables:
        for result in study(arguments.network or NETWORKS):
            write_json(RESULTS, result)
    text = tables(json.loads(RESULTS.read_text()))
    print(text)
    fill(PAGE, "tables", f"\n{text}\n")


if __name__ == "__main__":
    main()
