"""The paper's four networks with digits: who starts from whom, who holds which class, and what is to be forgotten.

Edges and holders are those of arXiv 2408.08493 and of the scripts published with it. Its ten-class data set learns six
classes first, and the others later; so do the incremental and the transfer network here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from ..demo.data import CLASSES, Digits, Samples
from ..demo.networks import Recipe, Step

REQUESTS = ("one class", "several classes")
FIRST = 6  # classes that the first model of the incremental and of the transfer network learns


@dataclass(frozen=True)
class Task:
    """A network that is to be made, and the classes that it is to forget, each where it entered."""

    request: str
    recipe: Recipe
    classes: tuple[int, ...]

    @property
    def requests(self) -> dict[str, tuple[int, ...]]:
        """Origin -> the classes that are to be forgotten there."""
        origins = dict.fromkeys(self.recipe.origin[label] for label in self.classes)
        return {at: tuple(c for c in self.classes if self.recipe.origin[c] == at) for at in origins}


def deal(samples: Samples, lacking: Sequence[Collection[int]], seed: int) -> list[Samples]:
    """Split samples among holders, class by class and evenly; holder i gets none of the classes lacking[i]."""
    hands: list[list[torch.Tensor]] = [[] for _ in lacking]
    for label, rows in enumerate(samples.by_class(seed)):
        takers = [hand for hand, without in zip(hands, lacking, strict=True) if label not in without]
        for hand, part in zip(takers, rows.tensor_split(len(takers)), strict=True):
            hand.append(part)
    return [samples.take(torch.cat(hand)) for hand in hands]


def chosen(seed: int, request: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Classes to be forgotten at a first origin and at a second: other ones for each seed, out of the first six."""
    a, b, c = ((seed + k) % FIRST for k in range(3))
    return ((a,), ()) if request == REQUESTS[0] else ((a, b), (c,))


def federated(digits: Digits, seed: int, request: str) -> Task:
    """Two models without the classes; r1 = mean of these, r2 from r1, r3 = mean(d, r2), r4 = mean(r1, r2), all trained.

    One class: the clients that train r1 and r2, and r3 and r4, hold it; asked for at r1. Several: the client of r1
    holds the first, that of r2 the others, that of r3 and r4 all; asked for at r1 and at r2.
    """
    first, second = chosen(seed, request)
    both = {*first, *second}
    lacking: list[Collection[int]] = [both, both, second, first, ()] if second else [both, both, (), ()]
    d, s, one, *others = deal(digits.train, lacking, seed)
    two, last = others if second else (one, others[0])
    steps = (
        Step("d", (), d, 150, 3e-3),
        Step("s", (), s, 150, 3e-3),
        Step("r1", ("d", "s"), one, 80),
        Step("r2", ("r1",), two, 80),
        Step("r3", ("d", "r2"), last, 80),
        Step("r4", ("r1", "r2"), last, 80),
    )
    origin = {**dict.fromkeys(range(CLASSES), "d"), **dict.fromkeys(first, "r1"), **dict.fromkeys(second, "r2")}
    return Task(request, Recipe("federated", steps, origin, seed), (*first, *second))


def data_parallel(digits: Digits, seed: int, request: str) -> Task:
    """u0 hands out its weights to u1, u2, u3, each with a shard; u4 is their mean, settled on all data.

    One class: asked for at u0. Several: u1 alone holds the first, u2 alone the others; asked for there.
    """
    first, second = chosen(seed, request)
    lacking: list[Collection[int]] = [(), (), (), ()]
    if second:
        both = {*first, *second}
        lacking = [both, second, first, both]
    base, *shards = deal(digits.train, lacking, seed)
    workers = ("u1", "u2", "u3")
    steps = [Step("u0", (), base, 150, 3e-3)]
    steps += [Step(name, ("u0",), shard, 80) for name, shard in zip(workers, shards, strict=True)]
    steps.append(Step("u4", workers, None, 40, 1e-3, rehearse=True))
    origin = dict.fromkeys(range(CLASSES), "u0")
    if second:
        origin |= {**dict.fromkeys(first, "u1"), **dict.fromkeys(second, "u2")}
    return Task(request, Recipe("data-parallel", tuple(steps), origin, seed), (*first, *second))


def incremental(digits: Digits, seed: int, request: str) -> Task:
    """A chain: u0 learns six classes, u1, u2 and u3 one more each and the old ones again.

    Asked for at u0; several: the class that is new at u1 as well.
    """
    steps = [Step("u0", (), digits.train.only(range(FIRST)), 150, 3e-3)]
    steps += [Step(f"u{k}", (f"u{k - 1}",), digits.train.only([FIRST + k - 1]), 80, rehearse=True) for k in (1, 2, 3)]
    origin = {**dict.fromkeys(range(FIRST), "u0"), **{FIRST + k - 1: f"u{k}" for k in (1, 2, 3)}}
    return _with_new("incremental", tuple(steps), origin, seed, request, FIRST)


def transfer(digits: Digits, seed: int, request: str) -> Task:
    """u0 learns six classes; u1, u2 and u3 start from it, with one, two and three classes more.

    Asked for at u0; several: the class that is new at u1 as well.
    """
    steps = [Step("u0", (), digits.train.only(range(FIRST)), 150, 3e-3)]
    for k in (1, 2, 3):
        new = digits.train.only(range(CLASSES - k, CLASSES))
        steps.append(Step(f"u{k}", ("u0",), new, 80, rehearse=True))
    origin = {**dict.fromkeys(range(FIRST), "u0"), CLASSES - 1: "u1"}
    return _with_new("transfer", tuple(steps), origin, seed, request, CLASSES - 1)


def _with_new(name: str, steps: tuple[Step, ...], origin: dict[int, str], seed: int, request: str, new: int) -> Task:
    """Classes of u0, and with several the class that is new at u1."""
    first, second = chosen(seed, request)
    return Task(request, Recipe(name, steps, origin, seed), (*first, new) if second else first)


NETWORKS: dict[str, Callable[[Digits, int, str], Task]] = {
    "federated": federated,
    "data-parallel": data_parallel,
    "incremental": incremental,
    "transfer": transfer,
}
