"""What the features still know of a forgotten class, and what it costs to make them forget: rules for whole models.

    python bench/features.py               bench/results/features.json and the table in docs/choosing.md
    python bench/features.py --seed 0      that seed alone; may be repeated
    python bench/features.py --tables      only the table, from the committed results

The demo's networks of digits. A request forgets one class, and a *pair* is that class and a node it reached. Every rule
chooses on validation data and is judged once, on test data: what is left and lost, and how well two classifiers
fitted anew on features of training data still tell the forgotten class. Beside them stand the model as it was and
one really retrained without the class. Results are kept network by network: a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from quality import recipe_of, trained
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

import fiun_fast as ff
from fiun_fast.answering import Answered
from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.demo.data import DigitNet, Samples, load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.networks import Recipe, grow
from fiun_fast.grids import MOST
from fiun_fast.layer_tuning import LAM, LAST_LAMBDAS, LAST_POINTS, LESS_SURE, SHARES, SLACK, SURER
from fiun_fast.scope import layers_of
from fiun_fast.scores import ClassesSeen, Score, class_loss, seen

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "features.json", ROOT / "docs" / "choosing.md"
SEEN, NEW = (0,), (1, 2)  # seeds: looked at while the rules were made, and run once at the end
NETWORKS = {"incremental": (2, 5), "transfer": (3, 3), "federated": (3, 1)}  # every how many-th class; at most so many
ESTIMATORS: dict[str, tuple[Any, int]] = {
    "batch": ("batch", 16),
    "expected": ("expected", 64),
    "label-free": ("label_free", 64),
}
FEATURES = "features"  # the name of a Fisher of nearest class means in the place of the last layer
MORE: dict[str, Any] = {"weight": 1.0, "shares": (1.0, 0.7, 0.4, 0.2, 0.1, 0.05, 0.02), "lams": (0.1, 0.01)}
A_POINT: dict[str, Any] = {"slack": 0.01, "less_sure": 1.0}
SHOTS, DRAWS = 5, 20
RECALIBRATE = 300  # samples that BatchNorm is measured anew on
COLUMNS = ("left", "lost", "ridge", "nearest", "ridge_rest", "nearest_rest")


# ---- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeaturesSeen(ClassesSeen):
    """The same, and of the forgotten class how it lies among the features.

    Attributes:
        told: share of its samples that are nearest to their own class mean, which is taken without the sample, 0..1.
        apart: mean of (a - b) / (a + b), a the squared distance to the nearest mean of another class, b to the own.

    """

    told: float
    apart: float


def lies(features: Tensor, labels: Tensor, label: int) -> tuple[float, float]:
    """`told` and `apart` of features [N, D] with labels [N]."""
    own = labels == label
    others = [c for c in labels.unique().tolist() if c != label]
    means = torch.stack([features[labels == c].mean(0) for c in others])
    count, x = int(own.sum()), features[own]
    near = ((x - x.mean(0)) * (count / max(count - 1, 1))).square().sum(1)
    far = (x[:, None] - means).square().sum(2).amin(1)
    return (near < far).double().mean().item(), ((far - near) / (far + near).clamp_min(1e-30)).double().mean().item()


class FeatureScore(Score):
    """A class score with a feature term: loss + weight * (told + apart); `seen` on validation data.

    Features and logits are of one forward, from the layer on before which nothing changes (`cut`).
    """

    def __init__(self, samples: Samples, label: int, weight: float = 0.0) -> None:
        super().__init__()
        self._samples, self._label, self.weight = samples, label, weight
        self._marked, self._first = samples.labels == label, 0
        self._given = samples.images

    @torch.no_grad()
    def cut(self, model: DigitNet, first: int) -> None:
        """From now on nothing before `body[first]` changes."""
        self._first, self._given = first, model.body[:first](self._samples.images)

    @torch.no_grad()
    def look(self, name: str, model: Any) -> FeaturesSeen:
        """What the model does now."""
        features = model.body[self._first :](self._given)
        plain = seen(Answered(model.head(features), self._samples.labels, self._marked))
        told, apart = lies(features, self._samples.labels, self._label) if self.weight else (0.0, 0.0)
        return FeaturesSeen(plain.left, plain.kept, plain.sure_left, plain.sure_kept, told, apart)

    def loss(self, seen: FeaturesSeen, before: FeaturesSeen) -> float:
        """The rule above."""
        return class_loss(seen, before) + self.weight * (seen.told + seen.apart)


@torch.no_grad()
def nearest(x: Tensor, y: Tensor, to: Tensor, seed: int) -> Tensor:
    """The class of the nearest mean of 5 samples a class, in each of 20 draws: [20, len(to)]."""
    generator, classes, found = torch.Generator().manual_seed(seed), y.unique(), []
    for _ in range(DRAWS):
        rows = [(y == c).nonzero()[:, 0] for c in classes]
        means = torch.stack([x[of[torch.randperm(len(of), generator=generator)[:SHOTS]]].mean(0) for of in rows])
        found.append(classes[torch.cdist(to, means).argmin(1)])
    return torch.stack(found)


@torch.no_grad()
def judged(model: DigitNet, train: Samples, test: Samples, label: int, kept: float | None, seed: int) -> list[float]:
    """The columns of a model, on test data. `kept`: accuracy on the rest before; None: this is before."""
    x, to = model.body(train.images), model.body(test.images)
    gone = test.labels == label
    right = model.head(to).argmax(1) == test.labels
    ridge = make_pipeline(StandardScaler(), RidgeClassifier()).fit(x.numpy(), train.labels.numpy())
    known = torch.from_numpy(ridge.predict(to.numpy())) == test.labels
    near = nearest(x, train.labels, to, seed) == test.labels
    rest = right[~gone].double().mean().item()
    return [
        right[gone].double().mean().item(),
        rest if kept is None else kept - rest,
        known[gone].double().mean().item(),
        near[:, gone].double().mean().item(),
        known[~gone].double().mean().item(),
        near[:, ~gone].double().mean().item(),
    ]


# ---- Fishers ---------------------------------------------------------------------------------------------------------


class Fishers:
    """Of a network, by every estimator: Fishers of its nodes and of requests, and gradients of requests."""

    def __init__(self, recipe: Recipe, network: Network, others: Mapping[str, Network]) -> None:
        self._recipe, self._networks = recipe, {"batch": network, **others}
        by_means = {
            name: with_means(model, network.seen(name, recipe.data(name))) for name, model in network.models.items()
        }
        self._networks[FEATURES] = Network(recipe, network.digits, by_means, "all", "batch", 16)

    def of(self, node: str, label: int) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Estimator -> (Fisher of the node, Fisher of the request), each name -> tensor."""
        return {
            name: (network.originals[node].as_dict(), network.request(label).fisher.as_dict())
            for name, network in self._networks.items()
        }

    def gradient(self, label: int) -> dict[str, Tensor]:
        """Of the mean loss on the request's training data, at its origin."""
        origin, network = self._recipe.origin[label], self._networks["batch"]
        model, samples = copy.deepcopy(network.models[origin]), self._recipe.data(origin).only([label])
        samples = network.seen(origin, samples)
        functional.cross_entropy(model(samples.images), samples.labels).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def with_means(model: DigitNet, samples: Samples) -> DigitNet:
    """The model with its last layer replaced: logits are -d² / t, d the distance from a class mean of the features.

    t is such that the nearest other class is 4 behind on average: less, and the gradients of most samples vanish.
    """
    model = copy.deepcopy(model)
    x, y = model.body(samples.images), samples.labels
    known = y.unique()
    means = torch.stack([x[y == c].mean(0) for c in known])
    squares = torch.cdist(x, means).square()
    own = squares[y[:, None] == known]
    gap = (squares.masked_fill(y[:, None] == known, torch.inf).amin(1) - own).mean()
    scale = 4 / gap
    model.head.weight.zero_()
    model.head.bias.fill_(-1e4)  # of classes it never saw
    model.head.weight[known] = 2 * scale * means
    model.head.bias[known] = -scale * means.square().sum(1)
    return model


