"""The case table that drives every backend, builders for it, and the textbook the results are held against.

The textbook is written as the SSD and FIUn code that people run is written: one parameter after another, with gathers
and scatters. It shares nothing with fiun_fast.kernels.reference.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

import fiun_fast as ff

ONE = {"a": ()}
CHAIN = {"a": (), "b": ("a",), "c": ("b",)}
DIAMOND = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "apart": ()}
FAN = {"root": (), **{f"child{i}": ("root",) for i in range(9)}}
TWO_ROOTS = {"a": (), "b": (), "ab": ("a", "b"), "a2": ("a",), "abc": ("ab", "a2")}

SMALL = {"weight": (3, 5), "bias": (3,)}
SIZES = {"scalar": (), "one": (1,), "odd": (7, 3), "line": (16,), "over": (17,), "none": (0, 4), "prime": (1009,)}
MANY = {f"p{i}": (i % 7 + 1,) for i in range(62)}
TILES = {"weight": (211, 197), "bias": (211,)}  # more than one tile of the cpu backend, nothing divides it

EDGES = [0.0, 1e-45, 1e-40, 1.1754944e-38, 1e-30, 0.25, 0.5, 1.0, 2.0, 4.0, 1e30, 3.4e38, float("inf"), float("nan")]
THETA_EDGES = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 1.0, -1.0, 3.3e38, float("inf"), float("-inf"), float("nan")]


PARTS = {"1.weight": (7, 3), "1.bias": (7,), "2.weight": (3, 17), "2.bias": ()}
APART = {"1.bias": 0.5, "1.*": 2.0, "*": 1.2}  # of a node with PARTS


@dataclass(frozen=True)
class Case:
    """One problem: a DAG, requests, shapes, dtypes, numbers."""

    id: str
    parents: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ONE)
    origins: tuple[str, ...] = ("a",)
    weights: tuple[float, ...] = ()  # one a request; empty: all 1
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: SMALL)
    theta: torch.dtype = torch.float32
    fisher: torch.dtype = torch.float32
    alpha: float | Mapping[str, float | Mapping[str, float]] = 1.5
    lam: float | Mapping[str, float | Mapping[str, float]] = 0.7
    exponent: float = 1.0
    cap: float = 1.0
    merge: str = "max"
    scale: float = 1.0
    signed: bool = False  # each request with a gradient
    values: str = "random"  # or "edges": zeros, denormals, inf and NaN all over; "ties": m == alpha * I everywhere;
    # "infinite": θ is inf or -inf, and I zero
    flat: bool = False  # the parameters of a node in one contiguous run
    shift: int = 0  # elements by which parameters miss the alignment of their storage
    seed: int = 0

    @property
    def exact(self) -> bool:
        """Whether the bit contract covers it; sums and powers may differ by a few ulp."""
        return self.exponent == 1 and self.merge == "max"


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
_N = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}

CASES = [
    Case("one-model"),
    Case("chain", CHAIN),
    Case("chain-from-the-middle", CHAIN, ("b",)),
    Case("diamond-two-origins", DIAMOND, ("b", "c")),
    Case("fan-of-nine", FAN, ("root",), shapes=SIZES),
    Case("fan-two-requests-at-one-origin", FAN, ("root", "root", "child3"), shapes=SIZES),
    Case("two-roots", TWO_ROOTS, ("a", "b", "a2", "ab"), shapes=SIZES),
    Case("every-size", shapes=SIZES),
    Case("every-size-flat", shapes=SIZES, flat=True),
    Case("every-size-shifted", shapes=SIZES, shift=3),
    Case("flat-shifted", DIAMOND, ("a", "b"), shapes=SIZES, flat=True, shift=5),
    Case("many-small", CHAIN, shapes=MANY),
    Case("many-small-flat", CHAIN, shapes=MANY, flat=True),
    Case("tiles", DIAMOND, ("a", "c"), shapes=TILES),
    Case("tiles-flat", CHAIN, ("a", "b", "c"), shapes=TILES, flat=True, shift=1),
    *(
        Case(
            f"{values}-{_N[theta]}-{_N[fisher]}",
            DIAMOND,
            ("a", "b"),
            shapes=SIZES,
            theta=theta,
            fisher=fisher,
            values=values,
        )
        for theta in DTYPES
        for fisher in (torch.float32, torch.float64)
        for values in ("random", "edges")
    ),
    Case("ties", DIAMOND, ("a",), values="ties", shapes=SIZES, alpha=2.0),
    Case("ties-alpha-one-third", values="ties", shapes=SIZES, alpha=1 / 3),
    *(Case(f"infinite-{_N[theta]}", shapes=SIZES, theta=theta, values="infinite") for theta in DTYPES),
    Case("alpha-zero", CHAIN, values="edges", shapes=SIZES, alpha=0.0),
    Case("alpha-large", CHAIN, values="edges", shapes=SIZES, alpha=1e30),
    Case("lambda-zero", CHAIN, values="edges", shapes=SIZES, lam=0.0),
    Case("lambda-large", CHAIN, values="edges", shapes=SIZES, lam=3e5, cap=2.5),
    Case("lambda-overflows", values="edges", shapes=SIZES, lam=1e38, cap=4.0),
    Case("cap-small", CHAIN, values="edges", shapes=SIZES, cap=0.125),
    Case("cap-zero", shapes=SIZES, cap=0.0),
    Case("cap-one-lambda-large", values="edges", shapes=SIZES, lam=10.0, theta=torch.float16),
    Case("per-node", CHAIN, shapes=SIZES, alpha={"a": 0.5, "b": 2.0, "c": 40.0}, lam={"a": 1.0, "b": 0.1, "c": 3.0}),
    Case(
        "by-pattern",
        DIAMOND,
        ("a", "b"),
        shapes=PARTS,
        alpha={"a": APART, "b": 1.5, "c": APART, "d": {"2.bias": 9.0, "*": 0.1}},
        lam={"a": 0.7, "b": {"1.*": 0.2, "*": 1.0}, "c": 0.7, "d": {"*": 0.3, "2.bias": 0.1}},
    ),
    Case(
        "by-pattern-flat-signed-halves",
        CHAIN,
        ("b",),
        shapes=PARTS,
        alpha=dict.fromkeys("bc", APART),
        theta=torch.bfloat16,
        flat=True,
        shift=1,
        signed=True,
    ),
    Case("weights-and-scale", DIAMOND, ("a", "b", "c"), (0.5, 1.0, 3.0), SIZES, scale=0.3, values="edges"),
    Case("weight-zero", CHAIN, ("a", "b"), (0.0, 1.0), SIZES),
    Case("scale-zero", CHAIN, shapes=SIZES, scale=0.0, values="edges"),
    Case("scale-of-one-source", shapes=TILES, scale=0.77),
    *(
        Case(
            f"{merge}-{_N[fisher]}",
            DIAMOND,
            ("a", "b", "c"),
            (1.0, 0.25, 3.0),
            TILES,
            merge=merge,
            scale=1.7,
            fisher=fisher,
        )
        for merge in ("mean", "sum")
        for fisher in (torch.float32, torch.float64)
    ),
    Case("mean-of-one", shapes=SIZES, merge="mean"),
    Case("sum-edges", DIAMOND, ("a", "b"), shapes=SIZES, merge="sum", values="edges"),
    *(
        Case(f"exponent-{e:g}", CHAIN, ("a", "b"), shapes=SIZES, exponent=e, values="edges")
        for e in (0.0, 0.5, 2.0, 3.3)
    ),
    *(Case(f"exponent-half-{_N[theta]}", shapes=SIZES, exponent=0.5, theta=theta) for theta in DTYPES[1:]),
    Case("signed-one-model", shapes=TILES, signed=True),
    Case("signed-weighted", TWO_ROOTS, ("a", "b", "a2", "ab", "a"), (0.5, 1.0, 3.0, 0.0, 1.0), SIZES, signed=True),
    Case("signed-tiles-flat", DIAMOND, ("a", "c"), shapes=TILES, flat=True, shift=1, signed=True),
    Case("signed-many-small", CHAIN, ("a", "b"), shapes=MANY, flat=True, signed=True, scale=0.5),
    *(
        Case(
            f"signed-{values}-{_N[theta]}-{_N[fisher]}",
            DIAMOND,
            ("a", "b"),
            shapes=SIZES,
            theta=theta,
            fisher=fisher,
            values=values,
            signed=True,
        )
        for theta in DTYPES
        for fisher in (torch.float32, torch.float64)
        for values in ("random", "edges")
    ),
    Case("signed-ties", values="ties", shapes=SIZES, alpha=2.0, signed=True),
    Case("signed-exponent", CHAIN, ("a", "b"), shapes=SIZES, exponent=0.5, values="edges", signed=True),
    Case("signed-mean", DIAMOND, ("a", "b"), (1.0, 0.25), SIZES, merge="mean", scale=1.7, signed=True),
]


@dataclass
class Problem:
    """A case with values in it. Models are dicts of tensors."""

    case: Case
    models: dict[str, dict[str, torch.Tensor]]
    originals: dict[str, ff.Fisher]
    forgets: list[ff.Fisher]
    gradients: list[ff.Gradient | None]  # [requests]

    def plan(self, backend: str | None, order: list[str] | None = None) -> ff.Plan:
        """The public API, from DAG to plan; `order` is the order in which nodes are added."""
        case, dag = self.case, ff.InheritanceDAG()
        for name in order or list(case.parents):
            dag.add_model(name, self.models[name], self.originals[name], parents=case.parents[name])
        weights = case.weights or (1.0,) * len(case.origins)
        given = zip(case.origins, self.forgets, weights, self.gradients, strict=True)
        requests = [ff.ForgetRequest(o, f, w, g) for o, f, w, g in given]
        numbers = {key: getattr(case, key) for key in ("alpha", "lam", "exponent", "cap", "merge", "scale")}
        return ff.plan(dag, requests, **numbers, backend=backend)

    def vectors(self) -> list[ff.Fisher | ff.Gradient]:
        """All Fishers and gradients."""
        return [*self.originals.values(), *self.forgets, *filter(None, self.gradients)]

    def state(self) -> dict[tuple[str, str], torch.Tensor]:
        """A copy of every parameter."""
        return {(node, key): t.clone().cpu() for node, model in self.models.items() for key, t in model.items()}


def build(case: Case, device: str = "cpu", seed: int | None = None) -> Problem:
    """Fresh values for a case; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(case.seed if seed is None else seed)
    layout = ff.Layout(case.shapes)

    def fisher() -> ff.Fisher:
        if case.values == "edges":
            picks = torch.tensor(EDGES, dtype=torch.float64)
            values = picks[torch.randint(len(picks), (layout.numel,), generator=generator)]
        else:
            # squares, not pow: its bits depend on the number of threads
            values = torch.rand(layout.numel, dtype=torch.float64, generator=generator).square().square()
        return ff.Fisher(values.to(device, case.fisher), layout)

    def model() -> dict[str, torch.Tensor]:
        values = torch.randn(layout.numel, dtype=torch.float64, generator=generator)
        if case.values == "edges":
            picks = torch.tensor(THETA_EDGES, dtype=torch.float64)
            at = torch.rand(layout.numel, generator=generator) < 0.5
            values = torch.where(at, picks[torch.randint(len(picks), at.shape, generator=generator)], values)
        if case.values == "infinite":
            values = values * float("inf")
        return place({s.name: values[s.offset : s.offset + s.numel].view(s.shape) for s in layout}, case, device)

    originals = {node: fisher() for node in case.parents}
    if case.values == "infinite":
        originals = {node: ff.Fisher(torch.zeros_like(one.buffer), layout) for node, one in originals.items()}
    forgets = [fisher() for _ in case.origins]
    if case.values == "ties":
        forgets = [ff.Fisher(originals[o].buffer * float(case.alpha), layout) for o in case.origins]  # type: ignore[arg-type]
    models = {node: model() for node in case.parents}

    def gradient() -> ff.Gradient:
        values = torch.randn(layout.numel, dtype=torch.float64, generator=generator)
        if case.values == "edges":
            picks = torch.tensor([*EDGES, *(-edge for edge in EDGES)], dtype=torch.float64)
            at = torch.rand(layout.numel, generator=generator) < 0.7
            values = torch.where(at, picks[torch.randint(len(picks), at.shape, generator=generator)], values)
        return ff.Gradient(values.to(device, case.fisher), layout)

    return Problem(case, models, originals, forgets, [gradient() if case.signed else None for _ in case.origins])


