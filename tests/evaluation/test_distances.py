"""KLoM and ZRF against obvious loops and in cases whose value is known."""

from __future__ import annotations

import copy
import math

import clouds
import numpy as np
import pytest
import torch
from torch import nn

import fiun_fast as ff
from fiun_fast.evaluation import Answers, klom, untrained, zrf

pytest.importorskip("scipy")
pytestmark = pytest.mark.usefixtures("one_thread")


def with_margins(margins) -> Answers:
    """Two logits, m and 0, label 0: the margin is m."""
    m = torch.as_tensor(margins, dtype=torch.float64)
    return Answers(torch.stack([m, torch.zeros_like(m)], 1), torch.zeros(len(m), dtype=torch.long))


def slow_klom(p: list[float], q: list[float], bins: int = 20, clip: float = 100.0, eps: float = 1e-5) -> float:
    p, q = ([min(max(m, -clip), clip) for m in of] for of in (p, q))
    low, high = min(p + q), max(p + q)
    high = high if high > low else low + 1

    def shares(of):
        counts = [0] * bins
        for m in of:
            counts[min(int((m - low) / (high - low) * bins), bins - 1)] += 1
        return [c / len(of) for c in counts]

    a, b = shares(p), shares(q)
    b = [max(y, eps) if x > 0 else y for x, y in zip(a, b)]
    total = sum(b)
    return sum(x * math.log(x / (y / total)) for x, y in zip(a, b) if x > 0)


def test_klom_is_the_obvious_loop():
    dice = np.random.default_rng(0)
    own, oracle = dice.normal(1, 2, (12, 8)), dice.normal(0, 1, (15, 8))
    own[3, 2], oracle[1, 2] = 900.0, -400.0  # clipped
    found = klom([with_margins(row) for row in own], [with_margins(row) for row in oracle])
    expected = [slow_klom(list(p), list(q)) for p, q in zip(own.T, oracle.T)]
    assert found.each == pytest.approx(expected, rel=1e-9)
    assert found.mean.value == pytest.approx(np.mean(expected))
    assert found.mean.low < found.mean.value < found.mean.high
    assert found.percentile(95) == pytest.approx(np.percentile(expected, 95))


def test_klom_of_one_ensemble_is_zero_and_of_disjoint_ones_large():
    models = [clouds.Net(seed) for seed in range(3)]
    data = clouds.batches(clouds.cloud(20, 0))
    same = klom(models, models, data)
    assert same.each.tolist() == [0.0] * 20
    apart = klom([with_margins([5.0])] * 4, [with_margins([-5.0])] * 4)
    assert apart.each[0] == pytest.approx(math.log((1 + 1e-5) / 1e-5))
    assert klom([with_margins([2.0])] * 2, [with_margins([2.0])] * 2).each[0] == 0


def test_klom_of_models_looks_at_their_margins():
    own, oracle = ([clouds.Net(seed) for seed in of] for of in (range(3), range(3, 6)))
    x, y = clouds.cloud(9, 0)
    margins = [
        [m.eval()(x).double().gather(1, y[:, None])[:, 0]
         - m(x).double().scatter(1, y[:, None], -torch.inf).logsumexp(1) for m in of]
        for of in (own, oracle)
    ]  # fmt: skip
    p, q = (torch.stack(of).detach().numpy() for of in margins)
    expected = [slow_klom(list(a), list(b)) for a, b in zip(p.T, q.T)]
    assert klom(own, oracle, [(x, y)]).each == pytest.approx(expected, rel=1e-6)


def test_klom_says_what_is_missing():
    some = [with_margins([1.0, 2.0])] * 2
    with pytest.raises(ff.ArgumentError, match="oracles has 1 models"):
        klom(some, some[:1])
    with pytest.raises(ff.ArgumentError, match="data is None"):
        klom([clouds.Net()] * 2, some)
    with pytest.raises(ff.ArgumentError, match="answers on 2 samples, oracles on 1"):
        klom(some, [with_margins([1.0])] * 2)
    with pytest.raises(ff.FiunError, match="^forget: it is empty"):
        klom([clouds.Net()] * 2, some, [], what="forget")


def test_zrf_is_the_obvious_loop():
    model, teacher = clouds.fit(clouds.Net(), clouds.batches(clouds.cloud(60, 0))), clouds.Net(9).eval()
    x, y = clouds.cloud(12, 1)
    p, q = (m(x).double().softmax(1).tolist() for m in (model, teacher))

    def js(a, b):
        kl = lambda u, v: sum(s * math.log2(s / t) for s, t in zip(u, v))
        m = [(s + t) / 2 for s, t in zip(a, b)]
        return (kl(a, m) + kl(b, m)) / 2

    expected = 1 - sum(map(js, p, q)) / len(p)
    assert zrf(model, forget=[(x, y)], teacher=teacher).value == pytest.approx(expected, rel=1e-9)
    assert zrf(model, forget=[(x, y)], teacher=model).value == pytest.approx(1, abs=1e-12)


def test_zrf_of_opposite_certainty_is_zero():
    class Says(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label, self.p = label, nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.tensor([[2000.0, 0.0], [0.0, 2000.0]])[self.label].expand(len(x), 2)

    data = [(torch.randn(5, 3), torch.zeros(5, dtype=torch.long))]
    assert zrf(Says(0), forget=data, teacher=Says(1)).value == pytest.approx(0, abs=1e-12)


def test_a_random_teacher_is_drawn_anew_and_the_model_stays():
    model = clouds.fit(clouds.Net(), clouds.batches(clouds.cloud(60, 0)))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    one, again, other = untrained(model, 1), untrained(model, 1), untrained(model, 2)
    assert torch.equal(one.head.weight, again.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.head.weight, model.head.weight)
    assert torch.equal(one.body[1].running_mean, torch.zeros(16))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    some = [clouds.cloud(12, 1)]
    assert zrf(model, forget=some, seed=3).value == zrf(model, forget=some, teacher=untrained(model, 3)).value
    model.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ff.EstimationError, match="no reset_parameters.*pass teacher="):
        zrf(model, forget=some)
    with pytest.raises(ff.FiunError, match="^forget: it is empty"):
        zrf(model, forget=[], teacher=one)
