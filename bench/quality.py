"""How well classes are forgotten, on test data that no choice saw: all classes, several seeds, four networks.

    python bench/quality.py               bench/results/quality.json and the tables in docs/choosing.md
    python bench/quality.py --seed 0      that seed alone; may be repeated
    python bench/quality.py --tables      only the tables, from the committed results

The demo's four networks of digits (a chain, a star, two kinds of averages with several parents), a seed at a time. One
request forgets one class, two merged ones two classes that entered at different nodes. A *pair* is what a request, or
two, and a node make. Every rule chooses on validation data, and what it chose is judged once, on test data. Results are
kept seed by seed and network by network: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import fiun_fast as ff
from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.demo.data import CLASSES, DigitNet, Digits, Samples, accuracies, batches, jittered, join, load_digits
from fiun_fast.demo.experiment import COPIES, SEARCH, Network
from fiun_fast.demo.networks import SCENARIOS, Recipe, grow
from fiun_fast.tuning import tune_plan

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "quality.json", ROOT / "docs" / "choosing.md"
ESTIMATORS: dict[str, tuple[Any, int]] = {
    "softened": ("softened", 16),
    "batch of 64": ("batch", 64),
    "batch of 16": ("batch", 16),
    "sample": ("sample", 64),  # of this and the next the size of the batches changes nothing
    "expected": ("expected", 64),
    "label-free": ("label_free", 64),
}
UNLEARN = "unlearn_, as it is"  # which takes rows off their mean where nothing else meets its bound
LAST: dict[str, Any] = {"points": 24, "lams": [0.01]}  # of `tune`
WHOLE: dict[str, dict[str, Any]] = {
    "one α": {"points": 12, "lams": [0.1]},
    "by layer": {"by": "layer"},
}
MORE: dict[str, tuple[Any, int]] = {f"by layer, {name}": ESTIMATORS[name] for name in ("softened", "expected")}
SETS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ESTIMATORS},
    "best of batch of 16, expected": ("batch of 16", "expected"),
    "best of batch of 64, expected": ("batch of 64", "expected"),
    "best of batch of 16, expected, label-free": ("batch of 16", "expected", "label-free"),
    "best of softened, expected": ("softened", "expected"),
    "best of all six": tuple(ESTIMATORS),
    UNLEARN: (UNLEARN,),
}
KINDS = {"single": "one request", "merged": "two requests merged"}
BY_LAYER = "by layer, best of two"
JITTERED = "whole model, with jittered validation data"
SCOPES = LAST_LAYER, SURE, ALL, _ = "last layer", "last layer, trained without label smoothing", "whole model", JITTERED
COPIES_OF_VALIDATION = 3  # jittered ones, beside the data themselves
RULES: dict[str, dict[str, tuple[str, ...]]] = {
    LAST_LAYER: SETS,
    SURE: SETS,
    ALL: {rule: (rule,) for rule in WHOLE},
    JITTERED: {**{rule: (rule,) for rule in MORE}, BY_LAYER: tuple(MORE)},
}
SEEDS = range(9)
# Seeds that were run once, after the rules were made; whatever else there is was looked at meanwhile.
NEW = {LAST_LAYER: (6, 7, 8), SURE: (6, 7, 8), ALL: (3, 4), JITTERED: (6, 7, 8)}
Found = dict[str, list[float]]  # left, lost, score of every pair, in order


def recipe_of(scenario: str, digits: Digits, seed: int) -> Recipe:
    """A network; where three classes have holders, other ones with every seed."""
    if scenario in ("federated", "data-parallel"):
        owners = [(3 * seed + k) % CLASSES for k in range(3)]
        return SCENARIOS[scenario](digits, seed, owners)  # type: ignore[call-arg]
    return SCENARIOS[scenario](digits, seed)


def trained(recipe: Recipe, cache: Path) -> dict[str, DigitNet]:
    """Its models, from the cache if they are there."""
    file = cache / f"{recipe.scenario}-{recipe.seed}{'' if recipe.smoothing else '-sure'}.pt"
    if file.exists():
        states = torch.load(file)
        models = {name: DigitNet() for name in states}
        for name, model in models.items():
            model.load_state_dict(states[name])
            model.eval()
        return models
    models = grow(recipe)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save({name: model.state_dict() for name, model in models.items()}, file)
    return models


def requests_of(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What is to be forgotten: ("single", one class), ("merged", two classes from different origins)."""
    for label in recipe.origin:
        yield "single", (label,)
    pairs = [p for p in combinations(recipe.origin, 2) if recipe.origin[p[0]] != recipe.origin[p[1]]]
    for pair in pairs[:1] if len(recipe.origin) == 3 else [p for p in pairs if sum(p) % 5 == 2]:
        yield "merged", pair


