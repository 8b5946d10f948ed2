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
            pytest.raises(ff.ArgumentError, match="every is .*, expected a whole number above 0"),
            accumulator.streaming(every),
        ):
            pass
    with pytest.raises(ff.ArgumentError, match="optimizer is a Linear"), accumulator.during(model["used"]):
        pass


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
