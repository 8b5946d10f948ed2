"""Models of transformers, small and with random weights, on what tokenizers and collators make, by the default call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fiun_fast as ff

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: models)")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.* no closed form")]

WORDS, LENGTH = 23, 6
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
BERT = {**SIZES, "max_position_embeddings": LENGTH}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=LENGTH, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


MODELS = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3)),
    "bert, masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)),
    "gpt2": gpt2,
    "llama": llama,
}


def close(fisher: ff.Fisher, wanted: dict[str, Tensor]) -> None:
    """Keys' biases have gradients of 0, which float32 meets nearly."""
    floor = 1e-9 * max(float(values.max()) for values in wanted.values())
    for name in fisher.layout.names:
        error = (fisher[name].double() - wanted[name]).abs().max()
        assert error <= 1e-4 * wanted[name].max() + floor, (name, fisher.provenance.how[name])


def made(kind: str) -> nn.Module:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def samples(kind: str, number: int = 5) -> list[dict[str, Tensor]]:
    """As a data set has them: texts of unequal length, with a label each where it is a classifier."""
    g = torch.Generator().manual_seed(3)
    found = []
    for n in range(number):
        ids = torch.randint(3, WORDS, (LENGTH - n % 3,), generator=g)
        found.append({"input_ids": ids} | ({"label": torch.tensor(n % 3)} if kind == "bert" else {}))
    return found


def collate(kind: str):
    """What a tokenizer's `pad` and a data collator do: a BatchEncoding, padded, with labels."""

    def collated(rows):
        size = max(len(row["input_ids"]) for row in rows)
        pad = lambda t, value: torch.nn.functional.pad(t, (0, size - len(t)), value=value)
        batch = {
            "input_ids": torch.stack([pad(row["input_ids"], 0) for row in rows]),
            "attention_mask": torch.stack([pad(torch.ones_like(row["input_ids"]), 0) for row in rows]),
        }
        if kind == "bert":
            batch["label"] = torch.stack([row["label"] for row in rows])
        else:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if kind == "bert, masked":  # every second token is to be told
            batch["labels"][:, ::2] = -100
        return transformers.BatchEncoding(batch)

    return collated


def loader(kind: str, batch_size: int = 3) -> DataLoader:
    return DataLoader(samples(kind), batch_size, collate_fn=collate(kind))


def predictions(kind: str, model: nn.Module, batch) -> list[tuple[Tensor, Tensor]]:
    """Logits and labels of each sample alone, without padding, at the positions that count."""
    found = []
    for n in range(len(batch["input_ids"])):
        size = int(batch["attention_mask"][n].sum())
        z = model(input_ids=batch["input_ids"][n : n + 1, :size]).logits
        if kind == "bert":
            found.append((z, batch["label"][n : n + 1]))
            continue
        z, y = z[0], batch["labels"][n, :size]
        z, y = (z, y) if kind == "bert, masked" else (z[:-1], y[1:])
        found.append((z[y != -100], y[y != -100]))
    return found


