"""What only the cpu backend has: threads, instruction sets, fork, memory not to be touched, very large buffers."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import CASES, CHAIN, TILES, Case, build, textbook
from random_tables import work
from test_parity import same_bits

import fiun_fast as ff
from fiun_fast.kernels import cpu, extension
from fiun_fast.kernels.table import Merging

REASON = cpu.BACKEND.why_not("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"backend cpu: {REASON}")

WIDE = Case(
    "wide", {"root": (), **{f"child{i}": ("root",) for i in range(40)}}, ("root", "root", "child7"), shapes=TILES
)
MIXED = Case("mixed", CHAIN, ("a", "b"), shapes={"big": (300_001,), **{f"p{i}": (i,) for i in range(1, 65)}}, shift=1)


def outcome(case: Case) -> tuple[dict, list]:
    """State and counts after a run."""
    problem = build(case)
    nodes = problem.plan("cpu").run_().to_dict()["nodes"]
    return problem.state(), nodes


def assert_same(a: tuple[dict, list], b: tuple[dict, list]) -> None:
    assert a[1] == b[1]
    assert all(same_bits(t, b[0][key]) for key, t in a[0].items())


def script(body: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own, beside these tests."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests / "kernels"), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


# ---- any number of threads, any instruction set: the same bits -------------------------------------------------------


@pytest.fixture(params=["openmp", "pool"])
def team(request):
    """Threads of torch's OpenMP runtime, where it has one, and those of our own pool."""
    addresses = cpu.openmp_of_torch()
    if request.param == "openmp" and not all(addresses):
        pytest.skip("torch has brought no OpenMP runtime with GOMP_parallel")
    cpu.extension().use_openmp(*(addresses if request.param == "openmp" else (0, 0)))
    yield request.param
    cpu.extension().use_openmp(*addresses)


@pytest.mark.parametrize("case", [WIDE, MIXED, *(c for c in CASES if c.shapes is TILES)], ids=lambda case: case.id)
def test_threads_give_the_same_bits(case, threads, team):
    results = []
    for count in (1, 2, 7):
        threads(count)
        results.append(outcome(case))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("isa", [isa for isa, usable in cpu.isas().items() if usable] if REASON is None else [])
def test_instruction_sets_give_the_same_bits(isa, monkeypatch):
    expected = [outcome(case) for case in (*CASES, MIXED)]
    monkeypatch.setenv(cpu.ISA_ENVIRONMENT, isa)
    assert cpu.isa() == isa
    for case, wanted in zip((*CASES, MIXED), expected, strict=True):
        assert_same(outcome(case), wanted)


def test_baseline_is_always_there_and_an_unknown_instruction_set_is_an_error(monkeypatch):
    assert cpu.isas()["baseline"]
    monkeypatch.setenv(cpu.ISA_ENVIRONMENT, "sse9")
    with pytest.raises(ff.BackendError, match=r"sse9.*usable: .*baseline"):
        build(MIXED).plan("cpu").run_()


