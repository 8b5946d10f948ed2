"""`fiun-fast demo`: trains the networks, forgets, prints tables, writes the report and the pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import fiun_fast as ff

from ..arguments import ESTIMATORS, Estimator
from ..bench.files import environment, write_json
from . import NETWORKS, SCOPES
from .data import Digits, load_digits
from .experiment import Network
from .networks import SCENARIOS, Recipe, grow
from .report import Case, draw, nodes_table, summarise, summary_table, times_table

# What a single demo forgets: one class, then classes that entered at different origins (merged by MFIM).
REQUESTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "federated": ((0,), (0, 1)),
    "data-parallel": ((4,), (3, 4)),
    "incremental": ((2,), (2, 7)),
    "transfer": ((7,),),
}
# Classes that one holder each has alone; together the networks cover all ten.
OWNERS = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 0, 1))
COLUMNS = (
    "scenario seed request node forget forgotten_before rest_before forgotten_after rest_after "
    "alpha lambda selected numel"
)
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
    seeds: Sequence[int] = (0, 1, 2),
    quick: bool = False,
) -> dict[str, Any]:
    """Run the demo and return what it wrote.

    One class and one merged request a scenario: `report.json` and a picture each. With `all_classes`: every class in
    turn and every pair from two origins, over `seeds`, into `demo-<scope>.json`; an estimator other than
    `batch` is part of the name. `quick` trains briefly, for tests.

    Raises:
        ArgumentError: an unknown scenario, scope or estimator.

    """
    for what, given, known in (
        ("scenario", scenarios, NETWORKS),
        ("scope", [scope], SCOPES),
        ("estimator", [estimator], ESTIMATORS),
    ):
        if unknown := sorted(set(given) - set(known)):
            raise ff.ArgumentError(f"unknown {what} {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
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
    write_json(path, result)
    demo.console.print(f"wrote {path}")
    return result


class _Demo:
    """What all networks of one run have in common."""

    def __init__(self, scope: str, estimator: Estimator, device: str, backend: str | None, quick: bool) -> None:
        self.console, self.scope, self.estimator, self.device = Console(), scope, estimator, device
        self.backend, self.effort = backend, QUICK_EFFORT if quick else 1.0
        self.points = QUICK_POINTS if quick else None
        settings = {"scope": scope, "estimator": estimator, "device": device, "backend": backend or "default"}
        self.settings: dict[str, Any] = {**settings, "quick": quick}

    def grown(self, recipe: Recipe, digits: Digits) -> tuple[Network, float]:
        """The network, trained; also the seconds that took."""
        began, recipe = time.perf_counter(), replace(recipe, device=self.device)
        with _progress(f"{recipe.scenario}, seed {recipe.seed}: training", len(recipe.steps)) as tick:
            models = grow(recipe, effort=self.effort, tick=tick)
        seconds = time.perf_counter() - began
        return Network(recipe, digits, models, self.scope, self.estimator), seconds

    def one_request(self, scenarios: Sequence[str], seed: int, out: Path) -> dict[str, Any]:
        """Each scenario once, with retraining next to unlearning."""
        digits, networks, cases = load_digits(seed), [], []
        for scenario in scenarios:
            network, seconds = self.grown(SCENARIOS[scenario](digits, seed), digits)
            networks.append({"scenario": scenario, "nodes": len(network.models), "training_seconds": seconds})
            for classes in REQUESTS[scenario]:
                case = network.forget(classes, backend=self.backend, points=self.points)
                with _progress(f"{scenario}: retraining without {_words(classes)}", len(case.touched)) as tick:
                    network.retrain(case, effort=self.effort, tick=tick)
                cases.append(case)
                self.console.print(nodes_table(case))
                self.console.print(times_table(case))
                draw(case, out / f"demo-{scenario}{'-merged' if len(classes) > 1 else ''}.svg")
        return {
            "settings": {**self.settings, "seed": seed},
            "environment": environment(self.device),
            "networks": networks,
            "cases": [asdict(case) for case in cases],
        }

    def every_class(self, scenarios: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """Every class alone and every pair from two origins, in every network and seed."""
        cases: dict[tuple[bool, str], list[Case]] = {(many, name): [] for many in (False, True) for name in scenarios}
        began = time.perf_counter()
        for seed in seeds:
            digits = load_digits(seed)
            for scenario in scenarios:
                for recipe in _recipes(scenario, digits, seed):
                    network, _ = self.grown(recipe, digits)
                    done = {case.classes for case in cases[False, scenario] if case.seed == seed}
                    alone = [(label,) for label in recipe.origin if (label,) not in done]
                    pairs = [(a, b) for a, b in combinations(recipe.origin, 2) if recipe.origin[a] != recipe.origin[b]]
                    with _progress(f"{scenario}, seed {seed}: forgetting", len(alone) + len(pairs)) as tick:
                        for classes in alone + pairs:
                            case = network.forget(classes, backend=self.backend, points=self.points)
                            cases[len(classes) > 1, scenario].append(case)
                            tick(_words(classes))
        summaries = []
        for many, request in ((False, "one class"), (True, "two origins, merged")):
            group = {scenario: made for (merged, scenario), made in cases.items() if merged == many and made}
            if len(group) > 1:
                group["all networks"] = [*chain(*group.values())]
            summaries += [summarise(scenario, request, made, merged_only=many) for scenario, made in group.items()]
        self.console.print(summary_table(summaries))
        return {
            "settings": {**self.settings, "seeds": list(seeds)},
            "environment": environment(self.device),
            "seconds": time.perf_counter() - began,
            "summary": [asdict(summary) for summary in summaries],
            "columns": COLUMNS.split(),
            "rows": [
                (*of, row.node, row.forget, *row.before, *row.after, row.alpha, row.lam, row.selected, row.numel)
                for case in chain(*cases.values())
                for of in [(case.scenario, case.seed, case.classes)]
                for row in case.touched
            ],
        }


def _recipes(scenario: str, digits: Digits, seed: int) -> list[Recipe]:
    """The networks in which every class has an origin: several where only some classes have a sole holder."""
    build = SCENARIOS[scenario]
    if scenario in ("federated", "data-parallel"):
        return [build(digits, seed, owners) for owners in OWNERS]
    return [build(digits, seed)]


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; the callable moves it on by one and shows what was just done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[last]}"), TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task(what, total=total, last="")
        yield lambda last: progress.update(task, advance=1, last=last)


def _words(classes: Sequence[int]) -> str:
    return " and ".join(map(str, classes))
