"""The drop-in for SSD's class: bits of the published class in strict mode, the fast path, every refusal."""

import copy
import functools

import numpy as np
import pytest
import torch
from textbook_ssd import ResNet, importance, merged, modify
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fiun_fast as ff
from fiun_fast.compat import importances, ssd
from fiun_fast.compat.ssd import ParameterPerturber, differences, mfim

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


# ---- constructor, helpers, refusals ----------------------------------------------------------------------------------


def test_constructor_forms(capsys):
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for pdr in (
        ParameterPerturber(model, sgd, "cpu", PARAMETERS),
        ParameterPerturber(model, "cpu", sgd, PARAMETERS),
        ParameterPerturber(model, torch.device("cpu"), sgd, PARAMETERS),
        ParameterPerturber(model, opt=sgd, device="cpu", parameters=PARAMETERS),
    ):
        assert pdr.opt is sgd
        assert pdr.device == torch.device("cpu")
        assert (pdr.selection_weighting, pdr.dampening_constant, pdr.forget_threshold) == (1.3, 0.7, 1)
    pdr = ParameterPerturber(model)
    assert pdr.opt is None
    assert (pdr.selection_weighting, pdr.dampening_constant, pdr.lower_bound, pdr.exponent) == (10, 1, 1, 1)

    class Config:
        dampening_constant, selection_weighting = 0.5, 2.0

    assert ParameterPerturber(model, parameters=Config()).selection_weighting == 2.0
    assert ParameterPerturber(model, parameters={"beta": 3}).parameters["beta"] == 3
    assert ParameterPerturber(model, parameters={"train_layer": "all"}).train_layer is None
    assert ParameterPerturber(model, parameters={"train_layer": "layer2.*bn1.*"}).train_layer == [
        "layer2.0.bn1.weight",
        "layer2.0.bn1.bias",
    ]
    assert capsys.readouterr().out == ""  # silent


def test_helpers():
    pdr = ParameterPerturber(net())
    assert [pdr.get_layer_num(n) for n in ("layer1.1.conv1.weight", "fc.weight", "alone")] == [1, -1, -1]
    zeros = pdr.zerolike_params_dict(pdr.model)
    assert {n: v.shape for n, v in zeros.items()} == {n: p.shape for n, p in pdr.model.named_parameters()}
    assert not any(v.any() or v.requires_grad for v in zeros.values())
    lists = pdr.fulllike_params_dict(nn.Linear(3, 2), 0.5)
    assert lists == {"weight": [[0.5] * 3] * 2, "bias": [0.5] * 2}
    lists["weight"][0][0] = 7
    assert lists["weight"][1][0] == 0.5  # no row is another
    tensors = pdr.fulllike_params_dict(nn.Linear(3, 2), 0.5, as_tensor=True)
    assert tensors["weight"].equal(torch.full((2, 3), 0.5))
    labels = torch.tensor([2, 0, 1, 0, 2, 2])
    dataset = TensorDataset(torch.arange(6), labels)
    assert pdr.subsample_dataset(dataset, 0.4).indices == [0, 2, 4]
    assert pdr.subsample_dataset(dataset, 1).indices == list(range(6))
    assert [s.indices for s in pdr.split_dataset_by_class(dataset)] == [[1, 3], [2], [0, 4, 5]]
    with pytest.raises(ff.ArgumentError, match=r"sample_perc is 0, expected a share in \(0, 1\]"):
        pdr.subsample_dataset(dataset, 0)


