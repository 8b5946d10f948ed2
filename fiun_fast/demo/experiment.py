"""One network that is asked to forget: Fishers, choice, unlearning, and honest measurements around each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import fiun_fast as ff

from . import textbook
from .choose import Snapshot, Trial, compile_plan
from .data import Digits, Samples, batches, jittered, join
from .model import DigitNet
from .networks import Recipe, grow

FISHER_BATCH = 16
COPIES = {"original": 2, "forget": 6}  # a class is a tenth of the data: its Fisher needs more passes to settle
SEARCH = {"last-layer": (40, 6), "all": (12, 0)}  # scope -> alphas tried for each lambda, jittered validation copies


@dataclass
class Row:
    """One node before and after. Accuracies are shares of the test split, over the classes the node knows."""

    node: str
    parents: tuple[str, ...]
    forget: tuple[int, ...]  # the classes that reach this node; empty: not touched
    before: tuple[float, float]  # accuracy on the forgotten classes, on the rest
    after: tuple[float, float]
    alpha: float | None = None
    lam: float | None = None
    selected: int = 0
    numel: int = 0
    retrained: tuple[float, float] | None = None


@dataclass
class Case:
    """One request, or several merged, in one network."""

    scenario: str
    seed: int
    scope: str
    classes: tuple[int, ...]
    origins: tuple[str, ...]
    rows: list[Row]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def touched(self) -> list[Row]:
        """The nodes that the request reaches."""
        return [row for row in self.rows if row.forget]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python types, for JSON."""
        return asdict(self)


