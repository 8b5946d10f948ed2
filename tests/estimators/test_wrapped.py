"""Models and optimisers that come wrapped: looked through, and said so, or refused by name."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small import batches, net
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

import fiun_fast as ff

pytestmark = pytest.mark.usefixtures("one_thread")
ESTIMATORS = ("batch", "softened", "sample", "expected", "label_free")
compiled: list[str] = []  # what was made by the compiler, or ran as it has made it


def counting(graph: torch.fx.GraphModule, _):
    compiled.append("made")

    def run(*args):
        compiled.append("run")
        return graph.forward(*args)

    return run


class Own(nn.Sequential):
    """Classes of torch itself are not compiled in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def compile_in_place(model: nn.Module) -> nn.Module:
    model = Own(*model)
    model.compile(backend=counting)
    return model


def compile_parts(model: nn.Module) -> nn.Module:
    model[0] = torch.compile(model[0], backend=counting)
    model[2] = torch.compile(model[2], backend=counting)
    return model


WRAPS = {
    "DataParallel": (nn.DataParallel, "; looked through DataParallel"),
    "averaged": (AveragedModel, "; looked through AveragedModel"),
    "compiled": (lambda model: torch.compile(model, backend=counting), "; looked through OptimizedModule"),
    "compiled in place": (compile_in_place, ""),
    "compiled parts": (compile_parts, ""),
    "twice": (
        lambda model: nn.DataParallel(torch.compile(model, backend=counting)),
        "; looked through DataParallel, OptimizedModule",
    ),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, while it compiles
@pytest.mark.parametrize("what", WRAPS)
@pytest.mark.parametrize("params", [None, "last", "0.*"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates(what, params, estimator, capfd):
    wrap, said = WRAPS[what]
    expected = ff.estimate_fisher(net(), batches(), params, estimator=estimator)
    model = wrap(net()).train()
    compiled.clear()
    fisher = ff.estimate_fisher(model, batches(), params, estimator=estimator)
    assert compiled == []
    assert capfd.readouterr().err == ""
    assert model.training
    assert fisher.layout == expected.layout
    assert torch.equal(fisher.buffer, expected.buffer)
    assert fisher.provenance.how == {name: way + said for name, way in expected.provenance.how.items()}
    model(batches()[0][0])
    assert bool(compiled) == ("compiled" in what or what == "twice")  # outside an estimate it compiles as before


def test_in_a_loop_of_ones_own():
    model = torch.compile(net(), backend=counting)
    accumulator = ff.FisherAccumulator(model)
    with accumulator.streaming():
        for x, y in batches():
            cross_entropy(model(x), y).backward()
    expected = ff.estimate_fisher(net(), batches())
    assert accumulator.layout == expected.layout
    assert torch.allclose(accumulator.result().buffer, expected.buffer, rtol=1e-5)


def test_the_stance_of_the_compiler_is_put_back():
    torch.compile(net(), backend=counting)  # brings the compiler in
    stances: list[str] = []

    def forward(model: nn.Module, batch: tuple):
        stances.append(torch._dynamo.eval_frame._stance.stance)
        if len(stances) == 3:
            raise RuntimeError("the user's")
        return model(batch[0]), batch[1]

    with pytest.raises(ff.EstimationError, match="batch 2: forward_fn raises RuntimeError: the user's"):
        ff.estimate_fisher(net(), batches(), forward_fn=forward)
    assert stances == ["force_eager"] * 3
    assert torch._dynamo.eval_frame._stance.stance == "default"
    inside, leave = threading.Event(), threading.Event()

    def slowly(model: nn.Module, batch: tuple):
        inside.set()
        leave.wait(5)
        return model(batch[0]), batch[1]

    thread = threading.Thread(target=lambda: ff.estimate_fisher(net(), batches(1), forward_fn=slowly))
    thread.start()
    inside.wait(5)
    ff.estimate_fisher(net(), batches())
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"  # the other is still at work
    leave.set()
    thread.join()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_forward_of_ones_own_gets_the_model_itself():
    model, seen = net(), []

    def forward(given: nn.Module, batch: tuple):
        seen.append(given)
        return given(batch[0]), batch[1]

    ff.estimate_fisher(nn.DataParallel(model), batches(1), forward_fn=forward)
    assert all(given is model for given in seen)
    with pytest.raises(ff.ArgumentError, match="under several names"):
        ff.estimate_fishers({"bare": model, "wrapped": nn.DataParallel(model)}, batches())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_two_ranks():
    """DistributedDataParallel and FullyShardedDataParallel; `tests/two_ranks.py` has what is asserted."""
    script = Path(__file__).parents[1] / "two_ranks.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, sorted(done.stdout.split())) == (0, ["0:well", "1:well"]), done.stderr


def test_what_torch_exports_has_no_eval_mode():
    exported = torch.export.export(net(), (batches()[0][0],)).module()
    with pytest.raises(ff.EstimationError, match="the model has no eval mode .*; pass the one that it was made from"):
        ff.estimate_fisher(exported, batches())


# ---- optimisers ------------------------------------------------------------------------------------------------------


class Wrapping:
    """A wrapper as Accelerate and ScheduleFree have them: no Optimizer, or one that never called its constructor."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.base = inner

    @property
    def param_groups(self):
        return self.base.param_groups

    @property
    def state(self):
        return self.base.state

    def step(self, closure=None):
        return self.base.step(closure)

    def zero_grad(self):
        self.base.zero_grad()


class Inheriting(Wrapping, torch.optim.Optimizer):
    pass


class CallsFirst(Wrapping):
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        self.base.step()
        return loss


class Nested(torch.optim.SGD):
    """A step that calls its base class's, with what it was given."""

    def step(self, closure=None):
        return super().step(closure)


OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "nested": lambda p: Nested(p, lr=0.5),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
    "wrapped": lambda p: Wrapping(torch.optim.SGD(p, lr=0.5)),
    "inherits": lambda p: Inheriting(torch.optim.SGD(p, lr=0.5)),
    "calls first": lambda p: CallsFirst(torch.optim.SGD(p, lr=0.5)),
    "twice": lambda p: Wrapping(Inheriting(Nested(p, lr=0.5))),
}


@pytest.mark.parametrize("kind", OPTIMISERS)
@pytest.mark.parametrize("how", ["step()", "step(closure)", "step(closure=closure)"])
def test_during_counts_the_gradients_of_each_step(kind, how):
    """Beside what is seen at the weights before each step; with a closure, gradients come after the step has begun."""
    if kind == "LBFGS" and how == "step()":
        pytest.skip("it needs a closure")
    torch.manual_seed(0)
    model = net()
    optimizer = OPTIMISERS[kind](model.parameters())
    expected = torch.zeros(53, dtype=torch.float64)
    accumulator = ff.FisherAccumulator(model)
    with accumulator.during(optimizer):
        for x, y in batches(4):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
            expected += torch.cat([g.reshape(-1) for g in gradients]).double().square()
            if how == "step()":
                closure()
                optimizer.step()
            else:
                loss = optimizer.step(closure) if how == "step(closure)" else optimizer.step(closure=closure)
                assert loss is not None
    assert accumulator.steps == 4
    assert torch.allclose(accumulator.result().buffer.double(), expected / 4, rtol=1e-4, atol=1e-9)
    optimizer.step(closure)  # outside nothing is added
    assert accumulator.steps == 4


def test_a_closure_that_raises_is_no_step():
    model = net()
    optimizer, accumulator = torch.optim.SGD(model.parameters(), lr=0.5), ff.FisherAccumulator(model)

    def closure():
        raise RuntimeError("the user's")

    with accumulator.during(optimizer):
        with pytest.raises(RuntimeError, match="the user's"):
            optimizer.step(closure)
        assert accumulator.steps == 0


def test_optimisers_that_cannot_be_looked_through():
    model = net()
    accumulator = ff.FisherAccumulator(model)

    class Alone(torch.optim.Optimizer):
        def __init__(self) -> None:
            pass

    class Noisy(Wrapping):
        noise_multiplier = 1.0

    for bad, message in (
        (Alone(), "optimizer is a Alone, expected a torch.optim.Optimizer, or a wrapper that keeps one as .optimizer"),
        (model, "optimizer is a Sequential, expected"),
        (None, "optimizer is a NoneType, expected"),
        (Noisy(torch.optim.SGD(model.parameters())), "optimizer is a Noisy, which adds noise to the gradients"),
    ):
        with pytest.raises(ff.ArgumentError, match=message), accumulator.during(bad):
            pass
        with pytest.raises(ff.ArgumentError, match=message):
            ff.Fisher.from_optimizer(bad, model)


def test_second_moments_of_a_wrapped_optimiser():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    optimizer.step()
    plain = ff.Fisher.from_optimizer(optimizer, model)
    for wrapped in (Wrapping(optimizer), Inheriting(optimizer)):
        fisher = ff.Fisher.from_optimizer(wrapped, nn.DataParallel(model))
        assert fisher.layout == plain.layout
        assert torch.equal(fisher.buffer, plain.buffer)
