"""Cases g, h and k: squared gradients summed over a ResNet-18's tensors, Fishers merged, Fishers of a network's data.

Floor of accumulation, bytes a parameter: gradient in 4, sum in and out 8; zeroing writes the gradient, 4 more. With the
backward around it the time is what counts, next to that of the backward alone. Floor of a merge: 4 (K + 1). Bytes do
not limit case k: its yardsticks are one ordinary forward and backward, and one forward, of the same two mini-batches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import fiun_fast as ff
from fiun_fast.arguments import BackendName, Estimator

from . import baselines
from .dampening import Shapes, backends
from .measure import Case, Variant, nothing

Step = Callable[[list[Tensor], list[Tensor]], None]  # gradients, totals
STEPS: dict[str, tuple[str, Step]] = {
    "naive": ("naive", baselines.accumulate_naive),
    "tidy": ("torch", baselines.accumulate_tidy),
    "foreach": ("torch", baselines.accumulate_foreach),
}
ULPS = 2  # sums may differ so far
BATCHES, CHUNK = 2, 8  # case k: mini-batches; samples at once in the chunked vmap
SCALED_ULPS = 1 << 10  # case k: of 1 + F / max F, differences of 1e-4 of a parameter's largest entry
FLIPS = 0.01  # of the entries: a ReLU or a maximum that met a tie within rounding lets another gradient through


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
        """Copy the gradients into `.grad`, which is made where it is missing."""
        for p in self.list:
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
        torch._foreach_copy_(self.gradients(), self.arriving)

    def squares(self) -> list[Tensor]:
        """What every way must find, however often it ran: the mean of equal squares."""
        return [g * g for g in self.arriving]

    def hooked(self, adders: Sequence[Callable[[], object]]) -> None:
        """Run a backward in which each gradient is added and freed as it arrives; no hooks remain afterwards."""

        def fold(add: Callable[[], object], parameter: Tensor) -> None:
            add()
            parameter.grad = None

        pairs = zip(self.list, adders, strict=True)
        hooks = [p.register_post_accumulate_grad_hook(partial(fold, add)) for p, add in pairs]
        self.loss().backward()
        for hook in hooks:
            hook.remove()


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
    """A baseline's accumulators."""

    def __init__(self, model: Parameters) -> None:
        self.model, self.added = model, 0  # gradients added so far, those of all parameters together
        self.totals = [torch.zeros_like(p) for p in model.list]

    @torch.no_grad()
    def update(self, step: Step) -> None:
        """Add the gradients in `.grad`."""
        step(self.model.gradients(), self.totals)
        self.added += len(self.totals)

    @torch.no_grad()
    def add(self, p: nn.Parameter, total: Tensor) -> None:
        """Add the gradient of one parameter."""
        assert p.grad is not None
        total.addcmul_(p.grad, p.grad)
        self.added += 1

    def mean(self) -> Iterator[Tensor]:
        """Over all updates."""
        return (total / (self.added // len(self.totals)) for total in self.totals)


def accumulate(name: str, title: str, device: torch.device, shapes: Shapes, zero: bool) -> Case:
    """Gradients lie ready in `.grad`; with `zero` they are zeroed as well, as `optimizer.zero_grad` does."""
    model = Parameters(shapes, device)
    model.refill()
    before = model.refill if zero else nothing
    variants = []
    for label, (kind, step) in STEPS.items():
        sums = Sums(model)
        update = partial(sums.update, partial(_and_zero, step) if zero else step)
        variants.append(Variant(label, kind, update, before, sums.mean))
    for backend, kind in backends(device):
        accumulator, ours = ff.FisherAccumulator(model, backend=backend), kind == "ours"
        run, outcome = partial(accumulator.update, zero_grads=zero), partial(_results, [accumulator])
        variants.append(Variant(backend, kind, run, before, outcome, int(ours), ours))
    return Case(name, title, (16 if zero else 12) * model.numel, model.numel, variants, model.squares, ulps=ULPS)


def in_hooks(name: str, title: str, device: torch.device, shapes: Shapes) -> Case:
    """A whole backward and the accumulation: afterwards over all gradients, or in hooks that free each at once."""
    model = Parameters(shapes, device)

    def after(update: Callable[[], object]) -> None:
        model.loss().backward()
        update()
        model.zero_grad()

    def variant(label: str, kind: str, run: Callable, outcome: Callable | None, calls: int = 0) -> Variant:
        return Variant(label, kind, run, model.zero_grad, outcome, calls)

    variants = [variant("backward alone", "floor", partial(after, nothing), None)]
    for label, (kind, step) in STEPS.items():
        sums = Sums(model)
        variants.append(variant(f"{label}, after", kind, partial(after, partial(sums.update, step)), sums.mean))
    sums = Sums(model)
    adders = [partial(sums.add, p, total) for p, total in zip(model.list, sums.totals, strict=True)]
    variants.append(variant("tidy, in hooks", "torch", partial(model.hooked, adders), sums.mean))
    for backend, kind in backends(device):
        if kind == "ours":
            whole = ff.FisherAccumulator(model, backend=backend)
            each = [ff.FisherAccumulator(model, params=[name], backend=backend) for name, _ in model.named_parameters()]
            in_turn = partial(model.hooked, [a.update for a in each])
            variants += [
                variant(f"{backend}, after", kind, partial(after, whole.update), partial(_results, [whole]), 1),
                variant(f"{backend}, in hooks", kind, in_turn, partial(_results, each), len(each)),
            ]
    return Case(name, title, None, model.numel, variants, model.squares, ulps=ULPS)


def _and_zero(step: Step, gradients: list[Tensor], totals: list[Tensor]) -> None:
    """A step, and the gradients zeroed in the same style."""
    step(gradients, totals)
    if step is baselines.accumulate_foreach:
        torch._foreach_zero_(gradients)
    else:
        for gradient in gradients:
            gradient.zero_()


def _results(accumulators: Iterable[ff.FisherAccumulator]) -> Iterator[Tensor]:
    """Parameter by parameter."""
    return (values for a in accumulators for values in a.result().as_dict().values())


def merge(name: str, title: str, device: torch.device, shapes: Shapes, sources: int) -> Case:
    """K Fishers to one, by maximum, into new memory."""
    layout = ff.Layout(shapes)
    random = torch.Generator(device).manual_seed(0)
    fishers = [ff.Fisher(torch.rand(layout.numel, device=device, generator=random), layout) for _ in range(sources)]
    lists = [list(f.as_dict().values()) for f in fishers]

    def stack() -> list[Tensor]:
        return [torch.stack([f.buffer for f in fishers]).amax(0)]

    def ours(backend: BackendName) -> list[Tensor]:
        return [ff.merge_fishers(fishers, how="max", backend=backend).buffer]

    def variant(label: str, kind: str, way: Callable[[], list[Tensor]]) -> Variant:
        kept: list[Tensor] = []  # what the last run returned; dropped before the next

        def run() -> None:
            kept[:] = way()

        def outcome() -> list[Tensor]:
            return [torch.cat([t.reshape(-1) for t in kept])]

        return Variant(label, kind, run, kept.clear, outcome, int(kind == "ours"))

    variants = [variant(label, kind, partial(way.merge, lists)) for label, (kind, way) in baselines.WAYS.items()]
    variants.append(variant("stack", "torch", stack))
    variants += [variant(backend, kind, partial(ours, backend)) for backend, kind in backends(device)]
    return Case(name, title, 4 * (sources + 1) * layout.numel, layout.numel, variants, stack)


# ---- Case k: from data ----------------------------------------------------------------------------------------------


def convnet(width: int) -> nn.Module:
    """Six convolutions with BatchNorm, two linear layers; 2.4 million parameters at width 32, for 32 x 32 images."""
    w, channels = width, 3
    layers: list[nn.Module] = []
    for out, pooled in ((w, False), (2 * w, True), (4 * w, False), (4 * w, True), (8 * w, False), (8 * w, True)):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pooled else []
        channels = out
    hidden = 10 * w - 10
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * w, hidden), nn.ReLU(), nn.Linear(hidden, 10)).eval()


