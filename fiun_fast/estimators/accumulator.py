"""`batch` (SSD, FIUn) and `label_free` (LFSSD): gradients as backward leaves them, summed mini-batch by mini-batch.

`FisherAccumulator` does so in a user's own loop, `BatchEstimate` over a loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..arguments import FISHER_DTYPES, Estimator, check_count, check_one_of, listed
from ..dtensors import is_dtensor
from ..errors import ArgumentError, DTypeError, EstimationError, LayoutError
from ..fisher import Fisher
from ..layout import Layout
from ..scope import Params, check_module, select_parameters
from . import claims
from .job import Estimate, Job, count, in_backward_of, reduction_of
from .reading import check_loss, check_measurable
from .streaming import at_steps, in_backward
from .totals import Totals, check_parameters

OF_GRADIENTS = ("batch", "label_free")  # the estimators that are sums over gradients as a backward leaves them
HOW = {
    "batch": "square of the batch gradient",
    "softened": "square of the batch gradient of the softened loss",
    "label_free": "size of the gradient of mean ‖f(x)‖²",
}
EMPTY = "no gradients were accumulated: call update() after each loss.backward()"


class FisherAccumulator:
    """A Fisher from your own loop: call `update()` after each `loss.backward()`, `result()` at the end.

    The estimate is (1/B) sum_b g_b^2 over the B updates, g_b the gradient found in `.grad`: the `batch` estimator of
    SSD and FIUn where every backward is that of one mini-batch's mean loss. With `label_free` it is (1/B) sum_b |g_b|,
    that of LFSSD (arXiv 2402.19308) where every backward is that of mean_n ‖f(x_n)‖².

    Args:
        model: its parameters' `.grad` are read; nothing else of it is touched. It may be wrapped, and gradients are
            then what the wrapper makes of them: reduced over ranks by DistributedDataParallel.
        params: which parameters, as in `Layout.from_module`.
        dtype: dtype of the sum, float32 or float64; half-precision gradients are widened before they are squared.
        backend: name of a backend; None for the default of the parameters' device.
        estimator: "batch" or "label_free".
        allow_frozen: include parameters that do not require grad, as zeros, instead of refusing them.

    Raises:
        ArgumentError: unknown estimator; a selected parameter does not require grad, so no gradient would ever arrive.
        DeviceError: the parameters lie on several devices, or one on meta.
        DTypeError: `dtype` is not float32 or float64.
        LayoutError: a parameter has no plain memory of its own (sparse, freed, …); the message says what to
            pass. Or as in `Layout.from_module`.
        BackendError: as in `plan`.

    """

    def __init__(
        self,
        model: torch.nn.Module,
        params: Params = None,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        estimator: Estimator = "batch",
        allow_frozen: bool = False,
    ) -> None:
        check_one_of("estimator", estimator, OF_GRADIENTS)
        if dtype not in FISHER_DTYPES:
            raise DTypeError(f"dtype is {dtype}, expected {listed(FISHER_DTYPES)}")
        check_module("model", model)
        with claims.settled(model):
            self._parameters = select_parameters(model, params)
            frozen = [name for name, p in self._parameters.items() if not p.requires_grad]
        if frozen and not allow_frozen:
            raise ArgumentError(f"parameter {frozen[0]!r} does not require grad: no gradient will arrive")
        self._totals = Totals(self._parameters, estimator, dtype=dtype, backend=backend, empty=EMPTY)
        self._model = model
        self._way = self._way_to_them()
        self._inside = ""  # streaming() or during(), while one is open

    @property
    def layout(self) -> Layout:
        """The parameters, in which order and shape."""
        return self._totals.layout

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self._totals.steps

    @property
    def samples(self) -> int:
        """Examples so far, as far as `update` was told of them."""
        return self._totals.samples

    def update(self, *, zero_grads: bool = False, samples: int = 0) -> None:
        """Add the squares (`label_free`: sizes) of the gradients that `.grad` holds now.

        A parameter without a gradient had no part in the loss and counts as zero.

        Args:
            zero_grads: set the gradients to zero in the same pass, instead of `optimizer.zero_grad()`.
            samples: number of examples in this step, for the provenance only.

        Raises:
            ArgumentError: `samples` is not a whole number.
            EstimationError: no parameter has a gradient; inside `streaming` or `during`; while another thread
                estimates them; or an earlier update was interrupted half way.
            LayoutError: a parameter was replaced since the accumulator was made; a gradient has no plain memory of its
                own, or another shape than the parameter had then. All gradients are checked before any is added.
            DeviceError: a gradient is on another device.

        """
        if self._inside:
            raise EstimationError(f"update() inside {self._inside}, which adds each gradient by itself")
        self._update(1.0, zero_grads, check_count("samples", samples, least=0))

    def _way_to_them(self) -> list[tuple[dict[str, Any], str, object]]:
        """What the model is made of, (where, under which key, what), as long as which it holds the parameters.

        Raises:
            LayoutError: it does not hold one of them any more.

        """
        held = {id(p) for p in self._model.parameters()}
        for name, p in self._parameters.items():
            if id(p) not in held:
                raise LayoutError(
                    f"parameter {name!r} is not the model's any more: it was replaced after the accumulator was made, "
                    "as by a new layer or load_state_dict(assign=True); make another FisherAccumulator(model)"
                )
        ours = {id(p) for p in self._parameters.values()}
        own = [module for module in self._model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        return [(m._modules, key, child) for m in own for key, child in m._modules.items()] + [
            (m._parameters, key, p) for m in own for key, p in m._parameters.items() if id(p) in ours
        ]

    def _check_held(self) -> None:
        """Raise a LayoutError where a parameter has been replaced, so that its gradients go elsewhere."""
        if any(where.get(key) is not what for where, key, what in self._way):
            self._way = self._way_to_them()  # it may only have moved, as into a wrapper

    def _update(self, scale: float, zero_grads: bool = False, samples: int = 0) -> None:
        claims.check_not_estimated(self._parameters)
        self._check_held()
        found = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        if not found:
            raise EstimationError("no parameter has a gradient: call loss.backward() before update()")
        self._totals.add(found, zero=zero_grads, scale=scale, samples=samples)

    @contextmanager
    def _open(self, what: str) -> Iterator[None]:
        self._check_held()
        check_parameters(self._parameters, self.layout)
        if self._inside:
            raise EstimationError(
                f"{what} inside {self._inside} of the same accumulator: each gradient would count twice"
            )
        self._inside = what
        try:
            yield
        finally:
            self._inside = ""

    @contextmanager
    def streaming(
        self, *, every: int = 1, scale: float | Callable[[], float] = 1.0, free: bool = True
    ) -> Iterator[None]:
        """Inside `with`, every `loss.backward()` is an update: each gradient is folded in as it arrives, and freed.

        Gradients never exist all at once: the peak is that of the largest one. Works with autocast and with
        gradient checkpointing (reentrant: where each parameter lies in one segment). Under DistributedDataParallel
        gradients arrive before they are reduced: use `during` or `update` there.

        After a backward that raised (out of memory, Ctrl-C), part of its gradients may be in the sum. Leave the `with`
        then, and begin anew: to go on is an error, not a wrong Fisher.

        Args:
            every: backward passes that make one mini-batch (gradient accumulation); gradients add up in between.
            scale: factor by which the loss is multiplied, or a callable that returns it, such as
                `GradScaler.get_scale`, called once per backward. Every step counts, even one that overflows: use
                `during` where a GradScaler may skip steps.
            free: set `.grad` to None once it was used; False leaves it to an optimiser.

        Raises:
            ArgumentError: `every` is not a whole number of at least 1, or `scale` no finite number above 0.
            EstimationError: on entry, a parameter holds a gradient, streams already (here or elsewhere), or is being
                estimated; at a backward and on exit, an earlier one raised; on exit, the last mini-batch lacks backward
                passes (it is left out), or a scaled gradient was not finite.
            LayoutError, DeviceError: on entry, a parameter has changed its shape or lost its memory, or is spread over
                ranks; during a backward, a gradient is one that `update` refuses.

        """
        if any(map(is_dtensor, self._parameters.values())):
            raise LayoutError(
                "gradients of a model that is spread over ranks are reduced first: use update() or during()"
            )
        with (
            self._open("streaming()"),
            claims.streaming(self._parameters),
            in_backward(self._parameters, every, scale, free, self._totals),
        ):
            yield
        if (callable(scale) or scale != 1) and not bool(self._totals.buffer.sum(dtype=torch.float64).isfinite()):
            raise EstimationError("a scaled gradient was not finite: start again with a smaller scale, or use during()")

    @contextmanager
    def during(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside `with`, every step of a training loop's optimiser is an update, before it changes the parameters.

        The gradients are those the optimiser sees: accumulated over micro-batches, reduced over processes
        (DistributedDataParallel), clipped if the loop clips, and unscaled under a GradScaler, whose skipped steps are
        not counted; one that raises later, in the step itself, is. With `step(closure)` they are those of the closure's
        first call. They are training-mode gradients of changing parameters: docs/fishers.md.

        Args:
            optimizer: a torch.optim.Optimizer, or a wrapper of one that steps it (docs/models.md).

        Raises:
            ArgumentError: it is neither, or adds noise to the gradients (Opacus).
            EstimationError: inside `streaming` or `during` of the same accumulator; at a step, no parameter has a
                gradient.
            LayoutError, DeviceError: as in `streaming`.

        """
        with self._open("during()"), at_steps(optimizer, self._update):
            yield

    def result(self, *, in_place: bool = False) -> Fisher:
        """The mean of the squares (`label_free`: sizes) so far, as a new Fisher; more updates may follow.

        Args:
            in_place: divide the sum itself and return it, without a second buffer; later updates start a new sum.

        Raises:
            EstimationError: `update` was never called, or the sum was spoilt by a call that was interrupted.

        """
        return self._totals.fisher(in_place=in_place)


