"""Rounds of signed dampening against a loop as one would write it; what a model still recalls of sequences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fiun_fast as ff
from fiun_fast import sequences

pytestmark = pytest.mark.usefixtures("one_thread")
F = nn.functional


def memoriser(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A net that has learned random labels of random inputs by heart, and these."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 48), nn.Tanh(), nn.Dropout(0.2), nn.Linear(48, 5)).double().eval()
    x, y = torch.randn(40, 12).double(), torch.randint(5, (40,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.train(), list(zip(x, y, strict=True))


def stacked(items) -> tuple[Tensor, Tensor]:
    x, y = zip(*items, strict=True)
    return torch.stack(x), torch.stack(y)


def losses(model, items) -> Tensor:
    assert not model.training
    x, y = stacked(items)
    return F.cross_entropy(model(x), y, reduction="none")


def remembered(model, items) -> Tensor:
    x, y = stacked(items)
    return model(x).argmax(1) == y


def of(items) -> list[tuple[Tensor, Tensor]]:
    return [stacked([item]) for item in items]


@pytest.mark.parametrize("batch", [3, 64])
def test_rounds_are_those_of_an_obvious_loop(batch):
    (model, items), (other, _) = memoriser(), memoriser()
    forget, retain = items[:6], items[6:]
    original = ff.estimate_fisher(model, of(retain)).to(dtype=torch.float64)
    original.buffer[:50] = 0
    share, factor = 0.05, 0.9
    named = list(other.parameters())
    floored = original.buffer.clamp_min(1e-30)
    expected = []
    other.eval()
    for _ in range(7):
        active = [item for item in forget if bool(remembered(other, [item]))]
        if not active:
            break
        loss = sum(losses(other, [item])[0] for item in active) / len(active)
        g = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, named)])
        theta = torch.cat([p.detach().reshape(-1) for p in named])
        ratio = (g * g / floored).masked_fill(g * theta >= 0, -1)
        chosen = ratio.topk(int(share * len(g))).indices
        theta[chosen] *= factor
        expected.append((len(active), loss.item(), len(chosen)))
        nn.utils.vector_to_parameters(theta, named)
    seen = []
    options = {"share": share, "factor": factor, "batch": batch, "on_round": seen.append}
    found = ff.unlearn_rounds_(model, iter(forget), original, losses, remembered, rounds=7, turns=1, **options)
    assert model.training and model[2].training
    assert [(r.active, r.selected) for r in found.rounds] == [(active, count) for active, _, count in expected]
    assert [r.loss for r in found.rounds] == pytest.approx([loss for _, loss, _ in expected], rel=1e-9)
    assert seen == found.rounds and len(seen) > 2
    for p, q in zip(model.parameters(), named, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)
    model.eval()
    assert found.remembered == [i for i, item in enumerate(forget) if bool(remembered(model, [item]))]


def test_forgotten_items_stay_so_after_repair_and_the_others_are_kept():
    model, items = memoriser()
    forget, retain = items[:4], items[4:]
    original = ff.estimate_fisher(model, of(retain), estimator="sample").to(dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = stacked(retain)
    modes = []

    def repair(model) -> None:
        modes.append(model.training)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    def still(model, items) -> Tensor:
        return losses(model, items) < 2 * math.log(5)

    options = {"repair": repair, "turns": 4, "rounds": 60, "share": 0.03, "undo": True}
    outcome = ff.unlearn_rounds_(model, forget, original, losses, still, **options)
    assert modes == [True] * 4
    model.eval()
    assert not remembered(model, forget).any()
    assert remembered(model, retain).double().mean() > 0.9
    assert str(outcome).splitlines()[-1] == f"{len(outcome.remembered)} of 4 items are still remembered"
    assert len(str(outcome).splitlines()) == len(outcome.rounds) + 2
    outcome.undo_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ff.UndoError, match="put back already"):
        outcome.undo_()


def test_rounds_that_fail_or_are_refused_leave_the_model():
    model, items = memoriser()
    original = ff.estimate_fisher(model, of(items)).to(dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(model) -> None:
        raise KeyboardInterrupt("by hand")

    def call(items=items, original=original, losses=losses, remembered=remembered, **options):
        return lambda: ff.unlearn_rounds_(model, items, original, losses, remembered, **options)

    refused = [
        (ff.ArgumentError, "no items", call(items=[])),
        (ff.ArgumentError, "original is a dict", call(original={})),
        (ff.ArgumentError, "losses is a int", call(losses=3)),
        (ff.ArgumentError, "repair is a str", call(repair="x")),
        (ff.ArgumentError, r"losses takes \(m\) and is called as losses\(model, items\)", call(losses=lambda m: 1)),
        (ff.ArgumentError, r"remembered takes .* remembered\(model, items\)", call(remembered=lambda m: 1)),
        (ff.ArgumentError, r"repair takes \(\) and is called as repair\(model\)", call(repair=lambda: None)),
        (ff.ArgumentError, r"on_round takes .* on_round\(round\)", call(on_round=lambda a, b: None)),
        (ff.ArgumentError, "share is 0", call(share=0.0)),
        (ff.ArgumentError, "less than one: nothing would change", call(share=0.9 / original.numel)),
        (ff.ArgumentError, "factor is 2", call(factor=2)),
        (ff.ArgumentError, "rounds is 0", call(rounds=0)),
        (ff.EstimationError, r"expected \[40\]", call(losses=lambda m, i: losses(m, i).mean())),
        (ff.EstimationError, "not finite", call(losses=lambda m, i: losses(m, i) * math.inf)),
        (ff.EstimationError, "do not depend", call(losses=lambda m, i: losses(m, i).detach())),
        (ff.EstimationError, "1 values for 40 items", call(remembered=lambda m, i: [True])),
        (ff.EstimationError, "gave a bool for 40 items", call(remembered=lambda m, i: True)),
        (ff.EstimationError, r"gave \[\] for 40 items", call(remembered=lambda m, i: torch.tensor(True))),
        (ff.EstimationError, r"gave \[40, 2\] for 40", call(remembered=lambda m, i: torch.ones(40, 2).bool())),
        (KeyboardInterrupt, "by hand", call(repair=broken, undo=True)),
    ]
    for error, message, function in refused:
        with pytest.raises(error, match=message):
            function()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), message
        assert model.training
    with pytest.raises(ff.UndoError, match="undo=True"):
        ff.unlearn_rounds_(model, items[:2], original, losses, lambda m, i: [False] * 2).undo_()


def test_overlap_of_the_largest_entries():
    torch.manual_seed(0)
    layout = ff.Layout({"w": (1000,)})
    a, b = (ff.Fisher(torch.rand(1000), layout) for _ in range(2))
    for share in (0.001, 0.05, 0.5, 1.0):
        count = int(share * 1000)
        tops = [set(sorted(range(1000), key=one.buffer.tolist().__getitem__)[-count:]) for one in (a, b)]
        assert ff.top_overlap(a, b, share=share) == len(tops[0] & tops[1]) / count
    assert ff.top_overlap(a, a) == 1
    with pytest.raises(ff.ArgumentError, match="share is 0"):
        ff.top_overlap(a, b, share=0)
    with pytest.raises(ff.LayoutError):
        ff.top_overlap(a, ff.Fisher(torch.rand(3), ff.Layout({"w": (3,)})))


# ---- sequences -------------------------------------------------------------------------------------------------------


class Causal(nn.Module):
    """Logits from the running mean of embeddings, so that they depend on all before and nothing after."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 16)
        self.head = nn.Linear(16, vocabulary)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        mean = self.embed(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.head(self.dropout(mean + self.embed(ids)))


def pairs_of(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    dice = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (count, 2), generator=dice).tolist()
    return [tuple(torch.randint(11, (n,), generator=dice) for n in pair) for pair in lengths]


def test_what_is_recalled_is_what_decoding_one_token_after_another_gives():
    torch.manual_seed(0)
    model = Causal().eval()
    pairs = pairs_of(40)
    for prompt, answer in pairs[:15]:  # answers that greedy decoding gives
        text = prompt
        for i in range(len(answer)):
            answer[i] = model(text[None])[0, -1].argmax()
            text = torch.cat([text, answer[i : i + 1]])
    exact, mean = [], []
    for prompt, answer in pairs:
        text, right, total = prompt, True, 0.0
        for token in answer:
            logits = model(text[None])[0, -1]
            right &= bool(logits.argmax() == token)
            total -= float(logits.log_softmax(0)[token].detach())
            text = torch.cat([text, token[None]])
        exact.append(right)
        mean.append(total / len(answer))
    assert sequences.reproduced(model, pairs).tolist() == exact
    assert 15 <= sum(exact) < 40
    torch.testing.assert_close(sequences.answer_losses(model, pairs), torch.tensor(mean))
    others = [[answer.flip(0) + 0, (answer + 1) % 11, (answer + 5) % 11] for _, answer in pairs]
    chosen = sequences.multiple_choice(model, pairs, others).tolist()
    for i, ((prompt, _), wrong) in enumerate(zip(pairs, others, strict=True)):
        best = min(float(sequences.answer_losses(model, [(prompt, other)]).detach()) for other in wrong)
        if abs(best - mean[i]) > 1e-5:
            assert chosen[i] == (mean[i] < best)
    model.train()
    score = sequences.score_sequences(model, pairs[:20], pairs[20:], others=others[:20], shown=2, batch=7)
    assert model.training and model.dropout.training
    assert (score.left, score.kept) == (sum(exact[:20]) / 20, sum(exact[20:]) / 20)
    assert (score.loss, score.kept_loss) == pytest.approx((sum(mean[:20]) / 20, sum(mean[20:]) / 20), rel=1e-5)
    assert score.chosen == sum(chosen[:20]) / 20
    assert score.as_dict()["relearned"] == score.relearned and "relearned" in str(score)


def test_relearning_trains_a_copy_on_the_first_and_asks_the_rest():
    """All pairs are one and the same, so that what is learned of two is known of all."""
    torch.manual_seed(0)
    model = Causal().eval()
    model.dropout.p = 0.0
    pairs = [(torch.tensor([3]), torch.tensor([7, 2]))] * 6
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert sequences.relearned(model, pairs, shown=2, steps=1, lr=1e-9) == 0
    assert sequences.relearned(model, pairs, shown=2, steps=60, lr=0.05) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sequences_of_another_form_are_refused():
    model, flat, (pair,) = Causal(), nn.Sequential(nn.Embedding(11, 3), nn.Flatten()), pairs_of(1)
    refused = [
        (ff.ArgumentError, "no sequences", lambda: sequences.answer_losses(model, [])),
        (ff.ArgumentError, "prompt is", lambda: sequences.reproduced(model, [(torch.rand(3), pair[1])])),
        (ff.ArgumentError, "answer is", lambda: sequences.reproduced(model, [(pair[0], pair[1][:0])])),
        (ff.ArgumentError, "0 lists for 1", lambda: sequences.multiple_choice(model, [pair], [])),
        (ff.ArgumentError, "none is left|shown", lambda: sequences.relearned(model, [pair], shown=1)),
        (ff.EstimationError, "vocabulary", lambda: sequences.answer_losses(flat, [pair])),
    ]
    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
