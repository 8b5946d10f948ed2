"""Membership inference against obvious loops, and on cases whose outcome is known."""

from __future__ import annotations

import clouds
import numpy as np
import pytest
import torch
from torch import nn

import fiun_fast as ff
from fiun_fast.evaluation import Answers, accuracies, answers, confidence_attack, entropy_attack, rmia, tow
from fiun_fast.evaluation.roc import attack, clustered_attack

metrics = pytest.importorskip("sklearn.metrics")
pytest.importorskip("scipy")
pytestmark = pytest.mark.usefixtures("one_thread")


def says(logits: list[list[float]], labels: list[int]) -> Answers:
    return Answers(torch.tensor(logits), torch.tensor(labels))


# ---- accuracies and ToW ---------------------------------------------------------------------------------------------


def test_accuracies_and_their_intervals():
    model = clouds.fit(clouds.Net(), clouds.batches(clouds.cloud(80, 0)))
    sets = {"forget": clouds.cloud(20, 1), "retain": clouds.cloud(30, 2), "test": clouds.cloud(40, 3)}
    found = accuracies(model, **{name: clouds.batches(data) for name, data in sets.items()})
    for name, (x, y) in sets.items():
        one = getattr(found, name)
        assert one.value == pytest.approx((model(x).argmax(1) == y).double().mean().item())
        assert 0 <= one.low < one.value < one.high <= 1 or one.value == 1.0
    # Wilson's score interval of 0 of 20, in closed form: 0 to z² / (n + z²)
    none = accuracies(model, forget=says([[0.0, 1.0]] * 20, [0] * 20)).forget
    assert (none.value, none.low) == (0, pytest.approx(0, abs=1e-12))
    assert none.high == pytest.approx(1.959964**2 / (20 + 1.959964**2), rel=1e-5)
    assert accuracies(model, forget=clouds.batches(sets["forget"])).retain is None
    with pytest.raises(ff.ArgumentError, match="pass forget="):
        accuracies(model)


def test_tow():
    models = [clouds.fit(clouds.Net(seed), clouds.batches(clouds.cloud(60, seed)), epochs=seed) for seed in (1, 4)]
    sets = {"forget": clouds.cloud(20, 1), "retain": clouds.cloud(30, 2), "test": clouds.cloud(40, 3)}
    loaders = {name: clouds.batches(data) for name, data in sets.items()}
    same = tow(models[0], models[0], **loaders)
    assert (same.value, same.low, same.high) == (1, 1, 1)
    expected = 1.0
    for x, y in sets.values():
        a, b = ((m(x).argmax(1) == y).double().mean().item() for m in models)
        expected *= 1 - abs(a - b)
    found = tow(*models, **loaders)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.low < found.value < found.high
    assert tow(*models, **loaders) == found
    assert tow(*models, **loaders, seed=1) != found
    with pytest.raises(ff.EstimationError, match="forget: these are the answers of one model"):
        tow(*models, **loaders | {"forget": answers(models[0], loaders["forget"])})
    with pytest.raises(ff.EstimationError, match="test: a list_iterator can be gone over once"):
        tow(*models, **loaders | {"test": iter(loaders["test"])})


# ---- curves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 0.5])  # with ties, and without
def test_curves_are_those_of_scikit_learn(step):
    dice = np.random.default_rng(0)
    members, others = dice.normal(0.7, 1, 300), dice.normal(0, 1, 250)
    if step:
        members, others = (np.round(of / step) * step for of in (members, others))
    labels, scores = np.repeat([1, 0], [300, 250]), np.concatenate([members, others])
    fpr, tpr, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    for at in (0.01, 0.1, 1.0):
        found = attack(members, others, at)
        assert found.auc.value == pytest.approx(metrics.roc_auc_score(labels, scores), rel=1e-12)
        if at < 1:
            assert found.tpr.value == pytest.approx(tpr[fpr <= at].max(), rel=1e-12)
        assert found.auc.low < found.auc.value < found.auc.high
    trials = scores.reshape(50, 11)
    both = clustered_attack(trials, labels.reshape(50, 11) == 1, 0.1)
    assert both.auc.value == pytest.approx(metrics.roc_auc_score(labels, scores), rel=1e-12)
    assert both.tpr.value == pytest.approx(tpr[fpr <= 0.1].max(), rel=1e-12)


def test_identical_scores_say_nothing():
    scores = np.random.default_rng(0).normal(size=100)
    assert attack(scores, scores, 0.01).auc.value == 0.5
    assert attack(np.ones(20), np.ones(30), 0.01).auc.value == 0.5
    assert attack(np.ones(20), np.ones(30), 0.01).tpr.value == 0
    assert attack(np.ones(20), np.zeros(30), 0.01).tpr.value == 1
    same = clustered_attack(np.ones((6, 4)), np.arange(24).reshape(6, 4) % 2 == 0, 0.01)
    assert (same.auc.value, same.tpr.value) == (0.5, 0)
    single = attack(np.ones(1), np.zeros(5), 0.01).auc  # one sample says nothing about spread
    assert single.value == 1
    assert np.isnan([single.low, single.high]).all()
    with pytest.raises(ff.ArgumentError, match="fpr is 0"):
        attack(scores, scores, 0.0)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    """AUC of N(1, 1) against N(0, 1) is Phi(1 / sqrt 2) = 0.76025."""
    dice = np.random.default_rng(0)
    hits = 0
    for k in range(60):
        found = attack(dice.normal(1, 1, 60), dice.normal(0, 1, 60), 0.1, seed=k).auc
        hits += found.low <= 0.76025 <= found.high
    assert 50 <= hits <= 60


# ---- attacks on one model -------------------------------------------------------------------------------------------


