"""Rounds: losses whose squared gradients, added up, are what `expected` and per-token Fishers ask for.

A round assumes a label for each prediction, drawn from the model's own distribution or one class after another, or lets
the predictions at one position alone count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ..arguments import Per
from ..errors import EstimationError
from .predictions import IGNORED, ONE_NUMBER, Predictions, fitted
from .reading import OwnLoss, Unlabelled


class Round(NamedTuple):
    """Labels to assume instead of the targets [B, *positions], and a factor for each sample's loss [B]."""

    labels: Tensor
    factors: Tensor
    last: bool = False  # as in Predictions

    def losses(self, outputs: Tensor) -> Tensor:
        """Loss of each sample: [B]."""
        return Predictions(outputs, self.labels, self.last).of_samples() * self.factors

    def take(self, rows: slice) -> Round:
        """These samples alone."""
        return Round(self.labels[rows], self.factors[rows], self.last)


class Rounds(Sequence[Round]):
    """Rounds that are made when they are asked for: there may be one for every class at every position."""

    def __init__(self, number: int, make: Callable[[int], Round]) -> None:
        self._number, self._make = number, make

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, i: int) -> Round: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Round]: ...
    def __getitem__(self, i: int | slice) -> Round | Sequence[Round]:
        """Make one round, or several."""
        if isinstance(i, slice):
            return [self._make(k) for k in range(self._number)[i]]
        return self._make(range(self._number)[i])


def predicted(outputs: Any, targets: Any) -> Predictions:
    """Logits, and which of the predictions count; labels that count are 0 where there are none.

    Args:
        outputs: [B, C]; of sequences [B, T, C]; or as the targets say.
        targets: what `Reading.forward` gave where "counted" was wanted; of [B, C] they may be anything.

    Raises:
        EstimationError: the outputs are no logits, or it cannot be told where their classes lie.

    """
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or not outputs.is_floating_point():
        found = f"returns outputs {list(outputs.shape)}" if isinstance(outputs, Tensor) else "returns no tensor"
        hint = ""
        if outputs is None and isinstance(targets, OwnLoss):
            found, hint = f"returns {targets.found}", f"; {targets.advice}"
        elif isinstance(outputs, Tensor) and outputs.dim() == 1:
            hint = "; if there is no batch dimension, pass torch.utils.data.DataLoader(dataset, batch_size=…)"
        raise EstimationError(f"the model {found}, expected logits [B, classes]{hint}")
    made = _predicted(outputs, targets)
    if made.classes == 1:
        raise EstimationError(f"the outputs are {list(outputs.shape)}, {ONE_NUMBER}, and estimator 'batch' or 'sample'")
    if not bool(outputs.detach().sum().isfinite()) and not bool(outputs.detach().isfinite().all()):
        raise EstimationError("the outputs are not finite")
    return made


def _predicted(outputs: Tensor, targets: Any) -> Predictions:
    if isinstance(targets, OwnLoss):
        if isinstance(targets.apart, Predictions):
            return targets.apart
        targets = None if outputs.dim() == 2 else targets
    if outputs.dim() == 2:
        labels = torch.zeros(len(outputs), dtype=torch.long, device=outputs.device)
        if isinstance(targets, Tensor) and targets.shape in (labels.shape, (len(labels), 1)):
            labels = labels.masked_fill(targets.view(-1) == IGNORED, IGNORED)
        return Predictions(outputs, labels)
    mask = targets.mask if isinstance(targets, Unlabelled) else None
    if mask is not None and outputs.dim() == 3 and mask.shape == outputs.shape[:2]:
        return Predictions(outputs, torch.where(mask != 0, 0, IGNORED), last=True)
    if isinstance(targets, Tensor):
        return fitted(outputs, targets)
    why = "the model's loss is no cross entropy of them" if isinstance(targets, OwnLoss) else "there are no labels"
    raise EstimationError(
        f"the outputs are {list(outputs.shape)}, expected logits [B, classes]: which axis holds the classes and which "
        f"positions count cannot be told, since {why}; pass forward_fn=lambda model, batch: (logits, targets)"
    )


def number_of(predictions: Predictions, per: Per) -> int:
    """Samples: sequences with a prediction that counts, or such predictions."""
    counted = predictions.counted.reshape(len(predictions.logits), -1)
    return int(counted.sum() if per == "token" else counted.any(1).sum())


def one_position_each(predictions: Predictions) -> Sequence[Round]:
    """A round for each position, with the labels there."""
    at, ones = _positions(predictions), predictions.logits.detach().new_ones(len(predictions.logits))
    return Rounds(len(at), lambda i: Round(_only(predictions, predictions.labels, at[i]), ones, predictions.last))


def drawn(predictions: Predictions, samples: int, per: Per, generator: torch.Generator) -> Sequence[Round]:
    """Rounds that assume labels drawn from the softmax, `samples` times."""
    p, counted, last = probabilities(predictions), predictions.counted, predictions.last
    labels = torch.multinomial(p.flatten(0, -2), samples, replacement=True, generator=generator)
    each = [torch.where(counted, one.view(counted.shape), IGNORED) for one in labels.unbind(1)]
    factors = torch.full_like(p[:, 0, 0], samples**-0.5)
    if per == "sequence":
        return [Round(one, factors, last) for one in each]
    at = _positions(predictions)
    return Rounds(
        samples * len(at),
        lambda i: Round(_only(predictions, each[i % samples], at[i // samples]), factors, last),
    )


def every_class(predictions: Predictions, per: Per) -> Sequence[Round]:
    """Rounds that assume each class in turn, weighted by its probability, at each position in turn.

    The gradients at different positions of a sample are uncorrelated under the model's own distribution, so that the
    expectation of the squared gradient of their mean is the sum of the positions' own, over the square of their number.
    """
    p, counted, classes = probabilities(predictions).flatten(1, -2), predictions.counted, predictions.classes
    at = _positions(predictions)
    share = torch.ones_like(p[:, 0, 0])
    if per == "sequence":
        share = share / counted.reshape(len(counted), -1).sum(1).clamp(min=1)

    def make(i: int) -> Round:
        k, c = divmod(i, classes)
        labels = _only(predictions, torch.where(counted, c, IGNORED), at[k])
        return Round(labels, p[:, at[k], c].sqrt() * share, predictions.last)

    return Rounds(len(at) * classes, make)


def probabilities(predictions: Predictions) -> Tensor:
    """The softmax, without a graph: [B, *positions, C], or [B, 1, C]; float32 at least."""
    scores = predictions.scores.detach()
    scores = scores.float() if scores.itemsize == 2 else scores
    return scores.softmax(-1) if scores.dim() > 2 else scores.softmax(-1)[:, None]


def _positions(predictions: Predictions) -> list[int]:
    """Those at which some prediction counts; one at the least."""
    counted = predictions.counted.reshape(len(predictions.logits), -1)
    return counted.any(0).nonzero().view(-1).tolist() or [0]


def _only(predictions: Predictions, labels: Tensor, position: int) -> Tensor:
    """Labels of which only those at one position count."""
    if labels.shape != predictions.counted.shape or labels.dim() == 1:  # probabilities, or one prediction a sample
        return labels
    kept = torch.full_like(labels, IGNORED)
    kept.view(len(labels), -1)[:, position] = labels.reshape(len(labels), -1)[:, position]
    return kept
