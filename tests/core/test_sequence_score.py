"""`SequenceScore` against the obvious loop, and `unlearn_` with it on a small language model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fiun_fast as ff

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = 20


class Small(nn.Module):
    """ids [B, T] -> logits [B, T, WORDS]; a mean over what came before, so that it is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.drop = nn.Embedding(WORDS, 16), nn.Linear(32, 32), nn.Dropout(0.3)
        self.head = nn.Linear(32, WORDS)

    def forward(self, ids):
        at = self.embed(ids)
        mean = at.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.head(self.drop(self.mix(torch.cat([at, mean], -1)).tanh()))


def sequences(count: int, first: int, last: int, seed: int) -> torch.Tensor:
    return torch.randint(first, last, (count, 8), generator=torch.Generator().manual_seed(seed))


FORGET, RETAIN = sequences(6, 10, 20, 1), sequences(12, 0, 10, 2)  # words of their own


def batches(ids: torch.Tensor) -> list:
    return [(part[:, :-1], part[:, 1:]) for part in ids.split(5)]


def by_hand(model: nn.Module, ids: torch.Tensor) -> float:
    """Token after token, in float64."""
    model = copy.deepcopy(model).double().eval()
    losses = []
    for row in ids:
        with torch.no_grad():
            (logits,) = model(row[None, :-1])
        losses += [(z.logsumexp(0) - z[word]).item() for z, word in zip(logits, row[1:], strict=True)]
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def learned() -> nn.Module:
    torch.manual_seed(0)
    model, every = Small(), torch.cat([FORGET, RETAIN])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(every[:, :-1]).transpose(1, 2), every[:, 1:]).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("form", ["tensors", "pairs", "by node"])
def test_it_sees_what_the_obvious_loop_sees(learned, form):
    model = copy.deepcopy(learned)
    forget, retain = batches(FORGET), batches(RETAIN)
    if form == "pairs":  # of one token and the rest of it: the same tokens count
        forget, retain = ([(row[:1], row[1:]) for row in ids] for ids in (FORGET, RETAIN))
    if form == "by node":
        forget, retain = {"u0": forget}, {"u0": retain}
    score = ff.SequenceScore(forget, retain, target=2.0)
    before = by_hand(model, FORGET), by_hand(model, RETAIN)
    assert score("u0", model) == pytest.approx(-(2.0 - before[0] + 0.02 * before[1]), abs=1e-5)
    with torch.no_grad():
        model.head.weight.mul_(0.6)
    after = by_hand(model, FORGET), by_hand(model, RETAIN)
    risen = after[1] - before[1]
    assert risen > 0
    assert score("u0", model) == pytest.approx(-(max(0, 2.0 - after[0]) + risen + 0.02 * after[1]), abs=1e-5)
    seen = score.last["u0"]
    assert (seen.forget_loss, seen.retain_loss) == pytest.approx(after, abs=1e-5)
    assert seen.left == pytest.approx(max(0.0, math.exp(-after[0]) - math.exp(-2.0)), abs=1e-5)
    assert (seen.kept, score.before["u0"].kept) == pytest.approx((math.exp(-after[1]), math.exp(-before[1])), abs=1e-5)
    assert model.training


def test_the_target_is_that_of_a_guess_by_default_and_padding_does_not_count(learned):
    holes = [(x, y.masked_fill(torch.arange(7) > 4, -100)) for x, y in batches(FORGET)]
    seen = ff.SequenceScore(holes, batches(RETAIN)).look("u0", learned)
    assert seen.target == pytest.approx(math.log(WORDS))
    assert seen.forget_loss == pytest.approx(by_hand(learned, FORGET[:, :6]), abs=1e-5)


def test_a_model_forgets_sequences_with_words_of_their_own(learned):
    model = copy.deepcopy(learned)

    def loss_fn(logits, labels):
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels)

    score = ff.SequenceScore(batches(FORGET), batches(RETAIN), target=2.5)
    outcome = ff.unlearn_(
        model,
        data=batches(torch.cat([RETAIN, FORGET])),
        forget=batches(FORGET),
        score=score,
        params=None,
        estimators=["batch"],
        estimate={"loss_fn": loss_fn},
        points=24,
        left=0.1,
        lost=0.1,
    )
    node = outcome["model"]
    assert node.met
    assert node.before.forget_loss == pytest.approx(by_hand(learned, FORGET), abs=1e-5)
    assert node.after.forget_loss == pytest.approx(by_hand(model, FORGET), abs=1e-5)
    assert node.before.forget_loss < 1 < 1.5 < node.after.forget_loss
    assert node.after.retain_loss < node.before.retain_loss + 0.2
    outcome.undo_()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), learned.parameters(), strict=True))


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((iter([]), []), ff.ArgumentError, "forget is a list_iterator, which can be gone over once"),
        (([], batches(RETAIN)), ff.EstimationError, "sequences of node 'u0' to forget: it is empty"),
        ((batches(FORGET), {"u1": []}), ff.ArgumentError, "no validation data for node 'u0'; there are some for u1"),
        ((batches(FORGET), [(RETAIN[0, :0], RETAIN[0])]), ff.ArgumentError, "node 'u0' to retain: prompt is"),
    ],
)
def test_errors(learned, args, error, match):
    with pytest.raises(error, match=match):
        ff.SequenceScore(*args)("u0", learned)


PAIRS = [(row[:2], row[2:]) for row in RETAIN]


@pytest.mark.parametrize(
    ("wrapped", "pairs", "how", "error", "match"),
    [
        (lambda z: z, PAIRS, {"forward_fn": lambda model, batch: batch}, ff.ArgumentError, "forward_fn is for batches"),
        (lambda z: z, PAIRS, {"target_index": 1}, ff.ArgumentError, "target_index is for batches"),
        (lambda z: z, [(RETAIN[0], torch.tensor([10_000]))], {}, ff.EstimationError, "raises IndexError"),
        (lambda z: {"logits": z}, PAIRS, {}, ff.EstimationError, "forget: the model's output is dict, expected logits"),
        (lambda z: (), PAIRS, {}, ff.EstimationError, "forget: the model's output is tuple, expected logits"),
        (lambda z: z.sum(), PAIRS, {}, ff.EstimationError, r"forget: the model's output is \[\], expected logits"),
    ],
)  # fmt: skip
def test_errors_of_pairs(learned, wrapped, pairs, how, error, match):
    class Wrapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(learned)

        def forward(self, ids):
            return wrapped(self.inner(ids))

    with pytest.raises(error, match=match):
        ff.SequenceScore(pairs, PAIRS, **how)("u0", Wrapping())


def test_a_classifier_is_sent_to_the_other_score():
    model = nn.Linear(4, 3)
    data = [(torch.randn(5, 4), torch.randint(3, (5,)))]
    with pytest.raises(ff.EstimationError, match="expected logits of sequences.*for classifiers there is ClassScore"):
        ff.SequenceScore(data, data)("u0", model)
