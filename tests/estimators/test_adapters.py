"""PEFT's adapters of many kinds: what is meant by default, what their files call it, and batches of datasets."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
IDS = torch.arange(18).view(3, 6) % 31
SEQUENCES = {"input_ids": IDS, "labels": IDS}
CLASSES = torch.tensor([0, 1, 2])


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 31, "n_positions": 10, "pad_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))


class Small(nn.Module):
    """A model of one's own: it takes no labels and returns logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.fc, self.head = nn.Embedding(31, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.fc(self.emb(input_ids).mean(1))))


def lora(name: str = "default", **options) -> nn.Module:
    config = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_attn"], "init_lora_weights": False}
    return peft.get_peft_model(language_model(), peft.LoraConfig(**config | options), adapter_name=name)


def of(kind: str, **options) -> nn.Module:
    return peft.get_peft_model(language_model(), getattr(peft, kind)(task_type="CAUSAL_LM", **options))


def own(kind: str, **options) -> nn.Module:
    return peft.get_peft_model(Small(), getattr(peft, kind)(target_modules=["fc"], **options))


KINDS = {
    "LoRA on Conv1D": (lora, "lora_"),
    "LoRA on an embedding": (lambda: lora(target_modules=["wte"]), "lora_embedding_"),
    "LoRA and biases": (lambda: lora(bias="lora_only"), "lora_|bias"),
    "DoRA": (lambda: lora(use_dora=True), "lora_"),
    "rank-stabilised": (lambda: lora(use_rslora=True), "lora_"),
    "a head trained along": (lambda: lora(modules_to_save=["lm_head"]), "lora_|lm_head.modules_to_save"),
    "an embedding trained along": (lambda: lora(modules_to_save=["wte"]), "lora_|wte.modules_to_save"),
    "some tokens": (lambda: lora(trainable_token_indices=[1, 2]), "lora_|trainable_tokens_delta"),
    "IA3": (
        lambda: of("IA3Config", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        "ia3_l",
    ),
    "layer norms": (lambda: of("LNTuningConfig", target_modules=["ln_1"]), "ln_tuning_layers"),
    "LoHa": (lambda: own("LoHaConfig", r=2), "hada_"),
    "OFT": (lambda: own("OFTConfig", oft_block_size=4), "oft_R"),
    "FourierFT": (lambda: own("FourierFTConfig", n_frequency=4), "fourierft_"),
    "LoRA on a model of one's own": (
        lambda: own("LoraConfig", modules_to_save=["head"], init_lora_weights=False),
        "lora_|head.modules_to_save",
    ),
}


def batch_for(model: nn.Module):
    return (IDS, CLASSES) if isinstance(model.get_base_model(), Small) else SEQUENCES


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_own_parameters_are_meant_and_its_file_fits(kind):
    """By default all that is trained, and nothing else; names of the file that PEFT writes mean the same."""
    make, wanted = KINDS[kind]
    model = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    layout = ff.Layout.from_module(model)
    assert layout.numel == sum(p.numel() for p in trained)
    assert all(any(part in name for part in wanted.split("|")) for name in layout.names)
    assert set(ff.last_layer(model)) <= set(layout.names)
    fisher = ff.estimate_fisher(model, [batch_for(model)])
    louder = ff.Fisher(fisher.buffer * 50 + 1e-9, layout)
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    expected = make()
    assert ff.dampen_(expected, fisher, louder, alpha=2.0).selected > 0
    assert all(map(torch.equal, frozen, (p for p in expected.parameters() if not p.requires_grad)))

    saved = peft.get_peft_model_state_dict(make())
    if kind == "LoRA on an embedding":  # saves the embedding below as well
        saved = {name: value for name, value in saved.items() if "lora" in name}
    by_memory = {p.data_ptr(): name for name, p in zip(layout.names, trained, strict=True)}
    here = peft.get_peft_model_state_dict(model)
    called = {by_memory[here[name].data_ptr()]: name for name in saved if here[name].data_ptr() in by_memory}
    assert called.keys() == set(layout.names) or kind == "some tokens"  # tied: once
    theirs = layout.renamed(called)
    assert all(new != old for new, old in zip(theirs.names, layout.names, strict=True) if old in called)
    ff.dampen_(model, ff.Fisher(fisher.buffer, theirs), ff.Fisher(louder.buffer, theirs), alpha=2.0)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    if called.keys() == set(layout.names):  # the file itself, and the Fishers of the live model
        ff.dampen_(saved, fisher, louder, alpha=2.0)
        for name, p in zip(layout.names, (p for p in expected.parameters() if p.requires_grad), strict=True):
            assert torch.equal(saved[called[name]], p), name


def test_several_adapters():
    model = lora()
    model.add_adapter("two", model.peft_config["default"])
    assert all(".default" in name for name in ff.Layout.from_module(model).names)
    model.set_adapter("two")
    names = ff.Layout.from_module(model).names
    assert len(names) == 4
    assert all(".two" in name for name in names)
    assert set(ff.last_layer(model)) == set(names[2:])
    fisher = ff.estimate_fisher(model, [SEQUENCES])
    louder = ff.Fisher(fisher.buffer * 50, fisher.layout)
    kept = [p.clone() for name, p in model.named_parameters() if ".two" not in name]
    ff.dampen_(model, fisher, louder, alpha=2.0)
    assert all(map(torch.equal, kept, (p for name, p in model.named_parameters() if ".two" not in name)))
    saved = fisher.layout.renamed({name: name.replace(".two", "") for name in names})
    with pytest.raises(ff.LayoutError, match=r"no parameter '.*lora_A.weight', .*near names: .*lora_A.(two|default)"):
        ff.dampen_(model, ff.Fisher(fisher.buffer, saved), ff.Fisher(louder.buffer, saved))
    alone = lora("two")
    ff.dampen_(alone, ff.Fisher(fisher.buffer, saved), ff.Fisher(louder.buffer, saved), alpha=2.0)
    with pytest.raises(ff.LayoutError, match=r"no parameter '.*lora_A.two.weight'"):  # another adapter's
        ff.dampen_(lora(), fisher, louder)


def test_disabled_adapters():
    model = lora()
    fisher = ff.estimate_fisher(model, [SEQUENCES])
    with model.disable_adapter():
        for run in (ff.Layout.from_module, ff.last_layer, lambda m: ff.estimate_fisher(m, [SEQUENCES])):
            with pytest.raises(ff.LayoutError, match="none requires grad; the adapter is disabled, enable it, or name"):
                run(model)
        with pytest.raises(ff.EstimationError, match="the loss does not depend on .*lora_A"):
            ff.estimate_fisher(model, [SEQUENCES], "*lora_*")
    assert torch.equal(ff.estimate_fisher(model, [SEQUENCES]).buffer, fisher.buffer)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_prompts(kind, estimator):
    model = of(kind, num_virtual_tokens=2, **({"encoder_hidden_size": 8} if kind == "PromptEncoderConfig" else {}))
    fisher = ff.estimate_fisher(model, [SEQUENCES], estimator=estimator)
    assert all(name.startswith("prompt_encoder.default.") for name in fisher.layout.names)
    assert fisher.buffer.any()
    louder = ff.Fisher(fisher.buffer * 50, fisher.layout)
    assert ff.dampen_(model, fisher, louder, alpha=2.0).selected > 0
    saved = peft.get_peft_model_state_dict(model)  # what the prompts come to, which is no parameter of P-tuning's
    assert list(saved) == ["prompt_embeddings"]
    both = [ff.Fisher.from_dict({"prompt_embeddings": torch.ones(saved["prompt_embeddings"].shape)})] * 2
    with pytest.raises(ff.LayoutError, match=r"no parameter 'prompt_embeddings', .*prompt_encoder.default.embedding"):
        ff.dampen_(model, *both)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["label", "labels", "label_ids"])