def oracle(kind: str, estimator: str, per: str = "sequence") -> dict[str, Tensor]:
    """In float64, a sample at a time, from logits alone."""
    model = copy.deepcopy(made(kind)).double()
    names = [name for name, _ in model.named_parameters()]
    total, number = [torch.zeros_like(p) for p in model.parameters()], 0

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found)]

    def add(squares: list[Tensor], weight: float | Tensor = 1.0) -> None:
        for sum_, square in zip(total, squares):
            sum_ += weight * square

    for batch in loader(kind):
        found = predictions(kind, model, batch)
        if estimator == "batch":
            z, y = (torch.cat(parts) for parts in zip(*found))
            add([g**2 for g in gradients(cross_entropy(z, y))])
            number += 1
        if per == "token":
            found = [(z[t : t + 1], y[t : t + 1]) for z, y in found for t in range(len(y))]
        for z, y in found if estimator in ("sample", "expected") else ():
            number += 1
            if estimator == "sample":
                add([g**2 for g in gradients(cross_entropy(z, y))])
            for row in z if estimator == "expected" else ():
                for c, p in enumerate(row.softmax(0).detach()):
                    add([g**2 for g in gradients(cross_entropy(row, torch.tensor(c)))], p / len(z) ** 2)
        if estimator == "label_free":
            outputs = []
            for n in range(len(batch["input_ids"])):
                size = int(batch["attention_mask"][n].sum())
                outputs.append(model(input_ids=batch["input_ids"][n : n + 1, :size]).logits.square().sum())
            add([g.abs() for g in gradients(sum(outputs) / len(outputs))])
            number += 1
    return {name: sum_ / number for name, sum_ in zip(names, total)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("estimator", ["batch", "sample", "label_free"])
def test_the_default_call(kind, estimator):
    fisher = ff.estimate_fisher(made(kind), loader(kind), estimator=estimator)
    close(fisher, oracle(kind, estimator))
    assert fisher.provenance.samples == 5
    if estimator == "sample":
        ways = [how for how in fisher.provenance.how.values() if how.startswith("closed form")]
        assert len(ways) > len(fisher.layout) / 2  # the loss is taken apart


@pytest.mark.parametrize("kind", ["gpt2", "bert, masked"])
def test_samples_per_token(kind):
    fisher = ff.estimate_fisher(made(kind), loader(kind), estimator="sample", per="token")
    close(fisher, oracle(kind, "sample", "token"))
    tokens = sum(len(y) for batch in loader(kind) for _, y in predictions(kind, made(kind), batch))
    assert fisher.provenance.samples == tokens


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_expected(kind):
    """Without labels the mask says what counts: for a causal model also the position behind the last token."""
    params = "classifier.*" if kind == "bert" else "lm_head.weight"
    fisher = ff.estimate_fisher(made(kind), loader(kind, 5), params, estimator="expected")
    wanted = oracle(kind, "expected")
    close(fisher, wanted)
    assert all("exact over classes" in how or "at the head" in how for how in fisher.provenance.how.values())
    unlabelled = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in loader(kind, 5)]
    found = ff.estimate_fisher(made(kind), unlabelled, params, estimator="expected")
    assert found.provenance.samples == 5
    assert torch.allclose(found.buffer, fisher.buffer, rtol=1e-4) == (kind == "bert")


def test_expected_of_everything():
    fisher = ff.estimate_fisher(made("bert"), loader("bert"), estimator="expected", samples=0)
    close(fisher, oracle("bert", "expected"))


def test_what_other_heads_return():
    """Labels under names of their own; regression by mean squared errors; several labels by binary cross entropy."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    bert = lambda head, **options: getattr(transformers, head)(transformers.BertConfig(**SIZES, **options)).eval()
    ids = torch.randint(3, WORDS, (4, LENGTH))
    for model, targets in (
        (
            bert("BertForQuestionAnswering"),
            {"start_positions": ids[:, 0] % LENGTH, "end_positions": ids[:, 1] % LENGTH},
        ),
        (bert("BertForSequenceClassification", num_labels=1), {"labels": torch.randn(4)}),
        (
            bert("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification"),
            {"labels": (torch.randn(4, 3) > 0).float()},
        ),
        (bert("BertForTokenClassification", num_labels=3), {"labels": ids % 3}),
    ):
        batch = {"input_ids": ids} | targets
        fisher = ff.estimate_fisher(model, [batch], estimator="sample")
        twin = copy.deepcopy(model).double()
        total = [torch.zeros_like(p) for p in twin.parameters()]
        for n in range(4):
            twin.zero_grad()
            one = {key: t[n : n + 1].double() if t.is_floating_point() else t[n : n + 1] for key, t in batch.items()}
            twin(**one).loss.backward()
            for sum_, p in zip(total, twin.parameters()):
                sum_ += p.grad**2 / 4 if p.grad is not None else 0
        close(fisher, {name: sum_ for (name, _), sum_ in zip(twin.named_parameters(), total)})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_alone_is_estimated():
    peft = pytest.importorskip("peft", reason="peft is not installed (extra: models)")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(made("llama"), config).eval()
    fisher = ff.estimate_fisher(model, loader("llama"), estimator="sample")
    twin, wanted = copy.deepcopy(model).double(), {}
    for batch in loader("llama"):
        for z, y in predictions("llama", twin, batch):
            twin.zero_grad()
            cross_entropy(z, y).backward()
            for name, p in twin.named_parameters():
                if p.requires_grad:
                    name = name.removeprefix("base_model.model.")  # as it is called without PEFT
                    wanted[name] = wanted.get(name, 0) + p.grad**2 / 5
    assert set(fisher.layout.names) == set(wanted) and all("lora_" in name for name in wanted)
    close(fisher, wanted)
