"""What the drop-in for SSD's class takes and refuses: constructor, helpers, dicts, batches, counting of samples."""

import io
from collections import UserDict

import pytest
import torch
from test_compat_ssd import PARAMETERS, data, net, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fiun_fast as ff
from fiun_fast.compat import ssd
from fiun_fast.compat.ssd import ParameterPerturber, differences, mfim

pytestmark = pytest.mark.usefixtures("one_thread")


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
    with pytest.raises(ff.ArgumentError, match=r"sample_perc is 0, expected a fraction in \(0, 1\]"):
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
            "original_importance has 'fc.wheight', which is not a parameter of the model; near names: fc.weight",
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
            "forget_importance has 'fc.bias', which original_importance does not have",
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
    with pytest.raises(
        ff.ArgumentError, match='audit: not available for half-precision importances in strict mode; use mode="corr'
    ):
        pdr.modify_weight(half, half, audit=True)


X, Y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("mode", ["strict", "corrected"])
@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([], {}, "the loader is empty"),
        ([X], {}, r"a batch is a Tensor, expected \(x, y\), \(x, …, y\)"),
        ([(X,)], {}, "a batch is a tuple of 1"),
        ([("x", "y", "z")], {}, "a batch is a tuple of 3, .* pass batch_fn=lambda batch"),
        ([(X, Y)], {"target_index": 2}, "target_index is 2, but a batch has 2 parts"),
        ([([X], Y)], {}, "the inputs of a batch are a list, expected a tensor"),
        ([(X, Y, Y + 50)], {}, "batch 0: target 53 is out of bounds.*pass target_index"),
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
            "cannot tell how many samples it has",
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

    with pytest.raises(
        ff.EstimationError, match=r"the model returns a dict of features float32 \[2, 2\], expected a tensor, a tuple"
    ):
        ParameterPerturber(Odd(3, 2)).calc_importance([(torch.rand(2, 3), torch.tensor([0, 1]))])


def test_dataloaders_and_generators():
    x, y = (torch.cat(parts) for parts in zip(*data()[0]))
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    found = ParameterPerturber(net()).calc_importance(loader)
    assert same(found, ParameterPerturber(net()).calc_importance(batch for batch in data()[0]))


def test_the_compat_layer_knows_only_the_public_api():
    """Beside it, its files import only what reads batches, checks arguments and tensors, or selects a backend."""
    import re
    from pathlib import Path

    checks = "arguments|dtensors|guards|homes|kernels|memory|naming|overlaps|provenance|scope|wrappers"
    readers = r"estimators\.(?:claims|job|loaders|predictions|reading|totals)"
    shared = rf"(?:{checks}|{readers}) import [^_]"
    for path in Path(ssd.__file__).parent.glob("*.py"):
        for line in re.findall(r"^\s*(?:from|import) .*", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert not re.search(rf"from \.\.|fiun_fast\.(?!compat|{shared})", line), (path.name, line)


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


@pytest.mark.parametrize("how", ["batches", "samples", "weighted"])
def test_dicts_count_like_tuples_in_corrected_mode(how):
    """The model's own loss is scaled as a loss of targets is; BatchEncoding is a UserDict."""
    pairs = ParameterPerturber(net(), mode="corrected", normalize=how).calc_importance(data()[0])
    for kind in (dict, UserDict):
        loader = [kind(x=x, labels=y) for x, y in data()[0]]
        found = ParameterPerturber(net("object"), mode="corrected", normalize=how).calc_importance(loader)
        assert all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-9) for name, value in pairs.items())


@pytest.mark.parametrize("mode", ["strict", "corrected"])
def test_label_free_takes_inputs_alone(mode):
    pairs = ParameterPerturber(net(), mode=mode, label_free=True, truncate=4).calc_importance(data()[0])
    for form in (lambda x: x, lambda x: [x], lambda x: {"x": x}):
        pdr = ParameterPerturber(net(), mode=mode, label_free=True, truncate=4)
        assert same(pdr.calc_importance([form(x) for x, _ in data()[0]]), pairs)


