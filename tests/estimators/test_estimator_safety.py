"""Estimates that are interrupted, nested, beside one another, or whose model changes under them: right, or an error."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress

import pytest
import torch
from fisher_models import checkpointed
from torch import nn
from torch.nn.functional import cross_entropy

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber, mfim

pytestmark = pytest.mark.usefixtures("one_thread")
ESTIMATORS = ("batch", "sample", "expected", "label_free")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(count: int = 3, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dice = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 6, generator=dice), torch.randint(3, (4,), generator=dice)) for _ in range(count)]


class Fuse(torch.autograd.Function):
    """Passes on; its backward raises when it is lit."""

    lit = False

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if Fuse.lit:
            raise torch.OutOfMemoryError("no memory left")
        return gradient


@pytest.fixture
def fused():
    """A net whose backward raises half way while `Fuse.lit`, and the same as a function of any callable."""
    Fuse.lit = False
    model = net()
    model.insert(1, _Fused())
    yield model
    Fuse.lit = False


class _Fused(nn.Module):
    def forward(self, x):
        return Fuse.apply(x)


def stream(model, accumulator, loader, bad: set[int], **options) -> None:
    """A loop that goes on after an error of a backward."""
    with accumulator.streaming(**options):
        for i, (x, y) in enumerate(loader):
            Fuse.lit = i in bad
            with suppress(torch.OutOfMemoryError):
                cross_entropy(model(x), y).backward()


# ---- a backward that raises while gradients stream -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"free": False}], ids=str)
@pytest.mark.parametrize("bad", [{0}, {1}, {3}, {1, 2}], ids=str)
def test_a_loop_that_goes_on_after_a_backward_raised(fused, options, bad):
    accumulator = ff.FisherAccumulator(fused)
    with pytest.raises(ff.EstimationError, match="a backward raised while its gradients streamed: the sum is wrong"):
        stream(fused, accumulator, batches(4), bad, **options)
    for use in (accumulator.result, lambda: stream(fused, accumulator, batches(1), set())):
        fused.zero_grad()
        with pytest.raises(ff.EstimationError, match="has to be begun anew"):
            use()
    assert not any(p._post_accumulate_grad_hooks for p in fused.parameters())
    anew = ff.FisherAccumulator(fused)
    fused.zero_grad()
    stream(fused, anew, batches(4), set())
    assert torch.allclose(anew.result().buffer, ff.estimate_fisher(fused, batches(4)).buffer, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ["first.weight", "body.0.bias", "body.2.weight", "head.bias"])
def test_inside_checkpoints_too(name):
    """The backward that raises is nested in another, or is the one around it; before or after gradients arrived."""
    torch.manual_seed(0)
    model = checkpointed(True)
    loader = [(torch.randn(5, 6), torch.randint(5, (5,))) for _ in range(4)]
    right = ff.estimate_fisher(model, [batch for i, batch in enumerate(loader) if i != 1]).buffer
    accumulator, lit = ff.FisherAccumulator(model, params=["first.*", "body.*"]), []

    def explode(_):
        if lit:
            raise torch.OutOfMemoryError("no memory left")

    handle = model.get_parameter(name).register_hook(explode)
    early = name.startswith("head")  # it raises before any gradient has arrived
    broken = nullcontext() if early else pytest.raises(ff.EstimationError, match="a backward raised")
    with broken, accumulator.streaming():
        for i, (x, y) in enumerate(loader):
            lit[:] = [True] * (i == 1)
            with suppress(torch.OutOfMemoryError):
                cross_entropy(model(x), y).backward()
    if early:
        assert torch.allclose(accumulator.result().buffer, right[: accumulator.layout.numel], rtol=1e-5)
    else:
        with pytest.raises(ff.EstimationError, match="has to be begun anew"):
            accumulator.result()
    handle.remove()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_forward_that_raises_leaves_the_sum_right(fused):
    accumulator, loader = ff.FisherAccumulator(fused), batches(3)
    with accumulator.streaming():
        for x, y in loader:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                fused(x[:, :2])
            cross_entropy(fused(x), y).backward()
    assert torch.allclose(accumulator.result().buffer, ff.estimate_fisher(fused, loader).buffer, rtol=1e-5)


def test_an_error_that_leaves_the_loop_is_not_replaced_by_ours(fused):
    for loader, spoilt in ((batches(0), False), (batches(1), True)):
        accumulator = ff.FisherAccumulator(fused)
        with pytest.raises(torch.OutOfMemoryError), accumulator.streaming():  # noqa: PT012
            for x, y in loader:
                Fuse.lit = True
                cross_entropy(fused(x), y).backward()
            raise torch.OutOfMemoryError
        fused.zero_grad()
        with pytest.raises(ff.EstimationError, match="begun anew" if spoilt else "no gradients were accumulated"):
            accumulator.result()
    Fuse.lit = False
    accumulator = ff.FisherAccumulator(fused)
    with pytest.raises(KeyError), accumulator.streaming(every=2):  # noqa: PT012
        for x, y in batches(3):
            cross_entropy(fused(x), y).backward()
        raise KeyError
    assert accumulator.steps == 1 and all(p.grad is None for p in fused.parameters())


def test_an_update_that_is_interrupted_half_way(monkeypatch):
    model = net()
    accumulator = ff.FisherAccumulator(model, backend="reference")
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    accumulator.update()
    copies = []

    def interrupted(self, samples):
        copies.append(samples)
        raise KeyboardInterrupt

    from fiun_fast.estimators.totals import Totals

    monkeypatch.setattr(Totals, "count", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accumulator.update(samples=4)
    monkeypatch.undo()
    assert copies == [4]
    for use in (accumulator.update, accumulator.result):
        with pytest.raises(ff.EstimationError, match="an update was interrupted half way"):
            use()


def test_steps_of_an_optimiser_that_raise_or_call_their_base_class():
    class Careful(torch.optim.SGD):
        def step(self, closure=None):
            if bad:
                raise RuntimeError("skipped")
            return super().step(closure)

    model, bad = net(), []
    optimizer, accumulator = Careful(model.parameters(), lr=0.0), ff.FisherAccumulator(model)
    with accumulator.during(optimizer):
        for i, (x, y) in enumerate(batches(4)):
            bad[:] = [True] * (i == 2)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            try:
                optimizer.step()
            except RuntimeError:
                assert bad
    assert accumulator.steps == 4
    assert torch.allclose(accumulator.result().buffer, ff.estimate_fisher(model, batches(4)).buffer, rtol=1e-5)
    assert not optimizer._optimizer_step_pre_hooks


# ---- two at once -----------------------------------------------------------------------------------------------------


def test_streams_and_estimates_that_meet():
    model, other = net(), net(1)
    other[0] = model[0]
    first, same, second = (ff.FisherAccumulator(m) for m in (model, model, other))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for enter in (first.streaming, same.streaming, second.streaming, lambda: first.during(optimizer)):
        refused = pytest.raises(ff.EstimationError, match=r"'0.weight' go to a Fish|inside streaming\(\) of the same")
        with refused, first.streaming(), enter():
            pass
    for run in (
        lambda: ff.estimate_fisher(model, batches()),
        lambda: ff.estimate_fishers({"a": net(2), "b": other}, batches()),
        lambda: ParameterPerturber(model).calc_importance(batches()),
        lambda: ParameterPerturber(model, mode="corrected").calc_importance(batches()),
    ):
        with first.streaming(), pytest.raises(ff.EstimationError, match=r"'0.weight' go to a .* streaming\(\) already"):
            run()
    with first.streaming(), pytest.raises(ff.EstimationError, match=r"update\(\) inside streaming\(\)"):
        first.update()
    with first.during(optimizer), pytest.raises(ff.EstimationError, match=r"update\(\) inside during\(\)"):
        first.update()
    with first.during(optimizer), same.during(optimizer):  # two of one loop: each step counts once for both
        cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
        optimizer.step()
    assert first.steps == same.steps == 1
    model.zero_grad()
    assert not any(p._post_accumulate_grad_hooks for p in (*model.parameters(), *other.parameters()))
    with first.streaming(), ff.FisherAccumulator(net(5)).streaming():
        pass


def test_an_estimate_inside_an_estimate():
    model = net()

    def nested():
        yield from batches(1)
        ff.estimate_fisher(model, batches())

    training = model.training
    with pytest.raises(ff.EstimationError, match="this thread is estimating a Fisher with the model already"):
        ff.estimate_fisher(model, nested())
    assert model.training == training and all(p.requires_grad for p in model.parameters())

    def stranger():
        yield from batches(2)
        ff.estimate_fisher(net(1), batches())

    assert torch.equal(ff.estimate_fisher(model, stranger()).buffer, ff.estimate_fisher(model, batches(2)).buffer)


@pytest.mark.parametrize("shared", [False, True])
def test_threads(shared):
    """One model, or models that share a layer, of which each thread wants something else."""
    model, other = net(), net(1)
    state, filters = torch.get_rng_state(), list(warnings.filters)
    model.insert(2, nn.Dropout(0.5))
    if shared:
        other[0] = model[0]
        other.insert(2, model[2])
    jobs: list[tuple[nn.Module, str | None, str]] = [
        (model if k % 2 else other, (None, "last", "0.*")[k % 3], ESTIMATORS[k % 4]) for k in range(6)
    ]
    wanted = [ff.estimate_fisher(m, batches(6), params, estimator=e).buffer for m, params, e in jobs]
    found: list[object] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(k: int) -> None:
        start.wait()
        m, params, estimator = jobs[k]
        try:
            found[k] = ff.estimate_fisher(m, batches(6), params, estimator=estimator).buffer
        except BaseException as error:
            found[k] = error

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(jobs))]
    [thread.start() for thread in threads], [thread.join(60) for thread in threads]
    for got, right in zip(found, wanted):
        assert isinstance(got, torch.Tensor), got
        assert torch.allclose(got, right, rtol=1e-5)
    for m in (model, other):
        assert all(module.training for module in m.modules())
        assert all(p.requires_grad and p.grad is None for p in m.parameters())
    assert torch.equal(torch.get_rng_state(), state) and warnings.filters == filters
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_another_thread_sees_of_a_model_that_is_being_estimated():
    """An accumulator waits before it looks at what requires grad; an update would find foreign gradients."""
    model, inside, go_on = net(), threading.Event(), threading.Event()
    before = ff.FisherAccumulator(model)
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()

    def slow():
        inside.set()
        go_on.wait(30)
        yield from batches()

    estimate = threading.Thread(target=lambda: ff.estimate_fisher(model, slow(), "last"))
    estimate.start()
    assert inside.wait(30)
    with pytest.raises(ff.EstimationError, match="another thread is estimating a Fisher with '0.weight' already"):
        before.update()
    with pytest.raises(ff.EstimationError, match="another thread is estimating"), before.streaming():
        pass
    made: list[ff.FisherAccumulator] = []
    waiting = threading.Thread(target=lambda: made.append(ff.FisherAccumulator(model)))
    waiting.start()
    waiting.join(0.1)
    assert not made
    go_on.set()
    estimate.join(30), waiting.join(30)
    assert made[0].layout == before.layout
    before.update()
    assert before.steps == 1


# ---- models that share a part ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("params", [None, "last", "0.*"])
def test_models_that_share_a_part_are_estimated_as_if_alone(estimator, params):
    model, other = net(), net(1)
    other[0] = model[0]
    inside = nn.Sequential(model[0], nn.Tanh(), nn.Linear(5, 3))
    tied = net(3)
    tied[0].weight = model[0].weight
    models = {"model": model, "other": other, "inside": inside, "whole": nn.Sequential(model), "tied": tied}
    chosen = params if params != "0.*" else lambda name, _: name.split(".")[0] == "0"
    for p in other[2].parameters():
        p.requires_grad_(False)
    before = {name: [(p.requires_grad, p.grad) for p in m.parameters()] for name, m in models.items()}
    alone = {name: ff.estimate_fisher(m, batches(), chosen, estimator=estimator) for name, m in models.items()}
    together = ff.estimate_fishers(models, batches(), chosen, estimator=estimator)
    for name, fisher in together.items():
        assert fisher.layout == alone[name].layout
        assert torch.allclose(fisher.buffer, alone[name].buffer, rtol=1e-5), name
        assert fisher.buffer.any()
        assert fisher.provenance.how == alone[name].provenance.how
        assert [(p.requires_grad, p.grad) for p in models[name].parameters()] == before[name]


def test_a_shared_buffer_that_forwards_change():
    """Each model sees what it did itself, and not what the other did."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    counting = Counting()
    models = {"a": nn.Sequential(counting, *net()), "b": nn.Sequential(counting, nn.ReLU(), *net(1))}
    alone = {name: ff.estimate_fisher(m, batches(4)).buffer for name, m in models.items()}
    together = ff.estimate_fishers(models, batches(4))
    for name, buffer in alone.items():
        assert torch.allclose(together[name].buffer, buffer, rtol=1e-5)
    assert counting.calls == 0


