"""Was it in the training data? Attacks on one model's answers, and RMIA, which asks a few reference models too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from ..arguments import check_number
from ..errors import ArgumentError
from ..estimators.reading import Forward
from .intervals import Estimate, library, share
from .outputs import Answers, Data, answers, check_again
from .roc import Attack, attack


def entropy_attack(
    model: nn.Module, *, forget: Data, retain: Data, test: Data, forward_fn: Forward | None = None
) -> Estimate:
    """The share of the forget set that is taken for training data by the entropy of the model's answers.

    A logistic regression learns to tell retain (1) from test (0) by the entropy of the softmax alone, the two sets
    weighing the same; the share of the forget set that it puts at 1 is returned, with Wilson's interval (of the forget
    set; the attack is fitted once). Compare with a retrained model's: lower is not better. Source: the figure "MIA" of
    SSD, arXiv 2308.07707, after arXiv 2205.08096; scikit-learn's default regularisation, as there.

    Args:
        model: a classifier, [B, C].
        forget: the data that was to be forgotten.
        retain: the rest of the training data.
        test: data that was never trained on.
        forward_fn: as for `ff.estimate_fisher`.

    Raises:
        EstimationError: as `answers`, naming the set.
        MissingPackageError: without scikit-learn.

    """
    gone, kept, new = _answered(model, forget, retain, test, forward_fn)
    judge = library("sklearn.linear_model").LogisticRegression(class_weight="balanced")
    judge.fit(_column(kept.entropy, new.entropy), _membership(kept, new))
    return share(judge.predict(_column(gone.entropy)) == 1)


def confidence_attack(
    model: nn.Module, *, forget: Data, retain: Data, test: Data, forward_fn: Forward | None = None, seed: int = 0
) -> Estimate:
    """Efficacy: 1 - the share of the forget set that is taken for training data by the probability of its label.

    A support vector machine (RBF kernel, C = 3, gamma = 1 / features) learns to tell retain (1) from test (0) by that
    probability; of retain as many samples as test has are drawn. Higher: more of the forget set looks as if it had
    never been seen. A retrained model does not reach 1. Source: Unlearn-Saliency, arXiv 2310.12508, its "MIA"; the
    attack is described in arXiv 2304.04934, appendix C.3. Wilson's interval, as for `entropy_attack`.

    Args:
        model, forget, retain, test, forward_fn: as there.
        seed: of the draw from retain.

    Raises:
        EstimationError: as `answers`, naming the set.
        MissingPackageError: without scikit-learn.

    """
    gone, kept, new = _answered(model, forget, retain, test, forward_fn)
    if len(kept) > len(new):
        kept = kept.take(np.random.default_rng(seed).permutation(len(kept))[: len(new)])
    judge = library("sklearn.svm").SVC(C=3, gamma="auto", kernel="rbf")
    judge.fit(_column(kept.confidence, new.confidence), _membership(kept, new))
    return share(judge.predict(_column(gone.confidence)) == 0)


def rmia(
    model: nn.Module,
    *,
    forget: Iterable[Any],
    test: Iterable[Any],
    references: Sequence[nn.Module],
    population: Iterable[Any] | None = None,
    gamma: float = 1.0,
    offline: float = 1.0,
    fpr: float = 0.01,
    forward_fn: Forward | None = None,
    seed: int = 0,
) -> Attack:
    """RMIA: how often a sample's likelihood ratio exceeds that of a sample from the population.

    score(x) = Pr_z[ (p(x) / p_ref(x)) / (p(z) / p_ref(z)) > gamma ], p the probability of the label. The forget
    set should score as the test set does: AUC 0.5. Source: RMIA, arXiv 2312.03262, its LR(x, z) and Score.

    Args:
        model: the one that was made to forget.
        forget: members, if they are still known; test: non-members.
        references: models that were trained without the forget set; their mean probability is p_ref. One is enough
            to begin with; more make it sharper.
        population: samples z; None: those of the test set, of which each is compared with the others.
        gamma: see above.
        offline: a in p_ref(x) = ((1 + a) p_out(x) + (1 - a)) / 2, p_out the references' mean: what corrects, below 1,
            for references that never saw x (the paper's offline variant). 1: no correction.
        fpr: false alarms at which hits are counted.
        forward_fn: as for `ff.estimate_fisher`.
        seed: of the bootstrap, over forget and test samples.

    Raises:
        ArgumentError: no references; test has a single sample and there is no population.
        EstimationError: as `answers`, naming the set.

    """
    gamma, references = check_number("gamma", gamma), list(references)
    offline = check_number("offline", offline)
    if not references:
        raise ArgumentError("references is empty, expected models that were trained without the forget set")

    def ratios(what: str, data: Iterable[Any]) -> np.ndarray:
        check_again(what, data)
        own, *others = (answers(m, data, what=what, forward_fn=forward_fn) for m in (model, *references))
        out = np.mean([other.confidence for other in others], axis=0)
        return own.confidence / np.maximum((1 + offline) / 2 * out + (1 - offline) / 2, np.finfo(np.float64).tiny)

    gone, new = ratios("forget", forget), ratios("test", test)
    if population is not None:
        z = ratios("population", population)
        return attack(_exceeding(gone, z, gamma), _exceeding(new, z, gamma), fpr, seed)
    if len(new) < 2:
        raise ArgumentError("test has one sample, and no other to compare it with: pass population=")
    own = new > gamma * new  # a sample is not compared with itself
    others = (_exceeding(new, new, gamma) * len(new) - own) / (len(new) - 1)
    return attack(_exceeding(gone, new, gamma), others, fpr, seed)


def _exceeding(x: np.ndarray, z: np.ndarray, gamma: float) -> np.ndarray:
    """Of each x [n] the share of all z [m] with x > gamma z: [n]."""
    return np.searchsorted(np.sort(gamma * z), x, side="left") / len(z)


def _answered(
    model: nn.Module, forget: Data, retain: Data, test: Data, forward_fn: Forward | None
) -> tuple[Answers, Answers, Answers]:
    sets = {"forget": forget, "retain": retain, "test": test}
    gone, kept, new = (answers(model, data, what=what, forward_fn=forward_fn) for what, data in sets.items())
    return gone, kept, new


def _column(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts)[:, None]


def _membership(kept: Answers, new: Answers) -> np.ndarray:
    return np.repeat([1, 0], [len(kept), len(new)])
