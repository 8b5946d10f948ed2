"""Four inheritance networks after the paper, each a recipe: which node starts from which, and on what it trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .data import CLASSES, DigitNet, Digits, Samples, fresh, jitter, join

View = Callable[[Tensor], Tensor]  # how a model sees the images: [n, 1, 8, 8] -> [n, 1, 8, 8]
VIEWS: dict[str, View] = {
    "as is": lambda images: images,
    "negative": lambda images: 1 - images,
    "mirrored": lambda images: images.flip(3),
    "turned": lambda images: images.rot90(1, (2, 3)),
    "blurred": lambda images: functional.avg_pool2d(images, 3, 1, 1),
}


@dataclass(frozen=True, eq=False)
class Step:
    """One node to be made: copy the parent, average the parents or start fresh, then train `steps` mini-batches."""

    name: str
    parents: tuple[str, ...] = ()
    samples: Samples | None = None  # the node's own data
    steps: int = 0
    rate: float = 2e-3
    rehearse: bool = False  # train on the data of all ancestors as well
    view: View = VIEWS["as is"]


@dataclass(frozen=True)
class Recipe:
    """A network to be made, and the origin of requests to forget each class: the node where its data entered."""

    scenario: str
    steps: tuple[Step, ...]  # parents first
    origin: Mapping[int, str]
    seed: int
    device: str = "cpu"
    smoothing: float = 0.1  # of the labels, in training

    def __getitem__(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

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

    def reached(self, classes: Collection[int]) -> dict[str, tuple[int, ...]]:
        """Which of these classes reach which node; nodes that none reaches are left out."""
        found = {}
        for node in self.steps:
            above = {step.name for step in self.line(node.name)}
            found[node.name] = tuple(label for label in sorted(classes) if self.origin[label] in above)
        return {name: labels for name, labels in found.items() if labels}


def grow(
    recipe: Recipe,
    *,
    without: Collection[int] = (),
    keep: Mapping[str, DigitNet] | None = None,
    effort: float = 1.0,
    watch: Callable[[Sequence[Step]], Iterable[Step]] = iter,
) -> dict[str, DigitNet]:
    """Make every model of the recipe, in order.

    Retraining is the same with `without` (classes left out) and `keep` (models that stay as they are). Every node has
    a random stream of its own, so that keeping one changes no other. `effort` scales the steps of all nodes; `watch`
    hands the steps on, one by one, and may show how far it is.
    """
    models = dict(keep or {})
    for number, step in enumerate(watch(recipe.steps)):
        if step.name in models:
            continue
        parents = [models[parent] for parent in step.parents]
        if len(parents) > 1:
            model = average(parents, torch.stack([_counts(recipe[parent], without) for parent in step.parents]))
        else:
            model = copy.deepcopy(parents[0]) if parents else fresh(recipe.seed)
        samples = recipe.data(step.name) if step.rehearse else step.samples
        if samples is not None:
            shown, seed = sorted(samples.classes), 1000 * recipe.seed + number
            _train(model, samples.without(without), shown, step, max(2, round(effort * step.steps)), seed, recipe)
        models[step.name] = model
    return {step.name: models[step.name] for step in recipe.steps}


def _train(
    model: DigitNet, samples: Samples, shown: list[int], step: Step, steps: int, seed: int, recipe: Recipe
) -> None:
    """Train in place with AdamW on jittered mini-batches of 64; leaves the model in eval mode.

    Label smoothing keeps every prediction a little unsure. Without it a class that is learned perfectly has little
    gradient left, and its empirical forget Fisher nearly vanishes (docs/choosing.md).

    The loss ranks only the classes `shown` to this model: a client does not unlearn what others know, and a chain does
    not push down classes that are still to come.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.zeros(CLASSES, dtype=torch.int64)
    rank[shown] = torch.arange(len(shown))
    model.to(recipe.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=step.rate, weight_decay=1e-3)
    for k in range(steps):
        warmup, decay = min(1.0, (k + 1) / 10), 0.5 + 0.5 * math.cos(math.pi * k / steps)
        optimizer.param_groups[0]["lr"] = step.rate * warmup * decay
        images, labels = samples.take(torch.randint(len(samples.labels), (64,), generator=generator))
        logits = model(step.view(jitter(images, generator)).to(recipe.device))[:, shown]
        loss = functional.cross_entropy(logits, rank[labels].to(recipe.device), label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def average(models: Sequence[DigitNet], seen: Tensor) -> DigitNet:
    """The mean of several models; a class' row of the head weighs each model by how many samples of it that model saw.

    seen: [models, classes]. A client that never saw a class has nothing to say about its row; a plain mean would
    dilute the row of a class that only one client holds.
    """
    result = copy.deepcopy(models[0])
    weights = torch.where(seen.sum(0) > 0, seen, torch.ones_like(seen)).to(result.head.weight)
    weights /= weights.sum(0)
    for name, value in result.state_dict().items():
        values = torch.stack([model.state_dict()[name] for model in models])
        if name.startswith("head."):
            rows = weights.view(*weights.shape, *[1] * (values.ndim - 2))
            value.copy_((rows * values).sum(0))
        else:
            value.copy_(values.double().mean(0))
    return result.eval()


def _counts(step: Step, without: Collection[int]) -> Tensor:
    """How many samples of each class the node itself trained on: [classes]."""
    labels = step.samples.without(without).labels if step.samples else torch.arange(0)
    return torch.bincount(labels, minlength=CLASSES).float()


def _deal(samples: Samples, owners: Sequence[int], common: float, seed: int) -> list[Samples]:
    """Deal the samples to a server and one holder for each owned class.

    An owned class goes to its holder alone. Of every other class the server takes the share `common`, and the holders
    split the rest evenly.
    """
    hands: list[list[Tensor]] = [[] for _ in range(len(owners) + 1)]
    for label, rows in enumerate(samples.by_class(seed)):
        if label in owners:
            hands[1 + owners.index(label)].append(rows)
            continue
        cut = round(common * len(rows))
        for hand, part in zip(hands, [rows[:cut], *rows[cut:].chunk(len(owners))], strict=True):
            hand.append(part)
    return [samples.take(torch.cat(hand)) for hand in hands]


def federated(digits: Digits, seed: int, owners: Sequence[int] = (0, 1, 2)) -> Recipe:
    """A server and three clients over three rounds of weight averaging; client i alone holds class owners[i]."""
    server, *clients = _deal(digits.train, owners, common=0.25, seed=seed)
    steps = [Step("server", (), server, 150, 3e-3)]
    for r in (1, 2, 3):
        parent = steps[-1].name
        work, rate = (100, 4e-3) if r == 1 else (30, 1e-3)  # short later rounds: clients drift apart less
        names = tuple(f"{letter}{r}" for letter in "ABC")
        steps += [Step(name, (parent,), own, work, rate) for name, own in zip(names, clients, strict=True)]
        steps.append(Step(f"avg{r}", names))
    return Recipe("federated", tuple(steps), dict(zip(owners, ("A1", "B1", "C1"), strict=True)), seed)


def data_parallel(digits: Digits, seed: int, owners: Sequence[int] = (3, 4, 5)) -> Recipe:
    """A base model, three workers that each train on a shard, their average; worker i alone holds owners[i]."""
    base, *shards = _deal(digits.train, owners, common=0.5, seed=seed)
    workers = ("worker1", "worker2", "worker3")
    steps = [Step("base", (), base, 150, 3e-3)]
    steps += [Step(name, ("base",), shard, 100) for name, shard in zip(workers, shards, strict=True)]
    # The owner of all shards can do what a federation cannot: a short pass over everything settles the average.
    steps.append(Step("merged", workers, None, 30, 1e-3, rehearse=True))
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
    steps = [Step("source", (), digits.train, 200, 3e-3)]
    steps += [Step(name, ("source",), digits.train, 100, view=view) for name, view in VIEWS.items() if name != "as is"]
    return Recipe("transfer", tuple(steps), dict.fromkeys(range(CLASSES), "source"), seed)


SCENARIOS: dict[str, Callable[..., Recipe]] = {
    "federated": federated,
    "data-parallel": data_parallel,
    "incremental": incremental,
    "transfer": transfer,
}