# ---- what a rule does ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A layer dampened with the Fishers of an estimator: the share of its elements with the largest F / I."""

    layer: str
    estimator: str
    share: float
    alpha: float
    lam: float


@dataclass
class Node:
    """A model that a request reaches, its data, and what was done to it by a rule so far."""

    model: DigitNet
    train: Samples
    validation: Samples
    test: Samples
    label: int
    fishers: Mapping[str, tuple[dict[str, Tensor], dict[str, Tensor]]]
    gradient: Mapping[str, Tensor]
    retrained: DigitNet
    seed: int
    done: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        self.layers = {own[0].rpartition(".")[0]: own for own in layers_of(self.model, names)}  # the last layer first
        self._kept = copy.deepcopy(self.model.state_dict())
        self._sorted: dict[tuple[str, str, bool], Tensor] = {}
        rest = self.train.without([self.label])
        generator = torch.Generator().manual_seed(self.seed)
        self.rest = rest.take(torch.randperm(len(rest.labels), generator=generator)[:RECALIBRATE])
        self._here = (0, self.rest.images)

    def restore(self) -> None:
        """Everything as it was."""
        self.model.load_state_dict(self._kept)
        self.done = []

    def steps(
        self, layer: str, estimator: str, shares: Sequence[float] | None, lam: float, signed: bool = False
    ) -> Iterator[Step]:
        """What may be tried in a layer, as `tune` has it; shares None: the twelve of the last layer."""
        ratios = self._ratios(layer, estimator, signed)
        count = len(ratios)
        if not count:
            return
        alphas: dict[float, float] = {}
        for share in np.logspace(-np.log10(count), np.log10(MOST), LAST_POINTS).tolist() if shares is None else shares:
            alphas.setdefault(ratios[min(int(share * count + 1e-9), count - 1)].item(), share)
        yield from (Step(layer, estimator, share, alpha, lam) for alpha, share in alphas.items())

    def _ratios(self, layer: str, estimator: str, signed: bool) -> Tensor:
        """F / I of the elements that an alpha can select, descending."""
        if (layer, estimator, signed) not in self._sorted:
            found = []
            original, forget = self.fishers[estimator]
            for name in self.layers[layer]:
                ratio = forget[name] / original[name]
                there = (ratio > 0) & ratio.isfinite()
                if signed:
                    there &= self.gradient[name].sign() * self._kept[name].sign() < 0
                found.append(ratio[there])
            self._sorted[layer, estimator, signed] = torch.cat(found).sort(descending=True).values
        return self._sorted[layer, estimator, signed]

    def take(self, step: Step, signed: bool = False) -> None:
        """Dampen the layer from its state at first."""
        names = self.layers[step.layer]
        self._put_back(step.layer)
        original, forget = (ff.Fisher.from_dict({n: of[n] for n in names}) for of in self.fishers[step.estimator])
        gradient = ff.Gradient.from_dict({n: self.gradient[n] for n in names}) if signed else None
        ff.dampen_(self.model, original, forget, gradient=gradient, alpha=step.alpha, lam=step.lam)

    @torch.no_grad()
    def _put_back(self, layer: str) -> None:
        for name in self.layers[layer]:
            self.model.get_parameter(name).copy_(self._kept[name])

    def put(self, layer: str, step: Step | None, signed: bool = False) -> None:
        """The layer as this step leaves it; None: as it was."""
        if step is None:
            self._put_back(layer)
        else:
            self.take(step, signed)
            self.done.append(step)

    @torch.no_grad()
    def settle(self, first: int) -> None:
        """BatchNorm from `body[first]` on as it follows from the steps done so far, after trials of others."""
        if any(step.layer.startswith("body.") for step in self.done):
            self.recalibrate(first)
        else:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self._kept[name])

    @torch.no_grad()
    def recalibrate(self, first: int = 0) -> None:
        """Means and variances of BatchNorm anew from `body[first]` on, over training data of the other classes."""
        if self._here[0] != first:
            self._here = first, self.model.body[:first](self.rest.images)
        tail = self.model.body[first:]
        norms = [module for module in tail if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
        momenta = [module.momentum for module in norms]
        for module in norms:
            module.momentum = 1.0  # one batch of everything
            module.train()
        tail(self._here[1])
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
            module.eval()


@dataclass(frozen=True)
class Way:
    """Head first, then layer by layer, as `tune(by="layer")` goes; and in what a rule differs from that.

    With a `weight` of the feature term the step with the lowest loss is taken among those that are borne; without, the
    largest share that is borne, and of its estimators that with the highest score.
    """

    head: tuple[str, ...] = ("batch",)
    body: tuple[str, ...] = ("batch",)  # estimators; none: the last layer alone
    signed: bool = False
    shares: tuple[float, ...] = SHARES
    lams: tuple[float, ...] = (LAM,)
    slack: float = SLACK  # of what is kept
    less_sure: float = LESS_SURE
    weight: float = 0.0
    anew: bool = False  # BatchNorm after every step of the body, before it is looked at
    after: bool = False  # BatchNorm when all is done
    again: bool = False  # the last layer is chosen again at the end

    def __call__(self, node: Node, score: FeatureScore) -> None:
        """Choose by the score, and leave the model as chosen."""
        score.weight = self.weight
        score.cut(node.model, 0)
        score.before.clear()
        score("", node.model)
        if not self.last(node, score):
            return
        least, before = score.look("", node.model), score.before[""]
        for layer in list(node.layers)[1:] if self.body else ():
            self._layer(node, score, layer, least, min(before.kept, least.kept))
        if self.after:
            node.recalibrate()
        if self.again:
            self.last(node, score)

    def last(self, node: Node, score: FeatureScore) -> bool:
        """The last layer, by all estimators; whether any of its steps beats leaving it alone."""
        layer = next(iter(node.layers))
        node.put(layer, None)
        node.done = [step for step in node.done if step.layer != layer]
        score.cut(node.model, len(node.model.body))
        best, highest = None, score("", node.model)
        for estimator in self.head:
            for step in node.steps(layer, estimator, None, LAST_LAMBDAS[0], self.signed):
                node.take(step, self.signed)
                if (found := score("", node.model)) > highest:
                    best, highest = step, found
        node.put(layer, best, self.signed)
        return best is not None

    def _layer(self, node: Node, score: FeatureScore, layer: str, least: FeaturesSeen, kept: float) -> None:
        first = int(layer.split(".")[1])
        score.cut(node.model, first)
        best, highest = None, score("", node.model) if self.weight else -torch.inf
        ways = product(self.body, self.lams)
        steps = [step for name, lam in ways for step in node.steps(layer, name, self.shares, lam, self.signed)]
        for share in self.shares:
            for step in (one for one in steps if one.share == share):
                node.take(step, self.signed)
                if self.anew:
                    node.recalibrate(first)
                found = score("", node.model)
                if found > highest and self._bears(score.last[""], least, kept):
                    best, highest = step, found
            if best is not None and not self.weight:
                break
        node.put(layer, best, self.signed)
        if self.anew:
            node.settle(first)

    def _bears(self, now: FeaturesSeen, least: FeaturesSeen, kept: float) -> bool:
        """As in `tune`, of a score that measures."""
        return (
            now.left <= least.left
            and now.kept >= kept - self.slack
            and now.sure_left - least.sure_left <= SURER
            and least.sure_kept - now.sure_kept <= self.less_sure
        )


UNTIL, UNTIL_LAM = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0), 0.1


