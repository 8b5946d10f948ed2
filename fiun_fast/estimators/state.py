"""Leave a model exactly as it was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def preserved(model: torch.nn.Module, scope: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, gradients only for `scope`, none left over from before; everything is put back at the end.

    Put back, also after an error: train/eval mode of every submodule, requires_grad and .grad of every parameter (the
    same objects), every buffer (BatchNorm statistics among them), and torch's random state on the CPU and on the
    devices of the model.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {p.device for p, _, _ in parameters if p.device.type == "cuda"}
    chosen = {id(p) for p in scope}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)):
        try:
            model.eval()
            for p, _, _ in parameters:
                p.grad = None
                p.requires_grad_(id(p) in chosen)
            with torch.enable_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
            for p, requires_grad, grad in parameters:
                p.requires_grad_(requires_grad)
                p.grad = grad
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
