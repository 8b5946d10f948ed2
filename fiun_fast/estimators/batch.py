"""The `batch` estimator: what SSD and FIUn code computes, in one pass over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch

from ..errors import ArgumentError, EstimationError
from ..fisher import Fisher
from ..layout import Params, select_parameters
from .accumulator import FisherAccumulator
from .state import preserved

ESTIMATORS = ("batch",)
Forward = Callable[[torch.nn.Module, Any], tuple[Any, Any]]
Loss = Callable[[Any, Any], torch.Tensor]


def estimate_fisher(
    model: torch.nn.Module,
    loader: Iterable[Any],
    params: Params = None,
    estimator: str = "batch",
    loss_fn: Loss | None = None,
    forward_fn: Forward | None = None,
    progress: bool = False,
    backend: str | None = None,
) -> Fisher:
    """Estimate a diagonal Fisher over a loader: (1/B) sum_b g_b^2, g_b the gradient of mini-batch b's mean loss.

    Every batch weighs the same, as in the code of SSD (arXiv 2308.07707) and FIUn (arXiv 2408.08493); the batch size
    therefore changes the estimate. The model is evaluated in eval mode and is afterwards exactly as before: modes,
    requires_grad, .grad, buffers, random state.

    Args:
        model: any module.
        loader: yields batches; by default pairs (inputs [B, ...], targets [B]).
        params: which parameters, as in `Layout.from_module`; frozen ones may be named.
        estimator: "batch".
        loss_fn: (outputs, targets) -> scalar mean loss; default cross entropy.
        forward_fn: (model, batch) -> (outputs, targets), for batches of another form.
        progress: show a progress bar.
        backend: as in `plan`.

    Returns:
        The Fisher, float32, on the parameters' device.

    Raises:
        EstimationError: empty loader, a batch that the default unpacking does not understand, or a loss that is not a
            scalar or does not depend on the selected parameters.
        ArgumentError: unknown estimator.
        LayoutError, DeviceError, BackendError: as in `FisherAccumulator`.

    """
    if estimator not in ESTIMATORS:
        raise ArgumentError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    forward = forward_fn or _forward
    loss_of = loss_fn or torch.nn.functional.cross_entropy
    selected = select_parameters(model, params)
    with preserved(model, selected.values()):
        accumulator = FisherAccumulator(model, params=list(selected), backend=backend)
        for batch in _progress(loader) if progress else loader:
            outputs, targets = forward(model, batch)
            loss = loss_of(outputs, targets)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                found = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise EstimationError(f"batch {accumulator.steps}: the loss is {found}, expected a scalar tensor")
            if not loss.requires_grad:
                scope = ", ".join(list(selected)[:4])
                raise EstimationError(f"batch {accumulator.steps}: the loss does not depend on {scope}")
            loss.backward()
            accumulator.update(samples=_samples(outputs))
            for p in selected.values():
                p.grad = None
        if accumulator.steps == 0:
            raise EstimationError("the loader is empty: no batch to estimate a Fisher from")
        return accumulator.result()


def _forward(model: torch.nn.Module, batch: Any) -> tuple[Any, Any]:
    """Unpack (inputs, targets), move them to the model's device, and call the model."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(b, torch.Tensor) for b in batch)
    if not pair:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
        raise EstimationError(
            f"a batch is a {type(batch).__name__}{size}, expected (inputs, targets), two tensors; for batches "
            "of another form pass forward_fn=lambda model, batch: (model(batch[…]), batch[…])"
        )
    device = next(model.parameters()).device
    outputs = model(batch[0].to(device))
    if not isinstance(outputs, torch.Tensor):
        raise EstimationError(
            f"the model returns a {type(outputs).__name__}, expected a tensor; pass forward_fn=lambda model, batch: "
            "(model(batch[0])[…], batch[1])"
        )
    return outputs, batch[1].to(device)


def _samples(outputs: Any) -> int:
    return outputs.shape[0] if isinstance(outputs, torch.Tensor) and outputs.dim() else 0


def _progress(loader: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import track

    return track(loader, description="Fisher", total=len(loader) if isinstance(loader, Sized) else None)
