"""What the published measurements do to their figures: alpha, the merge's divisor, the loop, and where the timers stop.

The scripts published with arXiv 2408.08493 dampen the last layer with lambda = 1; alpha is 1 where requests are merged,
else it is tried out, up to 30, by accuracies on the training data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from statistics import mean, median
from typing import Any

import torch

from ..bench.baselines import unlearn_named
from ..bench.measure import Machine
from .methods import PUBLISHED, Network, Scope, accuracies, estimated, importances, planned, timed

ALPHAS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
DIVISORS = (1.0, 2.0, 5.0, 10.0, 50.0)
ROUNDS = 21  # of what is timed
Row = dict[str, Any]


def at_alphas(network: Network) -> list[Row]:
    """Mean accuracies over the reached nodes, last layer, one alpha for all nodes, lambda = 1."""
    models = network.copies()
    plan, rows = planned(network, models, *estimated(network, models, "last layer")), list[Row]()
    for alpha in ALPHAS:
        plan.set_values_(alpha=alpha, lam=1.0)
        rows.append({"part": "alpha", "value": alpha, "mean": _measured(network, models, plan.run_, models)})
    return rows


def at_divisors(network: Network) -> list[Row]:
    """The same over the nodes that several requests reach: the maximum divided once for each source after the first.

    Dividing m by d selects where m > d alpha I, and scales by d lambda I / m: it is another alpha and another lambda.
    """
    merged = [node for node in network.reached if len(network.origins(node)) > 1]
    rows, further = list[Row](), len(network.task.requests) - 1
    models = network.copies()
    fishers = estimated(network, models, "last layer")
    for divisor in DIVISORS if merged else ():
        plan = planned(network, models, *fishers, scale=divisor**-further)
        plan.set_values_(alpha=1.0, lam=1.0)
        rows.append({"part": "divisor", "value": divisor, "mean": _measured(network, models, plan.run_, merged)})
    return rows


def _measured(network: Network, models: dict, run: Callable[..., Any], nodes: Collection[str]) -> list[float]:
    report = run(undo=True)
    found = [accuracies(network, node, models[node]) for node in nodes]
    report.undo_()
    return [mean(column) for column in zip(*found, strict=True)]


def loop_or_launch(network: Network, scope: Scope) -> Row:
    """CPU seconds of the published loop over the models, and of one `plan.run_()`; medians, all else ready."""
    models = network.copies()
    original, forget = estimated(network, models, scope)
    plan = planned(network, models, original, forget)
    plan.set_values_(alpha=PUBLISHED[0], lam=PUBLISHED[1])
    originals = {node: fisher.as_dict() for node, fisher in original.items()}
    fishers = {node: [forget[at].as_dict() for at in network.origins(node)] for node in models}
    alphas, lams = (dict.fromkeys(models, value) for value in PUBLISHED)
    written = [models[node].get_parameter(name).detach() for node in models for name in originals[node]]
    kept = [parameter.clone() for parameter in written]
    machine = Machine(torch.device("cpu"), small=True, clock=time.process_time)

    def middle(work: Callable[[], object]) -> float:
        times = []
        for _ in range(ROUNDS + 1):  # the first one warms up
            times.append(machine.seconds(work))
            torch._foreach_copy_(written, kept)
        return median(times[1:])

    loop = middle(lambda: unlearn_named(models, originals, fishers, alphas, lams))
    return {"part": "launch", "scope": scope, "models": len(models), "loop": loop, "launch": middle(plan.run_)}


def timers(network: Network) -> Row:
    """CPU seconds of the published way, last layer: which parts its timers see, and which they do not.

    For one class its first timer holds the Fishers and the dampening of the origin, and each descendant's its original
    Fisher: the timer is read before the descendant is dampened.
    """
    seconds, alpha, lam = dict[str, float](), *PUBLISHED
    (origin,) = network.task.requests
    models = network.copies()
    forget = dict[str, torch.Tensor]()
    for node in sorted(models, key=lambda node: node != origin):
        model, whose = models[node], "origin" if node == origin else "descendants"
        model.body.requires_grad_(False)
        head = dict(model.head.named_parameters(prefix="head"))
        with timed(seconds, f"{whose}, Fishers"):
            if node == origin:
                forget = importances(model, network.forget_data([origin]), head)
            original = importances(model, network.original_data(node), head)
        with timed(seconds, f"{whose}, dampening"):
            unlearn_named({node: model}, {node: original}, {node: [forget]}, {node: alpha}, {node: lam})
    return {"part": "timers", "seconds": seconds}