def test_a_criterion_does_not_replace_the_loss_in_a_dict():
    loader = [{"x": x, "labels": y} for x, y in data()[0]]
    found = ParameterPerturber(net("object")).calc_importance(loader, nn.MultiMarginLoss())
    assert same(found, ParameterPerturber(net("object")).calc_importance(loader))


class Quantised(nn.Module):
    """Frozen integer weights beside an adapter that is trained."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.ones(2, 3).to(dtype), requires_grad=False)
        self.adapter = nn.Linear(3, 2)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T + self.adapter(x)


@pytest.mark.parametrize("mode", ["strict", "corrected"])
@pytest.mark.parametrize("label_free", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_frozen_integer_weights_are_left_out(dtype, label_free, mode):
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0])) for _ in range(2)]
    model = Quantised(dtype)
    pdr = ParameterPerturber(model, mode=mode, label_free=label_free, parameters={"selection_weighting": 0})
    importances = pdr.calc_importance(batches)
    assert list(importances) == ["adapter.weight", "adapter.bias"]
    plain = Quantised(torch.float32)
    expected = ParameterPerturber(plain, mode="corrected", label_free=label_free).calc_importance(batches)
    assert all(torch.allclose(importances[name], expected[name]) for name in importances)
    before = model.weight.clone()
    report = pdr.modify_weight(importances, {name: value * 9 for name, value in importances.items()})
    assert report.selected > 0
    assert torch.equal(model.weight.float(), before.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lay", [lambda t: t[:3].expand(4, 3), lambda t: t.as_strided((2, 3), (1, 1)), lambda t: t.view(8, 1).expand(8, 2)]
)
def test_elements_that_share_memory_are_refused_before_anything_is_written(lay, dtype):
    model = nn.ParameterDict({"first": nn.Parameter(torch.ones(3, dtype=dtype))})
    model["second"] = nn.Parameter(lay(torch.ones(8, dtype=dtype)))
    importances = {name: torch.ones(p.shape, dtype=dtype) for name, p in model.items()}
    louder = {name: value * 100 for name, value in importances.items()}
    for run in (ParameterPerturber(model).modify_weight, ParameterPerturber(model, mode="corrected").modify_weight):
        with pytest.raises(ff.LayoutError, match="parameter 'second': elements of it share memory"):
            run(importances, louder)
    assert model["first"].eq(1).all()


def test_weights_of_any_strides_are_no_such():
    for weight in (torch.rand(4, 3).t(), torch.rand(6, 6)[::2, ::3], torch.rand(2, 3, 4, 5).permute(3, 0, 2, 1)):
        model = nn.ParameterDict({"w": nn.Parameter(weight.clone(memory_format=torch.preserve_format))})
        model["w"].data = weight
        importances = {"w": torch.rand(weight.shape)}
        expected = weight * (importances["w"] / (importances["w"] * 100))
        ParameterPerturber(model).modify_weight(importances, {"w": importances["w"] * 100})
        assert torch.allclose(model["w"], expected)


def test_sizes_on_disk():
    """Entries are views of one buffer, which torch.save writes whole; clones and Fishers have their own bytes."""
    model = nn.Sequential(nn.Linear(100, 1000), nn.Linear(1000, 3))
    importances = ParameterPerturber(model).calc_importance([(torch.randn(4, 100), torch.tensor([0, 1, 2, 0]))])

    def size(value) -> int:
        file = io.BytesIO()
        torch.save(value, file)
        return file.tell()

    entry = importances["1.weight"]
    assert size(entry) > 400_000
    assert size(entry.clone()) < entry.nbytes + 2000
    assert size({name: value.clone() for name, value in importances.items()}) < 416_012 + 4000


def test_a_head_may_be_kept_alone(tmp_path):
    model = nn.Sequential(nn.Linear(100, 1000), nn.Linear(1000, 3))
    importances = ParameterPerturber(model).calc_importance([(torch.randn(4, 100), torch.tensor([0, 1, 2, 0]))])
    ff.Fisher.from_dict({"1.weight": importances["1.weight"]}).save(tmp_path / "head")
    assert (tmp_path / "head").stat().st_size < 12_000 + 2000
    assert torch.equal(ff.Fisher.load(tmp_path / "head")["1.weight"], importances["1.weight"])
