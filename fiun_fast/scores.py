"""What tuning maximises: how little of the forgotten is left, how much of the rest is kept, on validation data.

`Score` is what `tune` and `unlearn_` know of it; `ClassScore` is the one for classifiers. Any other function of name
and model may take its place, and says nothing then but a number.
"""

from __future__ import annotations

import copy
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .answering import Answered, Answering
from .arguments import check_function, check_number
from .dag import Model
from .errors import ArgumentError, EstimationError
from .estimators.loaders import is_iterator
from .estimators.reading import Forward

if TYPE_CHECKING:
    from typing_extensions import Self

Marks = Callable[[Any, Tensor], Tensor]  # (inputs, labels [B]) -> [B] bool
Classes = int | Iterable[int]
MARGINS = (0.1, 0.02)
ROUNDING = 1e-9
HIGHEST = (1 << 63) - 1  # labels are int64


@dataclass(frozen=True)
class Seen:
    """What a model does on validation data.

    Attributes:
        left: what is left of the forgotten, 0..1.
        kept: what is kept of the rest, 0..1.

    """

    left: float
    kept: float

    def within(self, before: Seen, left: float, lost: float) -> bool:
        """Whether at most so much is left, and at most so much of what was kept before is lost."""
        return self.left <= left + ROUNDING and before.kept - self.kept <= lost + ROUNDING


class Score(ABC):
    """An `evaluate` for `tune` that says what it measured: (name, model) -> score, higher is better.

    Attributes:
        before: node -> what was seen when it was looked at first, or `begin` was called; falls are counted from there.
        last: node -> what the last call saw.

    """

    before: dict[str, Seen]
    last: dict[str, Seen]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # not __init__, which those that are derived may forget
        """Make one that has seen nothing."""
        made = super().__new__(cls)
        vars(made).update(before={}, last={})
        return made

    def begin(self, models: Mapping[str, Model]) -> None:
        """Take down what these models do now; `tune` and `unlearn_` call it before anything is dampened."""
        self.before |= {name: self.looked(name, model) for name, model in models.items()}

    def __call__(self, name: str, model: Model) -> float:
        """The score of the model as it is now."""
        self.last[name] = seen = self.looked(name, model)
        loss = self.loss(seen, self.before.setdefault(name, seen))
        try:
            return -loss
        except TypeError:
            raise ArgumentError(f"loss(…) for node {name!r} gave a {type(loss).__name__}, expected a number") from None

    def looked(self, name: str, model: Model) -> Seen:
        """The same as `look`, checked.

        Raises:
            ArgumentError: no `Seen`, or `left` or `kept` is no number or NaN.

        """
        seen = self.look(name, model)
        if not isinstance(seen, Seen):
            raise ArgumentError(f"look({name!r}, …) gave a {type(seen).__name__}, expected a Seen(left, kept)")
        for what, share in (("left", seen.left), ("kept", seen.kept)):
            if not isinstance(share, numbers.Real) or math.isnan(share):
                found = "NaN" if isinstance(share, numbers.Real) else f"a {type(share).__name__}"
                raise ArgumentError(f"look({name!r}, …) gave {found} for what is {what}, expected a number")
        return seen

    @abstractmethod
    def look(self, name: str, model: Model) -> Seen:
        """What the model does now; nothing is compared with it."""

    @abstractmethod
    def loss(self, seen: Any, before: Any) -> float:
        """What is to be made small."""


@dataclass(frozen=True)
class ClassesSeen(Seen):
    """The same of a classifier: `left` and `kept` are accuracies.

    Attributes:
        sure_left, sure_kept: mean probability of the true label, on the forgotten and on the rest.

    """

    sure_left: float
    sure_kept: float