# ---- forwards that change the model ----------------------------------------------------------------------------------


class Restless(nn.Module):
    def __init__(self, change: Callable[[Restless], object]) -> None:
        super().__init__()
        self.fc = net()
        self.register_buffer("kept", torch.tensor([0.0, -0.0, float("nan")]))
        self.register_buffer("none", None)
        self.register_buffer("transient", torch.arange(4), persistent=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for layout in ("sparse_coo", "sparse_csr", "sparse_csc", "strided"):
                self.register_buffer(layout, torch.eye(3).to_sparse(layout=getattr(torch, layout)))
        self.change = change

    def forward(self, x):
        self.change(self)
        return self.fc(x)


def once(change: Callable[[Restless], object], key: str = "kept") -> Callable[[Restless], object]:
    return lambda m: change(m) if hasattr(m, key) else None


def shadowed(m: Restless) -> None:
    if "kept" in m._buffers:
        del m.kept
        m.kept = 5


def set_sparse(m: Restless) -> None:
    m.sparse_coo.mul_(3)
    m.sparse_csr.values().add_(1)
    m.sparse_csc = torch.zeros(2)


CHANGES: dict[str, Callable[[Restless], object]] = {
    "nothing": lambda m: None,
    "in place": lambda m: m.transient.add_(1),
    "sign of zero": lambda m: m.kept.neg_(),
    "reassigned": lambda m: setattr(m, "kept", torch.ones(3)),
    "resized": lambda m: m.kept.resize_(70).fill_(3),
    "shortened": lambda m: m.kept.resize_(2),
    "other data": lambda m: setattr(m.kept, "data", torch.ones(2, 2, dtype=torch.float64)),
    "freed": lambda m: m.kept.untyped_storage().resize_(0),
    "removed": once(lambda m: delattr(m, "kept")),
    "hidden by an attribute": shadowed,
    "added": lambda m: None if hasattr(m, "new") else m.register_buffer("new", torch.ones(2)),
    "filled": lambda m: setattr(m, "none", torch.ones(2)),
    "emptied": lambda m: setattr(m, "kept", None),
    "another dtype": lambda m: setattr(m, "kept", m.kept.half()),
    "persistent": lambda m: m._non_persistent_buffers_set.clear(),
    "sparse": set_sparse,
    "submodule added": lambda m: None if hasattr(m, "more") else m.add_module("more", nn.Linear(2, 2)),
    "train mode": lambda m: m.train(),
}


def pieces(m: nn.Module) -> list:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            (key, None if b is None else (b.layout, b.dtype, b.shape, b.to_dense().clone().view(torch.uint8)))
            for key, b in m._buffers.items()
        ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_itself_is_put_back(change, fails):
    model = Restless(CHANGES[change])
    held = {key: id(b) for key, b in model._buffers.items()}
    children, transient = list(model.named_children()), set(model._non_persistent_buffers_set)
    before, place = pieces(model), model.strided.data_ptr()

    def forward(m, batch):
        out = m(batch[0])
        if fails:
            raise KeyError("the user's own")
        return out, batch[1]

    if fails:
        with pytest.raises(KeyError, match="the user's own"):
            ff.estimate_fisher(model, batches(), forward_fn=forward)
    else:
        fisher = ff.estimate_fisher(model, batches(), forward_fn=forward)
        assert torch.allclose(fisher.buffer, ff.estimate_fisher(net(), batches()).buffer, rtol=1e-5)
    assert {key: id(b) for key, b in model._buffers.items()} == held
    after = pieces(model)
    assert [key for key, _ in after] == [key for key, _ in before]
    for (key, now), (_, then) in zip(after, before):
        assert (now is None) == (then is None), key
        assert now is None or (now[:3] == then[:3] and torch.equal(now[3], then[3])), key
    assert list(model.named_children()) == children
    assert model._non_persistent_buffers_set == transient
    assert model.training and model.strided.data_ptr() == place
    assert "kept" not in vars(model)


def test_parameters_that_a_forward_replaces():
    model = net()
    bias = model[0].bias

    def forward(m, batch):
        m[0].register_parameter("bias", nn.Parameter(torch.zeros(5)))
        return m(batch[0]), batch[1]

    ff.estimate_fisher(model, batches(), "2.*", forward_fn=forward)
    assert model[0].bias is bias and bias.requires_grad


def test_what_cannot_be_put_back_is_said_and_keeps_nothing_else_from_it():
    for fails, error, text in (
        (True, KeyError, "the user's own"),
        (False, ff.EstimationError, "not all of the model could be put back as it was: .*size"),
    ):
        model = net()
        model.register_buffer("calls", torch.zeros(()))
        model[0].weight.grad = torch.ones(5, 6)
        bias_grad = model[2].bias.grad = torch.ones(3)

        def forward(m, batch, fails=fails):
            m.calls += 1
            m[0].weight.data = torch.ones(1, 6)  # which the gradient of before does not fit any more
            if fails:
                raise KeyError("the user's own")
            return m[2](batch[0][:, :5]), batch[1]

        with pytest.raises(error, match=text):
            ff.estimate_fisher(model, batches(), "2.*", forward_fn=forward)
        assert model.calls == 0 and model.training and model[0].weight.requires_grad
        assert model[2].bias.grad is bias_grad


# ---- kinds of tensors and modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("params", [None, "last"])
def test_inference_mode(estimator, params):
    wanted = ff.estimate_fisher(net(), batches(), params, estimator=estimator).buffer
    with torch.inference_mode():
        made, data = net(), batches()
        model = net().requires_grad_(False)
    model = net()
    with torch.inference_mode():
        inside = ff.estimate_fisher(model, batches(), params, estimator=estimator).buffer
    assert torch.allclose(inside, wanted, rtol=1e-5) and not inside.is_inference()
    assert torch.allclose(ff.estimate_fisher(model, data, params, estimator=estimator).buffer, wanted, rtol=1e-5)
    with pytest.raises(
        ff.EstimationError, match=r"was made under torch.inference_mode\(\), which no gradient may pass"
    ):
        ff.estimate_fisher(made, batches(), params, estimator=estimator)


def test_inference_mode_elsewhere(backend):
    layout = ff.Layout.from_module(net())
    with torch.inference_mode():
        made = net().to(backend.device)
        fishers = [ff.Fisher(torch.rand(layout.numel).to(backend.device), layout) for _ in range(2)]
    plain = net().to(backend.device)
    for model in (made, plain):
        report = ff.dampen_(model, *fishers, alpha=0.5, undo=True, backend=backend.name)
        assert report.selected
    for a, b in zip(made.parameters(), plain.parameters()):
        assert torch.equal(a, b)
    report.undo_()


def test_what_is_made_inside_inference_mode_is_used_outside():
    model = net()
    with torch.inference_mode():
        accumulator = ff.FisherAccumulator(model)
        ff.flatten_(model)
    with accumulator.streaming():
        for x, y in batches():
            cross_entropy(model(x), y).backward()
    accumulator.result(in_place=True)
    with torch.inference_mode():
        made = net()
    for run in (ff.FisherAccumulator, lambda m: ParameterPerturber(m).calc_importance(batches())):
        with pytest.raises(ff.EstimationError, match="was made under torch.inference_mode"):
            run(made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_or_device(dtype):
    model, data = net(), batches()
    wanted = {e: ff.estimate_fisher(model, data, estimator=e).buffer for e in ESTIMATORS}
    try:
        torch.set_default_dtype(dtype)
        for estimator, buffer in wanted.items():
            found = ff.estimate_fisher(model, data, estimator=estimator).buffer
            assert found.dtype == torch.float32 and torch.allclose(found, buffer, rtol=1e-5)
            with torch.device("meta"):
                found = ff.estimate_fisher(model, data, estimator=estimator).buffer
            assert torch.allclose(found, buffer, rtol=1e-5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_torchscript_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = torch.jit.script(net()), torch.jit.trace(net(), batches()[0][0])
    for model in (scripted, traced):
        for run in (
            lambda m: ff.estimate_fisher(m, batches()),
            lambda m: ff.estimate_fishers({"a": m}, batches()),
            ff.FisherAccumulator,
            ff.Layout.from_module,
            ff.last_layer,
            ff.flatten_,
            lambda m: ff.Fisher.from_optimizer(torch.optim.AdamW(m.parameters()), m),
            lambda m: ff.InheritanceDAG().add_model("a", m),
            ParameterPerturber,
        ):
            with pytest.raises(
                ff.ArgumentError, match="is a TorchScript module; pass the module that it was made from"
            ):
                run(model)


def test_inside_vmap():
    model, data = net(), batches()

    def inside(run):
        torch.func.vmap(lambda x: (run(x), x)[1])(torch.rand(2, 4, 6))

    for run in (
        lambda x: ff.estimate_fisher(model, data),
        lambda x: ff.estimate_fisher(model, [(x, data[0][1])], estimator="sample"),
        lambda x: ff.Fisher.from_dict({"w": x}),
        lambda x: mfim([{"w": x}, {"w": x}]),
    ):
        with pytest.raises(ff.LayoutError, match="torch.func"):
            inside(run)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sparse_inputs(layout, estimator):
    torch.manual_seed(0)
    head, (x, y) = nn.Linear(6, 3), batches(1)[0]
    x = x * (x > 0)
    sparse = x.to_sparse(layout=getattr(torch, layout))
    for model in (head, nn.Sequential(head, nn.Tanh(), nn.Linear(3, 3))):
        wanted = ff.estimate_fisher(model, [(x, y)], estimator=estimator).buffer
        if estimator in ("sample", "expected"):
            with pytest.raises(ff.EstimationError, match="batch 0 holds a sparse tensor, which cannot be cut"):
                ff.estimate_fisher(model, [(sparse, y)], estimator=estimator)
        else:
            found = ff.estimate_fisher(model, [(sparse, y)], estimator=estimator).buffer
            assert torch.allclose(found, wanted, rtol=1e-5)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [10**400, -(10**400), float("nan"), "1", None, True])
def test_numbers_that_are_none(number):
    model, data = net(), batches()
    fisher = ff.estimate_fisher(model, data)
    held = [p.detach().clone() for p in model.parameters()]
    for run in (
        *(
            lambda key=key: ff.dampen_(model, fisher, fisher, **{key: number})
            for key in ("alpha", "lam", "cap", "scale")
        ),
        lambda: ff.dampen_(model, fisher, fisher, exponent=number),
        lambda: ff.merge_fishers([fisher], weights=[number]),
        lambda: ff.adaptive_alpha(fisher, fisher, forget_fraction=number),
        lambda: ff.FisherAccumulator(model).streaming(scale=number).__enter__(),
        lambda: ff.FisherAccumulator(model).streaming(every=-1 if number == 10**400 else number).__enter__(),
        lambda: ff.estimate_fisher(model, data, estimator="expected", samples=number),
        lambda: ff.estimate_fisher(model, data, estimator="expected", seed=number),
        lambda: mfim([fisher, fisher], divisor=number),
        lambda: ff.Layout({"w": (number if number is not True else 0.5,)}),
        lambda: ParameterPerturber(model, parameters={"dampening_constant": number if number != "1" else "x"}),
    ):
        with pytest.raises(ff.FiunError):
            run()
    assert all(map(torch.equal, model.parameters(), held))


@pytest.mark.parametrize("scale", [0, 0.0, float("inf"), -1.0, "x", None])
def test_a_scale_that_is_none_is_refused_when_it_is_asked_for(scale):
    model = net()
    accumulator = ff.FisherAccumulator(model)
    with pytest.raises(ff.ArgumentError, match="scale is"), accumulator.streaming(scale=lambda: scale):
        cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    assert accumulator.steps == 0
    with pytest.raises(ff.ArgumentError, match="scale is"), accumulator.streaming(scale=scale):
        pass


def test_numbers_of_an_optimiser_and_of_an_update():
    model = net()
    optimizer, accumulator = torch.optim.AdamW(model.parameters()), ff.FisherAccumulator(model)
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    optimizer.step()
    for samples in ("x", 1.5, -1, None):
        with pytest.raises(ff.ArgumentError, match="samples is"):
            accumulator.update(samples=samples)
    accumulator.update(samples=4)
    assert accumulator.steps == 1
    state, group = optimizer.state[model[0].weight], optimizer.param_groups[0]
    for bad in (10**400, "x", None, float("nan"), -1.0, 1.0):
        group["betas"] = (0.9, bad)
        with pytest.raises(ff.ArgumentError, match="beta2 is"):
            ff.Fisher.from_optimizer(optimizer, model)
    group["betas"] = (0.9, 0.999)
    for bad in (10**400, "x", None, float("nan"), float("inf"), -3):
        state["step"] = bad
        with pytest.raises(ff.ArgumentError, match="step is"):
            ff.Fisher.from_optimizer(optimizer, model)
