"""Cases g and h: squared gradients summed over a ResNet-18's tensors, and Fishers merged.

Floor of accumulation, bytes a parameter: gradient in 4, sum in and out 8; zeroing writes the gradient, 4 more. With the
backward around it the time is what counts, next to that of the backward alone. Floor of a merge: 4 (K + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import fiun_fast as ff

from . import baselines
from .dampening import usable
from .measure import Case, Variant

Shapes = dict[str, tuple[int, ...]]
Step = Callable[[list[Tensor], list[Tensor]], None]  # gradients, totals
STEPS: dict[str, tuple[str, Step]] = {
    "naive": ("naive", baselines.accumulate_naive),
    "tidy": ("torch", baselines.accumulate_tidy),
    "foreach": ("torch", baselines.accumulate_foreach),
}
ULPS = 2  # sums may differ so far


class Parameters(nn.Module):
    """Parameters of given shapes and the gradients they will get; `loss().backward()` costs one copy of each."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        random = torch.Generator(device).manual_seed(0)
        self.arriving: list[Tensor] = []
        for name, shape in shapes.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.zeros(shape, device=device)))
            self.arriving.append(torch.randn(shape, device=device, generator=random))
        self.list = list(self.parameters())
        self.numel = sum(p.numel() for p in self.list)

    def loss(self) -> Tensor:
        """A scalar whose gradient by each parameter is what `arriving` holds."""
        return torch.stack([_Arrive.apply(p, g) for p, g in zip(self.list, self.arriving, strict=True)]).sum()

    def gradients(self) -> list[Tensor]:
        """What `.grad` holds."""
        return [p.grad for p in self.list if p.grad is not None]

    def refill(self) -> None:
        """Put the gradients into `.grad`, where it is there, or make it."""
        for p in self.list:
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
        torch._foreach_copy_(self.gradients(), self.arriving)

    def drop(self) -> None:
        """No gradients."""
        for p in self.list:
            p.grad = None

    def squares(self) -> list[Tensor]:
        """What every way must find, however often it ran: the mean of equal squares."""
        return [g * g for g in self.arriving]


