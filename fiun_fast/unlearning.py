"""The ways in: `plan` for the models of a DAG, `dampen_` and `selection_profile` for one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .arguments import MERGE_RULES, MISMATCH_RULES, MergeRule, OnMismatch, check_number, check_one_of, renamed
from .compiling import ReachedNode, reached_node, reached_nodes, warn_of_unlike
from .dag import ForgetRequest, InheritanceDAG, Model, Node, check_model, check_requests
from .dtensors import parameters_of
from .errors import ArgumentError
from .estimating import Estimate, completed
from .fisher import Fisher, listed_fishers
from .gradient import Gradient
from .kernels import check_usable
from .kernels.table import Merging
from .planning import Plan
from .profile import SelectionProfile, profiles_of
from .ranks import Ranks, ranks_of, together
from .ratios import adaptive_percentile, check_fishers, check_forget_fraction, ratios_of
from .report import Report
from .spread import Spread, check_part
from .values import Number, PerGroup, PerNode, Values, check_early, narrowest, per_node, values_per_node


@renamed(share="forget_fraction")
def plan(
    dag: InheritanceDAG,
    requests: Iterable[ForgetRequest],
    *,
    alpha: PerGroup | str = 10.0,
    lam: PerGroup = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    merge: MergeRule = "max",
    scale: float = 1.0,
    on_mismatch: OnMismatch = "error",
    backend: str | None = None,
    forget_fraction: PerNode | None = None,
    estimate: Estimate | None = None,
) -> Plan:
    """Compile the unlearning of all requests in all models they reach (FIUn with MFIM, arXiv 2408.08493).

    In every node n with a request at itself or an ancestor: m = scale * reduce_k (w_k F_k) over those requests; where
    m > alpha I, theta <- theta * min((lam I / m)^exponent, cap). Where the requests have gradients, only if also
    g * theta < 0, g = sum_k (w_k g_k). docs/semantics.md has the edges.

    Args:
        dag: models, their original Fishers and who inherited from whom.
        requests: origin and forget Fisher of what is to be forgotten; or the data, as nodes may have.
        alpha: selection threshold; one number, or {node: number} that covers every node reached; "auto" chooses each
            node's as `adaptive_alpha` does, from its own ratios m / I. {node: {pattern: number}} has a number for each
            group of parameters: a pattern is a name or a glob of names in the node's Fisher; a parameter's own name
            wins, then the first glob that matches it, and "*" is for all that are left.
        lam: dampening constant; likewise, without "auto".
        exponent, cap: shape and upper bound of the factor.
        merge: "max" (MFIM), "mean" or "sum".
        scale: applied to the merged Fisher, last.
        on_mismatch: "error", or "skip" to leave out parameters that a forget Fisher does not have in that shape.
        backend: name of one; None for use_backend, FIUN_FAST_BACKEND, or the default, in this order.
        forget_fraction: for alpha="auto": |D_f| / |D| in (0, 1], one number or {node: number}.
        estimate: how Fishers are estimated where nodes or requests have data instead: a dict of keywords of
            `estimate_fisher`, such as {"estimator": "expected", "params": None, "loss_fn": loss}. By default that is
            the estimator `batch` over `params="last"`, the last layer; where some Fishers are given, the others are
            over the same parameters. Each is estimated once and kept with its node or request; nodes that share a
            loader are estimated in one sweep over it.

    Raises:
        FiunError: a subclass for each kind of bad input, naming node, parameter, expected and found. Nothing has been
            changed by then.
        EstimationError: data of which no Fisher can be estimated, as an iterator that is used up.

    """
    if not isinstance(dag, InheritanceDAG):
        raise ArgumentError(f"dag is a {type(dag).__name__}, expected an InheritanceDAG")
    options = Options(alpha, lam, exponent, cap, merge, scale, on_mismatch, backend, forget_fraction)

    def checked() -> Checked:
        listed = check_requests(requests)
        if ranks is not None and (dag.lacks_fishers or any(request.fisher is None for request in listed)):
            raise ArgumentError(
                "data= in the place of a Fisher, and models that are spread over ranks: estimate_fisher estimates the "
                "Fishers of such models; pass these"
            )
        if dag.lacks_fishers or any(request.fisher is None for request in listed):
            options.check(dag, listed)
        listed, originals = completed(dag, listed, estimate, backend)
        nodes = reached_nodes(dag, listed, originals)
        reached = {node.name for node in nodes}
        return nodes, listed, {name: dag[name].model for name in dag if name not in reached}

    ranks = ranks_of(node.model for node in dag.held().values())
    return _made(checked, ranks, options)


@renamed(share="forget_fraction")
def dampen_(
    model: Model,
    original: Fisher,
    forget: Fisher | Sequence[Fisher],
    *,
    gradient: Gradient | Sequence[Gradient] | None = None,
    alpha: Number | str = 10.0,
    lam: Number = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    merge: MergeRule = "max",
    scale: float = 1.0,
    on_mismatch: OnMismatch = "error",
    backend: str | None = None,
    forget_fraction: float | None = None,
    dry_run: bool = False,
    undo: bool = False,
    audit: bool = False,
) -> Report:
    """Dampen one model in place: Selective Synaptic Dampening (arXiv 2308.07707), the one-node case of `plan`.

    Args:
        model: module, or dict of tensors.
        original: Fisher over the data the model was trained on.
        forget: Fisher over the data to be forgotten; several are merged on the fly.
        gradient: of the loss on that data, one for each forget Fisher; then only elements whose gradient and value
            differ in sign are selected, those that raise this loss as they shrink (`ForgetRequest`).
        alpha, lam, exponent, cap, merge, scale, on_mismatch, backend, forget_fraction: as in `plan`; alpha and lam are
            numbers here, or {pattern: number}; forget_fraction is a number, and alpha may be "auto".
        dry_run, undo, audit: as in `Plan.run_`.

    Returns:
        A report whose totals (`.selected`, `.zeroed`, …) are those of the model; its node is called "model".

    Raises:
        FiunError: as `plan`.

    """
    alphas, lams = ({"model": one} if isinstance(one, Mapping) else one for one in (alpha, lam))
    options = Options(alphas, lams, exponent, cap, merge, scale, on_mismatch, backend, forget_fraction)  # type: ignore[arg-type]
    return _plan_of_one(model, original, forget, gradient, options).run_(dry_run=dry_run, undo=undo, audit=audit)


def selection_profile(
    original: Fisher,
    forget: Fisher | Sequence[Fisher],
    model: Model | None = None,
    *,
    gradient: Gradient | Sequence[Gradient] | None = None,
    merge: MergeRule = "max",
    scale: float = 1.0,
    backend: str | None = None,
) -> SelectionProfile:
    """One pass over two Fishers: how many elements any alpha would select, and with a model what norm would go.

    Args:
        original: Fisher I over the data the model was trained on.
        forget: Fisher F over the data to be forgotten; several are merged on the fly.
        model: whose parameters the Fishers belong to; for `removed`, which costs a second pass in plain torch, and
            for `gradient`.
        gradient: as in `dampen_`; elements that the sign rules out are then among `never`.
        merge, scale: as in `plan`.
        backend: name of one; None for the default.

    Raises:
        ArgumentError: a gradient without a model, whose signs it is compared with; or as `adaptive_alpha`.
        LayoutError, DTypeError, DeviceError, BackendError: as `adaptive_alpha`.

    """
    if model is None:
        if gradient is not None:
            raise ArgumentError("gradient= needs model=: signs are compared with those of its parameters")
        ratios = ratios_of(original, forget, merge=merge, scale=scale, backend=backend)
        return profiles_of(ratios, [original.numel])[0]
    forgets = check_fishers(original, forget)
    options = Options(merge=merge, scale=scale, backend=backend)
    return _plan_of_one(model, original, forgets, gradient, options).profile(norms=True)["model"]


# nodes that requests reach, the requests, and the models of all other nodes
Checked = tuple[list[ReachedNode], list[ForgetRequest], dict[str, Model]]


@dataclass(frozen=True)
class Options:
    """The options of `plan`, as they were given."""

    alpha: PerGroup | str = 10.0
    lam: PerGroup = 1.0
    exponent: float = 1.0
    cap: float = 1.0
    merge: MergeRule = "max"
    scale: float = 1.0
    on_mismatch: OnMismatch = "error"
    backend: str | None = None
    forget_fraction: PerNode | None = None

    def check(self, dag: InheritanceDAG, requests: Sequence[ForgetRequest]) -> None:
        """All that can be checked before there are Fishers, so that none is estimated in vain.

        Raises:
            FiunError: as `plan`.

        """
        check_one_of("merge", self.merge, MERGE_RULES)
        check_one_of("on_mismatch", self.on_mismatch, MISMATCH_RULES)
        for what in ("exponent", "cap", "scale"):
            check_number(what, getattr(self, what))
        reached = dag.reached(requests)
        for node, reaching in reached:
            if node.data is None:
                reached_node(node, reaching)  # which says that it has no Fisher
        nodes = [node for node, _ in reached]
        _forget_fractions(self, nodes, dag)
        for what, given in (("alpha", self.alpha), ("lam", self.lam)):
            if not isinstance(given, str):
                check_early(what, given, dag, nodes)
        tensors = parameters_of(node.model for node in nodes)
        check_usable(self.backend, dict.fromkeys(t.device.type for t in tensors if isinstance(t, torch.Tensor)))


def _plan_of_one(
    model: Model,
    original: Fisher,
    forget: Fisher | Sequence[Fisher],
    gradient: Gradient | Sequence[Gradient] | None,
    options: Options,
) -> Plan:
    """A plan for one model without a DAG; its node is called "model"."""
    check_model("model", model)

    def checked() -> Checked:
        if not isinstance(original, Fisher):
            raise ArgumentError(f"original is a {type(original).__name__}, expected a fiun_fast.Fisher")
        forgets = listed_fishers("forget", forget)
        gradients = [None] * len(forgets) if gradient is None else _listed_gradients(gradient, len(forgets))
        pairs = zip(forgets, gradients, strict=True)
        requests = check_requests([ForgetRequest("model", one, gradient=its) for one, its in pairs])
        return [ReachedNode("model", model, original, tuple(range(len(requests))))], requests, {}

    return _made(checked, ranks_of([model]), options)


def _listed_gradients(gradient: Gradient | Sequence[Gradient], fishers: int) -> Sequence[Gradient | None]:
    """One for each forget Fisher."""
    if isinstance(gradient, Gradient):
        listed = [gradient]
    elif isinstance(gradient, (str, Mapping, torch.Tensor)) or not isinstance(gradient, Iterable):
        raise ArgumentError(f"gradient is a {type(gradient).__name__}, expected a fiun_fast.Gradient or a list of them")
    else:
        listed = list(gradient)
    if len(listed) != fishers:
        raise ArgumentError(f"{len(listed)} gradients for {fishers} forget Fishers: one is needed for each")
    return listed


def made(nodes: list[ReachedNode], requests: list[ForgetRequest], bystanders: dict[str, Model], o: Options) -> Plan:
    """Check the options, compile, bind, of models that are all here; with alpha="auto" choose each node's alpha."""
    known = frozenset(node.name for node in nodes) | frozenset(bystanders)
    return Making(nodes, requests, bystanders, known, o, None).finished()


