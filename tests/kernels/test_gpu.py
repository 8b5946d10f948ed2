"""What only a GPU can show: graphs, streams, two devices, no waiting, offsets beyond 32 bits. Skipped elsewhere.

The results themselves are those of tests/kernels/test_parity.py, which runs on the GPU where there is one.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import CASES, Case, build, textbook

import fiun_fast as ff
from fiun_fast import kernels
from fiun_fast.kernels.table import Merging

BACKENDS = ("cuda", "triton")
TWO = "needs two NVIDIA GPUs"
SHAPES = {"weight": (211, 197), "bias": (211,), "big": (1 << 20,)}
DIAMOND = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}


@pytest.fixture(params=BACKENDS)
def gpu(request) -> str:
    """Name of a backend that works on the GPU."""
    reason = "no GPU that torch can use"
    if torch.cuda.is_available():
        reason = kernels.load(request.param).why_not("cuda")
    request.node.user_properties.append(("backend", (f"{request.param} on GPU only", reason)))
    if reason is not None:
        pytest.skip(f"{request.param} on a GPU: {reason}")
    return request.param


@pytest.fixture
def two_gpus(gpu) -> str:
    """The same, where there are two."""
    if torch.cuda.device_count() < 2:
        pytest.skip(TWO)
    return gpu


def same_bits(problem, expected) -> None:
    """Every parameter is as in the textbook; to be called when the device is done."""
    for key, value in problem.state().items():
        wanted = expected.values[key]
        assert torch.equal(value.nan_to_num(7.0), wanted.nan_to_num(7.0)), key


def refill(problem, seed: int) -> None:
    """Fresh parameters in the same memory."""
    fresh = build(problem.case, "cpu", seed=seed)
    for node, model in problem.models.items():
        for key, parameter in model.items():
            parameter.copy_(fresh.models[node][key])


@pytest.mark.parametrize("id_", ["diamond-two-origins", "tiles", "many-small", "edges-bf16-fp32", "flat-shifted"])
def test_a_run_is_captured_in_a_graph_and_replayed(gpu, id_):
    problem = build(next(case for case in CASES if case.id == id_), "cuda")
    plan = problem.plan(gpu)
    before = problem.state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plan.run_(dry_run=True)  # everything is compiled, loaded and asked for
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = plan.run_()
    torch.cuda.synchronize()
    for key, value in problem.state().items():
        assert torch.equal(value.nan_to_num(7.0), before[key].nan_to_num(7.0)), "capturing ran the kernel"
    for seed in (1, 2, 3):
        refill(problem, seed)
        expected = textbook(problem)
        graph.replay()
        torch.cuda.synchronize()
        same_bits(problem, expected)
    for node, counts in expected.counts.items():  # the first look at the report is the last replay
        assert (report[node].selected, report[node].zeroed, report[node].nonfinite) == counts


def test_two_plans_on_two_streams_at_once(gpu):
    problems = [build(Case("streams", DIAMOND, ("a", "b"), shapes=SHAPES), "cuda", seed=seed) for seed in (1, 2)]
    plans = [problem.plan(gpu) for problem in problems]
    streams = [torch.cuda.Stream() for _ in plans]
    for round_ in range(20):
        for number, problem in enumerate(problems):
            refill(problem, 100 * round_ + number)
        expected = [textbook(problem) for problem in problems] if round_ in (0, 19) else None
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        reports = []
        for stream, plan in zip(streams, plans, strict=True):
            with torch.cuda.stream(stream):
                reports.append(plan.run_())
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        if expected:
            for problem, wanted, report in zip(problems, expected, reports, strict=True):
                same_bits(problem, wanted)
                for node, counts in wanted.counts.items():
                    found = (report[node].selected, report[node].zeroed, report[node].nonfinite)
                    assert found == counts, (round_, node)


def test_work_is_done_in_the_order_of_the_current_stream(gpu):
    """What the stream has been given before is done before, what comes later sees the result."""
    problem = build(Case("order", shapes=SHAPES), "cuda")
    fresh = build(problem.case, "cuda", seed=9)
    plan = problem.plan(gpu)
    plan.run_(dry_run=True)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for key, parameter in problem.models["a"].items():
            parameter.copy_(fresh.models["a"][key])
        plan.run_()
        after = {key: parameter.clone() for key, parameter in problem.models["a"].items()}
    stream.synchronize()
    expected = textbook(dataclasses.replace(fresh, originals=problem.originals, forgets=problem.forgets))
    for key, value in after.items():
        assert torch.equal(value.cpu(), expected.values["a", key])


def test_a_plan_may_go_away_while_its_work_still_waits(gpu):
    """The memory of its tables and counts is not handed out before the stream is done with it."""
    problem = build(Case("gone", DIAMOND, ("a",), shapes=SHAPES), "cuda")
    expected = textbook(problem)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    plan = problem.plan(gpu)
    plan.run_(dry_run=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        plan.run_()
    del plan
    sizes = [64, 512, 4096, 1 << 16, 1 << 20] * 50
    others = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in sizes]  # where freed memory goes
    torch.cuda.synchronize()
    same_bits(problem, expected)
    assert all(bool((other == 255).all()) for other in others)


def test_a_run_waits_for_nothing_and_allocates_its_counts_only(gpu):
    plan = build(Case("lazy", DIAMOND, ("a", "b"), shapes=SHAPES), "cuda").plan(gpu)
    plan.run_()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.run_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated + 1


def test_a_plan_over_two_devices(two_gpus):
    case = Case("devices", DIAMOND, ("a", "b"), shapes=SHAPES)
    problem = build(case, "cuda:0")
    for node in ("b", "d"):
        problem.models[node] = {key: value.to("cuda:1") for key, value in problem.models[node].items()}
        fisher = problem.originals[node]
        problem.originals[node] = ff.Fisher(fisher.buffer.to("cuda:1"), fisher.layout)
    expected = textbook(problem)
    with torch.cuda.device(0):
        report = problem.plan(two_gpus).run_()
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    same_bits(problem, expected)
    for node, counts in expected.counts.items():
        assert (report[node].selected, report[node].zeroed, report[node].nonfinite) == counts


def test_accumulate_and_merge_on_a_device_that_is_not_the_current_one(two_gpus):
    backend = kernels.load(two_gpus)
    gradient, into = torch.randn(1009, device="cuda:1"), torch.zeros(1009, device="cuda:1")
    with torch.cuda.device(0):
        backend.accumulate([gradient], [into], 2, False)
        merged = torch.empty(1009, device="cuda:1")
        backend.merge([into, 2 * into], [1.0, 1.0], Merging(), merged)
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert torch.equal(into, gradient * gradient)
    assert torch.equal(merged, 2 * into)


def test_offsets_beyond_32_bits(gpu):
    """More than 2^32 elements in one row: the ones dampened are those chosen, wherever they lie."""
    n = (1 << 32) + 12_345
    needed = 12 * n  # theta in bf16, two Fishers in fp32, some to spare
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    chosen = torch.tensor([0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, n - 2, n - 1], device="cuda")
    layout = ff.Layout({"p": (n,)})
    model = {"p": torch.ones(n, dtype=torch.bfloat16, device="cuda")}
    original = ff.Fisher(torch.ones(n, device="cuda"), layout)
    forget = ff.Fisher(torch.zeros(n, device="cuda"), layout)
    forget.buffer[chosen] = 4.0
    report = ff.dampen_(model, original, forget, alpha=1.0, lam=1.0, backend=gpu)
    assert report.selected == len(chosen)
    assert torch.equal(model["p"][chosen].float(), torch.full((len(chosen),), 0.25, device="cuda"))
    model["p"][chosen] = 1.0
    assert bool((model["p"] == 1.0).all())