@dataclass(frozen=True)
class Until:
    """One share for the whole body, the smallest at which a probe has fallen to what it is of the retrained model.

    That is seen on validation data; no rule for use, as it needs the retrained model. The last layer is chosen after.
    """

    probe: str
    estimator: str = "batch"
    anew: bool = False

    def __call__(self, node: Node, score: FeatureScore) -> None:
        """Choose, and leave the model as chosen."""
        score.weight = 0.0
        score.cut(node.model, 0)
        score.before.clear()
        score("", node.model)
        goal = self._probe(node, node.retrained)
        for share in UNTIL:
            for layer in list(node.layers)[1:]:
                for step in node.steps(layer, self.estimator, [share], UNTIL_LAM):
                    node.take(step)
            if self.anew:
                node.recalibrate()
            if self._probe(node, node.model) <= goal:
                break
        Way().last(node, score)

    def _probe(self, node: Node, model: DigitNet) -> float:
        found = judged(model, node.train, node.validation, node.label, None, node.seed)
        return found[COLUMNS.index(self.probe)]


BY_LAYER = "last layer, then by layer"  # what `ff.tune(by="layer")` and `ff.unlearn_(params=None)` do
BEFORE, RETRAINED = "the model as it was", "retrained without the class"
RULES: dict[str, Callable[[Node, FeatureScore], None]] = {
    "last layer alone": Way(body=()),
    BY_LAYER: Way(),
    "… signed": Way(signed=True),
    "… best estimator for each layer": Way(head=tuple(ESTIMATORS), body=tuple(ESTIMATORS)),
    "… body with Fishers of class means": Way(body=(FEATURES,)),
    "… then BatchNorm anew": Way(after=True),
    "… then BatchNorm anew, last layer again": Way(after=True, again=True),
    "feature term": Way(**MORE),
    "… a point lost allowed": Way(**MORE, **A_POINT),
    "… a point lost allowed, Fishers of class means": Way(**MORE, **A_POINT, body=(FEATURES,)),
    "… BatchNorm anew at each step, last layer again": Way(**MORE, anew=True, again=True),
    "body until the ridge probe falls": Until("ridge"),
    "body until the nearest mean falls": Until("nearest"),
    "… Fishers of class means": Until("nearest", FEATURES),
    "… BatchNorm anew": Until("nearest", anew=True),
}


