"""Squared gradients, summed step by step into a flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from ..errors import ArgumentError, DeviceError, DTypeError, EstimationError
from ..fisher import FISHER_DTYPES, Fisher, Provenance
from ..kernels import select
from ..layout import Layout, Params, select_parameters
from .streaming import at_steps, in_backward

POWERS = {"batch": 2, "label_free": 1}


class FisherAccumulator:
    """Fisher in a user's own loop: call `update()` after each `loss.backward()`, `result()` at the end.

    The estimate is (1/B) sum_b g_b^2 over the B updates, g_b the gradient found in `.grad`: the `batch` estimator of
    SSD and FIUn where every backward is that of one mini-batch's mean loss. With `label_free` it is (1/B) sum_b |g_b|,
    that of LFSSD (arXiv 2402.19308) where every backward is that of mean_n ‖f(x_n)‖².

    Args:
        model: its parameters' `.grad` are read; nothing else of it is touched.
        params: which parameters, as in `Layout.from_module`.
        dtype: of the sum, float32 or float64; gradients of half precision are widened before they are squared.
        backend: name of one; None for the default of the parameters' device.
        estimator: "batch" or "label_free".
        allow_frozen: take parameters that do not require grad along, as zeros, instead of refusing them.

    Raises:
        ArgumentError: unknown estimator; a selected parameter does not require grad, so no gradient would ever arrive.
        DeviceError: the parameters lie on several devices.
        DTypeError: `dtype` is not float32 or float64.
        LayoutError, BackendError: as in `Layout.from_module` and `plan`.

    """

    def __init__(
        self,
        model: torch.nn.Module,
        params: Params = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        estimator: str = "batch",
        allow_frozen: bool = False,
    ) -> None:
        if estimator not in POWERS:
            raise ArgumentError(f"estimator is {estimator!r}, expected one of {', '.join(POWERS)}")
        if dtype not in FISHER_DTYPES:
            raise DTypeError(f"dtype is {dtype}, expected float32 or float64")
        self._parameters = select_parameters(model, params)
        first, like = next(iter(self._parameters.items()))
        for name, p in self._parameters.items():
            if not p.requires_grad and not allow_frozen:
                raise ArgumentError(f"parameter {name!r} does not require grad: no gradient will arrive")
            if p.device != like.device:
                raise DeviceError(f"parameter {name!r} is on {p.device}, expected {like.device} as {first!r}")
        self.layout = Layout({name: p.shape for name, p in self._parameters.items()})
        self._backend = select(backend, like.device.type)
        self._dtype, self._device, self._estimator = dtype, like.device, estimator
        self._begin()

    def _begin(self) -> None:
        self._sum = torch.zeros(self.layout.numel, dtype=self._dtype, device=self._device)
        self._views = {name: view.view(-1) for name, view in self.layout.views(self._sum).items()}
        self.steps = 0
        self.samples = 0

    def update(self, zero_grads: bool = False, samples: int = 0) -> None:
        """Add the squares (`label_free`: sizes) of the gradients that `.grad` holds now.

        A parameter without a gradient took no part in the loss and counts as zero.

        Args:
            zero_grads: set the gradients to zero in the same pass, instead of `optimizer.zero_grad()`.
            samples: examples in this step, for the provenance only.

        Raises:
            EstimationError: no parameter has a gradient.

        """
        found = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        if not found:
            raise EstimationError("no parameter has a gradient: call loss.backward() before update()")
        self._fold(found, zero_grads)
        self.steps += 1
        self.samples += samples

    def _fold(self, found: dict[str, torch.Tensor], zero_grads: bool = False) -> None:
        if not self._views:
            self._begin()
        gradients, into, copied = [], [], []
        for name, grad in found.items():
            gradient = grad
            if gradient.layout != torch.strided:  # nn.Embedding(sparse=True)
                copied.append(grad)
                gradient = gradient.to_dense()
            elif not gradient.is_contiguous():
                copied.append(grad)
                gradient = gradient.contiguous()
            gradients.append(gradient.detach() if gradient.requires_grad else gradient)  # create_graph=True
            into.append(self._views[name])
        self._backend.accumulate(gradients, into, POWERS[self._estimator], zero_grads)
        if zero_grads:
            for original in copied:  # copies were read above; these are the gradients themselves
                original.zero_()

    @contextmanager
    def streaming(self, every: int = 1, scale: float | Callable[[], float] = 1.0, free: bool = True) -> Iterator[None]:
        """Inside `with`, every `loss.backward()` is an update: each gradient is folded in as it arrives, and freed.

        No gradient outlives its own moment, so memory stays that of the largest one. Works with autocast and with
        gradient checkpointing (reentrant: where each parameter lies in one segment). Under DistributedDataParallel
        gradients arrive before they are reduced: use `during` or `update` there.

        Args:
            every: backward passes that make one mini-batch (gradient accumulation); gradients add up in between.
            scale: by which the loss is multiplied, or a callable that tells, as `GradScaler.get_scale`; asked once a
                backward. Every step counts, one that overflows too: use `during` where a GradScaler may skip steps.
            free: set `.grad` to None after it was used; False leaves it to an optimiser.

        Raises:
            ArgumentError: `every` is not a whole number above 0.
            EstimationError: a parameter holds a gradient on entry; on exit, the last mini-batch lacks backward passes
                (it is left out), or a scaled gradient was not finite.

        """

        def stepped() -> None:
            self.steps += 1

        fold = lambda name, gradient: self._fold({name: gradient})  # noqa: E731
        with in_backward(self._parameters, every, scale, free, fold, stepped):
            yield
        if (callable(scale) or scale != 1) and not bool(self._sum.sum(dtype=torch.float64).isfinite()):
            raise EstimationError("a scaled gradient was not finite: start anew with a smaller scale, or use during()")

    def during(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Inside `with`, every step of a training loop's optimiser is an update, before it changes the parameters.

        The gradients are those the optimiser sees: accumulated over micro-batches, reduced over processes
        (DistributedDataParallel), clipped if the loop clips, and unscaled under a GradScaler, whose skipped steps are
        not counted. They are training-mode gradients of changing parameters: docs/fishers.md.

        Raises:
            ArgumentError: it is no optimiser.
            EstimationError: at a step, no parameter has a gradient.

        """

        def collect(scale: float) -> None:
            if scale == 1:
                self.update()
                return
            self._fold({name: p.grad / scale for name, p in self._parameters.items() if p.grad is not None})
            self.steps += 1

        return at_steps(optimizer, collect)

    def result(self, in_place: bool = False) -> Fisher:
        """The mean of the squares (`label_free`: sizes) so far, as a new Fisher; more updates may follow.

        Args:
            in_place: divide the sum itself and hand it over, without a second buffer; the accumulator starts anew then.

        Raises:
            EstimationError: there was no update.

        """
        if self.steps == 0:
            raise EstimationError("no gradients were accumulated: call update() after each loss.backward()")
        provenance = Provenance(self._estimator, self.steps, self.samples)
        if not in_place:
            return Fisher(self._sum / self.steps, self.layout, provenance)
        done = Fisher(self._sum.div_(self.steps), self.layout, provenance)
        self._sum, self._views, self.steps, self.samples = torch.empty(0), {}, 0, 0  # update() begins anew
        return done
