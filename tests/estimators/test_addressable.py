"""Tensors without plain memory of their own, at every entry point of the estimators and of the drop-in.

Each is an error that names the parameter, says what it is, and leaves everything as it was; none reaches a kernel.
"""

from __future__ import annotations

import mmap

import memory_kinds
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber, mfim

pytestmark = [
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]
NAME = "1.weight"
BATCHES = [(torch.ones(4, 3), torch.tensor([0, 1, 1, 0]))] * 2


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


class Wrapped(torch.Tensor):
    """A subclass that stands for another tensor, as quantising libraries have them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        return func(*tree_map(lambda t: t.inner if isinstance(t, cls) else t, args), **(kwargs or {}))


def freed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def fake(t: torch.Tensor) -> torch.Tensor:
    return FakeTensorMode().from_tensor(t.clone())


# what -> (how to make one, what the message says)
KINDS = {
    "meta": (lambda t: t.to("meta"), "it is on meta and has no numbers"),
    "fake": (fake, "it is a FakeTensor, a tensor subclass"),
    "subclass": (Wrapped, "it is a Wrapped, a tensor subclass"),
    "sparse": (lambda t: t.to_sparse(), "it is sparse"),
    "sparse rows": (lambda t: t.to_sparse_csr(), "it is sparse"),
    "freed": (freed, "its storage holds 0 bytes, and shape .* needs"),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def spoilt(make) -> nn.Module:
    model = net()
    model[1].weight = nn.Parameter(make(model[1].weight.detach()))
    return model


@pytest.fixture
def group(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def distributed(t: torch.Tensor) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(t, init_device_mesh("cpu", (1,)), [Shard(0)])


# ---- parameters ------------------------------------------------------------------------------------------------------

ESTIMATES = {
    "accumulator": lambda model: ff.FisherAccumulator(model),
    **{
        f"{estimator}, {params}": lambda model, estimator=estimator, params=params: ff.estimate_fisher(
            model, BATCHES, params=params, estimator=estimator
        )
        for estimator in ("batch", "softened", "sample", "expected", "label_free")
        for params in (None, "1.*")
    },
    "several models": lambda model: ff.estimate_fishers({"a": net(), "b": model}, BATCHES),
    "strict": lambda model: ParameterPerturber(model).calc_importance(BATCHES),
    "corrected": lambda model: ParameterPerturber(model, mode="corrected").calc_importance(BATCHES),
    "modify_weight": lambda model: ParameterPerturber(model).modify_weight(*importances()),
    "reverse_modify_weight": lambda model: ParameterPerturber(model).reverse_modify_weight(*importances()),
}


def importances() -> list[dict[str, torch.Tensor]]:
    return [{name: torch.ones(p.shape) * factor for name, p in net().named_parameters()} for factor in (1, 100)]


@pytest.mark.parametrize("entry", ESTIMATES)
def test_parameters(entry, kind):
    make, says = kind
    model = spoilt(make)
    grads, before = [p.grad for p in model.parameters()], model[0].weight.detach().clone()
    with pytest.raises(ff.FiunError, match=f"parameter '{NAME}': {says}"):
        ESTIMATES[entry](model)
    assert [p.grad for p in model.parameters()] == grads == [None] * 4
    assert torch.equal(model[0].weight, before)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("entry", ["strict", "corrected", "modify_weight", "reverse_modify_weight"])
@pytest.mark.parametrize("how", ["distribute_tensor", "fully_shard"])
def test_parameters_that_are_distributed(entry, how, group):
    """The drop-in refuses them; tests/distributed has what is done with them."""
    if how == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = net()
        fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    else:
        model = spoilt(distributed)
    with pytest.raises(ff.LayoutError, match=rf"parameter '{NAME}': it is a DTensor, .*pass tensor.full_tensor\(\)"):
        ESTIMATES[entry](model)


@pytest.mark.parametrize("what", ["meta", "freed"])
def test_parameters_in_half_precision_which_the_drop_in_sums_up_in_torch(what):
    make, says = KINDS[what]
    model = net().bfloat16()
    model[1].weight = nn.Parameter(make(model[1].weight.detach()))
    with pytest.raises(ff.FiunError, match=f"parameter '{NAME}': {says}"):
        ParameterPerturber(model).calc_importance(BATCHES)


def test_one_layer_may_be_estimated_beside_others_without_memory():
    model = net()
    model[0].to("meta")
    model[0].register_buffer("offloaded", torch.ones(2, device="meta"))
    forward = lambda m, batch: (m[1](batch[0]), batch[1])
    fisher = ff.estimate_fisher(model, BATCHES, params="1.*", forward_fn=forward)
    assert torch.equal(fisher.buffer, ff.estimate_fisher(net(), BATCHES, params="1.*", forward_fn=forward).buffer)


@pytest.mark.parametrize("entry", ["accumulator", "batch, None", "sample, 1.*", "strict", "corrected"])
def test_lazy_and_quantised_parameters(entry):
    model = net()
    model[1] = nn.LazyLinear(2)
    with pytest.raises(ff.LayoutError, match=f"parameter '{NAME}'.* has no shape yet: run the lazy module once"):
        ESTIMATES[entry](model)
    model = net()
    quantised = torch.quantize_per_tensor(model[1].weight.detach(), 0.1, 0, torch.qint8)
    model[1].weight = nn.Parameter(quantised, requires_grad=False)
    run = ESTIMATES[entry]
    if entry == "accumulator":
        run = lambda model: ff.FisherAccumulator(model, params="*", allow_frozen=True)
    elif "," in entry:
        run = lambda model: ff.estimate_fisher(model, BATCHES, params="*", estimator=entry.partition(",")[0])
    elif entry == "corrected":
        run = lambda model: ParameterPerturber(
            model, parameters={"train_layer": "1.*"}, mode="corrected"
        ).calc_importance(BATCHES)
    with pytest.raises(ff.DTypeError, match=f"parameter '{NAME}'.*qint8"):
        run(model)


@pytest.mark.parametrize("entry", ESTIMATES)
def test_inside_a_transform_of_torch_func(entry):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = net()

        def forward(self):
            ESTIMATES[entry](self.model)

    outer = Inside()
    run = torch.func.grad(lambda weight: torch.func.functional_call(outer, {f"model.{NAME}": weight}, ()))
    with pytest.raises(ff.LayoutError, match="'[01].weight': it is inside torch.func"):
        run(outer.model[1].weight.detach())


def test_while_all_that_is_made_is_fake():
    model = net()
    with FakeTensorMode(), pytest.raises(ff.FiunError, match="the sum: it is a FakeTensor"):
        ff.FisherAccumulator(model)


# ---- gradients -------------------------------------------------------------------------------------------------------


def ready() -> tuple[nn.Sequential, ff.FisherAccumulator, torch.Tensor]:
    """A model with gradients, its accumulator after one update, and what that has summed up."""
    model = net()
    accumulator = ff.FisherAccumulator(model)
    cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    accumulator.update()
    return model, accumulator, accumulator.result().buffer


def refused(model, accumulator, before, message, run) -> None:
    grads = [p.grad.clone() for name, p in model.named_parameters() if name != NAME and p.grad is not None]
    with pytest.raises(ff.FiunError, match=message):
        run()
    assert torch.equal(accumulator.result().buffer, before)
    assert accumulator.steps == 1
    kept = [p.grad for name, p in model.named_parameters() if name != NAME and p.grad is not None]
    assert all(map(torch.equal, kept, grads))


@pytest.mark.parametrize("what", ["subclass", "freed"])
@pytest.mark.parametrize("zero", [False, True])
def test_gradients(what, zero):
    make, says = KINDS[what]
    model, accumulator, before = ready()
    model[1].weight.grad = make(model[1].weight.grad)
    message = f"the gradient of '{NAME}': {says}"
    refused(model, accumulator, before, message, lambda: accumulator.update(zero_grads=zero))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for scale in (None, torch.tensor(2.0)):  # as fused optimisers are told by a GradScaler
        optimizer.grad_scale = scale
        with accumulator.during(optimizer):
            refused(model, accumulator, before, message, optimizer.step)


def test_a_gradient_that_is_distributed_and_its_parameter_is_not(group):
    model, accumulator, before = ready()
    model[1].weight.grad = distributed(model[1].weight.grad)
    message = f"the gradient of '{NAME}': it is a DTensor"
    refused(model, accumulator, before, message, lambda: accumulator.update(zero_grads=True))


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 2), (4, 3)])
@pytest.mark.parametrize("zero", [False, True])
def test_gradients_of_another_shape(shape, zero):
    """A parameter that was replaced in place: its gradient would be read, and set to zero, beyond its end."""
    model, accumulator, before = ready()
    model.zero_grad()
    model[1].weight.data = torch.ones(shape)
    model[1].weight.sum().backward()
    model[0](BATCHES[0][0]).sum().backward()
    message = rf"the gradient of '{NAME}' has shape \[{shape[0]}, {shape[1]}\], expected \[2, 3\]"
    refused(model, accumulator, before, message, lambda: accumulator.update(zero_grads=zero))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for entry in (accumulator.streaming, lambda: accumulator.during(optimizer)):
        message = rf"parameter '{NAME}' has shape \[{shape[0]}, {shape[1]}\], expected \[2, 3\]"
        model.zero_grad()
        with pytest.raises(ff.LayoutError, match=message), entry():
            pass


def test_a_shape_that_changes_while_gradients_stream():
    model, accumulator, before = ready()
    model.zero_grad()
    with (  # noqa: PT012
        pytest.raises(ff.LayoutError, match=rf"the gradient of '{NAME}' has shape \[1, 3\], expected \[2, 3\]"),
        accumulator.streaming(),
    ):
        model[1].weight.data = torch.ones(1, 3)
        model[1].weight.sum().backward()
    assert torch.equal(accumulator.result().buffer, before)
    assert not model[1].weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("entry", ["streaming", "during"])
def test_parameters_that_lost_their_memory_since(entry):
    model, accumulator, before = ready()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.zero_grad()
    model[1].weight.untyped_storage().resize_(0)
    enter = accumulator.streaming if entry == "streaming" else lambda: accumulator.during(optimizer)
    with pytest.raises(ff.LayoutError, match=f"parameter '{NAME}': its storage holds 0 bytes"), enter():
        pass
    assert torch.equal(accumulator.result().buffer, before)


def test_gradients_in_read_only_memory_are_read_but_not_cleared(tmp_path):
    path = tmp_path / "gradient"
    path.write_bytes(np.ones(6, np.float32).tobytes() + bytes(mmap.PAGESIZE))
    model, accumulator, _ = ready()
    model[1].weight.grad = torch.from_numpy(np.memmap(path, np.float32, "r", shape=(2, 3)))
    before = accumulator.result().buffer
    message = f"the gradient of '{NAME}': its memory is mapped read-only"
    refused(model, accumulator, before, message, lambda: accumulator.update(zero_grads=True))
    accumulator.update()
    assert accumulator.steps == 2


def test_sparse_gradients_are_still_taken():
    model = nn.Embedding(6, 3, sparse=True)
    accumulator = ff.FisherAccumulator(model)
    with accumulator.streaming(scale=2.0):
        (2 * model(torch.tensor([1, 1, 4])).sum()).backward()
    expected = torch.zeros(6, 3)
    expected[1], expected[4] = 4, 1
    assert torch.equal(accumulator.result()["weight"], expected)


# ---- importances of the drop-in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("mode", ["strict", "corrected"])
def test_importances(which, mode, kind):
    make, says = kind
    model = net()
    given = importances()
    given[which][NAME] = make(given[which][NAME])
    what = ("original_importance", "forget_importance")[which]
    perturber = ParameterPerturber(model, mode=mode)
    for run in (perturber.modify_weight, perturber.reverse_modify_weight):
        with pytest.raises(ff.FiunError, match=f"{what}: '{NAME}': {says}"):
            run(*given)
    with pytest.raises(ff.FiunError, match=rf"importances\[{which}\]: '{NAME}': {says}"):
        mfim(given)
    assert all(map(torch.equal, model.parameters(), net().parameters()))


def test_importances_that_are_distributed_or_a_fisher_without_memory(group):
    original, forget = importances()
    perturber = ParameterPerturber(net())
    with pytest.raises(ff.LayoutError, match=f"forget_importance: '{NAME}': it is a DTensor"):
        perturber.modify_weight(original, forget | {NAME: distributed(forget[NAME])})
    fisher = ff.Fisher.from_dict(original)
    fisher.buffer.untyped_storage().resize_(0)
    with pytest.raises(ff.LayoutError, match="original_importance: its storage holds 0 bytes"):
        perturber.modify_weight(fisher, forget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_weights_in_read_only_memory(tmp_path, dtype, strided):
    path = tmp_path / "weight"
    path.write_bytes(bytes(2 * mmap.PAGESIZE))
    model = net().to(dtype)
    mapped = torch.from_numpy(np.memmap(path, np.uint8, "r", shape=(6 * dtype.itemsize,))).view(dtype)
    model[1].weight = nn.Parameter(mapped.view(3, 2).t() if strided else mapped.view(2, 3))
    original, forget = ({name: value.to(dtype) for name, value in one.items()} for one in importances())
    perturber = ParameterPerturber(model)
    with pytest.raises(ff.LayoutError, match=f"parameter '{NAME}': its memory is mapped read-only"):
        perturber.modify_weight(original, forget)
    assert torch.equal(model[0].weight, net().to(dtype)[0].weight)


# ---- second moments of an optimiser ----------------------------------------------------------------------------------


def test_second_moments(kind):
    make, says = kind
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    optimizer.step()
    state = optimizer.state[model[1].weight]
    state["exp_avg_sq"] = make(state["exp_avg_sq"])
    with pytest.raises(ff.FiunError, match=f"exp_avg_sq of '{NAME}': {says}"):
        ff.Fisher.from_optimizer(optimizer, model)


OF_ANOTHER_KIND = sorted(
    set(memory_kinds.KINDS) - {"meta", "freed", "shortened"}
)  # these have a shape, and lack memory alone


@pytest.mark.parametrize("kind", OF_ANOTHER_KIND)
def test_a_layout_says_which_kinds_it_cannot_lay_out(kind):
    make, says = memory_kinds.KINDS[kind]
    if kind == "DTensor" and not torch.distributed.is_initialized():
        pytest.skip("needs a process group")
    model, tensor = net(), make()
    own = tensor.requires_grad or tensor.is_floating_point()
    p = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=own and kind != "quantised")
    model.register_parameter("odd", p)
    for run in (
        lambda: ff.Layout.from_module(model, "*"),
        lambda: ff.Layout.from_tensors(dict(model.named_parameters())),
        lambda: ff.FisherAccumulator(model, "*", allow_frozen=True),
    ):
        with pytest.raises(ff.FiunError, match=f"'odd'.*({says})"):
            run()


def test_a_layout_of_a_model_on_meta():
    """Sizes need no memory."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    layout = ff.Layout.from_module(model)
    assert layout == ff.Layout.from_tensors(dict(model.named_parameters()))
    assert (layout.numel, layout["1.weight"].shape) == (23, (2, 3))
    with pytest.raises(ff.ArgumentError, match="'w': a list, expected a tensor"):
        ff.Layout.from_tensors({"w": [1.0]})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_parameters_of_dtypes_without_such_arithmetic(dtype):
    """Frozen ones stand aside; those that are trained are refused by name, in every way in."""
    for frozen in (True, False):
        model = net()
        model.register_parameter("odd", nn.Parameter(torch.zeros(3).to(dtype), requires_grad=not frozen))
        ways = [
            lambda m: ff.Layout.from_module(m),
            lambda m: ff.estimate_fisher(m, BATCHES),
            lambda m: ff.FisherAccumulator(m),
            lambda m: ParameterPerturber(m).calc_importance(BATCHES),
            lambda m: ParameterPerturber(m, mode="corrected").calc_importance(BATCHES),
        ]
        for way in ways:
            if frozen:
                way(model)
                continue
            with pytest.raises(ff.DTypeError, match=f"parameter 'odd' is .*{str(dtype)[6:]}, expected"):
                way(model)


def test_freed_and_lazy_parts_beside_the_layer_that_is_estimated():
    for spoil, says in (
        (lambda m: m[0].weight.untyped_storage().resize_(0), "parameter '0.weight': its storage holds 0 bytes"),
        (lambda m: m.__setitem__(0, nn.LazyLinear(4)), "'0.weight'.* has no shape yet: run the lazy module once"),
    ):
        for estimator in ("batch", "softened", "sample", "expected", "label_free"):
            model = net()
            spoil(model)
            with pytest.raises(ff.LayoutError, match=says):
                ff.estimate_fisher(model, BATCHES, "1.*", estimator=estimator)