class Work:
    """A convolutional network, two mini-batches, and what the last run found, by parameter."""

    def __init__(self, width: int, batch: int, device: torch.device) -> None:
        self.device = device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = convnet(width).to(device)
            self.batches = [
                (torch.randn(batch, 3, 32, 32).to(device), torch.randint(10, (batch,)).to(device))
                for _ in range(BATCHES)
            ]
        self.samples = BATCHES * batch
        self.parameters = dict(self.model.named_parameters())
        self.head = ff.last_layer(self.model)
        self.found: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def restore(self) -> None:
        """No gradients, nothing found."""
        self.model.zero_grad()
        self.found = {}

    def outcome(self) -> list[Tensor]:
        """What was found, on a scale where an ulp is a fixed share of a parameter's largest entry."""
        return [1 + t / self._largest[name] for name, t in self.found.items()]

    def expected(self, way: Callable[[], None]) -> list[Tensor]:
        """From the plainest way."""
        way()
        self._largest = {name: t.max().clamp(min=1e-30) for name, t in self.found.items()}
        return self.outcome()

    def forward_backward(self) -> None:
        """An ordinary step without its optimiser."""
        for x, y in self.batches:
            self._backward(x, y)

    @torch.no_grad()
    def forward(self) -> None:
        """The least that a head's Fisher costs."""
        for x, _ in self.batches:
            self.model(x)

    def loop(self) -> None:
        """One backward a sample: existing code with batch size 1."""
        single = [(x[n : n + 1], y[n : n + 1]) for x, y in self.batches for n in range(len(x))]
        self._sum(self._backward, lambda p: p.grad.pow(2), self.parameters, single)

    def vmap(self, chunk: int) -> None:
        """torch.func's per-sample gradients, of `chunk` samples at once."""

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(self.model, parameters, (x[None],)), y[None])

        gradient = vmap(grad(loss), in_dims=(None, 0, 0))
        detached = {name: p.detach() for name, p in self.parameters.items()}
        total = {name: torch.zeros_like(p) for name, p in detached.items()}
        with torch.no_grad():
            for x, y in self.batches:
                for images, labels in zip(x.split(chunk), y.split(chunk), strict=True):
                    for name, g in gradient(detached, images, labels).items():
                        total[name] += g.pow(2).sum(0)
        self.found = {name: t / self.samples for name, t in total.items()}

    def backpack(self) -> None:
        """BackPACK's sum of squared gradients."""
        from backpack import backpack, extend, extensions  # type: ignore[import-not-found]

        model, loss = extend(self.model), extend(nn.CrossEntropyLoss(reduction="sum"))

        def backward(x: Tensor, y: Tensor) -> None:
            with backpack(extensions.SumGradSquared()):
                loss(model(x), y).backward()

        self._sum(backward, lambda p: p.sum_grad_squared, self.parameters, self.batches)

    def opacus(self) -> None:
        """Per-sample gradients of Opacus."""
        from opacus import GradSampleModule  # type: ignore[import-not-found]

        wrapped = GradSampleModule(self.model, strict=False, loss_reduction="sum")

        def backward(x: Tensor, y: Tensor) -> None:
            wrapped.zero_grad()
            cross_entropy(wrapped(x), y, reduction="sum").backward()

        self._sum(backward, lambda p: p.grad_sample.pow(2).sum(0), self.parameters, self.batches)
        wrapped.to_standard_module()

    def head_backward(self, freeze: bool) -> None:
        """Existing code for the last layer: a backward through the model, or with the body frozen."""
        body = [p for name, p in self.parameters.items() if name not in self.head] if freeze else []
        for p in body:
            p.requires_grad_(False)
        self._sum(self._backward, lambda p: p.grad.clone().pow(2), self.head, self.batches, BATCHES)
        for p in body:
            p.requires_grad_(True)

    def ours(self, estimator: Estimator, params: list[str] | None, backend: BackendName) -> None:
        """The public API, so that what a first batch is tried for is inside."""
        found = ff.estimate_fisher(self.model, self.batches, params=params, estimator=estimator, backend=backend)
        self.found = found.as_dict()

    def _backward(self, x: Tensor, y: Tensor) -> None:
        self.model.zero_grad()
        cross_entropy(self.model(x), y).backward()

    def _sum(
        self, backward: Callable, squares: Callable, names: Iterable[str], batches: list, count: int | None = None
    ) -> None:
        """Sum what `squares` finds at each parameter after each batch, over the count, or over the samples."""
        total = {name: torch.zeros_like(self.parameters[name]) for name in names}
        for x, y in batches:
            backward(x, y)
            for name, t in total.items():
                t += squares(self.parameters[name])
        self.found = {name: t / (count or self.samples) for name, t in total.items()}

    def case(
        self, name: str, title: str, floor: Variant, params: list[str] | None, estimator: Estimator, ways: list,
        **more: Any,
    ) -> Case:  # fmt: skip
        """The ways, the plainest first, then ours by every backend, for one estimator."""
        ways += [(b, kind, partial(self.ours, estimator, params, b)) for b, kind in backends(self.device)]
        variants = [Variant(label, kind, way, self.restore, self.outcome) for label, kind, way in ways]
        elements = sum(self.parameters[n].numel() for n in params or self.parameters)
        expected = partial(self.expected, ways[0][2])
        return Case(name, title, None, elements, [floor, *variants], expected, SCALED_ULPS, **more)


