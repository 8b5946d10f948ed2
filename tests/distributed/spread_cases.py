"""What each rank of `spread_work.py` runs, at the same time as all others, and asserts.

pytest does not import it, nor the `FILES` that the cases are in. A case takes the folder that the ranks share,
and says on how many ranks it runs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from spread_models import assert_same_bits
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import fiun_fast as ff

FILES = ("spread_bits", "spread_errors", "spread_estimates", "spread_choices", "spread_dags")
CASES: dict[str, tuple[Callable[[Path], None], tuple[int, ...]]] = {}


def on(*worlds: int):
    def case(run):
        CASES[run.__name__] = run, worlds
        return run

    return case


def cases(world: int) -> dict[str, Callable[[Path], None]]:
    """Name -> case, the last one being the one in which a rank dies."""
    for name in FILES:
        importlib.import_module(name)
    every = {name: run for name, (run, worlds) in CASES.items() if world in worlds}
    last = {name: every.pop(name) for name in ("a_rank_dies",) if name in every}
    return every | last


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


@contextmanager
def same_everywhere(error: type[Exception], message: str):
    """All ranks raise it, with the same words."""
    with pytest.raises(error, match=message) as caught:
        yield
    said = [None] * world()
    dist.all_gather_object(said, str(caught.value))
    assert len(set(said)) == 1, said


@contextmanager
def calls_counted():
    """How often what communicates is called: all of torch.distributed's functions that do, and the functional ones."""
    called: dict[str, int] = {}

    def counting(name, function):
        def count(*args, **kwargs):
            called[name] = called.get(name, 0) + 1
            return function(*args, **kwargs)

        return count

    names = [
        name
        for name in dir(dist)
        if re.match("(all_|reduce|broadcast|gather|scatter|barrier|send|recv|isend|irecv|batch_isend|monitored)", name)
    ]
    replaced = {n: counting(n, getattr(dist, n)) for n in names if callable(getattr(dist, n))}
    with mock.patch.multiple(dist, **replaced), CommDebugMode() as mode:
        yield called
    if mode.get_total_counts() > sum(called.values()):
        called["functional"] = mode.get_total_counts()


def data(seed: int, batches: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dice = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 5, generator=dice), torch.randint(3, (size,), generator=dice)) for _ in range(batches)]


def assert_same_bits_after_resharding(model: nn.Module, expected: nn.Module) -> None:
    ff.Layout.from_module(model)
    assert_same_bits(model, expected)