def place(values: Mapping[str, torch.Tensor], case: Case, device: str) -> dict[str, torch.Tensor]:
    """Copies in the case's dtype, in one run or apart, `shift` elements off the alignment."""
    placed, run = {}, torch.empty(case.shift + sum(v.numel() for v in values.values()), dtype=case.theta, device=device)
    at = case.shift
    for name, value in values.items():
        if not case.flat:
            run, at = torch.empty(case.shift + value.numel(), dtype=case.theta, device=device), case.shift
        placed[name] = run[at : at + value.numel()].view(value.shape).copy_(value)
        at += value.numel()
    return placed


# ---- the textbook ----------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What a node looks like afterwards, and its counts."""

    values: dict[tuple[str, str], torch.Tensor]
    counts: dict[str, tuple[int, int, int]]  # node -> selected, zeroed, nonfinite
    band: dict[tuple[str, str], torch.Tensor]  # where m and alpha * I are so close that rounding decides


def reaches(parents: Mapping[str, tuple[str, ...]], origin: str, node: str) -> bool:
    """Is origin the node or an ancestor: walks every path, without a thought for speed."""
    return origin == node or any(reaches(parents, origin, parent) for parent in parents[node])


def number_of(given: float | Mapping[str, float | Mapping[str, float]], node: str, parameter: str) -> float:
    """The number of a parameter: the node's, or of its patterns the name itself, else the first that matches."""
    of = given[node] if isinstance(given, Mapping) else given
    if not isinstance(of, Mapping):
        return of
    return of[parameter] if parameter in of else next(of[glob] for glob in of if fnmatch.fnmatchcase(parameter, glob))


