"""What every estimator ends in: a flat sum over a layout, and the number of steps and samples in it.

Whatever reaches a kernel on its way into the sum is checked here, and the sum becomes a Fisher here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import short
from ..dtensors import is_dtensor, local_tensor
from ..errors import DeviceError, DTypeError, EstimationError, EstimationWarning, FiunError, LayoutError, warn
from ..fisher import Fisher
from ..kernels import select
from ..kernels.cpu import expect_writes
from ..layout import Layout
from ..memory import check_addressable, check_one_device, check_writable, flaw_of, is_lazy, span
from ..provenance import Provenance
from ..ranks import Ranks

POWERS = {"batch": 2, "softened": 2, "sample": 2, "expected": 2, "label_free": 1}  # |g| to this power is summed
BY_SAMPLE = ("sample", "expected")  # means over samples; the others are means over steps
EMPTY = "the loader is empty: no batch to estimate a Fisher from"


class Totals:
    """A flat buffer of zeros with a view for each parameter, and the few ways to add something to it.

    Attributes:
        layout, buffer: the sum, [layout.numel].
        views: name -> view of the buffer in the parameter's shape.
        steps, samples: mini-batches and examples so far; `count` adds to them.
        kernels: the backend that adds.

    Args:
        parameters: name -> parameter, all on one device.
        estimator: one of `ESTIMATORS`; decides what is summed, and what the mean is taken over.
        dtype: dtype of the sum, float32 or float64.
        backend: name of a backend; None for the default of the parameters' device.
        empty: the error message if `fisher` is called before anything was added.

    Of parameters that are spread over ranks it is a sum over what this rank has of them.

    Raises:
        FiunError: a parameter has no plain memory of its own (meta, sparse, freed, …).
        DeviceError: the parameters lie on several devices.
        BackendError: the backend cannot be used there.

    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        estimator: str,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        empty: str = EMPTY,
    ) -> None:
        check_parameters(parameters)
        self.layout = Layout.from_tensors(parameters)
        self._spread: dict[str, Any] = {n: p.placements for n, p in parameters.items() if is_dtensor(p)}  # type: ignore[attr-defined]
        self._device, self._dtype = local_tensor(next(iter(parameters.values()))).device, dtype
        self._estimator, self._empty, self._power = estimator, empty, POWERS[estimator]
        self.kernels = select(backend, self._device.type)
        self._begin()

    @torch.inference_mode(False)  # a sum is written to later, in whatever mode the caller is then
    def _begin(self) -> None:
        self.buffer = torch.empty(self.layout.numel, dtype=self._dtype, device=self._device)
        check_addressable("the sum", self.buffer)  # under FakeTensorMode all that is made is fake
        expect_writes(self.buffer).zero_()
        self.views = self.layout.views(self.buffer)
        self._flat = {name: view.view(-1) for name, view in self.views.items()}
        self._shapes = {name: view.shape for name, view in self.views.items()}
        self.steps = self.samples = 0
        self._spoilt = ""
        self._noted: dict[str, str] = {}

    def count(self, samples: int) -> None:
        """Count one more step, with this many samples."""
        self.steps += 1
        self.samples += samples

    def note(self, outputs: Any, reduction: str, per: str = "") -> None:
        """Note for the provenance how the first batch was reduced, and the dtype of its outputs."""
        if not self._noted:
            dtype = short(outputs.dtype) if isinstance(outputs, Tensor) else ""
            self._noted = {"reduction": reduction, "dtype": dtype, "per": per}

    def is_finite(self) -> bool:
        """Whether every element of the sum is; reads it once."""
        return bool(self.buffer.sum().isfinite()) or bool(self.buffer.isfinite().all())  # a sum may overflow

    def spoil(self, why: str) -> None:
        """Say that the sum has become wrong, as by part of a gradient: `add` and `fisher` are errors from now on."""
        self._spoilt = self._spoilt or why

    def check_right(self) -> None:
        """Raise an EstimationError where the sum was spoilt."""
        if self._spoilt:
            raise EstimationError(f"{self._spoilt}: the sum is wrong now, and has to be begun anew")

    def add(
        self, gradients: Mapping[str, Tensor], *, zero: bool = False, scale: float = 1.0, samples: int | None = None
    ) -> None:
        """Add |g|^power for some parameters' gradients; all are checked before anything is added.

        Args:
            gradients: name -> gradient in the parameter's shape, of any strides; sparse ones (nn.Embedding) are made
                dense.
            zero: set the gradients to zero in the same pass.
            scale: number by which the gradients are divided first; not together with `zero`.
            samples: count a step with this many samples; None: count none.

        Raises:
            FiunError: a gradient has no plain memory of its own; the message names its parameter.
            LayoutError: a gradient has another shape than the parameter had when the sum began.
            DeviceError: a gradient is on another device.
            DTypeError: a gradient has a dtype that the backend does not support.
            EstimationError: the sum was spoilt, by an earlier call that was interrupted.

        """
        self.check_right()
        if not self.views:  # `fisher` returned the buffer itself
            self._begin()
        strided, sparse, into = [], [], []
        for name, gradient in gradients.items():
            if name in self._spread:
                gradient = self._here(name, gradient)
            if gradient.layout != torch.strided and not gradient.is_nested:
                sparse.append(gradient)
                gradient = gradient.to_dense()
            if (flaw := flaw_of(gradient)) is not None:
                raise flaw.raised(f"the gradient of {name!r}")
            if gradient.shape != self._shapes[name] or gradient.device != self._device:
                raise self._misfit(name, gradient)
            strided.append(gradient.detach() if gradient.requires_grad else gradient)  # create_graph=True
            into.append(self._flat[name])
        if zero:
            check_writable((f"the gradient of {name!r}" for name in gradients), strided)
        if scale != 1:
            strided = [gradient / scale for gradient in strided]
        # one tensor may be the gradient of two parameters: the first must not clear what the second is to count
        at_once = zero and _apart(strided)
        try:
            self.kernels.accumulate(strided, into, self._power, at_once)
            if zero and not at_once:
                torch._foreach_zero_(strided)
            if samples is not None:
                self.count(samples)
            if zero and sparse:  # the kernel has set dense copies to zero
                with torch.no_grad():
                    for gradient in sparse:
                        gradient.zero_()
        except DTypeError:  # said before anything is added
            raise
        except BaseException:
            self.spoil("an update was interrupted half way")
            raise

    def _here(self, name: str, gradient: Tensor) -> Tensor:
        """What this rank has of the gradient of a parameter that is spread, cut up as the parameter is."""
        if is_dtensor(gradient) and gradient.placements != self._spread[name]:  # type: ignore[attr-defined]
            # sums that wait to be reduced
            gradient = gradient.redistribute(placements=self._spread[name])  # type: ignore[attr-defined]
        return local_tensor(gradient)

    def add_up(self, ranks: Ranks) -> None:
        """Make it the sum over all ranks, the same on each: each adds its own steps and samples. A collective."""
        counts = ranks.sum_of(np.array([self.steps, self.samples], dtype=np.int64))
        ranks.sum_(self.buffer)
        self.steps, self.samples = counts.tolist()

    def _misfit(self, name: str, gradient: Tensor) -> FiunError:
        if gradient.device != self._device:
            return DeviceError(f"the gradient of {name!r} is on {gradient.device}, expected {self._device} as the sum")
        return LayoutError(
            f"the gradient of {name!r} has shape {list(gradient.shape)}, expected {list(self._shapes[name])}, the "
            "parameter's shape when the sum began"
        )

    def number(self, t: Tensor) -> Tensor:
        """In the sum's dtype; half precision is widened before anything is added or squared."""
        return t.to(self._dtype)

    def square(self, into: Tensor, gradients: Tensor) -> None:
        """Add per-sample gradients [B, *shape], squared, to a part of the sum [*shape]."""
        into += self.number(gradients).square().sum(0).view(into.shape)

    def outer(self, into: Tensor, left: Tensor, right: Tensor) -> None:
        """Add sum_b (left_b right_b^T)^2 to a weight's part of the sum: left [B, G, M, T], right [B, G, K, T].

        Raises:
            FiunError: an operand has no plain memory of its own.
            LayoutError: that part does not have G * M * K elements.

        """
        left, right = self.number(left), self.number(right)
        check_addressable("an output gradient", left)
        check_addressable("an input", right)
        _, groups, m, _ = left.shape
        if groups * m * right.shape[2] != into.numel():
            raise LayoutError(
                f"gradients of {groups} x {m} x {right.shape[2]} elements for a weight of {into.numel()}: its shape "
                "has changed"
            )
        if not into.is_contiguous() and into.mT.is_contiguous():  # a weight that is used transposed
            into, left, right = into.mT, right, left
        if into.is_contiguous():
            self.kernels.outer_square_accumulate(left, right, into.view(-1))
        else:  # some of its columns
            squares = into.new_zeros(into.shape)
            self.kernels.outer_square_accumulate(left, right, squares.view(-1))
            into += squares

    def _warn_if_useless(self) -> None:
        total, made = float(self.buffer.sum()), f"the Fisher over batches 0 to {self.steps - 1}"
        if total == 0 and self.buffer.numel():
            warn(
                f"{made} is zero everywhere: no gradient of the loss reached the parameters, or all of them vanished",
                EstimationWarning,
            )
        elif not math.isfinite(total) and not self.is_finite():
            number = int((~self.buffer.isfinite()).sum())
            warn(f"{number} elements of {made} are not finite, and will not be selected", EstimationWarning)

    def fisher(self, how: Mapping[str, str] | None = None, *, in_place: bool = False) -> Fisher:
        """The mean over the steps, or over the samples where the estimator goes by samples.

        Args:
            how: parameter -> how it was computed, for the provenance.
            in_place: divide the sum itself and return it, without a second buffer; later additions start a new sum.

        Raises:
            EstimationError: nothing was added, or the sum was spoilt.

        """
        self.check_right()
        number = self.samples if self._estimator in BY_SAMPLE else self.steps
        check_not_empty(number, self._empty)
        self._warn_if_useless()
        record = Provenance(self._estimator, self.steps, self.samples, {} if how is None else how, **self._noted)
        if not in_place:
            return Fisher(self.buffer / number, self.layout, record)
        buffer = self.buffer
        self.buffer, self.views, self._flat, self.steps, self.samples = torch.empty(0), {}, {}, 0, 0
        return Fisher(buffer.div_(number), self.layout, record)


