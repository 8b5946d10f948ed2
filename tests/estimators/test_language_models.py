"""Fishers of models that predict at every position, per sequence and per token, against float64 loops."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fiun_fast as ff

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.* no closed form")]

WORDS, LENGTH = 7, 5


class Output(OrderedDict):
    """As transformers' ModelOutput."""

    __getattr__ = OrderedDict.__getitem__


class Model(nn.Module):
    """Tokens, a mean over those so far, a head; with labels it returns a loss as transformers' models do."""

    def __init__(self, shift: bool = True, factor: float = 1.0, words: int = WORDS) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed, self.mix, self.head = nn.Embedding(words, 6), nn.Linear(6, 6), nn.Linear(6, words)
        self.shift, self.factor = shift, factor

    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.embed(input_ids)
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        h = h.cumsum(1) / torch.arange(1, h.shape[1] + 1, dtype=h.dtype)[:, None]
        logits = self.head(torch.tanh(self.mix(h)))
        if labels is None:
            return Output(logits=logits)
        loss = cross_entropy(*self.flat(logits.float() if h.itemsize == 2 else logits, labels))
        return Output(loss=self.factor * loss, logits=logits)

    def flat(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each position's logits and what is to be predicted there."""
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return logits.flatten(0, 1), labels.flatten()


def batch(samples: int, seed: int, words: int = WORDS) -> dict[str, Tensor]:
    """Sequences of unequal length, padded; prompts of some are masked too."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (samples, LENGTH), generator=g)
    mask = torch.ones_like(ids)
    for n in range(samples):
        mask[n, LENGTH - n % 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1:2, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader(words: int = WORDS) -> list[dict[str, Tensor]]:
    return [batch(4, 0, words), batch(3, 1, words), batch(1, 2, words)]


class Oracle:
    """A model in float64, and what one sequence alone gives."""

    def __init__(self, model: Model) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.names = [name for name, _ in self.model.named_parameters()]

    def squares(self, loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True)
        return [g**2 for g in found]

    def sequences(self, batches):
        """Logits and labels [T] of the positions that count, of every sequence that has one."""
        for one in batches:
            for n in range(len(one["labels"])):
                logits = self.model(one["input_ids"][n : n + 1], one["attention_mask"][n : n + 1]).logits
                z, y = self.model.flat(logits, one["labels"][n : n + 1])
                if (y != -100).any():
                    yield z[y != -100], y[y != -100]

    def mean(self, found: list[list[Tensor]]) -> dict[str, Tensor]:
        return {name: sum(one[i] for one in found) / len(found) for i, name in enumerate(self.names)}

    def sample(self, batches, per: str) -> dict[str, Tensor]:
        pairs = list(self.sequences(batches))
        if per == "token":
            pairs = [(z[t : t + 1], y[t : t + 1]) for z, y in pairs for t in range(len(y))]
        return self.mean([self.squares(cross_entropy(z, y)) for z, y in pairs])

    def expected(self, batches, per: str) -> dict[str, Tensor]:
        """Every way to label a sequence, weighted by its probability: nothing is assumed of the positions."""
        found = []
        for z, _ in self.sequences(batches):
            parts = [z[t : t + 1] for t in range(len(z))] if per == "token" else [z]
            for part in parts:
                p = part.detach().softmax(1)
                total = [torch.zeros_like(q) for q in self.model.parameters()]
                for labels in itertools.product(range(z.shape[1]), repeat=len(part)):
                    weight = p[range(len(part)), labels].prod()
                    for sum_, square in zip(total, self.squares(cross_entropy(part, torch.tensor(labels)))):
                        sum_ += weight * square
                found.append(total)
        return self.mean(found)


def close(fisher: ff.Fisher, wanted: dict[str, Tensor], within: float = 2e-5) -> None:
    for name in fisher.layout.names:
        error = (fisher[name].double() - wanted[name]).abs().max()
        assert error <= within * wanted[name].abs().max() + 1e-13, (name, fisher.provenance.how[name])


def counted(batches, per: str, shift: bool = True) -> int:
    kept = [(one["labels"][:, 1:] if shift else one["labels"]) != -100 for one in batches]
    return sum(int(one.sum() if per == "token" else one.any(1).sum()) for one in kept)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_sample(per, shift):
    model, batches = Model(shift), loader()
    fisher = ff.estimate_fisher(model, batches, estimator="sample", per=per)
    close(fisher, Oracle(model).sample(batches, per))
    assert fisher.provenance.samples == counted(batches, per, shift)
    assert fisher.provenance.per == per
    assert fisher.provenance.how["mix.weight"].startswith("closed form")


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("per", ["sequence", "token"])
def test_expected_over_every_label(per, shift):
    words, model = 3, Model(shift, words=3)
    batches = [{key: t[:, :4] for key, t in one.items()} for one in loader(words)[1:]]
    fisher = ff.estimate_fisher(model, batches, estimator="expected", per=per, samples=0)
    close(fisher, Oracle(model).expected(batches, per))
    assert fisher.provenance.samples == counted(batches, per, shift)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_expected_by_drawing_is_near_and_at_the_head_exact(per):
    model, batches = Model(), loader()[:2]
    exact = ff.estimate_fisher(model, batches, estimator="expected", per=per, samples=0)
    drawn = ff.estimate_fisher(model, batches, estimator="expected", per=per, samples=40)
    assert "exact over classes" in drawn.provenance.how["head.weight"]
    for name in ("head.weight", "head.bias"):
        assert torch.allclose(drawn[name], exact[name], rtol=1e-4, atol=1e-9)
    error = (drawn["mix.weight"] - exact["mix.weight"]).abs().max() / exact["mix.weight"].max()
    assert 1e-6 < error < 0.4


def test_sequences_without_a_label_that_counts_are_no_samples():
    model, batches = Model(), loader()
    masked = {**batches[0], "labels": batches[0]["labels"].clone()}
    masked["labels"][2] = -100
    nothing = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    for estimator in ("sample", "expected"):
        for per in ("sequence", "token"):
            options = {"estimator": estimator, "per": per, "samples": 0}
            whole = ff.estimate_fisher(model, [masked], **options)
            rest = {key: t[[0, 1, 3]] for key, t in masked.items()}
            close(whole, ff.estimate_fisher(model, [rest], **options).as_dict())
            again = ff.estimate_fisher(model, [nothing, masked, nothing], **options)
            assert torch.equal(again.buffer, whole.buffer) and again.provenance == whole.provenance
    alone, beside = (ff.estimate_fisher(model, given) for given in ([masked], [nothing, masked]))
    assert torch.equal(alone.buffer, beside.buffer)
    with pytest.raises(ff.EstimationError, match="the loader is empty: none of its 2 batches holds a sample"):
        ff.estimate_fisher(model, [nothing, nothing])


@pytest.mark.parametrize("estimator", ["expected", "label_free"])
def test_padding_does_not_count_without_labels(estimator):
    model, long = Model(), batch(3, 5)
    options = {"estimator": estimator} | ({"samples": 0} if estimator == "expected" else {})
    unlabelled = {key: long[key] for key in ("input_ids", "attention_mask")}
    one_by_one = []
    for n in range(3):
        size = int(long["attention_mask"][n].sum())
        one_by_one.append({"input_ids": long["input_ids"][n : n + 1, :size]})
    alone = [ff.estimate_fisher(model, [one], **options).buffer for one in one_by_one]
    whole = ff.estimate_fisher(model, [unlabelled], **options)
    if estimator == "expected":
        assert torch.allclose(whole.buffer, sum(alone) / 3, rtol=1e-4, atol=1e-8)
        given = [one["input_ids"] for one in one_by_one]  # tokens alone
        assert torch.allclose(ff.estimate_fisher(model, given, **options).buffer, sum(alone) / 3, rtol=1e-4, atol=1e-8)
    else:  # the size of a mean gradient: that of the lengths' mean
        outputs = [model(**one).logits.square().sum() for one in one_by_one]
        gradients = torch.autograd.grad(sum(outputs) / 3, list(model.parameters()))
        assert torch.allclose(whole.buffer, torch.cat([g.abs().flatten() for g in gradients]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["batch", "sample", "expected"])
def test_pairs_whose_targets_are_shifted_already(estimator):
    model, ids = Model(), torch.randint(WORDS, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    options = {"estimator": estimator, "samples": 0} if estimator == "expected" else {"estimator": estimator}
    pairs = ff.estimate_fisher(model, [(ids[:, :-1], ids[:, 1:])], **options)
    aligned = Model(shift=False)
    named = ff.estimate_fisher(aligned, [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}], **options)
    assert torch.allclose(pairs.buffer, named.buffer, rtol=1e-5, atol=1e-9)


def test_flattened_logits_are_samples_where_they_count():
    model, batches = Model(), loader()
    flat = lambda m, b: m.flat(m(b["input_ids"], b["attention_mask"]).logits, b["labels"])
    fisher = ff.estimate_fisher(model, batches, estimator="sample", forward_fn=flat)
    close(fisher, Oracle(model).sample(batches, "token"))
    assert fisher.provenance.samples == counted(batches, "token")


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_a_loss_that_is_not_known_is_taken_of_each_sequence_alone_or_refused(per):
    batches = loader()
    plain = ff.estimate_fisher(Model(), batches, estimator="sample")
    if per == "sequence":
        fisher = ff.estimate_fisher(Model(factor=1.5), batches, estimator="sample")
        assert torch.allclose(fisher.buffer, 2.25 * plain.buffer, rtol=1e-4)
        assert "the loss is the model's own" in fisher.provenance.how["mix.weight"]
    else:
        with pytest.raises(ff.EstimationError, match=r"batch 0: per='token' needs logits and a label for each token"):
            ff.estimate_fisher(Model(factor=1.5), batches, estimator="sample", per=per)
    with pytest.raises(ff.EstimationError, match="batch 0: .* which axis holds the classes and which positions count"):
        ff.estimate_fisher(Model(factor=1.5), batches, estimator="expected", per=per)


def test_half_precision_losses_are_known_too():
    model, batches = Model().bfloat16(), loader()
    fisher = ff.estimate_fisher(model, batches, estimator="sample")
    close(fisher, Oracle(model).sample(batches, "sequence"), 0.05)
    assert fisher.provenance.samples == 8 and fisher.provenance.dtype == "bfloat16"


IDS = torch.randint(WORDS, (4, LENGTH), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((IDS, IDS), {}, "the targets are the inputs themselves; a causal language model predicts the next token"),
        ((IDS, IDS.masked_fill(IDS == 2, -100)), {"estimator": "expected"}, "the targets are the inputs themselves"),
        ((IDS, torch.ones_like(IDS), IDS), {}, "one besides the inputs and the targets has an entry for each token"),
        ((IDS, torch.ones_like(IDS)), {"estimator": "label_free"}, "has an entry for each token; say what it is by a"),
        ({"input_ids": IDS}, {}, "without labels; for a language model they are a copy of input_ids, -100 at padding"),
        ({"input_ids": IDS, "idx": IDS[:, 0], "labels": IDS}, {}, "holds 'idx', which the model does not take: its f"),
    ],
)
def test_what_would_be_silently_wrong(given, options, message):
    with pytest.raises(ff.EstimationError, match=message):
        ff.estimate_fisher(Model(), [given], **options)


def test_as_many_classes_as_positions():
    model = Model(words=LENGTH)
    ids = torch.randint(LENGTH, (3, LENGTH + 1))
    with pytest.raises(ff.EstimationError, match=r"the classes may lie on axis 1 or on the last; pass loss_fn="):
        ff.estimate_fisher(model, [(ids[:, :-1], ids[:, 1:])])


@pytest.mark.parametrize("estimator", ["batch", "label_free"])
def test_tokens_are_not_for_means_of_batches(estimator):
    with pytest.raises(ff.ArgumentError, match=f"per='token' is for sample and expected; {estimator} goes by batches"):
        ff.estimate_fisher(Model(), loader(), estimator=estimator, per="token")
    with pytest.raises(ff.ArgumentError, match="per is 'word', expected one of sequence, token"):
        ff.estimate_fisher(Model(), loader(), estimator="sample", per="word")
    with pytest.raises(ff.ArgumentError, match="per='token' takes the cross entropy of each token: leave loss_fn out"):
        ff.estimate_fisher(Model(), loader(), estimator="sample", per="token", loss_fn=cross_entropy)