# ---- study -----------------------------------------------------------------------------------------------------------


def classes_of(recipe: Recipe) -> list[int]:
    """What is forgotten, one after another; other classes with the next seeds."""
    every, most = NETWORKS[recipe.scenario]
    return sorted(recipe.origin)[recipe.seed % every :: every][:most]


def nodes_of(scenario: str, seed: int, cache: Path) -> Iterator[Node]:
    """Every pair of a network."""
    digits = load_digits(seed)
    recipe = recipe_of(scenario, digits, seed)
    models = trained(recipe, cache)
    batch, *others = (Network(recipe, digits, models, "all", *how) for how in ESTIMATORS.values())
    fishers = Fishers(recipe, batch, dict(zip(list(ESTIMATORS)[1:], others, strict=True)))
    for label in classes_of(recipe):
        reached = recipe.reached([label])
        never = grow(recipe, without=[label], keep={name: one for name, one in models.items() if name not in reached})
        gradient = fishers.gradient(label)
        for name in reached:
            train = batch.seen(name, recipe.data(name))
            sets = train, batch.split(name, "validation"), batch.split(name, "test")
            yield Node(models[name], *sets, label, fishers.of(name, label), gradient, never[name], seed)


def measured(scenario: str, seed: int, cache: Path) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """One network: rule -> column -> a number a pair; and rule -> seconds of choosing."""
    found: dict[str, dict[str, list[float]]] = {}
    seconds = dict.fromkeys(RULES, 0.0)

    def note(rule: str, node: Node, model: DigitNet, kept: float | None) -> float:
        values = judged(model, node.train, node.test, node.label, kept, node.seed)
        columns = found.setdefault(rule, {column: [] for column in COLUMNS})
        for column, value in zip(COLUMNS, values, strict=True):
            columns[column].append(round(value, 4))
        return values[1]

    for node in nodes_of(scenario, seed, cache):
        kept = note(BEFORE, node, node.model, None)
        note(RETRAINED, node, node.retrained, kept)
        score = FeatureScore(node.validation, node.label)
        for rule, way in RULES.items():
            began = time.process_time()
            way(node, score)
            seconds[rule] += time.process_time() - began
            note(rule, node, node.model, kept)
            node.restore()
    return found, {rule: round(spent, 1) for rule, spent in seconds.items()}


