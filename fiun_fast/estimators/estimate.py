"""`estimate_fisher`: which estimator, over a loader; `estimate_fishers`: several models over one sweep of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from contextlib import ExitStack
from typing import Any

import torch

from ..errors import ArgumentError, EstimationError
from ..fisher import Fisher
from ..layout import Params, select_parameters
from .batch import BatchEstimate
from .head import HeadEstimate, NotAHead
from .job import Estimate, Forward, Job, Loss
from .sample import SampleEstimate
from .state import preserved

ESTIMATORS = ("batch", "sample", "expected", "label_free")


def estimate_fisher(
    model: torch.nn.Module,
    loader: Iterable[Any],
    params: Params = None,
    estimator: str = "batch",
    loss_fn: Loss | None = None,
    forward_fn: Forward | None = None,
    progress: bool = False,
    backend: str | None = None,
    samples: int = 1,
    seed: int = 0,
) -> Fisher:
    """Estimate the diagonal Fisher information of a model over a loader.

    | estimator | what is averaged | source |
    | --- | --- | --- |
    | `batch` | (1/B) sum_b g_b^2, g_b the gradient of mini-batch b's mean loss | SSD 2308.07707, FIUn 2408.08493 |
    | `sample` | (1/N) sum_n g_n^2, g_n the gradient of sample n's loss: the empirical Fisher | 1412.1193, sec. 11 |
    | `expected` | (1/N) sum_n E_y g_n(y)^2, y drawn from the model's softmax: the Fisher | 1412.1193, sec. 5 |
    | `label_free` | (1/B) sum_b of the size of the gradient of mean_n ‖f(x_n)‖² | LFSSD 2402.19308 |

    With `batch` and `label_free` every batch weighs the same, and the batch size changes the estimate; with the others
    it does not. The model is evaluated in eval mode and is afterwards exactly as before: modes, requires_grad, .grad,
    buffers, random state. `fisher.provenance.how` says how each parameter was computed, `print(fisher.provenance)`
    shows it; docs/fishers.md says which estimator to choose.

    Args:
        model: any module.
        loader: yields batches; by default pairs (inputs [B, ...], targets [B]); for `label_free` also inputs alone.
        params: which parameters, as in `Layout.from_module`; frozen ones may be named.
        estimator: see above.
        loss_fn: (outputs, targets) -> scalar mean loss; default cross entropy. For `sample` it is what it gives for
            each sample alone that counts: it is called on slices [1, ...] of outputs and targets, or may return [B].
            Not for `expected` and `label_free`, which have losses of their own.
        forward_fn: (model, batch) -> (outputs, targets), for batches of another form. For `sample` and `expected` a
            batch is cut into samples along the first dimension of its tensors.
        progress: show a progress bar.
        backend: as in `plan`.
        samples: labels drawn for each example by `expected`; 0: every class, weighted by its probability, exact. A last
            linear layer is exact in either case.
        seed: of the draws.

    Returns:
        The Fisher, float32, on the parameters' device.

    Raises:
        EstimationError: empty loader, a batch that the default unpacking does not understand, a loss that is not a
            scalar or does not depend on the selected parameters; for `expected`, outputs that are not [B, classes].
        ArgumentError: unknown estimator, a loss where the estimator has its own, or negative `samples`.
        LayoutError, DeviceError, BackendError: as in `FisherAccumulator`.

    """
    options = (params, estimator, loss_fn, forward_fn, progress, backend, samples, seed)
    return estimate_fishers({"model": model}, loader, *options)["model"]


def estimate_fishers(
    models: Mapping[str, torch.nn.Module],
    loader: Iterable[Any],
    params: Params = None,
    estimator: str = "batch",
    loss_fn: Loss | None = None,
    forward_fn: Forward | None = None,
    progress: bool = False,
    backend: str | None = None,
    samples: int = 1,
    seed: int = 0,
) -> dict[str, Fisher]:
    """Fishers of several models, as all nodes of an inheritance DAG, over one sweep of the loader.

    Each batch is loaded once and goes through every model. Arguments and errors as for `estimate_fisher`; `params` is
    applied to each model by itself.

    Args:
        models: name -> module.
        loader, params, estimator, loss_fn, forward_fn, progress, backend, samples, seed: as there.

    Returns:
        Name -> Fisher, in the order of `models`.

    Raises:
        ArgumentError: there is no model; else as in `estimate_fisher`.

    """
    if estimator not in ESTIMATORS:
        raise ArgumentError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    if estimator in ("expected", "label_free") and loss_fn is not None:
        own = {"expected": "cross entropy", "label_free": "mean ‖f(x)‖²"}[estimator]
        raise ArgumentError(f"estimator {estimator!r} has a loss of its own, {own}: leave loss_fn out")
    if not isinstance(samples, int) or samples < 0:
        raise ArgumentError(f"samples is {samples!r}, expected a whole number, 0 for every class")
    if not isinstance(models, Mapping) or not models:
        raise ArgumentError(f"models is {models!r}, expected a dict of name -> module with one entry at least")
    if len({id(model) for model in models.values()}) < len(models):
        raise ArgumentError("one model stands under several names; estimate its Fisher once")
    with ExitStack() as stack:
        estimates = {}
        for name, model in models.items():
            selected = select_parameters(model, params)
            stack.enter_context(preserved(model, selected.values()))
            job = Job(model, selected, estimator, loss_fn, forward_fn, backend, samples, seed)
            estimates[name] = _Chosen(job)
        for batch in _progress(loader) if progress else loader:
            for estimate in estimates.values():
                estimate.step(batch)
        return {name: estimate.result() for name, estimate in estimates.items()}


class _Chosen(Estimate):
    """The cheapest way that fits: decided on the first batch, by trying."""

    def __init__(self, job: Job) -> None:
        self._job, self._steps = job, 0
        try:
            self._estimate: Estimate = HeadEstimate(job)
        except NotAHead:  # more than a head was asked for: nothing to explain
            self._estimate = _general(job, "")

    def step(self, batch: Any) -> None:
        try:
            self._estimate.step(batch)
        except NotAHead as refusal:
            if self._steps:
                raise EstimationError(f"batch {self._steps}: {refusal}, unlike in the batches before") from None
            self._estimate = _general(self._job, f"not at the head: {refusal}")
            self._estimate.step(batch)
        self._steps += 1

    def result(self) -> Fisher:
        return self._estimate.result()


def _general(job: Job, why: str) -> Estimate:
    return (SampleEstimate if job.estimator in ("sample", "expected") else BatchEstimate)(job, why)


def _progress(loader: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import track

    return track(loader, description="Fisher", total=len(loader) if isinstance(loader, Sized) else None)
