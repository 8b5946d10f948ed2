"""One network that is asked to forget: Fishers, choice, unlearning, and honest measurements around each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch

import fiun_fast as ff
from fiun_fast.arguments import Estimator
from fiun_fast.tuning import tune_plan

from ..bench.baselines import unlearn_named
from ..bench.measure import Machine
from .data import DigitNet, Digits, Samples, batches, jittered, join
from .networks import Recipe, grow
from .report import Case, Row
from .score import ClassScore

FISHER_BATCH = 16
COPIES = {"original": 2, "forget": 6}  # a class is a tenth of the data: its Fisher needs more passes to settle
SEARCH = {"last-layer": (40, 6), "all": (12, 0)}  # scope -> alphas tried for each lambda, jittered validation copies
ROUNDS = 21  # of what is timed


class Network:
    """A grown recipe with its original Fishers, registered as an inheritance DAG."""

    def __init__(
        self,
        recipe: Recipe,
        digits: Digits,
        models: dict[str, DigitNet],
        scope: str,
        estimator: Estimator = "batch",
        batch: int = FISHER_BATCH,
    ) -> None:
        self.recipe, self.digits, self.models, self.scope = recipe, digits, models, scope
        self._estimator, self._batch = estimator, batch
        self._validation: dict[tuple[str, int], Samples] = {}
        some, self.seconds = models[recipe.steps[0].name], dict[str, float]()
        self.params = list(ff.last_layer(some) if scope == "last-layer" else dict(some.named_parameters()))
        with _timed(self.seconds, "original Fishers, all nodes"):
            self.originals = {name: self.fisher(name, recipe.data(name), COPIES["original"]) for name in models}
        self.dag = ff.InheritanceDAG()
        for step in recipe.steps:
            self.dag.add_model(step.name, models[step.name], fisher=self.originals[step.name], parents=step.parents)
        touched = [model.get_parameter(name) for model in models.values() for name in self.params]
        self._kept = [(parameter, parameter.detach().clone()) for parameter in touched]

    def fisher(self, name: str, samples: Samples, copies: int) -> ff.Fisher:
        """A Fisher at a node, over samples jittered as in training, as the node sees them."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        images, labels = jittered(samples, copies, generator)
        seen = Samples(self.recipe[name].view(images), labels)
        loader = list(batches(seen, self._batch, generator, self.recipe.device))
        return ff.estimate_fisher(self.models[name], loader, params=self.params, estimator=self._estimator)

    def request(self, label: int) -> ff.ForgetRequest:
        """To forget one class, by the samples of it where they entered."""
        origin = self.recipe.origin[label]
        return ff.ForgetRequest(origin, self.fisher(origin, self.recipe.data(origin).only([label]), COPIES["forget"]))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back that dampening may write."""
        for parameter, value in self._kept:
            parameter.copy_(value)

    @torch.no_grad()
    def inputs(self, node: str, samples: Samples) -> Samples:
        """The samples as the node sees them; features, where the last layer is in scope and the body never changes."""
        images = self.recipe[node].view(samples.images).to(self.recipe.device)
        images = self.models[node].body(images) if self.scope == "last-layer" else images
        return Samples(images, samples.labels.to(self.recipe.device))

    def tail(self, model: DigitNet) -> torch.nn.Module:
        """The part of a model that takes `inputs`."""
        return model.head if self.scope == "last-layer" else model

    def validation(self, node: str, copies: int) -> Samples:
        """Validation digits of the classes the node knows, with jittered copies for a finer signal; made once."""
        if (node, copies) not in self._validation:
            samples = self.digits.validation.only(self.recipe.data(node).classes)
            generator = torch.Generator().manual_seed(self.recipe.seed)
            both = join([samples, jittered(samples, copies, generator)]) if copies else samples
            self._validation[node, copies] = self.inputs(node, both)
        return self._validation[node, copies]

    def score(self, classes: Sequence[int]) -> ClassScore:
        """What each node that forgets some of the classes is to be tuned for."""
        reached = self.recipe.reached(classes)
        data = {node: self.validation(node, SEARCH[self.scope][1]) for node in reached}
        return ClassScore(self.models, data, reached, self.tail)

    def forget(self, classes: Sequence[int], *, backend: str | None = None, points: int | None = None) -> Case:
        """Forget the classes everywhere, measure, and put the models back."""
        recipe, seconds, reached = self.recipe, dict(self.seconds), self.recipe.reached(classes)
        with _timed(seconds, "forget Fisher, at the origin"):
            requests = {label: self.request(label) for label in classes}
        with _timed(seconds, "compiling the plan"):
            plan = ff.plan(self.dag, requests.values(), alpha=0.0, backend=backend)
        with _timed(seconds, "choosing alpha and lambda"):
            chosen = tune_plan(plan, self.score(classes), points=points or SEARCH[self.scope][0])
        plan.set_values_(chosen)
        before = {node: self.accuracy(node, classes) for node in self.models}
        report, rows = plan.run_(), []
        for step in recipe.steps:
            node = step.name
            row = Row(node, step.parents, reached.get(node, ()), before[node], self.accuracy(node, classes))
            if row.forget:
                row.alpha, row.lam = chosen[node].alpha, chosen[node].lam
                row.selected, row.numel = report[node].selected, report[node].numel
            rows.append(row)
        self.restore()

        seconds["one plan.run_()"] = self._median(plan.run_)
        # dicts of named tensors are made ready here, before anything is timed
        originals = {node: self.originals[node].as_dict() for node in reached}
        forget = {node: [requests[label].fisher.as_dict() for label in labels] for node, labels in reached.items()}
        alphas = {node: choice.alpha for node, choice in chosen.items()}
        lams = {node: choice.lam for node, choice in chosen.items()}
        seconds["textbook chain, node by node"] = self._median(
            lambda: unlearn_named(self.models, originals, forget, alphas, lams)
        )
        origins = tuple(request.origin for request in requests.values())
        return Case(recipe.scenario, recipe.seed, self.scope, tuple(classes), origins, rows, seconds)

    def retrain(self, case: Case, *, effort: float, tick: Callable[[str], None]) -> None:
        """Really retrain every reached node without the data, and add accuracy and time to the case."""
        keep = {row.node: self.models[row.node] for row in case.rows if not row.forget}
        with _timed(case.seconds, "retraining every affected node"):
            models = grow(self.recipe, without=case.classes, keep=keep, effort=effort, tick=tick)
        for row in case.touched:
            row.retrained = self.accuracy(row.node, case.classes, models)

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

    def _median(self, work: Callable[[], object]) -> float:
        """Median seconds of `work`, undone after each; warmed up once, and on a GPU by its own clock."""
        machine, times = Machine(torch.device(self.recipe.device), small=True), []
        for _ in range(ROUNDS + 1):
            times.append(machine.seconds(work))
            self.restore()
        return median(times[1:])


@contextmanager
def _timed(table: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds the block took to a table."""
    began = time.perf_counter()
    yield
    table[name] = time.perf_counter() - began
