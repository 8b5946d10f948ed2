"""Tuning layer by layer: the last layer first, then each layer before it, as far as validation data does not mind.

One alpha for a whole network is a bad bargain: where it removes a class from the last layer, it breaks the first ones,
whose F / I are distributed otherwise. So every layer gets its own, and none is dampened further than the layers after
it can bear.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

from .grids import Evaluate, alpha_above, alphas_of, even_grids, left_alone, ranks_of_plan, score_of, watched
from .planning import Choice, Plan
from .profile import profiles_of
from .scope import layers_of
from .tuned import TriedPoint, Tuned

SHARES = (0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)  # of a layer before the last, tried in this order
LAM = 0.1  # of these layers
LAST_LAMBDAS, LAST_POINTS = (0.01,), 24
SLACK = 0.005  # by how much the score may fall below that of the last layer alone, or what is kept below the start
SURER = 0.01  # by how much the mean probability of what is to be forgotten may rise
LESS_SURE = 0.01  # and that of the true labels of the rest fall
MEASURED = ("left", "kept", "sure_left", "sure_kept")  # attributes of what a score says besides
ALONE = "at the last layer no point beats leaving it alone"


class Trial(NamedTuple):
    """What a node is to be run with: an alpha and a lambda for each of its layers, [layers] each."""

    alphas: tuple[float, ...]
    lams: tuple[float, ...]
    layer: int  # the one that is being tried


class Answer(NamedTuple):
    """What came of it."""

    score: float
    seen: Any  # what a score that measures says besides: left, kept, and if it likes sure_left; None: nothing


@dataclass(frozen=True)
class Layer:
    """One layer of one node, as this tuning sees it."""

    patterns: tuple[str, ...]  # that mean its parameters and no others
    alphas: list[float]  # to be tried, in this order
    nothing: float  # an alpha that selects nothing


def tune_layers(
    compiled: Plan,
    evaluate: Evaluate,
    *,
    lams: Sequence[float] = LAST_LAMBDAS,
    points: int = LAST_POINTS,
    slack: float = SLACK,
    progress: bool = False,
) -> Tuned:
    """`tune` with by="layer" on a plan that there is already; the plan's values are afterwards as before."""
    before = compiled.values
    try:
        return _tuned(compiled, evaluate, lams, points, slack, progress)
    finally:
        compiled.take_values_(before)


def _tuned(
    compiled: Plan, evaluate: Evaluate, lams: Sequence[float], points: int, slack: float, progress: bool
) -> Tuned:
    tried = left_alone(compiled, compiled.profile(), evaluate)
    alone = {name: Answer(own[0].score, _seen(compiled, evaluate, name)) for name, own in tried.items()}
    layers = _layers(compiled, points)
    searches = {name: _search(own, lams, slack, alone[name]) for name, own in layers.items()}
    lowest = {name: _numbers(own, [min([*one.alphas, one.nothing]) for one in own]) for name, own in layers.items()}
    found: dict[str, Choice] = {}
    doubts: dict[str, str] = {}
    waiting: dict[str, Trial] = {}

    def go_on(name: str, answer: Answer | None) -> None:
        """To the next trial of a node, or to its end."""
        try:
            waiting[name] = searches[name].send(answer)  # type: ignore[arg-type]
        except StopIteration as stop:
            waiting.pop(name, None)
            trial, score = stop.value
            if trial is None:
                found[name], doubts[name] = Choice(tried[name][0].alpha, 1.0, score), ALONE
            else:
                found[name] = _choice(layers[name], trial, score)

    with compiled.trials(alpha=lowest) as trials:
        for name in layers:
            go_on(name, None)
        most = max(len(lams) * points + len(SHARES) * (len(own) - 1) for own in layers.values())
        for _ in watched(range(most), progress):
            if not waiting:
                break
            numbers = {name: _choice(layers[name], trial, 0.0) for name, trial in waiting.items()}
            alphas, lambdas = ({name: getattr(one, of) for name, one in numbers.items()} for of in ("alpha", "lam"))
            report = trials.run(alpha=alphas, lam=lambdas)
            for name, one in numbers.items():
                score, node = score_of(compiled, evaluate, name), report[name]
                layer = ", ".join(layers[name][waiting[name].layer].patterns)
                tried[name].append(TriedPoint(one.alpha, one.lam, node.selected, node.share, score, layer))
                go_on(name, Answer(score, _seen(compiled, evaluate, name)))
    return Tuned({name: found[name] for name in compiled.nodes}, tried, doubts)


