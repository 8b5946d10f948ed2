"""The batch estimator against a float64 loop, and the promise to leave a model as it was found."""

import copy

import pytest
import torch
from torch import nn

import fiun_fast as ff


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 16, 5)
    )


def batches(count: int = 3, seed: int = 0) -> list:
    g = torch.Generator().manual_seed(seed)
    sizes = [7, 4, 1, 6][:count]
    return [(torch.randn(n, 1, 6, 6, generator=g), torch.randint(0, 5, (n,), generator=g)) for n in sizes]


def oracle(model: nn.Module, loader) -> dict[str, torch.Tensor]:
    """(1/B) sum of squared mean-loss gradients, in float64, the obvious way."""
    model = copy.deepcopy(model).double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x.double()), y)
        for name, gradient in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[name] += gradient**2
    return {name: value / len(loader) for name, value in total.items()}


def close(fisher: ff.Fisher, expected: dict[str, torch.Tensor]) -> None:
    """fp32 gradients of a small net: a few 1e-6 of the largest entry, the oracle being float64."""
    for name in fisher.layout.names:
        error = (fisher[name].double() - expected[name]).abs().max()
        assert error <= 1e-5 * expected[name].abs().max() + 1e-12, name


@pytest.mark.parametrize("count", [1, 3])
def test_against_float64(count):
    model = net()
    loader = batches(count)
    fisher = ff.estimate_fisher(model, loader)
    close(fisher, oracle(model, loader))
    assert fisher.provenance == ff.Provenance("batch", count, sum(len(y) for _, y in loader))
    assert fisher.buffer.dtype == torch.float32


def test_scope_is_a_part_of_the_whole():
    model, loader = net(), batches()
    whole, head = ff.estimate_fisher(model, loader), ff.estimate_fisher(model, loader, params=ff.last_layer(model))
    assert head.layout.names == ("5.weight", "5.bias")
    assert torch.allclose(head["5.weight"], whole["5.weight"], rtol=1e-6)


def test_accumulator_in_a_training_loop_agrees():
    model, loader = net().eval(), batches()
    accumulator = ff.FisherAccumulator(model)
    for x, y in loader:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        accumulator.update(samples=len(y))
    close(accumulator.result(), oracle(model, loader))
    halfway = accumulator.result()
    accumulator.update()
    assert halfway.provenance.steps == 3
    assert accumulator.result().provenance.steps == 4


