"""What every estimator shares: what is asked for, and forward, loss and samples of a batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..arguments import ESTIMATORS, PER, Estimator, Per, check_count, check_one_of
from ..errors import ArgumentError, EstimationError
from ..fisher import Fisher
from .predictions import Elementwise, Predictions, fitted
from .raised import in_loss
from .reading import Forward, Loss, OwnLoss, Reading, Wanted, check_scalar, count, in_transform
from .totals import BY_SAMPLE, Totals

MOST = (1 << 63) - 1
REDUCTIONS = {"mean": 1, "sum": 2}  # what becomes of a loss when its batch is taken twice
TEMPERATURE = 4.0  # of `softened`; docs/choosing.md
OWN_LOSSES = {
    "expected": "cross entropy",
    "softened": f"cross entropy of the logits over {TEMPERATURE:g}",
    "label_free": "mean ‖f(x)‖²",
}
WANTED: dict[str, Wanted] = {"expected": "counted", "label_free": "outputs"}


@dataclass(frozen=True)
class Options:
    """What `estimate_fisher` and `estimate_fishers` were asked for, as documented there.

    Raises:
        ArgumentError: unknown estimator, a loss function for an estimator that has its own, negative `samples`, a
            number beyond 64 bits, or `per` where it does not apply.

    """

    estimator: Estimator = "batch"
    loss_fn: Loss | None = None  # None: the model's own where it returns one, else mean cross entropy
    forward_fn: Forward | None = None
    backend: str | None = None
    samples: int = 1  # labels drawn for each example, estimator "expected"; 0: every class, weighted
    seed: int = 0
    per: Per = "sequence"  # what one sample is
    target_index: int | None = None  # position of the targets in a tuple; None: last

    def __post_init__(self) -> None:
        check_one_of("estimator", self.estimator, ESTIMATORS)
        check_one_of("per", self.per, PER)
        if self.loss_fn is not None and (own := OWN_LOSSES.get(self.estimator)):
            raise ArgumentError(f"estimator {self.estimator!r} has a loss of its own, {own}: leave loss_fn out")
        check_count("samples", self.samples, least=0, most=MOST)
        check_count("seed", self.seed, least=-MOST, most=MOST)  # what torch's generators take
        if self.target_index is not None:
            check_count("target_index", self.target_index, least=-MOST, most=MOST)
        if self.per == "token" and self.estimator not in BY_SAMPLE:
            raise ArgumentError(f"per='token' is for {' and '.join(BY_SAMPLE)}; {self.estimator} goes by batches")
        if self.per == "token" and self.loss_fn is not None:
            raise ArgumentError("per='token' takes the cross entropy of each token: leave loss_fn out")

    def __hash__(self) -> int:  # a function of the caller's need have no hash
        """By which function it is, not by what that says of itself."""
        plain = (self.estimator, self.backend, self.samples, self.seed, self.per, self.target_index)
        return hash((*plain, id(self.loss_fn), id(self.forward_fn)))

    @cached_property
    def reading(self) -> Reading:
        """How batches are read."""
        wanted: Wanted = WANTED.get(self.estimator) or ("loss" if self.loss_fn is None else "targets")
        return Reading(wanted, self.forward_fn, self.target_index)


@dataclass(frozen=True)
class Job:
    """One Fisher to be estimated: for which parameters of which model, and how."""

    model: nn.Module
    selected: dict[str, nn.Parameter]
    options: Options

    @property
    def estimator(self) -> str:
        """One of `ESTIMATORS`."""
        return self.options.estimator

    @property
    def by_sample(self) -> bool:
        """Whether samples are averaged over, not batches."""
        return self.options.estimator in BY_SAMPLE

    def forward(self, batch: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Outputs and targets of a batch, by `model` instead of the job's if given; see `Reading.forward`."""
        return self.options.reading.forward(self.model if model is None else model, batch)

    def loss(self, outputs: Any, targets: Any) -> Any:
        """The mean loss of a batch: what the caller's function gives, the model's own, or cross entropy."""
        if self.options.loss_fn is not None:
            return called(self.options.loss_fn, outputs, targets)
        if self.estimator == "softened":
            return softened(outputs, targets)
        if isinstance(targets, OwnLoss):
            return targets.loss
        return checked(fitted(outputs, targets)).mean()

    def known_loss(self, outputs: Any, targets: Any) -> Predictions | Elementwise | None:
        """The loss in terms of each sample's outputs and targets; None where it is a function of the caller's."""
        if self.options.loss_fn is not None:
            return None
        return targets.apart if isinstance(targets, OwnLoss) else fitted(outputs, targets)

    def counted(self, outputs: Any, targets: Any) -> Tensor | None:
        """Which samples have a target that counts: bool [B]; None: all."""
        known = self.known_loss(outputs, targets)
        return None if known is None else known.counted.flatten(1).any(1) if known.counted.dim() > 1 else known.counted


class Estimate(ABC):
    """A Fisher in the making: a step for each batch, then the result. Runs inside `preserved`."""

    @property
    @abstractmethod
    def totals(self) -> Totals:
        """What it adds to."""

    @abstractmethod
    def step(self, batch: Any) -> None:
        """Add a batch."""

    @abstractmethod
    def result(self) -> Fisher:
        """The Fisher over all batches so far."""


