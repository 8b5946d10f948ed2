"""One pass over a loader: forward and loss of each batch, and what the sums are divided by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fiun_fast as ff

from .batches import Reading, samples_of

NORMALIZE = ("batches", "samples", "weighted")


class Pass:
    """One pass over a loader: forward and loss of a batch, and what was seen."""

    def __init__(self, reading: Reading, device: torch.device, how: str, label_free: bool) -> None:
        self._reading, self._device, self.how, self._label_free = reading, device, how, label_free
        self.batches = self.samples = self._first = self._now = 0
        self._counted = False

    def over(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches; each counts once, however often it is forwarded."""
        for batch in loader:
            self._counted = False
            yield batch

    def forward(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """Outputs and targets of a batch."""
        reading = self._reading
        batch = batch if reading.batch_fn is None else reading.batch_fn(batch)
        outputs, targets = replace(reading, batch_fn=None).forward(model, batch, self._device)
        self._now = samples_of(outputs, targets, batch)
        if reading.truncate is not None and reading.forward_fn is None:
            self._now = min(self._now, reading.truncate)
        if self.how != "batches" and self._now == 0:
            raise ff.EstimationError(f'batch {self.batches}: cannot tell its samples, as normalize="{self.how}" needs')
        self._first = self._first or self._now
        if not self._counted:
            self.batches, self.samples, self._counted = self.batches + 1, self.samples + self._now, True
        if self._label_free and self.how == "weighted":
            outputs = outputs * math.sqrt(self._now / self._first)
        return outputs, targets

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Its loss; weighted batches are scaled so that squared gradients count by their samples."""
        try:
            loss = self._reading.loss(outputs, targets)
        except IndexError as error:  # torch's own: a target beyond the classes
            at = self._reading.target_index
            hint = "" if at is not None else "; if the targets are not the last part of a batch, pass target_index=…"
            raise ff.EstimationError(f"batch {self.batches - 1}: {error}{hint}") from error
        if self.how == "weighted" and self._now != self._first:
            loss = loss * math.sqrt(self._now / self._first)
        return loss

    def strict_loss(self, outputs: Any, targets: Any) -> Tensor:
        """As the published classes write it: LFSSD squares a norm instead of summing squares."""
        if self._label_free:
            return outputs.flatten(1).norm(p="fro", dim=1).pow(2).mean()
        return self.loss(outputs, targets)

    def divisor(self) -> float:
        """What the sums are divided by."""
        if self.how == "weighted":
            return self.samples / self._first
        return self.samples if self.how == "samples" else self.batches

    def check_not_empty(self) -> None:
        """An EstimationError where there was no batch."""
        if self.batches == 0:
            raise ff.EstimationError("the loader is empty: no batch to calculate importances from")
