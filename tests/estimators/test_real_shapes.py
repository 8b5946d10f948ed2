"""Exact Fishers of nets as transformers, timm and peft have them, against a float64 backward for every sample."""

from __future__ import annotations

import warnings

import pytest
import torch
from fisher_models import settled
from real_shapes import SHAPES, Experts
from test_sample_estimator import check_record, close, expected_oracle, made, oracle
from torch import nn
from torch.nn import functional

import fiun_fast as ff

pytestmark = pytest.mark.usefixtures("one_thread")


def wanted(model: nn.Module, fisher: ff.Fisher, by_all: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the parameters that a Fisher is of."""
    return {name: by_all[name] for name in fisher.layout.names}


@pytest.mark.parametrize("subject", SHAPES, ids=lambda s: s.id)
def test_shapes(subject):
    """No warning: nothing falls back."""
    loader = subject.batches((4, 3, 5))
    model = made(subject)
    if subject.id == "experts-grouped":  # torch has it in single precision only
        by_one = ff.estimate_fisher(model, subject.batches((1,) * 12), estimator="batch")
        loader = [tuple(torch.cat(part) for part in zip(*subject.batches((1,) * 12)))]
        fisher = ff.estimate_fisher(model, loader, estimator="sample")
        close(fisher, {name: by_one[name].double() for name in by_one.layout.names}, 1e-4)
    else:
        fisher = ff.estimate_fisher(model, loader, estimator="sample")
        close(fisher, wanted(model, fisher, oracle(model, loader)), 5e-5)
    check_record(fisher, subject)


@pytest.mark.parametrize("subject", [s for s in SHAPES if s.id in ("bert", "swin-continuous", "experts-slices")],
                         ids=lambda s: s.id)  # fmt: skip
def test_expected_of_shapes(subject):
    model, loader = made(subject), subject.batches((3, 4))
    fisher = ff.estimate_fisher(model, loader, estimator="expected", samples=0)
    close(fisher, wanted(model, fisher, expected_oracle(model, loader)), 5e-5)


def test_an_expert_that_the_first_batch_does_not_use():
    torch.manual_seed(0)
    model = Experts("layers")
    model.router.bias.data[2] = -1.0
    x = torch.randn(64, 2, 8)
    uses = model.router(x).topk(2).indices.eq(2).flatten(1).any(1)
    first, second = ((x[which][:4], torch.randint(5, (4,))) for which in (~uses, uses))
    fisher = ff.estimate_fisher(model, [first, second], estimator="sample")
    close(fisher, oracle(model, [first, second]), 5e-5)
    assert fisher.provenance.how["experts.2.weight"] == "no gradient reached it and closed form, linear weight"


def test_a_part_in_place_of_the_whole():
    """What an in-place function writes to a parameter's derivative is either understood or noticed, never wrong."""

    class InPlace(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.weight, self.head, self.how = nn.Parameter(torch.randn(6)), nn.Linear(6, 5), how

        def forward(self, x):
            scale = self.weight * 1
            if self.how == "relu_":
                functional.relu(scale, inplace=True)
            elif self.how == "alias":
                alias = scale.view(6)
                scale.exp_()
                scale = alias
            elif self.how == "add_":
                scale += x.mean()  # one number for the batch
            elif self.how == "set":
                scale[2] = 0.5
            return self.head(torch.tanh(x * scale))

    g = torch.Generator().manual_seed(0)
    loader = [(torch.randn(n, 6, generator=g), torch.randint(5, (n,), generator=g)) for n in (4, 3)]
    for how in ("relu_", "alias", "set"):
        torch.manual_seed(1)
        model = InPlace(how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ff.FallbackWarning)
            close(ff.estimate_fisher(model, loader, estimator="sample"), oracle(model, loader))
    with pytest.warns(ff.FallbackWarning, match="depend on the others of its batch"):
        ff.estimate_fisher(InPlace("add_"), loader, estimator="sample")


class Bag(nn.Module):
    """Bags of words [B, T]; those of some words may be weighted."""

    def __init__(self, weighted: bool = False, **options):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, **options), nn.Linear(4, 5)
        self.weighted = weighted

    def forward(self, x):
        weights = (x * 0.1 + 0.5).to(self.bag.weight.dtype) if self.weighted else None
        return self.head(torch.tanh(self.bag(x, per_sample_weights=weights)))


class Pairs(nn.Module):
    """A bilinear layer over two parts of [B, T, 6]."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.pairs, self.head = nn.Bilinear(4, 2, 3, bias=bias), nn.Linear(3, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.pairs(x[..., :4], x[..., 4:])).flatten(1, -2).sum(1))


@pytest.mark.parametrize(
    "model",
    [
        lambda: Bag(mode="sum"),
        lambda: Bag(mode="mean"),
        lambda: Bag(mode="mean", padding_idx=2),
        lambda: Bag(mode="sum", padding_idx=-7),
        lambda: Bag(weighted=True, mode="sum", padding_idx=0),
        lambda: Pairs(),
        lambda: Pairs(bias=False),
    ],
    ids=["bag-sum", "bag-mean", "bag-padded", "bag-padded-from-the-end", "bag-weighted", "bilinear", "no-bias"],
)
def test_what_is_restated_in_functions_with_a_closed_form(model):
    """No warning: nothing falls back."""
    torch.manual_seed(2)
    model = settled(model())
    words = isinstance(model, Bag)
    made = [torch.randint(9, (n, 6)) if words else torch.randn(n, 3, 6) for n in (4, 5, 3)]
    if words:
        made[0][1] = 2  # a bag of nothing, where that is padding
    loader = [(x, torch.randint(5, (len(x),))) for x in made]
    fisher = ff.estimate_fisher(model, loader, estimator="sample")
    close(fisher, oracle(model, loader), 5e-5)
    assert all(how.startswith("closed form") for how in fisher.provenance.how.values())


def test_bags_without_a_closed_form():
    torch.manual_seed(3)
    loader = [(torch.randint(9, (n, 6)), torch.randint(5, (n,))) for n in (4, 3)]
    for options in ({"mode": "max"}, {"mode": "sum", "scale_grad_by_freq": True}):
        model = settled(Bag(**options))
        with pytest.warns(ff.FallbackWarning, match=r"'bag.weight': used by embedding_bag"):
            close(ff.estimate_fisher(model, loader, estimator="sample"), oracle(model, loader))


def test_a_warning_says_which_and_why_once_and_can_be_silenced():
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.GRU(3, 4, batch_first=True), nn.Linear(4, 5)))
    forward = lambda m, b: (m[1](m[0](b[0])[0][:, -1]), b[1])
    loader = [(torch.randn(4, 2, 3), torch.randint(5, (4,))) for _ in range(3)]
    with pytest.warns(ff.FallbackWarning) as caught:
        ff.estimate_fisher(model, loader, estimator="sample", forward_fn=forward)
    (one,) = caught
    assert "4 of 6 parameters have no closed form" in str(one.message)
    names = "'0.weight_ih_l0', '0.weight_hh_l0', '0.bias_ih_l0', '0.bias_hh_l0'"
    assert f"{names}: used by gru" in str(one.message)
    assert one.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ff.FallbackWarning)
        ff.estimate_fisher(model, loader, estimator="sample", forward_fn=forward)


def test_compiled_parts_run_eagerly():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return torch.tanh(self.fc(x))

    def compiler(graph, inputs):
        raise AssertionError("compiled")

    torch.manual_seed(0)
    model = nn.Sequential(Part(), nn.Linear(5, 5))
    loader = [(torch.randn(n, 6), torch.randint(5, (n,))) for n in (4, 3)]
    right = oracle(model, loader)
    model[0].compile(backend=compiler)
    fisher = ff.estimate_fisher(model, loader, estimator="sample")
    close(fisher, right)
    assert fisher.provenance.how["0.fc.weight"] == "closed form, linear weight"
    with pytest.raises(Exception, match="compiled"):
        model(loader[0][0])


HF = {
    "BERT": ("BertForSequenceClassification", "BertConfig", {"num_labels": 5, "intermediate_size": 12}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 8, "n_layer": 1, "n_head": 2}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": 1, "intermediate_size": 12}),
    "T5": ("T5ForSequenceClassification", "T5Config",
           {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}),
    "ViT": ("ViTForImageClassification", "ViTConfig", {"image_size": 8, "patch_size": 4, "intermediate_size": 12}),
    "ConvNeXt": ("ConvNextForImageClassification", "ConvNextConfig",
                 {"hidden_sizes": [4, 4, 6, 6], "depths": [1, 1, 1, 1], "layer_scale_init_value": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", HF)
def test_transformers(name):
    hf = pytest.importorskip("transformers")
    model_class, config_class, options = HF[name]
    common = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0,
              "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
    options = options if name == "ConvNeXt" else common | options
    torch.manual_seed(0)
    model = getattr(hf, model_class)(getattr(hf, config_class)(**options)).eval()
    g = torch.Generator().manual_seed(0)
    images, ends = name in ("ViT", "ConvNeXt"), name == "T5"

    def batch(n):
        size = 8 if name == "ViT" else 32
        x = torch.randn(n, 3, size, size, generator=g) if images else torch.randint(2, 11, (n, 5), generator=g)
        if ends:
            x[:, -1] = 1
        return x, torch.randint(2, (n,), generator=g)

    def forward(m, batch):
        logits = m(batch[0]).logits
        return (logits, batch[1]) if logits.dim() == 2 else (logits[:, :-1].transpose(1, 2), batch[0][:, 1:])

    loader = [batch(n) for n in (4, 3)]
    singles = [
        (x[n : n + 1].double() if images else x[n : n + 1], y[n : n + 1]) for x, y in loader for n in range(len(y))
    ]
    fisher = ff.estimate_fisher(model, loader, estimator="sample", forward_fn=forward)
    total = {key: torch.zeros_like(p, dtype=torch.float64) for key, p in model.named_parameters()}
    for one in singles:
        twin = model.double()
        twin.zero_grad()
        functional.cross_entropy(*forward(twin, one)).backward()
        for key, p in twin.named_parameters():
            if p.grad is not None:
                total[key] += p.grad**2 / len(singles)
    noise = 1e-12 * max(t.max() for t in total.values())  # a key's bias has no gradient but rounding
    for key in fisher.layout.names:
        assert (fisher[key].double() - total[key]).abs().max() <= 1e-4 * total[key].max() + noise, key
    assert all(how.startswith("closed form") for how in fisher.provenance.how.values())
