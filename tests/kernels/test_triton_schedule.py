"""How the Triton backend cuts a work table into tiles, and the bytes that its kernels then really move."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fiun_fast as ff
from fiun_fast.kernels import load
from fiun_fast.kernels import triton_host as host
from fiun_fast.kernels.schedule import bytes_moved, cut
from fiun_fast.kernels.table import Dampening, Merging, Table
from fiun_fast.kernels.triton_backend import TritonLaunch

pytest.importorskip("triton", reason="Triton is not installed")
backend = load("triton")
START, LENGTH, FIRST_SOURCE, SOURCES, FIRST_TARGET, TARGETS, ALIGNED = range(7)
HOW = Dampening(np.full(6, 10.0), np.ones(6))  # of every plan here
SIZE = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}


def table_of(rows, sources, targets, theta=torch.float32, fisher=torch.float32) -> Table:
    """A table of addresses that nothing lies at."""
    return Table(torch.device("cpu"), theta, fisher, [], rows, sources, np.ones(len(sources)), targets)


@st.composite
def tables(draw) -> Table:
    theta, fisher = draw(st.sampled_from([*SIZE, None])), draw(st.sampled_from([torch.float32, torch.float64]))
    groups = draw(
        st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 4), st.integers(1, 30)), min_size=1, max_size=6)
    )
    shift = draw(st.integers(0, 8))  # the same for all: then the head alone is unaligned
    crooked = draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, sources, targets = [], [], []

    def place(size: int) -> int:
        return int(random.integers(1, 1000)) * 4096 + (int(random.integers(9)) if crooked else shift) * size

    for length, k, n in groups:
        rows.append((length, len(sources), k, len(targets), n))
        sources += [place(SIZE[fisher]) for _ in range(k)]
        targets += [(place(SIZE[theta]) if theta else 0, place(SIZE[fisher]), i) for i in range(n)]
    return table_of(*(np.array(x, dtype=np.int64) for x in (rows, sources, targets)), theta, fisher)


def program_tiles(table: Table, programs: int, block: int) -> np.ndarray:
    """As the kernels read them."""
    dtypes = (table.fisher_dtype, table.theta_dtype or table.fisher_dtype)
    return host.columns(cut(table, host.grain(block, programs, *dtypes)))


@settings(max_examples=200, deadline=None)
@given(table=tables(), programs=st.integers(1, 500), block=st.sampled_from([16, 64, 1024]))
def test_every_element_of_every_node_lies_in_exactly_one_tile(table, programs, block):
    tiles = program_tiles(table, programs, block)
    vector = host.vector_width(table.theta_dtype or table.fisher_dtype, table.fisher_dtype)
    assert tiles.dtype == np.int64
    covered = {}
    owner = {int(s): r for r, (_, s, _, _, _) in enumerate(table.rows)}
    for start, length, source, k, target, n, aligned in tiles.tolist():
        row = table.rows[owner[source]]
        assert 0 < length <= block
        assert n > 0
        assert k == row[SOURCES - 1]
        assert row[3] <= target < target + n <= row[3] + row[4]
        for t in range(target, target + n):
            covered.setdefault(t, []).append((start, start + length))
        if aligned:
            assert length % vector == 0
            addresses = [table.sources[s] + start * SIZE[table.fisher_dtype] for s in range(source, source + k)]
            for t in range(target, target + n):
                if table.theta_dtype is not None:
                    addresses.append(table.targets[t, 0] + start * SIZE[table.theta_dtype])
                addresses.append(table.targets[t, 1] + start * SIZE[table.fisher_dtype])
            assert all(a % 16 == 0 for a in addresses)
    for length, _, _, first, n in table.rows.tolist():
        for t in range(first, first + n):
            pieces = sorted(covered[t])
            assert pieces[0][0] == 0
            assert pieces[-1][1] == length
            assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))


def test_what_can_be_aligned_is():
    """One head tile, then aligned ones, where all tensors of a row miss 16 bytes by the same number of elements."""
    rows = np.array([[10_000, 0, 2, 0, 2]])
    for shift in range(4):
        base = np.array([1, 2, 3, 4, 5, 6]) * 1_000_000 * 16 + 4 * shift
        targets = np.stack([base[:2], base[2:4], np.arange(2)], axis=1)
        tiles = program_tiles(table_of(rows, base[4:], targets), 1, 1024)
        unaligned = int(tiles[tiles[:, ALIGNED] == 0, LENGTH].sum())
        assert unaligned <= (0 if shift == 0 else 2 * 1024)
        assert len(tiles) <= 11
    targets[0, 0] += 4  # one tensor of the row is out of step with the others
    assert not program_tiles(table_of(rows, base[4:], targets), 1, 1024)[:, ALIGNED].any()


def test_nodes_are_split_until_the_device_is_full_and_no_further():
    def tiles(length, n, programs):
        targets = np.stack([np.arange(1, n + 1) * 16 << 20, np.arange(1, n + 1) * 16 << 40, np.arange(n)], axis=1)
        return program_tiles(
            table_of(np.array([[length, 0, 3, 0, n]]), np.array([16, 32, 48]) << 50, targets), programs, 2048
        )

    whole = tiles(11_000_000, 16, 660)  # enough chunks: F is merged once a group but where a share of the work ends
    assert whole[whole[:, TARGETS] == 16, LENGTH].sum() > 0.7 * 11_000_000
    heads = tiles(51_300, 1000, 660)  # 26 chunks: their nodes are shared out
    assert 2 * 660 <= len(heads) <= 4 * 660
    assert len(tiles(5_130, 10, 660)) == 3 * 10  # never less than a node


def test_one_large_group_does_not_keep_a_small_one_in_a_single_tile():
    n = 20_000
    count = n + 1
    targets = np.stack([np.arange(1, count + 1) * 4096, np.arange(1, count + 1) << 40, np.arange(count)], axis=1)
    rows = np.array([[10_000_000, 0, 1, 0, 1], [2048, 1, 1, 1, n]])
    tiles = program_tiles(table_of(rows, np.array([1 << 50, 1 << 51]), targets), 660, 2048)
    assert tiles[:, TARGETS].max() <= 20  # 24,883 chunks of one node over 660 programs, two or more each


def test_offsets_beyond_32_bits():
    rows = np.array([[6_000_000_000, 0, 1, 0, 1]])
    tiles = program_tiles(table_of(rows, np.array([1 << 44]), np.array([[1 << 45, 1 << 46, 0]])), 1, 1 << 20)
    assert tiles[-1, START] + tiles[-1, LENGTH] == 6_000_000_000
    assert tiles[:, LENGTH].sum() == 6_000_000_000


# ------------------------------------------------------------------------------- bytes, counted while kernels run
@pytest.fixture
def traffic(monkeypatch):
    """Bytes loaded and stored by interpreted kernels, by (kind, tensor); `watch` names the tensors."""
    if backend.why_not("cpu"):
        pytest.skip(f"backend triton: {backend.why_not('cpu')}")
    from triton.runtime.interpreter import InterpreterBuilder

    moved: Counter = Counter()
    ranges: list[tuple[int, int, str]] = []

    def note(kind, pointers, mask, size):
        at = pointers.data[mask.data.astype(bool)]
        for low, high, what in ranges:
            moved[kind, what] += int(((at >= low) & (at < high)).sum()) * size

    def wrap(name, kind, mask_at):
        original = getattr(InterpreterBuilder, name)

        def counted(self, pointers, *rest, **keywords):
            note(kind, pointers, rest[mask_at], pointers.get_element_ty().primitive_bitwidth // 8)
            return original(self, pointers, *rest, **keywords)

        monkeypatch.setattr(InterpreterBuilder, name, counted)

    wrap("create_masked_load", "load", 0)
    wrap("create_masked_store", "store", 1)

    def watch(what, tensors):
        ranges.extend((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), what) for t in tensors)

    return moved, watch


def fan(n, k, numel, forget, gradients=None):
    """A plan of N nodes that share K forget Fishers, and gradients if there are some, over a flat layout."""
    layout, generator = ff.Layout({"w": (numel,)}), torch.Generator().manual_seed(0)
    dag = ff.InheritanceDAG()
    models = [{"w": torch.randn(numel, generator=generator)} for _ in range(n)]
    originals = [ff.Fisher(torch.ones(numel), layout) for _ in range(n)]
    for i in range(n):
        dag.add_model(f"n{i}", models[i], fisher=originals[i], parents=["n0"] if i else [])
    beside = [None] * k if gradients is None else [ff.Gradient(gradient, layout) for gradient in gradients]
    requests = [ff.ForgetRequest("n0", ff.Fisher(forget.clone(), layout), gradient=beside[i]) for i in range(k)]
    plan = ff.plan(dag, requests, alpha=10.0, backend="triton")
    return plan, [m["w"] for m in models], [o.buffer for o in originals], [r.fisher.buffer for r in requests]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 3), (5, 1), (4, 3)])
def test_a_dense_run_moves_12_plus_4_k_over_n_bytes(traffic, n, k):
    moved, watch = traffic
    numel = 20_001
    plan, thetas, originals, forgets = fan(n, k, numel, torch.full((numel,), 50.0))
    watch("theta", thetas), watch("I", originals), watch("F", forgets)
    plan.run_()
    assert moved["load", "F"] == 4 * k * numel, "each byte of F once a group"
    assert moved["load", "I"] == moved["load", "theta"] == moved["store", "theta"] == 4 * n * numel
    total = sum(moved.values())
    assert total == (12 + 4 * k / n) * n * numel
    assert total == plan.traffic.total
    assert total == sum(bytes_moved(part.launch.tiles, part.table) for part in plan.parts)


def test_split_nodes_read_f_once_a_share(traffic):
    moved, watch = traffic
    plan, _, _, forgets = fan(6, 2, 3000, torch.full((3000,), 50.0))
    watch("F", forgets)
    launch = TritonLaunch(plan.parts[0].table, Merging(), HOW, workers=3)
    launch.run(torch.zeros(6, 3, dtype=torch.int64))
    assert moved["load", "F"] == 6 * 2 * 4 * 3000
    assert [tile["targets"] for tile in launch.tiles] == [1] * 6, "two tiles a worker"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_theta_moves_only_where_16_bytes_hold_something_selected(traffic, share):
    moved, watch = traffic
    numel, n = 40_000, 3
    selected = torch.rand(numel, generator=torch.Generator().manual_seed(1)) < share
    plan, thetas, originals, forgets = fan(n, 2, numel, torch.where(selected, 50.0, 0.0))
    watch("theta", thetas), watch("I", originals), watch("F", forgets)
    report = plan.run_()
    assert report["n0"].selected == int(selected.sum())
    touched = int(selected.view(-1, 4).any(1).sum())
    assert moved["load", "theta"] == moved["store", "theta"] == 16 * touched * n
    assert moved["load", "F"] == 2 * 4 * numel
    assert moved["load", "I"] == n * 4 * numel


def test_a_signed_run_reads_g_once_and_theta_where_something_is_above_the_threshold(traffic):
    moved, watch = traffic
    numel, n, k = 40_000, 3, 2
    generator = torch.Generator().manual_seed(2)
    above = torch.rand(numel, generator=generator) < 0.3
    gradients = [torch.randn(numel, generator=generator) for _ in range(k)]
    plan, thetas, originals, forgets = fan(n, k, numel, torch.where(above, 50.0, 0.0), gradients)
    watch("theta", thetas), watch("I", originals), watch("F", forgets), watch("g", gradients)
    selected = [above & ((gradients[0] + gradients[1]).sign() * theta.sign() == -1) for theta in thetas]
    report = plan.run_()
    assert [node.selected for node in report] == [int(one.sum()) for one in selected]
    assert moved["load", "g"] == moved["load", "F"] == k * 4 * numel
    assert moved["load", "I"] == n * 4 * numel
    assert moved["load", "theta"] == 16 * int(above.view(-1, 4).any(1).sum()) * n
    assert moved["store", "theta"] == sum(16 * int(one.view(-1, 4).any(1).sum()) for one in selected)


def test_a_dry_run_stores_nothing(traffic):
    moved, watch = traffic
    plan, thetas, _, _ = fan(2, 1, 5000, torch.full((5000,), 50.0))
    watch("theta", thetas)
    plan.run_(dry_run=True)
    assert moved["store", "theta"] == 0


@pytest.mark.parametrize("zero", [False, True])
def test_accumulation_moves_12_bytes_and_16_with_zeroing(traffic, zero):
    moved, watch = traffic
    gradients = [torch.randn(n) for n in (9000, 33, 4)]
    into = [torch.rand(n) for n in (9000, 33, 4)]
    watch("all", gradients + into)
    backend.accumulate(gradients, into, 2, zero)
    assert sum(moved.values()) == (16 if zero else 12) * 9037


def test_merging_moves_k_plus_1_values(traffic):
    moved, watch = traffic
    sources, out = [torch.rand(9001) for _ in range(5)], torch.empty(9001)
    watch("all", [*sources, out])
    backend.merge(sources, [1.0] * 5, Merging(), out)
    assert sum(moved.values()) == 4 * 6 * 9001


# ---------------------------------------------------------------------------------------------- what parity cannot see
def test_small_tiles_and_split_nodes_give_the_same_bits(monkeypatch):
    if backend.why_not("cpu"):
        pytest.skip(f"backend triton: {backend.why_not('cpu')}")
    results = []
    for block, programs in ((8192, 1), (64, 1), (64, 200), (512, 7)):
        monkeypatch.setattr(host, "INTERPRETED_BLOCK", block)
        values = torch.rand(1500, generator=torch.Generator().manual_seed(2)) * 30
        plan, thetas, _, _ = fan(3, 2, 1500, values)
        counts = torch.zeros(3, 3, dtype=torch.int64)
        TritonLaunch(plan.parts[0].table, Merging(), HOW, programs).run(counts)
        results.append((torch.stack(thetas), counts))
    for thetas, counts in results[1:]:
        assert torch.equal(thetas, results[0][0])
        assert torch.equal(counts, results[0][1])


def test_why_not_says_why(monkeypatch):
    assert "mps" in backend.why_not("mps")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in backend.why_not("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(host, "interpreted", lambda: False)
    assert backend.why_not("cpu") == "TRITON_INTERPRET was set after the kernels were imported; set it earlier"
    monkeypatch.setattr(host, "interpreted", lambda: 1 / 0)
    assert backend.why_not("cpu") == "Triton cannot be imported: ZeroDivisionError: division by zero"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.why_not("cuda") == "Triton is not installed (pip install triton)"


def test_why_not_names_what_the_gpu_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_not("cuda") == "torch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(host, "interpreted", lambda: True)
    assert "the interpreter cannot reach GPU memory" in backend.why_not("cuda")
    monkeypatch.setattr(host, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    host.why_no_driver.cache_clear()
    assert backend.why_not("cuda") == "the GPU has compute capability 7.5; Triton needs 8.0"
    host.why_no_driver.cache_clear()


def test_why_not_names_an_interpreter_that_does_not_go_with_numpy(monkeypatch):
    import triton

    monkeypatch.setattr(host, "interpreted", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    monkeypatch.setattr(np, "__version__", "2.4.1")
    assert "Triton 3.2.0 does not work with NumPy 2.4.1: install numpy<2.4" in backend.why_not("cpu")
    monkeypatch.setattr(np, "__version__", "2.3.5")
    assert backend.why_not("cpu") is None
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    monkeypatch.setattr(np, "__version__", "2.10.0")
    assert backend.why_not("cpu") is None


@pytest.mark.parametrize(
    ("version", "flushes"), [("3.2.0", True), ("3.5.1", True), ("3.6.0", False), ("3.10.0", False)]
)
def test_old_tritons_get_a_division_that_does_not_flush(monkeypatch, version, flushes):
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    host.division_flushes.cache_clear()
    monkeypatch.setattr(host, "interpreted", lambda: False)
    constants = {"MERGE": "max", "POWER": False}
    assert host.options("cuda", 90, constants)["FLUSHES"] is flushes
    assert host.options("hip", 0, constants)["FLUSHES"] is False
    monkeypatch.setattr(host, "interpreted", lambda: True)
    assert host.options("cuda", 90, constants)["FLUSHES"] is False
    assert "FLUSHES" not in host.options("cuda", 90, {"GRADIENT": "fp32"})
    host.division_flushes.cache_clear()


@pytest.mark.parametrize(
    ("target", "quick"),
    [(("cuda", 80), 1), (("cuda", 90), 1), (("cuda", 100), 2), (("cuda", 103), 2), (("cuda", 120), 1), (("hip", 0), 0)],
)
def test_two_numbers_in_an_instruction_where_the_gpu_has_that(monkeypatch, target, quick):
    constants = {"MERGE": "max", "POWER": False}
    assert host.options(*target, constants)["QUICK"] == (0 if host.interpreted() else quick)
    monkeypatch.setattr(host, "interpreted", lambda: False)
    assert host.options(*target, constants)["QUICK"] == quick
