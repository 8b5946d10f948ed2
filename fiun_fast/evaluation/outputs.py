"""What a model answers on a set of data: logits, labels and features, read as the estimators read a loader.

A model runs in eval mode without gradients and is left exactly as it was: modes, gradients, buffers, random state.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import EstimationError
from ..estimators.loaders import is_iterator
from ..estimators.looking import each_batch, one_a_sample
from ..estimators.predictions import Predictions
from ..estimators.reading import Forward
from ..scope import select_parameters


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model answers on one set: may take the place of a loader wherever the model's answers on it are needed.

    Attributes:
        logits: [N, C], on the CPU.
        labels: [N] int64.
        features: [N, D], what goes into the last layer; None where `answers` was not asked for them.

    """

    logits: Tensor
    labels: Tensor
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def log_probabilities(self) -> np.ndarray:
        """Log-softmax of the logits, [N, C] float64."""
        return self.logits.double().log_softmax(1).numpy()

    @cached_property
    def right(self) -> np.ndarray:
        """Whether the largest logit is the label's, [N] bool."""
        return (self.logits.argmax(1) == self.labels).numpy()

    @cached_property
    def confidence(self) -> np.ndarray:
        """Probability of the label, [N] float64."""
        return np.exp(self.log_probabilities[np.arange(len(self)), self.labels.numpy()])

    @cached_property
    def entropy(self) -> np.ndarray:
        """Of the softmax, in nats: [N] float64."""
        logs = self.log_probabilities
        return -np.where(np.isneginf(logs), 0.0, np.exp(logs) * np.where(np.isneginf(logs), 0.0, logs)).sum(1)

    @cached_property
    def margin(self) -> np.ndarray:
        """z_y - logsumexp of the other logits, which is log(p_y / (1 - p_y)): [N] float64."""
        logits = self.logits.double()
        at = self.labels[:, None]
        others = logits.scatter(1, at, -torch.inf).logsumexp(1)
        return (logits.gather(1, at)[:, 0] - others).numpy()

    def take(self, rows: Any) -> Answers:
        """Some of the samples: [m] int64, [n] bool, or a slice."""
        rows = torch.as_tensor(rows) if isinstance(rows, np.ndarray) else rows
        return Answers(self.logits[rows], self.labels[rows], None if self.features is None else self.features[rows])


Data = Iterable[Any] | Answers


def answers(
    model: nn.Module,
    loader: Data,
    *,
    features: bool = False,
    layer: nn.Module | None = None,
    what: str = "the data",
    forward_fn: Forward | None = None,
    target_index: int | None = None,
) -> Answers:
    """Run a classifier over a loader, in eval mode.

    Args:
        model: makes one prediction a sample: logits [B, C].
        loader: batches in any form that `ff.estimate_fisher` reads, with labels; or `Answers`, handed back as they are.
        features: keep also what goes into the last layer (`ff.last_layer`), flattened to [N, D].
        layer: another module of the model, whose input the features are.
        what: what the set is called in messages.
        forward_fn, target_index: as for `ff.estimate_fisher`.

    Raises:
        EstimationError: the set is empty, a batch cannot be read, labels are no classes, there is more than one
            prediction a sample, outputs are not finite; the message begins with `what` and the number of the batch.
        ArgumentError: no loader; or `Answers` without the features that are asked for.

    """
    if isinstance(loader, Answers):
        if len(loader) == 0:
            raise EstimationError(f"{what} is empty: no sample to evaluate on")
        if features and loader.features is None:
            raise EstimationError(f"{what}: answers without features; ask for them: answers(…, features=True)")
        return loader
    met: list[Tensor] = []

    def take(predictions: Predictions, _: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        logits, labels = one_a_sample(predictions)
        counted = labels >= 0
        given = _features(met, len(labels))[counted].cpu() if features else None
        return logits[counted].cpu(), labels[counted].cpu(), given

    def prepare(bare: nn.Module, stack: ExitStack) -> None:
        if features:
            of = _last(bare) if layer is None else layer
            hook = of.register_forward_pre_hook(
                lambda _, args, named: met.append(next(iter((*args, *named.values())))), with_kwargs=True
            )
            stack.callback(hook.remove)

    found = each_batch(model, loader, what, take, prepare, forward_fn=forward_fn, target_index=target_index)
    logits, labels, kept = zip(*found, strict=True)
    return Answers(torch.cat(logits), torch.cat(labels), torch.cat(cast(Any, kept)) if features else None)


def check_again(what: str, loader: Any) -> None:
    """Raise an EstimationError for what several models, or one several times, cannot go over."""
    if isinstance(loader, Answers):
        raise EstimationError(
            f"{what}: these are the answers of one model, and this measure runs several: pass a loader"
        )
    if is_iterator(loader):
        raise EstimationError(
            f"{what}: a {type(loader).__name__} can be gone over once, and this measure goes over it several times: "
            "pass a list or a DataLoader"
        )


def _features(met: list[Tensor], number: int) -> Tensor:
    if len(met) != 1 or not isinstance(met[0], Tensor) or len(met[0]) != number:
        shapes = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in met]
        raise EstimationError(
            f"the layer was given {shapes}, expected features [{number}, …] once a batch; pass layer="
        )
    return met.pop().flatten(1)


def _last(bare: nn.Module) -> nn.Module:
    own = {id(p) for p in select_parameters(bare, "last").values()}
    return next(m for m in bare.modules() if any(id(p) in own for p in m.parameters(recurse=False)))
