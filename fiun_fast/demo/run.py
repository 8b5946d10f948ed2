"""`fiun-fast demo`: trains the networks, forgets, prints tables, writes the report and the pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from ..arguments import ESTIMATORS, Estimator, check_one_of
from ..bench.files import environment, write_json
from ..values import Number
from . import NETWORKS, SCOPES
from .data import Digits, load_digits
from .experiment import Network
from .gone import class_gone, random_gone
from .networks import SCENARIOS, Recipe, grow
from .report import Case, Gone, draw, gone_table, nodes_table, summarise, summary_table, times_table

# What a single demo forgets: one class, then classes that entered at different origins (merged by MFIM).
REQUESTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "federated": ((0,), (0, 1)),
    "data-parallel": ((4,), (3, 4)),
    "incremental": ((2,), (2, 7)),
    "transfer": ((7,),),
}
# Classes that one holder each has alone, where only some classes have a sole holder: these networks cover all ten.
OWNERS = dict.fromkeys(("federated", "data-parallel"), ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 0, 1)))
COLUMNS = (
    "scenario seed request node forget forgotten_before rest_before forgotten_after rest_after "
    "alpha lambda selected numel"
)
SEEDS = (0, 1, 2)  # of all classes in turn
QUICK_EFFORT, QUICK_POINTS = 0.25, 8


def run_demo(
    *,
    scenarios: Sequence[str] = NETWORKS,
    seed: int = 0,
    out: Path | str,
    device: str = "cpu",
    scope: str = "last-layer",
    estimator: Estimator = "batch",
    backend: str | None = None,
    all_classes: bool = False,
    seeds: Sequence[int] = SEEDS,
    quick: bool = False,
) -> dict[str, Any]:
    """Run the demo and return what it wrote.

    One class and one merged request a scenario: `report.json` and a picture each. With `all_classes`: every class in
    turn and every pair from two origins, over `seeds`, into `demo-<scope>.json`; an estimator other than
    `batch` is part of the name. `quick` trains briefly, for tests.

    Raises:
        ArgumentError: an unknown scenario, scope or estimator.

    """
    for scenario in scenarios:
        check_one_of("scenario", scenario, NETWORKS)
    check_one_of("scope", scope, SCOPES)
    check_one_of("estimator", estimator, ESTIMATORS)
    demo, out = _Demo(scope, estimator, device, backend, quick), Path(out)
    demo.console.print(f"Fishers by the estimator '{estimator}', scope {scope}")
    out.mkdir(parents=True, exist_ok=True)
    name = scope if estimator == "batch" else f"{scope}-{estimator}"
    path = out / (f"demo-{name}.json" if all_classes else "report.json")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share: faster, and the same bits on any number of cores
    try:
        result = demo.every_class(scenarios, seeds) if all_classes else demo.one_request(scenarios, seed, out)
    finally:
        torch.set_num_threads(threads)
    settings = {"scope": scope, "estimator": estimator, "device": device, "backend": backend or "default"}
    which = {"seeds": list(seeds)} if all_classes else {"seed": seed}
    result = {"settings": settings | {"quick": quick} | which, "environment": environment(device)} | result
    write_json(path, result)
    demo.console.print(f"wrote {path}")
    return result


class _Demo:
    """What all networks of one run have in common."""

    def __init__(self, scope: str, estimator: Estimator, device: str, backend: str | None, quick: bool) -> None:
        self.console, self.scope, self.estimator, self.device = Console(), scope, estimator, device
        self.effort = QUICK_EFFORT if quick else 1.0
        self.options: dict[str, Any] = {"backend": backend, "points": QUICK_POINTS if quick else None}

    def track(self, recipe: Recipe, doing: str) -> Any:
        """Shows a progress bar over what is iterated."""
        description = f"{recipe.scenario}, seed {recipe.seed}: {doing}"
        return partial(track, description=description, console=self.console, transient=True)

    def grown(self, recipe: Recipe, digits: Digits) -> Network:
        """The network, trained."""
        recipe = replace(recipe, device=self.device)
        models = grow(recipe, effort=self.effort, watch=self.track(recipe, "training"))
        return Network(recipe, digits, models, self.scope, self.estimator)

    def one_request(self, scenarios: Sequence[str], seed: int, out: Path) -> dict[str, Any]:
        """Each scenario once, with retraining next to unlearning."""
        digits, networks, cases, gone = load_digits(seed), [], [], list[Gone]()
        for scenario in scenarios:
            began = time.perf_counter()
            network = self.grown(SCENARIOS[scenario](digits, seed), digits)
            seconds = time.perf_counter() - began - sum(network.seconds.values())
            networks.append({"scenario": scenario, "nodes": len(network.models), "training_seconds": seconds})
            for classes in REQUESTS[scenario]:
                case = network.forget(classes, **self.options)
                without = f"retraining without {' and '.join(map(str, classes))}"
                retrained = network.retrain(case, effort=self.effort, watch=self.track(network.recipe, without))
                cases.append(case)
                if len(classes) == 1:
                    gone.append(class_gone(network, case, retrained))
                self.console.print(nodes_table(case), times_table(case))
                draw(case, out / f"demo-{scenario}{'-merged' if len(classes) > 1 else ''}.svg")
            if scenario == "transfer":  # the one whose first node has all the data
                gone.append(random_gone(network, self.effort))
        self.console.print(gone_table(gone, self.scope))
        return {"networks": networks, "cases": [asdict(case) for case in cases], "gone": [asdict(one) for one in gone]}

    def every_class(self, scenarios: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """Every class alone and every pair from two origins, in every network and seed."""
        cases, began = list[Case](), time.perf_counter()
        for seed in seeds:
            digits = load_digits(seed)
            for scenario in scenarios:
                build, alone = SCENARIOS[scenario], set[int]()
                for owners in OWNERS.get(scenario, [None]):
                    network = self.grown(build(digits, seed, owners) if owners else build(digits, seed), digits)
                    origin = network.recipe.origin
                    requests: list[tuple[int, ...]] = [(label,) for label in origin if label not in alone]
                    requests += [pair for pair in combinations(origin, 2) if len({origin[c] for c in pair}) == 2]
                    alone.update(origin)
                    for classes in self.track(network.recipe, "forgetting")(requests):
                        cases.append(network.forget(classes, **self.options))
        summaries = summarise(cases)
        cases.sort(key=lambda case: (len(case.classes), scenarios.index(case.scenario)))
        self.console.print(summary_table(summaries))
        return {
            "seconds": time.perf_counter() - began,
            "summary": summaries,
            "columns": COLUMNS.split(),
            "rows": [
                (
                    *of,
                    row.node,
                    row.forget,
                    *row.before,
                    *row.after,
                    *map(_plain, (row.alpha, row.lam)),
                    row.selected,
                    row.numel,
                )
                for case in cases
                for of in [(case.scenario, case.seed, case.classes)]
                for row in case.touched
            ],
        }


def _plain(number: Number | None) -> float | None:
    """None where it went by layer."""
    return None if isinstance(number, Mapping) else number