class Heads:
    """A network whose models are last layers and whose data are what goes into them: the same numbers, but much faster.

    `use` says which estimator the Fishers are by.
    """

    def __init__(self, recipe: Recipe, digits: Digits, models: Mapping[str, DigitNet]) -> None:
        self.recipe, self._models = recipe, models
        self._heads = {name: model.head for name, model in models.items()}
        self._kept = {name: copy.deepcopy(head.state_dict()) for name, head in self._heads.items()}
        self._data: dict[tuple[str, int | None], tuple[Samples, torch.Generator]] = {}
        sets: dict[str, dict[str, Samples]] = {"validation": {}, "test": {}}
        for name in models:
            known = recipe.data(name).classes
            for split, copies in (("validation", SEARCH["last-layer"][1]), ("test", 0)):
                samples, generator = getattr(digits, split).only(known), torch.Generator().manual_seed(recipe.seed)
                samples = join([samples, jittered(samples, copies, generator)]) if copies else samples
                sets[split][name] = self._features(name, samples)
        self._test = sets["test"]
        self._score = ff.ClassScore({name: [samples] for name, samples in sets["validation"].items()}, forget={})

    @torch.no_grad()
    def _features(self, node: str, samples: Samples) -> Samples:
        images = self.recipe[node].view(samples.images)
        return Samples(torch.cat([self._models[node].body(some) for some in images.split(256)]), samples.labels)

    def _fisher(self, node: str, label: int | None) -> ff.Fisher:
        """Over all data of a node, or of one class, as `Network.fisher` makes it."""
        name, size = self._estimator
        return ff.estimate_fisher(self._heads[node], self._loader(node, label, size), estimator=name)

    def _loader(self, node: str, label: int | None, size: int = 16) -> list[Samples]:
        if (node, label) not in self._data:
            data, generator = self.recipe.data(node), torch.Generator().manual_seed(self.recipe.seed)
            samples = data if label is None else data.only([label])
            samples = jittered(samples, COPIES["original" if label is None else "forget"], generator)
            self._data[node, label] = self._features(node, samples), generator
        samples, generator = self._data[node, label]
        again = torch.Generator()
        again.set_state(generator.get_state())
        return list(batches(samples, size, again))

    def use(self, estimator: tuple[Any, int]) -> None:
        """Fishers by that estimator, from now on."""
        self._estimator = estimator
        self._requests: dict[int, ff.ForgetRequest] = {}
        self.dag = ff.InheritanceDAG()
        for step in self.recipe.steps:
            head = self._heads[step.name]
            self.dag.add_model(step.name, head, fisher=self._fisher(step.name, None), parents=step.parents)

    def request(self, label: int) -> ff.ForgetRequest:
        """To forget one class, by the samples of it where they entered."""
        if label not in self._requests:
            origin = self.recipe.origin[label]
            self._requests[label] = ff.ForgetRequest(origin, self._fisher(origin, label))
        return self._requests[label]

    def unlearned(self, classes: Sequence[int]) -> Iterator[tuple[float, float, float]]:
        """As `judged`, by one call of `unlearn_` with its defaults."""
        dag, forget = ff.InheritanceDAG(), [(label, self.recipe.origin[label]) for label in classes]
        for step in self.recipe.steps:
            dag.add_model(step.name, self._heads[step.name], data=self._loader(step.name, None), parents=step.parents)
        requests = [ff.ForgetRequest(origin, data=self._loader(origin, label)) for label, origin in forget]
        nodes = [node for node, its in self.recipe.reached(classes).items() if len(its) == len(classes)]
        before = {node: self.accuracy(node, classes) for node in nodes}
        outcome = ff.unlearn_(dag, requests, self.score(classes), samples=None)
        after = {node: self.accuracy(node, classes) for node in nodes}
        outcome.undo_()
        for node in nodes:
            yield after[node][0], before[node][1] - after[node][1], outcome[node].score

    def score(self, classes: Sequence[int]) -> ff.ClassScore:
        """What is wanted of every node that the classes reach."""
        return self._score.forgetting(self.recipe.reached(classes))

    def accuracy(self, node: str, forgotten: Sequence[int]) -> tuple[float, float]:
        """Test accuracy on the forgotten classes, and on the others."""
        return accuracies(self._heads[node], self._test[node], forgotten)

    def restore(self) -> None:
        """Put the last layers back."""
        for name, head in self._heads.items():
            head.load_state_dict(self._kept[name])