class ClassScore(Score):
    """`evaluate` for `tune` and `unlearn_`, of a classifier that is to forget some samples and keep the others.

        score = -(left + max(0, kept before - kept) + 0.1 sure_left - 0.02 sure_kept)

    `left` and `kept` are accuracies on what is to be forgotten and on everything else, `sure_*` the mean probability
    that is given to the true label there. The last two only break ties, towards a margin: many candidates reach the
    same accuracies, and the one that has just crossed the line on validation data fails on new data. docs/choosing.md
    compares the rule with others.

    Where nothing but the last layer changes, what goes into it is kept, and a call is one matrix product (`answering`
    says when the whole model runs). Models run in eval mode and are left as they were. A score serves one thread at
    a time.

    Args:
        loader: validation data, batches with labels in any form that `estimate_fisher` reads, gone over several times;
            or {node: loader}.
        forget: what is to be forgotten: a class or several; {node: classes}; or a function (x, y) -> [B] bool, which
            gets the first part of a batch, or all of it where that is no tuple, and the labels [B] int64.
        margins: weights of `sure_left` and `sure_kept`; (0, 0) for accuracy alone.
        forward_fn, target_index: as for `estimate_fisher`.

    Raises:
        ArgumentError: no loader, an iterator, which can be gone over once, or `forget` or `margins` is none of these.
            From a call: nothing is given for that node, its model is a dict of tensors, or `forget` returns something
            else.
        EstimationError: from a call: there is nothing to forget or nothing to keep among a node's data, a batch cannot
            be read, or there is not one prediction a sample; the message names the node.

    """

    def __init__(
        self,
        loader: Iterable[Any] | Mapping[str, Iterable[Any]],
        *,
        forget: Classes | Mapping[str, Classes] | Marks,
        margins: tuple[float, float] = MARGINS,
        forward_fn: Forward | None = None,
        target_index: int | None = None,
    ) -> None:
        super().__init__()
        self._loaders = check_loaders("loader", loader)
        self._forget = _checked(forget)
        if not isinstance(margins, Sequence) or isinstance(margins, str) or len(margins) != len(MARGINS):
            raise ArgumentError(f"margins is {margins!r:.40}, expected two weights, (of sure_left, of sure_kept)")
        self._margins = [check_number(f"margins[{i}]", weight) for i, weight in enumerate(margins)]
        self._how: dict[str, Any] = {"forward_fn": forward_fn, "target_index": target_index}
        self._answering: dict[str, tuple[Model, Answering]] = {}
        self._marked: dict[str, tuple[Tensor, Tensor]] = {}  # labels, and which of them are of classes to be forgotten

    def forgetting(self, forget: Classes | Mapping[str, Classes]) -> ClassScore:
        """The same for another request: classes, or {node: classes}; what is kept of the models serves both.

        Raises:
            ArgumentError: this one's `forget` is a function, or the other's is.

        """
        if callable(self._forget) or callable(forget):
            raise ArgumentError(
                "a score whose forget is a function is made anew for each: ClassScore(loader, forget=…)"
            )
        other = copy.copy(self)
        other.before, other.last, other._marked, other._forget = {}, {}, {}, _checked(forget)
        return other

    def begin(self, models: Mapping[str, Model]) -> None:
        """As of any score; what is kept of models that changed meanwhile is made anew."""
        for name in models:
            if name in self._answering:
                self._answering[name][1].renew()
        super().begin(models)

    def look(self, name: str, model: Model) -> ClassesSeen:
        """What the model does now."""
        known = self._answering.get(name)
        if known is None or known[0] is not model:
            known = self._answering[name] = (model, self._new(name, model))
        answered = known[1]()
        if not callable(self._forget):
            answered = answered._replace(marked=self._of_classes(name, answered.labels))
        if not 0 < (marked := int(answered.marked.sum())) < len(answered.marked):
            raise EstimationError(
                f"validation data of node {name!r}: {'all' if marked else 'none'} of its {len(answered.marked)} "
                "samples are to be forgotten; expected some of these and some others"
            )
        return seen(answered)

    def head(self, name: str) -> nn.Module | None:
        """The part of a model that was looked at whose output itself is its logits; None: no such part was found."""
        return self._answering[name][1].head if name in self._answering else None

    def _of_classes(self, name: str, labels: Tensor) -> Tensor:
        known = self._marked.get(name)
        if known is None or known[0] is not labels:
            if isinstance(self._forget, Mapping) and name not in self._forget:
                there = ", ".join(map(str, self._forget))
                raise ArgumentError(f"forget has no classes for node {name!r}; it has them for {there}")
            classes = self._forget[name] if isinstance(self._forget, Mapping) else self._forget
            known = labels, torch.isin(labels, torch.tensor(classes, dtype=torch.int64, device=labels.device))
            self._marked[name] = known
        return known[1]

    def loss(self, seen: ClassesSeen, before: ClassesSeen) -> float:
        """The rule above."""
        return class_loss(seen, before, *self._margins)

    def _new(self, name: str, model: Model) -> Answering:
        bare, forget, what = check_runs(name, model), self._forget, f"validation data of node {name!r}"
        mark = partial(_marked, forget) if callable(forget) else _none
        return Answering(bare, loader_of(self._loaders, name), mark, what, **self._how)


