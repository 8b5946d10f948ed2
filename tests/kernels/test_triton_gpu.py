"""What only a GPU can show of the Triton backend: warmup and capture, memory and streams of accumulation and merging.

test_parity.py runs on the GPU as well, where there is one; everything here is skipped, and named, elsewhere.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from cases import Case, build, textbook

from fiun_fast.kernels import load
from fiun_fast.kernels.table import Merging

pytest.importorskip("triton", reason="Triton is not installed")
backend = load("triton")
SHAPES = {"weight": (211, 197), "bias": (211,), "big": (1 << 20,)}
DIAMOND = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}


@pytest.fixture(autouse=True)
def gpu(request):
    """Skips where Triton has no GPU, and tells the summary."""
    reason = backend.why_not("cuda")
    request.node.user_properties.append(("backend", ("triton on GPU only", reason)))
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")


@contextmanager
def no_waiting_and_no_allocation(beside: int = 0):
    """Inside, waiting for the device is an error; afterwards, so is an allocation, `beside` so many."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + beside


@pytest.mark.parametrize(
    "case",
    [
        Case("max", DIAMOND, ("a", "b"), shapes=SHAPES),
        Case("bf16", DIAMOND, ("a", "b"), shapes=SHAPES, theta=torch.bfloat16),
        Case("fp64", DIAMOND, ("a",), shapes=SHAPES, theta=torch.float64, fisher=torch.float64),
        Case("shifted", DIAMOND, ("a",), shapes=SHAPES, shift=1),
    ],
    ids=lambda case: case.id,
)
def test_the_first_run_after_warmup_may_be_captured(case):
    problem = build(case, "cuda")
    before, expected = problem.state(), textbook(problem)
    plan = problem.plan("triton")
    plan.warmup()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = plan.run_()
    torch.cuda.synchronize()
    for key, value in problem.state().items():
        assert torch.equal(value, before[key]), "capturing ran the kernel"
    with no_waiting_and_no_allocation():
        graph.replay()
    torch.cuda.synchronize()
    for key, value in problem.state().items():
        assert torch.equal(value, expected.values[key]), key
    for node, counts in expected.counts.items():
        assert (report[node].selected, report[node].zeroed, report[node].nonfinite) == counts


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_waits_for_nothing_and_allocates_its_counts_only_on_any_stream(dry_run):
    plan = build(Case("lazy", DIAMOND, ("a", "b"), shapes=SHAPES), "cuda").plan("triton")
    plan.run_(dry_run=dry_run)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with no_waiting_and_no_allocation(beside=2):  # the counts of either run
        plan.run_(dry_run=dry_run)
        with torch.cuda.stream(stream):
            plan.run_(dry_run=dry_run)
    torch.cuda.synchronize()


@pytest.mark.parametrize("zero", [False, True])
def test_accumulating_known_gradients_neither_waits_nor_allocates(zero):
    gradients = [torch.randn(n, device="cuda") for n in (1, 33, 4096, 1 << 20)]
    expected = [g.double().square() for g in gradients]
    into = [torch.zeros_like(g) for g in gradients]
    backend.accumulate(gradients, into, 2, False)  # uploads the table of these addresses
    with no_waiting_and_no_allocation():
        backend.accumulate(gradients, into, 2, zero)
        backend.accumulate(gradients[:1], into[:1], 2, False)
    torch.cuda.synchronize()
    for i, (total, square) in enumerate(zip(into, expected, strict=True)):
        times = 3 if i == 0 and not zero else 2
        torch.testing.assert_close(total.double(), times * square, rtol=1e-6, atol=0)
    assert all(bool((g == 0).all()) == zero for g in gradients)


def test_accumulation_and_merging_follow_the_current_stream():
    """What the stream was given before is done before; the tables come with the stream that needs them."""
    stream, n = torch.cuda.Stream(), 1 << 20
    fresh = [torch.randn(n, device="cuda") for _ in range(2)]
    gradients, into = (
        [torch.zeros(n, device="cuda") for _ in range(2)],
        [torch.zeros(n, device="cuda") for _ in range(2)],
    )
    merged = torch.empty(n, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for gradient, values in zip(gradients, fresh, strict=True):
            gradient.copy_(values)
        backend.accumulate(gradients, into, 2, False)
        backend.merge(into, [1.0, 1.0], Merging(), merged)
    stream.synchronize()
    assert torch.equal(merged, torch.maximum(fresh[0] * fresh[0], fresh[1] * fresh[1]))