def test_merge_and_accumulate_do_not_depend_on_threads(threads, team):
    generator = torch.Generator().manual_seed(0)
    sources = [torch.rand(400_003, generator=generator) for _ in range(5)]
    gradients = [torch.randn(n, generator=generator) for n in (1, 250_001, 64, 64, 64, 150_000)]
    results = []
    for count in (1, 2, 7):
        threads(count)
        merged = torch.empty(400_003)
        cpu.BACKEND.merge(sources, [1.0, 0.5, 2.0, 1.0, 3.0], Merging("sum", 0.3), merged)
        into = [torch.ones(g.numel()) for g in gradients]
        cpu.BACKEND.accumulate(gradients, into, 2, False)
        results.append(torch.cat([merged, *into]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_denormals_are_kept_on_every_thread_whatever_the_caller_has_set(threads):
    case = Case("denormal", shapes={"w": (200_000,)}, values="edges", lam=0.5)
    threads(2)
    expected = outcome(case)
    problem = build(case)
    plan = problem.plan("cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        nodes = plan.run_().to_dict()["nodes"]
    finally:
        torch.set_flush_denormal(False)
    assert_same((problem.state(), nodes), expected)


def test_several_python_threads_at_once(threads, team):
    threads(2)
    expected = outcome(WIDE)
    with ThreadPoolExecutor(4) as executor:
        for result in executor.map(outcome, [WIDE] * 12):
            assert_same(result, expected)


# ---- fork ------------------------------------------------------------------------------------------------------------


# In the child only the kernels run on several threads: torch's own operations would wait for ever there.
PREPARE = """
    import os, warnings
    import torch
    from cases import build
    from test_cpu_backend import WIDE
    warnings.simplefilter("ignore")  # Python 3.12 warns of fork where there are threads; that is the point

    def prepare():
        problem = build(WIDE)
        return problem, problem.plan("cpu")

    def outcome(problem, plan):
        counts = [n["selected"] for n in plan.run_().to_dict()["nodes"]]
        return counts, [t.numpy().tobytes() for model in problem.models.values() for t in model.values()]

    torch.set_num_threads(2)
    prepared = [prepare() for _ in range(5)]
    expected = outcome(*prepared[0])  # the threads exist now
"""
FORK = """
    child = os.fork()
    if child == 0:
        right = outcome(*prepared[1]) == expected and outcome(*prepared[2]) == expected
        os._exit(17 if right else 18)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert outcome(*prepared[1]) == expected
"""
WORKERS = """
    from torch.utils.data import DataLoader, Dataset

    class Unlearned(Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            torch.set_num_threads(1 + index % 2)
            return outcome(*prepared[1 + index]) == expected

    loader = DataLoader(Unlearned(), batch_size=1, num_workers=2, multiprocessing_context="fork")
    assert [bool(right) for right in loader] == [True] * 4
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("body", [FORK, WORKERS], ids=["fork", "dataloader"])
def test_children_of_fork_can_run_it(body):
    done = script(PREPARE + body)
    assert done.returncode == 0, done.stderr


# ---- memory that must not be touched ---------------------------------------------------------------------------------


GUARDED = """
    import ctypes, mmap, sys
    import torch
    import fiun_fast as ff
    page, pages, marked = mmap.PAGESIZE, 64, (3, 40, 41)
    area = mmap.mmap(-1, page * pages)
    theta = torch.frombuffer(area, dtype=torch.float32)
    theta.fill_(2.0)
    original, forget = torch.ones(theta.numel()), torch.ones(theta.numel())
    for p in marked:
        forget[p * page // 4 + 5] = 4.0
    layout = ff.Layout({"w": theta.shape})
    dag = ff.InheritanceDAG()
    dag.add_model("a", {"w": theta}, fisher=ff.Fisher(original, layout))
    plan = ff.plan(dag, [ff.ForgetRequest("a", ff.Fisher(forget, layout))], alpha=2.0, backend="cpu")
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for p in set(range(pages)) - set(marked):
        assert protect(theta.data_ptr() + p * page, page, 0) == 0
    assert plan.run_().selected == len(marked)
    for p in set(range(pages)) - set(marked):
        assert protect(theta.data_ptr() + p * page, page, 3) == 0
    changed = torch.where(theta != 2.0)[0].tolist()
    assert changed == [p * page // 4 + 5 for p in marked], changed
    assert all(float(theta[i]) == 0.5 for i in changed)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_parameters_are_not_even_read_where_nothing_is_selected():
    done = script(GUARDED)  # a read would be a segmentation fault
    assert done.returncode == 0, (done.returncode, done.stderr)


def zero_pages(dtype: torch.dtype, numel: int) -> torch.Tensor:
    """Zeros that take no memory until they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="relies on Linux's shared zero page")
def test_more_than_two_to_the_31_elements():
    numel, tail = 2**31 + 1000, 77
    layout = ff.Layout({"big": (numel,), "tail": (tail,)})
    try:
        theta, fisher = zero_pages(torch.bfloat16, layout.numel), zero_pages(torch.float32, layout.numel)
    except OSError as error:
        pytest.skip(f"no address space for 13 GB of untouched zero pages: {error}")
    at = [0, 1, 2**31 - 1, 2**31, 2**31 + 999, numel, numel + tail - 1]
    theta[at] = 3.0
    fisher[at] = 1.0
    dag = ff.InheritanceDAG()
    shared = ff.Fisher(fisher, layout)  # original and forget Fisher at once: m = I, selected where it is above 0.5 I
    dag.add_model("a", layout.views(theta), fisher=shared)
    plan = ff.plan(dag, [ff.ForgetRequest("a", shared)], alpha=0.5, lam=0.5, backend="cpu")
    report = plan.run_()
    assert (report.numel, report.selected, report.zeroed) == (layout.numel, len(at), 0)
    assert theta[at].tolist() == [1.5] * len(at)
    near = [i + d for i in at for d in (-1, 1) if 0 <= i + d < layout.numel and i + d not in at]
    assert theta[near].tolist() == [0.0] * len(near)


# ---- what the textbook says, with everything at once -----------------------------------------------------------------


def test_thousands_of_nodes_count_correctly(threads):
    threads(2)
    names = [f"n{i}" for i in range(4_000)]
    case = Case("nodes", {"root": (), **dict.fromkeys(names, ("root",))}, ("root", "root"), shapes={"w": (37,)})
    problem = build(case)
    expected = textbook(build(case))
    report = problem.plan("cpu").run_()
    for node, counts in expected.counts.items():
        found = report[node]
        assert (found.selected, found.zeroed, found.nonfinite) == counts


# ---- where it cannot be used -----------------------------------------------------------------------------------------


def test_says_why_not(monkeypatch):
    assert "main memory" in str(cpu.BACKEND.why_not("cuda"))
    cpu.load.cache_clear()
    monkeypatch.setitem(sys.modules, "fiun_fast._cpu", None)
    try:
        reason = str(cpu.BACKEND.why_not("cpu"))
        assert "compiler" in reason
        assert "FIUN_FAST_CPU=1" in reason
        with pytest.raises(ff.BackendError, match="compiler"):
            build(CASES[0]).plan("cpu")
        assert build(CASES[0]).plan(None).run_().selected > 0  # the default is the reference then
    finally:
        cpu.load.cache_clear()


def test_dtypes_it_does_not_take_are_named():
    half = torch.ones(3, dtype=torch.float16)
    with pytest.raises(ff.DTypeError, match="float16"):
        cpu.BACKEND.merge([half], [1.0], Merging(), half)
    with pytest.raises(ff.DTypeError, match="one dtype"):
        cpu.BACKEND.merge([torch.ones(3), torch.ones(3, dtype=torch.float64)], [1.0, 1.0], Merging(), torch.ones(3))
    with pytest.raises(ff.DTypeError, match="int64"):
        cpu.BACKEND.accumulate([torch.ones(3, dtype=torch.int64)], [torch.ones(3)], 2, False)


# ---- the schedule is made once ---------------------------------------------------------------------------------------


def test_a_schedule_is_kept_until_the_number_of_threads_changes(threads):
    threads(2)
    problem = work([((0, 1), 2, (300_001, 5))], 2)
    launch, counts = cpu.BACKEND.dampen(problem.table, Merging(), problem.dampening()), problem.counts()
    first = launch.prepared
    assert first.threads == 2
    launch.run(counts, dry_run=True)
    launch.run(counts, dry_run=True)
    assert launch.prepared is first
    threads(1)
    again = problem.counts()
    launch.run(again, dry_run=True)
    assert launch.prepared is not first
    assert launch.prepared.threads == 1
    assert torch.equal(counts, 2 * again)


def test_several_python_threads_run_one_launch_at_once(threads, team):
    """Torch's number of threads is each Python thread's own: some of these make the schedule anew while others run."""
    threads(2)
    problem = work([((0, 1, 2), 3, (100_003, 64)), ((3,), 1, (7,) * 40)], 4)
    launch, once = cpu.BACKEND.dampen(problem.table, Merging(), problem.dampening()), problem.counts()
    launch.run(once, dry_run=True)

    def count(number: int) -> torch.Tensor:
        torch.set_num_threads(1 + number % 3)
        counts = problem.counts()
        for _ in range(5):
            launch.run(counts, dry_run=True)
        return counts

    with ThreadPoolExecutor(4) as executor:
        assert all(torch.equal(counts, 5 * once) for counts in executor.map(count, range(24)))


def test_an_extension_that_does_not_load_says_so(monkeypatch):
    def broken(name):
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(extension.importlib, "import_module", broken)
    assert extension.load("_cpu", "its C++ extension", "not built") == (
        "its C++ extension does not load: fiun_fast._cpu: undefined symbol"
    )
