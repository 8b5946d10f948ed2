"""Rules by which a class is to leave whole models: what they look at, what they dampen, and how they are judged.

`bench/features.py` compares them. A rule takes a node, which is one model that a request reaches, chooses on its
validation data, and leaves the model dampened; `judged` then asks on test data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import fiun_fast as ff
from fiun_fast.answering import Answered
from fiun_fast.demo.data import DigitNet, Samples
from fiun_fast.grids import MOST
from fiun_fast.layer_tuning import LAM, LAST_LAMBDAS, LAST_POINTS, LESS_SURE, SHARES, SLACK, SURER
from fiun_fast.scope import layers_of
from fiun_fast.scores import ClassesSeen, Score, class_loss, seen

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
