"""The estimators that need one backward a mini-batch: `batch` (SSD, FIUn) and `label_free` (LFSSD)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import EstimationError
from ..fisher import Fisher
from .accumulator import FisherAccumulator
from .job import Estimate, Job, checked, count

HOW = {"batch": "square of the batch gradient", "label_free": "size of the gradient of mean ‖f(x)‖²"}


class BatchEstimate(Estimate):
    """(1/B) sum_b |g_b|^power: power 2 and the loss's gradient for `batch`, power 1 and that of ‖f‖² for `label_free`.

    why: why no cheaper way was taken, for the record.
    """

    def __init__(self, job: Job, why: str = "") -> None:
        self._job, self._why = job, why
        self._accumulator = FisherAccumulator(
            job.model, list(job.selected), backend=job.backend, estimator=job.estimator
        )

    def step(self, batch: Any) -> None:
        """Backward, and add what arrived in `.grad`."""
        job, steps = self._job, self._accumulator.steps
        if job.estimator == "label_free":
            outputs, targets = job.forward(_labelled(batch) if job.forward_fn is None else batch)
            loss: Any = squared_length(outputs)
        else:
            outputs, targets = job.forward(batch)
            loss = job.loss(outputs, targets)
        checked(loss, steps, job.selected).backward()
        self._accumulator.update(samples=count(outputs))
        for p in job.selected.values():
            p.grad = None

    def result(self) -> Fisher:
        """The mean over the batches."""
        if self._accumulator.steps == 0:
            raise EstimationError("the loader is empty: no batch to estimate a Fisher from")
        fisher = self._accumulator.result()
        how = HOW[self._job.estimator] + (f" ({self._why})" if self._why else "")
        fisher.provenance = replace(fisher.provenance, how=dict.fromkeys(self._job.selected, how))
        return fisher


def squared_length(outputs: Any) -> Tensor:
    """mean_n ‖f(x_n)‖², the sensitivity of LFSSD (arXiv 2402.19308): outputs [B, ...] -> scalar."""
    if not isinstance(outputs, Tensor) or outputs.dim() == 0:
        found = "a scalar" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise EstimationError(f"the outputs are {found}, expected a tensor [B, ...] whose length is to be measured")
    return outputs.flatten(1).square().sum(1).mean() if outputs.dim() > 1 else outputs.square().mean()


def _labelled(batch: Any) -> Any:
    """Inputs alone, or inputs with anything behind them, as a pair that the default forward understands."""
    if isinstance(batch, Tensor):
        return batch, torch.empty(0)
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return batch[0], torch.empty(0)
    return batch
