"""The drop-in for SSD's class: bits of the published class in strict mode, the fast path."""

import copy
import functools

import numpy as np
import pytest
import torch
from textbook_ssd import ResNet, importance, merged, modify
from torch import nn
from torch.nn.functional import cross_entropy

import fiun_fast as ff
from fiun_fast.compat import dampening, importances
from fiun_fast.compat.ssd import ParameterPerturber, mfim

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMETERS = {
    "lower_bound": 1,
    "exponent": 1,
    "magnitude_diff": None,
    "min_layer": -1,
    "max_layer": -1,
    "forget_threshold": 1,
    "dampening_constant": 0.7,
    "selection_weighting": 1.3,
}


@functools.cache
def data(dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    """Batches (x, y) of everything and of what is to be forgotten; the last one is smaller."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(22, 3, 8, 8, generator=generator).to(dtype), torch.randint(5, (22,), generator=generator)
    everything = list(zip(x.split(6), y.split(6)))
    return everything, [(x[:5], y[:5] * 0), (x[5:8], y[5:8] * 0)]


def net(outputs: str = "tensor", dtype: torch.dtype = torch.float32, train: bool = False) -> ResNet:
    torch.manual_seed(1)
    return ResNet(outputs).to(dtype).train(train)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(
        same_bits(a[k], b[k]) if a[k].is_floating_point() else torch.equal(a[k], b[k]) for k in a
    )


def plain(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


# form -> (what the model returns, batch from (x, y), options of the drop-in, the published class's loss)
FORMS = {
    "(x, y)": ("tensor", lambda x, y: (x, y), {}, plain),
    "(x, _, y)": ("tensor", lambda x, y: (x, y + 7, y), {}, lambda m, b: cross_entropy(m(b[0]), b[2])),
    "(x, y, idx)": ("tensor", lambda x, y: (x, y, torch.arange(len(y)) + 99), {"target_index": 1}, plain),
    "list": ("tensor", lambda x, y: [x, y], {}, plain),
    "tuple from the model": ("tuple", lambda x, y: (x, y), {}, lambda m, b: cross_entropy(m(b[0])[0], b[1])),
    ".logits": ("object", lambda x, y: (x, y), {}, lambda m, b: cross_entropy(m(b[0]).logits, b[1])),
    "dict": ("object", lambda x, y: {"x": x, "labels": y}, {}, lambda m, b: m(**b).loss),
    "dict, truncated": (
        "object",
        lambda x, y: {"x": x, "labels": y, "scale": torch.tensor(2.0)},
        {"truncate": 4},
        lambda m, b: m(b["x"][:4], b["labels"][:4], b["scale"]).loss,
    ),
    "batch_fn": (
        "tensor",
        lambda x, y: {"image": x, "class": y},
        {"batch_fn": lambda b: (b["image"], b["class"])},
        lambda m, b: cross_entropy(m(b["image"]), b["class"]),
    ),
    "forward_fn": (
        "tensor",
        lambda x, y: {"image": x, "class": y},
        {"forward_fn": lambda m, b: (m(b["image"]), b["class"])},
        lambda m, b: cross_entropy(m(b["image"]), b["class"]),
    ),
    "loss_fn": (
        "tensor",
        lambda x, y: (x, y),
        {"loss_fn": nn.MultiMarginLoss()},
        lambda m, b: nn.MultiMarginLoss()(m(b[0]), b[1]),
    ),
}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("form", FORMS)
def test_strict_mode_has_the_bits_of_the_published_class(form, train):
    """Importances, weights, gradients left over, BatchNorm statistics and random state, for every form of batch."""
    outputs, make, options, loss_of = FORMS[form]
    mine, theirs = net(outputs, train=train), net(outputs, train=train)
    everything, forget = ([make(x, y) for x, y in batches] for batches in data())
    torch.manual_seed(5)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    expected = [importance(theirs, sgd, batches, loss_of) for batches in (forget, everything)]
    noise = torch.rand(3)
    torch.manual_seed(5)
    pdr = ParameterPerturber(mine, torch.optim.SGD(mine.parameters(), lr=0.1), "cpu", PARAMETERS, **options)
    found = [pdr.calc_importance(batches) for batches in (forget, everything)]
    assert torch.equal(torch.rand(3), noise)
    for mine_values, their_values in zip(found, expected):
        assert type(mine_values) is dict
        assert same(mine_values, their_values)
    assert same({n: p.grad for n, p in mine.named_parameters()}, {n: p.grad for n, p in theirs.named_parameters()})
    modify(theirs, expected[1], expected[0], 1.3, 0.7)
    before = copy.deepcopy(mine.state_dict())
    report = pdr.modify_weight(found[1], found[0])
    assert same(mine.state_dict(), theirs.state_dict())
    changed = sum(int((mine.state_dict()[k] != before[k]).sum()) for k in before)
    assert 0 < changed <= report.selected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exponent", [1, 0.5])
def test_strict_mode_in_other_dtypes_and_with_an_exponent(dtype, exponent):
    mine, theirs = net(dtype=dtype), net(dtype=dtype)
    if dtype == torch.float16:  # float16 has no BatchNorm backward on every CPU
        mine, theirs = (nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Linear(7, 5)) for _ in range(2))
        theirs.load_state_dict(mine.state_dict())
        mine, theirs = mine.half(), theirs.half()
    everything, forget = data(dtype)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)
    i, f = (importance(theirs, sgd, batches, plain) for batches in (everything, forget))
    modify(theirs, i, f, 1.3, 0.7, exponent, 0.9)
    pdr = ParameterPerturber(mine, None, None, PARAMETERS | {"exponent": exponent, "lower_bound": 0.9})
    mine_i, mine_f = (pdr.calc_importance(batches) for batches in (everything, forget))
    assert same(mine_i, i)
    assert same(mine_f, f)
    pdr.modify_weight(mine_i, mine_f)
    assert same(mine.state_dict(), theirs.state_dict())
    assert not same(mine.state_dict(), net(dtype=dtype).state_dict())


@pytest.mark.parametrize("exponent", [0.5, 2, 3.3])
def test_strict_mode_powers(exponent):
    mine, theirs = net(), net()
    i, f = ({n: torch.rand_like(p) for n, p in mine.named_parameters()} for _ in range(2))
    modify(theirs, i, f, 0.8, 0.6, exponent, 0.9)
    options = {"exponent": exponent, "selection_weighting": 0.8, "dampening_constant": 0.6, "lower_bound": 0.9}
    ParameterPerturber(mine, parameters=options).modify_weight(i, f)
    assert same(mine.state_dict(), theirs.state_dict())


def test_strict_mode_with_channels_last_frozen_and_foreign_parameters():
    """Weights that are not contiguous; a frozen layer; parameters that the optimiser does not hold."""
    mine, theirs = (net().to(memory_format=torch.channels_last) for _ in range(2))
    everything, forget = data()
    found = []
    for model in (mine, theirs):
        model.conv1.weight.requires_grad_(False)
        held = [p for n, p in model.named_parameters() if not n.startswith("bn1")]
        sgd = torch.optim.SGD(held, lr=0.1)
        if model is theirs:
            found.append([importance(theirs, sgd, batches, plain) for batches in (everything, forget)])
            modify(theirs, *found[-1], 1.3, 0.7)
        else:
            pdr = ParameterPerturber(mine, sgd, parameters=PARAMETERS)
            found.append([pdr.calc_importance(batches) for batches in (everything, forget)])
            report = pdr.modify_weight(*found[-1])
            assert report.selected == sum(int((found[0][1][n] > 1.3 * found[0][0][n]).sum()) for n in found[0][0])
            assert {n.name for n in report} == {f"model, torch.float32 on cpu{kind}" for kind in ("", ", strided")}
            with pytest.raises(ff.ArgumentError, match="undo: parameter '.*' is not contiguous"):
                pdr.modify_weight(*found[-1], undo=True)
    for mine_values, their_values in zip(*found):
        assert same(mine_values, their_values)
        assert not mine_values["conv1.weight"].any()
        assert mine_values["bn1.weight"].any()
    assert same(mine.state_dict(), theirs.state_dict())


def test_fiun_last_layer_truncation_merge_with_divisor_and_reverse():
    """FIUn's copy: train_layer, 32 (here 4) samples of each batch, several sources with a divisor, the reverse."""
    mine, theirs = net(), net()
    everything, forget = data()
    other = [(x.flip(0), y * 0 + 1) for x, y in forget]
    only = ["fc.weight", "fc.bias"]
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)

    def shortened(model, batch):
        return cross_entropy(model(batch[0][:4]), batch[1][:4])

    i = importance(theirs, sgd, everything, shortened)
    sources = [importance(theirs, sgd, batches, shortened) for batches in (forget, other, forget[::-1])]
    f = merged(sources, only, 5)
    pdr = ParameterPerturber(mine, parameters={"selection_weighting": 0.1, "train_layer": only}, truncate=4)
    mine_i = pdr.calc_importance(everything)
    mine_sources = [pdr.calc_importance(batches) for batches in (forget, other, forget[::-1])]
    assert list(mine_i) == list(i)
    assert all(same_bits(mine_i[n], i[n]) for n in only)
    assert not any(mine_i[n].any() for n in mine_i if n not in only)
    assert all(p.requires_grad for p in mine.parameters())
    kept = [{n: v.clone() for n, v in one.items()} for one in mine_sources]
    report = pdr.modify_weight(mine_i, mine_sources, divisor=5)
    assert all(same(a, b) for a, b in zip(mine_sources, kept))  # inputs are not changed
    modify(theirs, i, f, 0.1, only=only)
    assert same(mine.state_dict(), theirs.state_dict())
    assert report.numel == 85
    assert same({n: mfim(mine_sources, 5)[n] for n in only}, {n: f[n] for n in only})
    pdr.selection_weighting, pdr.dampening_constant = 3.0, 0.5
    pdr.reverse_modify_weight(mine_i, mine_sources[0])
    modify(theirs, i, sources[0], 3.0, 0.5, only=only, reverse=True)
    assert same(mine.state_dict(), theirs.state_dict())
    assert not same(mine.state_dict(), net().state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reverse_on_a_whole_model_with_edges(dtype):
    mine, theirs = net(dtype=dtype), net(dtype=dtype)
    edges = torch.tensor([0.0, 1e-30, 0.25, 0.5, 1.0, 2.0, float("inf"), float("nan")], dtype=dtype)
    torch.manual_seed(3)
    i, f = ({n: edges[torch.randint(8, p.shape)] for n, p in mine.named_parameters()} for _ in range(2))
    modify(theirs, i, f, 1.5, 0.7, cap=0.8, reverse=True)
    pdr = ParameterPerturber(
        mine, parameters={"selection_weighting": 1.5, "dampening_constant": 0.7, "lower_bound": 0.8}
    )
    report = pdr.reverse_modify_weight(i, f)
    assert same(mine.state_dict(), theirs.state_dict())
    if dtype != torch.bfloat16:
        assert report.selected == sum(int((f[n] < 1.5 * i[n]).sum()) for n in i)


def test_merge_of_several_without_a_divisor_and_in_half_precision():
    for dtype in (torch.float32, torch.bfloat16):
        mine, theirs = net(dtype=dtype), net(dtype=dtype)
        torch.manual_seed(2)
        i, f, g = ({n: torch.rand_like(p) for n, p in mine.named_parameters()} for _ in range(3))
        modify(theirs, i, merged([f, g], list(f), 1), 0.9)
        ParameterPerturber(mine, parameters={"selection_weighting": 0.9}).modify_weight(i, [f, g])
        assert same(mine.state_dict(), theirs.state_dict())
        shuffled = {name: g[name] for name in sorted(g)}
        assert same(mfim([f, shuffled], 3), merged([f, g], list(f), 3))
        with pytest.raises(ff.LayoutError, match=r"importances differ: fc.bias \[5\] only in importances\[0\]"):
            mfim([f, {n: v for n, v in g.items() if n != "fc.bias"}])


def test_label_free_has_the_bits_of_lfssd():
    mine, theirs = net(), net()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1)

    def length(model, batch):
        return torch.norm(model(batch[0]), p="fro", dim=1).pow(2).mean()

    expected = importance(theirs, sgd, data()[0], length, torch.abs)
    assert same(ParameterPerturber(mine, label_free=True).calc_importance(data()[0]), expected)
    corrected = ParameterPerturber(mine, label_free=True, mode="corrected").calc_importance(data()[0])
    for name, value in corrected.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7)
    with pytest.raises(ff.ArgumentError, match="label_free has a loss of its own"):
        ParameterPerturber(mine, label_free=True).calc_importance(data()[0], nn.CrossEntropyLoss())