def test_differences_print_as_a_table():
    found = differences()
    assert len(found) > 10
    assert found[0].topic
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == ""
    assert 'mode="strict"' in lines[0] and 'mode="corrected"' in lines[0]
    assert len(lines) == len(found) + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model is a int, expected a torch.nn.Module"),
        ({"opt": object()}, "opt is a object, expected an optimiser"),
        ({"device": 1.5}, "device is a float, expected a torch.device"),
        ({"parameters": 3}, "parameters is a int, expected a dict"),
        ({"parameters": {"selection_weigthing": 3}}, "has 'selection_weigthing'; did you mean 'selection_weighting'"),
        ({"parameters": {"selection_weighting": -1}}, r"parameters\['selection_weighting'\] is -1, expected a finite"),
        ({"parameters": {"dampening_constant": float("nan")}}, r"parameters\['dampening_constant'\] is nan"),
        ({"parameters": {"exponent": "two"}}, r"parameters\['exponent'\] is 'two', expected a number"),
        ({"parameters": {"lower_bound": None}}, r"parameters\['lower_bound'\] is None, expected a number"),
        (
            {"parameters": {"adaptive_percentile": 101}},
            r"\['adaptive_percentile'\] is 101, expected a number in 0..100",
        ),
        ({"parameters": {"train_layer": ["fc.wieght"]}}, "no parameter matches 'fc.wieght'; near names: fc.weight"),
        ({"mode": "loose"}, "mode is 'loose', expected one of strict, corrected"),
        ({"normalize": "epochs"}, "normalize is 'epochs', expected one of batches, samples, weighted"),
        ({"truncate": 0}, "truncate is 0, expected a positive number of samples"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ff.FiunError, match=message):
        ParameterPerturber(**{"model": net()} | arguments)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda i, f: ({}, f), ff.ArgumentError, "original_importance is empty, expected a dict"),
        (lambda i, f: (i, None), ff.ArgumentError, "forget_importance is a NoneType, expected a dict"),
        (lambda i, f: (i, []), ff.ArgumentError, "forget_importance is an empty list"),
        (lambda i, f: (i, f | {"fc.weight": 3}), ff.DTypeError, "forget_importance: 'fc.weight' is a int"),
        (
            lambda i, f: (i | {"fc.wheight": f["fc.weight"]}, f),
            ff.LayoutError,
            "original_importance has 'fc.wheight', which the model has not; near names: fc.weight",
        ),
        (
            lambda i, f: (i, f | {"fc.bias": torch.rand(4)}),
            ff.LayoutError,
            r"forget_importance: 'fc.bias' is \[4\], \[5\] in the model",
        ),
        (
            lambda i, f: (i, {n: v for n, v in f.items() if n != "fc.bias"}),
            ff.LayoutError,
            "forget_importance has no 'fc.bias'",
        ),
        (
            lambda i, f: ({n: v for n, v in i.items() if n != "fc.bias"}, f),
            ff.LayoutError,
            "forget_importance has 'fc.bias', which original_importance has not",
        ),
        (lambda i, f: (i | {"fc.bias": -i["fc.bias"]}, f), ff.ArgumentError, "'fc.bias' has 5 negative entries"),
        (
            lambda i, f: (i, [f, {n: v for n, v in f.items() if n != "fc.bias"}]),
            ff.LayoutError,
            r"forget_importance\[1\] has no 'fc.bias'",
        ),
    ],
)
def test_bad_importances(spoil, error, message):
    pdr = ParameterPerturber(net(), parameters=PARAMETERS)
    i, f = ({n: torch.rand_like(p) + 0.1 for n, p in pdr.model.named_parameters()} for _ in range(2))
    with pytest.raises(error, match=message):
        pdr.modify_weight(*spoil(i, f))
    assert same(pdr.model.state_dict(), net().state_dict())


def test_a_negative_entry_in_the_flat_buffer_is_found_beside_a_nan():
    pdr = ParameterPerturber(net(), parameters=PARAMETERS)
    i, f = (pdr.calc_importance(batches) for batches in data())
    i["conv1.weight"].view(-1)[0] = float("nan")
    assert pdr.modify_weight(i, f, dry_run=True).nonfinite == 1
    f["fc.bias"][1] = -1.0
    f["conv1.weight"].view(-1)[0] = float("nan")
    with pytest.raises(ff.ArgumentError, match="'fc.bias' has 1 negative entries"):
        pdr.modify_weight(i, f)


def test_missing_names_of_the_scope_and_settings_changed_later():
    pdr = ParameterPerturber(net(), parameters=PARAMETERS | {"train_layer": ["fc.weight", "fc.bias"]})
    one = {"fc.weight": torch.rand(5, 16)}
    with pytest.raises(ff.LayoutError, match="original_importance has no 'fc.bias'"):
        pdr.modify_weight(one, one)
    pdr.selection_weighting = -2
    with pytest.raises(ff.ArgumentError, match=r"parameters\['selection_weighting'\] is -2"):
        pdr.modify_weight(one, one)
    with pytest.raises(ff.ArgumentError, match="divisor is 0, expected a positive number"):
        mfim([one, one], divisor=0)
    with pytest.raises(ff.ArgumentError, match="no importances to merge"):
        mfim([])
    pdr = ParameterPerturber(net(dtype=torch.bfloat16))
    half = {n: torch.rand_like(p) for n, p in pdr.model.named_parameters()}
    with pytest.raises(ff.ArgumentError, match='audit: not for half-precision importances in strict mode; mode="corr'):
        pdr.modify_weight(half, half, audit=True)


