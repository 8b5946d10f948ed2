"""Random dampening cases, many to a plan, bit for bit: a backend, the reference, and the textbook chain.

A case is one parameter of one node: its shape, dtype and misalignment, how many Fishers meet there, weights, alpha,
lambda and cap, and values of every kind: any bits at all, zeros, denormals, infinities, NaN, ties. The textbook
(tests/cases.py) works on all parameters of a node in one go, which changes no element's result.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
from cases import EDGES, THETA_EDGES, merge_textbook, reaches, ssd_modify_weight
from torch import Tensor

import fiun_fast as ff

THETAS = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65]
NUMBERS = [0.0, 1e-45, 1e-30, 0.1, 1 / 3, 0.5, 1.0, 1.0, 1.5, 2.0, 10.0, 1e6, 1e30, 3e38]
CAPS = [1.0, 1.0, 1.0, 0.0, 0.3, 2.5, 1e30]


def any_bits(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any numbers there are: NaN with any payload, infinities, denormals, both zeros."""
    integers = torch.randint(-(1 << 62), 1 << 62, (n,), generator=generator) * 2
    integers += torch.randint(2, (n,), generator=generator)
    return integers.to(INTEGER[dtype.itemsize]).view(dtype)


def mixed(n: int, dtype: torch.dtype, edges: list[float], generator: torch.Generator) -> Tensor:
    """A part ordinary, a part at the edges, a part any bits."""
    values = torch.randn(n, dtype=torch.float64, generator=generator).to(dtype)
    special = torch.tensor(edges, dtype=torch.float64).to(dtype)[torch.randint(len(edges), (n,), generator=generator)]
    kind = torch.rand(n, generator=generator)
    bits = any_bits(n, dtype, generator)
    chosen = torch.where(kind < 0.2, special, torch.where(kind < 0.4, bits, values))
    chosen.view(INTEGER[dtype.itemsize]).copy_(
        torch.where(kind < 0.4, chosen.view(INTEGER[dtype.itemsize]), values.view(INTEGER[dtype.itemsize]))
    )
    return chosen