def test_entropy_attack_is_logistic_regression_on_entropies():
    from sklearn.linear_model import LogisticRegression

    dice = torch.Generator().manual_seed(1)

    def drawn(count: int, sure: float) -> Answers:
        """Logits that are the surer the larger `sure`; overlapping, so that no judge is always right."""
        return Answers(sure * torch.randn(count, 3, generator=dice), torch.zeros(count, dtype=torch.long))

    forget, retain, test = drawn(25, 1.5), drawn(60, 3.0), drawn(200, 0.7)
    model = nn.Linear(1, 3)  # is not asked: the answers are given

    def entropies(given: Answers):
        p = given.logits.double().softmax(1).numpy()
        return np.array([[-sum(q * np.log(q) for q in row if q > 0)] for row in p])

    judge = LogisticRegression(class_weight="balanced")
    judge.fit(np.concatenate([entropies(retain), entropies(test)]), [1] * 60 + [0] * 200)
    expected = judge.predict(entropies(forget)).mean()
    found = entropy_attack(model, forget=forget, retain=retain, test=test)
    assert found.value == pytest.approx(expected)
    members = entropy_attack(model, forget=retain, retain=retain, test=test)
    assert members.value > entropy_attack(model, forget=test, retain=retain, test=test).value


def test_confidence_attack():
    """Members have 0.9 on their label, others 0.6: a sample with 0.9 is taken for a member, one with 0.6 is not."""
    at = lambda p, n: says([[float(np.log(p / (1 - p))), 0.0]] * n, [0] * n)
    sets = {"retain": at(0.9, 90), "test": at(0.6, 40)}
    model = nn.Linear(1, 2)
    known = confidence_attack(model, forget=at(0.9, 10), **sets)
    gone = confidence_attack(model, forget=at(0.6, 10), **sets)
    assert (known.value, gone.value) == (0, 1)
    mixed = Answers(torch.cat([at(0.9, 3).logits, at(0.6, 1).logits]), torch.zeros(4, dtype=torch.long))
    assert confidence_attack(model, forget=mixed, **sets).value == 0.25
    assert known.high < 0.35  # 10 samples cannot say more


def test_empty_sets_are_named():
    model, some = clouds.Net(), [clouds.cloud(20, 0)]
    for what in ("forget", "retain", "test"):
        sets = dict.fromkeys(("forget", "retain", "test"), some) | {what: []}
        for measure in (entropy_attack, confidence_attack):
            with pytest.raises(ff.FiunError, match=f"^{what}: it is empty"):
                measure(model, **sets)


# ---- RMIA -----------------------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Gives the label of what it remembers 0.99, and 0.6 otherwise; labels are in the last column."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.p = known, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        seen = (x[:, None] == self.known).all(2).any(1)
        p = torch.where(seen, 0.99, 0.6).double()
        return torch.stack([p.log(), (1 - p).log()], 1)


def test_rmia_finds_what_is_memorised():
    dice = torch.Generator().manual_seed(0)
    forget, test = (torch.randn(n, 3, generator=dice) for n in (30, 40))
    label = lambda x: [(x, torch.zeros(len(x), dtype=torch.long))]
    knows, reference = Remembers(forget), Remembers(forget[:0])
    found = rmia(knows, forget=label(forget), test=label(test), references=[reference])
    assert (found.auc.value, found.tpr.value) == (1, 1)
    assert found.members.tolist() == [1.0] * 30
    same = rmia(reference, forget=label(forget), test=label(test), references=[reference])
    assert same.auc.value == 0.5
    partly = rmia(Remembers(forget[:10]), forget=label(forget), test=label(test), references=[reference])
    assert partly.members.tolist() == [1.0] * 10 + [0.0] * 20


@pytest.mark.parametrize(("gamma", "offline", "population"), [(1.0, 1.0, False), (1.2, 0.3, False), (0.9, 0.5, True)])
def test_rmia_is_the_obvious_loop(gamma, offline, population):
    model, *references = (
        clouds.fit(clouds.Net(seed), clouds.batches(clouds.cloud(60, seed)), epochs=5) for seed in range(4)
    )
    forget, test, others = clouds.cloud(15, 7), clouds.cloud(20, 8), clouds.cloud(25, 9)

    def ratios(x, y):
        probability = lambda m: m(x).detach().double().softmax(1).gather(1, y[:, None])[:, 0].tolist()
        every = zip(probability(model), *map(probability, references))
        return [p / (0.5 * ((1 + offline) * sum(out) / 3 + (1 - offline))) for p, *out in every]

    def score(x, z):
        return sum(x / one > gamma for one in z) / len(z)

    gone, new, z = (ratios(*data) for data in (forget, test, others))
    members = [score(x, z if population else new) for x in gone]
    new_scores = [score(x, z if population else new[:i] + new[i + 1 :]) for i, x in enumerate(new)]
    found = rmia(
        model, forget=[forget], test=[test], references=references, gamma=gamma, offline=offline,
        population=[others] if population else None,
    )  # fmt: skip
    assert found.members == pytest.approx(members)
    assert found.others == pytest.approx(new_scores)


def test_rmia_needs_references():
    some = [clouds.cloud(10, 0)]
    with pytest.raises(ff.ArgumentError, match="references is empty"):
        rmia(clouds.Net(), forget=some, test=some, references=[])
    with pytest.raises(ff.FiunError, match="^forget: it is empty"):
        rmia(clouds.Net(), forget=[], test=some, references=[clouds.Net(1)])
    one = [(some[0][0][:1], some[0][1][:1])]
    with pytest.raises(ff.ArgumentError, match="test has one sample"):
        rmia(clouds.Net(), forget=some, test=one, references=[clouds.Net(1)])