def _made(checked: Callable[[], Checked], ranks: Ranks | None, o: Options) -> Plan:
    """Check everything, compile, bind; with alpha="auto" choose each node's alpha from its ratios.

    Where models are spread over ranks, either all of them come to a plan, or none does.
    """
    with together(ranks) as facts:
        nodes, requests, bystanders = checked()
        known = frozenset(node.name for node in nodes) | frozenset(bystanders)
        spread = None if ranks is None else Spread(ranks, nodes, requests, bystanders)
        making = Making(nodes, requests, bystanders, known, o, spread)
        if spread is not None:
            facts |= spread.said(making.merging, making.values, making.shape, making.auto, o.on_mismatch)
    return making.finished()


class Making:
    """A plan in the making: first all that a rank can do by itself, then what takes all of them."""

    def __init__(
        self,
        nodes: list[ReachedNode],
        requests: list[ForgetRequest],
        bystanders: dict[str, Model],
        known: frozenset[str],
        o: Options,
        spread: Spread | None,
    ) -> None:
        """Check the options, compile and bind; `known` are the names of all nodes of the DAG."""
        check_one_of("merge", o.merge, MERGE_RULES)
        if spread is None:
            for node in nodes:
                if node.fisher.layout.sharded:
                    check_part(node)
        dtype = narrowest(request.fisher for request in requests)
        fractions = _forget_fractions(o, nodes, known)
        alpha = 0.0 if isinstance(o.alpha, str) else o.alpha
        self.values = Values.of(nodes, known, dtype, alpha, o.lam)
        exponent, cap, scale = (check_number(what, getattr(o, what), dtype) for what in ("exponent", "cap", "scale"))
        self.merging, self.shape = Merging(o.merge, scale), (exponent, cap)
        rules = {"on_mismatch": o.on_mismatch, "backend": o.backend, "spread": spread}
        of = nodes, requests, bystanders, self.merging, self.values
        self._plan = Plan(*of, exponent=exponent, cap=cap, **rules)  # type: ignore[arg-type]
        self._nodes, self._requests, self._fractions = nodes, requests, fractions

    @property
    def auto(self) -> str:
        """What alpha will be chosen by; empty where it is a number."""
        return "" if self._fractions is None else f"that of forget_fraction={self._fractions.tolist()}"

    def finished(self) -> Plan:
        """The plan; with alpha="auto" each node's alpha is chosen from its ratios, over all ranks."""
        nodes, requests, made = self._nodes, self._requests, self._plan
        warn_of_unlike(nodes, requests)
        if self._fractions is not None:
            q = np.array([adaptive_percentile(fraction) for fraction in self._fractions])
            made.set_values_(alpha=dict(zip(made.nodes, made.ratios().percentiles(q).tolist(), strict=True)))
        return made


def _forget_fractions(
    o: Options, nodes: Sequence[ReachedNode] | Sequence[Node], known: Iterable[str]
) -> np.ndarray | None:
    """Of each node, where alpha is "auto"."""
    if not isinstance(o.alpha, str):
        if o.forget_fraction is not None:
            raise ArgumentError('forget_fraction is for alpha="auto" only')
        return None
    if o.alpha != "auto":
        raise ArgumentError(f'alpha is a str, {o.alpha!r}, expected a number, {{node: number}} or "auto"')
    given: PerNode = check_forget_fraction("forget_fraction", None) if o.forget_fraction is None else o.forget_fraction
    checked = values_per_node("forget_fraction", given, known, check_forget_fraction)
    return per_node("forget_fraction", checked, nodes)
