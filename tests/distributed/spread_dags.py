"""A DAG over ranks, files, and the page's examples."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from spread_cases import calls_counted, on, rank, same_everywhere, world
from spread_models import (
    assert_same_bits,
    counts,
    fishers,
    fsdp,
    net,
    tensor_parallel,
)
from torch import nn

import fiun_fast as ff

# ---- a DAG over ranks ------------------------------------------------------------------------------------------------


def small(name: int, numel: int = 6) -> tuple[dict[str, torch.Tensor], ff.Fisher]:
    dice = torch.Generator().manual_seed(name)
    model = {"w": torch.randn(numel, generator=dice)}
    return model, ff.Fisher(torch.rand(numel, generator=dice), ff.Layout({"w": (numel,)}))


def forgotten(seed: int, numel: int = 6, signed: bool = False) -> tuple[ff.Fisher, ff.Gradient | None]:
    dice = torch.Generator().manual_seed(10**6 + seed)
    layout = ff.Layout({"w": (numel,)})
    fisher = ff.Fisher(torch.rand(numel, generator=dice) * 3, layout)
    return fisher, ff.Gradient(torch.randn(numel, generator=dice), layout) if signed else None


def random_dag(nodes: int, seed: int) -> list[list[int]]:
    dice = np.random.default_rng(seed)
    return [sorted({int(dice.integers(i)) for _ in range(dice.integers(3))}) if i else [] for i in range(nodes)]


@on(2, 3, 4)
def a_dag_over_ranks(folder: Path) -> None:
    for seed, signed in ((0, False), (1, True)):
        parents, origins = random_dag(60, seed), (0, 3, 3, 17, 59)
        alone = ff.InheritanceDAG()
        here = ff.distributed.InheritanceDAG()
        models = {}
        for i, above in enumerate(parents):
            model, original = small(i)
            alone.add_model(f"u{i}", model, original, parents=[f"u{p}" for p in above])
            models[i] = alone[f"u{i}"].model
        order = [i for i in range(60) if i % world() == rank() or i == 20]  # 20: a copy on every rank
        for i in reversed(order):  # children before their parents
            model, original = small(i)
            here.add_model(f"u{i}", model, original, parents=[f"u{p}" for p in parents[i]])
        requests = [ff.ForgetRequest(f"u{k}", *_request(n, signed)) for n, k in enumerate(origins)]
        mine = [one for n, one in enumerate(requests) if n % world() == rank()]
        ordered = [one for r in range(world()) for n, one in enumerate(requests) if n % world() == r]
        options = {"alpha": 1.2, "lam": 0.7, "merge": "mean" if signed else "max"}
        with calls_counted() as called:
            plan = ff.distributed.plan(here, mine, **options)
        needing = alone.reached_by(ordered)
        wanted = {
            (k, r)
            for name, its in needing.items()
            for k in its
            for r in range(world())
            if int(name[1:]) % world() == r or name == "u20"
        }
        journeys = [(k, r) for k, r in wanted if _holder(k, len(origins)) != r]
        times = 2 if signed else 1
        assert called.get("send", 0) == times * sum(_holder(k, len(origins)) == rank() for k, _ in journeys)
        assert called.get("recv", 0) == times * sum(r == rank() for _, r in journeys)
        with calls_counted() as running:
            report = plan.run_()
        assert running == {}
        with calls_counted() as reading:
            found = {node.name: (node.sources, node.alpha, *counts(node)) for node in report}
        assert reading == {"all_reduce": 1}
        expected = ff.plan(alone, ordered, **options).run_()
        assert found == {node.name: (node.sources, node.alpha, *counts(node)) for node in expected}
        assert (report.selected, report.numel) == (expected.selected, expected.numel)
        for i in order:
            assert torch.equal(here[f"u{i}"].model["w"], models[i]["w"]), i
        assert [one["weight"] for one in report.to_dict()["requests"]] == [one.weight for one in ordered]
        assert str(plan).startswith(f"{len(found)} nodes over {world()} ranks; here:\n")
    again = plan.run_(undo=True)
    changed = again.selected
    assert changed > 0
    again.undo_()
    for i in order:
        assert torch.equal(here[f"u{i}"].model["w"], models[i]["w"])


def _request(n: int, signed: bool) -> tuple[ff.Fisher, float, ff.Gradient | None]:
    fisher, gradient = forgotten(n, signed=signed)
    return fisher, 1.0 + n / 2, gradient


def _holder(k: int, requests: int) -> int:
    """The rank that has the k-th of all requests, which are counted rank by rank."""
    return [r for r in range(world()) for n in range(requests) if n % world() == r][k]


@on(2, 3)
def a_dag_with_models_that_are_spread(folder: Path) -> None:
    """Its root on one rank alone, a child over all, a grandchild on the last."""
    original, forget = fishers(net())
    alone = ff.InheritanceDAG()
    for name, above in (("root", []), ("child", ["root"]), ("grandchild", ["child"])):
        alone.add_model(name, net(), original, parents=above)
    expected = ff.plan(alone, [ff.ForgetRequest("root", forget)], alpha=2.0).run_()
    here = ff.distributed.InheritanceDAG()
    if rank() == 0:
        here.add_model("root", net(), original)
    here.add_model("child", fsdp(net()), original, parents=["root"])
    if rank() == world() - 1:
        here.add_model("grandchild", net(), original, parents=["child"])
    mine = [ff.ForgetRequest("root", forget)] if rank() == world() - 1 else []
    report = ff.distributed.plan(here, mine, alpha=2.0).run_()
    assert [(one.name, *counts(one)) for one in report] == [(one.name, *counts(one)) for one in expected]
    assert_same_bits(here["child"].model, alone["child"].model)
    if rank() == 0:
        assert_same_bits(here["root"].model, alone["root"].model)


@on(3)
def what_is_wrong_with_a_dag_over_ranks(folder: Path) -> None:
    def dag(parents=()):
        made = ff.distributed.InheritanceDAG()
        made.add_model(f"u{rank()}", *small(rank()), parents=parents)
        return made

    def planned(made, *requests, **options):
        return ff.distributed.plan(made, requests if rank() == 0 else (), **options)

    fisher, _ = forgotten(0)
    below = [f"u{rank() - 1}"] if rank() else []
    with same_everywhere(ff.DagError, r"request 0: unknown origin 'nobody': no rank holds it"):
        planned(dag(), ff.ForgetRequest("nobody", fisher))
    with same_everywhere(ff.DagError, r"node 'u0' inherits from 'nobody', which no rank holds"):
        planned(dag(["nobody"]), ff.ForgetRequest("u0", fisher))
    with same_everywhere(ff.DagError, r"the inheritance graph has a cycle: "):
        planned(dag([f"u{(rank() + 1) % world()}"]), ff.ForgetRequest("u0", fisher))
    with same_everywhere(ff.ArgumentError, "no forget requests on any rank"):
        planned(dag())
    with same_everywhere(ff.ArgumentError, r"^alpha is 2.0 on rank 0 and 3.0 on rank 1"):
        planned(dag(), ff.ForgetRequest("u0", fisher), alpha=2.0 + rank())
    made = dag(below)
    if rank() == 1:
        made[f"u{rank()}"].fisher = ff.Fisher(torch.ones(2), ff.Layout({"w": (2,)}))
    before = made[f"u{rank()}"].model["w"].clone()
    with same_everywhere(ff.LayoutError, r"^rank 1: node 'u1': the forget Fisher of request 0 .* does not fit"):
        planned(made, ff.ForgetRequest("u0", fisher))
    assert torch.equal(made[f"u{rank()}"].model["w"], before)
    with pytest.raises(ff.DagError, match="exists already"):
        made.add_model(f"u{rank()}", *small(rank()))


@on(4)
def ten_thousand_nodes(folder: Path) -> None:
    """Against whole columns of numbers: m is the largest F of all origins above a node."""
    nodes, numel, origins = 10_000, 4, (0, 7, 100)
    dice = torch.Generator().manual_seed(9)
    theta, original = torch.randn(nodes, numel, generator=dice), torch.rand(nodes, numel, generator=dice)
    forget = torch.rand(len(origins), numel, generator=dice) * 3
    parents = (np.arange(nodes) - 1) // 2
    reached = np.zeros((nodes, len(origins)), dtype=bool)
    for i in range(nodes):
        reached[i] = reached[parents[i]] if i else False
        reached[i] |= np.array(origins) == i
    mask = torch.from_numpy(reached)
    merged = torch.where(mask[:, :, None], forget, 0.0).amax(1)
    chosen = (merged > original * 2.0) & mask.any(1)[:, None]
    expected = torch.where(chosen, theta * torch.clamp(original / merged, max=1), theta)
    layout = ff.Layout({"w": (numel,)})
    mine = range(rank(), nodes, world())
    rows = theta[rank() :: world()].clone()
    dag = ff.distributed.InheritanceDAG()
    begun = time.monotonic()
    for i, row in zip(mine, rows, strict=True):
        dag.add_model(f"u{i}", {"w": row}, ff.Fisher(original[i], layout), parents=[f"u{parents[i]}"] if i else [])
    requests = [ff.ForgetRequest(f"u{k}", ff.Fisher(forget[n], layout)) for n, k in enumerate(origins)]
    plan = ff.distributed.plan(dag, [one for n, one in enumerate(requests) if n % 4 == rank()], alpha=2.0)
    report = plan.run_()
    assert torch.equal(rows, expected[rank() :: world()])
    assert report.selected == int(chosen.sum())
    assert report.numel == numel * int(mask.any(1).sum())
    assert time.monotonic() - begun < 60, "seconds, on a machine that has the time"


# ---- files -----------------------------------------------------------------------------------------------------------


@on(2, 3, 4)
def saved_by_some_ranks_and_loaded_by_others(folder: Path) -> None:
    original, _ = fishers(net())
    clean = ff.Fisher(original.buffer.nan_to_num(1.0), original.layout, ff.Provenance("batch", 3, 12, {"cube": "so"}))
    for name, spread in (("fsdp", fsdp), ("tp", tensor_parallel)):
        model = spread(net())
        layout = ff.Layout.from_module(model)
        ff.distributed.save(clean.part(layout), folder / f"{name}-{world()}")
        for other in range(2, world() + 1):
            for path in filter(Path.is_dir, (folder / f"{name}-{other}", folder / f"fsdp-{other}")):
                found = ff.distributed.load(path, model)
                assert found.layout == layout
                assert torch.equal(found.buffer, clean.part(layout).buffer)
                assert (found.provenance, found.provenance.how) == (clean.provenance, {"cube": "so"})
    whole_again = ff.distributed.load(folder / f"tp-{world()}", net())
    assert torch.equal(whole_again.buffer, clean.buffer)
    with same_everywhere(ff.ArgumentError, "is not a new or empty folder"):
        ff.distributed.save(clean, folder / f"tp-{world()}")
    with same_everywhere(ff.LayoutError, "another layout than expected"):
        ff.distributed.load(folder / f"tp-{world()}", nn.Linear(2, 2))
    with same_everywhere(ff.FisherFileError, "not a Fisher that ranks have saved"):
        ff.distributed.load(folder / "nowhere", net())
    damaged = folder / f"damaged-{world()}"
    ff.distributed.save(clean, damaged)
    if rank() == 0:
        for path in damaged.glob("*.distcp"):
            os.truncate(path, 10)
    dist.barrier()
    with pytest.raises(ff.FisherFileError, match="not read"):
        ff.distributed.load(damaged, net())


# ---- the page --------------------------------------------------------------------------------------------------------


@on(2)
def every_example_of_the_page_runs(folder: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    text = page.read_text(encoding="utf-8")
    found = list(re.finditer(r"^```python3\n((?:.*\n)*?)```", text, re.MULTILINE))
    assert len(found) >= 4
    names: dict = {"__name__": "__main__"}
    (folder / "page").mkdir(exist_ok=True)
    os.chdir(folder / "page")
    for match in found:
        block = "\n" * text[: match.start(1)].count("\n") + match[1]
        exec(compile(block, str(page), "exec"), names)
