"""Cross entropy in the forms that models and data have: where the classes lie, which labels count, each sample's loss.

A sample makes one prediction, or one at each of its positions: every token of a sequence, every pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import EstimationError

IGNORED = -100  # a label that does not count, as torch and transformers have it
CLOSE = 1e-5  # relative; how well a model's own loss must be explained
HALF = (torch.float16, torch.bfloat16)
OTHERWISE = "if these are not the targets, pass target_index=… or forward_fn=lambda model, batch: (outputs, targets)"
ONE_NUMBER = (
    "one number a sample, whose cross entropy is always 0; pass loss_fn, such as torch.nn.functional.mse_loss or "
    "binary_cross_entropy_with_logits"
)


@dataclass(frozen=True)
class Predictions:
    """Logits, and a label for each prediction.

    Attributes:
        logits: [B, C] or [B, C, *positions]; with `last` [B, *positions, C].
        labels: int64 [B, *positions], IGNORED where a prediction does not count; or probabilities of the classes, in
            the shape of the logits.
        last: the classes lie on the last axis.

    """

    logits: Tensor
    labels: Tensor
    last: bool = False

    @property
    def classes(self) -> int:
        """How many."""
        return self.logits.shape[-1 if self.last else 1]

    @property
    def counted(self) -> Tensor:
        """Which predictions count: bool, [B, *positions]."""
        if self.labels.is_floating_point():
            return torch.ones_like(self.labels.select(1, 0), dtype=torch.bool)
        return self.labels != IGNORED

    @property
    def scores(self) -> Tensor:
        """Logits with the classes on the last axis: [B, *positions, C]."""
        return self.logits if self.last else self.logits.movedim(1, -1)

    def mean(self) -> Tensor:
        """The mean over all predictions that count, as torch's cross entropy has it."""
        if self.last:
            return functional.cross_entropy(self.logits.flatten(0, -2), self.labels.flatten())
        return functional.cross_entropy(self.logits, self.labels)

    def of_samples(self) -> Tensor:
        """Of each sample the mean over those of its predictions that count, 0 where none does: [B]."""
        if self.last:
            flat = functional.cross_entropy(self.logits.flatten(0, -2), self.labels.flatten(), reduction="none")
            losses = flat.view(self.labels.shape)
        else:
            losses = functional.cross_entropy(self.logits, self.labels, reduction="none")
        if losses.dim() == 1:
            return losses
        return losses.flatten(1).sum(1) / self.counted.flatten(1).sum(1).clamp(min=1)

    def check(self) -> None:
        """Raise an EstimationError for labels that are no classes; reads the labels."""
        labels = self.labels
        if labels.numel() == 0:
            return
        if labels.is_floating_point():
            if not bool((labels >= 0).all()) or not bool(((labels.sum(1) - 1).abs() < 1e-2).all()):
                raise EstimationError(
                    f"the targets are {_what(labels)}, which as probabilities of classes would be positive and add up "
                    "to 1; pass loss_fn, such as torch.nn.functional.binary_cross_entropy_with_logits for several "
                    f"labels a sample, or mse_loss; {OTHERWISE}"
                )
            return
        kept = labels[labels != IGNORED]
        lowest, highest = (int(kept.min()), int(kept.max())) if kept.numel() else (0, 0)
        if lowest < 0 or highest >= self.classes:
            wrong = lowest if lowest < 0 else highest
            shift = "; classes count from 0" if (lowest, highest) == (1, self.classes) else ""
            raise EstimationError(
                f"target {wrong} is out of bounds, expected classes 0 to {self.classes - 1}, or {IGNORED} for what "
                f"does not count{shift}; {OTHERWISE}"
            )


@dataclass(frozen=True)
class Elementwise:
    """A loss that is the mean over elements of equal weight: outputs and labels [B, ...]."""

    function: Callable[..., Tensor]
    outputs: Tensor
    labels: Tensor

    def mean(self) -> Tensor:
        """Over all elements."""
        return self.function(self.outputs, self.labels)

    def of_samples(self) -> Tensor:
        """Of each sample: [B]."""
        return self.function(self.outputs, self.labels, reduction="none").flatten(1).mean(1)

    @property
    def counted(self) -> Tensor:
        """All of them: bool, [B]."""
        return torch.ones(len(self.outputs), dtype=torch.bool, device=self.outputs.device)


def fitted(outputs: Any, targets: Any) -> Predictions:
    """Outputs and targets as predictions, by shape and dtype alone.

    Targets may be classes of any integer dtype, [B, *positions], with an axis of 1 beside; one-hot [B, C]; or
    probabilities in the shape of the outputs. Classes may lie on axis 1, as torch has it, or on the last, as language
    models have it in [B, T, C].

    Raises:
        EstimationError: they do not fit; the message says what would.

    """
    for what, part in (("outputs", outputs), ("targets", targets)):
        if not isinstance(part, Tensor):
            raise EstimationError(f"the {what} are a {type(part).__name__}, expected a tensor; pass loss_fn")
    o, y = outputs, targets
    if o.dim() == 0:
        raise EstimationError(
            "the model returns one number instead of outputs [B, classes]; if that is its loss, pass "
            "forward_fn=lambda model, batch: (model(…), None)"
        )
    if y.dim() == 0:
        raise EstimationError(
            f"the outputs are {_what(o)} and the targets one number: this is one sample, not a batch; pass "
            "torch.utils.data.DataLoader(dataset, batch_size=…)"
        )
    if o.dim() == 1:
        squeezed = "; if it is a squeeze() that drops the axis of a batch of one, squeeze(1) does not"
        raise EstimationError(f"the outputs are {_what(o)}, expected [B, classes]; {ONE_NUMBER}{squeezed}")
    if not o.is_floating_point():
        raise EstimationError(f"the outputs are {_what(o)}, expected floating-point logits [B, classes]; pass loss_fn")
    if o.dim() == 2 and o.shape[1] == 1:
        raise EstimationError(f"the outputs are {_what(o)}, {ONE_NUMBER}")
    made = _probabilities(o, y) if y.is_floating_point() else _classes(o, y)
    if made is None:
        raise EstimationError(
            f"the targets are {_what(y)}, expected classes, int64 {_shapes(o)}, as the outputs are {_what(o)}; "
            f"{OTHERWISE}"
        )
    if made.classes == 1:
        raise EstimationError(f"the outputs are {_what(o)}, {ONE_NUMBER}")
    return made


