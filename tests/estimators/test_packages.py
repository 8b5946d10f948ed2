"""What peft, transformers, accelerate, opacus, schedulefree and lightning hand out; each where it is installed.

Versions tried: peft 0.21, transformers 5.24, accelerate 1.15, opacus 1.6, schedulefree 1.4, lightning-fabric 2.6.
"""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
from small import batches, net
from torch import nn
from torch.nn.functional import cross_entropy

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
IDS = {"input_ids": torch.arange(24).view(3, 8) % 31, "labels": torch.arange(24).view(3, 8) % 31}


def package(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except Exception as error:  # a package may be there and not its own needs
            return pytest.skip(f"{name}: {error!r:.80}")


def language_model(**options) -> nn.Module:
    transformers = package("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=31, n_positions=8, num_labels=3, pad_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel(config)


def adapted(model: nn.Module, **options) -> nn.Module:
    peft = package("peft")
    config = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["c_attn"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**config | options))


# ---- adapters --------------------------------------------------------------------------------------------------------

LORA = [f"transformer.h.{i}.attn.c_attn.lora_{x}.default.weight" for i in (0, 1) for x in "AB"]


def test_of_an_adapted_model_the_adapter_alone_is_meant():
    base = language_model()
    before = copy.deepcopy(base.state_dict())
    model = adapted(base)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert list(ff.Layout.from_module(model).names) == LORA
    with warnings.catch_warnings():
        warnings.simplefilter("error", ff.ScopeWarning)
        assert ff.last_layer(model) == LORA[2:]
    fisher = ff.estimate_fisher(model, [IDS])
    head = ff.estimate_fisher(model, [IDS], "last")
    assert fisher.layout.names == tuple(LORA)
    assert torch.equal(head.buffer, torch.cat([fisher[name].view(-1) for name in LORA[2:]]))
    louder = ff.Fisher(fisher.buffer * 50, fisher.layout)
    assert ff.dampen_(model, fisher, louder, alpha=2.0).selected > 0
    own = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}
    assert all(torch.equal(own[name], value) for name, value in before.items())
    assert len(frozen) == len(list(base.parameters())) - 4
    importances = ParameterPerturber(model, mode="corrected").calc_importance([IDS])
    assert list(importances) == [f"base_model.model.{name}" for name in LORA]


def test_fishers_of_a_base_fit_it_beneath_an_adapter():
    base = language_model()
    plain = copy.deepcopy(base)
    values = {name: torch.rand(p.shape) for name, p in base.named_parameters()}
    louder = {name: torch.rand(p.shape) * 9 for name, p in base.named_parameters()}
    model = adapted(base)
    forget = {
        name: louder[name.removeprefix("base_model.model.").replace("base_layer.", "")]
        for name, p in model.named_parameters()
        if "lora" not in name
    }
    ff.dampen_(plain, ff.Fisher.from_dict(values), ff.Fisher.from_dict(louder), alpha=2.0)
    report = ff.dampen_(model, ff.Fisher.from_dict(values), ff.Fisher.from_dict(forget), alpha=2.0, undo=True)
    own = [p for name, p in model.named_parameters() if "lora" not in name]
    assert all(map(torch.equal, own, plain.parameters()))
    report.undo_()
    assert not all(map(torch.equal, own, plain.parameters()))


def test_heads_and_prompts_that_are_trained_along():
    transformers, peft = package("transformers"), package("peft")
    classifier = transformers.GPT2ForSequenceClassification(language_model().config)
    assert ff.last_layer(adapted(classifier, task_type="SEQ_CLS")) == ["score.modules_to_save.default.weight"]
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = peft.get_peft_model(language_model(), config)
    assert ff.Layout.from_module(prompted).names == ("prompt_encoder.default.embedding.weight",)
    assert ff.last_layer(prompted) == ["prompt_encoder.default.embedding.weight"]


def test_an_adapter_that_is_loaded_to_be_used_only():
    model = adapted(language_model()).requires_grad_(False)
    for run in (ff.Layout.from_module, ff.last_layer, lambda m: ff.estimate_fisher(m, [IDS], "last")):
        with pytest.raises(
            ff.LayoutError, match=r"none requires grad; load the adapter with is_trainable=True, or name"
        ):
            run(model)


def test_tied_heads_of_language_models():
    with pytest.warns(ff.ScopeWarning, match=r"its 'transformer.wte.weight' is also 'lm_head.weight'"):
        assert ff.last_layer(language_model()) == ["transformer.wte.weight"]
    assert ff.last_layer(language_model(tie_word_embeddings=False)) == ["lm_head.weight"]
    assert ff.Layout.from_module(language_model(), "lm_head.weight").names == ("transformer.wte.weight",)


# ---- accelerate ------------------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer, closures: bool) -> ff.FisherAccumulator:
    accumulator = ff.FisherAccumulator(model)
    with accumulator.during(optimizer):
        for x, y in batches():

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            if closures:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    return accumulator


