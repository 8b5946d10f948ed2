"""Cases a to f and the scaling rows: networks of models whose Fishers are known, to be dampened.

Floor, in bytes a parameter and node (fp32): theta in and out 8, I 4, and each forget Fisher 4 once a group, 12 + 4K/N
in all. With few elements selected less is moved: only the lines of theta that hold one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fiun_fast as ff
from fiun_fast.arguments import BackendName

from . import baselines
from .baselines import Group
from .measure import Case, Kept, Variant

Shapes = dict[str, tuple[int, ...]]  # name of a parameter -> its shape

ALPHA, LAM = 10.0, 1.0
RUN = 512  # elements in a row that are selected together, where the selection is clustered
TIMED: dict[str, tuple[BackendName, ...]] = {  # backends worth a row, by device
    "cpu": ("reference", "cpu"),
    "cuda": ("reference", "triton", "cuda"),
}


def backends(device: torch.device) -> list[tuple[BackendName, str]]:
    """Backends that work on that device and are worth a row, and their kind; Triton's interpreter on a CPU is not."""
    works = ff.available_backends(device.type)
    return [(name, "reference" if name == "reference" else "ours") for name in TIMED[device.type] if name in works]


def resnet18(width: int = 64) -> Shapes:
    """Shapes of the parameters of `ResNet18`."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in ResNet18(width).named_parameters()}


def head(features: int, classes: int) -> Shapes:
    """Shapes of a last layer."""
    return {"fc.weight": (classes, features), "fc.bias": (classes,)}


class ResNet18(nn.Module):
    """The usual network, with 62 parameters; 11.2 million elements at width 64."""

    def __init__(self, width: int = 64, classes: int = 100) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        widths = [width << stage for stage in range(4)]
        for stage, (n_in, n) in enumerate(zip([width, *widths], widths, strict=False), start=1):
            self.add_module(f"layer{stage}", nn.Sequential(_Block(n_in, n), _Block(n, n)))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 3, h, w] -> logits [n, classes]."""
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; halves the image where the width changes."""

    def __init__(self, n_in: int, n: int) -> None:
        super().__init__()
        stride = 1 if n_in == n else 2
        self.conv1, self.bn1 = nn.Conv2d(n_in, n, 3, stride, 1, bias=False), nn.BatchNorm2d(n)
        self.conv2, self.bn2 = nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n)
        if stride == 2:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n, 1, stride, bias=False), nn.BatchNorm2d(n))

    def forward(self, x: Tensor) -> Tensor:
        """[n, c, h, w] -> the same or half the image."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class Network:
    """N models of one layout. The first K are origins of a request each; all others inherit from all of them.

    Parameters are tensors of their own, as in any model; Fishers are flat, and the baselines get views into them.

    Args:
        device: where all is.
        shapes: layout of each model.
        nodes, sources: N, K; with K = 1 all nodes are in one group.
        share: of the elements that are selected, at random.
        run: elements in a row that are selected together, as whole filters are in class forgetting.
        dtype: of the parameters; Fishers are fp32.

    """

    def __init__(
        self,
        device: torch.device,
        shapes: Shapes,
        nodes: int,
        sources: int,
        share: float = 0.5,
        run: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.layout = device, ff.Layout(shapes)
        size, random = self.layout.numel, torch.Generator(device).manual_seed(0)

        def uniform(count: int = size) -> Tensor:
            return torch.rand(count, device=device, generator=random)

        self.forgets = [ff.Fisher(uniform().add_(0.01).pow_(4), self.layout) for _ in range(sources)]
        everyone = tuple(range(sources))
        origins = [Group((k,), (k,)) for k in everyone] if sources > 1 else []
        self.groups = [*origins, Group(everyone, tuple(range(len(origins), nodes)))]
        self.pristine = torch.empty(nodes, size, dtype=dtype, device=device)  # [N, P]
        self.originals: list[ff.Fisher] = []
        self.selected = 0
        for group in self.groups:
            merged = baselines.merge_flat([self.forgets[k].buffer for k in group.sources])
            for n in group.nodes:
                chosen = (uniform(math.ceil(size / run)) < share).repeat_interleave(run)[:size]
                ratio = uniform()  # of I to m; the threshold is 1 / alpha
                ratio = torch.where(chosen, 0.09 * ratio, 0.11 + ratio)
                self.originals.append(ff.Fisher(ratio.mul_(merged), self.layout))
                self.pristine[n].copy_(torch.randn(size, device=device, generator=random))
                self.selected += int(chosen.sum())
        views = [self.layout.views(row) for row in self.pristine]
        models = [{name: view.clone() for name, view in named.items()} for named in views]
        self.kept = Kept([list(model.values()) for model in models], [list(named.values()) for named in views])
        self.dag = ff.InheritanceDAG()
        for n, (model, original) in enumerate(zip(models, self.originals, strict=True)):
            parents = [] if n < max(1, len(origins)) else [f"n{k}" for k in everyone]
            self.dag.add_model(f"n{n}", model, fisher=original, parents=parents)
        self.requests = [ff.ForgetRequest(f"n{k}", forget) for k, forget in enumerate(self.forgets)]

    def plan(self, backend: str | None = None) -> ff.Plan:
        """The plan over all nodes."""
        return ff.plan(self.dag, self.requests, alpha=ALPHA, lam=LAM, backend=backend)

    def expected(self) -> Iterator[Tensor]:
        """What the reference backend makes of them."""
        self.kept.restore()
        self.plan("reference").run_()
        return self.kept.outcome()

    def variants(self, compiler: str | None) -> Iterator[Variant]:
        """All ways to dampen the network; `compiler` None leaves torch.compile out."""
        originals = [list(fisher.as_dict().values()) for fisher in self.originals]
        forgets = [list(fisher.as_dict().values()) for fisher in self.forgets]
        lists = (self.kept.tensors, originals, forgets, self.groups)
        for name, (kind, way) in baselines.WAYS.items():
            unlearn = partial(baselines.unlearn, way, lists, ALPHA, LAM)
            yield Variant(name, kind, unlearn, self.kept.restore, self.kept.outcome)
        if compiler is not None:
            torch._dynamo.reset()
            for name, options in baselines.COMPILED.items():
                way = baselines.compiled(False, ALPHA, LAM, compiler, **options)
                yield _compiled(f"{name}, list", way, lists, self.kept)
                way = baselines.compiled(True, ALPHA, LAM, compiler, **options)
                yield from self._flat(name, way)
        for backend, kind in backends(self.device):
            ours = kind == "ours"  # one launch: all nodes are on one device and of one dtype
            plan = self.plan(backend)
            yield Variant(backend, kind, plan.run_, self.kept.restore, self.kept.outcome, int(ours), ours)

    def _flat(self, name: str, way: baselines.Way) -> Iterator[Variant]:
        """Compiled over flat buffers, model by model; and last layers stacked, one call a group.

        The models do not own their parameters then.
        """
        buffers = [fisher.buffer for fisher in self.originals]
        sources = [fisher.buffer for fisher in self.forgets]
        flat = self.pristine.clone()
        kept = Kept([[row] for row in flat], [[row] for row in self.pristine])
        yield _compiled(f"{name}, flat", way, (flat.unbind(), buffers, sources, self.groups), kept)
        if len(self.originals) > len(self.forgets) and len(self.layout) <= 2:
            stack, stacked = self.pristine.clone(), torch.stack(buffers)
            kept = Kept([[row] for row in stack], [[row] for row in self.pristine])
            rows = [slice(group.nodes[0], group.nodes[-1] + 1) for group in self.groups]
            groups = [Group(group.sources, (i,)) for i, group in enumerate(self.groups)]
            parts = [stack[row] for row in rows], [stacked[row] for row in rows]
            yield _compiled(f"{name}, stacked", way, (*parts, sources, groups), kept)


def _compiled(name: str, way: baselines.Way, network: tuple[Any, Any, Any, Sequence[Group]], kept: Kept) -> Variant:
    """One call a model, and one a merge."""
    calls = sum(len(group.nodes) + (len(group.sources) > 1) for group in network[3])
    run = partial(baselines.unlearn, way, network, ALPHA, LAM)
    return Variant(name, "torch", run, kept.restore, kept.outcome, calls, True)


def dampen(
    device: torch.device, compiler: str | None, *network: Any, only: Sequence[str] | None = None, **more: Any
) -> Case:
    """A `Network` as a case, with all variants or with `only` these kinds; its floor is what its plan says it moves."""
    made = Network(device, *network, **more)
    variants = [v for v in made.variants(None if only else compiler) if only is None or v.kind in only]
    floor, elements = made.plan("reference").traffic.total, made.pristine.numel()
    return Case(floor, elements, variants, made.expected, selected=made.selected / elements)
