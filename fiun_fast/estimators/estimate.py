"""`estimate_fisher`: which estimator, over a loader."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import torch

from ..errors import ArgumentError
from ..fisher import Fisher
from ..layout import Params, select_parameters
from .batch import BatchEstimate
from .job import Estimate, Forward, Job, Loss
from .state import preserved

ESTIMATORS = ("batch", "label_free")


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
    """Estimate the diagonal Fisher information of a model over a loader.

    estimator     what is averaged                                                   from
    "batch"       (1/B) sum_b g_b^2, g_b the gradient of mini-batch b's mean loss    SSD 2308.07707, FIUn 2408.08493
    "label_free"  (1/B) sum_b |gradient of mean_n ‖f(x_n)‖²|, no labels needed       LFSSD 2402.19308

    With `batch` and `label_free` every batch weighs the same, and the batch size changes the estimate. The model is
    evaluated in eval mode and is afterwards exactly as before: modes, requires_grad, .grad, buffers, random state.
    `fisher.provenance.how` says how each parameter was computed; docs/fishers.md says which estimator to choose.

    Args:
        model: any module.
        loader: yields batches; by default pairs (inputs [B, ...], targets [B]); for `label_free` also inputs alone.
        params: which parameters, as in `Layout.from_module`; frozen ones may be named.
        estimator: see above.
        loss_fn: (outputs, targets) -> scalar mean loss; default cross entropy. Not for `label_free`.
        forward_fn: (model, batch) -> (outputs, targets), for batches of another form.
        progress: show a progress bar.
        backend: as in `plan`.

    Returns:
        The Fisher, float32, on the parameters' device.

    Raises:
        EstimationError: empty loader, a batch that the default unpacking does not understand, or a loss that is not a
            scalar or does not depend on the selected parameters.
        ArgumentError: unknown estimator, or a loss where the estimator has its own.
        LayoutError, DeviceError, BackendError: as in `FisherAccumulator`.

    """
    if estimator not in ESTIMATORS:
        raise ArgumentError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    if estimator == "label_free" and loss_fn is not None:
        raise ArgumentError("estimator 'label_free' has a loss of its own, mean ‖f(x)‖²: leave loss_fn out")
    selected = select_parameters(model, params)
    with preserved(model, selected.values()):
        estimate = _start(Job(model, selected, estimator, loss_fn, forward_fn, backend))
        for batch in _progress(loader) if progress else loader:
            estimate.step(batch)
        return estimate.result()


def _start(job: Job) -> Estimate:
    return BatchEstimate(job)


def _progress(loader: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import track

    return track(loader, description="Fisher", total=len(loader) if isinstance(loader, Sized) else None)
