"""Choosing alpha and lambda on validation data, for every node of a DAG at once and without copies of the models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .arguments import (
    TUNE_BY,
    MergeRule,
    OnMismatch,
    TuneBy,
    check_count,
    check_function,
    check_number,
    check_numbers,
    check_one_of,
)
from .dag import ForgetRequest, InheritanceDAG, check_requests
from .errors import ArgumentError, TuningWarning, warn
from .estimating import Estimate
from .grids import Evaluate, default_grids, left_alone, ranks_of_plan, score_of, watched
from .layer_tuning import LAST_LAMBDAS, LAST_POINTS, SLACK, tune_layers
from .planning import Plan, Trials
from .profile import SelectionProfile
from .ranks import Fact, ranks_of, together
from .tuned import TriedPoint, Tuned
from .unlearning import plan
from .values import Choice

LAMBDAS = (1.0, 0.1, 0.01)
POINTS = 32
SPENT = 0.01  # what is selected keeps less than lambda / alpha of itself; below this a smaller lambda hardly matters


def tune(
    dag: InheritanceDAG,
    requests: Iterable[ForgetRequest],
    evaluate: Evaluate,
    *,
    by: TuneBy = "node",
    alphas: Iterable[float] | Mapping[str, Iterable[float]] | None = None,
    lams: Iterable[float] | None = None,
    points: int | None = None,
    slack: float = SLACK,
    merge: MergeRule = "max",
    scale: float = 1.0,
    on_mismatch: OnMismatch = "error",
    backend: str | None = None,
    estimate: Estimate | None = None,
    progress: bool = False,
) -> Tuned:
    """Choose alpha and lambda of every node that the requests reach: the pair with the highest score.

    Each grid point dampens all nodes in one launch, every node with its own alpha; each node is scored, and the
    elements that were selected get their old bits back. One log, taken at the lowest alpha of the grid, serves all
    points. Points of a node that select the same elements are scored once. Leaving the node alone is always one of
    them, and the first. Of equal scores the one tried first wins: lambdas in the order given, in each the highest alpha
    first.

    With by="layer" every layer gets an alpha of its own, for Fishers of more than the last one. First the last layer is
    tuned as above, all others left alone. Then the layers before it follow, from the last to the first: of each, the
    largest share of 40, 20, 10, 5, 2, 1 and 0.5 % of its elements is dampened with lambda 0.1 that validation data can
    bear; it is left alone where they bear none. All nodes take their steps in the same launches.
    A step is borne where the score is at most `slack` below that of the last layer alone. Where `evaluate` measures, it
    is borne where no more is `left`, what is `kept` is at most `slack` below what was kept at first, or no less than by
    the last layer alone where that is lower, and of the mean probabilities of the true labels that of what is to be
    forgotten, `sure_left`, has risen and that of the rest, `sure_kept`, fallen by at most 0.01. It measures if it has a
    dict `last`: node -> what the last call saw, an object with these attributes, as `ClassScore`; the last two may be
    missing.

    Args:
        dag, requests: as in `plan`.
        evaluate: (name, model) -> score of the dampened model on the caller's validation data; higher is better. It
            may not train or move the model.
        by: "node", one alpha for all parameters of a node; or "layer". A layer is a module that owns parameters; the
            last one is what `last_layer` says, the others follow in the reverse order of registration.
        alphas: the grid, or {node: grid}; None: of each node `points` values from its `plan.profile()`, so that the
            share selected runs from one element to 70 % in even steps of its logarithm. By layer it is always that.
        lams: default 1, 0.1, 0.01; by layer those of the last one, default 0.01.
        points: of the default grid, default 32; by layer of that of the last one, default 24.
        slack: by layer, see above.
        merge, scale, on_mismatch, backend, estimate: as in `plan`.
        progress: show a progress bar.

    Returns:
        {node: Choice} with every point tried; `Plan.set_values_` takes it. By layer a choice has {pattern: number}. A
        node that is best left alone has an alpha that selects nothing. All models are as before, also when `evaluate`
        raises.

    Warns:
        TuningWarning: at some node no point beats leaving it alone; or, by node, the best is at the edge of the grid,
            so that something beyond may be better: the lowest alpha, the highest of a grid that was given, the smallest
            lambda unless less than 1 % stays of what is selected, the largest below 1.

    Raises:
        ArgumentError: an empty grid, or one for layers; a number out of range, an `evaluate` that takes other
            arguments, or a score that is no number or NaN.
        FiunError: as `plan`.

    """
    check_function("evaluate", evaluate, "name", "model")
    how: dict[str, Any] = {"merge": merge, "scale": scale, "on_mismatch": on_mismatch, "backend": backend}
    grid: dict[str, Any] = {"by": by, "alphas": alphas, "lams": lams, "points": points, "slack": slack}
    if isinstance(dag, InheritanceDAG) and ranks_of(node.model for node in dag.held().values()) is None:
        grid = _checked(**grid)  # before any Fisher is estimated; ranks raise together, below
        requests = check_requests(requests)
        if alphas is not None:
            _grids(dag.reached_by(requests), grid["alphas"])
    compiled = plan(dag, requests, alpha=0.0, estimate=estimate, **how)
    return _said("tune", tune_plan(compiled, evaluate, **grid, progress=progress))


def tune_plan(
    compiled: Plan,
    evaluate: Evaluate,
    *,
    by: TuneBy = "node",
    alphas: Iterable[float] | Mapping[str, Iterable[float]] | None = None,
    lams: Iterable[float] | None = None,
    points: int | None = None,
    slack: float = SLACK,
    progress: bool = False,
) -> Tuned:
    """`tune` on a plan that there is already, without its warning; the plan's values are afterwards as before."""
    with together(ranks_of_plan(compiled)) as facts:
        given = _checked(by, alphas, lams, points, slack)
        lambdas, count, slack = (given[of] for of in ("lams", "points", "slack"))
        grid = None if alphas is None else _grids(compiled.nodes, given["alphas"])
        facts |= {"by": Fact(by), "alphas": Fact(grid), "lams": Fact(lambdas)}
        facts |= {"points": Fact(count), "slack": Fact(slack)}
    if by == "layer":
        return tune_layers(compiled, evaluate, lams=lambdas, points=count, slack=slack, progress=progress)
    grid = default_grids(compiled, count) if grid is None else grid
    grids = {name: sorted(set(one), reverse=True) for name, one in grid.items()}
    profiles = compiled.profile()
    tried = left_alone(compiled, profiles, evaluate)
    with compiled.trials(alpha={name: grid[-1] for name, grid in grids.items()}) as trials:
        candidates = _distinct(trials, grids, lambdas)
        for k in watched(range(max(map(len, candidates.values()))), progress):
            # a node that has no more to try waits at the top of its grid, and is not scored again
            both = {name: found[k] if k < len(found) else (grids[name][0], 1.0) for name, found in candidates.items()}
            report = trials.run(
                alpha={n: one[0] for n, one in both.items()}, lam={n: one[1] for n, one in both.items()}
            )
            for name, found in candidates.items():
                if k < len(found):
                    score = score_of(compiled, evaluate, name)
                    tried[name].append(TriedPoint(*found[k], report[name].selected, report[name].share, score))
    best = {name: max(found, key=lambda point: point.score) for name, found in tried.items()}  # the first of equals
    own = alphas is not None
    doubts = {name: _doubt(best[name], found, lambdas, profiles[name], own) for name, found in tried.items()}
    return Tuned(
        {name: Choice(point.alpha, point.lam, point.score) for name, point in best.items()},
        tried,
        {name: doubt for name, doubt in doubts.items() if doubt},
    )


