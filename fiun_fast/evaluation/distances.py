"""Distances between distributions of answers: KLoM, to an ensemble without the data, and ZRF, to a random teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..arguments import check_count, check_number
from ..errors import ArgumentError, EstimationError
from ..estimators.reading import Forward
from .intervals import Estimate, library, mean
from .outputs import Answers, answers, check_again


@dataclass(frozen=True, eq=False)
class Klom:
    """Distances of an ensemble's margins from an oracle ensemble's, sample by sample.

    Attributes:
        each: KL divergence of each sample, in nats: [N].
        mean: over the samples.

    """

    each: np.ndarray
    mean: Estimate

    def percentile(self, q: float) -> float:
        """The q-th percentile over the samples, 0..100; the paper reports the 95th."""
        return float(np.percentile(self.each, q))

    def __str__(self) -> str:
        return f"KLoM {self.mean}, 95th percentile {self.percentile(95):.3f}"


def klom(
    unlearned: Sequence[nn.Module] | Sequence[Answers],
    oracles: Sequence[nn.Module] | Sequence[Answers],
    data: Iterable[Any] | None = None,
    *,
    what: str = "data",
    bins: int = 20,
    clip: float = 100.0,
    eps: float = 1e-5,
    forward_fn: Forward | None = None,
    seed: int = 0,
) -> Klom:
    """KL divergence of margins: KL(unlearned || oracle), sample by sample, over two ensembles.

    The margin is m = z_y - logsumexp of the other logits. Margins of one sample are clipped to [-clip, clip] and
    counted into `bins` bins of equal width that span both ensembles' (a bin holds its lower edge, the last one both);
    where the oracles have none and the unlearned have, eps stands for 0. 0 for equal ensembles. Source: arXiv
    2410.23232, its KLoM, with the settings of its authors' code (which drops the largest margin of each sample, since
    its last bin is open). With N models an ensemble differs from another of its kind by
    about (bins in use - 1) / N: compare with that of two halves of the oracles.

    Args:
        unlearned: models that were trained with the data and made to forget it, or their `Answers` on one set.
        oracles: models that were trained without it; likewise.
        data: loader of the samples to look at, where models are given: of the forget set, retain set or test set.
        what: its name in messages.
        bins, clip, eps: see above.
        forward_fn: as for `ff.estimate_fisher`.
        seed: of the bootstrap, over samples.

    Raises:
        ArgumentError: fewer than two models in an ensemble; models without data; answers on unlike sets.
        EstimationError: as `answers`.

    """
    bins, clip, eps = check_count("bins", bins), check_number("clip", clip), check_number("eps", eps)
    margins = []
    for name, ensemble in (("unlearned", unlearned), ("oracles", oracles)):
        if len(ensemble) < 2:
            raise ArgumentError(f"{name} has {len(ensemble)} models, expected an ensemble of two at the least")
        margins.append(np.stack([_margins(one, data, what, forward_fn) for one in ensemble]).clip(-clip, clip))
    own, oracle = margins
    if own.shape[1] != oracle.shape[1]:
        raise ArgumentError(f"unlearned has answers on {own.shape[1]} samples, oracles on {oracle.shape[1]}")
    each = np.array([_binned(p, q, bins, eps) for p, q in zip(own.T, oracle.T, strict=True)])
    return Klom(each, mean(each, seed=seed))


def _margins(one: Any, data: Any, what: str, forward_fn: Forward | None) -> np.ndarray:
    if isinstance(one, Answers):
        return one.margin
    if data is None:
        raise ArgumentError("data is None: pass a loader for the models, or Answers in their place")
    check_again(what, data)
    return answers(one, data, what=what, forward_fn=forward_fn).margin


def _binned(p: np.ndarray, q: np.ndarray, bins: int, eps: float) -> float:
    low, high = min(p.min(), q.min()), max(p.max(), q.max())
    edges = np.linspace(low, high if low < high else low + 1, bins + 1)
    p, q = (np.histogram(of, edges)[0] / len(of) for of in (p, q))
    return float(library("scipy.stats").entropy(p, np.where(p > 0, np.maximum(q, eps), q)))


def zrf(
    model: nn.Module,
    *,
    forget: Iterable[Any],
    teacher: nn.Module | None = None,
    forward_fn: Forward | None = None,
    seed: int = 0,
) -> Estimate:
    """Zero retrain forgetting: 1 - mean over the forget set of JS(model's softmax, that of a random teacher).

    JS = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 and logarithms of base 2, so that ZRF lies in 0..1; averaged
    over samples. (The code published with the paper takes the divergences the other way round, in nats, and some of
    its copies average over samples and classes: their figures are nearer to 1.) High: answers as random as the
    teacher's. A retrained model's is what to compare with. Source: arXiv 2205.08096, its ZRF.

    Args:
        model: a classifier, [B, C].
        forget: the data that was to be forgotten.
        teacher: an untrained model of the same classes; None: a copy of the model, initialised anew.
        forward_fn: as for `ff.estimate_fisher`.
        seed: of the initialisation, and of the bootstrap over samples.

    Raises:
        EstimationError: as `answers`; or a part of the model has no `reset_parameters`: pass `teacher`.

    """
    check_again("forget", forget)
    teacher = untrained(model, seed) if teacher is None else teacher
    own = answers(model, forget, what="forget", forward_fn=forward_fn)
    other = answers(teacher, forget, what="forget", forward_fn=forward_fn)
    return zrf_of(own, other, seed=seed)


def zrf_of(own: Answers, teacher: Answers, *, seed: int = 0) -> Estimate:
    """`zrf` of what a model and the teacher answered on the forget set."""
    if own.logits.shape != teacher.logits.shape:
        raise EstimationError(f"the model answers {list(own.logits.shape)}, the teacher {list(teacher.logits.shape)}")
    p, q = (np.exp(one.log_probabilities) for one in (own, teacher))
    distance = library("scipy.spatial.distance").jensenshannon(p, q, base=2, axis=1)  # the square root
    return mean(1 - distance**2, seed=seed)


def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a model, initialised anew by each module's own `reset_parameters`.

    Raises:
        EstimationError: a module with parameters has none.

    """
    other = copy.deepcopy(model)
    cuda = sorted({p.device.index or 0 for p in other.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for name, module in other.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif any(True for _ in module.parameters(recurse=False)):
                raise EstimationError(
                    f"{type(module).__name__} {name!r} has parameters and no reset_parameters() to draw them anew: "
                    "pass teacher=, an untrained model"
                )
    return other
