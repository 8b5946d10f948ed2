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
from .measure import Case, Variant

Shapes = dict[str, tuple[int, ...]]  # name of a parameter -> its shape

ALPHA, LAM = 10.0, 1.0
RUN = 512  # elements in a row that are selected together, where the selection is clustered
TIMED: dict[str, tuple[BackendName, ...]] = {  # backends worth a row, by device
    "cpu": ("reference", "cpu"),
    "cuda": ("reference", "triton", "cuda"),
}


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
        shapes: layout of each model.
        nodes, sources: N, K; with K = 1 all nodes are in one group.
        pattern: which elements are selected: "all", "half" of them at random, one in a hundred "scattered", or one in
            a hundred "clustered" in runs of 512, as whole filters are in class forgetting.
        dtype: of the parameters; Fishers are fp32.

    """

    def __init__(
        self,
        shapes: Shapes,
        nodes: int,
        sources: int,
        pattern: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device, self.layout = device, ff.Layout(shapes)
        size = self.layout.numel
        random = torch.Generator(device).manual_seed(0)
        self.forgets = [
            ff.Fisher(torch.rand(size, device=device, generator=random).add_(0.01).pow_(4), self.layout)
            for _ in range(sources)
        ]
        everyone = tuple(range(sources))
        origins = [Group((k,), (k,)) for k in everyone] if sources > 1 else []
        self.groups = [*origins, Group(everyone, tuple(range(len(origins), nodes)))]
        self.pristine = torch.empty(nodes, size, dtype=dtype, device=device)  # [N, P]
        self.originals: list[ff.Fisher] = []
        self.selected = 0
        for group in self.groups:
            merged = baselines.merge_flat([self.forgets[k].buffer for k in group.sources])
            for n in group.nodes:
                chosen = _pattern(pattern, size, device, random)
                ratio = torch.rand(size, device=device, generator=random)  # of I to m; the threshold is 1 / alpha
                ratio = torch.where(chosen, 0.09 * ratio, 0.11 + ratio)
                self.originals.append(ff.Fisher(ratio.mul_(merged), self.layout))
                self.pristine[n].copy_(torch.randn(size, device=device, generator=random))
                self.selected += int(chosen.sum())
        self.thetas = [self.layout.views(row) for row in self.pristine]
        self.models = [{name: view.clone() for name, view in views.items()} for views in self.thetas]
        self.lists = [list(model.values()) for model in self.models]
        self._all = [t for tensors in self.lists for t in tensors]
        self._all_pristine = [t for views in self.thetas for t in views.values()]
        self.dag = ff.InheritanceDAG()
        for n, (model, original) in enumerate(zip(self.models, self.originals, strict=True)):
            parents = [] if n < max(1, len(origins)) else [f"n{k}" for k in everyone]
            self.dag.add_model(f"n{n}", model, fisher=original, parents=parents)
        self.requests = [ff.ForgetRequest(f"n{k}", forget) for k, forget in enumerate(self.forgets)]

    def plan(self, backend: str | None = None) -> ff.Plan:
        """The plan over all nodes."""
        return ff.plan(self.dag, self.requests, alpha=ALPHA, lam=LAM, backend=backend)

    def restore(self) -> None:
        """Put all parameters back."""
        torch._foreach_copy_(self._all, self._all_pristine)

    def outcome(self) -> Iterator[Tensor]:
        """Parameters, flat, model by model."""
        for tensors in self.lists:
            yield torch.cat([t.reshape(-1) for t in tensors])

    def expected(self) -> Iterator[Tensor]:
        """What the reference backend makes of them."""
        self.restore()
        self.plan("reference").run_()
        return self.outcome()

    def variants(self, only: Sequence[str] | None = None, compiler: str | None = "inductor") -> list[Variant]:
        """All ways to dampen the network; `compiler` None leaves torch.compile out."""
        originals = [list(fisher.as_dict().values()) for fisher in self.originals]
        forgets = [list(fisher.as_dict().values()) for fisher in self.forgets]
        lists = (self.lists, originals, forgets, self.groups)
        variants = [
            Variant(name, kind, partial(baselines.unlearn, way, lists, ALPHA, LAM), self.restore, self.outcome)
            for name, (kind, way) in baselines.WAYS.items()
        ]
        if compiler is not None:
            torch._dynamo.reset()
            way = baselines.compiled(False, ALPHA, LAM, compiler)
            run, calls = partial(baselines.unlearn, way, lists, ALPHA, LAM), baselines.compiled_calls(self.groups)
            flat, *stacked = self._flat(baselines.compiled(True, ALPHA, LAM, compiler))
            listed = Variant("compiled, list", "torch", run, self.restore, self.outcome, calls, True)
            variants += [flat, listed, *stacked]
        for backend, kind in backends(self.device):
            ours = kind == "ours"  # one launch: all nodes are on one device and of one dtype
            plan = self.plan(backend)
            variants.append(Variant(backend, kind, plan.run_, self.restore, self.outcome, int(ours), ours))
        return [v for v in variants if only is None or v.name in only or v.kind in only]

    def _flat(self, way: baselines.Way) -> Iterator[Variant]:
        """Compiled over flat buffers, model by model; and last layers stacked, one call a group.

        The models do not own their parameters then.
        """
        buffers = [fisher.buffer for fisher in self.originals]
        sources = [fisher.buffer for fisher in self.forgets]

        def variant(name: str, copy: Tensor, *network: Any) -> Variant:
            run = partial(baselines.unlearn, way, network, ALPHA, LAM)
            calls = baselines.compiled_calls(network[-1])
            return Variant(name, "torch", run, lambda: copy.copy_(self.pristine), lambda: copy.unbind(), calls, True)

        flat = self.pristine.clone()
        yield variant("compiled, flat", flat, flat.unbind(), buffers, sources, self.groups)
        if len(self.lists) > len(self.forgets) and len(self.layout) <= 2:
            stack, stacked = self.pristine.clone(), torch.stack(buffers)
            rows = [slice(group.nodes[0], group.nodes[-1] + 1) for group in self.groups]
            groups = [Group(group.sources, (i,)) for i, group in enumerate(self.groups)]
            parts = [stack[row] for row in rows], [stacked[row] for row in rows]
            yield variant("compiled, stacked", stack, *parts, sources, groups)

    def case(self, name: str, title: str, only: Sequence[str] | None = None, compiler: str | None = "inductor") -> Case:
        """The network as a case; its floor is what its plan says it moves."""
        floor, elements = self.plan("reference").traffic.total, self.pristine.numel()
        variants, share = self.variants(only, compiler), self.selected / elements
        return Case(name, title, floor, elements, variants, self.expected, selected=share)


def backends(device: torch.device) -> list[tuple[BackendName, str]]:
    """Backends that work on that device and are worth a row, and their kind; Triton's interpreter on a CPU is not."""
    works = ff.available_backends(device.type)
    return [(name, "reference" if name == "reference" else "ours") for name in TIMED[device.type] if name in works]


def _pattern(pattern: str, size: int, device: torch.device, random: torch.Generator) -> Tensor:
    """Which elements are selected: [size] bool."""
    if pattern == "all":
        return torch.ones(size, dtype=torch.bool, device=device)
    if pattern == "half":
        return torch.rand(size, device=device, generator=random) < 0.5
    if pattern == "scattered":
        return torch.rand(size, device=device, generator=random) < 0.01
    runs = torch.rand(math.ceil(size / RUN), device=device, generator=random) < 0.01
    return runs.repeat_interleave(RUN)[:size]
