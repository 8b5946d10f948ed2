"""Cases g, h and k: squared gradients summed over a ResNet-18's tensors, Fishers merged, Fishers of a network's data.

Floor of accumulation, bytes a parameter: gradient in 4, sum in and out 8; zeroing writes the gradient, 4 more. With the
backward around it the time is what counts, next to that of the backward alone. Floor of a merge: 4 (K + 1). Bytes do
not limit case k: its yardsticks are one ordinary forward and backward, and one forward, of the same two mini-batches.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

ULPS = 2  # sums may differ so far
BATCHES, CHUNK = 2, 8  # case k: mini-batches; samples at once in the chunked vmap
SCALED_ULPS = 1 << 10  # case k: of 1 + F / max F, differences of 1e-4 of a parameter's largest entry
FLIPS = 0.01  # of the entries: a ReLU or a maximum that met a tie within rounding lets another gradient through


class Parameters(nn.Module):
    """Parameters of given shapes and the gradients they will get."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        random = torch.Generator(device).manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(torch.zeros(shape, device=device)))
        self.list = list(self.parameters())
        self.arriving = [torch.randn(p.shape, device=device, generator=random) for p in self.list]
        self.numel = sum(p.numel() for p in self.list)

    def backward(self) -> None:
        """One that does nothing but bring the gradients: it copies each into `.grad`, and calls hooks."""
        torch.autograd.backward(self.list, self.arriving)

    def refill(self) -> None:
        """Begin anew with the gradients in `.grad`, at the same addresses."""
        self.zero_grad(set_to_none=False)
        self.backward()

    def squares(self) -> list[Tensor]:
        """What every way must find: the mean over updates with equal gradients."""
        return [g * g for g in self.arriving]

    def hooked(self, updates: Sequence[Callable[[], object]]) -> None:
        """Run a backward in which each gradient is added and freed as it arrives; no hooks remain afterwards."""

        def fold(update: Callable[[], object], parameter: Tensor) -> None:
            update()
            parameter.grad = None

        pairs = zip(self.list, updates, strict=True)
        hooks = [p.register_post_accumulate_grad_hook(partial(fold, update)) for p, update in pairs]
        self.backward()
        for hook in hooks:
            hook.remove()


class Sums:
    """A baseline's accumulators; emptied before each run."""

    def __init__(self, model: Parameters) -> None:
        self.model, self.totals = model, [torch.zeros_like(p) for p in model.list]

    @torch.no_grad()
    def update(self, add: Callable, zero: Callable = nothing, only: slice = slice(None)) -> None:
        """Add the gradients in `.grad`, and zero them."""
        gradients = [p.grad for p in self.model.list[only]]
        add(gradients, self.totals[only])
        zero(gradients)

    def variant(self, name: str, kind: str, run: Callable[[], object], before: Callable[[], object]) -> Variant:
        """A run that adds to the totals."""

        def restore() -> None:
            torch._foreach_zero_(self.totals)
            before()

        return Variant(name, kind, run, restore, lambda: self.totals)


def _results(accumulators: Iterable[ff.FisherAccumulator]) -> Iterator[Tensor]:
    """Parameter by parameter."""
    return (values for a in accumulators for values in a.result().as_dict().values())


def accumulate(device: torch.device, compiler: str | None, shapes: Shapes, zero: bool) -> Case:
    """Gradients lie ready in `.grad`; with `zero` they are zeroed as well, as `optimizer.zero_grad` does."""
    model = Parameters(shapes, device)
    model.refill()
    before = model.refill if zero else nothing
    variants = []
    for name, (kind, add, zero_all) in baselines.STEPS.items():
        sums = Sums(model)
        run = partial(sums.update, add, zero_all) if zero else partial(sums.update, add)
        variants.append(sums.variant(name, kind, run, before))
    for backend, kind in backends(device):
        accumulator, ours = ff.FisherAccumulator(model, backend=backend), kind == "ours"
        run, outcome = partial(accumulator.update, zero_grads=zero), partial(_results, [accumulator])
        variants.append(Variant(backend, kind, run, before, outcome, int(ours), ours))
    return Case((16 if zero else 12) * model.numel, model.numel, variants, model.squares, ULPS)


