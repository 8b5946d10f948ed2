"""A table of cases, a textbook in plain torch, and a backend against it: what an installed package can check by itself.

The textbook knows nothing of tables, tiles or kernels. It runs on the CPU, in the Fishers' dtype where the contract
promises bits (docs/semantics.md), else in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fiun_fast as ff

from .. import kernels
from ..kernels.table import Merging
from .machine import Gpu

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
EDGES = [0.0, 1e-45, 1e-40, 1.1754944e-38, 1e-30, 0.5, 1.0, 2.0, 1e30, 3.4e38, float("inf"), float("nan")]
MIXED = ((7, 3), (), (1,), (17,), (64,), (1009,), (0, 4), (5,))
LOOSE = {BF16: 2**-7, FP16: 2**-10, FP32: 64 * torch.finfo(FP32).eps, FP64: 64 * torch.finfo(FP64).eps}


@dataclass(frozen=True)
class Case:
    """A root and its children, all of one layout; requests arise at the root and at every third node."""

    nodes: int = 4
    sources: int = 2
    shapes: tuple[tuple[int, ...], ...] = MIXED
    theta: torch.dtype = FP32
    fisher: torch.dtype = FP32
    merge: str = "max"
    alpha: float = 1.5
    lam: float = 0.7
    exponent: float = 1.0
    cap: float = 1.0
    scale: float = 1.0
    weighted: bool = False
    signed: bool = False
    edges: bool = False
    shift: int = 0  # elements by which parameters miss the alignment of their memory
    flat: bool = False  # all parameters of a node in one run

    @property
    def exact(self) -> bool:
        """Whether the contract promises bits."""
        return self.merge == "max" and self.exponent == 1


CASES: dict[str, Case] = {  # the first ones tell most
    "fp32": Case(),
    "fp32 edges": Case(edges=True),
    "bf16 edges": Case(theta=BF16, edges=True),
    "signed edges": Case(signed=True, edges=True, weighted=True),
    "many tiles": Case(2, 3, ((1_000, 1_003), (1_003,))),
    "many tiles, flat, shifted": Case(3, 2, ((700, 701), (701,)), flat=True, shift=1),
    "many nodes": Case(700, 3, ((10, 51), (10,)), flat=True),
    "fp16 edges": Case(theta=FP16, edges=True),
    "fp64": Case(theta=FP64, fisher=FP64, edges=True),
    "fp32 beside fp64": Case(fisher=FP64, edges=True),
    "bf16 beside fp64": Case(theta=BF16, fisher=FP64, edges=True, shift=3),
    "fp64 beside fp32": Case(theta=FP64, edges=True),
    "flat": Case(flat=True, shift=5),
    "one source": Case(sources=1, scale=0.77),
    "weights and scale": Case(sources=3, weighted=True, scale=0.3, edges=True),
    "cap and lambda": Case(lam=3e5, cap=2.5, edges=True),
    "alpha 0": Case(alpha=0.0, edges=True),
    "sum": Case(merge="sum", weighted=True),
    "mean": Case(merge="mean", sources=3, scale=1.7),
    "mean fp64": Case(merge="mean", fisher=FP64, theta=FP64),
    "exponent 0.5": Case(exponent=0.5),
    "exponent 2, bf16": Case(exponent=2.0, theta=BF16),
    "exponent, signed, fp64": Case(exponent=3.3, signed=True, theta=FP64, fisher=FP64),
    "signed bf16": Case(signed=True, theta=BF16, flat=True, shift=1),
    "signed many tiles": Case(2, 2, ((500, 901), (901,)), signed=True),
}
FEW = ("fp32 edges", "signed edges")  # for a dry run and the sanitizers, which are slow


class Problem:
    """A case with values in it; `thetas`, `originals`, `forgets`, `gradients` are copies on the CPU to compute with."""

    def __init__(self, case: Case, devices: list[torch.device], seed: int = 0) -> None:
        self.case, self._random = case, torch.Generator().manual_seed(seed)
        names = {f"p{i}": shape for i, shape in enumerate(case.shapes)}
        self.layout = ff.Layout(names)
        origins = [min(3 * k, case.nodes - 1) if k else 0 for k in range(case.sources)]
        self.originals = [self._fisher() for _ in range(case.nodes)]
        self.forgets = [self._fisher() for _ in origins]
        self.gradients = [self._normal(case.fisher) for _ in origins] if case.signed else None
        self.thetas = [self._normal(case.theta) for _ in range(case.nodes)]
        self.weights = [1.0 + 0.5 * k if case.weighted else 1.0 for k in range(case.sources)]
        self.reaching = [[k for k, origin in enumerate(origins) if origin in (0, n)] for n in range(case.nodes)]
        self.models = [self._placed(devices[n % len(devices)], names) for n in range(case.nodes)]
        dag = ff.InheritanceDAG()
        for n, (model, original) in enumerate(zip(self.models, self.originals, strict=True)):
            fisher = ff.Fisher(original.to(devices[n % len(devices)]), self.layout)
            dag.add_model(f"n{n}", model, fisher=fisher, parents=["n0"] if n else [])
        self._requests = [
            ff.ForgetRequest(
                f"n{origin}",
                ff.Fisher(self.forgets[k].to(devices[0]), self.layout),
                self.weights[k],
                None if self.gradients is None else ff.Gradient(self.gradients[k].to(devices[0]), self.layout),
            )
            for k, origin in enumerate(origins)
        ]
        self._dag = dag
        self.refill()

    def plan(self, backend: str) -> ff.Plan:
        """Over all nodes."""
        case = self.case
        numbers: dict[str, Any] = {key: getattr(case, key) for key in ("alpha", "lam", "exponent", "cap", "scale")}
        return ff.plan(self._dag, self._requests, merge=case.merge, backend=backend, **numbers)  # type: ignore[arg-type]

    def refill(self) -> None:
        """Fresh parameters, in the same memory."""
        self.thetas = [self._normal(self.case.theta) for _ in self.thetas]
        for theta, model in zip(self.thetas, self.models, strict=True):
            for name, view in self.layout.views(theta).items():
                model[name].copy_(view)

    def now(self) -> list[Tensor]:
        """The parameters of each node as they are, [numel] each, on the CPU."""
        return [torch.cat([model[name].reshape(-1).cpu() for name in self.layout.names]) for model in self.models]

    def compare(self, report: Any) -> None:
        """Raise an AssertionError where parameters or counts are not the textbook's."""
        for n, found in enumerate(self.now()):
            values, counts, band = self.textbook(n)
            if self.case.exact:
                assert same_bits(found, values), f"node n{n}: {int((~close_bits(found, values)).sum())} elements differ"
            else:
                loose = max(LOOSE[self.case.theta], LOOSE[self.case.fisher])
                torch.testing.assert_close(
                    found[~band], values[~band], rtol=loose, atol=torch.finfo(values.dtype).tiny, equal_nan=True
                )
            row = report[f"n{n}"]
            seen = (row.selected, row.zeroed, row.nonfinite)
            if self.case.exact:
                assert seen == counts, f"node n{n}: counts {seen}, expected {counts}"
            assert abs(seen[0] - counts[0]) <= int(band.sum()), f"node n{n}: {seen[0]} selected, not {counts[0]}"

    def textbook(self, n: int) -> tuple[Tensor, tuple[int, int, int], Tensor]:
        """A node's parameters and counts afterwards, and where rounding decides whether an element is selected."""
        case, its = self.case, self.reaching[n]
        dtype = case.fisher if case.exact else FP64
        theta, original = self.thetas[n], self.originals[n].to(dtype)
        merged = merge([self.forgets[k].to(dtype) for k in its], [self.weights[k] for k in its], case.merge)
        merged = merged * torch.tensor(case.scale, dtype=case.fisher).to(dtype)
        alpha, lam, cap = (torch.tensor(x, dtype=case.fisher).to(dtype) for x in (case.alpha, case.lam, case.cap))
        chosen, finite = merged > original * alpha, merged.isfinite() & original.isfinite()
        if self.gradients is not None:
            slope = merge([self.gradients[k].to(dtype) for k in its], [self.weights[k] for k in its], "sum")
            chosen &= slope.sign() * theta.to(FP64).sign() == -1
            finite &= slope.isfinite()
        factor = original * lam / merged
        factor = factor**case.exponent if case.exponent != 1 else factor
        factor = torch.where(factor.isnan(), 0.0, torch.minimum(factor, cap))
        wide = FP32 if theta.itemsize == 2 else torch.promote_types(theta.dtype, case.fisher)
        values = torch.where(chosen, (theta.to(wide) * factor.to(wide)).to(theta.dtype), theta)
        counts = (int(chosen.sum()), int((values[chosen] == 0).sum()), int((~finite).sum()))
        return values, counts, (merged - original * alpha).abs() <= 1e-6 * merged.abs()

    def _fisher(self) -> Tensor:
        values = torch.rand(self.layout.numel, dtype=FP64, generator=self._random).square().square()
        return self._with_edges(values).to(self.case.fisher)

    def _normal(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(self.layout.numel, dtype=FP64, generator=self._random).to(dtype)

    def _with_edges(self, values: Tensor) -> Tensor:
        if not self.case.edges:
            return values
        picked = torch.tensor(EDGES, dtype=FP64)[torch.randint(len(EDGES), values.shape, generator=self._random)]
        return torch.where(torch.rand(values.shape, generator=self._random) < 0.5, picked, values)

    def _placed(self, device: torch.device, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        model: dict[str, Tensor] = {}
        shift, kind = self.case.shift, {"device": device, "dtype": self.case.theta}
        run = torch.empty(shift + self.layout.numel, **kind)  # type: ignore[call-overload]
        for name, view in self.layout.views(run[shift:]).items():
            apart = torch.empty(shift + view.numel(), **kind)[shift:]  # type: ignore[call-overload]
            model[name] = view if self.case.flat else apart.view(shapes[name])
        return model


def merge(fishers: list[Tensor], weights: list[float], how: str) -> Tensor:
    """Weighted and reduced over the sources, as the definition has it."""
    terms = torch.stack([fisher * weight for fisher, weight in zip(fishers, weights, strict=True)])
    if how == "max":
        return torch.where(terms.isnan().any(0), torch.nan, terms.amax(0))
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total / len(terms) if how == "mean" else total


def close_bits(found: Tensor, wanted: Tensor) -> Tensor:
    """Where the bits are the same, any NaN being as good as another."""
    kind: torch.dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    return (found.view(kind) == wanted.view(kind)) | (found.isnan() & wanted.isnan())


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Whether all are."""
    return bool(close_bits(found, wanted).all())


def dampening(gpu: Gpu, backend: str, case: Case) -> dict[str, Any]:
    """A dry run, a run, a second run, all against the textbook."""
    problem = Problem(case, [gpu.device()])
    plan = problem.plan(gpu.backend(backend))
    before = problem.now()
    counted = plan.run_(dry_run=True).to_dict()["nodes"]
    assert all(map(same_bits, problem.now(), before)), "a dry run wrote"
    report = plan.run_()
    assert report.to_dict()["nodes"] == counted, "a dry run counts otherwise"
    problem.compare(report)
    problem.refill()
    problem.compare(plan.run_())
    return {"selected": report.selected}


def profile(gpu: Gpu, backend: str, few: bool) -> dict[str, Any]:
    """How many any alpha would select, from the histogram, against a dry run with that alpha."""
    problem = Problem(Case(2 if few else 5, 3, ((3 if few else 300, 41), (41,)), weighted=True), [gpu.device()])
    plan = problem.plan(gpu.backend(backend))
    profiles = plan.profile()
    for alpha in (0.3, 1.5, 20.0):
        plan.set_values_(alpha=alpha)
        report = plan.run_(dry_run=True)
        for node, found in profiles.items():
            low, high = found.bounds(alpha)
            assert low <= report[node].selected <= high, f"{node}, alpha {alpha}"
    return {}


def accumulate(gpu: Gpu, backend: str, few: bool) -> dict[str, Any]:
    """g^2 in every pair of dtypes, gradients zeroed."""
    found, random = kernels.load(gpu.backend(backend)), torch.Generator().manual_seed(7)
    for dtype in (FP32, BF16) if few else (FP32, FP64, BF16, FP16):
        for into_dtype in (FP32,) if few else (FP32, FP64):
            shapes: tuple[tuple[int, ...], ...] = ((), (1,), (17, 3), (1009,), (3, 211) if few else (300, 211))
            gradients = [torch.randn(shape, generator=random).to(gpu.device(), dtype) for shape in shapes]
            into = [torch.rand(g.numel(), generator=random).to(gpu.device(), into_dtype) for g in gradients]
            wanted = [t + g.reshape(-1).to(into_dtype) ** 2 for g, t in zip(gradients, into, strict=True)]
            found.accumulate(gradients, into, 2, True)
            for total, one in zip(into, wanted, strict=True):
                torch.testing.assert_close(total, one, rtol=4 * torch.finfo(into_dtype).eps, atol=0)
            assert not any(bool(g.any()) for g in gradients), "gradients were not zeroed"
    return {}


def merging(gpu: Gpu, backend: str, few: bool) -> dict[str, Any]:
    """Merging of up to 200 Fishers."""
    found, random = kernels.load(gpu.backend(backend)), torch.Generator().manual_seed(8)
    for count, n in ((3, 1_003),) if few else ((1, 17), (3, 300_007), (200, 1_003)):
        sources = [torch.rand(n, generator=random) for _ in range(count)]
        weights = [1.0 + 0.25 * (k % 5) for k in range(count)]
        for how in ("max", "sum", "mean"):
            out = torch.empty(n, device=gpu.device())
            found.merge([s.to(gpu.device()) for s in sources], weights, Merging(how, 0.5), out)
            wanted = merge([s.double() for s in sources], weights, how) * 0.5
            torch.testing.assert_close(out.cpu().double(), wanted, rtol=count * 1e-6, atol=0)
    return {}


def products(gpu: Gpu, backend: str, few: bool) -> dict[str, Any]:
    """Squared per-sample products, summed."""
    found, random = kernels.load(gpu.backend(backend)), torch.Generator().manual_seed(9)
    for samples, groups, m, k, t in ((2, 1, 9, 8, 3),) if few else ((5, 1, 33, 17, 1), (6, 2, 40, 70, 9)):
        left, right = (torch.randn(samples, groups, size, t, generator=random) for size in (m, k))
        into = torch.zeros(groups * m * k, device=gpu.device())
        found.outer_square_accumulate(left.to(gpu.device()), right.to(gpu.device()), into)
        wanted = torch.einsum("bgmt,bgkt->bgmk", left.double(), right.double()).square().sum(0).reshape(-1)
        torch.testing.assert_close(into.cpu().double(), wanted, rtol=1e-4, atol=1e-4)
    return {}


OPERATIONS = {"histogram": profile, "accumulate": accumulate, "merge": merging, "squares of products": products}


def items(gpu: Gpu, backend: str, few: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every case on one backend, and its other operations."""
    for name, case in CASES.items():
        if not few or name in FEW:
            yield name, partial(dampening, gpu, backend, case)
    for name, check in OPERATIONS.items():
        yield name, partial(check, gpu, backend, few)
