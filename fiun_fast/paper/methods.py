"""How a network is made to forget: this package, retraining, and published methods, model by model.

Each takes a network and returns the models that the request reached, changed, and the CPU seconds of its parts. All see
the same data: of training what went into a model, of validation what chooses; nobody sees test data.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import fiun_fast as ff
from fiun_fast.tuning import tune_plan

from ..bench.baselines import unlearn_named
from ..demo.data import DigitNet, Digits, Samples, batches, jitter, jittered, join
from ..demo.networks import Step, grow
from .networks import Task

Scope = Literal["last layer", "whole model"]
Outcome = tuple[dict[str, DigitNet], dict[str, float]]  # node -> changed model; part of the work -> CPU seconds
BATCH = 16  # of Fishers
COPIES = {"original": 2, "forget": 6}  # jittered copies in a Fisher; a class is a small part of the data
SEARCH = {"last layer": (40, 6), "whole model": (12, 0)}  # alphas tried for each lambda; copies of validation data
QUICK_EFFORT, QUICK_SEARCH, QUICK_BATCHES = 0.05, (4, 0), 8
PUBLISHED = (10.0, 1.0)  # alpha and lambda of SSD for ResNet-18, arXiv 2308.07707
# Both rates were chosen on validation data of a seed that is not reported; all else of SCRUB is as in its authors'
# small-scale experiment, where the rate is 5e-4, by which these networks hardly forget a class.
TUNING = (60, 1e-2)  # steps and rate of fine-tuning
SCRUB = {"epochs": 10, "forget_epochs": 3, "rate": 5e-3, "weight_decay": 0.1}
SCRUB_LOSS = {"kl": 0.5, "ce": 1.0, "temperature": 2.0}
SCRUB_DECAY = (5, 8, 9)  # epochs after which the rate is a tenth
SIZES = (64, 32)  # of batches of retained and of forgotten samples in SCRUB


class Network:
    """A trained task: its models, which are never changed, and its data."""

    def __init__(self, task: Task, digits: Digits, quick: bool = False) -> None:
        self.task, self.digits, self.quick = task, digits, quick
        self.effort = QUICK_EFFORT if quick else 1.0
        self.models = grow(task.recipe, effort=self.effort)
        self.reached = task.recipe.reached(task.classes)  # node -> classes that it is to forget

    def search(self, scope: Scope) -> tuple[int, int]:
        """As in `SEARCH`."""
        return QUICK_SEARCH if self.quick else SEARCH[scope]

    def known(self, node: str) -> Samples:
        """What went into a node."""
        return self.task.recipe.data(node)

    def copies(self) -> dict[str, DigitNet]:
        """Of every model that the request reaches."""
        return {node: copy.deepcopy(self.models[node]) for node in self.reached}

    def loader(self, samples: Samples, copies: int) -> list[Samples]:
        """Mini-batches for a Fisher, jittered as in training."""
        dice = torch.Generator().manual_seed(self.task.recipe.seed)
        found = list(batches(jittered(samples, copies, dice), BATCH, dice))
        return found[:QUICK_BATCHES] if self.quick else found

    def original_data(self, node: str) -> list[Samples]:
        """Mini-batches of all that went into a node."""
        return self.loader(self.known(node), COPIES["original"])

    def forget_data(self, origins: Collection[str]) -> list[Samples]:
        """Mini-batches of what is to be forgotten at these origins."""
        parts = [self.known(at).only(classes) for at, classes in self.task.requests.items() if at in origins]
        return self.loader(join(parts), COPIES["forget"])

    def origins(self, node: str) -> list[str]:
        """Whose requests reach a node."""
        above = {step.name for step in self.task.recipe.line(node)}
        return [at for at in self.task.requests if at in above]


def score(network: Network, scope: Scope, nodes: Collection[str]) -> ff.ClassScore:
    """What choices maximise (docs/choosing.md), on validation data with jittered copies beside it."""
    dice = torch.Generator().manual_seed(network.task.recipe.seed)
    loaders, classes = {}, {}
    for node in nodes:
        samples = network.digits.validation.only(network.known(node).classes)
        if copies := network.search(scope)[1]:
            samples = join([samples, jittered(samples, copies, dice)])
        loaders[node], classes[node] = [(samples.images, samples.labels)], network.reached[node]
    return ff.ClassScore(loaders, forget=classes)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the CPU seconds that the block took."""
    began = time.process_time()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.process_time() - began


# ---- this package