def textbook(problem: Problem, compute: torch.dtype | None = None) -> Expected:
    """What SSD/FIUn code gives, node by node and parameter by parameter, in the Fishers' dtype or in `compute`."""
    case, result = problem.case, Expected({}, {}, {})
    weights = case.weights or (1.0,) * len(case.origins)
    for node, model in problem.models.items():
        mine = [k for k, origin in enumerate(case.origins) if reaches(case.parents, origin, node)]
        counts = [0, 0, 0]
        for key, parameter in model.items():
            alpha, lam = (number_of(v, node, key) for v in (case.alpha, case.lam)) if mine else (0.0, 0.0)
            value = parameter.detach().clone().cpu()
            result.values[node, key] = value
            if not mine or value.numel() == 0:
                continue
            dtype = compute or case.fisher
            original = problem.originals[node][key].cpu().to(dtype).view(-1)
            sources = [problem.forgets[k][key].cpu().to(dtype).view(-1) for k in mine]
            merged = merge_textbook(sources, [weights[k] for k in mine], case.merge, case.scale)
            value = value.view(-1)
            # the wider of parameter and Fisher; half precision in fp32; each rounded once, on the way back
            p = (
                value.float()
                if value.itemsize == 2 and not compute
                else value.to(torch.promote_types(value.dtype, dtype))
            )
            wanted = torch.ones_like(merged, dtype=torch.bool)
            finite = merged.isfinite() & original.isfinite()
            if case.signed:
                slopes = [problem.gradients[k][key].cpu().to(dtype).view(-1) for k in mine]  # type: ignore[index]
                slope = merge_textbook(slopes, [weights[k] for k in mine], "sum", 1.0)
                wanted, finite = slope.sign() * value.double().sign() == -1, finite & slope.isfinite()
            chosen = ssd_modify_weight(p, original, merged, alpha, lam, case.exponent, case.cap, wanted)
            value.copy_(p)
            counts[0] += int(chosen.sum())
            counts[1] += int((value[chosen] == 0).sum())
            counts[2] += int((~finite).sum())
            near = wanted & ((merged - original * alpha).abs() <= 1e-6 * merged.abs())
            result.band[node, key] = near.view(model[key].shape)
        result.counts[node] = (counts[0], counts[1], counts[2])
    return result