def _apart(tensors: Sequence[Tensor]) -> bool:
    """Whether no two of them share memory."""
    spans = sorted(span(tensor) for tensor in tensors if tensor.numel())
    return all(end <= start for (_, end), (start, _) in pairwise(spans))


def check_parameters(parameters: Mapping[str, Tensor], layout: Layout | None = None) -> None:
    """Raise a FiunError unless all have plain memory on one device, may have gradients, and fit a given layout."""
    local = {name: local_tensor(p) for name, p in parameters.items()}
    for name, p in local.items():
        if (flaw := flaw_of(p)) is not None:
            raise flaw.raised(f"parameter {name!r}")
    check_one_device(local, lambda name: f"parameter {name!r}")
    check_no_inference(parameters.items())
    for name, p in local.items():
        if layout is not None and p.shape != layout[name].shape:
            raise LayoutError(
                f"parameter {name!r} has shape {list(p.shape)}, expected {list(layout[name].shape)}, its shape when "
                "the sum began"
            )


def check_no_inference(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise an EstimationError for the first tensor that was made under torch.inference_mode: autograd refuses it.

    A LayoutError for one that is lazy, and cannot even be asked.
    """
    for name, tensor in named:
        if is_lazy(tensor):
            raise LayoutError(f"{name!r} has no shape yet: run the lazy module once on a batch")
        if tensor.is_inference():
            raise EstimationError(
                f"{name!r} was made under torch.inference_mode(), which no gradient may pass: make the model outside "
                "it, or copy it there, copy.deepcopy(model)"
            )


def check_not_empty(count: int, message: str = EMPTY) -> None:
    """Raise an EstimationError with this message if the count is 0."""
    if count == 0:
        raise EstimationError(message)