def test_hooks_of_parameters_count_in_the_head_too():
    """Masking hooks are a usual way to freeze rows."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight.register_hook(lambda gradient: gradient * 3)
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
    whole, head = (ff.estimate_fisher(model, batches, params=params) for params in (None, "last"))
    assert torch.allclose(whole["2.weight"], head["2.weight"])
    for estimator in ("sample", "expected"):
        for params in (None, "last"):
            with pytest.raises(ff.EstimationError, match="'2.weight' has a gradient hook"):
                ff.estimate_fisher(model, batches, params=params, estimator=estimator)


def test_one_tensor_may_be_the_gradient_of_two_parameters():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    gradient = torch.randn(4, 4)
    expected = (gradient**2).repeat(2, 1).flatten()
    for p in model.parameters():
        p.grad = gradient
    accumulator = ff.FisherAccumulator(model)
    accumulator.update(zero_grads=True)
    assert torch.equal(accumulator.result().buffer, expected)
    assert not gradient.any()
    both = torch.randn(20)
    expected = torch.cat([both[:16], both[4:]]) ** 2
    model[0].weight.grad, model[1].weight.grad = both[:16].view(4, 4), both[4:].view(4, 4)
    accumulator = ff.FisherAccumulator(model)
    accumulator.update(zero_grads=True)
    assert torch.equal(accumulator.result().buffer, expected)
    assert not both.any()


def test_zero_grads_clears_in_the_same_pass():
    model = net().eval()
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    expected = model[5].weight.grad ** 2
    model[0].weight.grad = model[0].weight.grad.to(memory_format=torch.channels_last)  # copied, yet zeroed
    accumulator = ff.FisherAccumulator(model)
    accumulator.update(zero_grads=True)
    assert torch.equal(accumulator.result()["5.weight"], expected)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_sparse_and_missing_gradients():
    model = nn.ModuleDict({"used": nn.Embedding(6, 3, sparse=True), "unused": nn.Linear(2, 2)})
    model["used"](torch.tensor([1, 1, 4])).pow(2).sum().backward()
    assert model["used"].weight.grad.is_sparse
    expected = model["used"].weight.grad.to_dense() ** 2
    accumulator = ff.FisherAccumulator(model)
    accumulator.update(zero_grads=True)
    fisher = accumulator.result()
    assert torch.equal(fisher["used.weight"], expected)
    assert not fisher["unused.weight"].any()
    assert not model["used"].weight.grad.to_dense().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_other_dtypes(dtype):
    model = nn.Linear(4, 3).to(dtype)
    model.weight.grad = torch.randn(3, 4).to(dtype)
    accumulator = ff.FisherAccumulator(model, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    accumulator.update()
    accumulator.update()
    expected = model.weight.grad.double() ** 2
    assert torch.allclose(accumulator.result()["weight"].double(), expected, rtol=1e-6)


class Untidy(nn.Module):
    """Consumes random numbers and changes a buffer even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(36, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(x.flatten(1) + torch.rand(()))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = nn.Sequential(net(), Untidy().requires_grad_(False))
    model = nn.ModuleList([net(), Untidy()])
    model.train()
    model[0][1].eval()  # modes differ between submodules
    model[0][0].weight.requires_grad_(False)
    model[0][5].weight.grad = torch.randn_like(model[0][5].weight)
    grads = {n: p.grad for n, p in model.named_parameters()}
    values = {n: None if g is None else g.clone() for n, g in grads.items()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()

    def loader():
        yield from batches()
        if fails:
            raise RuntimeError("the disk went away")

    def forward(m, batch):
        return m[0](batch[0]) + m[1](batch[0]), batch[1]

    if fails:
        with pytest.raises(RuntimeError, match="the disk went away"):
            ff.estimate_fisher(model, loader(), forward_fn=forward)
    else:
        fisher = ff.estimate_fisher(model, loader(), params="*", forward_fn=forward)  # frozen ones by name
        assert fisher["0.0.weight"].any()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    for name, p in model.named_parameters():
        assert p.grad is grads[name]
        assert p.grad is None or torch.equal(p.grad, values[name])
    assert torch.equal(torch.get_rng_state(), random)


def test_works_under_no_grad():
    model = net()
    with torch.no_grad():
        fisher = ff.estimate_fisher(model, batches())
    close(fisher, oracle(model, batches()))


def test_progress_and_custom_loss(capsys):
    model = net()
    loader = [{"image": x, "label": y} for x, y in batches()]
    fisher = ff.estimate_fisher(
        model,
        loader,
        forward_fn=lambda m, b: (m(b["image"]), b["label"]),
        loss_fn=lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum") / len(y),
        progress=True,
    )
    close(fisher, oracle(model, batches()))
    assert "Fisher" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loader": []}, ff.EstimationError, "the loader is empty"),
        (
            {"loader": [{"x": 1}]},
            ff.EstimationError,
            r"a batch is a dict of 1, expected \(inputs, targets\).*forward_fn=",
        ),
        ({"loader": [torch.zeros(3)]}, ff.EstimationError, "a batch is a Tensor, expected"),
        ({"loader": [(1, 2)]}, ff.EstimationError, "a batch is a tuple of 2, expected"),
        ({"estimator": "magic"}, ff.ArgumentError, "estimator is 'magic', expected one of batch, "),
        ({"params": "head.*"}, ff.LayoutError, "no parameter matches"),
        (
            {"loss_fn": lambda out, y: out},
            ff.EstimationError,
            r"batch 0: the loss is shape \[7, 5\], expected a scalar",
        ),
        ({"loss_fn": lambda out, y: 1.0}, ff.EstimationError, "batch 0: the loss is a float, expected a scalar"),
        ({"loss_fn": lambda out, y: out.detach().sum()}, ff.EstimationError, "the loss does not depend on 0.weight"),
        ({"forward_fn": lambda m, b: ({"a": m(b[0])}, b[1])}, ff.EstimationError, "the outputs are a dict, expected a"),
        ({"backend": "warp"}, ff.BackendError, "unknown backend 'warp'"),
    ],
)
def test_bad_input(arguments, error, message):
    model = net()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        ff.estimate_fisher(model, **{"loader": batches(), **arguments})
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_bad_accumulators():
    model = net()
    accumulator = ff.FisherAccumulator(model)
    with pytest.raises(ff.EstimationError, match=r"no parameter has a gradient: call loss.backward\(\)"):
        accumulator.update()
    with pytest.raises(ff.EstimationError, match="no gradients were accumulated"):
        accumulator.result()
    with pytest.raises(ff.DTypeError, match="dtype is torch.float16"):
        ff.FisherAccumulator(model, dtype=torch.float16)
    model[0].requires_grad_(False)
    with pytest.raises(ff.ArgumentError, match="'0.weight' does not require grad"):
        ff.FisherAccumulator(model, params="0.*")
    model.to("meta")
    with pytest.raises(ff.DeviceError, match="parameter '1.weight': it is on meta"):
        ff.FisherAccumulator(model)


def test_a_model_that_returns_no_tensor():
    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(36, 5)

        def forward(self, x):
            return (None, self.fc(x.flatten(1)))

    with pytest.raises(
        ff.EstimationError,
        match="the model returns a tuple of None and float32 .*, expected a tensor, .*; pass forward_fn",
    ):
        ff.estimate_fisher(Tuple(), batches())


def test_frozen_parameters_can_be_taken_along_as_zeros():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ff.ArgumentError, match="'0.weight' does not require grad"):
        ff.FisherAccumulator(model, params="*")
    accumulator = ff.FisherAccumulator(model, params="*", allow_frozen=True)
    model(torch.randn(5, 3)).square().mean().backward()
    accumulator.update()
    fisher = accumulator.result()
    assert not fisher["0.weight"].any()
    assert torch.equal(fisher["1.weight"], model[1].weight.grad.square())


def test_the_sum_can_be_handed_over_without_a_copy():
    model = torch.nn.Linear(3, 2)
    accumulator = ff.FisherAccumulator(model)
    for _ in range(3):
        model(torch.randn(5, 3)).square().mean().backward()
        accumulator.update(samples=5)
    copied = accumulator.result()
    taken = accumulator.result(in_place=True)
    assert torch.equal(taken.buffer, copied.buffer)
    assert taken.provenance.steps == 3
    with pytest.raises(ff.EstimationError, match="no gradients were accumulated"):
        accumulator.result()
    accumulator.update()  # begins anew, and leaves what was handed over alone
    assert torch.equal(taken.buffer, copied.buffer)
    assert torch.equal(accumulator.result()["weight"], model.weight.grad.square())
