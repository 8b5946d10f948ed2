"""Signed selection: only elements whose gradient and value have opposite signs. The case table has it as well."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from cases import CHAIN, DIAMOND, SIZES, Case, build
from torch import nn

import fiun_fast as ff
from fiun_fast.ratios import adaptive_percentile

INF, NAN = math.inf, math.nan
VALUES = (1.0, -1.0, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, INF, -INF, NAN)


def fisher(layout: ff.Layout, value: float) -> ff.Fisher:
    return ff.Fisher(torch.full((layout.numel,), value), layout)


@pytest.mark.parametrize("theta", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_pair_of_signs(backend, theta):
    """g * theta < 0 as a mathematician reads it: the product of 1e-45 and -1e-45 is negative, though it underflows."""
    g, t = (part.reshape(-1) for part in torch.meshgrid(torch.tensor(VALUES), torch.tensor(VALUES), indexing="ij"))
    model = {"w": t.to(backend.device, theta)}
    values = model["w"].tolist()
    layout = ff.Layout.from_tensors(model)
    gradient = ff.Gradient(g.to(backend.device), layout)
    i, f = (fisher(layout, value).to(backend.device) for value in (1.0, 4.0))
    report = ff.dampen_(model, i, f, gradient=gradient, alpha=2.0, lam=1.0, backend=backend.name)
    expected = [a * 0.25 if (b < 0 < a) or (a < 0 < b) else a for a, b in zip(values, g.tolist(), strict=True)]
    assert report.selected == sum((b < 0 < a) or (a < 0 < b) for a, b in zip(values, g.tolist(), strict=True))
    assert report.nonfinite == sum(not math.isfinite(b) for b in g.tolist())
    torch.testing.assert_close(
        model["w"].cpu(), torch.tensor(expected, dtype=torch.float64).to(theta), rtol=0, atol=0, equal_nan=True
    )


def test_a_signed_dampening_raises_the_loss_that_the_gradient_is_of():
    """To first order by the sum of |g * change|; an unsigned one of the same Fishers may go either way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 6).double(), torch.randint(3, (16,))

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    start = loss()
    start.backward()
    gradient = ff.Gradient.from_module(model)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    layout = gradient.layout
    i, f = (ff.Fisher(torch.rand(layout.numel).double(), layout) for _ in range(2))
    report = ff.dampen_(model, i, f, gradient=gradient, alpha=0.5, lam=1e300, cap=1 - 1e-6)
    change = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before
    assert 0 < report.selected == int((change != 0).sum())
    assert (gradient.buffer[change != 0] * change[change != 0] > 0).all()
    assert (loss() - start).item() == pytest.approx(float((gradient.buffer * change).abs().sum()), rel=1e-3)


def test_gradients_of_several_requests_add_up_by_weight(backend):
    case = Case("two", CHAIN, ("a", "b"), (0.5, 3.0), SIZES, signed=True)
    problem, other = build(case, backend.device), build(case, backend.device)
    problem.plan(backend.name).run_()
    merged = ff.merge_fishers(other.forgets, weights=case.weights, backend=backend.name)
    first, second = other.gradients
    gradient = ff.Gradient(0.5 * first.buffer + 3.0 * second.buffer, first.layout)
    model = other.models["b"]
    numbers = {"alpha": case.alpha, "lam": case.lam, "backend": backend.name}
    ff.dampen_(model, other.originals["b"], merged, gradient=gradient, **numbers)
    assert all(torch.equal(value, problem.models["b"][name]) for name, value in model.items())
    assert any((value != build(case, backend.device).models["b"][name]).any() for name, value in model.items())


def test_what_is_said_of_a_signed_run():
    case = Case("said", DIAMOND, ("a", "b"), shapes=SIZES, signed=True)
    problem = build(case)
    plan = problem.plan(None)
    assert "signed" in str(plan) and "gradients, " in str(plan)
    assert plan.traffic.gradient == plan.traffic.forget > 0
    digests = [gradient.sha256() for gradient in problem.gradients]
    audited, plain = plan.run_(dry_run=True, audit=True), plan.run_(dry_run=True)
    for gradient in problem.gradients:
        gradient.buffer.zero_()
    for report, expected in ((audited, digests), (plain, [gradient.sha256() for gradient in problem.gradients])):
        record = json.loads(json.dumps(report.to_dict()))
        assert record["signed"] is True
        assert [request["gradient_sha256"] for request in record["requests"]] == expected
        assert "signed: only elements whose gradient and value differ in sign" in str(report)
    unsigned = build(Case("unsigned", DIAMOND, ("a", "b"), shapes=SIZES)).plan(None)
    assert "signed" not in str(unsigned) and "signed" not in str(unsigned.run_(dry_run=True))
    assert unsigned.run_(dry_run=True).to_dict()["signed"] is False
    assert unsigned.traffic.gradient == 0


def test_alpha_is_chosen_among_what_the_sign_admits(backend):
    case = Case("auto", shapes={"w": (501,)}, signed=True)
    problem = build(case, backend.device)
    model, i, f, g = problem.models["a"], problem.originals["a"], problem.forgets[0], problem.gradients[0]
    admitted = g.buffer.sign() * model["w"].sign() == -1
    ratio = (f.buffer / i.buffer)[admitted].double().cpu().numpy()
    options = {"gradient": g, "backend": backend.name}
    report = ff.dampen_(model, i, f, alpha="auto", forget_fraction=0.2, dry_run=True, **options)
    assert report["model"].alpha == pytest.approx(np.percentile(ratio, adaptive_percentile(0.2)), rel=2**-40)
    profile = ff.selection_profile(i, f, model, **options)
    assert profile.never == int((~admitted).sum())
    assert profile.selected(profile.alphas[1000]) == (ratio > profile.alphas[1000]).sum()