def study(seeds: Sequence[int], cache: Path, results: Path) -> dict[str, Any]:
    """Measure what the results do not have yet, and write them after every network."""
    torch.set_num_threads(1)  # these models are too small to share
    result: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"rows": []}
    done = {(row["seed"], row["scenario"]) for row in result["rows"]}
    for seed, scenario in product(seeds, NETWORKS):
        if (seed, scenario) in done:
            continue
        began = time.process_time()
        found, seconds = measured(scenario, seed, cache)
        row = {"seed": seed, "scenario": scenario, "cpu_seconds": time.process_time() - began, "seconds": seconds}
        result["rows"].append({**row, "pairs": found})
        write_json(results, {"environment": environment(), **result}, digits=5)
        print(f"seed {seed}, {scenario}: {row['cpu_seconds']:.0f} s of CPU", flush=True)
    return result


# ---- table -----------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[dict], rule: str) -> dict[str, float]:
    """Of all pairs: how many, the shares within two pairs of bounds, and the mean of every column."""
    columns = {c: [value for row in rows for value in row["pairs"][rule][c]] for c in COLUMNS}
    pairs = list(zip(columns["left"], columns["lost"], strict=True))
    found = {f"within {b}": mean(x <= b / 100 + 1e-9 and y <= b / 100 + 1e-9 for x, y in pairs) for b in (1, 2)}
    return {"pairs": len(pairs), **found, **{c: mean(values) for c, values in columns.items()}}


