"""What is to be estimated, and the few things every estimator does with a batch: forward, loss, slices of samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import EstimationError
from ..fisher import Fisher

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Job:
    """One Fisher to be estimated: of which parameters, from which loss."""

    model: nn.Module
    selected: dict[str, nn.Parameter]
    estimator: str = "batch"
    loss_fn: Loss | None = None  # None: mean cross entropy
    forward_fn: Forward | None = None
    backend: str | None = None
    samples: int = 1  # labels drawn for each example, estimator "expected"; 0: every class, weighted
    seed: int = 0

    def forward(self, batch: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Outputs and targets of a batch, by `model` in the place of the job's."""
        return (self.forward_fn or _forward)(self.model if model is None else model, batch)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss of a batch, as the caller's function gives it."""
        return (self.loss_fn or nn.functional.cross_entropy)(outputs, targets)


class Estimate(ABC):
    """A Fisher in the making: a step for each batch, then the result. Runs inside `preserved`."""

    @abstractmethod
    def step(self, batch: Any) -> None:
        """Add a batch."""

    @abstractmethod
    def result(self) -> Fisher:
        """The Fisher over all batches so far."""


def checked(loss: Any, step: int, selected: dict[str, nn.Parameter]) -> Tensor:
    """The loss, or an EstimationError where it is no scalar or does not depend on the selected parameters."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise EstimationError(f"batch {step}: the loss is {found}, expected a scalar tensor")
    if not loss.requires_grad:
        raise EstimationError(f"batch {step}: the loss does not depend on {', '.join(list(selected)[:4])}")
    return loss


def per_sample(job: Job, outputs: Any, targets: Any, step: int) -> Tensor:
    """Loss of each sample alone [B], for B = count(outputs): what the job's loss gives for a batch of only that sample.

    A loss function that returns [B] (reduction="none") is taken at its word; a scalar one is called on each sample's
    slice of outputs and targets.

    Raises:
        EstimationError: the loss is something else.

    """
    samples = count(outputs)
    if job.loss_fn is None and isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        return cross_entropies(outputs, targets)
    loss: Any = job.loss(outputs, targets)
    if isinstance(loss, Tensor) and samples > 1 and loss.shape == (samples,):
        return loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise EstimationError(
            f"batch {step}: the loss is {found}, expected a scalar, the mean over samples, or one number a sample"
        )
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
    """The same tree with these samples only: every tensor whose first dimension is `samples` is cut."""
    return pytree.tree_map(lambda leaf: leaf[rows] if is_cut(leaf, samples) else leaf, tree)


def is_cut(leaf: Any, samples: int) -> bool:
    """Whether a leaf of a batch carries the samples on its first dimension."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples


def count(tree: Any) -> int:
    """Samples of a batch or of outputs: the first dimension of the first tensor that has one, 0 where none has."""
    return next((leaf.shape[0] for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def _forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Unpack (inputs, targets), move them to the model's device, and call the model."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)
    if not pair:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
        raise EstimationError(
            f"a batch is a {type(batch).__name__}{size}, expected (inputs, targets), two tensors; for batches "
            "of another form pass forward_fn=lambda model, batch: (model(batch[…]), batch[…])"
        )
    device = next(model.parameters()).device
    outputs = model(batch[0].to(device))
    if not isinstance(outputs, Tensor):
        raise EstimationError(
            f"the model returns a {type(outputs).__name__}, expected a tensor; pass forward_fn=lambda model, batch: "
            "(model(batch[0])[…], batch[1])"
        )
    return outputs, batch[1].to(device)