def merge_textbook(fishers: list[torch.Tensor], weights: list[float], how: str, scale: float) -> torch.Tensor:
    """MFIM and its relatives, stacked."""
    stack = torch.stack([f * w for f, w in zip(fishers, weights, strict=True)])
    if how == "max":
        merged = torch.where(stack.isnan().any(0), torch.nan, stack.amax(0))
    else:
        merged = torch.zeros_like(stack[0])
        for term in stack:
            merged = merged + term
        merged = merged / len(fishers) if how == "mean" else merged
    return merged * scale


def ssd_modify_weight(
    p: torch.Tensor,
    original: torch.Tensor,
    forget: torch.Tensor,
    alpha: float,
    lam: float,
    exponent: float,
    cap: float,
    wanted: torch.Tensor | bool = True,
) -> torch.Tensor:
    """Change p as ParameterPerturber.modify_weight does, with the edges of docs/semantics.md; returns the selection.

    `wanted`: elements that may be selected.
    """
    oimp_norm = original.mul(alpha)
    chosen = (forget > oimp_norm) & wanted
    locations = torch.where(chosen)
    weight = original.mul(lam).div(forget)
    if exponent != 1:
        weight = weight.pow(exponent)
        weight[original == 0] = 0
    update = weight[locations]
    update[torch.where(update > cap)] = cap
    update[torch.where(forget[locations].isinf())] = 0
    p[locations] = p[locations].mul(update.to(p.dtype))
    return chosen