class BatchEstimate(Estimate):
    """(1/B) sum_b |g_b|^power: power 2 and the loss's gradient for `batch`, power 1 and that of ‖f‖² for `label_free`.

    For `softened` as for `batch`, of its own loss.

    why: why no cheaper way was taken; goes into the provenance.
    """

    def __init__(self, job: Job, why: str = "") -> None:
        self._job, self._why = job, why
        self._totals = Totals(job.selected, job.estimator, backend=job.options.backend)

    def step(self, batch: Any) -> None:
        """Run a backward and add what it left in `.grad`."""
        job, free = self._job, self._job.estimator == "label_free"
        outputs, targets = job.forward(batch)
        loss = squared_length(outputs) if free else job.loss(outputs, targets)
        if self._totals.steps == 0:
            self._totals.note(outputs, "mean" if free else reduction_of(job, outputs, targets))
        with in_backward_of(job, outputs, targets):
            check_loss(loss, job.selected).backward()
        found = {name: p.grad for name, p in job.selected.items() if p.grad is not None}
        if not found:
            raise EstimationError(f"the loss does not depend on {', '.join(list(job.selected)[:4])}")
        self._totals.add(found, samples=count(outputs) or count(batch))
        for p in job.selected.values():
            p.grad = None

    @property
    def totals(self) -> Totals:
        """The sum so far."""
        return self._totals

    def result(self) -> Fisher:
        """The mean over the batches."""
        how = HOW[self._job.estimator] + (f" ({self._why})" if self._why else "")
        return self._totals.fisher(dict.fromkeys(self._job.selected, how))


def squared_length(outputs: Any) -> Tensor:
    """mean_n ‖f(x_n)‖², the sensitivity of LFSSD (arXiv 2402.19308): outputs [B, ...] -> scalar."""
    check_measurable(outputs)
    return outputs.flatten(1).square().sum(1).mean() if outputs.dim() > 1 else outputs.square().mean()
