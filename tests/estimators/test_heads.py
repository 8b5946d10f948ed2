"""Models of transformers: labels that their own losses do not take, heads without `.logits`, configs and hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: models)")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.* no closed form")]
ESTIMATORS = ("batch", "softened", "sample", "expected", "label_free")
WORDS = 23
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 8,
}
dice = torch.Generator().manual_seed(0)
IDS = torch.randint(3, WORDS, (4, 6), generator=dice)
Y = torch.tensor([0, 2, 1, 2])


def bert(head: str = "SequenceClassification") -> nn.Module:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3 if head.startswith("Sequence") else 2)
    return getattr(transformers, f"BertFor{head}")(config).eval()


def gpt2() -> nn.Module:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def ways(model: nn.Module, batches: list, estimator: str):
    """The estimator, and the drop-in where it has that."""
    yield lambda: ff.estimate_fisher(model, batches, estimator=estimator)
    for mode in ("strict", "corrected") if estimator in ("batch", "label_free") else ():
        drop_in = ParameterPerturber(model, mode=mode, label_free=estimator == "label_free")
        yield lambda drop_in=drop_in: drop_in.calc_importance(batches)


def squares(model: nn.Module, losses) -> dict[str, Tensor]:
    """In float64: the mean of the squared gradients of losses, each of a model without gradients."""
    twin = copy.deepcopy(model).double()
    total, number = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}, 0
    for loss in losses(twin):
        twin.zero_grad()
        loss.backward()
        number += 1
        for name, p in twin.named_parameters():
            total[name] += 0 if p.grad is None else p.grad**2
    return {name: value / number for name, value in total.items()}


def close(fisher: ff.Fisher, wanted: dict[str, Tensor]) -> None:
    floor = 1e-9 * max(float(value.max()) for value in wanted.values())
    for name in fisher.layout.names:
        assert (fisher[name].double() - wanted[name]).abs().max() <= 1e-4 * wanted[name].max() + floor, name


# ---- labels ----------------------------------------------------------------------------------------------------------

LABELS = {
    "out of bounds": (Y + 5, r"it is the labels: target 7 is out of bounds, expected classes 0 to 2"),
    "negative": (Y - 1, r"it is the labels: target -1 is out of bounds"),
    "one-hot": (nn.functional.one_hot(Y, 3), r"it is the labels, int64 \[4, 3\]: .*of one-hot ones labels.argmax"),
    "one-hot, float": (nn.functional.one_hot(Y, 3).float(), r"it is the labels, float32 \[4, 3\]: .* labels.argmax"),
    "float": (Y.float(), r"it is the labels: the targets are float32 \[4\], expected classes.* targets.long\(\)"),
    "bool": (Y > 1, r"it is the labels, bool \[4\]: its own loss may want classes as int64 \(labels.long\(\)"),
    "too few": (Y[:2], r"it is the labels: the targets are int64 \[2\], expected classes, int64 \[4\]"),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_a_models_own_loss_does_not_take(kind, estimator):
    labels, message = LABELS[kind]
    batches = [{"input_ids": IDS, "labels": Y}, {"input_ids": IDS, "labels": labels}]
    for way in ways(bert(), batches, estimator):
        with pytest.raises(
            ff.EstimationError, match=r"batch 1: the model, called with input_ids .* raises .*" + message
        ):
            way()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_labels_of_any_integer_dtype_and_shape(estimator):
    wanted = ff.estimate_fisher(bert(), [{"input_ids": IDS, "labels": Y}], estimator=estimator)
    for labels in (Y.int(), Y.to(torch.int16), Y.to(torch.uint8), Y[:, None], Y[:, None].int()):
        found = ff.estimate_fisher(bert(), [{"input_ids": IDS, "labels": labels}], estimator=estimator)
        assert torch.allclose(found.buffer, wanted.buffer, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tokens_beyond_the_tables_and_of_another_dtype(estimator):
    long = torch.randint(3, WORDS, (2, 12), generator=dice)
    for batch, message in (
        ({"input_ids": IDS + WORDS, "labels": IDS}, r"its embeddings have 23, 8 rows, and the batch has input_ids"),
        ({"input_ids": long, "labels": long}, r"a sequence is longer than there are positions"),
        ({"input_ids": IDS, "labels": IDS + WORDS}, r"it is the labels: target \d+ is out of bounds"),
        ({"input_ids": IDS.float(), "labels": IDS}, r"an embedding looks up whole numbers"),
    ):
        for way in ways(gpt2(), [batch], estimator):
            with pytest.raises(ff.EstimationError, match="batch 0: the model, called with .*" + message):
                way()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_sequence_in_the_place_of_a_batch(estimator):
    for batch in (
        {"input_ids": IDS[0], "labels": IDS[0]},
        {"input_ids": IDS[0]},
        {"input_ids": IDS[0], "labels": Y[0]},
    ):
        for way in ways(gpt2(), [batch], estimator):
            with pytest.raises(ff.EstimationError, match=r"batch 0: .* this is one sample, not a batch"):
                way()


# ---- heads -----------------------------------------------------------------------------------------------------------


def clip() -> nn.Module:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": WORDS, "max_position_embeddings": 8, "eos_token_id": 22, **sizes},
        vision_config={"image_size": 8, "patch_size": 4, **sizes},
        projection_dim=8,
    )
    return transformers.CLIPModel(config).eval()


PAIRED = {"input_ids": IDS, "pixel_values": torch.randn(4, 3, 8, 8, generator=dice), "return_loss": True}
HEADS = {
    "questions": (
        lambda: bert("QuestionAnswering"),
        {"input_ids": IDS, "start_positions": IDS[:, 0] % 6, "end_positions": IDS[:, 1] % 6},
        "start_logits",
    ),
    "pretraining": (
        lambda: bert("PreTraining"),
        {"input_ids": IDS, "labels": IDS, "next_sentence_label": Y % 2},
        "prediction_logits",
    ),
    "clip": (clip, PAIRED, "logits_per_image"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_without_logits(kind):
    """Their own loss is enough for `batch`, and for `sample` where it is that of single samples."""
    make, batch, head = HEADS[kind]
    as_double = lambda one: {
        k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in one.items()
    }
    cut = lambda n: {k: t[n : n + 1] if isinstance(t, Tensor) else t for k, t in batch.items()}
    close(ff.estimate_fisher(make(), [batch]), squares(make(), lambda m: [m(**as_double(batch)).loss]))
    if kind != "clip":  # whose loss compares the samples of a batch
        found = ff.estimate_fisher(make(), [batch], estimator="sample")
        close(found, squares(make(), lambda m: (m(**as_double(cut(n))).loss for n in range(4))))
    for estimator in ("expected", "label_free"):
        for way in ways(make(), [batch], estimator):
            message = (
                rf"batch 0: the model returns a \w+ of loss float32 \[\], {head}.*model\(\*\*batch\)\.{head}, targets"
            )
            with pytest.raises(ff.EstimationError, match=message):
                way()
    forward = lambda model, one: (getattr(model(**one), head), None)
    assert ff.estimate_fisher(make(), [batch], estimator="label_free", forward_fn=forward).buffer.any()


def test_what_a_loss_is_made_of_is_named():
    for make, batch, names in (
        (lambda: bert("QuestionAnswering"), {"input_ids": IDS}, "start_positions, end_positions"),
        (clip, {key: part for key, part in PAIRED.items() if key != "return_loss"}, "return_loss"),
    ):
        with pytest.raises(ff.EstimationError, match=rf"without labels; the model makes its loss of {names}; or pass"):
            ff.estimate_fisher(make(), [batch])


# ---- what a forward leaves behind ------------------------------------------------------------------------------------


def attributes(model: nn.Module) -> list:
    """Everything that modules and configs keep, and what is in their hooks."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    found: list = [sorted((key, repr(value)) for key, value in vars(config).items()) for config in configs.values()]
    for module in model.modules():
        found.append({key: list(v) if key.endswith("hooks") else id(v) for key, v in vars(module).items()})
    return found


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_config_is_left_as_it_was(estimator):
    """The first forward with labels sets `problem_type`, which decides of later labels."""
    model = bert()
    before = attributes(model)
    ff.estimate_fisher(model, [{"input_ids": IDS, "labels": Y}], estimator=estimator)
    assert model.config.problem_type is None and attributes(model) == before
    several = {"input_ids": IDS, "labels": (torch.rand(4, 3, generator=dice) > 0.5).float()}
    found = ff.estimate_fisher(model, [several])
    close(found, squares(bert(), lambda m: [m(input_ids=IDS, labels=several["labels"].double()).loss]))
    assert attributes(model) == before