def in_hooks(device: torch.device, compiler: str | None, shapes: Shapes) -> Case:
    """A whole backward and the accumulation: afterwards over all gradients, or in hooks that free each at once."""
    model = Parameters(shapes, device)

    def after(update: Callable[[], object]) -> None:
        model.backward()
        update()
        model.zero_grad()

    variants = [Variant("backward alone", "floor", partial(after, nothing), model.zero_grad)]
    for name, (kind, add, _) in baselines.STEPS.items():
        sums = Sums(model)
        variants.append(
            sums.variant(f"{name}, after", kind, partial(after, partial(sums.update, add)), model.zero_grad)
        )
    sums, every = Sums(model), range(len(model.list))
    tidy = [partial(sums.update, baselines.accumulate_tidy, only=slice(i, i + 1)) for i in every]
    run = partial(model.hooked, tidy)
    variants.append(sums.variant("tidy, in hooks", "torch", run, model.zero_grad))
    for backend, kind in backends(device):
        if kind == "ours":
            whole = ff.FisherAccumulator(model, backend=backend)
            each = [ff.FisherAccumulator(model, params=[name], backend=backend) for name, _ in model.named_parameters()]
            ways = {
                "after": (partial(after, whole.update), [whole]),
                "in hooks": (partial(model.hooked, [a.update for a in each]), each),
            }
            variants += [
                Variant(f"{backend}, {name}", kind, run, model.zero_grad, partial(_results, using), len(using))
                for name, (run, using) in ways.items()
            ]
    return Case(None, model.numel, variants, model.squares, ULPS)


