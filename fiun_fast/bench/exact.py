"""Case k: the true empirical Fisher of a convolutional network, and the Fisher of its head alone.

Yardsticks are one ordinary forward and backward, and one forward: bytes do not limit this work. The network has 2.4
million parameters; two mini-batches of 32 x 32 images go through it. Ours is timed through the public API, so that
what a first batch is tried for is inside.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import fiun_fast as ff

from .dampening import usable
from .measure import Case, Variant

BATCHES = 2
CHUNK = 8  # samples of the chunked vmap
ULPS = 1 << 10  # of 1 + F / max F: differences of 1e-4 of a parameter's largest entry
FLIPS = 0.01  # of the entries: a ReLU or a maximum that met a tie within rounding lets another gradient through
OTHERS = {"BackPACK": "backpack", "Opacus": "opacus"}


def convnet(width: int = 32) -> nn.Module:
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
    """The model, its batches, and what the last run found, by parameter."""

    def __init__(self, width: int, batch: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = convnet(width).to(device)
            self.batches = [
                (torch.randn(batch, 3, 32, 32).to(device), torch.randint(10, (batch,)).to(device))
                for _ in range(BATCHES)
            ]
        self.parameters = dict(self.model.named_parameters())
        self.head = ff.last_layer(self.model)
        self.found: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def restore(self) -> None:
        """No gradients, nothing found."""
        self.model.zero_grad(set_to_none=True)
        self.found = {}

    def outcome(self) -> Iterable[Tensor]:
        """What was found, on a scale where an ulp is a fixed share of a parameter's largest entry."""
        return [1 + t / self._largest[name] for name, t in self.found.items()]

    def expected(self) -> Iterable[Tensor]:
        """From the loop over samples."""
        self.loop()
        self._largest = {name: t.max().clamp(min=1e-30) for name, t in self.found.items()}
        return list(self.outcome())

    def forward_backward(self) -> None:
        """An ordinary step without its optimiser."""
        for x, y in self.batches:
            self.model.zero_grad(set_to_none=True)
            cross_entropy(self.model(x), y).backward()

    @torch.no_grad()
    def forward(self) -> None:
        """The least that a head's Fisher costs."""
        for x, _ in self.batches:
            self.model(x)

    def loop(self) -> None:
        """One backward a sample: existing code with batch size 1."""
        total = self._zeros()
        for x, y in self.batches:
            for n in range(len(x)):
                self.model.zero_grad(set_to_none=True)
                cross_entropy(self.model(x[n : n + 1]), y[n : n + 1]).backward()
                self._add(total, lambda p: p.grad.pow(2))
        self._keep(total)

    def vmap(self, chunk: int | None) -> None:
        """torch.func's per-sample gradients."""

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(self.model, parameters, (x[None],)), y[None])

        gradient = vmap(grad(loss), in_dims=(None, 0, 0))
        detached = {name: p.detach() for name, p in self.parameters.items()}
        total = self._zeros()
        with torch.no_grad():
            for x, y in self.batches:
                step = chunk or len(x)
                for at in range(0, len(x), step):
                    for name, g in gradient(detached, x[at : at + step], y[at : at + step]).items():
                        total[name] += g.pow(2).sum(0)
        self._keep(total)

    def backpack(self) -> None:
        """BackPACK's sum of squared gradients."""
        from backpack import backpack, extend, extensions  # type: ignore[import-not-found]

        model, loss = extend(self.model), extend(nn.CrossEntropyLoss(reduction="sum"))
        total = self._zeros()
        for x, y in self.batches:
            with backpack(extensions.SumGradSquared()):
                loss(model(x), y).backward()
            self._add(total, lambda p: p.sum_grad_squared)
        self._keep(total)

    def opacus(self) -> None:
        """Per-sample gradients of Opacus."""
        from opacus import GradSampleModule  # type: ignore[import-not-found]

        wrapped = GradSampleModule(self.model, strict=False, loss_reduction="sum")
        total = self._zeros()
        for x, y in self.batches:
            wrapped.zero_grad()
            cross_entropy(wrapped(x), y, reduction="sum").backward()
            self._add(total, lambda p: p.grad_sample.pow(2).sum(0))
        wrapped.to_standard_module()
        self._keep(total)

    def ours(self, estimator: str, params: list[str] | None, backend: str) -> None:
        """The public API."""
        self.found = ff.estimate_fisher(self.model, self.batches, params, estimator, backend=backend).as_dict()

    def head_backward(self, freeze: bool) -> None:
        """Existing code for the last layer: a backward through the model, or with the body frozen."""
        body = [p for name, p in self.parameters.items() if name not in self.head] if freeze else []
        for p in body:
            p.requires_grad_(False)
        total = {name: torch.zeros_like(self.parameters[name]) for name in self.head}
        for x, y in self.batches:
            self.model.zero_grad(set_to_none=True)
            cross_entropy(self.model(x), y).backward()
            self._add(total, lambda p: p.grad.clone().pow(2))
        self.found = {name: t / BATCHES for name, t in total.items()}
        for p in body:
            p.requires_grad_(True)

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def _add(self, total: dict[str, Tensor], squares: Callable) -> None:
        for name, t in total.items():
            t += squares(self.parameters[name])

    def _keep(self, total: dict[str, Tensor]) -> None:
        samples = sum(len(y) for _, y in self.batches)
        self.found = {name: t / samples for name, t in total.items()}


def sample(name: str, title: str, device: torch.device, width: int, batch: int) -> Case:
    """The whole network's true empirical Fisher."""
    work = Work(width, batch, device)
    ways: list[tuple[str, str, Callable[[], None]]] = [
        ("a backward a sample", "naive", work.loop),
        ("vmap", "torch", partial(work.vmap, None)),
        (f"vmap, chunks of {CHUNK}", "torch", partial(work.vmap, CHUNK)),
    ]
    others = {label: importlib.util.find_spec(module) is not None for label, module in OTHERS.items()}
    ways += [(label, "torch", getattr(work, OTHERS[label])) for label, here in others.items() if here]
    for backend in usable(device):
        kind = "reference" if backend == "reference" else "ours"
        ways.append((backend, kind, partial(work.ours, "sample", None, backend)))
    variants = [Variant("forward + backward", "floor", work.forward_backward, work.restore, None)]
    variants += [Variant(label, kind, way, work.restore, work.outcome) for label, kind, way in ways]
    elements = sum(p.numel() for p in work.parameters.values())
    skipped = {label: "not installed" for label, here in others.items() if not here}
    return Case(name, title, None, elements, variants, work.expected, ULPS, flips=FLIPS, skipped=skipped)


def head(name: str, title: str, device: torch.device, width: int, batch: int) -> Case:
    """The last layer's Fisher of mini-batches, FIUn's default."""
    work = Work(width, batch, device)

    def expected() -> Iterable[Tensor]:
        work.head_backward(freeze=False)
        work._largest = {name: t.max() for name, t in work.found.items()}
        return list(work.outcome())

    ways: list[tuple[str, str, Callable[[], None]]] = [
        ("backward, all of it", "naive", partial(work.head_backward, False)),
        ("backward, body frozen", "torch", partial(work.head_backward, True)),
    ]
    for backend in usable(device):
        kind = "reference" if backend == "reference" else "ours"
        ways.append((backend, kind, partial(work.ours, "batch", work.head, backend)))
    variants = [Variant("forward", "floor", work.forward, work.restore, None)]
    variants += [Variant(label, kind, way, work.restore, work.outcome) for label, kind, way in ways]
    elements = sum(work.parameters[name].numel() for name in work.head)
    return Case(name, title, None, elements, variants, expected, ulps=ULPS)
