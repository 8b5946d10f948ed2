"""Estimates that are interrupted, nested or beside one another: right, or an error."""

from __future__ import annotations

import threading
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from fisher_models import checkpointed
from small import batches, net
from torch import nn
from torch.nn.functional import cross_entropy

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

pytestmark = pytest.mark.usefixtures("one_thread")
ESTIMATORS = ("batch", "softened", "sample", "expected", "label_free")


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
