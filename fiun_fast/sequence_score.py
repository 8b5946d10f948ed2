"""`SequenceScore`: what tuning maximises for language models, on sequences to be forgotten and sequences to be kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_number
from .dag import Model
from .errors import ArgumentError, EstimationError
from .estimators.looking import each_batch, looking
from .estimators.predictions import IGNORED, Predictions
from .estimators.raised import RaisedError, passes, said
from .estimators.reading import Forward
from .scores import Score, Seen, check_loaders, check_runs, loader_of
from .sequences import Pair, answer_losses

Sequences = Iterable[Any] | Sequence[Pair]
TIE = 0.02  # of the retained loss: among candidates that reach the target, the one that keeps most
PAIRS = 64  # that go through the model at once


@dataclass(frozen=True)
class SequencesSeen(Seen):
    """What a language model makes of sequences, each token given all before it.

    `left` is exp(-forget_loss) - exp(-target), at least 0: how much more probable a token of the forgotten is than it
    should be; `kept` is exp(-retain_loss). Both are geometric means over tokens.

    Attributes:
        forget_loss, retain_loss: mean cross entropy of a token, in nats.
        target: what `forget_loss` is to reach, in nats.

    """

    forget_loss: float
    retain_loss: float
    target: float


class SequenceScore(Score):
    """`evaluate` for `tune` and `unlearn_`, of a language model that is to forget some sequences and keep others.

        score = -(max(0, target - forget loss) + max(0, retain loss - retain loss before) + 0.02 retain loss)

    Losses are mean cross entropies of a token, in nats. A model that never saw a sequence is unsure of it, and not sure
    of anything else: beyond the target a loss gains nothing. The last term breaks ties. Models run in eval mode and are
    left as they were.

    Args:
        forget, retain: validation sequences, gone over several times: batches that `estimate_fisher` reads (dicts with
            labels, or (ids[:, :-1], ids[:, 1:])), or pairs (prompt, answer) of token ids, [P] and [A], of which the
            answers count (`fiun_fast.sequences`); or {node: such}.
        target: what the loss of the forgotten is to reach; None: log of the vocabulary, that of a guess.
        forward_fn, target_index: as for `estimate_fisher`; not for pairs.

    Raises:
        ArgumentError: an iterator, which can be gone over once, no loader, or a target that is no number. From a call:
            nothing is given for that node, its model is a dict of tensors, or pairs are given and `forward_fn` too.
        EstimationError: from a call: no sequence, or outputs that are not [B, T, vocabulary]; the message names the
            node.

    """

    def __init__(
        self,
        forget: Sequences | Mapping[str, Sequences],
        retain: Sequences | Mapping[str, Sequences],
        *,
        target: float | None = None,
        forward_fn: Forward | None = None,
        target_index: int | None = None,
    ) -> None:
        super().__init__()
        self._forget, self._retain = check_loaders("forget", forget), check_loaders("retain", retain)
        self._target = None if target is None else check_number("target", target)
        self._how: dict[str, Any] = {"forward_fn": forward_fn, "target_index": target_index}

    def look(self, name: str, model: Model) -> SequencesSeen:
        """What the model does now."""
        module, found = check_runs(name, model), []
        for what, loaders in (("forget", self._forget), ("retain", self._retain)):
            data = loader_of(loaders, name)
            found.append(self._loss(module, data, f"sequences of node {name!r} to {what}"))
        (forgotten, words), (retained, _) = found
        target = math.log(words) if self._target is None else self._target
        left = max(0.0, math.exp(-forgotten) - math.exp(-target))
        return SequencesSeen(left, math.exp(-retained), forgotten, retained, target)

    def loss(self, seen: SequencesSeen, before: SequencesSeen) -> float:
        """The rule above."""
        missed = max(0.0, seen.target - seen.forget_loss)
        return missed + max(0.0, seen.retain_loss - before.retain_loss) + TIE * seen.retain_loss

    def _loss(self, model: nn.Module, data: Any, what: str) -> tuple[float, int]:
        """Mean loss of a token, and the size of the vocabulary."""
        if _are_pairs(data):
            for name, given in self._how.items():
                if given is not None:
                    raise ArgumentError(f"{what}: {name} is for batches; the model is called with pairs as they are")
            return _of_answers(model, data, what)

        def take(predictions: Predictions, _: Any) -> tuple[float, int, int]:
            if predictions.labels.dim() != 2 or predictions.labels.is_floating_point():
                raise EstimationError(
                    f"the outputs are {list(predictions.logits.shape)}, expected logits of sequences, "
                    "[B, T, vocabulary]; for classifiers there is ClassScore"
                )
            scores = predictions.scores.flatten(0, 1).float()
            labels = predictions.labels.flatten()
            total = nn.functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum")
            return float(total), int((labels != IGNORED).sum()), predictions.classes

        totals, counts, words = zip(*each_batch(model, data, what, take, **self._how), strict=True)
        return math.fsum(totals) / sum(counts), max(words)


def _are_pairs(data: Any) -> bool:
    """Whether it is a list of (prompt, answer), two tensors [tokens]; batches have a dimension more."""
    one = data[0] if isinstance(data, (list, tuple)) and len(data) else None
    return isinstance(one, (list, tuple)) and len(one) == 2 and all(isinstance(t, Tensor) and t.dim() == 1 for t in one)


def _of_answers(model: nn.Module, pairs: Sequence[Pair], what: str) -> tuple[float, int]:
    words: list[int] = []

    def note(_: nn.Module, given: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        logits = logits[0] if isinstance(logits, tuple) and logits else logits
        if isinstance(logits, Tensor) and logits.dim():  # of anything else `answer_losses` says what is wrong
            words.append(logits.shape[-1])

    try:
        with looking(model) as bare:
            hook = bare.register_forward_hook(note)
            try:
                parts = [answer_losses(bare, pairs[i : i + PAIRS]) for i in range(0, len(pairs), PAIRS)]
            finally:
                hook.remove()
    except (ArgumentError, EstimationError) as error:
        error.args = (f"{what}: {error}",)
        raise
    except Exception as error:
        if passes(error):
            raise
        raise RaisedError(f"{what}: the model, called with token ids int64 [B, T], raises {said(error)}") from error
    lengths = torch.tensor([float(len(answer)) for _, answer in pairs], dtype=torch.float64)
    losses = torch.cat(parts).double().cpu()
    if not bool(losses.isfinite().all()):
        raise EstimationError(f"{what}: the model's outputs are not finite (NaN, or infinite)")
    return float(losses @ lengths / lengths.sum()), max(words)
