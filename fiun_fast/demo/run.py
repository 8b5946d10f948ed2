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

from .data import Digits, load_digits
from .experiment import Case, Network
from .figures import draw
from .networks import SCENARIOS, Recipe, grow
from .record import environment, write
from .summary import Summary, summarise
from .tables import nodes_table, summary_table, times_table

ALL = tuple(SCENARIOS)
SCOPES = ("last-layer", "all")
ESTIMATORS = ("batch", "sample", "expected", "label_free")
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
    scenarios: Sequence[str] = ALL,
    seed: int = 0,
    out: Path | str,
    device: str = "cpu",
    scope: str = "last-layer",
    estimator: str = "batch",
    backend: str | None = None,
    all_classes: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    quick: bool = False,
) -> dict[str, Any]:
    """Run the demo and return what it wrote.

    One class and one merged request a scenario: `report.json` and a picture each. With `all_classes`: every class in
    turn and every pair from two origins, over `seeds`, into `demo-<scope>.json`; an estimator other than
    `batch` is part of the name. `quick` trains briefly, for tests.
    """
    unknown = sorted(set(scenarios) - set(ALL))
    if unknown or scope not in SCOPES:
        raise ff.ArgumentError(
            f"unknown scenario {', '.join(unknown)}; known: {', '.join(ALL)}"
            if unknown
            else f"unknown scope {scope!r}; known: {', '.join(SCOPES)}"
        )
    if estimator not in ESTIMATORS:
        raise ff.ArgumentError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    name = scope if estimator == "batch" else f"{scope}-{estimator}"
    Console().print(f"Fishers by the estimator '{estimator}', scope {scope}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "scope": scope,
        "estimator": estimator,
        "device": device,
        "backend": backend or "default",
        "quick": quick,
    }
    with _one_thread():
        if all_classes:
            result, path = _every_class(scenarios, seeds, settings, backend), out / f"demo-{name}.json"
        else:
            result, path = _one_request(scenarios, seed, settings, backend, out), out / "report.json"
    write(path, result)
    Console().print(f"wrote {path}")
    return result


def _one_request(
    scenarios: Sequence[str], seed: int, settings: dict[str, Any], backend: str | None, out: Path
) -> dict[str, Any]:
    """Each scenario once, with retraining next to unlearning."""
    console, digits, quick = Console(), load_digits(seed), settings["quick"]
    networks, cases = [], []
    for scenario in scenarios:
        recipe = replace(SCENARIOS[scenario](digits, seed), device=settings["device"])
        network, seconds = _grown(recipe, digits, settings)
        networks.append({"scenario": scenario, "nodes": len(recipe.steps), "training_seconds": seconds})
        for classes in REQUESTS[scenario]:
            case = network.forget(classes, backend=backend, points=QUICK_POINTS if quick else None)
            with _progress(f"{scenario}: retraining without {_words(classes)}", len(case.touched)) as tick:
                network.retrain(case, effort=QUICK_EFFORT if quick else 1.0, tick=tick)
            cases.append(case)
            console.print(nodes_table(case))
            console.print(times_table(case))
            draw(case, out / f"demo-{scenario}{'-merged' if len(classes) > 1 else ''}.svg")
    return {
        "settings": {**settings, "seed": seed},
        "environment": environment(),
        "networks": networks,
        "cases": [case.to_dict() for case in cases],
    }


def _every_class(
    scenarios: Sequence[str], seeds: Sequence[int], settings: dict[str, Any], backend: str | None
) -> dict[str, Any]:
    """Every class alone and every pair from two origins, in every network and seed."""
    points = QUICK_POINTS if settings["quick"] else None
    single: dict[str, list[Case]] = {scenario: [] for scenario in scenarios}
    merged: dict[str, list[Case]] = {scenario: [] for scenario in scenarios}
    began = time.perf_counter()
    for seed in seeds:
        digits = load_digits(seed)
        for scenario in scenarios:
            for recipe in _recipes(scenario, digits, seed):
                network, _ = _grown(replace(recipe, device=settings["device"]), digits, settings)
                done = {case.classes for case in single[scenario] if case.seed == seed}
                alone = [(label,) for label in recipe.origin if (label,) not in done]
                pairs = [(a, b) for a, b in combinations(recipe.origin, 2) if recipe.origin[a] != recipe.origin[b]]
                with _progress(f"{scenario}, seed {seed}: forgetting", len(alone) + len(pairs)) as tick:
                    for classes in alone + pairs:
                        case = network.forget(classes, backend=backend, points=points)
                        (single if len(classes) == 1 else merged)[scenario].append(case)
                        tick(_words(classes))
    summaries = _summaries(single, merged)
    Console().print(summary_table(summaries))
    cases = [case for group in (single, merged) for found in group.values() for case in found]
    return {
        "settings": {**settings, "seeds": list(seeds)},
        "environment": environment(),
        "seconds": time.perf_counter() - began,
        "summary": [asdict(summary) for summary in summaries],
        "columns": COLUMNS.split(),
        "rows": [
            (*of, row.node, row.forget, *row.before, *row.after, row.alpha, row.lam, row.selected, row.numel)
            for case in cases
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


def _summaries(single: dict[str, list[Case]], merged: dict[str, list[Case]]) -> list[Summary]:
    """Per scenario and over all of them; of merged requests, the nodes that both classes reach."""
    found = []
    for request, group, merged_only in (("one class", single, False), ("two origins, merged", merged, True)):
        group = {scenario: cases for scenario, cases in group.items() if cases}
        found += [summarise(scenario, request, cases, merged_only=merged_only) for scenario, cases in group.items()]
        if len(group) > 1:
            found.append(summarise("all networks", request, [*chain(*group.values())], merged_only=merged_only))
    return found


def _grown(recipe: Recipe, digits: Digits, settings: dict[str, Any]) -> tuple[Network, float]:
    """Train the network; also the seconds that took."""
    began = time.perf_counter()
    with _progress(f"{recipe.scenario}, seed {recipe.seed}: training", len(recipe.steps)) as tick:
        models = grow(recipe, effort=QUICK_EFFORT if settings["quick"] else 1.0, tick=tick)
    seconds = time.perf_counter() - began
    return Network(recipe, digits, models, settings["scope"], settings["estimator"]), seconds


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; the callable moves it on by one and shows what was just done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[last]}"), TimeElapsedColumn(), transient=True) as progress:
        task = progress.add_task(what, total=total, last="")
        yield lambda last: progress.update(task, advance=1, last=last)


@contextmanager
def _one_thread() -> Iterator[None]:
    """These models are too small to share: one thread is faster, and gives the same bits on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _words(classes: Sequence[int]) -> str:
    return " and ".join(map(str, classes))
