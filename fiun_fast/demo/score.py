"""What the demo's `ff.tune` maximises, node by node, on validation data alone.

The least of `forgotten + max(0, fall of rest) + 0.1 sure_forgotten - 0.02 sure_rest` wins, where `forgotten` and `rest`
are accuracies on the classes to forget and on the others, and `sure_*` the mean probability given to the true label.
The last two only break ties, towards a margin: many candidates reach the same accuracies, and the one that has just
crossed the line on validation data fails on new data. The rule is the same for every node, class, network and seed;
docs/choosing.md compares it with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .data import Samples

Model = nn.Module | Mapping[str, Tensor]  # as `ff.tune` has them


class Seen(NamedTuple):
    """What a model does on one set of data: shares of 0..1, nan where there is no data."""

    forgotten: float  # accuracy
    rest: float
    sure_forgotten: float  # mean probability of the true label
    sure_rest: float

    @property
    def left(self) -> float:
        """What tuning layer by layer calls it."""
        return self.forgotten

    @property
    def kept(self) -> float:
        """Likewise."""
        return self.rest

    @property
    def sure_left(self) -> float:
        """Likewise."""
        return self.sure_forgotten


def accuracy_loss(seen: Seen, before: Seen) -> float:
    """What is left of the forgotten, and what was lost on the rest."""
    return seen.forgotten + max(0.0, before.rest - seen.rest)


def loss(seen: Seen, before: Seen) -> float:
    """The demo's rule: the same; among equals, the one that is furthest from the line."""
    terms = (accuracy_loss(seen, before), 0.1 * seen.sure_forgotten, -0.02 * seen.sure_rest)
    return sum(term for term in terms if not math.isnan(term))


@torch.no_grad()
def look(model: Callable[[Tensor], Tensor], data: Samples, forget: Sequence[int]) -> Seen:
    """What a model does that maps the data's inputs [n, ...] to logits [n, classes]."""
    logits, labels = model(data.images), data.labels
    gone = torch.isin(labels, torch.tensor(forget, device=labels.device))
    right = (logits.argmax(1) == labels).float()
    sure = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    return Seen(*(values[of].mean().item() for values in (right, sure) for of in (gone, ~gone)))


class ClassScore:
    """`evaluate` for `ff.tune`: (node, model) -> score, higher is better.

    Args:
        models: node -> model, not dampened yet.
        data: node -> validation data.
        forget: node -> the classes to be forgotten there.
        tail: model -> the part of it that dampening can reach and that takes the data, such as a head that takes
            features.

    """

    def __init__(
        self,
        models: Mapping[str, Model],
        data: Mapping[str, Samples],
        forget: Mapping[str, Sequence[int]],
        tail: Callable[[Any], Callable[[Tensor], Tensor]] = lambda model: model,
    ) -> None:
        self._data, self._forget, self._tail = data, forget, tail
        self._before = {node: self._look(node, models[node]) for node in forget}
        self.last = dict(self._before)  # node -> what was seen last

    def __call__(self, name: str, model: Model) -> float:
        """The score of the model as it is now."""
        self.last[name] = seen = self._look(name, model)
        return -loss(seen, self._before[name])

    def _look(self, name: str, model: Model) -> Seen:
        return look(self._tail(model), self._data[name], self._forget[name])
