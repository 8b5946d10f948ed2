"""What only a GPU can show: graphs, streams, two devices, offsets beyond 32 bits, memory, the host's time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import fiun_fast as ff

from .machine import BACKENDS, Gpu, SkippedError
from .parity import BF16, Case, Problem, same_bits

Items = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
BIG = (1 << 32) + 12_345


def network(gpu: Gpu, **more: Any) -> Case:
    """Four models of some tiles each."""
    return Case(4, 2, ((11, 97), (11,)) if gpu.dry else ((211, 997), (211,), (1 << 18,)), **more)


def graph(gpu: Gpu, backend: str, case: Case) -> dict[str, Any]:
    """A run is captured right after warmup, and replayed with fresh parameters; the report counts the last replay."""
    problem = Problem(case, [gpu.device()])
    plan = problem.plan(gpu.backend(backend))
    plan.warmup()
    before, reports = problem.now(), []
    replay = gpu.captured(lambda: reports.append(plan.run_()))
    gpu.wait()
    assert all(map(same_bits, problem.now(), before)), "capturing ran the kernel"
    for _ in range(3):
        problem.refill()
        replay()
        gpu.wait()
    problem.compare(reports[-1])
    return {}


def streams(gpu: Gpu, backend: str) -> dict[str, Any]:
    """Two plans on two streams at once, again and again."""
    problems = [Problem(network(gpu), [gpu.device()], seed) for seed in (1, 2)]
    plans = [problem.plan(gpu.backend(backend)) for problem in problems]
    for _ in range(2 if gpu.dry else 20):
        for problem in problems:
            problem.refill()
        reports = []
        for plan in plans:
            with gpu.aside():
                reports.append(plan.run_())
        gpu.wait()
    for problem, report in zip(problems, reports, strict=True):
        problem.compare(report)
    return {}


def order(gpu: Gpu, backend: str) -> dict[str, Any]:
    """What a stream was given before a run is done before, what comes later sees the result; the plan may be gone."""
    problem = Problem(network(gpu), [gpu.device()])
    plan = problem.plan(gpu.backend(backend))
    plan.run_(dry_run=True)
    gpu.wait()
    with gpu.aside():
        gpu.delay()
        problem.refill()
        report = plan.run_()
        del plan
        others = [torch.full((1 << 16,), 255, dtype=torch.uint8, device=gpu.device()) for _ in range(50)]
    gpu.wait()
    problem.compare(report)
    assert all(bool((other == 255).all()) for other in others), "memory of the plan was handed out too soon"
    return {}


def lazy(gpu: Gpu, backend: str) -> dict[str, Any]:
    """A run waits for nothing, and asks for one piece of memory: its counts."""
    problem = Problem(network(gpu), [gpu.device()])
    plan = problem.plan(gpu.backend(backend))
    plan.run_()
    before = gpu.allocations()
    with gpu.no_waiting():
        report = plan.run_()
    asked = gpu.allocations() - before
    assert gpu.dry or asked == 1, f"memory was asked for {asked} times"
    del report
    return {"allocations": asked}


def two_devices(gpu: Gpu, backend: str) -> dict[str, Any]:
    """One plan over models on two devices."""
    name = gpu.backend(backend)
    if gpu.count() < 2:
        raise SkippedError("there is one device")
    problem = Problem(network(gpu), [gpu.device(0), gpu.device(1)])
    problem.compare(problem.plan(name).run_())
    return {}


def offsets(gpu: Gpu, backend: str) -> dict[str, Any]:
    """A row of more than 2^32 elements: those dampened are those chosen, wherever they lie."""
    name, n = gpu.backend(backend), 12_345 if gpu.dry else BIG
    if not gpu.dry and gpu.free_bytes() < 12 * n:
        raise SkippedError(f"needs {12 * n / 1e9:.0f} GB of free memory")
    device = gpu.device()
    chosen = torch.tensor([0, 1, n // 2, n - 12_346 if n > 12_346 else 7, n - 2, n - 1], device=device)
    layout, model = ff.Layout({"p": (n,)}), {"p": torch.ones(n, dtype=BF16, device=device)}
    forget = ff.Fisher(torch.zeros(n, device=device), layout)
    forget.buffer[chosen] = 4.0
    report = ff.dampen_(
        model, ff.Fisher(torch.ones(n, device=device), layout), forget, alpha=1.0, lam=1.0, backend=name
    )
    assert report.selected == len(chosen), f"{report.selected} selected"
    assert bool((model["p"][chosen] == 0.25).all())
    model["p"][chosen] = 1.0
    assert bool((model["p"] == 1.0).all()), "something else was written"
    return {"elements": n}


def checks(gpu: Gpu) -> Items:
    """Everything above, backend by backend."""
    for backend in BACKENDS:
        yield f"graph, {backend}", partial(graph, gpu, backend, network(gpu))
        yield f"graph of bf16, {backend}", partial(graph, gpu, backend, network(gpu, theta=BF16, shift=1))
        yield f"two streams, {backend}", partial(streams, gpu, backend)
        yield f"order, {backend}", partial(order, gpu, backend)
        yield f"no waiting, {backend}", partial(lazy, gpu, backend)
        yield f"two devices, {backend}", partial(two_devices, gpu, backend)
    for backend in BACKENDS:
        yield f"offsets beyond 32 bits, {backend}", partial(offsets, gpu, backend)


# ---- what a plan costs beside its kernels ----------------------------------------------------------------------------


def heads(gpu: Gpu, nodes: int, numel: int, stacked: bool = False) -> ff.InheritanceDAG:
    """Heads with a Fisher of their own each, children of the first."""
    layout, device = ff.Layout({"weight": (numel,)}), gpu.device()
    models: list[Any] = [{"weight": torch.zeros(numel, device=device)} for _ in range(nodes)]
    if stacked:
        models = [torch.nn.ParameterDict(model) for model in models]
        ff.stack_(models)
    dag = ff.InheritanceDAG()
    for n, model in enumerate(models):
        fisher = ff.Fisher(torch.ones(numel, device=device), layout)
        dag.add_model(f"n{n}", model, fisher=fisher, parents=["n0"] if n else [])
    return dag


def plan_of(gpu: Gpu, backend: str, nodes: int, numel: int, stacked: bool = False) -> tuple[ff.Plan, float]:
    """One forget Fisher for all of them; and the seconds that `plan` took."""
    forget = ff.Fisher(torch.zeros(numel, device=gpu.device()), ff.Layout({"weight": (numel,)}))
    dag, name = heads(gpu, nodes, numel, stacked), gpu.backend(backend)
    gpu.wait()
    began = time.perf_counter()
    plan = ff.plan(dag, [ff.ForgetRequest("n0", forget)], alpha=1.0, backend=name)
    return plan, time.perf_counter() - began


def host_time(gpu: Gpu, backend: str, nodes: int, stacked: bool) -> dict[str, Any]:
    """Microseconds until `run_` returns, and how long the device then takes: the difference is what a graph saves."""
    plan, _ = plan_of(gpu, backend, nodes, 256, stacked)
    plan.run_()
    gpu.wait()
    host, whole = [], []
    for _ in range(3 if gpu.dry else 100):
        began = time.perf_counter()
        plan.run_()
        host.append(time.perf_counter() - began)
        gpu.wait()
        whole.append(time.perf_counter() - began)
    return {"host_us": 1e6 * statistics.median(host), "until_done_us": 1e6 * statistics.median(whole)}


def memory(gpu: Gpu, backend: str, nodes: int, numel: int) -> dict[str, Any]:
    """Bytes of a plan's tables, how long they take to make, and what a run needs on top."""
    plan, seconds = plan_of(gpu, backend, nodes, numel)
    peak = gpu.peak(plan.run_)
    uploaded = sum(getattr(getattr(part.launch, "tables", None), "nbytes", 0) for part in plan.parts)
    assert gpu.dry or peak < 24 * nodes + (1 << 20), f"a run needs {peak} bytes"
    described = plan.traffic.total
    return {"table_bytes": uploaded, "plan_ms": 1e3 * seconds, "run_bytes": peak, "traffic_bytes": described}


def costs(gpu: Gpu) -> Items:
    """The host's time and memory, backend by backend."""
    sizes = ((1, 3), (20, 5)) if gpu.dry else ((1, 100_000_000), (1_000, 51_300), (10_000, 5_130))
    for backend in BACKENDS:
        for nodes in (1, 5) if gpu.dry else (1, 100, 10_000):
            yield f"host time, {nodes:,} nodes, {backend}", partial(host_time, gpu, backend, nodes, False)
        yield f"host time, {nodes:,} stacked nodes, {backend}", partial(host_time, gpu, backend, nodes, True)
        for nodes, numel in sizes:
            yield f"memory, {nodes:,} of {numel:,}, {backend}", partial(memory, gpu, backend, nodes, numel)