Fishers = dict[str, ff.Fisher]


def estimated(network: Network, models: Mapping[str, nn.Module], scope: Scope) -> tuple[Fishers, Fishers]:
    """Original Fishers of the nodes, and the forget Fishers of the requests, at their origins."""
    params = "last" if scope == "last layer" else None
    original = {
        node: ff.estimate_fisher(model, network.original_data(node), params=params) for node, model in models.items()
    }
    forget = {
        at: ff.estimate_fisher(models[at], network.forget_data([at]), params=params) for at in network.task.requests
    }
    return original, forget


def planned(
    network: Network, models: Mapping[str, nn.Module], original: Fishers, forget: Fishers, scale: float = 1.0
) -> ff.Plan:
    """Of all that the requests reach."""
    return ff.plan(*_family(network, models, original, forget), scale=scale)


def _family(
    network: Network, models: Mapping[str, nn.Module], original: Fishers, forget: Fishers
) -> tuple[ff.InheritanceDAG, list[ff.ForgetRequest]]:
    dag = ff.InheritanceDAG()
    for node, model in models.items():
        parents = [parent for parent in network.task.recipe[node].parents if parent in models]
        dag.add_model(node, model, fisher=original[node], parents=parents)
    return dag, [ff.ForgetRequest(at, fisher) for at, fisher in forget.items()]


def ours(network: Network, scope: Scope) -> Outcome:
    """One forget Fisher for each request, from its origin; alpha and lambda of each node by `ff.tune`; one launch."""
    models, seconds = network.copies(), dict[str, float]()
    with timed(seconds, "Fishers"):
        original, forget = estimated(network, models, scope)
    with timed(seconds, "applying"):
        plan = planned(network, models, original, forget)
    with timed(seconds, "choosing"):
        found = tune_plan(plan, score(network, scope, models), points=network.search(scope)[0])
    with timed(seconds, "applying"):
        plan.set_values_(found)
        plan.run_()
    return models, seconds


def by_layer(network: Network) -> Outcome:
    """The whole model by `ff.unlearn_`, which goes layer by layer there; Fishers and score as with one alpha."""
    models, seconds = network.copies(), dict[str, float]()
    with timed(seconds, "Fishers"):
        family = _family(network, models, *estimated(network, models, "whole model"))
    with timed(seconds, "choosing"), warnings.catch_warnings():  # and applying: hardly anything beside it
        warnings.simplefilter("ignore", ff.TuningWarning)  # the tables say what was reached
        ff.unlearn_(*family, score(network, "whole model", models), points=network.search("whole model")[0])
    return models, seconds


# ---- what it is compared with


def retrained(network: Network) -> Outcome:
    """Every reached node made again, in order, from its parents as they are now, without what it is to forget."""
    seconds, models = dict[str, float](), dict(network.models)
    with timed(seconds, "training"):
        for node, classes in network.reached.items():
            others = {name: model for name, model in models.items() if name != node}
            models[node] = grow(network.task.recipe, without=classes, keep=others, effort=network.effort)[node]
    return {node: models[node] for node in network.reached}, seconds


def fine_tuned(network: Network) -> Outcome:
    """Each reached node goes on training as it did, on what it knows but the forgotten classes."""
    recipe, seconds, models = network.task.recipe, dict[str, float](), dict[str, DigitNet]()
    for node, classes in network.reached.items():
        go_on = Step(node, ("before",), network.known(node), *TUNING)
        steps = replace(recipe, steps=(Step("before"), go_on))
        with timed(seconds, "training"):
            model = grow(steps, without=classes, keep={"before": network.models[node]}, effort=network.effort)[node]
        models[node] = model
    return models, seconds


