"""How these classes go over a loader: reading a batch, its forward and loss, and what the sums are divided by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import fiun_fast as ff
from fiun_fast.estimators.job import called, checked
from fiun_fast.estimators.loaders import NumberedBatches
from fiun_fast.estimators.predictions import fitted
from fiun_fast.estimators.reading import Forward, Loss, OwnLoss, Reading, Wanted, check_loss, check_measurable

NORMALIZE = ("batches", "samples", "weighted")
FORMS = "(x, y), (x, …, y), (x, y, idx) with target_index=1, or a dict with labels"
ADVICE = "batch_fn=lambda batch: (…, …), or forward_fn=lambda model, batch: (outputs, targets)"


@dataclass(frozen=True)
class Batches:
    """How batches are read.

    Attributes:
        target_index: position of the targets in a tuple; None: last.
        truncate: how many samples of a batch are used, from its start; None: all.
        batch_fn: batch -> batch of a form that is understood.
        forward_fn: (model, batch) -> (outputs, targets), instead of all this; `truncate` then does not apply.
        loss_fn: (outputs, targets) -> scalar mean loss; None: cross entropy. For a dict the model's own loss is used.
        label_free: labels are not needed.

    """

    target_index: int | None = None
    truncate: int | None = None
    batch_fn: Callable[[Any], Any] | None = None
    forward_fn: Forward | None = None
    loss_fn: Loss | None = None
    label_free: bool = False

    @cached_property
    def reading(self) -> Reading:
        """The package's own reading, with these options."""
        wanted: Wanted = "outputs" if self.label_free else "loss"
        return Reading(wanted, self.forward_fn, self.target_index, None if self.label_free else FORMS, ADVICE)

    def prepared(self, batch: Any) -> Any:
        """The batch after `batch_fn` and `truncate`."""
        if self.batch_fn is not None:
            batch = self.batch_fn(batch)
        return _cut(batch, self.truncate) if self.truncate is not None and self.forward_fn is None else batch

    def forward(self, model: nn.Module, batch: Any, device: torch.device) -> tuple[Any, Any, int]:
        """Outputs, targets, and the number of samples, 0 where it cannot be told, of a batch that is prepared.

        Raises:
            EstimationError: a form of batch, or of outputs, that is not understood.

        """
        outputs, targets = self.reading.forward(model, batch, device)
        return outputs, targets, _samples(outputs, targets, batch)

    def loss(self, outputs: Any, targets: Any) -> Any:
        """The loss of what `forward` returned."""
        if isinstance(targets, OwnLoss):
            return targets.loss
        if self.loss_fn is not None:
            return called(self.loss_fn, outputs, targets)
        return checked(fitted(outputs, targets)).mean()


class Pass:
    """One pass over a loader: forward and loss of each batch, and how many batches and samples there were."""

    def __init__(self, form: Batches, device: torch.device, how: str) -> None:
        self._form, self._device, self.how = form, device, how
        self.batches = self.samples = self._first = self._now = 0
        self._counted = False

    def over(self, loader: Iterable[Any], model: nn.Module) -> NumberedBatches:
        """The loader's batches, with their numbers; each counts once, however often it is forwarded."""
        return NumberedBatches(loader, self._form.reading, model, self._next)

    def _next(self, batch: Any) -> Any:
        self._counted = False
        return self._form.prepared(batch)

    def forward(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """Outputs and targets of a batch."""
        outputs, targets, self._now = self._form.forward(model, batch, self._device)
        if self.how != "batches" and self._now == 0:
            raise ff.EstimationError(f'cannot tell how many samples it has, as normalize="{self.how}" needs')
        self._first = self._first or self._now
        if not self._counted:
            self.batches, self.samples, self._counted = self.batches + 1, self.samples + self._now, True
        if self._form.label_free and self.how == "weighted":
            outputs = outputs * math.sqrt(self._now / self._first)
        return outputs, targets

    def loss(self, outputs: Any, targets: Any) -> Any:
        """Loss of a batch; with "weighted" it is scaled so that squared gradients count by their samples."""
        loss = self._form.loss(outputs, targets)
        if self.how == "weighted" and self._now != self._first and isinstance(loss, Tensor):
            loss = loss * math.sqrt(self._now / self._first)
        return loss

    def strict_loss(self, outputs: Any, targets: Any, names: Iterable[str]) -> Tensor:
        """As the published classes write it: LFSSD squares a norm instead of summing squares.

        Raises:
            EstimationError: it is not a scalar, not finite, or depends on none of the named parameters.

        """
        if self._form.label_free:
            check_measurable(outputs)
            loss = outputs.reshape(len(outputs), -1).norm(p="fro", dim=1).pow(2).mean()
        else:
            loss = self.loss(outputs, targets)
        if not bool(check_loss(loss, names).isfinite()):
            raise ff.EstimationError("its loss is not finite, and so would every importance be")
        return loss

    def divisor(self) -> float:
        """What the sums are divided by."""
        if self.how == "weighted":
            return self.samples / self._first
        return self.samples if self.how == "samples" else self.batches


def _cut(batch: Any, most: int) -> Any:
    """The first samples of a batch: of every tensor in it that has a dimension."""
    if isinstance(batch, Mapping):
        return {key: _cut(part, most) if isinstance(part, Tensor) else part for key, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_cut(part, most) if isinstance(part, Tensor) else part for part in batch]
    return batch[:most] if isinstance(batch, Tensor) and batch.dim() else batch


def _samples(outputs: Any, targets: Any, batch: Any) -> int:
    parts: list[Any] = [] if isinstance(targets, OwnLoss) else [targets, outputs]
    parts += batch.values() if isinstance(batch, Mapping) else []
    return next((part.shape[0] for part in parts if isinstance(part, Tensor) and part.dim()), 0)