class Network:
    """A grown recipe with its original Fishers, registered as an inheritance DAG."""

    def __init__(
        self,
        recipe: Recipe,
        digits: Digits,
        models: dict[str, DigitNet],
        scope: str,
        estimator: str = "batch",
        batch: int = FISHER_BATCH,
    ) -> None:
        self.recipe, self.digits, self.models, self.scope = recipe, digits, models, scope
        self.estimator, self._batch = estimator, batch
        self._validation: dict[str, tuple[Tensor, Tensor]] = {}
        self.params = _scope(models[recipe.steps[0].name], scope)
        began = time.perf_counter()
        self.originals = {name: self._fisher(name, recipe.data(name), COPIES["original"]) for name in models}
        self.seconds = {"original Fishers, all nodes": time.perf_counter() - began}
        self.dag = ff.InheritanceDAG()
        for step in recipe.steps:
            self.dag.add_model(
                step.name, models[step.name], fisher=self.originals[step.name], parents=list(step.parents)
            )

    def _fisher(self, name: str, samples: Samples, copies: int) -> ff.Fisher:
        """A Fisher at a node, over samples jittered as in training, as the node sees them."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        images, labels = jittered(samples, copies, generator)
        seen = Samples(self.recipe[name].view(images), labels)
        loader = list(batches(seen, self._batch, generator, self.recipe.device))
        return ff.estimate_fisher(self.models[name], loader, params=self.params, estimator=self.estimator)

    def _forget_fisher(self, label: int) -> ff.Fisher:
        """Over the samples of one class, at the node where they entered."""
        origin = self.recipe.origin[label]
        return self._fisher(origin, self.recipe.data(origin).only([label]), COPIES["forget"])

    def forget(self, classes: Sequence[int], *, backend: str | None = None, points: int | None = None) -> Case:
        """Forget the classes everywhere, measure, and put the models back."""
        recipe, seconds = self.recipe, dict(self.seconds)
        reached = recipe.reached(classes)
        snapshot = Snapshot({node: self.models[node] for node in reached}, self.params)

        with _timed(seconds, "forget Fisher, at the origin"):
            fishers = {label: self._forget_fisher(label) for label in classes}
        requests = [ff.ForgetRequest(recipe.origin[label], fisher) for label, fisher in fishers.items()]
        reaching = {node: [fishers[label] for label in labels] for node, labels in reached.items()}

        with _timed(seconds, "choosing alpha and lambda"):
            default_points, copies = SEARCH[self.scope]
            trials = {node: self._trial(node, copies, labels) for node, labels in reached.items()}
            choices = ff.tune(
                self.dag,
                requests,
                lambda node, model: trials[node].score(),
                points=points or default_points,
                backend=backend,
            )

        with _timed(seconds, "compiling the plan"):
            plan = compile_plan(self.dag, requests, choices, backend)
        before = {node: self.accuracy(node, classes) for node in self.models}
        report = plan.run_()
        rows = []
        for step in recipe.steps:
            row = Row(step.name, step.parents, (), before[step.name], self.accuracy(step.name, classes))
            if choice := choices.get(row.node):
                row.forget, row.alpha, row.lam = reached[row.node], choice.alpha, choice.lam
                row.selected, row.numel = report[row.node].selected, report[row.node].numel
            rows.append(row)
        snapshot.restore()

        seconds["one plan.run_()"] = _median(plan.run_, snapshot.restore, recipe.device)
        chain = self._textbook(reaching, choices)
        seconds["textbook chain, node by node"] = _median(chain, snapshot.restore, recipe.device)
        origins = tuple(recipe.origin[label] for label in classes)
        return Case(recipe.scenario, recipe.seed, self.scope, tuple(classes), origins, rows, seconds)

    def _textbook(
        self, reaching: Mapping[str, Sequence[ff.Fisher]], choices: Mapping[str, ff.Choice]
    ) -> Callable[[], None]:
        """The same work as the plan's, on dicts of named tensors that are made ready here, before anything is timed."""
        models = {node: self.models[node] for node in reaching}
        originals = {node: self.originals[node].as_dict() for node in reaching}
        forget = {node: [fisher.as_dict() for fisher in found] for node, found in reaching.items()}
        alphas = {node: choice.alpha for node, choice in choices.items()}
        lams = {node: choice.lam for node, choice in choices.items()}
        return lambda: textbook.unlearn(models, originals, forget, alphas, lams)

    def retrain(self, case: Case, *, effort: float = 1.0, tick: Callable[[str], None] = lambda name: None) -> None:
        """Really retrain every reached node without the data, and add accuracy and time to the case."""
        reached = {row.node for row in case.touched}
        keep = {node: model for node, model in self.models.items() if node not in reached}
        with _timed(case.seconds, "retraining every affected node"):
            models = grow(self.recipe, without=case.classes, keep=keep, effort=effort, tick=tick)
        for row in case.touched:
            row.retrained = self.accuracy(row.node, case.classes, models)

    def _trial(self, node: str, copies: int, forget: Sequence[int]) -> Trial:
        """Validation digits of the classes the node knows, as it sees them, with jittered copies for a finer signal.

        With the last layer in scope the body never changes, so its features are computed once and kept.
        """
        model, device = self.models[node], self.recipe.device
        if node not in self._validation:
            samples = self.digits.validation.only(self.recipe.data(node).classes)
            generator = torch.Generator().manual_seed(self.recipe.seed)
            images, labels = join([samples, jittered(samples, copies, generator)]) if copies else samples
            inputs = self.recipe[node].view(images).to(device)
            if self.scope == "last-layer":
                with torch.no_grad():
                    inputs = model.body(inputs)
            self._validation[node] = inputs, labels.to(device)
        return Trial(model.head if self.scope == "last-layer" else model, *self._validation[node], forget)

    @torch.no_grad()
    def accuracy(
        self, node: str, forgotten: Sequence[int], models: Mapping[str, DigitNet] | None = None
    ) -> tuple[float, float]:
        """Test accuracy on the forgotten classes that the node knows (nan if none), and on the others."""
        samples = self.digits.test.only(self.recipe.data(node).classes)
        images = self.recipe[node].view(samples.images).to(self.recipe.device)
        right = ((models or self.models)[node](images).argmax(1).cpu() == samples.labels).double()
        gone = torch.isin(samples.labels, torch.tensor(list(forgotten)))
        return right[gone].mean().item(), right[~gone].mean().item()


def _scope(model: DigitNet, scope: str) -> list[str]:
    return list(ff.last_layer(model)) if scope == "last-layer" else [name for name, _ in model.named_parameters()]


@contextmanager
def _timed(table: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds the block took to a table."""
    began = time.perf_counter()
    yield
    table[name] = time.perf_counter() - began


def _median(work: Callable[[], object], undo: Callable[[], None], device: str, repeats: int = 21) -> float:
    """Median seconds of `work`, undone after each; warmed up once, and on a GPU waited for."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
        undo()
    return statistics.median(times[1:])