@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")  # the score wants as many changes as it can get
def test_tuning_and_trials_know_signs():
    case = Case("tune", CHAIN, ("a",), shapes={"w": (300,)}, signed=True)
    problem = build(case)
    before = problem.state()
    opposed = {n: problem.gradients[0].buffer.sign() * m["w"].sign() == -1 for n, m in problem.models.items()}
    dag = ff.InheritanceDAG()
    for name, parents in case.parents.items():
        dag.add_model(name, problem.models[name], problem.originals[name], parents=parents)
    request = ff.ForgetRequest("a", problem.forgets[0], gradient=problem.gradients[0])

    def untouched(name, model) -> float:
        changed = model["w"] != before[name, "w"]
        assert not (changed & ~opposed[name]).any()
        return float(changed.sum())

    chosen = ff.tune(dag, [request], untouched, points=6)
    ratio = problem.forgets[0].buffer / problem.originals["a"].buffer
    assert chosen["a"].score == ((ratio > chosen["a"].alpha) & opposed["a"]).sum() > 100
    assert all(torch.equal(value, before[key]) for key, value in problem.state().items())
    plan = problem.plan(None)
    with plan.trials(alpha=0.5) as trials:
        trials.run()
        problem.gradients[0].buffer.neg_()
        with pytest.raises(ff.UndoError, match="gradient was changed"):
            trials.run()
    assert all(torch.equal(value, before[key]) for key, value in problem.state().items())


def test_a_gradient_that_moved_or_was_taken_again_is_that_of_the_next_run():
    torch.manual_seed(1)
    model = nn.Linear(5, 4)
    layout = ff.Layout.from_module(model)
    model(torch.randn(8, 5)).square().mean().backward()
    gradient = ff.Gradient.from_module(model)
    assert all(torch.equal(gradient[name], p.grad) for name, p in model.named_parameters())
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, fisher(layout, 1.0))
    plan = ff.plan(dag, [ff.ForgetRequest("m", fisher(layout, 5.0), gradient=gradient)], alpha=1.0)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def expected() -> int:
        return int((gradient.buffer.sign() * theta.sign() == -1).sum())

    assert plan.run_(dry_run=True).selected == expected()
    buffer = gradient.buffer
    model.zero_grad()
    model(torch.randn(8, 5)).sum().backward()
    gradient.refresh_(model)
    assert gradient.buffer is buffer and torch.equal(gradient["bias"], model.bias.grad)
    assert plan.run_(dry_run=True).selected == expected()
    gradient.buffer = -buffer
    assert plan.run_(dry_run=True).selected == expected() == int((theta.sign() * buffer.sign() == 1).sum())
    model.weight.grad = None
    gradient.refresh_(model)
    assert not gradient["weight"].any() and gradient["bias"].any()
    turned = ff.Gradient.from_dict({"bias": torch.zeros(4), "weight": torch.ones(4, 5)})
    turned.refresh_(model)
    assert torch.equal(turned["bias"], model.bias.grad) and not turned["weight"].any()


def test_refused_before_anything_is_written():
    model = nn.Linear(4, 3)
    layout = ff.Layout.from_module(model)
    i, f = fisher(layout, 1.0), fisher(layout, 9.0)
    g = ff.Gradient(torch.randn(layout.numel), layout)
    before = model.weight.detach().clone()
    other = ff.Layout({"bias": (3,), "weight": (3, 4)})
    refused = [
        (ff.ArgumentError, "gradient is a Tensor", lambda: ff.dampen_(model, i, f, gradient=g.buffer)),
        (ff.ArgumentError, "gradient is a str", lambda: ff.dampen_(model, i, f, gradient="g")),
        (ff.ArgumentError, "2 gradients for 1 forget", lambda: ff.dampen_(model, i, f, gradient=[g, g])),
        (ff.ArgumentError, "request 0 has a gradient, request 1 has none", lambda: two(g, None)),
        (ff.ArgumentError, "gradient of request 1 is a Fisher", lambda: two(g, f)),
        (ff.DTypeError, "gradient of request 0 is torch.float64", lambda: two(g.to(dtype=torch.float64), g)),
        (ff.LayoutError, "another order", lambda: two(ff.Gradient(g.buffer, other), g)),
        (ff.LayoutError, "do not fit", lambda: two(ff.Gradient(torch.rand(2), ff.Layout({"bias": (2,)})), g)),
        (ff.ArgumentError, "needs model=", lambda: ff.selection_profile(i, f, gradient=g)),
        (ff.LayoutError, "gradient of request 0 share memory", lambda: two(shared(), g)),
        (ff.EstimationError, "call backward", lambda: ff.Gradient.from_module(model)),
        (ff.LayoutError, "shape", lambda: ff.Gradient(torch.rand(3), layout)),
        (ff.LayoutError, "does not fit the model", lambda: refreshed()),
    ]

    def two(first, second):
        requests = [ff.ForgetRequest("m", f, gradient=one) for one in (first, second)]
        dag = ff.InheritanceDAG()
        dag.add_model("m", model, i)
        ff.plan(dag, requests).run_()

    def shared() -> ff.Gradient:
        buffer = ff.flatten_(model)
        return ff.Gradient(buffer, layout)

    def refreshed() -> None:
        small = nn.Linear(4, 2)
        small(torch.rand(1, 4)).sum().backward()
        g.refresh_(small)

    for error, message, call in refused:
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(model.weight, before), message
