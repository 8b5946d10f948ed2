"""Language models: whether they still prefer the truth (TOFU), and whether unlikely tokens give members away (MUSE)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..arguments import check_count, check_fraction
from ..errors import ArgumentError, EstimationError
from ..estimators.looking import each_batch, looking
from ..estimators.predictions import IGNORED, Predictions
from ..estimators.reading import Forward
from ..sequences import Pair, answer_losses
from .intervals import Estimate, bootstrapped, library
from .outputs import check_again
from .roc import auc


def truth_ratios(
    model: nn.Module, pairs: Sequence[Pair], others: Sequence[Sequence[Tensor]], *, batch: int = 32
) -> np.ndarray:
    """How likely wrong answers are beside the true one: [N] float64, large where the truth is not known.

    R = mean over wrong answers a' of P(a' | q)^(1 / |a'|), over P(a | q)^(1 / |a|), a the true answer in words that
    were not trained on (a paraphrase). Source: TOFU, arXiv 2401.06121, its truth ratio; the mean is arithmetic, as in
    the paper (its code averages losses, which is the geometric mean).

    Args:
        model: causal language model; runs in eval mode and is left as it was.
        pairs: (question, paraphrased answer), token ids, as `fiun_fast.sequences` has them.
        others: for each pair the wrong answers.
        batch: pairs that go through the model at once.

    Raises:
        ArgumentError: no pairs, others are not one list a pair, or one is empty.
        EstimationError: the model's output is no logits, or not finite.

    """
    batch = check_count("batch", batch)
    if not len(pairs):
        raise ArgumentError("pairs is empty: no question to evaluate on")
    if len(others) != len(pairs) or not all(len(wrong) for wrong in others):
        raise ArgumentError(f"others has to hold a list of wrong answers for each of the {len(pairs)} pairs")
    every = [*pairs, *((q, wrong) for (q, _), several in zip(pairs, others, strict=True) for wrong in several)]
    with looking(model) as bare:
        losses = torch.cat([answer_losses(bare, every[i : i + batch]) for i in range(0, len(every), batch)])
    if not bool(losses.isfinite().all()):
        raise EstimationError("the model's outputs are not finite (NaN, or infinite), so that nothing can be measured")
    p = losses.double().neg().exp().cpu().numpy()  # P^(1 / |a|): the loss is a mean over tokens
    ends = np.cumsum([len(pairs), *map(len, others)])
    wrong = [p[a:b].mean() for a, b in pairwise(ends)]
    return np.array(wrong) / np.maximum(p[: len(pairs)], np.finfo(np.float64).tiny)


@dataclass(frozen=True, eq=False)
class ForgetQuality:
    """Whether truth ratios of an unlearned and a retrained model come from one distribution.

    Attributes:
        p_value: of the two-sample Kolmogorov-Smirnov test, two-sided; small: they differ. No interval: it is itself a
            statement about chance. A large one says that no difference was seen, which few questions make easy.
        statistic: largest distance of the two distribution functions, 0..1.
        unlearned, retrained: the truth ratios, [N].

    """

    p_value: float
    statistic: float
    unlearned: np.ndarray
    retrained: np.ndarray

    def __str__(self) -> str:
        return f"forget quality {self.p_value:.3g} (KS {self.statistic:.3f}, {len(self.unlearned)} questions)"


def forget_quality(
    model: nn.Module,
    retrained: nn.Module,
    pairs: Sequence[Pair],
    others: Sequence[Sequence[Tensor]],
    *,
    batch: int = 32,
) -> ForgetQuality:
    """The p-value of a two-sample KS test between truth ratios of the model and of a retrained one.

    Source: TOFU, arXiv 2401.06121, its forget quality.

    Args:
        model: the one that was made to forget; retrained: trained without the forget set.
        retrained: see there.
        pairs, others, batch: as for `truth_ratios`.

    Raises:
        ArgumentError, EstimationError: as `truth_ratios`.

    """
    own, other = (truth_ratios(one, pairs, others, batch=batch) for one in (model, retrained))
    test = library("scipy.stats").ks_2samp(own, other)
    return ForgetQuality(float(test.pvalue), float(test.statistic), own, other)


def min_k(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    k: float = 0.4,
    what: str = "the data",
    forward_fn: Forward | None = None,
) -> np.ndarray:
    """Mean log-probability of the k least likely tokens (a share) of each sequence: [N] float64, higher for members.

    Of n tokens that count, max(1, floor(k n)) are taken. Source: Min-K% Prob, arXiv 2310.16789.

    Args:
        model: language model; runs in eval mode and is left as it was.
        loader: batches that `ff.estimate_fisher` reads: dicts with labels, or (ids[:, :-1], ids[:, 1:]).
        k: share in (0, 1].
        what: what the set is called in messages.
        forward_fn: as for `ff.estimate_fisher`.

    Raises:
        ArgumentError: k out of range.
        EstimationError: as `answers`; there is one prediction a sample, not one a token.

    """
    k = check_fraction("k", k, "a share of the tokens in (0, 1]")

    def take(predictions: Predictions, _: Any) -> Tensor:
        if predictions.labels.dim() != 2 or predictions.labels.is_floating_point():
            raise EstimationError(
                f"the outputs are {list(predictions.logits.shape)}, expected logits of sequences, [B, T, vocabulary]"
            )
        scores = predictions.scores
        scores = scores if scores.dtype == torch.float64 else scores.float()
        at = predictions.labels.clamp(min=0)[..., None]
        logs = (scores.gather(-1, at)[..., 0] - scores.logsumexp(-1)).double()
        counted = predictions.labels != IGNORED
        rows = [row[of] for row, of in zip(logs, counted, strict=True) if bool(of.any())]
        return torch.stack([row.sort().values[: max(1, int(k * len(row)))].mean() for row in rows]).cpu()

    return torch.cat(each_batch(model, loader, what, take, forward_fn=forward_fn)).numpy()


def privleak(
    model: nn.Module,
    retrained: nn.Module,
    *,
    forget: Iterable[Any],
    holdout: Iterable[Any],
    k: float = 0.4,
    forward_fn: Forward | None = None,
    seed: int = 0,
) -> Estimate:
    """PrivLeak, in per cent: 100 (A(model) - A(retrained)) / A(retrained), near 0 for a model that gives nothing away.

    A is 1 - the area under the ROC curve of Min-K% Prob, forget sequences as members against held-out ones, as MUSE
    has it: negative where the forget set still looks like training data (-100: entirely), positive where it looks
    less known than what was never seen. Source: MUSE, arXiv 2407.06460, with k = 40 %. Bootstrapped over sequences.

    Args:
        model: the one that was made to forget.
        retrained: trained without the forget set.
        forget, holdout: loaders of sequences that were to be forgotten, and of ones never trained on.
        k, forward_fn: as for `min_k`.
        seed: of the bootstrap.

    Raises:
        ArgumentError, EstimationError: as `min_k`; A(retrained) is 0, so that nothing can be compared with it.

    """
    scores = []
    for what, data in (("forget", forget), ("holdout", holdout)):
        check_again(what, data)
        scores.append([min_k(one, data, k=k, what=what, forward_fn=forward_fn) for one in (model, retrained)])
    (own, ref), (own_new, ref_new) = scores

    def area(rows: np.ndarray, news: np.ndarray, members: np.ndarray, others: np.ndarray) -> np.ndarray:
        return 1 - auc(members[rows], others[news])

    if area(np.arange(len(ref)), np.arange(len(ref_new)), ref, ref_new) == 0:
        raise EstimationError("the retrained model tells forget from holdout without an error: PrivLeak divides by 0")

    def statistic(rows: np.ndarray, news: np.ndarray) -> np.ndarray:
        base = area(rows, news, ref, ref_new)
        return 100 * (area(rows, news, own, own_new) - base) / np.maximum(base, 1 / (len(ref) * len(ref_new)))

    return bootstrapped(statistic, len(own), len(own_new), seed=seed)