def _classes(o: Tensor, y: Tensor) -> Predictions | None:
    if y.is_complex():
        return None
    second, last = o.shape[:1] + o.shape[2:], o.shape[:-1] if o.dim() == 3 else None
    if y.shape == last == second:
        raise EstimationError(
            f"the outputs are {_what(o)} and the targets {_what(y)}: the classes may lie on axis 1 or on the last; "
            "pass loss_fn=torch.nn.functional.cross_entropy for axis 1, or a loss of your own"
        )
    y = y.long()
    if y.shape == second:
        return Predictions(o, y)
    if y.shape == last:
        return Predictions(o, y, last=True)
    if y.shape == (*second[:1], 1, *second[1:]):
        return Predictions(o, y.squeeze(1))
    if last is not None and y.shape == (*last, 1):
        return Predictions(o, y.squeeze(-1), last=True)
    if y.shape == o.shape and o.dim() == 2:  # one-hot; as probabilities, so that `check` sees what is not
        return Predictions(o, y.to(o.dtype))
    return None


def _probabilities(o: Tensor, y: Tensor) -> Predictions | None:
    if y.shape == o.shape:
        return Predictions(o, y.to(o.dtype))
    if y.shape in (o.shape[:1], (len(o), 1)):
        raise EstimationError(
            f"the targets are {_what(y)}, expected classes, which are integers, as the outputs are {_what(o)}; pass "
            f"targets.long() if they are classes, or loss_fn if they are not; {OTHERWISE}"
        )
    return None


def apart(loss: Tensor, outputs: Any, labels: Any) -> Predictions | Elementwise | None:
    """A model's own mean loss taken apart: the known loss of its outputs and labels with the same value and slope.

    Known are cross entropy of [B, C], of every position of [B, T, V] and of the next one (causal language models), mean
    squared error, and binary cross entropy. None: it is none of these, or may be more than one. Values alone do not
    tell: where all logits are 0, as those of a new head, a smoothed or a scaled cross entropy has that of a plain one.
    """
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor) or not outputs.is_floating_point():
        return None
    known, value, close = list(_known(outputs, labels)), float(loss.detach()), 1e-2 if loss.dtype in HALF else CLOSE
    with torch.no_grad():
        values = _of_tokens(known) or [float(one.mean()) for one in known]
    right = [i for i, mean in enumerate(values) if abs(mean - value) <= close * abs(value)]
    if right and loss.requires_grad:
        right = _same_slope(loss, outputs, labels, right, 10 * close)
    return known[right[0]] if len(right) == 1 else None


def _same_slope(loss: Tensor, outputs: Tensor, labels: Tensor, candidates: Sequence[int], close: float) -> list[int]:
    """Those of the known losses that have the loss's gradient at the outputs."""
    (found,) = (
        torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True) if outputs.requires_grad else (None,)
    )
    if found is None:  # what the model returned is not what it took the loss of
        return []
    right = []
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        known = list(_known(leaf, labels))
        for i in candidates:
            (wanted,) = torch.autograd.grad(known[i].mean(), leaf)
            if bool((found - wanted).abs().max() <= close * wanted.abs().max()):
                right.append(i)
    return right


def _known(outputs: Tensor, labels: Tensor) -> Iterator[Predictions | Elementwise]:
    o = outputs.float() if outputs.dtype in HALF else outputs
    if labels.is_floating_point():
        if o.numel() == labels.numel() and len(o) == len(labels):
            y = labels.to(o.dtype).view(o.shape)
            yield Elementwise(functional.mse_loss, o, y)
            yield Elementwise(functional.binary_cross_entropy_with_logits, o, y)
    elif o.dim() == 2 and labels.numel() == len(o) and o.shape[1] > 1:
        yield Predictions(o, labels.long().view(-1))
    elif o.dim() == 3 and labels.shape == o.shape[:2]:
        yield Predictions(o, labels.long(), last=True)
        yield Predictions(o, next_ones(labels.long()), last=True)


def _of_tokens(known: Sequence[Predictions | Elementwise]) -> list[float]:
    """Mean cross entropies of the same logits [B, T, C] by one pass over them, however many labels; [] for others."""
    found: list[float] = []
    for one in known:
        if not isinstance(one, Predictions) or not one.last:
            return []
        if not found:
            total = one.logits.logsumexp(-1)
        chosen = one.logits.gather(-1, one.labels.clamp(0, one.classes - 1)[..., None])[..., 0]
        found.append(float((total - chosen)[one.counted].mean()))
    return found


def next_ones(labels: Tensor) -> Tensor:
    """Labels [B, T] such that the one of a position is that of the next: what a causal language model predicts."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _shapes(o: Tensor) -> str:
    """The shapes that classes may have beside these outputs."""
    second = str(list(o.shape[:1] + o.shape[2:]))
    return f"{list(o.shape[:-1])} or {second}" if o.dim() == 3 else second


def _what(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