def search_alpha(
    dag: InheritanceDAG,
    requests: Iterable[ForgetRequest],
    evaluate: Evaluate,
    *,
    rho: float = 0.2,
    start: float = 99.0,
    step: float = 0.5,
    lam: float = 1.0,
    merge: MergeRule = "max",
    scale: float = 1.0,
    on_mismatch: OnMismatch = "error",
    backend: str | None = None,
    estimate: Estimate | None = None,
    progress: bool = False,
) -> Tuned:
    """Choose alpha with no other data than what is to be forgotten, as PTN searches (Potion, arXiv 2406.09173).

    Alpha is a percentile of the node's finite ratios m / I. From `start` the percentile goes down by `step` until the
    accuracy on the forget data has fallen below rho times what it was before dampening, for the first time, whatever
    it would do later; each node stops by itself. A node that is at 0 before it starts is left alone.

    Args:
        dag, requests: as in `plan`.
        evaluate: (name, model) -> accuracy on the data to be forgotten.
        rho: share of the accuracy at the start, in (0, 1].
        start, step: percentile to begin with, and what it falls by each time.
        lam: dampening constant.
        merge, scale, on_mismatch, backend, estimate: as in `plan`.
        progress: show a progress bar.

    Returns:
        {node: Choice} with every point tried, score being the accuracy reached; where no percentile was low enough,
        that of the lowest. All models are as before.

    Warns:
        TuningWarning: at some node no percentile was low enough: the search failed there.

    Raises:
        ArgumentError: a number out of range, an `evaluate` that takes other arguments, no finite ratio at a node, or an
            accuracy that is no number, negative (a loss or a score instead) or NaN.
        FiunError: as `plan`.

    """
    check_function("evaluate", evaluate, "name", "model")
    lam = check_number("lam", lam)
    for what, value, least, most in (("rho", rho, 0, 1), ("start", start, 0, 100), ("step", step, 0, 100)):
        if not least < check_number(what, value) <= most:
            raise ArgumentError(f"{what} is {value:g}, expected more than {least} and at most {most}")
    how: dict[str, Any] = {"merge": merge, "scale": scale, "on_mismatch": on_mismatch, "backend": backend}
    compiled = plan(dag, requests, alpha=0.0, lam=lam, estimate=estimate, **how)
    with together(ranks_of_plan(compiled)) as facts:
        facts |= {"rho": Fact(rho), "start": Fact(start), "step": Fact(step)}
    names = compiled.nodes
    tried = left_alone(compiled, compiled.profile(), evaluate)
    goal = {name: rho * tried[name][0].score for name in names}
    for name in names:
        if goal[name] < 0:
            raise ArgumentError(f"evaluate({name!r}, …) gave {tried[name][0].score:g}, expected an accuracy, 0 or more")
    ratios = compiled.ratios()

    def there(name: str) -> bool:
        return goal[name] == 0 or tried[name][-1].score < goal[name]

    for k in watched(range(math.floor(start / step) + 1), progress):
        if all(there(name) for name in names):
            break
        q = np.full(len(names), start - k * step)
        alphas = dict(zip(names, ratios.percentiles(q).tolist(), strict=True))
        alphas |= {name: tried[name][-1].alpha for name in names if there(name)}
        with compiled.trials(alpha=alphas) as trials:  # a log for each level: it holds what that level selects
            report = trials.run()
            for node in report:
                if not there(node.name):
                    score = score_of(compiled, evaluate, node.name)
                    tried[node.name].append(TriedPoint(alphas[node.name], lam, node.selected, node.share, score))
    found = {name: Choice(points[-1].alpha, lam, points[-1].score) for name, points in tried.items()}
    failed = {
        name: f"the search failed: {choice.score:g} is left at the lowest percentile, wanted less than {goal[name]:g}"
        for name, choice in found.items()
        if not there(name)
    }
    return _said("search_alpha", Tuned(found, tried, failed))


