"""U-LiRA on heads: whether one can tell that a sample was unlearned from that it was never learned.

Many shadow heads are trained on a model's features, each with half of the samples in question, and made to forget
them. A head has few elements, so that all shadows are trained as one batched computation and dampened by one plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn

from ..arguments import check_count, check_number, check_one_of
from ..dag import ForgetRequest, InheritanceDAG
from ..errors import EstimationError
from ..estimators.reading import Forward
from ..unlearning import plan
from .intervals import library
from .outputs import Data, answers
from .roc import Attack, clustered_attack
from .shadow_heads import Heads, Loaders

HeadEstimator = Literal["batch", "sample", "expected"]  # those with a closed form at a head
Unlearn = Callable[[Mapping[str, nn.Linear], Loaders, Loaders], object]


@dataclass(frozen=True, eq=False)
class ShadowAttack:
    """What the attack achieves on heads that were trained, and on the same heads after unlearning.

    Attributes:
        trained: members are samples that a head was trained on.
        unlearned: members are samples that it was trained on and made to forget; 0.5 is what retraining gives.
        phi_trained, phi_unlearned: log(p_y / (1 - p_y)) of each shadow and sample, [shadows, N] float64.
        member: which sample each shadow was trained on, [shadows, N] bool.

    """

    trained: Attack
    unlearned: Attack
    phi_trained: np.ndarray
    phi_unlearned: np.ndarray
    member: np.ndarray

    def __str__(self) -> str:
        return f"{len(self.member)} shadows: trained {self.trained}; unlearned {self.unlearned}"


def ulira(
    model: nn.Module,
    *,
    forget: Data,
    retain: Data,
    shadows: int = 256,
    alpha: float = 10.0,
    lam: float = 1.0,
    estimator: HeadEstimator = "batch",
    unlearn: Unlearn | None = None,
    steps: int = 200,
    lr: float = 1e-2,
    batch: int = 64,
    smoothing: float = 0.0,
    fpr: float = 0.01,
    layer: nn.Module | None = None,
    forward_fn: Forward | None = None,
    seed: int = 0,
) -> ShadowAttack:
    """U-LiRA on the last layer, over features of the model's body as it is.

    Every shadow is a head that starts anew and is trained on retain and on a random half of forget (of each sample
    half of the shadows know it), by AdamW on mini-batches that all shadows share; then it forgets its half. With
    phi = log(p_y / (1 - p_y)), two normal distributions are fitted for each sample: of shadows that knew and forgot it,
    and of those that never knew it. Each shadow in turn is attacked with those of the others:
    score = log N(phi; forgotten) - log N(phi; never known). Source: arXiv 2403.01218 (U-LiRA); phi and the fit from
    arXiv 2112.03570 (LiRA). Attacked is the procedure, not the one head that the model has; what the body remembers is
    not looked at. Intervals are bootstrapped over shadows.

    Args:
        model: a classifier, [B, C].
        forget: samples in question.
        retain: the rest of the training data.
        shadows: how many, 8 at the least.
        alpha, lam, estimator: of the default unlearning: one `ff.plan` of all shadows, each with its own Fishers over
            what it was trained on and what it is to forget, in mini-batches of about one size (`batch`, or a quarter
            of forget where that is less).
        unlearn: another way: called with {name: nn.Linear}, {name: batches to forget}, {name: batches to keep}, of
            features and labels; changes the heads in place.
        steps, lr, batch, smoothing: of the training.
        fpr: false alarms at which hits are counted.
        layer: whose input the features are; None: the last layer.
        forward_fn: as for `ff.estimate_fisher`.
        seed: of the halves, the training and the bootstrap.

    Raises:
        ArgumentError: numbers out of range.
        EstimationError: as `answers`, naming the set; fewer than two samples to forget.

    """
    shadows, steps = check_count("shadows", shadows, least=8), check_count("steps", steps)
    batch, lr, smoothing = check_count("batch", batch), check_number("lr", lr), check_number("smoothing", smoothing)
    check_one_of("estimator", estimator, get_args(HeadEstimator))
    sets = {"forget": forget, "retain": retain}
    gone, kept = (
        answers(model, data, features=True, layer=layer, what=what, forward_fn=forward_fn)
        for what, data in sets.items()
    )
    if len(gone) < 2:
        raise EstimationError("forget has one sample, expected two at the least, of which each shadow knows a half")
    member = _halves(shadows, len(gone), np.random.default_rng(seed))
    x, y = (torch.cat([getattr(one, of) for one in (gone, kept)]) for of in ("features", "labels"))
    heads = Heads(x, y, gone.logits.shape[1], torch.from_numpy(member), seed)
    heads.train(steps, lr, batch, smoothing)
    before = heads.phi().numpy()
    if unlearn is None:
        dampen(heads, estimator, min(batch, max(1, len(gone) // 4)), alpha, lam)
    else:
        unlearn(heads.modules, *heads.loaders(batch))
    after = heads.phi().numpy()
    attacks = [clustered_attack(_likelihood_ratios(phi, member), member, fpr, seed) for phi in (before, after)]
    return ShadowAttack(attacks[0], attacks[1], before, after, member)


def _halves(shadows: int, samples: int, dice: np.random.Generator) -> np.ndarray:
    """Which shadow knows which sample: each sample is known to half of the shadows. [shadows, samples] bool."""
    half = np.arange(shadows) < shadows // 2
    while True:
        member = np.stack([dice.permutation(half) for _ in range(samples)], axis=1)
        if member.any(1).all():  # each shadow has something to forget
            return member


def dampen(heads: Heads, estimator: HeadEstimator, batch: int, alpha: float, lam: float) -> None:
    """One plan of all shadows; each forgets its own samples, which are also among those that its I is taken over."""
    originals, forget = heads.fishers(estimator, batch)
    dag = InheritanceDAG()
    for name, head in heads.modules.items():
        dag.add_model(name, head, fisher=originals[name])
    requests = [ForgetRequest(name, fisher) for name, fisher in forget.items()]
    plan(dag, requests, alpha=alpha, lam=lam).run_()


def _likelihood_ratios(phi: np.ndarray, member: np.ndarray) -> np.ndarray:
    """log N(phi; members) - log N(phi; others), of each shadow by the fits of all the others: [S, n]."""
    normal = library("scipy.stats").norm
    found = []
    for of in (member, ~member):
        n = of.sum(0) - of  # without the shadow itself
        first = (phi * of).sum(0) - phi * of
        mean = first / n
        # deviations from the mean over all: squares of large phi would cancel
        centre = (phi * of).sum(0) / of.sum(0)
        second = (((phi - centre) ** 2) * of).sum(0) - ((phi - centre) ** 2) * of
        variance = np.maximum(second / n - (mean - centre) ** 2, 1e-12)
        found.append(normal.logpdf(phi, mean, np.sqrt(variance)))
    return found[0] - found[1]
