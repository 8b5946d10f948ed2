"""The gradient of a loss over a layout: what signed selection reads beside a forget Fisher."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .errors import EstimationError, LayoutError
from .guards import denormals_kept
from .scope import Params, select_parameters
from .vectors import Vector, flattened


class Gradient(Vector):
    """Gradient of a loss to be raised, mostly the mean loss on the data to be forgotten: one number a parameter.

    A dampening shrinks what it selects. To first order that raises the loss where the gradient and the parameter have
    opposite signs, and lowers it where they agree; with `ForgetRequest(…, gradient=…)` or `dampen_(…, gradient=…)` only
    the former are selected.

    Args:
        buffer: [layout.numel], float32 or float64, contiguous; kept, not copied.
        layout: what the numbers belong to; that of the forget Fisher beside it.

    Raises:
        DTypeError, LayoutError, DeviceError: as for `Fisher`.

    """

    @classmethod
    @denormals_kept()
    def from_module(cls, model: torch.nn.Module, params: Params = None) -> Gradient:
        """What a backward pass left in `.grad`, copied; half precision becomes float32. A `.grad` of None counts as 0.

            loss(model, forget).backward()
            gradient = ff.Gradient.from_module(model, params=head)

        Args:
            model: whose parameters.
            params: which, as in `Layout.from_module`; those of the forget Fisher.

        Raises:
            EstimationError: none of the parameters has a gradient.
            LayoutError: as in `Layout.from_module`.
            FiunError: a gradient without plain memory of its own, parameters on several devices.

        """
        return cls(*flattened(_gradients(model, params)))

    @classmethod
    @denormals_kept()
    def from_dict(cls, values: Mapping[str, torch.Tensor]) -> Gradient:
        """Build from name -> tensor in the parameter's shape. Copies; half precision becomes float32.

        Raises:
            ArgumentError, DTypeError, DeviceError, FiunError: as `Fisher.from_dict`, but negative entries are welcome.

        """
        return cls(*flattened(values))

    @denormals_kept()
    def refresh_(self, model: torch.nn.Module) -> None:
        """Take `.grad` again, into the same buffer: plans that were made with this gradient go on with the new one.

        Raises:
            EstimationError, LayoutError: as `from_module`, or the parameters have another shape now.

        """
        found = _gradients(model, list(self.layout.names))
        buffer, layout = flattened({name: found[name] for name in self.layout.names})
        if (difference := self.layout.difference(layout, "the gradient", "the model")) is not None:
            raise LayoutError(f"the gradient does not fit the model any more: {difference}")
        self.buffer.copy_(buffer)

    def __repr__(self) -> str:
        return f"Gradient({self.numel:,} elements in {len(self.layout)} parameters, {self.dtype} on {self.device})"


def _gradients(model: torch.nn.Module, params: Params) -> dict[str, torch.Tensor]:
    parameters = select_parameters(model, params)
    if all(p.grad is None for p in parameters.values()):
        raise EstimationError("no parameter has a gradient: call backward() on the loss first")
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
