"""What the features still know of a forgotten class, and what it costs to make them forget: rules for whole models.

    python bench/features.py               bench/results/features.json and the table in docs/choosing.md
    python bench/features.py --seed 0      that seed alone; may be repeated
    python bench/features.py --tables      only the table, from the committed results

The demo's networks of digits. A request forgets one class, and a *pair* is that class and a node it reached. Every rule
chooses on validation data and is judged once, on test data: what is left and lost, and how well two classifiers
fitted anew on features of training data still tell the forgotten class. Beside them stand the model as it was and
one really retrained without the class. Results are kept network by network: a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from feature_rules import COLUMNS, FeatureScore, Node, Until, Way, judged
from quality import recipe_of, trained
from torch import Tensor
from torch.nn import functional

from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.demo.data import DigitNet, Samples, load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.networks import Recipe, grow

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "features.json", ROOT / "docs" / "choosing.md"
SEEN, NEW = (0,), (1, 2)  # seeds: looked at while the rules were made, and run once at the end
NETWORKS = {"incremental": (2, 5), "transfer": (3, 3), "federated": (3, 1)}  # every how many-th class; at most so many
ESTIMATORS: dict[str, tuple[Any, int]] = {
    "batch": ("batch", 16),
    "expected": ("expected", 64),
    "label-free": ("label_free", 64),
}
FEATURES = "features"  # the name of a Fisher of nearest class means in the place of the last layer
MORE: dict[str, Any] = {"weight": 1.0, "shares": (1.0, 0.7, 0.4, 0.2, 0.1, 0.05, 0.02), "lams": (0.1, 0.01)}
A_POINT: dict[str, Any] = {"slack": 0.01, "less_sure": 1.0}


# ---- Fishers ---------------------------------------------------------------------------------------------------------


class Fishers:
    """Of a network, by every estimator: Fishers of its nodes and of requests, and gradients of requests."""

    def __init__(self, recipe: Recipe, network: Network, others: Mapping[str, Network]) -> None:
        self._recipe, self._networks = recipe, {"batch": network, **others}
        by_means = {
            name: with_means(model, network.seen(name, recipe.data(name))) for name, model in network.models.items()
        }
        self._networks[FEATURES] = Network(recipe, network.digits, by_means, "all", "batch", 16)

    def of(self, node: str, label: int) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Estimator -> (Fisher of the node, Fisher of the request), each name -> tensor."""
        return {
            name: (network.originals[node].as_dict(), network.request(label).fisher.as_dict())
            for name, network in self._networks.items()
        }

    def gradient(self, label: int) -> dict[str, Tensor]:
        """Of the mean loss on the request's training data, at its origin."""
        origin, network = self._recipe.origin[label], self._networks["batch"]
        model, samples = copy.deepcopy(network.models[origin]), self._recipe.data(origin).only([label])
        samples = network.seen(origin, samples)
        functional.cross_entropy(model(samples.images), samples.labels).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def with_means(model: DigitNet, samples: Samples) -> DigitNet:
    """The model with its last layer replaced: logits are -d² / t, d the distance from a class mean of the features.

    t is such that the nearest other class is 4 behind on average: less, and the gradients of most samples vanish.
    """
    model = copy.deepcopy(model)
    x, y = model.body(samples.images), samples.labels
    known = y.unique()
    means = torch.stack([x[y == c].mean(0) for c in known])
    squares = torch.cdist(x, means).square()
    own = squares[y[:, None] == known]
    gap = (squares.masked_fill(y[:, None] == known, torch.inf).amin(1) - own).mean()
    scale = 4 / gap
    model.head.weight.zero_()
    model.head.bias.fill_(-1e4)  # of classes it never saw
    model.head.weight[known] = 2 * scale * means
    model.head.bias[known] = -scale * means.square().sum(1)
    return model


BY_LAYER = "last layer, then by layer"  # what `ff.tune(by="layer")` and `ff.unlearn_(params=None)` do
BEFORE, RETRAINED = "the model as it was", "retrained without the class"
RULES: dict[str, Callable[[Node, FeatureScore], None]] = {
    "last layer alone": Way(body=()),
    BY_LAYER: Way(),
    "… signed": Way(signed=True),
    "… best estimator for each layer": Way(head=tuple(ESTIMATORS), body=tuple(ESTIMATORS)),
    "… body with Fishers of class means": Way(body=(FEATURES,)),
    "… then BatchNorm anew": Way(after=True),
    "… then BatchNorm anew, last layer again": Way(after=True, again=True),
    "feature term": Way(**MORE),
    "… a point lost allowed": Way(**MORE, **A_POINT),
    "… a point lost allowed, Fishers of class means": Way(**MORE, **A_POINT, body=(FEATURES,)),
    "… BatchNorm anew at each step, last layer again": Way(**MORE, anew=True, again=True),
    "body until the ridge probe falls": Until("ridge"),
    "body until the nearest mean falls": Until("nearest"),
    "… Fishers of class means": Until("nearest", FEATURES),
    "… BatchNorm anew": Until("nearest", anew=True),
}


# ---- study -----------------------------------------------------------------------------------------------------------


