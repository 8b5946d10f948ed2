"""How well `ff.unlearn_` forgets on data that none of its rules was made on: images of 28x28, and lines of text.

    python bench/other_data.py               bench/results/other-data.json and the tables in docs/choosing.md
    python bench/other_data.py --seed 0      that seed alone; may be repeated
    python bench/other_data.py --tables      only the tables, from the committed results

Needs `fiun_fast[study]`; `other_sets.py` has the data and the networks. Everything goes through the public call,
chooses on validation data and is judged once, on test data. A *pair* is what a request, or two, and a node make.
Results are kept network by network: a run that was stopped goes on where it was.

Some rules were added to find out what misses come from, when those of seed 0 had been seen, the last when those of all
seeds had. *Rows centred*: from every row of the last layer the mean of its rows is taken away, which changes no
probability, and the call is the same. *Requests weighted*: of two merged requests each weighs one over the sum of its
Fisher, by `expected`. *Softened loss*: Fishers by `batch` alone, of the cross-entropy of logits over 4.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from other_sets import BATCH, SCENARIOS, TASKS, grown
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fiun_fast as ff
from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.demo.data import Digits, Samples, accuracies
from fiun_fast.demo.networks import Recipe, View

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "other-data.json", ROOT / "docs" / "choosing.md"
SEEDS, NEW = (0, 1, 2), (3, 4)  # looked at while the defaults were made, and run once afterwards


@dataclass(frozen=True)
class Rule:
    """How `ff.unlearn_` is called, and what is done before."""

    how: dict[str, Any] = field(default_factory=dict)
    centred: bool = False
    weighted: bool = False


TWO = {"estimators": ("batch", "expected"), "center": False}
SOFT = {"estimators": "softened", "center": False}
RULES = {
    "batch, expected": Rule(TWO),
    "batch, expected, label_free": Rule({**TWO, "estimators": ("batch", "expected", "label_free")}),
    "rows centred": Rule(TWO, centred=True),
    "rows centred, requests weighted": Rule(TWO, centred=True, weighted=True),
    "softened": Rule(SOFT),
    "rows centred, softened": Rule(SOFT, centred=True),
    "unlearn_, as it is": Rule(),
    "whole model, batch, expected": Rule({"params": None, **TWO}),
    "whole model, rows centred, softened": Rule({"params": None, **SOFT}, centred=True),
}
TWICE, _, CENTRED, WEIGHTED, SOFTENED, BOTH, AS_IT_IS, WHOLE, WHOLE_BOTH = RULES
LONG = (WHOLE, WHOLE_BOTH)
SHOWN = [(rule, kind) for kind in ("single", "merged") for rule in (TWICE, SOFTENED, BOTH, AS_IT_IS)]
KEYS = ("rule", "training", "seed", "data", "scenario")
TRAINED = {"plain": 0.0, "smoothed": 0.1}  # labels, in training
KINDS = {"single": "one request", "merged": "two requests merged"}


def requests_of(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """("single", one class) for every class; ("merged", two that entered at different nodes) for a third of these."""
    for label in recipe.origin:
        yield "single", (label,)
    for (i, one), (j, other) in combinations(enumerate(recipe.origin), 2):
        if recipe.origin[one] != recipe.origin[other] and (i + j) % 3 == 2:
            yield "merged", (one, other)


def loader(samples: Samples, view: View, shuffle: int | None = None) -> DataLoader[tuple[Tensor, ...]]:
    """Batches as a node sees them; shuffled by that seed."""
    generator = None if shuffle is None else torch.Generator().manual_seed(shuffle)
    data = TensorDataset(view(samples.images), samples.labels)
    return DataLoader(data, batch_size=BATCH, shuffle=shuffle is not None, generator=generator)


class Network:
    """Models in a DAG with the data they learned, and requests to forget: as `ff.unlearn_` takes them."""

    def __init__(self, recipe: Recipe, models: Mapping[str, nn.Module], data: Digits, weighted: bool = False) -> None:
        self.recipe, self.models, self.dag = recipe, models, ff.InheritanceDAG()
        self.test: dict[str, Samples] = {}
        validation = {}
        for step in recipe.steps:
            samples = recipe.data(step.name)
            self.dag.add_model(
                step.name, models[step.name], data=loader(samples, step.view, recipe.seed), parents=step.parents
            )
            validation[step.name] = loader(data.validation.only(samples.classes), step.view)
            test = data.test.only(samples.classes)
            self.test[step.name] = Samples(step.view(test.images), test.labels)
        self._score = ff.ClassScore(validation, forget={})
        self._weighted = weighted
        self._requests: dict[int, ff.ForgetRequest] = {}

    def request(self, label: int) -> ff.ForgetRequest:
        """To forget a class from where it entered on, by the samples of it there."""
        if label not in self._requests:
            origin = self.recipe.origin[label]
            samples = self.recipe.data(origin).only([label])
            of = loader(samples, self.recipe[origin].view, self.recipe.seed)
            weight = 1.0
            if self._weighted:
                fisher = ff.estimate_fisher(self.models[origin], of, params="last", estimator="expected")
                weight = 1 / fisher.buffer.sum().item()
            self._requests[label] = ff.ForgetRequest(origin, data=of, weight=weight)
        return self._requests[label]

    def accuracies(self, nodes: Sequence[str], classes: Sequence[int]) -> list[tuple[float, float]]:
        """On test data, of each node on these classes and on the others."""
        return [accuracies(self.models[node], self.test[node], classes) for node in nodes]

    def forget(self, classes: Sequence[int], **how: Any) -> Iterator[dict[str, Any]]:
        """What comes of every node that all these classes reach; afterwards every bit is as it was."""
        reached = self.recipe.reached(classes)
        nodes = [node for node, its in reached.items() if len(its) == len(classes)]
        before = self.accuracies(nodes, classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ff.TuningWarning)  # `met` says it
            requests = [self.request(label) for label in classes]
            outcome = ff.unlearn_(self.dag, requests, self._score.forgetting(reached), **how)
        after = self.accuracies(nodes, classes)
        for node, (_, kept), (left, still) in zip(nodes, before, after, strict=True):
            pair, one = f"{'+'.join(map(str, classes))} in {node}", outcome[node]
            yield {"pair": pair, "left": left, "lost": kept - still, "met": one.met, "estimator": one.estimator}
        outcome.undo_()


def centred(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies from whose last layers the mean of the rows is taken away: the same probabilities, to rounding."""
    models = copy.deepcopy(dict(models))
    for model in models.values():
        for parameter in model.head.parameters():  # [10, 64] and [10]
            parameter.data -= parameter.data.mean(0)
    return models