# ---- normalisation and corrected mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["strict", "corrected"])
@pytest.mark.parametrize("label_free", [False, True])
def test_normalisation(mode, label_free):
    """Against sums in float64 over the batches' own gradients."""
    model = net(dtype=torch.float64)
    sums = {how: {n: torch.zeros_like(p) for n, p in model.named_parameters()} for how in ("plain", "weighted")}
    for x, y in data(torch.float64)[0]:
        out = model(x)
        loss = out.square().sum(1).mean() if label_free else cross_entropy(out, y)
        for (n, _), g in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            size = g.abs() if label_free else g.square()
            sums["plain"][n] += size
            sums["weighted"][n] += len(y) * size
    expected = {"batches": ("plain", 4), "samples": ("plain", 22), "weighted": ("weighted", 22)}
    for how, (which, divisor) in expected.items():
        found = ParameterPerturber(net(), mode=mode, label_free=label_free).calc_importance(data()[0], normalize=how)
        for n, value in found.items():
            torch.testing.assert_close(value, (sums[which][n] / divisor).float(), rtol=2e-3, atol=1e-6)
        constructed = ParameterPerturber(net(), mode=mode, label_free=label_free, normalize=how).calc_importance(
            data()[0]
        )
        assert same(constructed, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrected_mode_leaves_the_model_as_it_was_and_sums_in_float32(dtype):
    model = net(dtype=dtype, train=True)
    plain(model, data(dtype)[0][0]).backward()
    state, grads = copy.deepcopy(model.state_dict()), {n: p.grad for n, p in model.named_parameters()}
    random = torch.random.get_rng_state()
    pdr = ParameterPerturber(model, torch.optim.SGD(model.parameters(), 0.1), parameters=PARAMETERS, mode="corrected")
    i, f = (pdr.calc_importance(batches) for batches in data(dtype))
    assert same(model.state_dict(), state)
    assert model.training and model.bn1.training
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(v.dtype == torch.float32 for v in i.values())
    expected, twin = ff.estimate_fisher(model, data(dtype)[0]), copy.deepcopy(model)
    assert same(i, expected.as_dict())
    report = pdr.modify_weight(i, f)
    assert report.selected > 0
    ff.dampen_(twin, expected, ff.estimate_fisher(twin, data(dtype)[1]), alpha=1.3, lam=0.7)
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_corrected_mode_with_a_scope_takes_frozen_layers_along():
    model = net()
    model.requires_grad_(False)
    found = ParameterPerturber(model, parameters={"train_layer": "last"}, mode="corrected").calc_importance(data()[0])
    assert list(found) == ["fc.weight", "fc.bias"]
    assert found["fc.weight"].any()
    assert not any(p.requires_grad for p in model.parameters())


# ---- the fast path, dicts of other origin ----------------------------------------------------------------------------


def test_importances_are_one_buffer_and_reach_the_plan_without_a_copy(monkeypatch):
    model = net()
    pdr = ParameterPerturber(model, parameters=PARAMETERS)
    i, f = (pdr.calc_importance(batches) for batches in data())
    assert len({v.untyped_storage().data_ptr() for v in i.values()}) == 1
    assert importances.as_fisher(i).buffer.data_ptr() == i["conv1.weight"].data_ptr()
    monkeypatch.setattr(ff.Fisher, "from_dict", None)  # what would copy
    monkeypatch.setattr(dampening, "SMALL", 0)  # those of small models are copied
    report = pdr.modify_weight(i, f, dry_run=True)
    f["fc.weight"] *= 1000  # an edit in place stays on the fast path, and counts
    assert pdr.modify_weight(i, f, dry_run=True).selected > report.selected
    pdr.train_layer = ["layer2.0.conv1.weight", "layer2.0.bn1.weight"]  # a stretch of the buffer
    assert pdr.modify_weight(i, f, dry_run=True).numel == 16 * 16 * 9 + 16
    pdr.train_layer = None
    assert pdr.modify_weight(ff.Fisher(*_flat(i)), f, dry_run=True).numel == sum(v.numel() for v in i.values())
    zeros = pdr.zerolike_params_dict(model)
    assert pdr.modify_weight(zeros, zeros).selected == 0


def _flat(values):
    return torch.cat([v.reshape(-1) for v in values.values()]), ff.Layout.from_tensors(values)


def test_dicts_that_people_built_or_edited():
    """Replaced entries, another order, strides, a part of the names, half precision beside float32 weights."""
    i, f = ({n: torch.rand_like(p) for n, p in net().named_parameters()} for _ in range(2))
    expected = net()
    modify(expected, i, f, 1.3, 0.7)
    pdr = ParameterPerturber(net(), parameters=PARAMETERS)
    mine = pdr.calc_importance(data()[0])
    for name in mine:
        mine[name] = i[name]
    shuffled = {name: f[name].transpose(0, -1).contiguous().transpose(0, -1) for name in sorted(f, reverse=True)}
    pdr.modify_weight(mine, shuffled)
    assert same(pdr.model.state_dict(), expected.state_dict())
    part = {n: v for n, v in i.items() if n.startswith("layer1")}
    pdr = ParameterPerturber(net(), parameters=PARAMETERS)
    pdr.modify_weight(part, {n: f[n] for n in part})
    after = pdr.model.state_dict()
    assert all(same_bits(after[n], (expected if n in part else net()).state_dict()[n]) for n in i)
    half = {n: v.bfloat16() for n, v in f.items()}
    report = ParameterPerturber(net(), parameters=PARAMETERS, mode="corrected").modify_weight(i, half)
    assert report.selected == sum(int((half[n].float() > i[n] * 1.3).sum()) for n in i)


def test_undo_dry_run_and_audit():
    model = net()
    pdr = ParameterPerturber(model, parameters=PARAMETERS)
    i, f = (pdr.calc_importance(batches) for batches in data())
    before = copy.deepcopy(model.state_dict())
    dry = pdr.modify_weight(i, f, dry_run=True)
    assert same(model.state_dict(), before)
    report = pdr.modify_weight(i, f, undo=True, audit=True)
    assert report.selected == dry.selected > 0
    assert report["model"].parameters
    report.undo_()
    assert same(model.state_dict(), before)
    report = pdr.reverse_modify_weight(i, f, undo=True)
    assert not same(model.state_dict(), before)
    report.undo_()
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("mode", ["strict", "corrected"])
@pytest.mark.parametrize("q", [60, 97.5, 99.99, 100])
def test_adaptive_percentile(mode, q):
    i, f = ({n: torch.rand_like(p) for n, p in net().named_parameters()} for _ in range(2))
    i["fc.bias"][:2] = 0
    ratios = np.concatenate([(f[n] / i[n]).flatten().numpy() for n in i])
    alpha = float(np.percentile(ratios[np.isfinite(ratios)], q))  # as the notebook has it: in float32
    expected = net()
    modify(expected, i, f, alpha)
    for weighting in ({}, {"selection_weighting": "Adaptive"}):
        pdr = ParameterPerturber(net(), parameters={"adaptive_percentile": q, **weighting}, mode=mode)
        report = pdr.modify_weight(i, f)
        assert report["model"].alpha == pytest.approx(alpha, rel=0 if mode == "strict" else 1e-5)
        assert mode != "strict" or same(pdr.model.state_dict(), expected.state_dict())
    with pytest.raises(ff.ArgumentError, match="selection_weighting is adaptive: set parameters"):
        ParameterPerturber(net(), parameters={"selection_weighting": "Adaptive"}).modify_weight(i, f)
    with pytest.raises(ff.ArgumentError, match="no finite ratio"):
        pdr.modify_weight({n: v * 0 for n, v in i.items()}, f)
