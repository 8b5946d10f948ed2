"""outer_square_accumulate on every backend against float64, over a table of shapes and memory orders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import fiun_fast as ff
from fiun_fast.kernels import cpu

DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Case:
    """Samples, groups, rows, columns, positions; and the order of left and right in memory."""

    samples: int
    groups: int
    m: int
    k: int
    t: int
    order: str = "positions-last"

    @property
    def id(self) -> str:
        return f"{self.samples}x{self.groups}x{self.m}x{self.k}x{self.t}-{self.order}"

    def operands(self, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left, right, into; not zero to begin with."""
        g = torch.Generator().manual_seed(self.m * 31 + self.k)
        made = []
        for rows in (self.m, self.k):
            shape = (self.samples, self.groups, rows, self.t)
            if self.order == "positions-first":
                x = torch.randn(self.samples, self.groups, self.t, rows, generator=g).transpose(2, 3)
            elif self.order == "wider":  # rows of a larger matrix, as with a tensor that was cut or expanded
                x = torch.randn(self.samples, self.groups, self.t, rows + 3, generator=g)[..., 1:-2].transpose(2, 3)
            elif self.order == "expanded":
                x = torch.randn(1, self.groups, rows, self.t, generator=g).expand(shape)
            else:
                x = torch.randn(shape, generator=g)
            made.append(x.to(dtype).to(device) if device != "cpu" or dtype != torch.float32 else x)
        into = torch.rand(self.groups * self.m * self.k, generator=g).to(device, dtype)
        return made[0], made[1], into


CASES = [
    Case(1, 1, 1, 1, 1),
    Case(5, 1, 7, 9, 1),
    Case(5, 3, 2, 9, 1),
    Case(3, 1, 4, 3, 2),
    Case(4, 1, 8, 48, 5, "positions-first"),
    Case(3, 1, 13, 49, 6, "positions-first"),
    Case(3, 1, 9, 95, 17, "wider"),
    Case(2, 1, 65, 150, 33, "positions-first"),
    Case(2, 1, 3, 5, 700, "positions-first"),
    Case(3, 2, 5, 6, 7, "positions-first"),
    Case(3, 1, 6, 11, 4, "expanded"),
    Case(2, 8, 1, 9, 25),
    Case(0, 1, 3, 3, 2),
    Case(2, 1, 3, 4, 0),
    Case(130, 1, 2, 3, 2, "positions-first"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_case_is_as_in_float64(backend, case, dtype):
    left, right, into = case.operands(dtype, backend.device)
    kept = left.clone(), right.clone()
    products = torch.einsum("bgmt,bgkt->bgmk", left.double(), right.double())
    wanted = into.double() + products.square().sum(0).reshape(-1)
    backend.kernels.outer_square_accumulate(left, right, into)
    error = (into.double() - wanted).abs().max() / wanted.abs().max()
    assert error < 64 * torch.finfo(dtype).eps
    assert torch.equal(left, kept[0]) and torch.equal(right, kept[1])


@pytest.mark.parametrize("order", ["positions-first", "positions-last"])
def test_nan_and_inf_stay_where_they_arise(backend, order):
    left, right, into = Case(3, 1, 9, 60, 4, order).operands(torch.float32, backend.device)
    left[1, 0, 2, 1], right[0, 0, 58, 3] = float("nan"), float("inf")
    before = into.view(9, 60)[[0, 1, *range(3, 9)], :58].isfinite().all()
    backend.kernels.outer_square_accumulate(left, right, into)
    found = into.view(9, 60)
    assert before and found[2].isnan().all() and not found[:2, 58].isfinite().any()
    rest = torch.tensor([0, 1, *range(3, 9)])
    assert found[rest][:, torch.tensor([*range(58), 59])].isfinite().all()


def test_other_dtypes_are_refused(backend):
    if backend.name == "reference":
        pytest.skip("the specification computes in whatever it is given")
    left, right, into = CASES[3].operands(torch.float32, backend.device)
    with pytest.raises(ff.errors.DTypeError, match="float64"):
        backend.kernels.outer_square_accumulate(left.double(), right, into)


@pytest.mark.parametrize(
    "isa", [isa for isa, usable in cpu.isas().items() if usable] if cpu.BACKEND.why_not("cpu") is None else []
)
@pytest.mark.parametrize("count", [1, 3])
def test_every_instruction_set(isa, count, threads, monkeypatch):
    monkeypatch.setenv(cpu.ISA_ENVIRONMENT, isa)
    threads(count)
    for case in CASES:
        left, right, into = case.operands(torch.float32, "cpu")
        wanted = into.double() + torch.einsum("bgmt,bgkt->gmk", left.double()[:0], right.double()[:0]).reshape(-1)
        wanted += torch.einsum("bgmt,bgkt->bgmk", left.double(), right.double()).square().sum(0).reshape(-1)
        cpu.BACKEND.outer_square_accumulate(left, right, into)
        assert (into.double() - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * wanted.abs().max(), case


COMPILED = """
import json, torch
from triton.backends.compiler import GPUTarget
from fiun_fast.kernels import triton_aot, triton_host
found = {}
for precision in (False, True):
    torch.backends.cuda.matmul.allow_tf32 = precision
    for arch in (80, 90):
        target = GPUTarget("cuda", arch, 32)
        with triton_aot.standing_in(target):
            fp32 = torch.float32
            sizes = (64, 1, 256, 2304, 64, 1, 1, 64, 1, 1, 1, 64, 1, 16)
            constants = triton_host.outer_constants()
            kernel = triton_host.device_code().outer_square.warmup(fp32, fp32, fp32, *sizes, grid=(1,), **constants)
        ptx = kernel.asm["ptx"]
        fma = ptx.count("fma.rn.f32")
        found[f"{precision} {arch}"] = {"tensor": "mma" in ptx, "fma": fma, "local": ".local" in ptx}
print(json.dumps(found))
"""


def test_tensor_cores_round_only_where_torch_lets_them():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    for key, figures in json.loads(run.stdout).items():
        allowed = key.startswith("True")
        assert figures["tensor"] == allowed, key
        assert allowed or figures["fma"] > 0, key
        assert not figures["local"], key


NO_ROOM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fiun_fast._cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    module.outer_square(0, 0, 0, 0, 2**50, 64, 64, 0, 0, 0, 0, threads=2)  # scratch grows with the positions
except MemoryError:
    print("MemoryError")
"""


def test_memory_that_is_not_there_is_an_error_and_no_crash():
    from fiun_fast import _cpu

    run = subprocess.run([sys.executable, "-c", NO_ROOM, _cpu.__file__], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "MemoryError"), run.stderr