def accuracy_loss(seen: Seen, before: Seen) -> float:
    """What is left of the forgotten, and what was lost on the rest."""
    return seen.left + max(0.0, before.kept - seen.kept)


def class_loss(seen: ClassesSeen, before: Seen, sure_left: float = MARGINS[0], sure_kept: float = MARGINS[1]) -> float:
    """The same; among equals, less where the model is further from the line."""
    return accuracy_loss(seen, before) + sure_left * seen.sure_left - sure_kept * seen.sure_kept


def seen(answered: Answered) -> ClassesSeen:
    """Accuracies, and how sure the model is, on what is marked and on the rest; NaN where there is none."""
    logits, labels, gone = answered
    z = logits.float()
    right = z.argmax(1) == labels
    sure = (z.gather(1, labels[:, None])[:, 0] - z.logsumexp(1)).exp()
    both = torch.stack([right, sure]).double()
    forgotten, all_of_it, count = both @ gone.double(), both.sum(1), gone.sum()
    left, sure_left = (forgotten / count).tolist()
    kept, sure_kept = ((all_of_it - forgotten) / (len(gone) - count)).tolist()
    return ClassesSeen(left, kept, sure_left, sure_kept)


def check_loaders(what: str, loader: Any) -> Any:
    """One loader, or {node: loader}; an ArgumentError where it is none, or can be gone over only once."""
    for where, one in loader.items() if isinstance(loader, Mapping) else [(None, loader)]:
        named = what if where is None else f"{what}[{where!r}]"
        if is_iterator(one):
            raise ArgumentError(
                f"{named} is a {type(one).__name__}, which can be gone over once, and it is needed several times: pass "
                "a list of batches or a DataLoader"
            )
        if not isinstance(one, Iterable) and not hasattr(one, "__getitem__"):
            raise ArgumentError(f"{named} is a {type(one).__name__}, expected a loader of batches, or {{node: loader}}")
    return loader


def loader_of(loaders: Any, name: str) -> Iterable[Any]:
    """The loader of that node."""
    if not isinstance(loaders, Mapping):
        return loaders
    if name not in loaders:
        raise ArgumentError(f"no validation data for node {name!r}; there are some for {', '.join(map(str, loaders))}")
    return loaders[name]


def check_runs(name: str, model: Model) -> nn.Module:
    """The model; an ArgumentError where it is a dict of tensors."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"node {name!r} is a {type(model).__name__} of tensors, which cannot be run: pass a module, or a score of "
            "your own"
        )
    return model


def _checked(forget: Any) -> Any:
    """A function, {node: classes} or classes."""
    if callable(forget):
        check_function("forget", forget, "x", "y")
        return forget
    if isinstance(forget, Mapping):
        return {name: _classes(f"forget[{name!r}]", some) for name, some in forget.items()}
    return _classes("forget", forget)


def _classes(what: str, given: Any) -> list[int]:
    plain = given.tolist() if isinstance(given, (Tensor, np.ndarray)) else given  # of no dimension, a number
    listed = [plain] if isinstance(plain, numbers.Integral) else plain
    if isinstance(listed, (str, Mapping)) or not isinstance(listed, Iterable):
        raise ArgumentError(f"{what} is a {type(given).__name__}, expected classes, {{node: classes}} or a function")
    found = []
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, numbers.Integral) or not -HIGHEST <= int(one) <= HIGHEST:
            raise ArgumentError(f"{what} holds {one!r:.40}, expected classes, which are whole numbers of 64 bits")
        found.append(int(one))
    return found


def _none(batch: Any, labels: Tensor) -> Tensor:
    return torch.zeros_like(labels, dtype=torch.bool)


def _marked(forget: Marks, batch: Any, labels: Tensor) -> Tensor:
    found: Any = forget(batch[0] if isinstance(batch, (tuple, list)) else batch, labels)
    try:
        marked = found if isinstance(found, Tensor) else torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(
            f"forget(x, y) gave a {type(found).__name__}, expected bool {list(labels.shape)}: whether each sample is "
            "to be forgotten"
        ) from None
    if marked.dtype != torch.bool or marked.shape != labels.shape:
        raise ArgumentError(
            f"forget(x, y) gave {str(marked.dtype).removeprefix('torch.')} {list(marked.shape)}, expected bool "
            f"{list(labels.shape)}: whether each sample is to be forgotten"
        )
    return marked.to(labels.device)
