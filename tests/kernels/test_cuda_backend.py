"""The `cuda` backend where there is no GPU: when it can run, how it cuts the work, what it moves, how it fails.

Its kernels run as plain C++ on tests/cuda_shim; tests/kernels/test_parity.py has their results.
"""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import shim
import torch
from cases import Case, build, textbook
from hypothesis import given, settings
from hypothesis import strategies as st

import fiun_fast as ff
from fiun_fast import doctor, kernels
from fiun_fast.kernels import cuda
from fiun_fast.kernels.extension import KINDS
from fiun_fast.kernels.schedule import TILE, cut
from fiun_fast.kernels.table import Merging, Table

SIZE = {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2}
on_shim = pytest.mark.skipif(shim.why_not() is not None, reason=f"CUDA kernels on the CPU: {shim.why_not()}")


# ---- where it can run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "inside", "runs"),
    [
        (80, ["80"], True),
        (86, ["80"], True),  # a later minor version of the same major one
        (80, ["86"], False),
        (90, ["80", "86"], False),  # machine code does not cross major versions
        (90, ["80+PTX"], True),
        (120, ["80", "90", "90+PTX"], True),
        (75, ["80", "80+PTX"], False),
        (103, ["100"], True),
    ],
)
def test_which_gpu_runs_which_code(capability, inside, runs):
    assert cuda.runs_on(capability, inside) is runs


def test_a_driver_older_than_the_toolkit_takes_machine_code_only():
    assert cuda.runs_on(90, ["90"], ptx=False)
    assert not cuda.runs_on(90, ["80+PTX"], ptx=False)


@pytest.fixture
def pretend(monkeypatch):
    """An extension, a driver and a torch that are not here."""

    def made(driver=13000, needed=13000, inside="80,90,90+PTX", found=(90,), torch_cuda="13.0", error=None, hip=None):
        def capabilities():
            if error:
                raise RuntimeError(error)
            return list(found)

        extension = SimpleNamespace(
            architectures=inside, toolkit_version=needed, driver_version=lambda: driver, capabilities=capabilities
        )
        monkeypatch.setattr(cuda.BACKEND, "extension", cuda.CudaExtension("cuda", lambda: extension))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(torch_cuda and found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU of {found[i]}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: divmod(found[i], 10))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=f"GPU of {found[i]}"))

    return made


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"driver": 0}, "no NVIDIA driver is installed"),
        ({"driver": 12040}, r"the driver is for CUDA 12.4; .* built with CUDA 13.0, which needs driver 580 or newer"),
        ({"hip": "6.2"}, "this torch is built for AMD GPUs"),
        ({"torch_cuda": None}, "this torch is built without CUDA"),
        ({"found": ()}, "torch finds no GPU"),
        ({"found": (75,)}, r"it has code for 80, 90, 90\+PTX, and none that runs on compute capability 7.5"),
        ({"found": (120,), "needed": 13020}, r"none that .* 12.0 by a driver for CUDA 13.0, which takes no newer PTX"),
        ({"error": "cudaGetDeviceCount failed: …"}, "cudaGetDeviceCount failed"),
    ],
)
def test_why_it_cannot_run_here(pretend, machine, reason):
    pretend(**machine)
    assert re.search(reason, cuda.BACKEND.why_not("cuda")), cuda.BACKEND.why_not("cuda")
    assert cuda.BACKEND.why_not("cpu") == "it works on tensors in GPU memory only"
    with pytest.raises(ff.BackendError, match=reason):
        kernels.select("cuda", "cuda")
    assert doctor.examine()["CUDA extension"]["runs here"] == f"no: {cuda.BACKEND.why_not('cuda')}"


@pytest.mark.parametrize("built", [True, False])
def test_doctor_says_what_works_on_an_amd_gpu(pretend, monkeypatch, built):
    pretend(hip="6.4", found=(94,))
    if not built:
        extension = cuda.CudaExtension("cuda", lambda: "its extension was not built: install the CUDA toolkit")
        monkeypatch.setattr(cuda.BACKEND, "extension", extension)
    gpus = [("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", 64), ("AMD Radeon PRO W7900", "gfx1100", 32)]
    seen = [SimpleNamespace(name=name, gcnArchName=arch, warp_size=lanes) for name, arch, lanes in gpus]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: seen[i].name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", seen.__getitem__)
    for reason, said in (
        (None, "works; inspected for gfx942, gfx950, not run by us"),
        ("no compiler", "no: no compiler"),
    ):
        monkeypatch.setattr(kernels.load("triton"), "why_not", lambda kind, why=reason: why if kind == "cuda" else "no")
        found = doctor.examine()
        assert found["AMD GPUs"] == {
            "ROCm": "6.4",
            "GPU 0": "AMD Instinct MI300X, gfx942, 64 lanes a wavefront",
            "GPU 1": "AMD Radeon PRO W7900, gfx1100, 32 lanes a wavefront; its kernels were compiled for others only",
            "triton": said,
            "estimators, cpu, reference": "work as anywhere: plain torch, and the CPU",
        }
        assert found["CUDA extension"] == {"runs here": f"no: {cuda.AMD}"}
        assert found["backends"]["cuda"] == f"no: {cuda.AMD}"
        assert (found["used by default"]["for cuda tensors"] == "triton") == (reason is None)


