"""Is it really gone? One node of a network beside retraining, for a class and for random samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import fiun_fast as ff
from fiun_fast import evaluation
from fiun_fast.tuning import tune_plan

from .data import DigitNet, Samples
from .experiment import COPIES, Network
from .networks import grow
from .report import Case, Gone

MEASURES = ("forget", "retain", "test", "tow", "entropy", "confidence", "rmia", "zrf", "probe", "int4", "relearned_few")
EVERY = (*evaluation.MEASURES, "ulira")  # what is known of heads in general, by shadows: seconds
STEPS = 10  # of relearning
SHARE = 0.1  # of the samples, in the random subset
POINTS = 20  # alphas tried for the random subset
SIZE = 64  # of batches


def class_gone(
    network: Network, case: Case, retrained: Mapping[str, DigitNet], measures: Sequence[str] = MEASURES
) -> Gone:
    """The case's last node after forgetting its classes, beside the retrained one.

    RMIA compares the forgotten samples with test samples of the same classes, since others differ from them anyway.
    """
    row = case.touched[-1]
    known = network.recipe.data(row.node)
    test = network.digits.test.only(known.classes)
    sets = {"forget": known.only(row.forget), "retain": known.without(row.forget), "test": test}
    plan = ff.plan(network.dag, [network.request(label) for label in case.classes])
    chosen = {r.node: ff.Choice(r.alpha or 0.0, r.lam or 0.0, 0.0) for r in case.touched}
    what = " and ".join(f"“{label}”" for label in case.classes)
    unseen = test.only(row.forget)
    return _gone(network, plan, row.node, what, sets, unseen, retrained[row.node], chosen, measures)


def random_gone(network: Network, effort: float, measures: Sequence[str] = MEASURES) -> Gone:
    """The last node after forgetting a random tenth of what the first one was trained on, beside a retrained one.

    Alpha and lambda are chosen so that every node is as sure of these samples as of validation data, which it has never
    seen, and loses none of its accuracy there.
    """
    recipe = network.recipe
    first, node = recipe.steps[0], recipe.steps[-1].name
    assert first.samples is not None
    rows = torch.randperm(len(first.samples.labels), generator=torch.Generator().manual_seed(recipe.seed))
    some, rest = first.samples.take(rows[: (cut := round(SHARE * len(rows)))]), first.samples.take(rows[cut:])
    line = tuple(replace(s, samples=rest if s.samples is first.samples else s.samples) for s in recipe.line(node))
    retrained = grow(replace(recipe, steps=line), effort=effort)[node]
    plan = ff.plan(network.dag, [ff.ForgetRequest(first.name, network.fisher(first.name, some, COPIES["forget"]))])
    how: Any = {"by": "layer"} if network.scope == "all" else {"points": POINTS}
    chosen = tune_plan(plan, _Likeness(network, some), **how)
    test = network.digits.test.only(recipe.data(node).classes)
    sets = {"forget": some, "retain": rest, "test": test}
    return _gone(network, plan, node, "random tenth", sets, test, retrained, chosen, measures)


class _Likeness:
    """`evaluate` for `ff.tune`: forgotten samples are to look like validation data."""

    def __init__(self, network: Network, some: Samples) -> None:
        self._data = {n: (network.seen(n, some), network.split(n, "validation")) for n in network.models}
        self._before = {n: _sure_and_right(model, self._data[n][1])[1] for n, model in network.models.items()}

    def __call__(self, node: str, model: Any) -> float:
        (sure, _), (unseen, right) = (_sure_and_right(model, data) for data in self._data[node])
        return -abs(sure - unseen) - max(0.0, self._before[node] - right)


@torch.no_grad()
def _sure_and_right(model: Any, data: Samples) -> tuple[float, float]:
    """Mean probability of the true label, and accuracy."""
    logits = model(data.images)
    sure = logits.softmax(1).gather(1, data.labels[:, None])
    return sure.mean().item(), (logits.argmax(1) == data.labels).float().mean().item()


def _gone(
    network: Network,
    plan: ff.Plan,
    node: str,
    request: str,
    sets: Mapping[str, Samples],
    unseen: Samples,
    retrained: DigitNet,
    chosen: Mapping[str, ff.Choice],
    measures: Sequence[str],
) -> Gone:
    """Run the plan, measure the node, and put the models back."""
    plan.set_values_(chosen)
    choice, model = chosen[node], network.models[node]
    loaders: Any = {name: _loader(network.seen(node, samples)) for name, samples in sets.items()}
    columns: Any = [name for name in measures if name not in ("rmia", "ulira")]
    plan.run_()
    try:
        (row,) = evaluation.table(model, **loaders, retrained=retrained, measures=columns, steps=STEPS).rows.values()
        found = {name: (cell.model, cell.retrained) for name, cell in row.items()}
        if "rmia" in measures:
            new = _loader(network.seen(node, unseen))
            attack = evaluation.rmia(model, forget=loaders["forget"], test=new, references=[retrained])
            found["rmia"] = attack.auc, None
    finally:
        network.restore()
    if "ulira" in measures:
        alpha: Any = choice.alpha  # of a last layer, where there is one number a node
        how: Any = {"alpha": min(alpha, 1e9), "lam": choice.lam, "smoothing": network.recipe.smoothing}
        shadows = evaluation.ulira(model, forget=loaders["forget"], retain=loaders["retain"], **how)
        for name, of in (("trained", shadows.trained), ("unlearned", shadows.unlearned)):
            found[f"ulira_{name}"], found[f"ulira_{name}_tpr"] = (of.auc, None), (of.tpr, None)
    return Gone(network.recipe.scenario, node, request, found, choice.alpha, choice.lam)


def _loader(samples: Samples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(samples.images.split(SIZE), samples.labels.split(SIZE), strict=True))