def sample(name: str, title: str, device: torch.device, width: int, batch: int) -> Case:
    """The whole network's true empirical Fisher."""
    work = Work(width, batch, device)
    ways = [
        ("a backward a sample", "naive", work.loop),
        ("vmap", "torch", partial(work.vmap, batch)),
        (f"vmap, chunks of {CHUNK}", "torch", partial(work.vmap, CHUNK)),
    ]
    others = {"BackPACK": work.backpack, "Opacus": work.opacus}
    missing = [label for label in others if importlib.util.find_spec(label.lower()) is None]
    ways += [(label, "torch", way) for label, way in others.items() if label not in missing]
    floor = Variant("forward + backward", "floor", work.forward_backward, work.restore, None)
    skipped = dict.fromkeys(missing, "not installed")
    return work.case(name, title, floor, None, "sample", ways, flips=FLIPS, skipped=skipped)


def head(name: str, title: str, device: torch.device, width: int, batch: int) -> Case:
    """The last layer's Fisher of mini-batches, FIUn's default."""
    work = Work(width, batch, device)
    ways = [
        ("backward, all of it", "naive", partial(work.head_backward, False)),
        ("backward, body frozen", "torch", partial(work.head_backward, True)),
    ]
    floor = Variant("forward", "floor", work.forward, work.restore, None)
    return work.case(name, title, floor, work.head, "batch", ways)