def _checked(by: Any, alphas: Any, lams: Any, points: Any, slack: Any) -> dict[str, Any]:
    """Arguments of `tune` with their defaults, and lists where there may be iterators."""
    check_one_of("by", by, TUNE_BY)
    layered = by == "layer"
    if layered and alphas is not None:
        raise ArgumentError('alphas are of whole nodes: leave them out where by="layer"')
    lams = check_numbers("lams", (LAST_LAMBDAS if layered else LAMBDAS) if lams is None else lams)
    points, slack = (LAST_POINTS if layered else POINTS) if points is None else points, check_number("slack", slack)
    if alphas is None:
        points = check_count("points", points)
    elif isinstance(alphas, Mapping):
        alphas = {name: check_numbers(f"alphas[{name!r}]", one) for name, one in alphas.items()}
    else:
        alphas = check_numbers("alphas", alphas)
    return {"by": by, "alphas": alphas, "lams": lams, "points": points, "slack": slack}


def _grids(nodes: Iterable[str], alphas: list[float] | Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Of each node."""
    if not isinstance(alphas, Mapping):
        return dict.fromkeys(nodes, alphas)
    for name in nodes:
        if name not in alphas:
            raise ArgumentError(f"alphas has no grid for node {name!r}, which a request reaches")
    return {name: alphas[name] for name in nodes}


def _distinct(
    trials: Trials, grids: Mapping[str, Sequence[float]], lambdas: Sequence[float]
) -> dict[str, list[tuple[float, float]]]:
    """Pairs (alpha, lambda) of each node that differ in what they do, by dry runs: equal counts are equal selections.

    A lower alpha selects all that a higher one does, so that the counts tell.
    """
    counts: dict[str, dict[int, float]] = {name: {} for name in grids}
    for k in range(max(map(len, grids.values()))):
        alphas = {name: grid[min(k, len(grid) - 1)] for name, grid in grids.items()}
        for node in trials.run(alpha=alphas, dry_run=True):
            counts[node.name].setdefault(node.selected, alphas[node.name])
    return {
        name: [(alpha, lam) for lam in dict.fromkeys(lambdas) for selected, alpha in found.items() if selected]
        for name, found in counts.items()
    }


def _doubt(
    best: TriedPoint, tried: Sequence[TriedPoint], lambdas: Sequence[float], profile: SelectionProfile, given: bool
) -> str:
    """What there is to say against the best point of a node; nothing, mostly. `given`: the grid is the caller's."""
    if not best.selected:
        return "no point beats leaving it alone" if len(tried) > 1 else "no alpha selects anything"
    assert isinstance(best.alpha, float), "by node a point has one number of each kind"
    assert isinstance(best.lam, float), "by node a point has one number of each kind"
    alphas: list = [point.alpha for point in tried if point.selected]
    doubts = []
    if len(set(alphas)) > 1:
        if best.alpha == min(alphas) and best.selected < profile.always + profile.counts[1:].sum():
            doubts.append(f"the lowest alpha tried, {best.alpha:g}")
        elif given and best.alpha == max(alphas):
            doubts.append(f"the highest alpha tried, {best.alpha:g}")
    if len(set(lambdas)) > 1:
        if best.lam == min(lambdas) and best.lam > best.alpha * SPENT:
            doubts.append(f"the smallest lambda tried, {best.lam:g}")
        elif best.lam == max(lambdas) and best.lam < 1:
            doubts.append(f"the largest lambda tried, {best.lam:g}")
    return f"best at the edge of the grid: {' and '.join(doubts)}" if doubts else ""


def _said(who: str, found: Tuned) -> Tuned:
    """Warn of what there is to say, in one warning."""
    if found.doubts:
        lines = [f"node {name!r}: {doubt}" for name, doubt in list(found.doubts.items())[:8]]
        more = [f"and {len(found.doubts) - 8} nodes more"] if len(found.doubts) > 8 else []
        warn(f"{who}: " + "; ".join(lines + more), TuningWarning)
    return found
