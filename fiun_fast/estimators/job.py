"""What every estimator shares: what is asked for, and forward, loss and samples of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..arguments import ESTIMATORS, Estimator, check_count, check_one_of
from ..errors import ArgumentError, EstimationError
from ..fisher import Fisher
from .reading import Forward, Loss, OwnLoss, Reading, check_scalar

MOST = (1 << 63) - 1
OWN_LOSSES = {"expected": "cross entropy", "label_free": "mean ‖f(x)‖²"}


@dataclass(frozen=True)
class Options:
    """What `estimate_fisher` and `estimate_fishers` were asked for, as documented there.

    Raises:
        ArgumentError: unknown estimator, a loss function for an estimator that has its own, negative `samples`, or a
            number beyond 64 bits.

    """

    estimator: Estimator = "batch"
    loss_fn: Loss | None = None  # None: the model's own where it returns one, else mean cross entropy
    forward_fn: Forward | None = None
    backend: str | None = None
    samples: int = 1  # labels drawn for each example, estimator "expected"; 0: every class, weighted
    seed: int = 0

    def __post_init__(self) -> None:
        check_one_of("estimator", self.estimator, ESTIMATORS)
        if self.loss_fn is not None and (own := OWN_LOSSES.get(self.estimator)):
            raise ArgumentError(f"estimator {self.estimator!r} has a loss of its own, {own}: leave loss_fn out")
        check_count("samples", self.samples, least=0, most=MOST)
        check_count("seed", self.seed, least=-MOST, most=MOST)  # what torch's generators take

    @cached_property
    def reading(self) -> Reading:
        """How batches are read."""
        if self.estimator in OWN_LOSSES:
            return Reading("outputs", self.forward_fn)
        return Reading("loss" if self.loss_fn is None else "targets", self.forward_fn)


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

    def forward(self, batch: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Outputs and targets of a batch, by `model` instead of the job's if given; see `Reading.forward`."""
        return self.options.reading.forward(self.model if model is None else model, batch)

    def loss(self, outputs: Any, targets: Any) -> Any:
        """The mean loss of a batch: what the caller's function gives, the model's own, or cross entropy."""
        if self.options.loss_fn is None and isinstance(targets, OwnLoss):
            return targets.loss
        return (self.options.loss_fn or nn.functional.cross_entropy)(outputs, targets)


class Estimate(ABC):
    """A Fisher in the making: a step for each batch, then the result. Runs inside `preserved`."""

    @abstractmethod
    def step(self, batch: Any) -> None:
        """Add a batch."""

    @abstractmethod
    def result(self) -> Fisher:
        """The Fisher over all batches so far."""


def per_sample(job: Job, outputs: Any, targets: Any, step: int) -> Tensor:
    """Loss of each sample alone [B], B = count(outputs): what the job's loss is for a batch of only that sample.

    A loss function that returns [B] (reduction="none") is trusted; one that returns a scalar is called on each sample's
    slice of outputs and targets. The model's own loss must be that of one sample.

    Raises:
        EstimationError: the loss is something else.

    """
    samples = count(outputs)
    if isinstance(targets, OwnLoss):
        if samples > 1:
            raise EstimationError(
                f"batch {step}: the model's own loss is one number for {samples} samples that cannot be told apart; "
                "pass forward_fn and loss_fn"
            )
        return targets.loss.reshape(1)
    if job.options.loss_fn is None and isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        return cross_entropies(outputs, targets)
    loss: Any = job.loss(outputs, targets)
    if isinstance(loss, Tensor) and samples > 1 and loss.shape == (samples,):
        return loss
    check_scalar(loss, step, "a scalar, the mean over samples, or one number for each sample")
    if samples == 1:
        return loss.reshape(1)
    one = [slice(n, n + 1) for n in range(samples)]
    return torch.stack([job.loss(take(outputs, n, samples), take(targets, n, samples)).reshape(()) for n in one])


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of each sample alone: outputs [B, C, ...], targets [B, ...] -> [B]."""
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    if losses.dim() == 1:
        return losses
    counted = (targets != -100).flatten(1).sum(1) if not targets.is_floating_point() else losses[0].numel()
    return losses.flatten(1).sum(1) / counted


def take(tree: Any, rows: slice, samples: int) -> Any:
    """The same tree with only these samples: every tensor whose first dimension is `samples` is sliced."""
    return pytree.tree_map(lambda leaf: leaf[rows] if is_cut(leaf, samples) else leaf, tree)


def is_cut(leaf: Any, samples: int) -> bool:
    """Whether a leaf of a batch carries the samples on its first dimension."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples


def count(tree: Any) -> int:
    """Samples of a batch or of outputs: the first dimension of the first tensor that has one, 0 where none has."""
    return next((leaf.shape[0] for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dim()), 0)