def test_doctor_shows_what_is_inside_and_what_runs_it(pretend):
    pretend(found=(90, 75, 120))
    assert cuda.BACKEND.why_not("cuda") is None
    findings = doctor.examine()["CUDA extension"]
    assert findings["driver here"].endswith("for CUDA up to 13.0")
    del findings["driver here"]
    assert findings == {
        "machine code for": "sm_80, sm_90",
        "PTX for": "compute_90",
        "built with": "CUDA 13.0, which needs driver 580 or newer",
        "GPU 0": "GPU of 90, compute capability 9.0",
        "GPU 1": "GPU of 75, compute capability 7.5, which none of this runs on",
        "GPU 2": "GPU of 120, compute capability 12.0",
        "runs here": "yes",
    }


def test_doctor_says_so_where_the_extension_is_missing(monkeypatch):
    missing = cuda.CudaExtension("cuda", lambda: "its extension was not built, because nvcc was not there")
    monkeypatch.setattr(cuda.BACKEND, "extension", missing)
    assert doctor.examine()["CUDA extension"] == {
        "runs here": "no: backend 'cuda' cannot be used: its extension was not built, because nvcc was not there"
    }


# ---- how it cuts the work -------------------------------------------------------------------------------------------


@st.composite
def tables(draw) -> Table:
    """Addresses that nothing lies at: rows whose tensors agree on the distance from 16 bytes, and others."""
    theta, fisher = draw(st.sampled_from([*SIZE, None])), draw(st.sampled_from([torch.float32, torch.float64]))
    shape = st.tuples(st.integers(1, 5000), st.integers(1, 4), st.integers(1, 40))
    shift, crooked = draw(st.integers(0, 8)), draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, sources, targets = [], [], []

    def place(size: int) -> int:
        return int(random.integers(1, 1000)) * 4096 + (int(random.integers(9)) if crooked else shift) * size

    for length, k, n in draw(st.lists(shape, min_size=1, max_size=6)):
        rows.append((length, len(sources), k, len(targets), n))
        sources += [place(SIZE[fisher]) for _ in range(k)]
        targets += [(place(SIZE[theta]) if theta else 0, place(SIZE[fisher]), i) for i in range(n)]
    arrays = [np.array(x, dtype=np.int64) for x in (rows, sources, targets)]
    return Table(torch.device("cpu"), theta, fisher, [], arrays[0], arrays[1], np.ones(len(sources)), arrays[2])


@on_shim
@settings(max_examples=25, deadline=None)
@given(table=tables(), warps=st.sampled_from([1, 16, 500, 10_000]))
def test_every_element_of_every_node_lies_in_exactly_one_tile(table, warps):
    extension = shim.backend().extension.module()
    kinds = (KINDS[table.theta_dtype or table.fisher_dtype], KINDS[table.fisher_dtype])
    grain = cuda.grain(extension, *kinds, extension.tile_targets, warps)
    unit = grain.unit
    covered: dict[int, list[tuple[int, int]]] = {}
    owner = {int(row[1]): row for row in table.rows}
    for tile in cut(table, grain):
        row = owner[int(tile["first_source"])]
        first, last = int(tile["first_target"]), int(tile["first_target"] + tile["targets"])
        start, length = int(tile["start"]), int(tile["length"])
        assert length > 0
        assert tile["sources"] == row[2]
        assert row[3] <= first < last <= row[3] + row[4]
        assert last - first <= extension.tile_targets
        for target in range(first, last):
            covered.setdefault(target, []).append((start, start + length))
        if tile["vector"]:
            assert length % unit == 0
            wide = {kind: min(16, unit * size) for kind, size in SIZE.items()}
            sources = table.sources[tile["first_source"] : tile["first_source"] + tile["sources"]]
            thetas, originals, _ = table.targets[first:last].T
            if table.theta_dtype is not None:
                assert ((thetas + start * SIZE[table.theta_dtype]) % wide[table.theta_dtype] == 0).all()
            for addresses in (sources, originals):
                assert ((addresses + start * SIZE[table.fisher_dtype]) % wide[table.fisher_dtype] == 0).all()
    for length, _, _, first, n in table.rows.tolist():
        for target in range(first, first + n):
            pieces = sorted(covered[target])
            assert (pieces[0][0], pieces[-1][1]) == (0, length)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))


# ---- what it moves --------------------------------------------------------------------------------------------------


@pytest.fixture
def known():
    """The kernels on the CPU are one of the backends."""
    with shim.registered():
        yield


