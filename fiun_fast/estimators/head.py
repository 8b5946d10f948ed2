"""The last linear layer alone, FIUn's default scope: one forward without gradients, and no backward through the model.

With input a, logits z and δ the gradient of the loss by z: `batch` squares δ^T a of the mean loss, as `softened` does
of its own, `label_free` takes its size, where the loss is mean ‖z‖² and δ = 2 z / B, `sample` adds up (δ^2)^T (a^2) of
every sample's loss, and `expected` has the closed form E_y[δ^2] = p (1 - p), p = softmax(z). For cross entropy δ = p -
onehot(y); other losses are differentiated as far as the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..dtensors import is_dtensor, local_tensor, sharding_modules
from ..errors import EstimationError
from ..fisher import Fisher
from ..naming import Names
from .accumulator import squared_length
from .job import Estimate, Job, per_sample, reduction_of
from .reading import OwnLoss, check_loss
from .rounds import predicted
from .totals import Totals

HOW = "closed form at the head, no backward through the model"


class NotAHead(Exception):  # noqa: N818  (a refusal, caught by the caller)
    """The selected parameters are not those of a linear layer whose output is the model's."""


Met = tuple[Any, Tensor, Tensor]  # targets; input and output of the layer, which are also the model's outputs


class SharedForward:
    """Within `with`, what the first of several estimates at one head has seen of a batch; the others see the same."""

    def __init__(self) -> None:
        self._met: Met | None = None

    def of(self, forward: Callable[[], Met]) -> Met:
        """What the forward gave, or gives; a loss that the model made itself is not handed on."""
        if self._met is not None:
            return self._met
        met = forward()
        if isinstance(met[0], Tensor):
            self._met = met
        return met

    def __enter__(self) -> None:
        self._met = None

    def __exit__(self, *_: object) -> None:
        self._met = None


