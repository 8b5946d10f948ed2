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
from .measure import Case, Kept, Machine, Variant, level_2_cache, on_threads

Shapes = dict[str, tuple[int, ...]]  # name of a parameter -> its shape

ALPHA, LAM = 10.0, 1.0
LINE = 64  # bytes of a line of the cache
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
    return {"weight": (classes, features), "bias": (classes,)}


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
    """N models of one layout. K requests arise at the first and reach all: everyone has K sources.

    Parameters are tensors of their own, as in any model; Fishers are flat, and the baselines get views into them.

    Args:
        device: where all is.
        shapes: layout of each model.
        nodes, sources: N, K.
        share: of the elements that are selected, at random.
        run: elements in a row that are selected together, as whole filters are in class forgetting.
        dtype: of the parameters; Fishers are fp32.
        stacked: `ff.stack_` has put the models into one storage.

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
        stacked: bool = False,
    ) -> None:
        self.device, self.layout = device, ff.Layout(shapes)
        size, random = self.layout.numel, torch.Generator(device).manual_seed(0)

        def uniform(count: int = size) -> Tensor:
            return torch.rand(count, device=device, generator=random)

        self.forgets = [ff.Fisher(uniform().add_(0.01).pow_(4), self.layout) for _ in range(sources)]
        merged = baselines.merge_flat([forget.buffer for forget in self.forgets])
        self.pristine = torch.empty(nodes, size, dtype=dtype, device=device)  # [N, P]
        self.originals: list[ff.Fisher] = []
        self.selected, self.untouched = 0, 0  # elements; those in lines of theta that hold no selected one
        line = LINE // dtype.itemsize
        for row in self.pristine:
            chosen = (uniform(math.ceil(size / run)) < share).repeat_interleave(run)[:size]
            ratio = uniform()  # of I to m; the threshold is 1 / alpha
            ratio = torch.where(chosen, 0.09 * ratio, 0.11 + ratio)
            self.originals.append(ff.Fisher(ratio.mul_(merged), self.layout))
            row.copy_(torch.randn(size, device=device, generator=random))
            self.selected += int(chosen.sum())
            lines = chosen[: size // line * line].view(-1, line)
            self.untouched += line * int((~lines.any(1)).sum())
        views = [self.layout.views(row) for row in self.pristine]
        models: list[Any] = [{name: view.clone() for name, view in named.items()} for named in views]
        if stacked:
            models = [nn.ParameterDict(list(model.items())) for model in models]
            ff.stack_(models)
        thetas = [[p.detach() for p in model.values()] for model in models]
        self.kept = Kept(thetas, [list(named.values()) for named in views])
        self.dag = ff.InheritanceDAG()
        for n, (model, original) in enumerate(zip(models, self.originals, strict=True)):
            self.dag.add_model(f"n{n}", model, fisher=original, parents=["n0"] if n else [])
        self.requests = [ff.ForgetRequest("n0", forget) for forget in self.forgets]

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
        sources, nodes = tuple(range(len(self.forgets))), len(self.originals)
        originals = [list(fisher.as_dict().values()) for fisher in self.originals]
        forgets = [list(fisher.as_dict().values()) for fisher in self.forgets]
        lists = (self.kept.tensors, originals, forgets, [Group(sources, tuple(range(nodes)))])
        for name, (kind, way) in baselines.WAYS.items():
            unlearn = partial(baselines.unlearn, way, lists, ALPHA, LAM)
            yield Variant(name, kind, unlearn, self.kept.restore, self.kept.outcome)
        if compiler is not None:
            torch._dynamo.reset()
            stack, buffers = self.pristine.clone(), [fisher.buffer for fisher in self.originals]
            flat = (stack.unbind(), buffers, [fisher.buffer for fisher in self.forgets], lists[3])
            stacked = ([stack], [torch.stack(buffers) if nodes > 1 else buffers[0]], flat[2], [Group(sources, (0,))])
            apart = Kept([[row] for row in stack], [[row] for row in self.pristine])
            for name, (one, whole, _) in baselines.COMPILED.items():
                if (one and nodes == 1) or (whole and not one and nodes > baselines.MANY):
                    continue
                network: baselines.Network = stacked if one else flat
                calls = 1 if whole else len(network[3][0].nodes) + (len(sources) > 1)
                run = partial(baselines.compiled(name, ALPHA, LAM, compiler), network)
                yield Variant(name, "torch", run, apart.restore, apart.outcome, calls, True)
        for backend, kind in backends(self.device):
            ours = kind == "ours"  # one launch: all nodes are on one device and of one dtype
            plan = self.plan(backend)
            yield Variant(backend, kind, plan.run_, self.kept.restore, self.kept.outcome, int(ours), ours)


def dampen(
    device: torch.device,
    compiler: str | None,
    *network: Any,
    only: Sequence[str] | None = None,
    threads: int | None = None,
    **more: Any,
) -> Case:
    """A `Network` as a case, with all variants or with `only` these kinds; its floor is what its plan says it moves."""
    made = Network(device, *network, **more)
    variants = [v for v in made.variants(None if only else compiler) if only is None or v.kind in only]
    floor, elements = made.plan("reference").traffic.total, made.pristine.numel()
    moved = floor - 2 * made.untouched * made.pristine.element_size()
    case = Case(floor, elements, variants, made.expected, selected=made.selected / elements, threads=threads)
    if only is None and device.type == "cpu":
        case.moved, case.limits = moved, partial(limits, device, *network, **more)
    return case


def limits(device: torch.device, shapes: Shapes, nodes: int, sources: int, *how: Any, **more: Any) -> dict[str, float]:
    """Milliseconds that parts of a case's work take by themselves, measured with smaller networks.

    Host: `run_` over as many models and parameters, of one element each. Instructions: the work with all of it in the
    level-2 cache of one core, less its host time; that an element, for all elements, over the threads.
    """

    def least(shapes: Shapes, nodes: int) -> tuple[float, int]:
        """Seconds of the fastest run, and elements."""
        network = Network(device, shapes, nodes, sources, *how, **more)
        plan, machine, times = network.plan(), Machine(device, small=True), []
        for _ in range(max(20, 500 // nodes)):
            network.kept.restore()
            times.append(machine.seconds(plan.run_))
        return min(times), network.pristine.numel()

    threads, few = torch.get_num_threads(), min(nodes, 16)
    fits = level_2_cache() // (2 * few * (4 + more.get("dtype", torch.float32).itemsize) + 8 * sources)  # half of it
    host, _ = least(dict.fromkeys(shapes, (1,)), nodes)
    with on_threads(1):
        (most, many), (some, less) = (least({"weight": (n,)}, few) for n in (fits, 1))
    elements = nodes * ff.Layout(shapes).numel
    return {"instructions": 1e3 * (most - some) / (many - less) * elements / threads, "host": 1e3 * host}
