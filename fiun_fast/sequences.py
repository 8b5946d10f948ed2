"""What a causal language model still recalls of some sequences, measured in more than one way.

A sequence is a pair (prompt, answer) of token ids, two tensors [P] and [A] of int64, each of at least one token. The
model takes ids [B, T] and returns logits [B, T, vocabulary], a tuple that begins with them, or an object with
`.logits`; position t predicts token t + 1. Pairs of unlike lengths are padded on the right, which a causal model does
not see from its earlier positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_count
from .errors import ArgumentError, EstimationError

Pair = tuple[Tensor, Tensor]


def answer_losses(model: nn.Module, pairs: Sequence[Pair]) -> Tensor:
    """Mean cross entropy of each answer's tokens given all before them: [pairs], in nats, differentiable.

    The model runs as it is, in one batch.

    Raises:
        ArgumentError: no pairs, or one of another form.
        EstimationError: the model's output is not [B, T, vocabulary].

    """
    losses, _, inside = _answers(model, pairs)
    return losses.sum(1) / inside.sum(1)


def reproduced(model: nn.Module, pairs: Sequence[Pair]) -> Tensor:
    """Whether greedy decoding of each prompt gives exactly the answer: [pairs] bool.

    One forward pass of prompt and answer tells: the first token that greedy decoding would get wrong is one whose
    logits, given the right tokens before it, are largest elsewhere. Errors as `answer_losses`.
    """
    with torch.no_grad():
        _, right, inside = _answers(model, pairs)
    return (right | ~inside).all(1)


def multiple_choice(model: nn.Module, pairs: Sequence[Pair], others: Sequence[Sequence[Tensor]]) -> Tensor:
    """Whether each answer has a lower loss than every other answer that is offered: [pairs] bool.

    Args:
        model: as above.
        pairs: prompts with the true answers.
        others: for each pair the wrong answers.

    Raises:
        ArgumentError: others are not one list a pair; else as `answer_losses`.

    """
    if len(others) != len(pairs):
        raise ArgumentError(f"others has {len(others)} lists for {len(pairs)} pairs")
    best = []
    with torch.no_grad():
        for (prompt, answer), wrong in zip(pairs, others, strict=True):
            losses = answer_losses(model, [(prompt, answer), *((prompt, other) for other in wrong)])
            best.append(bool((losses[0] < losses[1:]).all()))
    return torch.tensor(best)


def relearned(
    model: nn.Module, pairs: Sequence[Pair], *, shown: int, steps: int = 20, lr: float = 3e-4, batch: int = 32
) -> float:
    """Share of the pairs that come back by training a copy of the model on the first few of them.

    What is hidden comes back with its neighbours, what is gone does not.

    Args:
        model: stays as it is.
        pairs: all that was forgotten; of `pairs[shown:]` the share that is reproduced afterwards is returned.
        shown: how many are trained on.
        steps, lr: of AdamW over these answers' losses.
        batch: pairs that go through the model at once.

    Raises:
        ArgumentError: nothing is left to be asked; else as `answer_losses`.

    """
    shown = check_count("shown", shown, most=max(1, len(pairs) - 1))
    if len(pairs) <= shown:
        raise ArgumentError(f"{len(pairs)} pairs, of which {shown} are shown: none is left to be asked")
    other = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=lr)
    for _ in range(check_count("steps", steps)):
        optimizer.zero_grad()
        answer_losses(other, pairs[:shown]).mean().backward()
        optimizer.step()
    return _share_reproduced(other, pairs[shown:], batch)


@dataclass(frozen=True)
class Recalled:
    """What is left of sequences to be forgotten, and what of those to be kept; shares 0..1.

    Attributes:
        left: of the forgotten, reproduced exactly.
        kept: of the retained, reproduced exactly.
        loss: mean answer loss of the forgotten, in nats.
        kept_loss: of the retained.
        chosen: of the forgotten, the answer has the lowest loss of those offered; chance: 1 / offered. None: not asked.
        relearned: of the forgotten, how many come back with a few of them (`relearned`). None: not asked.

    """

    left: float
    kept: float
    loss: float
    kept_loss: float
    chosen: float | None = None
    relearned: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        chosen, back = ("not asked" if s is None else f"{s:.0%}" for s in (self.chosen, self.relearned))
        return (
            f"forgotten: {self.left:.0%} reproduced, loss {self.loss:.3g}, multiple choice {chosen}, relearned {back}; "
            f"retained: {self.kept:.0%} reproduced, loss {self.kept_loss:.3g}"
        )


def score_sequences(
    model: nn.Module,
    forget: Sequence[Pair],
    retain: Sequence[Pair],
    *,
    others: Sequence[Sequence[Tensor]] | None = None,
    shown: int | None = None,
    batch: int = 64,
) -> Recalled:
    """Look at a model in all these ways at once; it runs in eval mode, and is as before afterwards.

    Exact reproduction alone misleads: a model that no longer says a fact may still know it from among others, and may
    say it again after a little training.

    Args:
        model: causal language model.
        forget, retain: what was to be forgotten, and what was not.
        others: wrong answers for each pair of `forget`, for multiple choice.
        shown: pairs of `forget` to train a copy on, for `relearned`.
        batch: pairs that go through the model at once.

    Raises:
        ArgumentError, EstimationError: as the functions above.

    """
    batch = check_count("batch", batch)
    with _evaluating(model), torch.no_grad():
        losses = [_mean(model, pairs, batch) for pairs in (forget, retain)]
        chosen = None if others is None else float(multiple_choice(model, forget, others).double().mean())
        left, kept = (_share_reproduced(model, pairs, batch) for pairs in (forget, retain))
    back = None if shown is None else relearned(model, forget, shown=shown, batch=batch)
    return Recalled(left, kept, losses[0], losses[1], chosen, back)


def _mean(model: nn.Module, pairs: Sequence[Pair], batch: int) -> float:
    return float(torch.cat([answer_losses(model, pairs[i : i + batch]) for i in range(0, len(pairs), batch)]).mean())


def _share_reproduced(model: nn.Module, pairs: Sequence[Pair], batch: int) -> float:
    with _evaluating(model):
        found = [reproduced(model, pairs[i : i + batch]) for i in range(0, len(pairs), batch)]
    return float(torch.cat(found).double().mean())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _answers(model: nn.Module, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token, [B, T - 1]: its loss, 0 outside the answer; is its logit the largest; is it of the answer."""
    if len(pairs) == 0:
        raise ArgumentError("no sequences")
    for prompt, answer in pairs:
        for what, ids in (("prompt", prompt), ("answer", answer)):
            if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.is_floating_point() or not len(ids):
                raise ArgumentError(f"{what} is {ids!r:.60}, expected a tensor [tokens] of token ids")
    device = next(model.parameters()).device
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.int64)
    inside = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, where, (prompt, answer) in zip(ids, inside, pairs, strict=True):
        end = len(prompt) + len(answer)
        row[:end] = torch.cat([prompt, answer])
        where[len(prompt) : end] = True
    ids, inside = ids.to(device), inside.to(device)[:, 1:]
    logits = _logits(model(ids), ids)[:, :-1]
    targets = ids[:, 1:]
    losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return losses * inside, logits.argmax(-1) == targets, inside


def _logits(output: Any, ids: Tensor) -> Tensor:
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) and logits else logits
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        expected = f"[{ids.shape[0]}, {ids.shape[1]}, vocabulary]"
        raise EstimationError(f"the model's output is {found}, expected logits {expected}")
    return logits
