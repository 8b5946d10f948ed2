"""The cpu backend's loops over many lines of random bits, on every instruction set, against the rule written in torch.

And what a thread's own settings must not change: flushed subnormal numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fiun_fast.kernels import cpu
from fiun_fast.kernels.table import BINS, Dampening, Group, Merging, Table

REASON = cpu.BACKEND.why_not("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend cpu: {REASON}")
ISAS = [isa for isa, usable in cpu.isas().items() if usable] if REASON is None else []

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
F32, F64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
MILLION_LINES = 16 << 20  # elements of a million lines of float32
ALPHA, LAM, CAP = 1.25, 0.75, 0.9


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def any_bits(numel: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bits at all: NaN of both signs, infinities, subnormal numbers, both zeros."""
    words = (numel * dtype.itemsize // 8 + 1) * 2
    found = torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, generator=generator)
    return found.view(dtype)[:numel].clone()


def fishers(numel: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """I and m: mostly near one another, with ties; every fifth line or so has bits of any kind, sign included."""
    original = any_bits(numel, dtype, generator)
    merged = any_bits(numel, dtype, generator)
    line = torch.randint(8, (numel // 16 + 1,), dtype=torch.int8, generator=generator).repeat_interleave(16)[:numel]
    factor = torch.tensor([2.0, 0.5, ALPHA, 1.0, float("inf"), 0.0, 1.0, 1.0], dtype=dtype)[line.long()]
    positive = original.abs()
    original = torch.where(line < 6, positive, original)
    return original, torch.where(line < 6, positive * factor, merged)


def textbook(theta: torch.Tensor, original: torch.Tensor, merged: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """What a dampening leaves, and what it counts; operation by operation in the Fishers' dtype."""
    chosen = merged > original * ALPHA
    factor = (original * LAM / merged).clamp(max=CAP)
    factor[merged.isinf()] = 0
    wide = F32 if theta.dtype in (BF16, FP16) else torch.promote_types(theta.dtype, factor.dtype)
    damped = (theta.to(wide) * factor.to(wide)).to(theta.dtype)
    nonfinite = ~(original.isfinite() & merged.isfinite())
    counts = [int(chosen.sum()), int((chosen & (damped == 0)).sum()), int(nonfinite.sum())]
    return torch.where(chosen, damped, theta), counts


def table(thetas: list[torch.Tensor], originals: list[torch.Tensor], forgets: list[torch.Tensor]) -> Table:
    """One group of nodes with one parameter."""
    nodes = np.arange(len(thetas))
    zeros = np.zeros((len(forgets), 1), dtype=np.int64)
    group = Group(
        ("w",),
        np.array([thetas[0].numel()]),
        forgets,
        zeros,
        (1.0,) * len(forgets),
        originals,
        zeros[0],
        nodes,
        [[theta] for theta in thetas],
        np.array([[theta.data_ptr()] for theta in thetas]),
    )
    return Table.pack(torch.device("cpu"), thetas[0].dtype, originals[0].dtype, [group])


def dampen(
    thetas: list[torch.Tensor], originals: list[torch.Tensor], forgets: list[torch.Tensor], dry_run: bool = False
):
    numbers = Dampening(np.full(len(thetas), ALPHA), np.full(len(thetas), LAM), 1.0, CAP)
    counts = torch.zeros(len(thetas), 3, dtype=torch.int64)
    cpu.BACKEND.dampen(table(thetas, originals, forgets), Merging(), numbers).run(counts, dry_run)
    return counts.tolist()


@pytest.mark.parametrize(
    ("theta", "fisher", "numel"),
    [
        (F32, F32, MILLION_LINES),
        *((theta, fisher, 100_003) for theta in (F64, BF16, FP16) for fisher in (F32, F64)),
        (F32, F64, 100_003),
    ],
)
def test_lines_of_any_bits(theta, fisher, numel, monkeypatch):
    generator = torch.Generator().manual_seed(numel)
    original, merged = fishers(numel, fisher, generator)
    values = any_bits(numel + 3, theta, generator)[3:]  # a line begins somewhere inside
    expected, counts = textbook(values, original, merged)
    for isa in ISAS:
        monkeypatch.setenv(cpu.ISA_ENVIRONMENT, isa)
        found = torch.empty(numel + 3, dtype=theta)[3:].copy_(values)
        assert dampen([found], [original], [merged], dry_run=True) == [counts]
        assert torch.equal(bits_of(found), bits_of(values))
        assert dampen([found], [original], [merged]) == [counts]
        right = (bits_of(found) == bits_of(expected)) | (found.isnan() & expected.isnan() & (merged > original * ALPHA))
        assert right.all(), isa


@pytest.mark.parametrize("shift", [0, 1])
def test_nodes_side_by_side_are_as_each_alone(shift, monkeypatch):
    """Nodes that lie alike within their lines share a loop, others do not; rows of all lengths about a line's."""
    generator = torch.Generator().manual_seed(3)
    for numel in [*range(1, 70), 1009, 4999]:
        original, merged = fishers(numel, F32, generator)
        memory = torch.zeros(7, numel + 64)
        where = [(-row.data_ptr() // 4 % 16 + shift * i) for i, row in enumerate(memory)]
        values = any_bits(numel, F32, generator)
        expected, counts = textbook(values, original, merged)
        for isa in ISAS:
            monkeypatch.setenv(cpu.ISA_ENVIRONMENT, isa)
            thetas = [row[at : at + numel].copy_(values) for row, at in zip(memory, where, strict=True)]
            assert dampen(thetas, [original] * 7, [merged]) == [counts] * 7
            for theta in thetas:
                assert torch.equal(theta.nan_to_num(7.0), expected.nan_to_num(7.0)), (numel, isa)


def tiny_work(dtype: torch.dtype) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """Everything that the backend computes, from and to subnormal numbers: what runs it, and where results will be."""
    generator = torch.Generator().manual_seed(11)
    tiny = torch.finfo(dtype).tiny
    one, two, theta, gradient = (torch.rand(70_001, dtype=dtype, generator=generator) * tiny for _ in range(4))
    root = torch.rand(70_001, dtype=dtype, generator=generator) * tiny**0.5  # whose squares are subnormal
    merged, squares, sizes, counts = torch.empty_like(one), torch.zeros_like(one), one.clone(), torch.zeros(1, 3).long()
    bins = torch.zeros(1, BINS, dtype=torch.int64)
    work = table([theta], [one], [two])

    def run() -> None:
        cpu.BACKEND.merge([one, two], [1.0, 0.5], Merging("sum", 0.25), merged)
        cpu.BACKEND.accumulate([root], [squares], 2, False)
        cpu.BACKEND.accumulate([gradient], [sizes], 1, False)
        cpu.BACKEND.histogram(work, Merging()).run(bins, np.zeros(1, dtype=np.int64), 20 if dtype == F32 else 52, True)
        numbers = Dampening(np.full(1, ALPHA), np.full(1, LAM), 1.0, CAP)
        cpu.BACKEND.dampen(work, Merging(), numbers).run(counts)

    return run, [merged, squares, sizes, bins, theta, counts]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_subnormal_numbers_are_kept_whatever_the_caller_has_set(dtype, isa, threads, monkeypatch):
    monkeypatch.setenv(cpu.ISA_ENVIRONMENT, isa)
    threads(2)
    run, expected = tiny_work(dtype)
    run()
    flushed, found = tiny_work(dtype)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        flushed()
        kept = bool(torch.full((4,), torch.finfo(dtype).tiny, dtype=dtype).mul(0.5).eq(0).all())
    finally:
        torch.set_flush_denormal(False)
    assert kept, "the caller's own setting was lost"
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    for part in expected[:3]:
        assert 0 < float(part[part > 0].min()) < torch.finfo(dtype).tiny, "nothing was subnormal"