def _search(
    layers: Sequence[Layer], lams: Sequence[float], slack: float, before: Answer
) -> Generator[Trial, Answer, tuple[Trial | None, float]]:
    """What to try at one node, from what came of it; layers [last, the one before, …, first].

    Returns:
        What was found, and its score; None where leaving the node alone is best.

    """
    nothing = tuple(layer.nothing for layer in layers)
    rest = (LAM,) * (len(layers) - 1)
    best: Trial | None = None
    reference = before
    for lam in lams:
        for alpha in layers[0].alphas:
            trial = Trial((alpha, *nothing[1:]), (lam, *rest), 0)
            answer = yield trial
            if answer.score > reference.score:
                best, reference = trial, answer
    if best is None:
        return None, before.score
    now = reference
    for k, layer in enumerate(layers[1:], start=1):
        for alpha in layer.alphas:
            trial = Trial((*best.alphas[:k], alpha, *nothing[k + 1 :]), best.lams, k)
            answer = yield trial
            if _bears(answer, reference, before, slack):
                best, now = trial, answer
                break
    return best, now.score


def _bears(answer: Answer, reference: Answer, before: Answer, slack: float) -> bool:
    """Whether a step is no worse than the last layer alone, within the slack, of which a dear one leaves none."""
    seen, least = answer.seen, reference.seen
    if seen is None or least is None:
        return answer.score >= reference.score - slack
    kept = least.kept - slack if before.seen is None else min(before.seen.kept - slack, least.kept)
    surer = getattr(seen, "sure_left", 0.0) - getattr(least, "sure_left", 0.0)
    less_sure = getattr(least, "sure_kept", 0.0) - getattr(seen, "sure_kept", 0.0)
    return bool(seen.left <= least.left and seen.kept >= kept and surer <= SURER and less_sure <= LESS_SURE)


def _seen(compiled: Plan, evaluate: Evaluate, name: str) -> Any:
    """What the last call measured, of a score that says so; else None. The mean over ranks, as of scores."""
    last, ranks = getattr(evaluate, "last", None), ranks_of_plan(compiled)
    seen = last.get(name) if isinstance(last, Mapping) else None
    try:
        float(seen.left), float(seen.kept)  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError, RuntimeError):
        seen = None  # `last` may be something of the caller's
    if ranks is None:
        return seen
    every = ranks.gather({key: float(getattr(seen, key)) for key in MEASURED if hasattr(seen, key)})
    keys = [key for key in MEASURED if all(key in one for one in every)]
    return SimpleNamespace(**{key: sum(one[key] for one in every) / len(every) for key in keys}) if keys else None


def _layers(compiled: Plan, points: int) -> dict[str, list[Layer]]:
    """The layers of each node, the last first, and what to try there; from here on the plan tells them apart."""
    every = compiled.parameters
    numels = {name: {one: numel for one, numel in its.items() if numel} for name, its in every.items()}
    split = {name: layers_of(compiled.models[name], list(numels[name])) for name in compiled.nodes}
    patterns = {name: [_patterns(own, list(numels[name])) for own in layers] for name, layers in split.items()}
    left = {name: _uncovered(every[name], [p for own in layers for p in own]) for name, layers in patterns.items()}
    told = {name: [p for own in (*layers, left[name]) for p in own] for name, layers in patterns.items()}
    compiled.set_values_(alpha={name: dict.fromkeys(its, 1.0) for name, its in told.items()})
    rows = [(name, own) for name, layers in split.items() for own in layers]
    ratios = compiled.ratios(rows)
    profiles = profiles_of(ratios, [sum(numels[name][one] for one in own) for name, own in rows])
    even, by_share = even_grids(ratios, profiles, points), alphas_of(ratios, profiles, [SHARES] * len(rows))
    found: dict[str, list[Layer]] = {name: [] for name in split}
    for (name, _), profile, grid, steps in zip(rows, profiles, even, by_share, strict=True):
        layers = found[name]
        alphas = list(dict.fromkeys(steps if layers else grid))  # equal ones select the same
        something = profile.always or profile.counts[1:].any()
        layers.append(Layer(patterns[name][len(layers)], alphas if something else [], alpha_above(profile)))
    for name, rest in left.items():
        if rest:  # of what no run dampens, any number will do
            found[name].append(Layer(rest, [], 1.0))
    return found


def _uncovered(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The parameters of a Fisher that these patterns do not mean: skipped ones, or without an element."""
    return tuple(n for n in names if n not in patterns and not any(fnmatch.fnmatchcase(n, p) for p in patterns))


def _patterns(own: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Patterns that mean these parameters and no others, and read well."""
    path = own[0].rpartition(".")[0]
    inside = [name for name in names if name.startswith(f"{path}.")] if path else []
    return (f"{path}.*",) if len(own) > 1 and set(inside) == set(own) and not set("*?[") & set(path) else tuple(own)


def _label(layer: Layer) -> str:
    return ", ".join(layer.patterns)


def _numbers(layers: Sequence[Layer], values: Sequence[float]) -> dict[str, float]:
    """{pattern: number}, in the order of the model."""
    pairs = list(zip(layers, values, strict=True))
    return {pattern: value for layer, value in reversed(pairs) for pattern in layer.patterns}


def _choice(layers: Sequence[Layer], trial: Trial, score: float) -> Choice:
    return Choice(_numbers(layers, trial.alphas), _numbers(layers, trial.lams), score)
