"""The list of cases, and their sizes: "full", "quick" (under three minutes in all), "tiny" (shows that all runs)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import exact, fishers, whole
from .dampening import Network, head, resnet18
from .measure import Case

Make = Callable[[torch.device, str | None], Case]  # device, compiler (None: without torch.compile)


@dataclass(frozen=True)
class Size:
    """What a mode measures."""

    width: int  # of the ResNet-18s
    nodes: int  # case c
    heads: int  # case d
    many: int  # case e
    features: tuple[int, int]  # of the heads in d and e
    flat: int  # case f
    merged: tuple[int, ...]  # case h
    planned: tuple[int, ...]  # case i
    whole: int  # case j, ResNet-18s
    batch: int  # images in each of their mini-batches
    exact: tuple[int, int]  # case k: width of the network, images in a mini-batch
    scale_nodes: tuple[int, ...]
    scale_parameters: tuple[int, ...]


SIZES = {
    "full": Size(
        width=64,
        nodes=16,
        heads=1000,
        many=10_000,
        features=(512, 512),
        flat=100_000_000,
        merged=(2, 8, 32),
        planned=(1_000, 10_000, 100_000),
        whole=8,
        batch=16,
        exact=(32, 64),
        scale_nodes=(1, 10, 100, 1_000, 10_000),
        scale_parameters=(1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    ),
    "quick": Size(
        width=64,
        nodes=4,
        heads=200,
        many=2_000,
        features=(512, 512),
        flat=20_000_000,
        merged=(2, 8),
        planned=(10_000,),
        whole=2,
        batch=16,
        exact=(32, 64),
        scale_nodes=(),
        scale_parameters=(),
    ),
    "tiny": Size(
        width=2,
        nodes=5,
        heads=6,
        many=7,
        features=(16, 8),
        flat=10_001,
        merged=(2, 3),
        planned=(5, 40),
        whole=3,
        batch=2,
        exact=(2, 4),
        scale_nodes=(1, 3),
        scale_parameters=(100, 1_000),
    ),
}
FEW = ("naive", "ours")  # kinds that the scaling rows time


def listed(mode: str) -> dict[str, Make]:
    """Case name -> how to make it, in the order of the table."""
    return dict(_cases(SIZES[mode]))


def _cases(size: Size) -> Iterator[tuple[str, Make]]:
    def network(name, title, shapes, nodes, sources, pattern="half", dtype=torch.float32, only=None):
        def make(device: torch.device, compiler: str | None) -> Case:
            made = Network(shapes, nodes, sources, pattern, device, dtype)
            return made.case(name, title, only, compiler if only is None else None)

        return name, make

    resnet = resnet18(size.width)
    wide, narrow = head(size.features[0], 100), head(size.features[1], 10)
    yield network("a", "dampen one ResNet-18, half selected", resnet, 1, 1)
    yield network("a-all", "dampen one ResNet-18, all selected", resnet, 1, 1, "all")
    yield network("b-clustered", "dampen one ResNet-18, 1 % selected, in runs", resnet, 1, 1, "clustered")
    yield network("b-scattered", "dampen one ResNet-18, 1 % selected, anywhere", resnet, 1, 1, "scattered")
    yield network("c", f"dampen a DAG of {size.nodes} ResNet-18s, 3 requests", resnet, size.nodes, 3)
    yield network("d", f"dampen a DAG of {size.heads:,} heads of 51,300, 3 requests", wide, size.heads, 3)
    yield network("e", f"dampen a DAG of {size.many:,} heads of 5,130, 3 requests", narrow, size.many, 3)
    one = {"weight": (size.flat,)}
    yield network("f-fp32", f"dampen one flat model of {size.flat / 1e6:g} M, fp32", one, 1, 1)
    yield network("f-bf16", f"dampen one flat model of {size.flat / 1e6:g} M, bf16", one, 1, 1, dtype=torch.bfloat16)

    def fisher(make: Callable[..., Case], name: str, title: str, *arguments: object) -> tuple[str, Make]:
        return name, lambda device, compiler: make(name, title, resnet, device, *arguments)

    yield fisher(fishers.accumulate, "g", "accumulate g² of a ResNet-18", False)
    yield fisher(fishers.accumulate, "g-zero", "accumulate g² of a ResNet-18 and zero it", True)
    yield fisher(fishers.in_hooks, "g-hooks", "backward and accumulate, after it or in hooks")

    def planned(name: str, title: str, nodes: int) -> tuple[str, Make]:
        return name, lambda device, compiler: whole.compile_plan(name, title, nodes, device)

    demo, many = "end to end, the demo's 13 models", f"end to end, {size.whole} ResNet-18s"
    for k in size.merged:
        yield fisher(fishers.merge, f"h-{k}", f"merge {k} Fishers of a ResNet-18", k)

    for n in size.planned:
        yield planned(f"i-{n}", f"compile a plan for {n:,} nodes", n)
    yield "j-demo", lambda device, compiler: whole.demo("j-demo", demo, device, 2 * size.batch)
    yield (
        "j-resnet",
        lambda device, compiler: whole.resnets("j-resnet", many, device, size.whole, size.width, size.batch),
    )

    images = f"2 batches of {size.exact[1]} through a conv net"
    yield "k-sample", lambda device, compiler: exact.sample("k-sample", f"sample Fisher, {images}", device, *size.exact)
    yield "k-head", lambda device, compiler: exact.head("k-head", f"Fisher of the head, {images}", device, *size.exact)

    for n in size.scale_nodes:
        title = f"scaling: heads of 5,130, {n:,} nodes"
        yield network(f"nodes-{n}", title, narrow, n, 1, only=FEW)
    for n in size.scale_parameters:
        yield network(f"parameters-{n}", f"scaling: one model of {n:,}", {"weight": (n,)}, 1, 1, only=FEW)