def tables(result: dict, seen: Sequence[int] = SEEN, new: Sequence[int] = NEW) -> str:
    """A table in Markdown for the seeds that were looked at, and one for those that are new."""
    out = []
    for title, seeds in (("New seeds", new), ("Looked at", seen)):
        rows = [row for row in result["rows"] if row["seed"] in seeds]
        if not rows:
            continue
        lines = []
        for rule in (BEFORE, RETRAINED, *RULES):
            found = summary(rows, rule)
            cells = [f"{100 * found[key]:.1f} %" for key in ("within 1", "within 2", "left")]
            cells += [f"{100 * found['lost']:.2f}", *(f"{100 * found[c]:.1f}" for c in COLUMNS[2:])]
            if rule == BEFORE:
                cells[3] = ""
            lines.append([rule, *(["", ""] if rule in (BEFORE, RETRAINED) else cells[:2]), *cells[2:]])
        heads = ["rule", "≤ 1, ≤ 1", "≤ 2, ≤ 2", "left", "lost", "ridge", "nearest mean", "ridge, rest", "mean, rest"]
        which = ", ".join(map(str, sorted({row["seed"] for row in rows})))
        out.append(f"**{title}**: {which}; {found['pairs']} pairs.\n\n{markdown(heads, lines)}")
    return "\n".join(out)


def main() -> None:
    """Run the study, or only write its table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fiun_fast_quality")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.tables:
        study(arguments.seed or [*SEEN, *NEW], arguments.cache, arguments.results)
    text = tables(json.loads(arguments.results.read_text()))
    print(text)
    if arguments.results == RESULTS:
        fill(PAGE, "features", f"\n{text}\n")


if __name__ == "__main__":
    main()