def importances(
    model: nn.Module, loader: Sequence[Samples], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """SSD's published loop: mean over the mini-batches of the squared gradient of the mean loss, by name."""
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for images, labels in loader:
        loss = functional.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for total, gradient in zip(totals.values(), gradients, strict=True):
            total += gradient.pow(2)
    return {name: total / len(loader) for name, total in totals.items()}


def ssd(network: Network, scope: Scope, values: tuple[float, float] | None = None) -> Outcome:
    """One model after another: its importances of all data and of what it is to forget, then the published dampening.

    Source: arXiv 2308.07707. Nothing is inherited. Alpha and lambda as given; else chosen for each model on validation
    data out of the same grid and by the same rule as `ours` (by `ff.tune`, which is faster than a loop would be).
    """
    models, seconds = network.copies(), dict[str, float]()
    for node, model in models.items():
        scoped = dict(model.head.named_parameters(prefix="head") if scope == "last layer" else model.named_parameters())
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is one for one in scoped.values()))
        with timed(seconds, "Fishers"):
            original = importances(model, network.original_data(node), scoped)
            forget = importances(model, network.forget_data(network.origins(node)), scoped)
        alpha, lam = values or (0.0, 0.0)
        if values is None:
            dag = ff.InheritanceDAG()
            dag.add_model(node, model, fisher=ff.Fisher.from_dict(original))
            plan = ff.plan(dag, [ff.ForgetRequest(node, ff.Fisher.from_dict(forget))])
            with timed(seconds, "choosing"):
                found = tune_plan(plan, score(network, scope, [node]), points=network.search(scope)[0])[node]
            alpha, lam = found.alpha, found.lam  # type: ignore[assignment]  # one number, as it was tuned by node
        with timed(seconds, "applying"):
            unlearn_named({node: model}, {node: original}, {node: [forget]}, {node: alpha}, {node: lam})
    return models, seconds


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softened answers [B, C], mean over samples, times the temperature squared."""
    logs, p = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return functional.kl_div(logs, p, reduction="batchmean") * temperature**2


def scrub(network: Network) -> Outcome:
    """SCRUB, one model after another: away from the old model on forgotten data, towards it and the labels on the rest.

    Source: arXiv 2302.09880; ten epochs of Adam, the first three of which begin with one over the forgotten data.
    """
    models, seconds = network.copies(), dict[str, float]()
    recipe = network.task.recipe
    for number, (node, model) in enumerate(models.items()):
        teacher, known, gone = network.models[node], network.known(node), network.reached[node]
        dice = torch.Generator().manual_seed(1000 * recipe.seed + number)
        with timed(seconds, "training"):
            optimizer = torch.optim.Adam(model.parameters(), weight_decay=SCRUB["weight_decay"])
            for epoch in range(1, max(1, round(network.effort * SCRUB["epochs"])) + 1):
                optimizer.param_groups[0]["lr"] = SCRUB["rate"] * 0.1 ** sum(epoch > at for at in SCRUB_DECAY)
                if epoch <= SCRUB["forget_epochs"]:
                    _scrub_epoch(model, teacher, known.only(gone), SIZES[1], optimizer, dice, forget=True)
                _scrub_epoch(model, teacher, known.without(gone), SIZES[0], optimizer, dice, forget=False)
            model.eval()
    return models, seconds


def _scrub_epoch(
    model: DigitNet,
    teacher: DigitNet,
    samples: Samples,
    size: int,
    optimizer: torch.optim.Optimizer,
    dice: torch.Generator,
    *,
    forget: bool,
) -> None:
    model.train()
    for images, labels in batches(samples, size, dice):
        images = jitter(images, dice)
        with torch.no_grad():
            wanted = teacher(images)
        answers = model(images)
        loss = divergence(answers, wanted, SCRUB_LOSS["temperature"])
        if forget:
            loss = -loss
        else:
            loss = SCRUB_LOSS["kl"] * loss + SCRUB_LOSS["ce"] * functional.cross_entropy(answers, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


METHODS: dict[str, Callable[[Network], Outcome]] = {
    "untouched": lambda network: (network.copies(), {}),
    "fiun_fast, last layer": lambda network: ours(network, "last layer"),
    "fiun_fast, whole model": lambda network: ours(network, "whole model"),
    "fiun_fast, whole model, by layer": by_layer,
    "retraining": retrained,
    "fine-tuning": fine_tuned,
    "SSD, last layer": lambda network: ssd(network, "last layer"),
    "SSD, whole model": lambda network: ssd(network, "whole model"),
    "SSD, whole model, as published": lambda network: ssd(network, "whole model", PUBLISHED),
    "SCRUB": scrub,
}


@torch.no_grad()
def accuracies(network: Network, node: str, model: nn.Module) -> list[float]:
    """Of a node: forgotten and retained, on test data, then both on training data; shares."""
    known, gone, found = network.known(node), network.reached[node], list[float]()
    for samples in (network.digits.test.only(known.classes), known):
        right = (model(samples.images).argmax(1) == samples.labels).float()
        mask = torch.isin(samples.labels, torch.tensor(gone))
        found += [right[mask].mean().item(), right[~mask].mean().item()]
    assert not any(math.isnan(share) for share in found), node
    return found
