"""Four inheritance networks after the paper, each a recipe: which node starts from which, and on what it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .data import CLASSES, DigitNet, Digits, Samples, View, average, fresh, join, shuffled, train


def as_is(images: Tensor) -> Tensor:
    """See the images as they are."""
    return images


@dataclass(frozen=True)
class Step:
    """One node to be made: copy the parent, average the parents or start fresh, then train `steps` mini-batches."""

    name: str
    parents: tuple[str, ...] = ()
    samples: Samples | None = None  # the node's own data
    steps: int = 0
    rate: float = 2e-3
    rehearse: bool = False  # train on the data of all ancestors as well
    view: View = as_is  # the node's own way of seeing images


@dataclass(frozen=True)
class Recipe:
    """A network to be made, and the origin of requests to forget each class: the node where its data entered."""

    scenario: str
    steps: tuple[Step, ...]
    origin: Mapping[int, str]
    seed: int
    device: str = "cpu"
    smoothing: float = 0.1  # of the labels, in training

    def __getitem__(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def reached(self, classes: Collection[int]) -> dict[str, tuple[int, ...]]:
        """Which of these classes reach which node; nodes that none reaches are left out."""
        reach: dict[str, set[int]] = {}
        for step in self.steps:  # parents come first
            here = {label for label in classes if self.origin[label] == step.name}
            reach[step.name] = here.union(*(reach[parent] for parent in step.parents))
        return {name: tuple(sorted(labels)) for name, labels in reach.items() if labels}

    def line(self, name: str) -> list[Step]:
        """The node's step and those of all its ancestors, in order: everything that went into it."""
        line = {name}
        for step in reversed(self.steps):
            if step.name in line:
                line.update(step.parents)
        return [step for step in self.steps if step.name in line]

    def data(self, name: str) -> Samples:
        """What went into the node: its own data and that of all its ancestors, each set once."""
        sets = {id(step.samples): step.samples for step in self.line(name) if step.samples is not None}
        return join(sets.values())


def grow(
    recipe: Recipe,
    *,
    without: Collection[int] = (),
    keep: Mapping[str, DigitNet] | None = None,
    effort: float = 1.0,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, DigitNet]:
    """Make every model of the recipe, in order.

    Retraining is the same with `without` (classes left out) and `keep` (models that stay as they are). Every node has
    a random stream of its own, so that keeping one changes no other. `effort` scales the steps of all nodes.
    """
    models: dict[str, DigitNet] = dict(keep or {})
    for number, step in enumerate(recipe.steps):
        if step.name in models:
            continue
        parents = [models[parent] for parent in step.parents]
        if len(parents) > 1:
            model = average(parents, torch.stack([_counts(recipe[parent], without) for parent in step.parents]))
        else:
            model = copy.deepcopy(parents[0]) if parents else fresh(recipe.seed)
        samples = recipe.data(step.name) if step.rehearse else step.samples
        if samples is not None:
            train(
                model,
                samples.without(without),
                steps=max(2, round(effort * step.steps)),
                rate=step.rate,
                seed=1000 * recipe.seed + number,
                shown=sorted(samples.classes),
                view=step.view,
                device=recipe.device,
                smoothing=recipe.smoothing,
            )
        models[step.name] = model
        tick(step.name)
    return {step.name: models[step.name] for step in recipe.steps}


def _counts(step: Step, without: Collection[int]) -> Tensor:
    """How many samples of each class the node itself trained on: [classes]."""
    labels = step.samples.without(without).labels if step.samples else torch.arange(0)
    return torch.bincount(labels, minlength=CLASSES).float()


def _deal(train_data: Samples, owners: Sequence[int], common: float, seed: int) -> list[Samples]:
    """Deal the samples to a server and one holder for each owned class.

    An owned class goes to its holder alone. Of every other class the server takes the share `common`, and the holders
    split the rest evenly.
    """
    generator = torch.Generator().manual_seed(seed)
    hands: list[list[Tensor]] = [[] for _ in range(len(owners) + 1)]
    for label in range(CLASSES):
        rows = shuffled((train_data.labels == label).nonzero()[:, 0], generator)
        if label in owners:
            hands[1 + owners.index(label)].append(rows)
            continue
        cut = round(common * len(rows))
        hands[0].append(rows[:cut])
        for hand, part in zip(hands[1:], rows[cut:].chunk(len(owners)), strict=True):
            hand.append(part)
    return [Samples(train_data.images[torch.cat(hand)], train_data.labels[torch.cat(hand)]) for hand in hands]


def federated(digits: Digits, seed: int, owners: Sequence[int] = (0, 1, 2), rounds: int = 3) -> Recipe:
    """A server and three clients over three rounds of weight averaging; client i alone holds class owners[i]."""
    server, *clients = _deal(digits.train, owners, common=0.25, seed=seed)
    steps = [Step("server", (), server, 150, 3e-3)]
    for r in range(1, rounds + 1):
        parent = steps[-1].name
        work, rate = (100, 4e-3) if r == 1 else (30, 1e-3)  # short later rounds: clients drift apart less
        names = [f"{letter}{r}" for letter in "ABC"]
        steps += [Step(name, (parent,), own, work, rate) for name, own in zip(names, clients, strict=True)]
        steps.append(Step(f"avg{r}", tuple(names)))
    return Recipe("federated", tuple(steps), {c: f"{letter}1" for c, letter in zip(owners, "ABC", strict=True)}, seed)


def data_parallel(digits: Digits, seed: int, owners: Sequence[int] = (3, 4, 5)) -> Recipe:
    """A base model, three workers that each train on a shard, their average; worker i alone holds owners[i]."""
    base, *shards = _deal(digits.train, owners, common=0.5, seed=seed)
    workers = [f"worker{i}" for i in (1, 2, 3)]
    steps = [Step("base", (), base, 150, 3e-3)]
    steps += [Step(name, ("base",), shard, 100) for name, shard in zip(workers, shards, strict=True)]
    # The owner of all shards can do what a federation cannot: a short pass over everything settles the average.
    steps.append(Step("merged", tuple(workers), None, 30, 1e-3, rehearse=True))
    return Recipe("data-parallel", tuple(steps), dict(zip(owners, workers, strict=True)), seed)


def incremental(digits: Digits, seed: int) -> Recipe:
    """A chain of five: each node starts from the one before and learns two more classes, rehearsing the old ones."""
    steps = []
    for k in range(5):
        new, parents = digits.train.only([2 * k, 2 * k + 1]), (f"v{k}",) if k else ()
        steps.append(Step(f"v{k + 1}", parents, new, 80 + 20 * k, 2e-3 if k else 3e-3, rehearse=True))
    return Recipe("incremental", tuple(steps), {c: f"v{c // 2 + 1}" for c in range(CLASSES)}, seed)


def transfer(digits: Digits, seed: int) -> Recipe:
    """One source, four children, each fine-tuned to see the source's data in another way."""
    views: dict[str, View] = {
        "negative": lambda images: 1 - images,
        "mirrored": lambda images: images.flip(3),
        "turned": lambda images: images.rot90(1, (2, 3)),
        "blurred": lambda images: functional.avg_pool2d(images, 3, 1, 1),
    }
    steps = [Step("source", (), digits.train, 200, 3e-3)]
    steps += [Step(name, ("source",), digits.train, 100, view=view) for name, view in views.items()]
    return Recipe("transfer", tuple(steps), dict.fromkeys(range(CLASSES), "source"), seed)


SCENARIOS: dict[str, Callable[..., Recipe]] = {
    "federated": federated,
    "data-parallel": data_parallel,
    "incremental": incremental,
    "transfer": transfer,
}