class HeadEstimate(Estimate):
    """Any estimator's sum for the weight and bias of one `nn.Linear`.

    Of a layer that FSDP2 has cut up, the whole of them: its forward meets gathered parameters, and each rank's sum is
    one over its own samples.

    Args:
        job: what is to be estimated.
        shared: by all estimates of the same parameters in one sweep.

    Raises:
        NotAHead: there is no such layer; from `step`: its output is not that of the model, or the loss depends on its
            parameters in another way.

    """

    def __init__(self, job: Job, shared: SharedForward) -> None:
        self._job, self._shared = job, shared
        self._layer = _owner(job)
        names = {id(p): name for name, p in job.selected.items()}
        roles = self._layer._parameters.items()  # taken down now: FSDP2 puts gathered ones there meanwhile
        self._names = {role: names[id(p)] for role, p in roles if id(p) in names}
        self._gathered = any(map(is_dtensor, job.selected.values()))
        parameters = _wholes(job) if self._gathered else job.selected
        self._totals = Totals(parameters, job.estimator, backend=job.options.backend)

    def step(self, batch: Any) -> None:
        """One forward without gradients, then δ at the logits."""
        job = self._job
        targets, given, logits = self._shared.of(lambda: self._forward(batch))
        if given.dim() != 2:
            raise NotAHead(f"its input is {list(given.shape)}, expected [B, features]")
        if job.by_sample and given.layout != torch.strided:
            raise NotAHead(f"its input is sparse ({given.layout})")
        reduction = "mean" if job.estimator == "label_free" else reduction_of(job, logits, targets)
        self._totals.note(logits, reduction, job.options.per if job.by_sample else "")
        counted = None
        if job.by_sample:
            expected = job.estimator == "expected"
            counted = predicted(logits, targets).counted if expected else job.counted(logits, targets)
        self._add(given, logits, targets, counted)
        self._totals.count(len(logits) if counted is None else int(counted.sum()))

    @property
    def totals(self) -> Totals:
        """The sum so far."""
        return self._totals

    def _forward(self, batch: Any) -> Met:
        """Targets, and what the layer was given and returned."""
        met: list[tuple[Any, ...]] = []
        hooks = self._layer._forward_hooks or self._layer._forward_pre_hooks
        if hooks and not self._gathered:  # then they are FSDP2's
            raise NotAHead("the layer has hooks, which may change its input or output")
        if any(p._backward_hooks for p in self._layer.parameters(recurse=False)):
            raise NotAHead("its parameters have hooks, which may change their gradients")
        hook = self._layer.register_forward_hook(
            lambda _, given, named, output: met.append((*given, *named.values(), output)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                outputs, targets = self._job.forward(batch)
        finally:
            hook.remove()
        if isinstance(targets, OwnLoss) and self._job.estimator in ("batch", "sample"):
            raise NotAHead("the loss is the model's own")
        if len(met) != 1:
            raise NotAHead(f"the layer is called {len(met)} times")
        if outputs is not met[0][-1]:
            raise NotAHead("the outputs are not the layer's own")
        return targets, *met[0]

    def _add(self, a: Tensor, logits: Tensor, targets: Any, counted: Tensor | None) -> None:
        """a: [B, K], logits: [B, M], counted: [B]."""
        job, totals = self._job, self._totals
        if job.estimator == "expected":
            assert counted is not None
            p = totals.number(logits).softmax(1)
            self._outer((p * (1 - p)).sqrt() * counted[:, None], a)
            return
        if job.estimator == "sample":
            self._outer(self._delta(logits, lambda z: per_sample(job, z, targets).sum()), a)
            return
        free = job.estimator == "label_free"
        d = self._delta(logits, squared_length if free else lambda z: job.loss(z, targets))
        if d.dtype != a.dtype:  # autocast in the forward alone
            d, a = totals.number(d), totals.number(a)
        gradients = {}
        for role, gradient in (("weight", lambda: d.t() @ a), ("bias", lambda: d.sum(0))):
            if name := self._names.get(role):
                gradients[name] = gradient()
        totals.add(gradients)

    def _outer(self, d: Tensor, a: Tensor) -> None:
        """Add (d^2)^T (a^2), and the sum of d^2 for the bias."""
        if weight := self._names.get("weight"):
            self._totals.outer(self._totals.views[weight], d[:, None, :, None], a[:, None, :, None])
        if bias := self._names.get("bias"):
            self._totals.square(self._totals.views[bias], d)

    def _delta(self, logits: Tensor, loss_of: Any) -> Tensor:
        """Gradient of a loss by the logits [B, M]; refuses a loss that uses the layer's parameters in another way."""
        own = [p for p in self._layer.parameters(recurse=False) if p.requires_grad]
        z = logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = check_loss(loss_of(z), self._job.selected)
        d, *others = torch.autograd.grad(loss, [z, *own], allow_unused=True)
        if any(other is not None for other in others):
            raise NotAHead("the loss also depends directly on the layer's parameters")
        if d is None:
            raise EstimationError("the loss does not depend on the outputs")
        return d

    def result(self) -> Fisher:
        """The mean over batches (`batch`, `softened`, `label_free`) or samples."""
        return self._totals.fisher(dict.fromkeys(self._job.selected, HOW))


def _wholes(job: Job) -> dict[str, Tensor]:
    """Tensors of the shapes of the whole parameters, which this rank has parts of.

    Raises:
        NotAHead: it is not FSDP2 alone that has cut them up: then a forward meets parts.

    """
    cut = [p for p in job.selected.values() if is_dtensor(p)]
    if not sharding_modules([job.model]) or any(p.device_mesh.ndim > 1 for p in cut):  # type: ignore[attr-defined]
        raise NotAHead("the layer is cut up in its forward, too")
    return {
        name: torch.empty(p.shape, dtype=p.dtype, device=local_tensor(p).device) for name, p in job.selected.items()
    }


def _owner(job: Job) -> nn.Linear:
    """The linear layer that owns all the selected parameters and shares them with no other."""
    chosen = {id(p) for p in job.selected.values()}
    aliases = [name for name, p in Names(job.model).every.items() if id(p) in chosen]
    if len(aliases) > len(chosen):
        raise NotAHead("its parameters are shared")
    for module in job.model.modules():
        if chosen <= {id(p) for p in module.parameters(recurse=False)}:
            if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
                raise NotAHead(f"{type(module).__name__} is not an nn.Linear")
            assert isinstance(module, nn.Linear)
            own = {role: module._parameters.get(role) for role in ("weight", "bias")}
            if own["weight"] is None or not chosen <= {id(p) for p in own.values()}:
                raise NotAHead("its weight is computed from other parameters")  # pruning, weight_norm, spectral_norm
            return module
    raise NotAHead("the parameters are not those of one layer")