@pytest.mark.parametrize("closures", [False, True])
def test_accelerate(closures):
    accelerate = package("accelerate")
    plain = net()
    expected = train(plain, torch.optim.Adam(plain.parameters(), lr=0.1), closures).result()
    model = net()
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))
    accumulator = train(model, optimizer, closures)
    assert accumulator.steps == 3
    assert torch.allclose(accumulator.result().buffer, expected.buffer)
    assert ff.Fisher.from_optimizer(optimizer, model).numel == 53
    estimate = ff.estimate_fisher(model, batches(), estimator="sample")
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    assert torch.allclose(estimate.buffer, ff.estimate_fisher(plain, batches(), estimator="sample").buffer)


def test_offloaded_weights_are_refused_until_they_are_back():
    accelerate = package("accelerate")
    model = accelerate.cpu_offload(net(), execution_device=torch.device("cpu"))
    fisher = ff.estimate_fisher(net(), batches())
    louder = ff.Fisher(fisher.buffer * 50, fisher.layout)
    for run in (
        lambda: ff.dampen_(model, fisher, louder),
        lambda: ff.estimate_fisher(model, batches()),
        lambda: ff.FisherAccumulator(model),
        lambda: ff.flatten_(model),
        lambda: ParameterPerturber(model).calc_importance(batches()),
        lambda: ParameterPerturber(model).modify_weight(fisher, louder),
    ):
        with pytest.raises(ff.DeviceError, match=r"offloaded or .* load them first .*remove_hook_from_submodules"):
            run()
    accelerate.hooks.remove_hook_from_submodules(model)
    assert ff.dampen_(model, fisher, louder).selected > 0


# ---- opacus, schedulefree, fabric ------------------------------------------------------------------------------------


def test_opacus():
    opacus = package("opacus")
    model = package("opacus.grad_sample").GradSampleModule(net())
    for estimator in ("batch", "sample", "label_free"):
        fisher = ff.estimate_fisher(model, batches(), estimator=estimator)
        expected = ff.estimate_fisher(net(), batches(), estimator=estimator)
        assert fisher.layout == expected.layout
        assert torch.allclose(fisher.buffer, expected.buffer)
        assert "looked through GradSampleModule" in str(fisher.provenance)
    assert model.hooks_enabled
    assert not any(getattr(p, "grad_sample", None) is not None for p in model.parameters())
    data = torch.utils.data.TensorDataset(*map(torch.cat, zip(*batches(), strict=True)))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    for noise in (1.0, 0.0):
        plain = net()
        private, optimizer, _ = opacus.PrivacyEngine().make_private(
            module=plain,
            optimizer=torch.optim.SGD(plain.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=noise,
            max_grad_norm=1e6,
            poisson_sampling=False,
        )
        if noise:
            with pytest.raises(ff.ArgumentError, match="a DPOptimizer, which adds noise to the gradients"):
                train(private, optimizer, closures=False)
        else:
            same = net()
            expected = train(same, torch.optim.SGD(same.parameters(), lr=0.1), closures=False).result()
            assert torch.allclose(train(private, optimizer, closures=False).result().buffer, expected.buffer, rtol=1e-4)


@pytest.mark.parametrize("closures", [False, True])
def test_schedulefree(closures):
    schedulefree = package("schedulefree")
    model = net()
    optimizer = schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.train()
    seen: list[torch.Tensor] = []
    step = optimizer.base.step
    optimizer.base.step = lambda *a, **k: (
        seen.append(torch.cat([p.grad.view(-1) for p in model.parameters()])),
        step(),
    )
    accumulator = train(model, optimizer, closures)
    assert torch.allclose(accumulator.result().buffer, torch.stack(seen).square().mean(0))


def test_fabric():
    fabric = package("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    plain = net()
    model, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    fisher = ff.estimate_fisher(model, batches(), estimator="sample")
    assert torch.equal(fisher.buffer, ff.estimate_fisher(plain, batches(), estimator="sample").buffer)
    assert fisher.layout == ff.Layout.from_module(plain)
    assert train(model, optimizer, closures=False).steps == 3


def test_an_adapter_that_is_merged_is_refused():
    """Dampening would not reach the outputs, and taking the adapter out again would leave the base changed."""
    model = adapted(language_model())
    layout = ff.Layout.from_module(model)
    fisher = ff.Fisher(torch.ones(layout.numel), layout)
    model.merge_adapter()
    before = copy.deepcopy(model.state_dict())
    for use in (
        lambda: ff.Layout.from_module(model),
        lambda: ff.estimate_fisher(model, [{"input_ids": torch.zeros(2, 3, dtype=torch.int64)}], estimator="expected"),
        lambda: ff.dampen_(model, fisher, fisher, alpha=0.5),
    ):
        with pytest.raises(ff.LayoutError, match=r"c_attn' is merged into the layer.*unmerge_adapter\(\)"):
            use()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.unmerge_adapter()
    assert ff.Layout.from_module(model) == layout
