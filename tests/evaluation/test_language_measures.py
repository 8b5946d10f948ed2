"""Truth ratios, forget quality, Min-K% and PrivLeak against obvious loops, and in cases whose outcome is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fiun_fast as ff
from fiun_fast.evaluation import forget_quality, min_k, privleak, truth_ratios

pytest.importorskip("scipy")
pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 11


class Language(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.mix = nn.Embedding(TOKENS, 16), nn.GRU(16, 24, batch_first=True)
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(24, TOKENS)

    def forward(self, ids):
        return self.head(self.drop(self.mix(self.embed(ids))[0]))


def sequences(count: int, seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(TOKENS, (count, length), generator=torch.Generator().manual_seed(seed))


def shifted(ids: torch.Tensor, size: int = 5) -> list:
    return [(part[:, :-1], part[:, 1:]) for part in ids.split(size)]


def learn(model: nn.Module, ids: torch.Tensor, steps: int = 60) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:]).backward()
        optimizer.step()
    return model.eval()


def log_p(model: nn.Module, prompt: list[int], answer: list[int]) -> list[float]:
    """Of each token of the answer, one forward pass a token."""
    found, so_far = [], list(prompt)
    for token in answer:
        with torch.no_grad():
            found.append(float(model.eval()(torch.tensor([so_far]))[0, -1].double().log_softmax(0)[token]))
        so_far.append(token)
    return found


def questions(count: int, seed: int):
    ids = sequences(count, seed)
    pairs = [(row[:3], row[3 : 4 + i % 4]) for i, row in enumerate(ids)]
    others = [[row[5 : 6 + k] for k in range(1 + i % 3)] for i, row in enumerate(sequences(count, seed + 1))]
    return pairs, others


def test_truth_ratios_are_the_obvious_loop():
    model = Language().train()
    pairs, others = questions(7, 0)
    normalised = lambda q, a: math.exp(np.mean(log_p(model, q.tolist(), a.tolist())))
    found = truth_ratios(model, pairs, others, batch=4)
    assert model.training
    expected = [np.mean([normalised(q, w) for w in wrong]) / normalised(q, a)
                for (q, a), wrong in zip(pairs, others)]  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-4)


def test_forget_quality():
    pairs, others = questions(40, 0)
    ids = torch.stack([torch.cat([q, a, torch.zeros(6, dtype=torch.long)])[:7] for q, a in pairs])
    knows, never = learn(Language(1), ids, 50), Language(2)
    same = forget_quality(never, never, pairs, others)
    assert (same.p_value, same.statistic) == (1, 0)
    found = forget_quality(knows, never, pairs, others)
    assert found.p_value < 1e-4
    own, other = (np.sort(of) for of in (found.unlearned, found.retrained))
    points = np.concatenate([own, other])
    distance = max(abs((own <= x).mean() - (other <= x).mean()) for x in points)
    assert found.statistic == pytest.approx(distance)
    assert "40 questions" in str(found)


def test_questions_that_cannot_be_asked():
    pairs, others = questions(3, 0)
    with pytest.raises(ff.ArgumentError, match="pairs is empty"):
        truth_ratios(Language(), [], [])
    for wrong in (others[:2], [[], *others[1:]]):
        with pytest.raises(ff.ArgumentError, match="wrong answers for each of the 3 pairs"):
            truth_ratios(Language(), pairs, wrong)
    broken = Language()
    broken.head.bias.data[3] = torch.nan
    with pytest.raises(ff.EstimationError, match="not finite"):
        truth_ratios(broken, pairs, others)


class OwnLoss(nn.Module):
    """As transformers have it: ids with labels that are yet to be shifted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels=None):
        logits = self.model(input_ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("k", [0.4, 0.05, 1.0])
def test_min_k_is_the_obvious_loop(k):
    model, ids = Language(), sequences(6, 3)
    logs = [[log_p(model, row[:t], [row[t]])[0] for t in range(1, 9)] for row in ids.tolist()]
    expected = [np.mean(sorted(row)[: max(1, int(k * 8))]) for row in logs]
    assert min_k(model, shifted(ids), k=k) == pytest.approx(expected, rel=1e-4)
    assert min_k(OwnLoss(model), [{"input_ids": ids, "labels": ids}], k=k) == pytest.approx(expected, rel=1e-4)
    labels = ids.clone()
    labels[:, 5:] = -100
    labels[2] = -100
    short = [np.mean(sorted(row[:4])[: max(1, int(k * 4))]) for i, row in enumerate(logs) if i != 2]
    assert min_k(model, [(ids[:, :-1], labels[:, 1:])], k=k) == pytest.approx(short, rel=1e-4)


def test_privleak_has_the_signs_of_muse():
    forget, holdout = sequences(30, 0), sequences(30, 1)
    knows, retrained = learn(Language(1), forget, 60), learn(Language(2), sequences(30, 9), 10)
    sets = {"forget": shifted(forget), "holdout": shifted(holdout)}
    assert privleak(retrained, retrained, **sets).value == 0
    found = privleak(knows, retrained, **sets)
    assert found.value == pytest.approx(-100, abs=1e-9)
    reverse = privleak(knows, retrained, forget=sets["holdout"], holdout=sets["forget"])
    assert reverse.value > 30

    def area(model):
        a, b = (min_k(model, sets[name]) for name in ("forget", "holdout"))
        return 1 - np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])

    other = Language(5)
    expected = 100 * (area(other) - area(retrained)) / area(retrained)
    found = privleak(other, retrained, **sets)
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high
    with pytest.raises(ff.EstimationError, match="PrivLeak divides by 0"):
        privleak(retrained, knows, **sets)
    with pytest.raises(ff.FiunError, match="^holdout: it is empty"):
        privleak(knows, retrained, forget=sets["forget"], holdout=[])
    with pytest.raises(ff.EstimationError, match="forget: batch 0: .*logits of sequences"):
        privleak(nn.Linear(3, 2), nn.Linear(3, 2), holdout=sets["holdout"],
                 forget=[(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))])  # fmt: skip