X, Y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("mode", ["strict", "corrected"])
@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([], {}, "the loader is empty"),
        ([X], {}, r"a batch is a Tensor, expected \(x, y\), \(x, _, y\)"),
        ([(X,)], {}, "a batch is a tuple of 1"),
        ([(X, Y, Y, Y)], {}, "a batch is a tuple of 4, .* pass batch_fn=lambda batch"),
        ([(X, Y)], {"target_index": 2}, "target_index is 2, but a batch has 2 parts"),
        ([([X], Y)], {}, "the inputs of a batch are a list, expected a tensor"),
        ([(X, Y, Y + 50)], {}, "batch 0: Target 5[0-3] is out of bounds.*pass target_index"),
        ([{"x": X}], {}, "a batch is a dict with x, without labels"),
        (
            [{"x": X, "labels": Y}],
            {},
            r"called with the keywords x, labels and returned a Tensor without a scalar .loss",
        ),
        ([(X, Y)], {"loss_fn": nn.CrossEntropyLoss(reduction="none")}, r"the loss is shape \[4\], expected a scalar"),
        ([(X, Y)], {"loss_fn": lambda o, t: 3.0}, "the loss is a float, expected a scalar tensor"),
        ([(X, Y)], {"loss_fn": lambda o, t: o.detach().mean()}, "the loss (does not depend on|depends on no)"),
        (
            [(X, Y)],
            {"forward_fn": lambda m, b: (m(b[0]).mean(), None), "normalize": "samples"},
            "cannot tell its samples",
        ),
    ],
)
def test_bad_batches(mode, loader, options, message):
    with pytest.raises(ff.EstimationError, match=message):
        ParameterPerturber(net(), mode=mode, **options).calc_importance(loader)


def test_models_that_return_something_else():
    class Odd(nn.Linear):
        def forward(self, x):
            return {"features": super().forward(x)}

    with pytest.raises(ff.EstimationError, match="the model returns a dict, expected a tensor, a tuple"):
        ParameterPerturber(Odd(3, 2)).calc_importance([(torch.rand(2, 3), torch.tensor([0, 1]))])


def test_dataloaders_and_generators():
    x, y = (torch.cat(parts) for parts in zip(*data()[0]))
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    found = ParameterPerturber(net()).calc_importance(loader)
    assert same(found, ParameterPerturber(net()).calc_importance(batch for batch in data()[0]))


def test_the_compat_layer_knows_only_the_public_api():
    """No file of it imports anything of the package but the package itself."""
    import re
    from pathlib import Path

    for path in Path(ssd.__file__).parent.glob("*.py"):
        for line in re.findall(r"^\s*(?:from|import) .*", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert not re.search(r"from \.\.|fiun_fast\.(?!compat)", line), (path.name, line)


@pytest.mark.parametrize("mode", ["strict", "corrected"])
def test_samples_of_truncated_dicts_are_those_that_were_used(mode):
    loader = [{"image": x, "labels": y} for x, y in data()[0]]  # 6, 6, 6 and 4 samples
    rename = lambda b: {"x": b["image"], "labels": b["labels"]}
    by = {
        how: ParameterPerturber(net("object"), mode=mode, normalize=how, truncate=5, batch_fn=rename).calc_importance(
            loader
        )
        for how in ("batches", "samples")
    }
    for name, value in by["batches"].items():
        assert torch.allclose(by["samples"][name], value * 4 / 19, rtol=1e-5), name


def test_a_batch_that_is_forwarded_twice_counts_once():
    """The head's closed form meets a log-softmax behind the layer on the first batch, and gives it up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.LogSoftmax(1))
    x, y = torch.randn(40, 3, 8, 8), torch.randint(5, (40,))
    loader, squares = [(x[:32], y[:32]), (x[32:], y[32:])], []
    for inputs, targets in loader:
        (g,) = torch.autograd.grad(nn.functional.nll_loss(model(inputs), targets), [model[1].weight])
        squares.append(g**2)
    wanted = {
        "batches": (squares[0] + squares[1]) / 2,
        "samples": (squares[0] + squares[1]) / 40,
        "weighted": (32 * squares[0] + 8 * squares[1]) / 40,
    }
    for how, value in wanted.items():
        options = {"mode": "corrected", "normalize": how, "loss_fn": nn.functional.nll_loss}
        pdr = ParameterPerturber(model, parameters=PARAMETERS | {"train_layer": "last"}, **options)
        assert torch.allclose(pdr.calc_importance(loader)["1.weight"], value, rtol=1e-4), how
