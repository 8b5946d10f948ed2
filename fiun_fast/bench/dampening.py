"""Cases a to f: networks of models whose Fishers are known, to be dampened; and the scaling rows.

Floor, in bytes a parameter and node (fp32): theta in and out 8, I 4, and each forget Fisher 4 once a group, 12 + 4K/N
in all. With few elements selected less is moved: only the lines of theta that hold one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import fiun_fast as ff

from . import baselines
from .baselines import Group
from .measure import Case, Variant

ALPHA, LAM = 10.0, 1.0
RUN = 512  # elements in a row that are selected together, where the selection is clustered
TIMED = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda")}  # backends worth a row, by device


def resnet18(width: int = 64, classes: int = 100) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ResNet-18's 62 parameters; 11.2 million at width 64."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (width, 3, 7, 7)}
    shapes |= {"bn1.weight": (width,), "bn1.bias": (width,)}
    n_in = width
    for stage in range(4):
        n = width << stage
        for block in range(2):
            at = f"layer{stage + 1}.{block}"
            for i, m in enumerate((n_in, n), start=1):
                shapes |= {f"{at}.conv{i}.weight": (n, m, 3, 3), f"{at}.bn{i}.weight": (n,), f"{at}.bn{i}.bias": (n,)}
            if n_in != n:
                shapes |= {f"{at}.downsample.0.weight": (n, n_in, 1, 1)}
                shapes |= {f"{at}.downsample.1.weight": (n,), f"{at}.downsample.1.bias": (n,)}
            n_in = n
    return shapes | {"fc.weight": (classes, n_in), "fc.bias": (classes,)}


def head(features: int, classes: int) -> dict[str, tuple[int, ...]]:
    """A last layer."""
    return {"fc.weight": (classes, features), "fc.bias": (classes,)}


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
        shapes: dict[str, tuple[int, ...]],
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
        chain = (self.lists, originals, forgets, self.groups, ALPHA, LAM)
        variants = [
            Variant("naive", "naive", lambda: baselines.naive(*chain), self.restore, self.outcome),
            Variant("tidy", "torch", lambda: baselines.tidy(*chain), self.restore, self.outcome),
            Variant("foreach", "torch", lambda: baselines.foreach(*chain), self.restore, self.outcome),
        ]
        if compiler is not None:
            variants += self._compiled(originals, forgets, baselines.Compiled(ALPHA, LAM, compiler))
        for backend in usable(self.device):
            plan = self.plan(backend)
            kind = "reference" if backend == "reference" else "ours"
            calls = 0 if backend == "reference" else len(plan.tables)
            variants.append(Variant(backend, kind, plan.run_, self.restore, self.outcome, calls, kind == "ours"))
        return [v for v in variants if only is None or v.name in only or v.kind in only]

    def _compiled(
        self, originals: list[list[Tensor]], forgets: list[list[Tensor]], compiled: baselines.Compiled
    ) -> Iterator[Variant]:
        calls = baselines.compiled_calls(self.groups)
        flat = list(self.pristine.clone().unbind())
        buffers = [fisher.buffer for fisher in self.originals]
        sources = [fisher.buffer for fisher in self.forgets]
        yield Variant(
            "compiled, flat",
            "torch",
            lambda: compiled.flat(flat, buffers, sources, self.groups),
            lambda: torch._foreach_copy_(flat, list(self.pristine.unbind())),
            lambda: flat,
            calls,
            True,
        )
        yield Variant(
            "compiled, list",
            "torch",
            lambda: compiled.lists(self.lists, originals, forgets, self.groups),
            self.restore,
            self.outcome,
            calls,
            True,
        )
        if len(self.lists) <= len(self.forgets) or len(self.layout) > 2:
            return
        # Last layers can be stacked: one call a group. The models no longer own their parameters then.
        stack, stacked = self.pristine.clone(), torch.stack(buffers)
        rows = [slice(group.nodes[0], group.nodes[-1] + 1) for group in self.groups]
        parts = [stack[row] for row in rows], [stacked[row] for row in rows]
        one_each = [Group(group.sources, (i,)) for i, group in enumerate(self.groups)]
        yield Variant(
            "compiled, stacked",
            "torch",
            lambda: compiled.flat(*parts, sources, one_each),
            lambda: stack.copy_(self.pristine),
            lambda: stack.unbind(),
            baselines.compiled_calls(one_each),
            True,
        )

    def case(self, name: str, title: str, only: Sequence[str] | None = None, compiler: str | None = "inductor") -> Case:
        """The network as a case; its floor is what its plan says it moves."""
        plan = self.plan("reference")
        elements = self.pristine.numel()
        variants = self.variants(only, compiler)
        share = self.selected / elements
        return Case(name, title, plan.traffic.total, elements, variants, self.expected, selected=share)


def usable(device: torch.device) -> list[str]:
    """Backends that work on that device and are worth a row; Triton's interpreter on a CPU is not."""
    return [name for name in ff.available_backends(device.type) if name in TIMED[device.type]]


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
