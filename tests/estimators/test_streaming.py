"""Gradients folded in as they arrive: in a plain backward, in training loops, under scaling, checkpointing and DDP."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from fisher_models import checkpointed
from test_estimators import batches, close, net, oracle
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import fiun_fast as ff


def test_streaming_is_the_batch_estimator_and_keeps_no_gradient():
    model, loader = net().eval(), batches()
    accumulator = ff.FisherAccumulator(model)
    alive = []

    def watch(parameter):
        alive.append(sum(p.grad is not None for p in model.parameters()))

    with accumulator.streaming():
        handles = [p.register_post_accumulate_grad_hook(watch) for p in model.parameters()]
        for x, y in loader:
            cross_entropy(model(x), y).backward()
        for handle in handles:
            handle.remove()
    close(accumulator.result(), oracle(model, loader))
    assert accumulator.result().provenance.steps == 3
    assert alive and max(alive) == 0
    cross_entropy(model(loader[0][0]), loader[0][1]).backward()  # outside: gradients stay, nothing is added
    assert accumulator.steps == 3
    assert all(p.grad is not None for p in model.parameters())


def test_gradient_accumulation():
    model, loader = net().eval(), batches(2)
    accumulator = ff.FisherAccumulator(model)
    with accumulator.streaming(every=3):
        for x, y in loader:
            for part in range(3):  # the mean loss of a mini-batch in three unequal parts
                rows = slice(part * len(y) // 3, (part + 1) * len(y) // 3)
                (cross_entropy(model(x[rows]), y[rows], reduction="sum") / len(y)).backward()
    close(accumulator.result(), oracle(model, loader))
    assert accumulator.steps == 2


@pytest.mark.parametrize("scale", [1024.0, lambda: 1024.0])
def test_scaled_losses(scale):
    model, loader = net().eval(), batches()
    accumulator = ff.FisherAccumulator(model)
    with accumulator.streaming(scale=scale):
        for x, y in loader:
            (1024 * cross_entropy(model(x), y)).backward()
    close(accumulator.result(), oracle(model, loader))


def test_label_free_streams_too():
    model, loader = net().eval(), batches()
    accumulator = ff.FisherAccumulator(model, estimator="label_free")
    with accumulator.streaming():
        for x, _ in loader:
            model(x).square().sum(1).mean().backward()
    wanted = ff.estimate_fisher(model, loader, estimator="label_free")
    assert torch.allclose(accumulator.result().buffer, wanted.buffer, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    torch.manual_seed(0)
    model = checkpointed(reentrant)
    loader = [(torch.randn(5, 6), torch.randint(5, (5,))) for _ in range(2)]
    accumulator = ff.FisherAccumulator(model)
    with accumulator.streaming():
        for x, y in loader:
            cross_entropy(model(x), y).backward()
    plain = copy.deepcopy(model)
    by_hand = ff.FisherAccumulator(plain)
    for x, y in loader:
        plain.zero_grad()
        cross_entropy(plain(x), y).backward()
        by_hand.update()
    assert torch.allclose(accumulator.result().buffer, by_hand.result().buffer, rtol=1e-6)
    assert accumulator.steps == 2


def test_autocast():
    model, loader = net().eval(), batches()
    accumulator = ff.FisherAccumulator(model)
    with accumulator.streaming():
        for x, y in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(x).float(), y)
            loss.backward()
    for name, wanted in oracle(model, loader).items():
        assert (accumulator.result()[name] - wanted).abs().max() < 0.1 * wanted.max(), name


def test_frozen_and_unused_parameters_and_errors():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    accumulator = ff.FisherAccumulator(model)
    with accumulator.streaming():
        model["used"](torch.ones(1, 2)).sum().backward()
    assert not accumulator.result()["unused.weight"].any()
    with pytest.raises(RuntimeError, match="stop"), accumulator.streaming():
        raise RuntimeError("stop")
    model["used"](torch.ones(1, 2)).sum().backward()
    assert accumulator.steps == 1, "a hook was left behind"
    for every in (0, 1.5):
        with (
            pytest.raises(ff.ArgumentError, match="every is .*, expected a whole number of at least 1"),
            accumulator.streaming(every=every),
        ):
            pass
    with pytest.raises(ff.ArgumentError, match="optimizer is a Linear"), accumulator.during(model["used"]):
        pass


@pytest.mark.parametrize("every", [1, 2])
def test_backwards_are_counted_and_not_a_parameters_arrivals(every):
    heads = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    torch.manual_seed(0)
    inputs = torch.randn(4, 5, 3)
    accumulator, squares = ff.FisherAccumulator(heads), {}
    with accumulator.streaming(every=every):
        for i, x in enumerate(inputs):
            heads["ab"[i % 2]](x).sum().backward()
    assert accumulator.steps == 4 // every
    for i, x in enumerate(inputs):  # a head's gradient is that of its only backward in each step
        squares["ab"[i % 2]] = squares.get("ab"[i % 2], 0) + x.sum(0).square().expand(2, 3) / (4 // every)
    for head, wanted in squares.items():
        assert torch.allclose(accumulator.result()[f"{head}.weight"], wanted, rtol=1e-5)
    assert all(p.grad is None for p in heads.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_backward_inside_a_backward_is_no_step(every, depth):
    torch.manual_seed(0)
    layers, x = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), torch.randn(4, 5, 3, requires_grad=True)

    def nested(layer, x, depth):
        return checkpoint(nested, layer, x, depth - 1, use_reentrant=True) if depth else layer(x).tanh()

    accumulator = ff.FisherAccumulator(layers)
    with accumulator.streaming(every=every):
        for part in x:  # every parameter lies in a checkpoint; the first gradient of all comes from inside one
            for layer in layers:
                part = nested(layer, part, depth)
            part.sum().backward()
    assert accumulator.steps == 4 // every
    by_hand = ff.FisherAccumulator(layers)
    for i, part in enumerate(x):
        for layer in layers:
            part = nested(layer, part, 0)
        part.sum().backward()
        if i % every == every - 1:
            by_hand.update()
            layers.zero_grad()
    assert torch.allclose(accumulator.result().buffer, by_hand.result().buffer, rtol=1e-6)


@pytest.mark.parametrize("free", [True, False])
def test_an_incomplete_window_is_an_error(free):
    model = nn.Linear(2, 2)
    accumulator = ff.FisherAccumulator(model)
    with (  # noqa: PT012
        pytest.raises(ff.EstimationError, match="1 of 2 backward passes of the last"),
        accumulator.streaming(every=2, free=free),
    ):
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
    assert accumulator.steps == 1
    assert (model.weight.grad is None) == free


def test_a_gradient_from_before_is_refused():
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.grad.clone()
    accumulator = ff.FisherAccumulator(model)
    with (
        pytest.raises(ff.EstimationError, match="parameter 'weight' holds a gradient already"),
        accumulator.streaming(),
    ):
        pass
    assert torch.equal(model.weight.grad, before)
    assert not model.weight._post_accumulate_grad_hooks


def test_a_scale_is_read_once_a_backward_and_an_overflow_is_an_error():
    model, read = nn.Linear(2, 2), []
    accumulator = ff.FisherAccumulator(model)
    with (  # noqa: PT012
        pytest.raises(ff.EstimationError, match="a scaled gradient was not finite"),
        accumulator.streaming(scale=lambda: read.append(1) or 8.0),
    ):
        for size in (1.0, float("inf"), 1.0):
            (8 * model(torch.full((1, 2), size)).sum()).backward()
    assert len(read) == accumulator.steps == 3


def test_frozen_parameters_leave_no_hook_behind():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    accumulator = ff.FisherAccumulator(model, ["weight", "bias"], allow_frozen=True)
    with accumulator.streaming():
        model(torch.ones(1, 2)).sum().backward()
    assert not model.weight._post_accumulate_grad_hooks
    assert accumulator.result()["weight"].eq(1).all()


# ---- training loops --------------------------------------------------------------------------------------------------


def gradients_by_hand(model, loader, optimizer, clip=None):
    """A training loop that keeps the squares of what each step sees."""
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for square, p in zip(squares, model.parameters()):
            square += p.grad**2 / len(loader)
        optimizer.step()
    return squares


@pytest.mark.parametrize("clip", [None, 0.05])
def test_during_a_training_loop(clip):
    model, twin, loader = net().eval(), net().eval(), batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    wanted = gradients_by_hand(twin, loader, torch.optim.AdamW(twin.parameters(), lr=0.05), clip)
    accumulator = ff.FisherAccumulator(model)
    with accumulator.during(optimizer):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    for found, square in zip(accumulator.result().as_dict().values(), wanted):
        assert torch.allclose(found, square, rtol=1e-5, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters())), "training was disturbed"


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    model, twin, loader = net().eval(), net().eval(), batches(1) * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    wanted = gradients_by_hand(twin, loader, torch.optim.SGD(twin.parameters(), lr=0.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    accumulator = ff.FisherAccumulator(model)
    with accumulator.during(optimizer):
        for i, (x, y) in enumerate([*loader, loader[0]]):
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model(x), y)).backward()
            if i == 2:  # an overflow, which the scaler skips
                model[5].bias.grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    assert accumulator.steps == 2
    for found, square in zip(accumulator.result().as_dict().values(), wanted):
        assert torch.allclose(found, square, rtol=1e-5, atol=1e-12)


def test_distributed_data_parallel(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, loader = net().eval(), batches()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.0)
        accumulator = ff.FisherAccumulator(model)
        with accumulator.during(optimizer):
            for x, y in loader:
                optimizer.zero_grad()
                half = len(y) // 2
                with wrapped.no_sync():  # gradient accumulation: reduced with the second part
                    (cross_entropy(wrapped(x[:half]), y[:half], reduction="sum") / len(y)).backward()
                (cross_entropy(wrapped(x[half:]), y[half:], reduction="sum") / len(y)).backward()
                optimizer.step()
        close(accumulator.result(), oracle(model, loader))
    finally:
        torch.distributed.destroy_process_group()
    assert "RANK" not in os.environ
