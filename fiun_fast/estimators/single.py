"""One sample in the place of a batch: inputs or labels without a batch dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EstimationError
from .raised import described

INSTEAD = "this is one sample, not a batch; pass torch.utils.data.DataLoader(dataset, batch_size=…)"
# Dimensions that inputs of transformers' models have at the least; some models take fewer, and then mean one sequence.
LEAST = {"input_ids": 2, "inputs_embeds": 3, "pixel_values": 4, "input_values": 2, "input_features": 3}


def check_keywords(model: nn.Module, batch: Mapping[str, Any], labels: Any) -> None:
    """Raise an EstimationError where a dict holds one sample: a label that is a number, or inputs without a batch."""
    if isinstance(labels, Tensor) and labels.dim() == 0:
        raise EstimationError(f"the labels are one number, in a batch of {described(batch)}: {INSTEAD}")
    if not isinstance(getattr(model, "main_input_name", None), str):  # as every model of transformers has
        return
    for key, least in LEAST.items():
        part = batch.get(key)
        if isinstance(part, Tensor) and 0 < part.dim() < least:
            raise EstimationError(f"{key} is {described(part)}, expected {least} dimensions: {INSTEAD}")


def check_batched(model: nn.Module, inputs: Any, outputs: Tensor, batch: Any) -> None:
    """Raise an EstimationError where the inputs are one sample: by shapes, and where these leave it open by trial.

    Args:
        model, inputs, outputs: what was called with what, and returned what.
        batch: the whole of it.

    """
    if isinstance(inputs, Mapping):
        tensors = [part for part in inputs.values() if isinstance(part, Tensor)]
        inputs = tensors[0] if len(tensors) == 1 else None
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() == 0:
        return
    flat = inputs.dim() == outputs.dim() == 1
    if (flat and outputs.shape != inputs.shape) or (inputs.dim() == 1 and outputs.dim() == 0):
        raise EstimationError(f"the inputs are {list(inputs.shape)} and the outputs {list(outputs.shape)}: {INSTEAD}")
    if not flat and (outputs.dim() == 0 or len(outputs) == len(inputs)):
        return
    call = _caller(model, batch, inputs)
    with torch.no_grad():
        if _of(call, inputs[:1]) is None and _same(_of(call, inputs[None]), outputs[None]):
            raise EstimationError(
                f"the inputs are {list(inputs.shape)}, and the model takes [1, …] of these as well, but not a part of "
                f"them: {INSTEAD}"
            )


def _caller(model: nn.Module, batch: Any, inputs: Tensor) -> Any:
    """x -> what the model returns where it was called with `inputs`."""
    key = next((key for key, part in batch.items() if part is inputs), None) if isinstance(batch, Mapping) else None
    return model if key is None else lambda x: model(**{key: x})


def _of(call: Any, x: Tensor) -> Any:
    try:
        return call(x)
    except Exception:  # whatever a model may raise on inputs of another shape
        return None


def _same(out: Any, wanted: Tensor) -> bool:
    out = getattr(out, "logits", out)
    return isinstance(out, Tensor) and out.shape == wanted.shape and torch.allclose(out, wanted, rtol=1e-3, atol=1e-5)
