"""U-LiRA on heads: separates an overfit head, says nothing of a retrained one, and is the obvious loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import fiun_fast as ff
from fiun_fast.evaluation import ulira
from fiun_fast.evaluation.shadow_heads import Heads
from fiun_fast.evaluation.shadows import dampen

pytest.importorskip("scipy")
pytestmark = pytest.mark.usefixtures("one_thread")


class Wide(nn.Module):
    """More features than samples: a head on them learns anything by heart."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Linear(4, 80), nn.Tanh()), nn.Linear(80, 3)

    def forward(self, x):
        return self.head(self.body(x))


def noise(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=dice) * 3, torch.randint(3, (count,), generator=dice)


FORGET, RETAIN = [noise(16, 0)], [noise(20, 1)]
HOW = {"forget": FORGET, "retain": RETAIN, "shadows": 64, "steps": 150, "batch": 16, "lr": 0.05, "fpr": 0.05}


def untouched(heads, forget, retain):
    return None


def test_an_overfit_head_gives_itself_away_and_a_new_one_does_not():
    def anew(heads, forget, retain):
        dice = torch.Generator().manual_seed(7)
        for head in heads.values():
            head.weight.data.normal_(generator=dice)

    found = ulira(Wide(), **HOW, unlearn=anew)
    assert found.trained.auc.value > 0.95
    assert found.trained.tpr.value > 0.7
    assert found.trained.auc.low > 0.9
    assert abs(found.unlearned.auc.value - 0.5) < 0.06
    assert found.unlearned.auc.low < 0.52
    assert "64 shadows" in str(found)


def test_each_shadow_knows_half_and_each_sample_is_known_to_half():
    seen = {}

    def look(heads, forget, retain):
        seen.update(forget=forget, retain=retain, heads=heads)

    found = ulira(Wide(), **HOW, unlearn=look)
    assert found.member.shape == (64, 16)
    assert (found.member.sum(0) == 32).all()
    assert np.array_equal(found.phi_trained, found.phi_unlearned)
    assert found.trained.auc == found.unlearned.auc
    body, (x, y) = Wide().eval().body, FORGET[0]
    for k in (0, 63):
        own = torch.cat([labels for _, labels in seen["forget"][str(k)]])
        assert own.tolist() == y[torch.from_numpy(found.member[k])].tolist()
        with torch.no_grad():
            p = seen["heads"][str(k)](body(x)).double().softmax(1).gather(1, y[:, None])[:, 0]
        assert found.phi_trained[k] == pytest.approx((p / (1 - p)).log().numpy(), rel=1e-4, abs=1e-4)
    assert torch.cat([labels for _, labels in seen["retain"]["5"]]).tolist() == RETAIN[0][1].tolist()


def test_shadows_are_trained_as_if_alone():
    """A shadow of the batch against a loop that trains it by itself on the same mini-batches."""
    kept = {}
    how = HOW | {"shadows": 8, "steps": 12, "smoothing": 0.1, "seed": 3}
    found = ulira(Wide(), **how, unlearn=lambda heads, *_: kept.update(heads))
    body = Wide().eval().body
    x = torch.cat([body(FORGET[0][0]), body(RETAIN[0][0])]).detach()
    y = torch.cat([FORGET[0][1], RETAIN[0][1]])
    for k in (0, 5):
        torch.manual_seed(3)
        head = [nn.Linear(80, 3) for _ in range(8)][k]
        optimizer = torch.optim.AdamW(head.parameters(), lr=how["lr"], weight_decay=0.0)
        dice = torch.Generator().manual_seed(3)
        knows = torch.cat([torch.from_numpy(found.member[k]), torch.ones(20, dtype=torch.bool)])
        for step in range(12):
            optimizer.param_groups[0]["lr"] = how["lr"] * (0.5 + 0.5 * math.cos(math.pi * step / 12))
            rows = torch.randint(36, (16,), generator=dice)
            rows = rows[knows[rows]]
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(x[rows]), y[rows], label_smoothing=0.1).backward()
            optimizer.step()
        assert torch.allclose(kept[str(k)].weight, head.weight, atol=1e-4)


def test_scores_are_the_obvious_leave_one_out_fits():
    from scipy.stats import norm

    found = ulira(Wide(), **HOW | {"shadows": 12}, unlearn=untouched)
    phi, member = found.phi_unlearned, found.member
    expected = np.empty_like(phi)
    for s in range(12):
        others = np.arange(12) != s
        for i in range(16):
            known, never = phi[others & member[:, i], i], phi[others & ~member[:, i], i]
            expected[s, i] = norm.logpdf(phi[s, i], known.mean(), known.std()) - norm.logpdf(
                phi[s, i], never.mean(), never.std()
            )
    assert found.unlearned.members == pytest.approx(expected[member], rel=1e-6)
    assert found.unlearned.others == pytest.approx(expected[~member], rel=1e-6)


@pytest.mark.parametrize("estimator", ["batch", "sample", "expected"])
def test_fishers_are_those_of_each_head_by_itself(estimator):
    dice = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 7, generator=dice), torch.randint(4, (50,), generator=dice)
    member = torch.rand(9, 12, generator=dice) < 0.5
    member[3] = torch.arange(12) == 5
    heads = Heads(x, y, 4, member, seed=0)
    heads.train(20, 0.05, 16, 0.0)
    chunks = torch.randperm(50, generator=dice).tensor_split(8)
    found = heads.fisher(chunks, estimator)
    for k, head in enumerate(heads.modules.values()):
        own = [rows[heads.known[k, rows]] for rows in chunks]
        loader = [(x[rows], y[rows]) for rows in own if len(rows)]
        expected = ff.estimate_fisher(head, loader, estimator=estimator, samples=0)
        assert torch.allclose(found[k], expected.buffer, rtol=1e-4, atol=1e-9)


def test_one_plan_dampens_every_shadow_as_it_would_be_alone():
    dice = torch.Generator().manual_seed(0)
    x, y, member = torch.randn(40, 7, generator=dice), torch.arange(40) % 3, torch.rand(9, 12, generator=dice) < 0.5
    together, single = (Heads(x, y, 3, member, seed=0) for _ in range(2))
    for heads in (together, single):
        heads.train(30, 0.05, 16, 0.0)
    before = together.phi()
    dampen(together, "batch", 4, 1.5, 0.5)
    originals, forget = single.fishers("batch", 4)
    for name, head in single.modules.items():
        ff.dampen_(head, originals[name], forget[name], alpha=1.5, lam=0.5)
    assert torch.equal(together.phi(), single.phi())
    assert not torch.equal(together.phi(), before)


def test_dampening_random_samples_is_found_out():
    """What SSD is said to fail at: single samples without a class of their own."""
    found = ulira(Wide(), **HOW, alpha=3.0)
    assert found.unlearned.auc.low > 0.5


def test_the_model_stays_and_what_is_missing_is_said():
    model = Wide().train()
    before, state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    ulira(model, **HOW | {"shadows": 8, "steps": 5})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for change, text in (
        ({"forget": []}, "^forget: it is empty"),
        ({"retain": []}, "^retain: it is empty"),
        ({"forget": [noise(1, 0)]}, "forget has one sample"),
        ({"shadows": 4}, "shadows is 4"),
        ({"fpr": 0}, "fpr is 0"),
    ):
        with pytest.raises(ff.FiunError, match=text):
            ulira(model, **HOW | {"steps": 5} | change)