class NotApartError(EstimationError):
    """A model's own loss, one number for several samples, that is not a known function of its outputs and labels."""


def per_sample(job: Job, outputs: Any, targets: Any) -> Tensor:
    """Loss of each sample alone [B], B = count(outputs): what the job's loss is for a batch of only that sample.

    A loss function that returns [B] (reduction="none") is trusted; one that returns a scalar is called on each sample's
    slice of outputs and targets. The model's own loss must be a known one, or that of one sample.

    Raises:
        NotApartError: the model's own loss is neither.
        EstimationError: the loss is something else.

    """
    samples = count(outputs)
    if isinstance(targets, OwnLoss) and samples <= 1:
        return targets.loss.reshape(1)
    known = job.known_loss(outputs, targets)
    if known is not None:
        return checked(known).of_samples()
    if isinstance(targets, OwnLoss):
        raise NotApartError(
            f"the model's own loss is one number for {samples} samples that cannot be told apart; pass forward_fn and "
            "loss_fn"
        )
    if samples == 0:
        found = f"a tensor {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise EstimationError(
            f"the outputs are {found}, expected [B, …], from which a loss can be taken for each sample; for a model "
            f'that returns its loss, take estimator="batch" or forward_fn=lambda model, batch: (model(…), None)'
        )
    loss: Any = job.loss(outputs, targets)
    if isinstance(loss, Tensor) and samples > 1 and loss.shape == (samples,):
        return loss
    check_scalar(loss, "a scalar, the mean over samples, or one number for each sample")
    if samples == 1:
        return loss.reshape(1)
    one = [slice(n, n + 1) for n in range(samples)]
    return torch.stack([job.loss(take(outputs, n, samples), take(targets, n, samples)).reshape(()) for n in one])


def softened(outputs: Any, targets: Any) -> Tensor:
    """Mean cross entropy of logits over `TEMPERATURE`, by which samples that a model is sure of count, too.

    Raises:
        EstimationError: there are no logits with labels, as where the model's own loss is not known to be that of some.

    """
    if isinstance(targets, OwnLoss):
        known = targets.apart  # which says whether labels are those of the next position
        if isinstance(outputs, Tensor) and outputs.dim() == 2 and not isinstance(known, Elementwise):
            labels = targets.labels
            flat = isinstance(labels, Tensor) and labels.numel() == len(outputs)
            known = fitted(outputs, labels.reshape(-1) if flat else labels)  # type: ignore[union-attr]
    else:
        known = fitted(outputs, targets)
    if not isinstance(known, Predictions):
        raise EstimationError(
            "the model's own loss is not known as a cross entropy of its logits, which estimator 'softened' takes; "
            "pass forward_fn=lambda model, batch: (logits, targets)"
        )
    return checked(replace(known, logits=known.logits / TEMPERATURE)).mean()


Known = TypeVar("Known", bound=Predictions | Elementwise)


def checked(loss: Known) -> Known:
    """The same, after a look at the labels, where they can be looked at."""
    if isinstance(loss, Predictions) and not in_transform():
        loss.check()
    return loss


def called(loss_fn: Loss, outputs: Any, targets: Any) -> Any:
    """The value of the caller's loss function; what it raises is an EstimationError."""
    with in_loss(outputs, targets, count(outputs) <= 1):
        return loss_fn(outputs, targets)


def in_backward_of(job: Job, outputs: Any, targets: Any) -> AbstractContextManager[None]:
    """The same around a backward: of one sample that lost its axis, torch may notice only there."""
    late = job.options.loss_fn is not None and count(outputs) == 1
    return in_loss(outputs, targets, True) if late else nullcontext()


def reduction_of(job: Job, outputs: Any, targets: Any) -> str:
    """How a batch's loss is made of those of its samples, "mean" or "sum"; "" where it cannot be told.

    A loss function of the caller's is asked, or tried on the batch taken twice: a sum doubles.
    """
    loss_fn = job.options.loss_fn
    if loss_fn is None:
        return "" if isinstance(targets, OwnLoss) and targets.apart is None else "mean"
    if isinstance(asked := getattr(loss_fn, "reduction", None), str):
        return asked
    if job.by_sample or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return ""
    try:
        with torch.no_grad():
            once, twice = (float(loss_fn(*(torch.cat([t] * n) for t in (outputs, targets)))) for n in (1, 2))
    except Exception:  # whatever a caller's function may raise on a batch of another size
        return ""
    return next((how for how, factor in REDUCTIONS.items() if math.isclose(twice, factor * once, rel_tol=1e-4)), "")


def take(tree: Any, rows: slice, samples: int) -> Any:
    """The same tree with only these samples: every tensor whose first dimension is `samples` is sliced."""
    return pytree.tree_map(lambda leaf: leaf[rows] if is_cut(leaf, samples) else leaf, tree)


def is_cut(leaf: Any, samples: int) -> bool:
    """Whether a leaf of a batch carries the samples on its first dimension."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples
