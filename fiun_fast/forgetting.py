"""`unlearn_`: the whole job in one call. Missing Fishers, estimator, alpha and lambda of every node, one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from .arguments import (
    ESTIMATORS,
    TUNE_BY,
    Estimator,
    MergeRule,
    OnMismatch,
    TuneBy,
    check_count,
    check_function,
    check_number,
    check_numbers,
    check_one_of,
)
from .centring import Centring, of_probabilities, roles_of
from .compiling import ReachedNode, reached_nodes
from .dag import ForgetRequest, InheritanceDAG, Model, check_requests
from .errors import ArgumentError, NotForgottenError, TuningWarning, warn
from .estimating import Complete, Estimate, check_estimate, complete_for, options_for
from .estimators.job import OWN_LOSSES
from .estimators.job import Options as EstimateOptions
from .fisher import Fisher
from .grids import Evaluate
from .outcome import Bound, NodeOutcome, Outcome, how_far
from .planning import Plan
from .ranks import ranks_of
from .scope import LAST, Params, layers_of
from .scores import ClassScore, Score, Seen
from .tuned import Tuned
from .tuning import tune_plan
from .unlearning import Options, made
from .values import Choice

BEST: tuple[Estimator, ...] = ("softened", "expected")  # docs/choosing.md compares them
SAMPLES = 512
LAMBDAS, POINTS = (0.01,), 24  # docs/choosing.md: 0.01 alone does as well as three values
ONE = "model"  # the node of a model without a DAG
Ways = Callable[[list[Any]], list[EstimateOptions]]  # of these estimators; of those asked for where there are none


def unlearn_(
    dag: InheritanceDAG | nn.Module,
    requests: Iterable[ForgetRequest] | None = None,
    score: Evaluate | None = None,
    *,
    data: Iterable[Any] | Fisher | None = None,
    forget: Iterable[Any] | Fisher | None = None,
    params: Params = LAST,
    estimators: Sequence[Estimator] | Estimator | None = None,
    left: float = 0.01,
    lost: float = 0.02,
    strict: bool = False,
    center: bool = True,
    estimate: Estimate | None = None,
    samples: int | None = SAMPLES,
    by: TuneBy | None = None,
    lams: Iterable[float] | None = None,
    points: int | None = None,
    merge: MergeRule = "max",
    scale: float = 1.0,
    on_mismatch: OnMismatch = "error",
    backend: str | None = None,
    progress: bool = False,
) -> Outcome:
    """Forget what the requests say in every model they reach, with all that is to be chosen chosen on validation data.

    For each estimator: the Fishers that are missing are estimated, in one sweep over each loader for all estimators,
    and alpha and lambda tuned (`tune`). Each node takes what scores best of what meets the bound; where nothing does,
    what scores best, of candidates with centred rows too (`center`). Then all nodes are dampened, in one run that can
    be undone.

        score = ff.ClassScore(validation, forget=[3])
        outcome = ff.unlearn_(dag, [ff.ForgetRequest("u0", data=forget_loader)], score)
        outcome = ff.unlearn_(model, data=loader, forget=forget_loader, score=score)  # one model, its node is "model"

    Args:
        dag: the models, with original Fishers or `data=`; or one model.
        requests: as in `plan`, with Fishers or `data=`.
        score: `ClassScore`, `SequenceScore`, or any evaluate(name, model) -> score, higher is better.
        data, forget: for one model: a loader over what it was trained on, and one over what is to be forgotten; or
            their Fishers.
        params: which parameters may change, as for `estimate_fisher`: the last layer, or None for all.
        estimators: what to try; None: `softened` and `expected`, or `batch` where `estimate` has a loss_fn, which these
            do not take. Where some Fishers are given, the others are estimated as those were, over the same
            parameters, and nothing else is tried.
        left, lost: the bound: of the forgotten at most `left` is left, of what was kept before at most `lost` is lost,
            shares, 0..1, of what the score measures. A score that says nothing but a number has to beat leaving the
            node alone.
        strict: a node where nothing meets the bound is an error; else it is named in the outcome and in a warning.
        center: where nothing meets the bound at a node, and `score` is a `ClassScore`, take the mean of the rows off
            weight and bias of its last layer (in float64, rounded once) and try all once more with the same Fishers but
            those of `label_free`. If what comes out meets the bound, or scores higher, that stays; else the layer gets
            its old bits back. Why: dampening pulls logits towards 0, and training with cross entropy does not say where
            0 is, so that it may be the highest; measured in docs/choosing.md, "On other data". No softmax changes by it
            but by rounding, nor do Fishers of a loss of the softmax: `softened`, `batch`, `sample`, `expected`. Pass
            False where anything else is made of the logits, such as sigmoids. It is not done where the scope of a node
            is not exactly one `nn.Linear` whose output itself, in its own dtype, was seen to be the logits; where that
            is tied, hooked or computed from others; where a Fisher does not cover it or say how it was made; and where
            a `loss_fn` in `estimate` is no function of the probabilities.
        estimate: further keywords of `estimate_fisher` (loss_fn, forward_fn, …), each for the estimators that take it.
        samples: of each loader that says its length about so many are used for a Fisher, in at least 8 batches spread
            over all of it; None: all.
        by, lams, points: as in `tune`; `by` is "layer" where more than one layer is in scope, unless something else is
            said. By node the defaults are 0.01 and 24.
        merge, scale, on_mismatch, backend: as in `plan`.
        progress: show progress bars.

    Returns:
        What was chosen and reached, node by node; `undo_` puts every bit back.

    Warns:
        TuningWarning: at some node nothing meets the bound.

    Raises:
        NotForgottenError: the same, with strict=True. No model has changed.
        ArgumentError: arguments that do not go together, an unknown estimator, an `estimate` with other keywords.
        FiunError: as `plan`, `tune` and `estimate_fisher`. No model has changed.

    """
    family, listed = _family(dag, requests, data, forget)
    if ranks_of(node.model for node in family.held().values()) is not None:
        raise ArgumentError(
            "a model is spread over ranks: use estimate_fisher, tune and plan there (docs/distributed.md); unlearn_ is "
            "for models that one process has"
        )
    if score is None:
        raise ArgumentError("score is missing: what is wanted of a model, such as ClassScore(validation, forget=[3])")
    check_function("score", score, "name", "model")
    bound = Bound(check_number("left", left), check_number("lost", lost))
    ways = _ways(estimators, estimate, backend)
    if by is not None:
        check_one_of("by", by, TUNE_BY)
    lams = None if lams is None else check_numbers("lams", lams)
    if points is not None:
        check_count("points", points)
    if samples is not None:
        check_count("samples", samples)
    options = Options(alpha=0.0, merge=merge, scale=scale, on_mismatch=on_mismatch, backend=backend)
    options.check(family, listed)
    seconds = dict.fromkeys(("Fishers", "choosing", "run"), 0.0)
    models = {node.name: node.model for node, _ in family.reached(listed)}
    if isinstance(score, Score):
        with _timed(seconds, "choosing"):  # first, as validation data may be wrong, too
            score.begin(models)
    with _timed(seconds, "Fishers"):
        kinds = _kinds(family, listed, params, ways, samples, progress)
    with _timed(seconds, "choosing"):
        reached = {kind: reached_nodes(family, of.requests, of.originals) for kind, of in kinds.items()}
        plans = {kind: _made(family, reached[kind], of.requests, options) for kind, of in kinds.items()}
        by = by or ("layer" if any(_has_layers(node) for node in reached[next(iter(reached))]) else "node")
        if by == "node":
            lams, points = LAMBDAS if lams is None else lams, POINTS if points is None else points
        how: dict[str, Any] = {"by": by, "lams": lams, "points": points, "progress": progress}
        tried = {kind: _tried(kind, plan, score, how) for kind, plan in plans.items()}
        chosen = {name: _best([one for those in tried.values() for one in those.of(name)], bound) for name in models}
    with Centring() as centring:
        if center and isinstance(score, ClassScore):
            with _timed(seconds, "choosing"):
                missed = [name for name, one in chosen.items() if not one.meets(bound)]
                loss_fn = None if estimate is None else estimate.get("loss_fn")
                where = _centre_(centring, missed, reached, kinds, score, loss_fn)
                again = {kind: _made(family, some, kinds[kind].requests, options) for kind, some in where.items()}
                those = {kind: _tried(kind, plan, score, how) for kind, plan in again.items()}
                tried |= {f"{kind}, rows centred": one for kind, one in those.items()}
                chosen |= _better(centring, chosen, those.values(), bound)
        unmet = [one for one in chosen.values() if not one.meets(bound)]
        if unmet:
            said = "; ".join(one.said() for one in unmet[:8]) + f"; and {len(unmet) - 8} nodes more" * (len(unmet) > 8)
            if strict:
                raise NotForgottenError(f"{said}; wanted {bound}. No model has changed")
            warn(f"unlearn_: {said}; wanted {bound}", TuningWarning)
        with _timed(seconds, "run"):
            kind_of = {name: one.kind for name, one in chosen.items()}
            plan = plans[min(kind_of.values())]
            if len(set(kind_of.values())) > 1:
                plan = _made(family, *_side_by_side(kinds, reached, kind_of), options)
            plan.set_values_({name: one.choice for name, one in chosen.items()})
            report = plan.run_(undo=True)
        try:
            after: dict[str, Seen] = {}
            centring.join_(report)
            if isinstance(score, Score):
                with _timed(seconds, "choosing"):
                    after = {name: score.looked(name, model) for name, model in models.items()}
            nodes = {}
            for name, one in chosen.items():
                did = (one.choice.alpha, one.choice.lam, one.choice.score, report[name].selected, report[name].numel)
                seen = (one.before, after.get(name))
                nodes[name] = NodeOutcome(name, one.kind, *did, *seen, one.meets(bound), one.doubt, name in centring)
            tuned = {kind: those.tuned for kind, those in tried.items()}
            return Outcome(nodes, bound, seconds, report, tuned, plan)
        except BaseException:  # whoever gets no outcome could not undo it
            report.undo_()
            raise


@dataclass(frozen=True)
class _Found:
    """One candidate at one node."""

    node: str
    kind: str  # of Fishers
    choice: Choice
    alone: float  # score of the node as it was
    before: Seen | None
    seen: Seen | None
    doubt: str

    def meets(self, bound: Bound) -> bool:
        if self.before is None or self.seen is None:
            return self.choice.score > self.alone
        return self.seen.within(self.before, bound.left, bound.lost)

    def said(self) -> str:
        """How far it comes."""
        return how_far(self.node, self.choice.score, self.before, self.seen)


def _best(found: Sequence[_Found], bound: Bound) -> _Found:
    """The highest score of those that meet the bound; of all, where none does. The first of equals."""
    return max([one for one in found if one.meets(bound)] or found, key=lambda one: one.choice.score)


class _Tried:
    """All that was tried with the Fishers of one kind."""

    def __init__(self, kind: str, tuned: Tuned, seen: Mapping[str, Sequence[Seen]], before: Mapping[str, Seen]) -> None:
        self._kind, self.tuned, self._seen, self._before = kind, tuned, seen, before

    def of(self, name: str) -> list[_Found]:
        """The candidates at a node, in the order in which they were tried; by layer these are steps on one way.

        Of them the first and the chosen one count, then: leaving alone, and where the way ended.
        """
        points, best = self.tuned.points[name], self.tuned[name]
        seen: Sequence[Seen | None] = self._seen.get(name) or [None] * len(points)
        by_layer, found = any(point.layer for point in points), []
        for k, (point, one) in enumerate(zip(points, seen, strict=True)):
            choice = Choice(point.alpha, point.lam, point.score)
            if by_layer and k and choice != best:
                continue
            doubt = self.tuned.doubts.get(name, "") if choice == best else ""
            found.append(_Found(name, self._kind, choice, points[0].score, self._before.get(name), one, doubt))
        return found


def _has_layers(node: ReachedNode) -> bool:
    """Whether more than one layer of the node is in scope."""
    return len(layers_of(node.model, node.fisher.layout.names)) > 1


class _Noting:
    """A score that keeps what it saw at each call."""

    def __init__(self, score: Evaluate) -> None:
        self._score = score
        self.seen: dict[str, list[Seen]] = {}
        # tuning by layer goes by what was measured
        self.last: Any = {} if isinstance(score, Score) else getattr(score, "last", None)

    def __call__(self, name: str, model: Model) -> float:
        value, score = self._score(name, model), self._score
        if isinstance(score, Score):
            seen = score.last.get(name) if isinstance(score.last, Mapping) else None
            # a call that was overridden may leave nothing there
            self.last[name] = seen if isinstance(seen, Seen) else score.looked(name, model)
            self.seen.setdefault(name, []).append(self.last[name])
        return value


def _tried(kind: str, plan: Plan, score: Evaluate, how: Mapping[str, Any]) -> _Tried:
    noting = _Noting(score)
    tuned = tune_plan(plan, noting, **how)
    return _Tried(kind, tuned, noting.seen, score.before if isinstance(score, Score) else {})


def _centre_(
    centring: Centring,
    names: Sequence[str],
    reached: Mapping[str, list[ReachedNode]],
    kinds: Mapping[str, Complete],
    score: ClassScore,
    loss_fn: Any,
) -> dict[str, list[ReachedNode]]:
    """Take the mean of the rows off the last layers of these nodes; kind -> where its Fishers still hold."""
    found: dict[str, list[ReachedNode]] = {}
    for kind, nodes in reached.items():
        for node in nodes if names else ():
            layer = score.head(node.name) if node.name in names else None
            roles = roles_of(node, kinds[kind].requests, layer)
            if roles is None or not isinstance(layer, nn.Linear):
                continue
            if node.name not in centring and of_probabilities(loss_fn, layer.out_features, layer.weight):
                centring.centre_(node.name, layer, roles)
            if node.name in centring:
                found.setdefault(kind, []).append(node)
    return found


def _better(
    centring: Centring, chosen: Mapping[str, _Found], tried: Iterable[_Tried], bound: Bound
) -> dict[str, _Found]:
    """What is better with centred rows than all before; other nodes get their rows back."""
    found, those = {}, list(tried)
    for name in centring:
        dampened = [one for its in those if name in its.tuned for one in its.of(name)[1:]]  # the first is left alone
        best = _best(dampened, bound) if dampened else chosen[name]
        if best.meets(bound) or best.choice.score > chosen[name].choice.score:
            found[name] = best
        else:
            centring.put_back_(name)
    return found


def _family(
    dag: Any, requests: Iterable[ForgetRequest] | None, data: Any, forget: Any
) -> tuple[InheritanceDAG, list[ForgetRequest]]:
    """A DAG and requests, also of one model."""
    if isinstance(dag, InheritanceDAG):
        if data is not None or forget is not None:
            raise ArgumentError("data= and forget= are for one model; of a DAG, add_model and ForgetRequest have them")
        if requests is None:
            raise ArgumentError("requests are missing: [ForgetRequest(origin, data=loader)]")
        return dag, check_requests(requests)
    if not isinstance(dag, nn.Module):
        raise ArgumentError(f"dag is a {type(dag).__name__}, expected an InheritanceDAG or a module")
    if requests is not None:
        raise ArgumentError("requests are for a DAG; for one model pass data=, forget= and score=")
    for what, given in (("data", data), ("forget", forget)):
        if given is None:
            raise ArgumentError(f"{what} is missing: for one model pass data=, forget= and score=")
    family = InheritanceDAG()
    family.add_model(ONE, dag, **({"fisher": data} if isinstance(data, Fisher) else {"data": data}))
    one = ForgetRequest(ONE, forget) if isinstance(forget, Fisher) else ForgetRequest(ONE, data=forget)
    return family, check_requests([one])


def _ways(estimators: Any, estimate: Estimate | None, backend: str | None) -> Ways:
    """Estimators -> options, which takes care of what each of them does not take."""
    keywords = check_estimate(estimate)
    if estimators is None:
        estimators = ("batch",) if keywords.get("loss_fn") is not None else BEST
    if not isinstance(estimators, Iterable):
        raise ArgumentError(f"estimators is a {type(estimators).__name__}, expected some of {', '.join(ESTIMATORS)}")
    listed: list[Any] = [estimators] if isinstance(estimators, str) else list(estimators)
    for one in listed:
        check_one_of("estimator", one, ESTIMATORS)
    if not listed:
        raise ArgumentError(f"estimators is empty, expected some of {', '.join(ESTIMATORS)}")
    own = {"params": "params=", "estimator": "estimators=", "progress": "progress="}
    for name in keywords:
        if name in own:
            raise ArgumentError(f"estimate has {name!r}, which is an argument of unlearn_ itself: {own[name]}")
    if keywords.get("loss_fn") is not None and all(one in OWN_LOSSES for one in listed):
        raise ArgumentError(
            f'estimate has a loss_fn, and {", ".join(listed)} have losses of their own: take estimators="batch" or '
            '"sample" for it, or leave it out'
        )
    ways = partial(options_for, keywords={"backend": backend} | keywords)
    ways(listed)  # says what is wrong with them
    return lambda given: ways(given or listed)


def _kinds(
    family: InheritanceDAG, requests: list[ForgetRequest], params: Params, ways: Ways, most: int | None, progress: bool
) -> dict[str, Complete]:
    """Fishers of each kind, by the name of their estimator; where some are given, of their kind alone."""
    fishers = [*(one.fisher for one in requests), *(node.fisher for node, _ in family.reached(requests))]
    given = [fisher for fisher in fishers if fisher is not None]
    known = list(dict.fromkeys(name for fisher in given for name in sorted(fisher.provenance.estimators)))
    if len(given) == len(fishers):
        return {", ".join(known) or "given": Complete(requests, {})}
    options = ways(known[:1])
    found = complete_for(family, requests, params, options, most=most, progress=progress)
    return dict(zip([one.estimator for one in options], found, strict=True))


def _side_by_side(
    kinds: Mapping[str, Complete], reached: Mapping[str, list[ReachedNode]], kind_of: Mapping[str, str]
) -> tuple[list[ReachedNode], list[ForgetRequest]]:
    """Nodes with Fishers of different kinds, for one plan: each meets the requests of its kind."""
    nodes, requests = {}, list[ForgetRequest]()
    for kind in dict.fromkeys(kind_of.values()):
        first = len(requests)
        requests += kinds[kind].requests
        for node in reached[kind]:
            if kind_of[node.name] == kind:
                nodes[node.name] = replace(node, requests=tuple(first + k for k in node.requests))
    return [nodes[name] for name in kind_of], requests


def _made(family: InheritanceDAG, nodes: list[ReachedNode], requests: list[ForgetRequest], options: Options) -> Plan:
    reached = {node.name for node in nodes}
    return made(nodes, requests, {name: family[name].model for name in family if name not in reached}, options)


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - began