def judged(network: Heads | Network, classes: Sequence[int], **how: Any) -> Iterator[tuple[float, float, float]]:
    """Left, lost and score of every pair; with two classes, of the nodes that both reach."""
    plan = ff.plan(network.dag, [network.request(label) for label in classes], alpha=0.0)
    chosen = tune_plan(plan, network.score(classes), **how)
    plan.set_values_(chosen)
    nodes = [node for node, its in network.recipe.reached(classes).items() if len(its) == len(classes)]
    before = {node: network.accuracy(node, classes) for node in nodes}
    plan.run_()
    after = {node: network.accuracy(node, classes) for node in nodes}
    network.restore()
    for node in nodes:
        yield after[node][0], before[node][1] - after[node][1], chosen[node].score


def measured(
    scenario: str, scope: str, seed: int, cache: Path, there: Collection[str] = ()
) -> tuple[dict[str, Found], dict[str, float]]:
    """One network of one seed, of rules not there yet: "kind, rule" -> what came of its pairs; and seconds by rule."""
    digits = load_digits(seed)
    recipe = recipe_of(scenario, digits, seed)
    recipe = replace(recipe, smoothing=0.0) if scope == SURE else recipe
    models = trained(recipe, cache)
    found: dict[str, Found] = {}
    seconds: dict[str, float] = {}
    for rule, network, how in _networks(scope, recipe, digits, models, there):
        began = time.perf_counter()
        for kind, classes in requests_of(recipe):
            columns = found.setdefault(f"{kind}, {rule}", {"left": [], "lost": [], "score": []})
            for values in network.unlearned(classes) if how is None else judged(network, classes, **how):
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(round(value, 5))
        seconds[rule] = round(time.perf_counter() - began, 2)
    return found, seconds


def rules_of(scope: str) -> list[str]:
    """What is measured there."""
    return list({JITTERED: MORE, ALL: WHOLE}.get(scope, {**ESTIMATORS, UNLEARN: None}))


def _networks(
    scope: str, recipe: Recipe, digits: Digits, models: dict[str, DigitNet], there: Collection[str]
) -> Iterator[tuple[str, Any, dict[str, Any] | None]]:
    """Each rule of a scope that is not there yet, what it goes by, and the arguments of `tune`; None: `unlearn_`."""
    if scope == JITTERED:
        for rule, (name, size) in MORE.items():
            if rule in there:
                continue
            yield rule, Network(recipe, digits, models, "all", name, size, COPIES_OF_VALIDATION), WHOLE["by layer"]
    elif scope == ALL:
        network = Network(recipe, digits, models, "all")
        for rule, how in WHOLE.items():
            yield rule, network, how
    else:
        heads = Heads(recipe, digits, models)
        for rule, estimator in ESTIMATORS.items():
            if rule not in there:
                heads.use(estimator)
                yield rule, heads, LAST
        if UNLEARN not in there:
            yield UNLEARN, heads, None


def study(seeds: Sequence[int], cache: Path, results: Path, scopes: Sequence[str] = SCOPES) -> dict[str, Any]:
    """Measure what the results do not have yet, and write them after every network."""
    torch.set_num_threads(1)  # these models are too small to share
    result: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"rows": []}
    rows = {(row["scope"], row["seed"], row["scenario"]): row for row in result["rows"]}
    for scope, seed, scenario in product(scopes, seeds, SCENARIOS):
        row = rows.get((scope, seed, scenario))
        there = {} if row is None else row["seconds"]
        if not set(rules_of(scope)) - set(there):
            continue
        began = time.process_time()
        found, seconds = measured(scenario, scope, seed, cache, there)
        if row is None:
            row = {"scope": scope, "seed": seed, "scenario": scenario, "cpu_seconds": 0.0, "seconds": {}, "pairs": {}}
            result["rows"].append(row)
        row["cpu_seconds"] += time.process_time() - began
        row["seconds"] |= seconds
        row["pairs"] |= found
        write_json(results, {"environment": environment(), **result}, digits=5)
        print(f"{scope}, seed {seed}, {scenario}: {row['cpu_seconds']:.0f} s of CPU", flush=True)
    return result


# ---- tables ----------------------------------------------------------------------------------------------------------


def best(found: Mapping[str, Found], kind: str, rules: Sequence[str]) -> list[tuple[float, float]]:
    """Left and lost of every pair by the rule with the best validation score; the first of equals."""
    columns = [found[f"{kind}, {rule}"] for rule in rules if f"{kind}, {rule}" in found]
    pairs = []
    for k in range(len(columns[0]["left"]) if columns else 0):
        column = max(columns, key=lambda c: c["score"][k])
        pairs.append((column["left"][k], column["lost"][k]))
    return pairs