def classes_of(recipe: Recipe) -> list[int]:
    """What is forgotten, one after another; other classes with the next seeds."""
    every, most = NETWORKS[recipe.scenario]
    return sorted(recipe.origin)[recipe.seed % every :: every][:most]


def nodes_of(scenario: str, seed: int, cache: Path) -> Iterator[Node]:
    """Every pair of a network."""
    digits = load_digits(seed)
    recipe = recipe_of(scenario, digits, seed)
    models = trained(recipe, cache)
    batch, *others = (Network(recipe, digits, models, "all", *how) for how in ESTIMATORS.values())
    fishers = Fishers(recipe, batch, dict(zip(list(ESTIMATORS)[1:], others, strict=True)))
    for label in classes_of(recipe):
        reached = recipe.reached([label])
        never = grow(recipe, without=[label], keep={name: one for name, one in models.items() if name not in reached})
        gradient = fishers.gradient(label)
        for name in reached:
            train = batch.seen(name, recipe.data(name))
            sets = train, batch.split(name, "validation"), batch.split(name, "test")
            yield Node(models[name], *sets, label, fishers.of(name, label), gradient, never[name], seed)


def measured(scenario: str, seed: int, cache: Path) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """One network: rule -> column -> a number a pair; and rule -> seconds of choosing."""
    found: dict[str, dict[str, list[float]]] = {}
    seconds = dict.fromkeys(RULES, 0.0)

    def note(rule: str, node: Node, model: DigitNet, kept: float | None) -> float:
        values = judged(model, node.train, node.test, node.label, kept, node.seed)
        columns = found.setdefault(rule, {column: [] for column in COLUMNS})
        for column, value in zip(COLUMNS, values, strict=True):
            columns[column].append(round(value, 4))
        return values[1]

    for node in nodes_of(scenario, seed, cache):
        kept = note(BEFORE, node, node.model, None)
        note(RETRAINED, node, node.retrained, kept)
        score = FeatureScore(node.validation, node.label)
        for rule, way in RULES.items():
            began = time.process_time()
            way(node, score)
            seconds[rule] += time.process_time() - began
            note(rule, node, node.model, kept)
            node.restore()
    return found, {rule: round(spent, 1) for rule, spent in seconds.items()}


def study(seeds: Sequence[int], cache: Path, results: Path) -> dict[str, Any]:
    """Measure what the results do not have yet, and write them after every network."""
    torch.set_num_threads(1)  # these models are too small to share
    result: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"rows": []}
    done = {(row["seed"], row["scenario"]) for row in result["rows"]}
    for seed, scenario in product(seeds, NETWORKS):
        if (seed, scenario) in done:
            continue
        began = time.process_time()
        found, seconds = measured(scenario, seed, cache)
        row = {"seed": seed, "scenario": scenario, "cpu_seconds": time.process_time() - began, "seconds": seconds}
        result["rows"].append({**row, "pairs": found})
        write_json(results, {"environment": environment(), **result}, digits=5)
        print(f"seed {seed}, {scenario}: {row['cpu_seconds']:.0f} s of CPU", flush=True)
    return result


# ---- table -----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[dict], rule: str) -> dict[str, float]:
    """Of all pairs: how many, the shares within two pairs of bounds, and the mean of every column."""
    columns = {c: [value for row in rows for value in row["pairs"][rule][c]] for c in COLUMNS}
    pairs = list(zip(columns["left"], columns["lost"], strict=True))
    found = {f"within {b}": mean(x <= b / 100 + 1e-9 and y <= b / 100 + 1e-9 for x, y in pairs) for b in (1, 2)}
    return {"pairs": len(pairs), **found, **{c: mean(values) for c, values in columns.items()}}


def tables(result: dict, seen: Sequence[int] = SEEN, new: Sequence[int] = NEW) -> str:
    """A table in Markdown for the seeds that were looked at, and one for those that are new."""
    out = []
    for title, seeds in (("New seeds", new), ("Looked at", seen)):
        rows = [row for row in result["rows"] if row["seed"] in seeds]
        if not rows:
            continue
        lines = []
        for rule in (BEFORE, RETRAINED, *RULES):
            found = summary(rows, rule)
            cells = [f"{100 * found[key]:.1f} %" for key in ("within 1", "within 2", "left")]
            cells += [f"{100 * found['lost']:.2f}", *(f"{100 * found[c]:.1f}" for c in COLUMNS[2:])]
            if rule == BEFORE:
                cells[3] = ""
            lines.append([rule, *(["", ""] if rule in (BEFORE, RETRAINED) else cells[:2]), *cells[2:]])
        heads = ["rule", "≤ 1, ≤ 1", "≤ 2, ≤ 2", "left", "lost", "ridge", "nearest mean", "ridge, rest", "mean, rest"]
        which = ", ".join(map(str, sorted({row["seed"] for row in rows})))
        out.append(f"**{title}**: {which}; {found['pairs']} pairs.\n\n{markdown(heads, lines)}")
    return "\n".join(out)


def main() -> None:
    """Run the study, or only write its table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fiun_fast_quality")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.tables:
        study(arguments.seed or NEW, arguments.cache, arguments.results)
    text = tables(json.loads(arguments.results.read_text()))
    print(text)
    if arguments.results == RESULTS:
        fill(PAGE, "features", f"\n{text}\n")


if __name__ == "__main__":
    main()