@torch.no_grad()
def zero_wins_in(model: nn.Module, samples: Samples) -> float:
    """The share of the samples of which every logit but the true one is negative: of which 0 would win."""
    logits = model(samples.images).scatter(1, samples.labels[:, None], -torch.inf)
    return (logits.amax(1) < 0).double().mean().item()


def asked(rule: str, training: str, seed: int, scenario: str) -> bool:
    """Whether a rule is measured there: not where nothing is merged, nor everywhere what takes long."""
    if seed in NEW:
        return training == "plain" and rule in (TWICE, AS_IT_IS)
    if rule in LONG:
        return seed == 0 and training == "plain" and scenario == "chain"
    return (seed == 0 or training == "plain") and (rule != WEIGHTED or scenario != "star")


def measured(name: str, scenario: str, training: str, seed: int, rule: str, kept: Path) -> dict[str, Any]:
    """One network and one rule."""
    data = TASKS[name].load(seed)
    recipe = SCENARIOS[scenario](TASKS[name], data, seed)
    models = grown(name, recipe, TRAINED[training], kept)
    its = RULES[rule]
    models = centred(models) if its.centred else models
    began, network = time.process_time(), Network(recipe, models, data, weighted=its.weighted)
    before = {node: network.accuracies([node], [])[0][1] for node in models}
    zero_wins = {node: zero_wins_in(model, network.test[node]) for node, model in models.items()}
    pairs: dict[str, dict[str, list]] = {}
    for kind, classes in requests_of(recipe):
        if its.weighted and kind == "single":
            continue  # a factor of all of m changes nothing: alpha is tuned
        columns = pairs.setdefault(kind, {})
        for found in network.forget(classes, **its.how):
            for column, value in found.items():
                columns.setdefault(column, []).append(value)
    sizes = [torch.bincount(part.labels).tolist() for part in (data.validation, data.test)]
    each = {part: [min(some), max(some)] for part, some in zip(("validation", "test"), sizes, strict=True)}
    return {
        "accuracy": before,
        "zero_wins": zero_wins,
        "each": each,
        "cpu_seconds": time.process_time() - began,
        "pairs": pairs,
    }


def study(seeds: Sequence[int], kept: Path, results: Path) -> dict[str, Any]:
    """Measure what the results do not have yet, and write them after every network."""
    torch.set_num_threads(1)  # these models are too small to share
    result: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"rows": []}
    done = {tuple(row[key] for key in KEYS) for row in result["rows"]}
    keys = sorted(product(RULES, TRAINED, seeds, SCENARIOS, TASKS), key=lambda key: (key[0] in LONG, *key[1:3]))
    for rule, training, seed, scenario, name in keys:
        key = rule, training, seed, name, scenario
        if key not in done and asked(rule, training, seed, scenario):
            row = dict(zip(KEYS, key, strict=True)) | measured(name, scenario, training, seed, rule, kept)
            result["rows"].append(row)
            write_json(results, {"environment": environment(), **result}, digits=5)
            print(*key, f"{row['cpu_seconds']:.0f} s of CPU", flush=True)
    return result