@pytest.mark.parametrize("estimator", ["batch", "sample", "label_free"])
def test_hooks_that_a_first_forward_installs(estimator):
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "num_local_experts": 2, "output_router_logits": True}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    before, batch = attributes(model), {"input_ids": IDS, "labels": IDS}
    fisher = ff.estimate_fisher(model, [batch], estimator=estimator)
    assert attributes(model) == before
    again = ff.estimate_fisher(model, [batch], estimator=estimator)
    assert torch.allclose(again.buffer, fisher.buffer, rtol=1e-4) and attributes(model) == before
    assert len(model(**batch).router_logits) == 1  # of one layer, once


# ---- weights that are elsewhere --------------------------------------------------------------------------------------


def test_a_part_that_is_offloaded():
    model = bert()
    model.bert.encoder.to("meta")
    for params in ("last", "classifier.*", None):
        for estimator in ESTIMATORS:
            with pytest.raises(
                ff.DeviceError, match="'bert.encoder.* is on meta .* offloaded or not loaded; load them fir"
            ):
                ff.estimate_fisher(model, [{"input_ids": IDS, "labels": Y}], params, estimator=estimator)
    for mode in ("strict", "corrected"):
        drop_in = ParameterPerturber(model, mode=mode, parameters={"train_layer": "classifier.*"})
        with pytest.raises(ff.DeviceError, match="'bert.encoder.* is on meta .*load them first"):
            drop_in.calc_importance([{"input_ids": IDS, "labels": Y}])
    forward = lambda m, batch: (m(input_ids=batch["input_ids"]).logits, batch["labels"])
    with pytest.raises(ff.EstimationError, match="forward_fn raises .*'bert.encoder.* is on meta .*load them first"):
        ff.estimate_fisher(model, [{"input_ids": IDS, "labels": Y}], "last", forward_fn=forward)


def test_a_part_that_accelerate_has_offloaded():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = bert()
    accelerate.cpu_offload(model.bert.encoder, execution_device=torch.device("cpu"))
    batch = {"input_ids": IDS, "labels": Y}
    with pytest.raises(ff.DeviceError, match=r"'bert.encoder.* is on meta .* load them first .*remove_hook_from_subm"):
        ff.estimate_fisher(model, [batch], "last")
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(
        ff.estimate_fisher(model, [batch], "last").buffer, ff.estimate_fisher(bert(), [batch], "last").buffer
    )
