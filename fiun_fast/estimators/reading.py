"""From a batch of any form to outputs, targets and a scalar loss: how the whole package reads a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import EstimationError

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]
Wanted = Literal["loss", "targets", "outputs"]

LABELS = ("labels", "label", "label_ids")  # keys of a dict; the first one found counts
FORMS: dict[str, str] = {
    "loss": "(inputs, targets), (inputs, _, targets), or a dict with labels",
    "targets": "(inputs, targets), (inputs, _, targets), or a dict with labels",
    "outputs": "(inputs, targets), inputs alone, or a dict of the model's keywords",
}
ADVICE = "forward_fn=lambda model, batch: (outputs, targets)"


@dataclass(frozen=True, eq=False)
class OwnLoss:
    """In place of targets: the scalar loss that the model returned when it was called with labels."""

    loss: Tensor


@dataclass(frozen=True)
class Reading:
    """How batches are read.

    Attributes:
        wanted: what is needed from a batch: "loss", either targets or the model's own loss; "targets", for the caller's
            loss function; "outputs" alone, where labels are not needed.
        forward_fn: (model, batch) -> (outputs, targets), instead of everything below.
        target_index: position of the targets in a tuple; None: last.
        forms, advice: for error messages: the forms that are understood (None: those that `wanted` allows), and what to
            pass for other ones.

    """

    wanted: Wanted = "loss"
    forward_fn: Forward | None = None
    target_index: int | None = None
    forms: str | None = None
    advice: str = ADVICE

    def forward(self, model: nn.Module, batch: Any, device: torch.device | None = None) -> tuple[Any, Any]:
        """Outputs and targets of a batch.

        Understood are (x, y), (x, _, y), and tuples of any length with `target_index`; a Mapping, whose entries the
        model gets as keyword arguments; where only outputs are wanted, also `x` and `[x]`. A model may return a tensor,
        a tuple that begins with one, an object with `.logits`, or a dict with "logits" or "out".

        Args:
            model: the module to call.
            batch: what the loader yielded.
            device: where tensors are moved; None: the device of the model's first parameter.

        Returns:
            Outputs and targets. Targets are None where only outputs are wanted; an `OwnLoss`, and the outputs possibly
            None, where the batch is a Mapping and a loss is wanted.

        Raises:
            EstimationError: a form of batch, or of outputs, that is not understood.

        """
        if self.forward_fn is not None:
            return self.forward_fn(model, batch)
        device = next(model.parameters()).device if device is None else device
        if isinstance(batch, Mapping):
            return self._by_keywords(model, batch, device)
        x, y = self._parts(batch)
        return outputs_of(model(x.to(device))), None if y is None else y.to(device)

    def plain(self, batch: Any) -> Any:
        """The batch, as a dict if it is a Mapping: torch's pytrees do not know other kinds, such as BatchEncoding.

        Tensors made under inference_mode are cloned, since autograd refuses them.
        """
        plain = dict(batch) if isinstance(batch, Mapping) and self.forward_fn is None else batch
        if not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in pytree.tree_leaves(plain)):
            return plain
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.clone() if leaf.is_inference() else leaf, plain)

    def _parts(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        length = len(batch) if isinstance(batch, (tuple, list)) else 0
        if self.wanted == "outputs":
            x = batch[0] if length else batch
            if not isinstance(x, Tensor):
                raise self._unknown(batch)
            return x, None
        if not (length and _holds_tensor(batch)) or (length not in (2, 3) and self.target_index is None):
            raise self._unknown(batch)
        at = -1 if self.target_index is None else self.target_index
        if not -length <= at < length:
            raise EstimationError(f"target_index is {at}, but a batch has {length} parts")
        for what, part in (("inputs", batch[0]), ("targets", batch[at])):
            if not isinstance(part, Tensor):
                raise EstimationError(
                    f"the {what} of a batch are a {type(part).__name__}, expected a tensor; pass {self.advice}"
                )
        return batch[0], batch[at]

    def _by_keywords(self, model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> tuple[Any, Any]:
        if not _holds_tensor(batch.values()):
            raise self._unknown(batch)
        keys = ", ".join(map(str, batch))
        labels = next((key for key in LABELS if key in batch), None)
        if labels is None and self.wanted != "outputs":
            raise EstimationError(f"a batch is a dict with {keys}, without labels; pass {self.advice}")
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        out = model(**moved)
        first = out[0] if isinstance(out, (tuple, list)) and out else None
        behind = out[1:] if isinstance(first, Tensor) and first.dim() == 0 and len(out) > 1 else out
        if labels is None or self.wanted == "outputs":
            return outputs_of(behind), None
        if self.wanted == "targets":
            return outputs_of(behind), moved[labels]
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        loss = first if loss is None else loss  # models configured to return tuples put the loss first
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise EstimationError(
                f"the model was called with the keywords {keys} and returned a {type(out).__name__} without a scalar "
                f".loss; pass {ADVICE}"
            )
        return _found(behind), OwnLoss(loss)

    def _unknown(self, batch: Any) -> EstimationError:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) and len(batch) else ""
        return EstimationError(
            f"a batch is a {type(batch).__name__}{size}, expected {self.forms or FORMS[self.wanted]}; for batches of "
            f"another form pass {self.advice}"
        )


def outputs_of(out: Any) -> Tensor:
    """The logits in what a model returned: a tensor, `.logits`, the first item of a tuple, "logits" or "out" in a dict.

    Raises:
        EstimationError: none of these.

    """
    if (found := _found(out)) is None:
        raise EstimationError(
            f"the model returns a {type(out).__name__}, expected a tensor, a tuple that begins with one, or .logits; "
            f"pass {ADVICE}"
        )
    return found


def _found(out: Any) -> Tensor | None:
    for candidate in (
        out,
        getattr(out, "logits", None),
        out[0] if isinstance(out, (tuple, list)) and out else None,
        next((out[key] for key in ("logits", "out") if key in out), None) if isinstance(out, Mapping) else None,
    ):
        if isinstance(candidate, Tensor):
            return candidate
    return None


def check_scalar(loss: Any, step: int, expected: str = "a scalar tensor") -> Tensor:
    """The loss of batch number `step`; an EstimationError if it is not a tensor with one element."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise EstimationError(f"batch {step}: the loss is {found}, expected {expected}")
    return loss


def check_loss(loss: Any, step: int, names: Iterable[str]) -> Tensor:
    """The loss; an EstimationError if it is not a scalar, or depends on none of the named parameters."""
    if not check_scalar(loss, step).requires_grad:
        raise EstimationError(f"batch {step}: the loss does not depend on {', '.join(list(names)[:4])}")
    return loss


def _holds_tensor(parts: Iterable[Any]) -> bool:
    return any(isinstance(part, Tensor) for part in parts)