# ---- tables ----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    """Of all pairs: how many, shares within two pairs of bounds, means of left and lost, share that met its bound."""
    of = [row["pairs"][kind] for row in rows if kind in row["pairs"]]
    left, lost, met = ([value for pairs in of for value in pairs[column]] for column in ("left", "lost", "met"))
    found: dict[str, float] = {"pairs": len(left)}
    if left:
        found |= {"left": mean(left), "lost": mean(lost), "met": mean(met)}
        for bound in (1, 2):
            most = bound / 100 + 1e-9
            found[f"within {bound}"] = mean(a <= most and b <= most for a, b in zip(left, lost, strict=True))
    return found


def tables(result: Mapping[str, Any]) -> str:
    """In Markdown: the models before anything was forgotten; what came of each kind of request; network by network."""
    rows = result["rows"]

    def some(**keys: str) -> list[dict[str, Any]]:
        return [row for row in rows if all(row[key] == value for key, value in keys.items())]

    def nodes(what: str, **keys: str) -> list[float]:
        return [value for row in some(**keys) for value in row[what].values()]

    kinds = [{"data": name, "training": training} for name, training in product(TASKS, TRAINED)]
    kinds = [of for of in kinds if some(**of, rule=CENTRED)]
    before, after, networks = [], {kind: list[list[Any]]() for kind in KINDS}, []
    for of in kinds:
        there = some(**of, rule=TWICE)
        found = {scenario: nodes("accuracy", **of, rule=TWICE, scenario=scenario) for scenario in SCENARIOS}
        cells = [f"{percent(mean(one))} ({percent(min(one))})" if one else "" for one in found.values()]
        cells += [percent(mean(nodes("zero_wins", **of, rule=rule))) for rule in (TWICE, CENTRED)]
        for part in there[0]["each"]:
            least, most = (pick(row["each"][part][k] for row in there) for k, pick in enumerate((min, max)))
            cells.append(f"{least} to {most}" if least < most else str(least))
        before.append([*of.values(), *cells])
        for kind, rule, seeds in product(KINDS, RULES, (SEEDS, NEW)):
            measured_there = [row for row in some(**of, rule=rule) if row["seed"] in seeds]
            one = summary(measured_there, kind)
            if one["pairs"]:
                which = ", ".join(map(str, sorted({row["seed"] for row in measured_there})))
                shares = [percent(one[key]) for key in ("within 1", "within 2", "left")]
                shares += [f"{100 * one['lost']:.2f}", percent(one["met"])]
                after[kind].append([*of.values(), rule, which, one["pairs"], *shares])
        for scenario in SCENARIOS:
            sums = [summary(some(**of, scenario=scenario, rule=rule), kind) for rule, kind in SHOWN]
            cells = [f"{percent(one['within 1'])} of {one['pairs']}" if one["pairs"] else "" for one in sums]
            networks.append([*of.values(), scenario, *cells])
    heads = ["data", "trained", *SCENARIOS, "0 wins", "centred", "validation, a class", "test, a class"]
    out = [f"**Before**: accuracy on test data, mean of models and seeds (the lowest).\n\n{markdown(heads, before, 2)}"]
    heads = ["data", "trained", "rule", "seeds", "pairs", "≤ 1, ≤ 1", "≤ 2, ≤ 2", "left", "lost", "met"]
    out += [f"**{title.capitalize()}**\n\n{markdown(heads, after[kind], 3)}" for kind, title in KINDS.items()]
    heads = ["data", "trained", "network", *(f"{rule}, {kind}" for rule, kind in SHOWN)]
    out.append(f"**Network by network**, ≤ 1, ≤ 1\n\n{markdown(heads, networks, 3)}")
    return "\n".join(out)


def percent(share: float) -> str:
    """With one digit."""
    return f"{100 * share:.1f} %"


def main() -> None:
    """Run the study, or only write its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fiun_fast_other_data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.tables:
        study(arguments.seed or (*SEEDS, *NEW), arguments.cache, arguments.results)
    text = tables(json.loads(arguments.results.read_text()))
    print(text)
    if arguments.results == RESULTS:
        fill(PAGE, "other-data", f"\n{text}\n")


if __name__ == "__main__":
    main()
