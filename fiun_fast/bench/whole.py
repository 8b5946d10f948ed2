"""Cases i and j: compiling a plan for very many nodes, and everything from mini-batches to dampened models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

import fiun_fast as ff
from fiun_fast.arguments import BackendName

from . import baselines
from .baselines import Group
from .dampening import ALPHA, LAM, ResNet18, backends
from .measure import Case, Kept, Variant, nothing

Batch = tuple[Tensor, Tensor]


def compile_plan(device: torch.device, compiler: str | None, nodes: int) -> Case:
    """`ff.plan` for `nodes` linear layers, three requests; every further node has two parents. No bytes to speak of."""
    weights, biases = torch.ones(nodes, 10, 4, device=device), torch.ones(nodes, 10, device=device)
    models = [_Head(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    layout = ff.Layout.from_module(models[0])
    buffers = torch.ones(nodes + 3, layout.numel, device=device).unbind()
    dag = ff.InheritanceDAG()
    for n, model in enumerate(models):
        parents = [] if n < 3 else [f"n{n // 2}", f"n{n // 3}"]
        dag.add_model(f"n{n}", model, fisher=ff.Fisher(buffers[n], layout), parents=dict.fromkeys(parents))
    requests = [ff.ForgetRequest(f"n{k}", ff.Fisher(buffers[nodes + k], layout)) for k in range(min(3, nodes))]
    plan = ff.plan(dag, requests)
    variants = [
        Variant("plan", "ours", lambda: ff.plan(dag, requests), nothing),
        Variant("run_", "floor", lambda: plan.run_(dry_run=True), nothing, calls=1),
    ]
    return Case(None, nodes, variants)


class _Head(nn.Module):
    """A linear layer without the time that its initialisation takes."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


class End2End:
    """Forget Fishers at the origins, from mini-batches, and then every model dampened.

    Original Fishers are there already, as they are when a request comes. The naive way is that of existing code:
    gradients cleared, squared and added parameter by parameter, then the chain model by model. What no way of
    unlearning can save, forward and backward, is a row of its own.

    Args:
        models: name -> model, parents first.
        parents: name -> parents.
        batches: origin -> mini-batches of the data to be forgotten there.

    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        parents: Mapping[str, Sequence[str]],
        batches: Mapping[str, Sequence[Batch]],
    ) -> None:
        self.models, self.batches = {name: model.eval() for name, model in models.items()}, batches
        some = next(iter(batches))
        other = [(x.flip(0), y.roll(1)) for x, y in batches[some]]
        known = ff.estimate_fisher(self.models[some], other)
        self.originals = {
            name: ff.Fisher(known.buffer * (0.2 + 0.1 * i), known.layout) for i, name in enumerate(models)
        }
        self.dag = ff.InheritanceDAG()
        for name, model in self.models.items():
            self.dag.add_model(name, model, fisher=self.originals[name], parents=parents[name])
        reached = self.dag.reached_by([ff.ForgetRequest(origin, known) for origin in batches])
        names = list(self.models)
        sets = dict.fromkeys(reached.values())
        self.groups = [Group(s, tuple(names.index(n) for n, found in reached.items() if found == s)) for s in sets]
        self.kept = Kept([[p.detach() for p in model.parameters()] for model in self.models.values()])

    def gradients(self, origin: str) -> Iterator[list[Tensor]]:
        """Of one mini-batch after another."""
        model = self.models[origin]
        for inputs, targets in self.batches[origin]:
            model.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            yield [p.grad.data for p in model.parameters() if p.grad is not None]

    def passes(self) -> None:
        """Forward and backward of all mini-batches and nothing else."""
        for origin in self.batches:
            for _ in self.gradients(origin):
                pass

    def naive(self) -> None:
        """As existing code does it."""
        forgets = []
        for origin, batches in self.batches.items():
            totals = [torch.zeros_like(p) for p in self.models[origin].parameters()]
            for gradients in self.gradients(origin):
                baselines.accumulate_naive(gradients, totals)
            forgets.append([total.div_(len(batches)) for total in totals])
        originals = [list(fisher.as_dict().values()) for fisher in self.originals.values()]
        _, way = baselines.WAYS["naive"]
        baselines.unlearn(way, (self.kept.tensors, originals, forgets, self.groups), ALPHA, LAM)

    def ours(self, backend: BackendName) -> None:
        """With this package."""
        requests = [
            ff.ForgetRequest(origin, ff.estimate_fisher(self.models[origin], batches, backend=backend))
            for origin, batches in self.batches.items()
        ]
        ff.plan(self.dag, requests, alpha=ALPHA, lam=LAM, backend=backend).run_()

    def expected(self) -> Iterator[Tensor]:
        """From the reference backend."""
        self.kept.restore()
        self.ours("reference")
        return self.kept.outcome()

    def case(self) -> Case:
        """Two runs of a backward need not agree in the last bit, and a threshold turns that into a flip: few may."""
        some = self.kept.tensors[0][0]
        ways: dict[str, tuple[str, Callable[[], None]]] = {"naive": ("naive", self.naive)}
        ways |= {b: (kind, partial(self.ours, b)) for b, kind in backends(some.device) if kind == "ours"}
        variants = [Variant("forward and backward alone", "floor", self.passes, nothing)]
        variants += [Variant(name, *way, self.kept.restore, self.kept.outcome) for name, way in ways.items()]
        elements = sum(t.numel() for tensors in self.kept.tensors for t in tensors)
        return Case(None, elements, variants, self.expected, ulps=16, flips=1e-3)


def demo(device: torch.device, compiler: str | None, batch: int) -> Case:
    """The demo's federated network: 13 models, two clients ask. The data are noise; that changes no time."""
    from ..demo.data import fresh

    models: dict[str, nn.Module] = {"server": fresh(0).to(device)}
    parents: dict[str, list[str]] = {"server": []}
    above = "server"
    for r in range(1, 4):
        clients = [f"{letter}{r}" for letter in "ABC"]
        for client in clients:
            models[client], parents[client] = copy.deepcopy(models[above]), [above]
        above = f"avg{r}"
        models[above], parents[above] = copy.deepcopy(models["server"]), clients
    random = torch.Generator().manual_seed(0)
    batches = {origin: _noise((batch, 1, 8, 8), 10, random, device) for origin in ("A1", "B1")}
    return End2End(models, parents, batches).case()


def resnets(device: torch.device, compiler: str | None, nodes: int, width: int, batch: int) -> Case:
    """ResNet-18s on 32 x 32 images: two clients, then models that inherit from both; four mini-batches each."""
    first = ResNet18(width).to(device)
    models = {f"n{i}": first if i == 0 else copy.deepcopy(first) for i in range(nodes)}
    parents = {name: [] if i < 2 else ["n0", "n1"] for i, name in enumerate(models)}
    random = torch.Generator().manual_seed(0)
    batches = {origin: _noise((batch, 3, 32, 32), 100, random, device) for origin in ("n0", "n1")}
    return End2End(models, parents, batches).case()


def _noise(shape: tuple[int, ...], classes: int, random: torch.Generator, device: torch.device) -> list[Batch]:
    """Four mini-batches of images of that shape, and labels."""
    images = [torch.randn(shape, generator=random).to(device) for _ in range(4)]
    return [(x, torch.randint(classes, shape[:1], generator=random).to(device)) for x in images]