@pytest.mark.parametrize("task", ["a model of one's own", "transformers"])
def test_labels_under_any_key_for_an_adapter_without_a_task(key, task):
    """Its forward takes whatever it is given; the model's below says what."""
    if task == "transformers":
        config = transformers.GPT2Config(
            n_layer=1, n_embd=8, n_head=2, vocab_size=31, n_positions=8, num_labels=3, pad_token_id=0
        )
        torch.manual_seed(0)
        base, target = transformers.GPT2ForSequenceClassification(config), "c_attn"
    else:
        base, target = Small(), "fc"
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=[target], init_lora_weights=False))

    def forward(model, batch):
        out = model(input_ids=batch["input_ids"])
        return getattr(out, "logits", out), batch[key]

    batches = [{"input_ids": IDS, key: CLASSES, "text": ["a", "b", "c"]}]
    for estimator in ("batch", "sample", "expected"):
        found = ff.estimate_fisher(model, batches, estimator=estimator)
        expected = ff.estimate_fisher(model, batches, estimator=estimator, forward_fn=forward)
        assert torch.allclose(found.buffer, expected.buffer, rtol=1e-4, atol=1e-12), estimator
    found = ParameterPerturber(model, mode="corrected").calc_importance(batches)
    expected = ff.estimate_fisher(model, batches, forward_fn=forward)
    assert torch.allclose(torch.cat([v.view(-1) for v in found.values()]), expected.buffer, rtol=1e-4, atol=1e-12)
    if target == "fc":
        with pytest.raises(ff.EstimationError, match="holds 'input', which the model does not take: its forward has"):
            ff.estimate_fisher(model, [{"input": IDS, key: CLASSES}])