def summary(rows: Sequence[dict], kind: str, rules: Sequence[str]) -> dict[str, float]:
    """Of all pairs: how many, what is left and lost on average, and the shares within two pairs of bounds."""
    pairs = [pair for row in rows for pair in best(row["pairs"], kind, rules)]
    found: dict[str, float] = {"pairs": len(pairs)}
    if pairs:
        left, lost = zip(*pairs, strict=True)
        found |= {"left": mean(left), "lost": mean(lost)}
        for bound in (1, 2):
            found[f"within {bound}"] = mean(a <= bound / 100 + 1e-9 and b <= bound / 100 + 1e-9 for a, b in pairs)
    return found


def tables(result: dict) -> str:
    """Tables in Markdown: for each scope and kind of request every rule; and network by network."""
    out = []
    for scope, sets in RULES.items():
        for kind in KINDS:
            halves = halved(result["rows"], scope)
            if not any(halves):
                continue
            which = [", ".join(map(str, sorted({row["seed"] for row in half}))) or "none" for half in halves]
            lines = []
            for name, rules in sets.items():
                before, after = (summary(half, kind, rules) for half in halves)
                whole = summary([*halves[0], *halves[1]], kind, rules)
                cells = [percent(half, f"within {bound}") for bound in (1, 2) for half in (before, after)]
                lines.append([name, *cells, percent(whole, "left"), f"{100 * whole['lost']:.2f}"])
            counts = [f"{summary(half, kind, next(iter(sets.values())))['pairs']} pairs" for half in halves]
            title = f"**{scope.capitalize()}, {KINDS[kind]}**: seeds {which[0]} ({counts[0]})"
            title += f"; new seeds {which[1]} ({counts[1]})."
            heads = ["rule", "≤ 1, ≤ 1", "new seeds", "≤ 2, ≤ 2", "new seeds", "left", "lost"]
            out.append(f"{title}\n\n{markdown(heads, lines)}")
    lines = []
    for scenario in SCENARIOS:
        cells = []
        for scope, rules in ((LAST_LAYER, SETS[UNLEARN]), (JITTERED, RULES[JITTERED][BY_LAYER])):
            rows = [row for row in complete(result["rows"]) if (row["scope"], row["scenario"]) == (scope, scenario)]
            for kind in KINDS:
                found = summary(rows, kind, rules)
                cells.append(f"{percent(found, 'within 1')} of {found['pairs']}" if found["pairs"] else "")
        lines.append([scenario, *cells])
    heads = ["network", *(f"{scope}, {kind}" for scope in ("last layer", "whole model by layer") for kind in KINDS)]
    out.append(f"**Network by network**, ≤ 1, ≤ 1, all seeds.\n\n{markdown(heads, lines)}")
    return "\n".join(out)


def halved(rows: Sequence[dict], scope: str) -> list[list[dict]]:
    """Rows of complete seeds of a scope: of those that were looked at, and of new ones."""
    own = [row for row in complete(rows) if row["scope"] == scope]
    return [[row for row in own if (row["seed"] in NEW[scope]) == new] for new in (False, True)]


def reach(result: dict) -> str:
    """The README's table: what `unlearn_` does by default, over all seeds."""
    lines = []
    for scope, named, rules in (
        (LAST_LAYER, "last layer", SETS[UNLEARN]),
        (JITTERED, "whole model, by layer", RULES[JITTERED][BY_LAYER]),
        (ALL, "whole model, one α", ("one α",)),
    ):
        for kind in KINDS:
            found = summary([row for row in complete(result["rows"]) if row["scope"] == scope], kind, rules)
            cells = [percent(found, key) for key in ("within 1", "within 2", "left")]
            lines.append([named, KINDS[kind], found["pairs"], *cells, f"{100 * found['lost']:.2f}"])
    heads = ["in scope", "forgotten", "pairs", "≤ 1 % left, ≤ 1 lost", "≤ 2, ≤ 2", "left", "lost"]
    return markdown(heads, lines, left=2)


def complete(rows: Sequence[dict]) -> list[dict]:
    """Those of seeds whose four networks are all there."""
    there = {(row["scope"], row["seed"], row["scenario"]) for row in rows}
    return [row for row in rows if all((row["scope"], row["seed"], one) in there for one in SCENARIOS)]


def percent(found: Mapping[str, float], key: str) -> str:
    """Nothing where nothing was found."""
    return f"{100 * found[key]:.1f} %" if key in found else ""


def main() -> None:
    """Run the study, or only write its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--scope", action="append", choices=SCOPES)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fiun_fast_quality")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.tables:
        study(arguments.seed or SEEDS, arguments.cache, arguments.results, arguments.scope or SCOPES)
    text = tables(json.loads(arguments.results.read_text()))
    print(text)
    if arguments.results == RESULTS:
        fill(PAGE, "quality", f"\n{text}\n")
        fill(ROOT / "README.md", "quality", f"\n{reach(json.loads(RESULTS.read_text()))}\n")


if __name__ == "__main__":
    main()