@on_shim
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.usefixtures("known")
def test_bytes_moved_are_those_of_the_cost_model(nodes, selected):
    """4 (K + N) a parameter where nothing is selected, 8 N more where all is; all of it in 16-byte accesses."""
    names = [f"n{i}" for i in range(nodes)]
    parents = {name: tuple(names[:i][-1:]) for i, name in enumerate(names)}
    n = 1 << 16
    case = Case("bytes", parents, ("n0", "n0"), shapes={"p": (n,)}, alpha=0.0 if selected else 1e30)
    plan = build(case).plan(shim.NAME)
    shim.take_traffic()
    report = plan.run_()
    traffic = shim.take_traffic()
    assert report.selected == (n * nodes if selected else 0)
    loaded, stored = 4 * n * (2 + nodes * (2 if selected else 1)), 4 * n * nodes * selected
    assert traffic["wide"] * 16 == loaded + stored
    assert traffic["stored"] == stored
    table = (traffic["loaded"] - loaded) / 32  # the lanes of a warp read it at one address, which is one access
    assert 0 < table < 0.01 * loaded


# ---- how it fails, and what it leaves behind -------------------------------------------------------------------------


@pytest.fixture
def failing():
    """Make a runtime call fail; none fails afterwards."""
    control = shim.control()
    yield lambda call: control.shim_set_failing(call.encode())
    control.shim_set_failing(b"")


@on_shim
@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("cudaGetDevice", "cudaGetDevice failed: cudaErrorLaunchFailure"),
        ("cudaLaunchKernel", "launch of dampen failed"),
    ],
)
@pytest.mark.usefixtures("known")
def test_a_failing_call_is_an_error_that_names_it(failing, call, named):
    problem = build(Case("failing"))
    expected, before = textbook(problem), problem.state()
    plan = problem.plan(shim.NAME)
    plan.run_(dry_run=True)
    failing(call)
    with pytest.raises(ff.BackendError, match=f"backend 'cuda_shim': {named}"):
        plan.run_()
    assert all(torch.equal(value, before[key]) for key, value in problem.state().items())
    failing("")
    plan.run_()
    assert all(torch.equal(value, expected.values[key]) for key, value in problem.state().items())


@on_shim
@pytest.mark.parametrize(
    ("call", "named"),
    [("cudaLaunchKernel", "launch of merge failed"), ("cudaGetDevice", "cudaGetDevice failed")],
)
def test_a_failing_merge_is_an_error_that_names_the_call(failing, call, named):
    out = torch.empty(10)
    failing(call)
    with pytest.raises(ff.BackendError, match=named):
        shim.backend().merge([torch.ones(10)], [1.0], Merging(), out)


@on_shim
@pytest.mark.parametrize("call", ["", "cudaLaunchKernel"])
def test_the_current_device_is_left_as_it_was(failing, call):
    extension, control = shim.backend().extension.module(), shim.control()
    gradient, into = torch.ones(8), torch.zeros(8)
    pair = np.array([[gradient.data_ptr(), into.data_ptr(), 8, 0, 0]])
    failing(call)
    try:
        extension.accumulate(1, pair.ctypes.data, 1, True, False, 0)
    except RuntimeError:
        assert call
    assert control.shim_current_device() == 0
    assert bool(call) == torch.equal(into, torch.zeros(8))


@on_shim
def test_a_device_that_is_not_there_is_an_error():
    extension = shim.backend().extension.module()
    pair = np.array([[1 << 20, 1 << 20, 8, 0, 0]])
    with pytest.raises(RuntimeError, match="cudaSetDevice failed: cudaErrorInvalidDevice"):
        extension.accumulate(7, pair.ctypes.data, 1, True, False, 0)


# ---- tables that do not fit into one launch -------------------------------------------------------------------------


@on_shim
@pytest.mark.parametrize("how", ["max", "sum", "mean"])
def test_more_sources_than_one_launch_takes(how):
    generator = torch.Generator().manual_seed(3)
    sources = [torch.rand(67, generator=generator) for _ in range(500)]  # 192 a launch
    weights = torch.rand(500, generator=generator, dtype=torch.float64).float().tolist()
    out = torch.empty(67)
    shim.backend().merge(sources, weights, Merging(how, 0.3), out)
    terms = torch.stack(sources).double() * torch.tensor(weights).double()[:, None]
    truth = {"max": terms.amax(0), "sum": terms.sum(0), "mean": terms.mean(0)}[how] * np.float32(0.3).item()
    torch.testing.assert_close(out.double(), truth, rtol=500 * torch.finfo(torch.float32).eps, atol=0)


@on_shim
def test_more_gradients_than_one_launch_takes():
    generator = torch.Generator().manual_seed(4)
    memory = torch.randn(200 * 600, generator=generator)
    gradients = [memory[600 * i + i % 5 :][: 1 + 3 * i] for i in range(200)]  # 80 spans a launch, heads and tails
    into = [torch.rand(g.numel(), generator=generator) for g in gradients]
    wanted = [total + g * g for g, total in zip(gradients, into, strict=True)]
    shim.backend().accumulate(gradients, into, 2, False)
    assert all(map(torch.equal, into, wanted))


def test_the_tile_is_laid_out_as_in_the_header():
    assert TILE.itemsize == 40
    if shim.why_not() is None:
        assert shim.backend().extension.module().tile_bytes == TILE.itemsize