class Cases:
    """A DAG full of random parameters.

    Args:
        seed: everything follows from it.
        parameters: of each node.
        run: how many parameters lie one after another in memory, on average.

    """

    def __init__(self, seed: int, parameters: int = 200, run: float = 1.5) -> None:
        draw = random.Random(seed)
        self.seed, generator = seed, torch.Generator().manual_seed(seed)
        nodes = draw.randint(1, 5)
        self.parents = {f"n{i}": tuple(f"n{j}" for j in range(i) if draw.random() < 0.5) for i in range(nodes)}
        self.origins = [f"n{draw.randrange(nodes)}" for _ in range(draw.choice([1, 1, 2, 3, 4]))]
        self.weights = [draw.choice([1.0, 1.0, 0.5, 3.0, 0.0, 1e-30]) for _ in self.origins]
        few = len(self.origins) == 1
        self.merge = draw.choice(["mean", "sum"]) if few and draw.random() < 0.5 else "max"
        self.scale = draw.choice([1.0, 1.0, 0.3, 2.0, 0.0])
        self.cap = draw.choice(CAPS)
        self.alpha = {node: draw.choice(NUMBERS) for node in self.parents}
        self.lam = {node: draw.choice(NUMBERS) for node in self.parents}
        self.kind = draw.choice([torch.float32, torch.float32, torch.float64])
        self.threads = draw.randint(1, 3)
        self.shapes = {f"p{i}": self._shape(draw) for i in range(parameters)}
        self.layout = ff.Layout(self.shapes)
        kinds = [draw.choice(THETAS) for _ in self.shapes]

        def fisher() -> ff.Fisher:
            shift = draw.randrange(8)
            values = mixed(self.layout.numel + shift, self.kind, EDGES, generator)
            ordinary = torch.rand(len(values), generator=generator).to(self.kind).square()
            bits, sign = values.view(INTEGER[self.kind.itemsize]), torch.iinfo(INTEGER[self.kind.itemsize]).max
            values = (bits & sign).view(self.kind)  # a Fisher has no negative entries
            values = torch.where(torch.rand(len(values), generator=generator) < 0.5, ordinary, values)
            return ff.Fisher(values[shift:], self.layout)

        self.originals = {node: fisher() for node in self.parents}
        self.forgets = [fisher() for _ in self.origins]
        for forget in self.forgets:  # ties: alpha times the original, or one float beside it
            node = draw.choice(list(self.parents))
            tie = self.originals[node].buffer * self.alpha[node]
            near = torch.nextafter(tie, torch.full_like(tie, draw.choice([0.0, float("inf")])))
            where = torch.rand(len(tie), generator=generator)
            forget.buffer = torch.where(where < 0.1, tie, torch.where(where < 0.2, near, forget.buffer))
        self.models = {node: self._model(draw, generator, kinds, run) for node in self.parents}
        self.reached = [node for node in self.parents if any(reaches(self.parents, o, node) for o in self.origins)]
        self.gradients: list[ff.Gradient | None] = [None] * len(self.origins)
        if draw.random() < 0.4:
            self.gradients = [self._gradient(draw.randrange(8), generator) for _ in self.origins]

    def _gradient(self, shift: int, generator: torch.Generator) -> ff.Gradient:
        edges = [*THETA_EDGES, *EDGES]
        return ff.Gradient(mixed(self.layout.numel + shift, self.kind, edges, generator)[shift:], self.layout)

    def _shape(self, draw: random.Random) -> tuple[int, ...]:
        if draw.random() < 0.02:
            return (draw.choice([255, 256, 257, 1009]),)
        size = draw.choice(SIZES)
        return draw.choice([(size,), (1, size), (size, 1)]) if draw.random() < 0.8 else (draw.randint(1, 6), size)

    def _model(
        self, draw: random.Random, generator: torch.Generator, kinds: list[torch.dtype], run: float
    ) -> dict[str, Tensor]:
        """Runs of parameters of one dtype share a storage, some elements off its alignment."""
        model: dict[str, Tensor] = {}
        names = list(self.shapes)
        at = 0
        while at < len(names):
            kind, last = kinds[at], at + 1
            while last < len(names) and draw.random() < 1 - 1 / run:
                last += 1
            shift = draw.randrange(8)
            sizes = [self.layout[name].numel for name in names[at:last]]
            storage = mixed(shift + sum(sizes), kind, THETA_EDGES, generator)
            for name, part in zip(names[at:last], storage[shift:].split(sizes)):
                model[name] = part.view(self.shapes[name])
            at = last
        return model

    @property
    def number(self) -> int:
        """How many cases these are."""
        return len(self.reached) * len(self.shapes)

    def plan(self, models: Mapping[str, dict[str, Tensor]], backend: str) -> ff.Plan:
        dag = ff.InheritanceDAG()
        for node, parents in self.parents.items():
            dag.add_model(node, models[node], self.originals[node], parents=list(parents))
        given = zip(self.origins, self.forgets, self.weights, self.gradients)
        requests = [ff.ForgetRequest(*each) for each in given]
        numbers = {"alpha": self.alpha, "lam": self.lam, "cap": self.cap, "merge": self.merge, "scale": self.scale}
        return ff.plan(dag, requests, **numbers, backend=backend)  # type: ignore[arg-type]

    def expected(self, node: str) -> tuple[dict[torch.dtype, Tensor], tuple[int, int, int]]:
        """The textbook, for all parameters of a dtype in one go; counts."""
        its = [k for k, origin in enumerate(self.origins) if reaches(self.parents, origin, node)]
        merged = merge_textbook(
            [self.forgets[k].buffer for k in its], [self.weights[k] for k in its], self.merge, self.scale
        )
        slopes = [gradient.buffer for k in its if (gradient := self.gradients[k]) is not None]
        slope = merge_textbook(slopes, [self.weights[k] for k in its], "sum", 1.0) if slopes else None
        original, counts, found = self.originals[node].buffer, [0, 0, 0], {}
        for kind, names in self.by_dtype(node).items():
            at = torch.cat([torch.arange(s.offset, s.offset + s.numel) for s in map(self.layout.__getitem__, names)])
            value = torch.cat([self.models[node][name].reshape(-1) for name in names])
            wide = torch.float32 if kind.itemsize == 2 else torch.promote_types(kind, self.kind)
            computed = value.to(wide)
            wanted: Tensor | bool = True
            finite = merged[at].isfinite() & original[at].isfinite()
            if slope is not None:
                wanted, finite = slope[at].sign() * value.double().sign() == -1, finite & slope[at].isfinite()
            numbers = (self.alpha[node], self.lam[node], 1.0, self.cap)
            chosen = ssd_modify_weight(computed, original[at], merged[at], *numbers, wanted)
            after = torch.where(chosen, computed.to(kind), value)
            after.view(INTEGER[kind.itemsize]).copy_(
                torch.where(chosen, *(t.view(INTEGER[kind.itemsize]) for t in (computed.to(kind), value)))
            )
            counts[0] += int(chosen.sum())
            counts[1] += int((after[chosen] == 0).sum())
            counts[2] += int((~finite).sum())
            found[kind] = after
        return found, (counts[0], counts[1], counts[2])

    def by_dtype(self, node: str) -> dict[torch.dtype, list[str]]:
        found: dict[torch.dtype, list[str]] = {}
        for name, parameter in self.models[node].items():
            found.setdefault(parameter.dtype, []).append(name)
        return found

    def check(self, backend: str) -> None:
        """Dry and then in earnest, on copies that lie as the originals do.

        Raises:
            AssertionError: a bit or a count is not the textbook's.

        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            models = copies(self.models)
            plan = self.plan(models, backend)
            dry = plan.run_(dry_run=True)
            for node, model in models.items():
                for name, parameter in model.items():
                    assert same(parameter, self.models[node][name], False), f"{backend}: a dry run wrote {node}.{name}"
            report = plan.run_()
            for node in self.parents:
                wanted, counts = self.expected(node) if node in self.reached else (self.present(node), (0, 0, 0))
                for kind, names in self.by_dtype(node).items():
                    found = torch.cat([models[node][name].reshape(-1) for name in names])
                    if not same(found, wanted[kind], True):
                        self.explain(backend, node, names, found, wanted[kind])
                for which in (dry, report):
                    one = which[node]
                    counted = one.selected, one.zeroed, one.nonfinite
                    assert counted == counts, f"{backend}, {node}: counted {counted}, expected {counts}"
        finally:
            torch.set_num_threads(before)

    def present(self, node: str) -> dict[torch.dtype, Tensor]:
        groups = self.by_dtype(node)
        return {kind: torch.cat([self.models[node][n].reshape(-1) for n in names]) for kind, names in groups.items()}

    def explain(self, backend: str, node: str, names: list[str], found: Tensor, wanted: Tensor) -> None:
        bad = int((found.view(INTEGER[found.itemsize]) != wanted.view(INTEGER[found.itemsize])).nonzero()[0])
        at = bad
        for name in names:
            if at < self.layout[name].numel:
                break
            at -= self.layout[name].numel
        place = self.layout[name].offset + at
        its = [k for k, origin in enumerate(self.origins) if reaches(self.parents, origin, node)]
        raise AssertionError(
            f"{backend}, {node}.{name}[{at}] ({found.dtype}): {found[bad].item()!r}, expected {wanted[bad].item()!r}; "
            f"theta {self.models[node][name].reshape(-1)[at].item()!r}, I {self.originals[node].buffer[place]!r}, "
            f"F {[self.forgets[k].buffer[place].item() for k in its]}, weights {[self.weights[k] for k in its]}, "
            f"{self.merge}, scale {self.scale}, alpha {self.alpha[node]}, lambda {self.lam[node]}, cap {self.cap}"
        )


def same(a: Tensor, b: Tensor, any_nan: bool) -> bool:
    """Equal bit for bit; with `any_nan` any NaN is as good as another."""
    equal = a.view(INTEGER[a.itemsize]) == b.view(INTEGER[b.itemsize])
    return bool((equal | (a.isnan() & b.isnan()) if any_nan else equal).all())


def copies(models: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Storage by storage, so that what lay side by side does so again."""
    storages: dict[int, Tensor] = {}
    made: dict[str, dict[str, Tensor]] = {}
    for node, model in models.items():
        made[node] = {}
        for name, t in model.items():
            storage = t.untyped_storage()
            if storage._cdata not in storages:
                storages[storage._cdata] = torch.empty(0, dtype=torch.uint8).set_(storage.clone())
            held = storages[storage._cdata].untyped_storage()
            made[node][name] = torch.empty(0, dtype=t.dtype).set_(held, t.storage_offset(), t.shape, t.stride())
    return made
