"""From a batch of whatever form to a scalar loss: the part in which copies of SSD's class differ most."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fiun_fast as ff

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]
FORMS = "(x, y), (x, _, y), (x, y, idx) with target_index=1, or a dict with labels"


@dataclass(frozen=True)
class Reading:
    """How batches are read.

    Attributes:
        target_index: where the targets are in a tuple; None: last.
        truncate: samples of a batch that are used, from its start; None: all.
        batch_fn: batch -> batch of a form understood here.
        forward_fn: (model, batch) -> (outputs, targets), instead of all that is done here.
        loss_fn: (outputs, targets) -> scalar mean loss; None: cross entropy.

    """

    target_index: int | None = None
    truncate: int | None = None
    batch_fn: Callable[[Any], Any] | None = None
    forward_fn: Forward | None = None
    loss_fn: Loss | None = None

    def forward(self, model: nn.Module, batch: Any, device: torch.device) -> tuple[Any, Any]:
        """Outputs and targets; for a dict with labels the model's own loss, and None.

        Raises:
            EstimationError: a form of batch, or of outputs, that is not understood.

        """
        if self.batch_fn is not None:
            batch = self.batch_fn(batch)
        if self.forward_fn is not None:
            return self.forward_fn(model, batch)
        if isinstance(batch, Mapping):
            return self._keywords(model, batch, device)
        x, y = self._pair(batch)
        x, y = (part[: self.truncate].to(device) for part in (x, y))
        return outputs_of(model(x)), y

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The scalar loss of what `forward` returned."""
        loss = outputs if targets is None else (self.loss_fn or nn.functional.cross_entropy)(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ff.EstimationError(f"the loss is {found}, expected a scalar tensor")
        return loss

    def _pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        length = len(batch) if isinstance(batch, (tuple, list)) else 0
        if length not in (2, 3) and not (length and self.target_index is not None):
            size = f" of {length}" if length else ""
            raise ff.EstimationError(
                f"a batch is a {type(batch).__name__}{size}, expected {FORMS}; for other forms pass batch_fn=lambda "
                "batch: (…, …), or forward_fn=lambda model, batch: (outputs, targets)"
            )
        at = -1 if self.target_index is None else self.target_index
        if not -length <= at < length:
            raise ff.EstimationError(f"target_index is {at}, but a batch has {length} parts")
        for what, part in (("inputs", batch[0]), ("targets", batch[at])):
            if not isinstance(part, Tensor):
                raise ff.EstimationError(
                    f"the {what} of a batch are a {type(part).__name__}, expected a tensor; pass batch_fn or forward_fn"
                )
        return batch[0], batch[at]

    def _keywords(self, model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> tuple[Any, None]:
        labels = next((key for key in ("labels", "label", "label_ids") if key in batch), None)
        if labels is None:
            raise ff.EstimationError(
                f"a batch is a dict with {', '.join(map(str, batch))}, without labels; pass batch_fn or forward_fn"
            )
        moved = {key: v[: self.truncate].to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
        out = model(**moved)
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        if loss is None and isinstance(out, (tuple, list)):
            loss = out[0]  # models that were told to return tuples put the loss first
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ff.EstimationError(
                f"the model was called with the keywords {', '.join(map(str, batch))} and returned a "
                f"{type(out).__name__} without a scalar .loss; pass forward_fn=lambda model, batch: (outputs, targets)"
            )
        return loss, None


def outputs_of(out: Any) -> Tensor:
    """The logits in what a model returned: a tensor, the first of a tuple, or `.logits`.

    Raises:
        EstimationError: none of these.

    """
    for candidate in (
        out,
        getattr(out, "logits", None),
        out[0] if isinstance(out, (tuple, list)) and out else None,
        next((out[key] for key in ("logits", "out") if key in out), None) if isinstance(out, Mapping) else None,
    ):
        if isinstance(candidate, Tensor):
            return candidate
    raise ff.EstimationError(
        f"the model returns a {type(out).__name__}, expected a tensor, a tuple that begins with one, or .logits; "
        "pass forward_fn=lambda model, batch: (outputs, targets)"
    )


def samples_of(outputs: Any, targets: Any, batch: Any) -> int:
    """Samples in a batch that was forwarded; 0 where nothing tells."""
    for part in (targets, outputs):
        if isinstance(part, Tensor) and part.dim():
            return part.shape[0]
    if isinstance(batch, Mapping):
        return next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)
    return 0
