"""One network that is asked to forget: Fishers, choice, unlearning, and honest measurements around each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

import fiun_fast as ff
from fiun_fast.arguments import Estimator
from fiun_fast.tuning import LAMBDAS

from ..bench.baselines import unlearn_named
from ..bench.measure import Machine
from .data import DigitNet, Digits, Samples, accuracies, batches, jittered, join
from .networks import Recipe, Step, grow
from .report import Case, Row

COPIES = {"original": 2, "forget": 6}  # a class is a tenth of the data: its Fisher needs more passes to settle
# scope -> alphas tried for each lambda, of "all" in the last layer, which comes first; jittered validation copies
SEARCH = {"last-layer": (40, 6), "all": (12, 0)}
ROUNDS = 21  # of what is timed


class Network:
    """A grown recipe with its original Fishers, of batches of `batch`, registered as an inheritance DAG."""

    def __init__(
        self,
        recipe: Recipe,
        digits: Digits,
        models: dict[str, DigitNet],
        scope: str,
        estimator: Estimator = "batch",
        batch: int = 16,
        copies: int | None = None,  # jittered ones of the validation data; None: as `SEARCH` says
    ) -> None:
        self.recipe, self.digits, self.models, self.scope = recipe, digits, models, scope
        self._estimator, self._batch = estimator, batch
        some, self.seconds = models[recipe.steps[0].name], dict[str, float]()
        self.params = list(ff.last_layer(some) if scope == "last-layer" else dict(some.named_parameters()))
        self._data = {name: recipe.data(name) for name in models}
        with _timed(self.seconds, "original Fishers, all nodes"):
            self.originals = {name: self.fisher(name, data, COPIES["original"]) for name, data in self._data.items()}
        self.dag = ff.InheritanceDAG()
        for step in recipe.steps:
            self.dag.add_model(step.name, models[step.name], fisher=self.originals[step.name], parents=step.parents)
        self._written = [model.get_parameter(name).detach() for model in models.values() for name in self.params]
        self._kept = [parameter.clone() for parameter in self._written]
        # made once each
        self._requests: dict[int, ff.ForgetRequest] = {}
        self._request_seconds: dict[int, float] = {}
        copies = SEARCH[scope][1] if copies is None else copies
        validation = {node: [self.split(node, "validation", copies)] for node in models}
        self._score = ff.ClassScore(validation, forget={})

    def restore(self) -> None:
        """Put the parameters back that dampening may write."""
        torch._foreach_copy_(self._written, self._kept)

    def seen(self, node: str, samples: Samples) -> Samples:
        """The samples as the node sees them, on its device."""
        images, device = self.recipe[node].view(samples.images), self.recipe.device
        return Samples(images.to(device), samples.labels.to(device))

    def fisher(self, name: str, samples: Samples, copies: int) -> ff.Fisher:
        """A Fisher at a node, over samples jittered as in training."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        samples = self.seen(name, jittered(samples, copies, generator))
        loader = list(batches(samples, self._batch, generator))
        return ff.estimate_fisher(self.models[name], loader, params=self.params, estimator=self._estimator)

    def request(self, label: int) -> ff.ForgetRequest:
        """To forget one class, by the samples of it where they entered."""
        if label not in self._requests:
            origin = self.recipe.origin[label]
            with _timed(self._request_seconds, label):
                fisher = self.fisher(origin, self._data[origin].only([label]), COPIES["forget"])
            self._requests[label] = ff.ForgetRequest(origin, fisher)
        return self._requests[label]

    def split(self, node: str, split: str, copies: int = 0) -> Samples:
        """A split as the node sees it: of the classes that it knows, and jittered copies for a finer signal."""
        samples = getattr(self.digits, split).only(self._data[node].classes)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        samples = join([samples, jittered(samples, copies, generator)]) if copies else samples
        return self.seen(node, samples)

    def score(self, classes: Sequence[int]) -> ff.ClassScore:
        """What each node that forgets some of the classes is to be tuned for."""
        return self._score.forgetting(self.recipe.reached(classes))

    def accuracy(self, node: str, forgotten: Sequence[int]) -> tuple[float, float]:
        """Test accuracy on the forgotten classes that the node knows (nan if none), and on the others."""
        return accuracies(self.models[node], self.split(node, "test"), forgotten)

    def forget(self, classes: Sequence[int], *, backend: str | None = None, points: int | None = None) -> Case:
        """Forget the classes everywhere, measure, and put the models back."""
        recipe, seconds, reached = self.recipe, dict(self.seconds), self.recipe.reached(classes)
        requests = {label: self.request(label) for label in classes}
        seconds["forget Fisher, at the origin"] = sum(self._request_seconds[label] for label in classes)
        before = {node: self.accuracy(node, classes) for node in self.models}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ff.TuningWarning)  # the tables say what was reached
            how: Any = {"points": points or SEARCH[self.scope][0], "backend": backend}
            if self.scope == "last-layer":  # else it goes by layer, as `unlearn_` does with more than one of them
                how |= {"by": "node", "lams": LAMBDAS}
            outcome = ff.unlearn_(self.dag, requests.values(), self.score(classes), **how)
        seconds["choosing alpha and lambda"], rows = outcome.seconds["choosing"], []
        for node, step in zip(self.models, recipe.steps, strict=True):
            row = Row(node, step.parents, reached.get(node, ()), before[node], self.accuracy(node, classes))
            if row.forget:
                did = outcome[node]
                row.alpha, row.lam, row.selected, row.numel = did.alpha, did.lam, did.selected, did.numel
            rows.append(row)
        self.restore()
        seconds["one plan.run_()"] = self._median(outcome.plan.run_)
        if self.scope == "last-layer":  # the textbook has one alpha a model
            # dicts of named tensors are made ready here, before anything is timed
            originals = {node: self.originals[node].as_dict() for node in reached}
            fishers = {node: [requests[label].fisher.as_dict() for label in labels] for node, labels in reached.items()}
            alphas, lams = ({node: getattr(outcome[node], key) for node in reached} for key in ("alpha", "lam"))
            textbook = lambda: unlearn_named(self.models, originals, fishers, alphas, lams)  # noqa: E731
            seconds["textbook chain, node by node"] = self._median(textbook)
        origins = tuple(recipe.origin[label] for label in classes)
        return Case(recipe.scenario, recipe.seed, self.scope, tuple(classes), origins, rows, seconds)

    def retrain(
        self, case: Case, *, effort: float, watch: Callable[[Sequence[Step]], Iterable[Step]] = iter
    ) -> dict[str, DigitNet]:
        """Really retrain every reached node without the data, and add accuracy and time to the case; all models."""
        keep = {row.node: self.models[row.node] for row in case.rows if not row.forget}
        with _timed(case.seconds, "retraining every affected node"):
            models = grow(self.recipe, without=case.classes, keep=keep, effort=effort, watch=watch)
        for row in case.touched:
            row.retrained = accuracies(models[row.node], self.split(row.node, "test"), case.classes)
        return models

    def _median(self, work: Callable[[], object]) -> float:
        """Median seconds of `work`, undone after each; warmed up once, and on a GPU by its own clock."""
        machine, times = Machine(torch.device(self.recipe.device), small=True), []
        for _ in range(ROUNDS + 1):
            times.append(machine.seconds(work))
            self.restore()
        return median(times[1:])


@contextmanager
def _timed(table: dict[Any, float], name: Any) -> Iterator[None]:
    """Add the seconds the block took to a table."""
    began = time.perf_counter()
    yield
    table[name] = time.perf_counter() - began