def merge(device: torch.device, compiler: str | None, shapes: Shapes, sources: int) -> Case:
    """K Fishers to one, by maximum, into new memory."""
    layout = ff.Layout(shapes)
    random = torch.Generator(device).manual_seed(0)
    fishers = [ff.Fisher(torch.rand(layout.numel, device=device, generator=random), layout) for _ in range(sources)]
    lists = [list(f.as_dict().values()) for f in fishers]

    def stack() -> list[Tensor]:
        return [torch.stack([f.buffer for f in fishers]).amax(0)]

    def ours(backend: BackendName) -> list[Tensor]:
        return [ff.merge_fishers(fishers, how="max", backend=backend).buffer]

    def variant(name: str, kind: str, way: Callable[[], list[Tensor]]) -> Variant:
        kept: list[Tensor] = []  # what the last run returned; dropped before the next

        def run() -> None:
            kept[:] = way()

        def outcome() -> list[Tensor]:
            return [torch.cat([t.reshape(-1) for t in kept])]

        return Variant(name, kind, run, kept.clear, outcome, int(kind == "ours"))

    variants = [variant(name, kind, partial(way.merge, lists)) for name, (kind, way) in baselines.WAYS.items()]
    variants.append(variant("stack", "torch", stack))
    if compiler is not None:
        torch._dynamo.reset()
        loop, buffers = (
            torch.compile(baselines.merge_flat, backend=compiler, dynamic=False),
            [f.buffer for f in fishers],
        )
        variants.append(variant("compiled, flat", "torch", lambda: [loop(buffers)]))
    variants += [variant(backend, kind, partial(ours, backend)) for backend, kind in backends(device)]
    return Case(4 * (sources + 1) * layout.numel, layout.numel, variants, stack)


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

    def __init__(self, device: torch.device, width: int, batch: int) -> None:
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

    def backward(self, x: Tensor, y: Tensor) -> None:
        """An ordinary step without its optimiser."""
        self.model.zero_grad()
        cross_entropy(self.model(x), y).backward()

    def each(self, step: Callable[..., object]) -> None:
        """A step for each mini-batch."""
        for x, y in self.batches:
            step(x, y)

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> None:
        """The least that a head's Fisher costs."""
        self.model(x)

    def sum(
        self, backward: Callable, squares: Callable, parameters: Mapping[str, Tensor], batches: list, count: int = 0
    ) -> None:
        """Sum what `squares` finds at each parameter after each batch, over the count, or over the samples."""
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for x, y in batches:
            backward(x, y)
            for name, t in total.items():
                t += squares(parameters[name])
        self.found = {name: t / (count or self.samples) for name, t in total.items()}

    def loop(self) -> None:
        """One backward a sample: existing code with batch size 1."""
        single = [(x[n : n + 1], y[n : n + 1]) for x, y in self.batches for n in range(len(x))]
        self.sum(self.backward, lambda p: p.grad.pow(2), self.parameters, single)

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
        """BackPACK's sum of squared gradients, with a model of its own: its hooks stay, and take nothing in place."""
        from backpack import backpack, extend, extensions  # type: ignore[import-not-found]

        model, loss = copy.deepcopy(self.model), extend(nn.CrossEntropyLoss(reduction="sum"))
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        extend(model)

        def backward(x: Tensor, y: Tensor) -> None:
            with backpack(extensions.SumGradSquared()):
                loss(model(x), y).backward()

        self.sum(backward, lambda p: p.sum_grad_squared, dict(model.named_parameters()), self.batches)

    def head_backward(self, freeze: bool) -> None:
        """Existing code for the last layer: a backward through the model, or with the body frozen."""
        body = [p for name, p in self.parameters.items() if name not in self.head] if freeze else []
        for p in body:
            p.requires_grad_(False)
        head = {name: self.parameters[name] for name in self.head}
        self.sum(self.backward, lambda p: p.grad.clone().pow(2), head, self.batches, BATCHES)
        for p in body:
            p.requires_grad_(True)

    def ours(self, estimator: Estimator, params: list[str] | None, backend: BackendName) -> None:
        """The public API, so that what a first batch is tried for is inside."""
        found = ff.estimate_fisher(self.model, self.batches, params=params, estimator=estimator, backend=backend)
        self.found = found.as_dict()

    def case(
        self, floor: tuple[str, Callable], ways: dict[str, tuple[str, Callable]], params: list[str] | None,
        estimator: Estimator, **more: Any,
    ) -> Case:  # fmt: skip
        """The ways, the plainest first, then ours by every backend, for one estimator."""
        _, plainest = next(iter(ways.values()))
        ours = {name: (kind, partial(self.ours, estimator, params, name)) for name, kind in backends(self.device)}
        variants = [Variant(floor[0], "floor", partial(self.each, floor[1]), self.restore)]
        variants += [
            Variant(name, kind, way, self.restore, self.outcome) for name, (kind, way) in (ways | ours).items()
        ]
        elements = sum(self.parameters[name].numel() for name in params or self.parameters)
        return Case(None, elements, variants, partial(self.expected, plainest), SCALED_ULPS, **more)


def sample(device: torch.device, compiler: str | None, width: int, batch: int) -> Case:
    """The whole network's true empirical Fisher."""
    work = Work(device, width, batch)
    there = importlib.util.find_spec("backpack") is not None
    ways: dict[str, tuple[str, Callable]] = {
        "a backward a sample": ("naive", work.loop),
        "vmap": ("torch", partial(work.vmap, batch)),
        f"vmap, chunks of {CHUNK}": ("torch", partial(work.vmap, CHUNK)),
        **({"BackPACK": ("torch", work.backpack)} if there else {}),
    }
    skipped = {} if there else {"BackPACK": "not installed"}
    return work.case(("forward + backward", work.backward), ways, None, "sample", flips=FLIPS, skipped=skipped)


def head(device: torch.device, compiler: str | None, width: int, batch: int) -> Case:
    """The last layer's Fisher of mini-batches, FIUn's default."""
    work = Work(device, width, batch)
    ways: dict[str, tuple[str, Callable]] = {
        "backward, all of it": ("naive", partial(work.head_backward, False)),
        "backward, body frozen": ("torch", partial(work.head_backward, True)),
    }
    return work.case(("forward", work.forward), ways, work.head, "batch")