class _Arrive(torch.autograd.Function):
    """Nothing forward; backward, a copy of a given gradient."""

    @staticmethod
    def forward(ctx, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.clone(), None


class Sums:
    """A baseline's accumulators, and how often they were added to."""

    def __init__(self, model: Parameters) -> None:
        self.model, self.steps = model, 0
        self.totals = [torch.zeros_like(p) for p in model.list]

    @torch.no_grad()
    def update(self, step: Step) -> None:
        """Add the gradients in `.grad`."""
        step(self.model.gradients(), self.totals)
        self.steps += 1

    def mean(self) -> Iterator[Tensor]:
        """Over all updates."""
        return (total / self.steps for total in self.totals)


def accumulate(name: str, title: str, shapes: Shapes, device: torch.device, zero: bool) -> Case:
    """Gradients lie ready in `.grad`; with `zero` they are zeroed as well, as `optimizer.zero_grad` does."""
    model = Parameters(shapes, device)
    model.refill()
    before = model.refill if zero else _nothing
    variants = []
    for label, (kind, step) in STEPS.items():
        sums = Sums(model)
        update = partial(sums.update, partial(_and_zero, step) if zero else step)
        variants.append(Variant(label, kind, update, before, sums.mean))
    for backend in usable(device):
        accumulator = ff.FisherAccumulator(model, backend=backend)
        ours = backend != "reference"
        variants.append(
            Variant(
                backend,
                "ours" if ours else backend,
                partial(accumulator.update, zero_grads=zero),
                before,
                partial(_results, [accumulator]),
                calls=int(ours),
                capturable=ours,
            )
        )
    return Case(name, title, (16 if zero else 12) * model.numel, model.numel, variants, model.squares, ulps=ULPS)


def in_hooks(name: str, title: str, shapes: Shapes, device: torch.device) -> Case:
    """A whole backward and the accumulation: afterwards over all gradients, or in hooks that free each at once."""
    model = Parameters(shapes, device)

    def after(update: Callable[[], object]) -> None:
        model.loss().backward()
        update()
        model.drop()

    variants = [Variant("backward alone", "floor", partial(after, _nothing), model.drop, None)]
    for label, (kind, step) in STEPS.items():
        sums = Sums(model)
        update = partial(sums.update, step)
        variants.append(Variant(f"{label}, after", kind, partial(after, update), model.drop, sums.mean))
    hooked = Sums(model)
    work = partial(_with_hooks, model, hooked.totals, _add_square, hooked)
    variants.append(Variant("tidy, in hooks", "torch", work, model.drop, hooked.mean))
    for backend in usable(device):
        if backend == "reference":
            continue
        whole = ff.FisherAccumulator(model, backend=backend)
        each = [ff.FisherAccumulator(model, params=[name], backend=backend) for name, _ in model.named_parameters()]
        work = partial(_with_hooks, model, each, _update, None)
        variants += [
            Variant(
                f"{backend}, after", "ours", partial(after, whole.update), model.drop, partial(_results, [whole]), 1
            ),
            Variant(f"{backend}, in hooks", "ours", work, model.drop, partial(_results, each), len(each)),
        ]
    return Case(name, title, None, model.numel, variants, model.squares, ulps=ULPS)


def merge(name: str, title: str, shapes: Shapes, device: torch.device, sources: int) -> Case:
    """K Fishers to one, by maximum, into new memory."""
    layout = ff.Layout(shapes)
    random = torch.Generator(device).manual_seed(0)
    fishers = [ff.Fisher(torch.rand(layout.numel, device=device, generator=random), layout) for _ in range(sources)]
    buffers = [f.buffer for f in fishers]
    lists = [list(f.as_dict().values()) for f in fishers]
    ways: list[tuple[str, str, Callable[[], Sequence[Tensor]]]] = [
        ("naive", "naive", partial(baselines.merge_clone, lists)),
        ("tidy", "torch", partial(baselines.merge_tidy, lists)),
        ("foreach", "torch", partial(baselines.merge_foreach, lists)),
        ("stack", "torch", lambda: [baselines.merge_stack(buffers)]),
    ]
    for backend in usable(device):
        kind = "reference" if backend == "reference" else "ours"
        ways.append((backend, kind, partial(_merged, fishers, backend)))
    variants = []
    for label, kind, way in ways:
        kept: list[Tensor] = []  # what the last run returned; dropped before the next
        variants.append(
            Variant(label, kind, partial(_keep, kept, way), kept.clear, partial(_flat, kept), int(kind == "ours"))
        )
    floor = 4 * (sources + 1) * layout.numel
    return Case(name, title, floor, layout.numel, variants, lambda: [baselines.merge_stack(buffers)])


def _merged(fishers: list[ff.Fisher], backend: str) -> list[Tensor]:
    return [ff.merge_fishers(fishers, backend=backend).buffer]


def _keep(kept: list[Tensor], way: Callable[[], Sequence[Tensor]]) -> None:
    kept[:] = way()


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.cat([t.reshape(-1) for t in tensors])]


def _results(accumulators: Iterable[ff.FisherAccumulator]) -> Iterator[Tensor]:
    """Parameter by parameter."""
    return (values for a in accumulators for values in a.result().as_dict().values())


def _and_zero(step: Step, gradients: list[Tensor], totals: list[Tensor]) -> None:
    """A step, and the gradients zeroed in the same style."""
    step(gradients, totals)
    if step is baselines.accumulate_foreach:
        torch._foreach_zero_(gradients)
    else:
        for gradient in gradients:
            gradient.zero_()


def _with_hooks(
    model: Parameters, targets: Sequence[object], add: Callable[[Tensor, object], None], sums: Sums | None
) -> None:
    """A backward that adds each gradient to its target as it arrives, and frees it; hooks disturb no other variant."""

    def fold(target: object, parameter: Tensor) -> None:
        add(parameter, target)
        parameter.grad = None

    hooks = [
        p.register_post_accumulate_grad_hook(partial(fold, target))
        for p, target in zip(model.list, targets, strict=True)
    ]
    model.loss().backward()
    if sums is not None:
        sums.steps += 1
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def _add_square(parameter: Tensor, total: object) -> None:
    assert isinstance(total, Tensor)
    assert parameter.grad is not None
    total.addcmul_(parameter.grad, parameter.grad)


def _update(parameter: Tensor, accumulator: object) -> None:
    assert isinstance(accumulator, ff.FisherAccumulator)
    accumulator.update()


def _nothing() -> None:
    """Do nothing."""
