"""The Triton kernels compiled ahead of time: what the machine code must and must not contain. No GPU is needed.

tests/sass.py compiles them in a process of its own; each check is also held against a kernel that is bad on purpose.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fiun_fast.kernels import triton_host

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
AMD_RESULTS = ROOT / "bench" / "results" / "amd-code.json"  # and docs/kernels.md, of `tests/sass.py --page`
CEILING, WIDE_CEILING = 96, 168  # registers; the second for float64 and for exponents, which are computed in it
COMPUTED_IN_FLOAT64 = ("dampen fp32 exponent", "dampen fp64")
# 16-byte loads and stores of a thread in the aligned path. A stream of 4-byte elements takes 4 (2048 elements, 128
# threads). dampen loads F twice in the code (the first source, and the loop over the others), I, and theta for the
# quick way and the exact one, each of which stores it.
WIDTHS = {
    "dampen fp32": (20, 8),
    "dampen bf16": (16, 4),
    "dampen fp16": (16, 4),
    "dampen fp32 mean": (20, 8),
    "merge fp32": (8, 4),
    "merge fp32 sum": (8, 4),
    "merge fp32 mean": (8, 4),
    "accumulate fp32": (8, 4),
    "accumulate bf16": (6, 4),
    "accumulate fp32 |g|": (8, 4),
    "accumulate fp32 zeroing": (8, 8),
    "accumulate one fp32": (8, 4),
}
LEAST_WIDTHS = {  # some compilers unroll the loop over sources
    "dampen fp32 exponent": (8, 2),
    "dampen fp64": (16, 4),
    "dampen fp32 signed": (14, 2),
    "dampen bf16 signed": (12, 1),
}


@pytest.fixture(scope="session")
def compiled():
    """What tests/sass.py found."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "sass.py"
    run = subprocess.run([sys.executable, script, "--json"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def version(compiled) -> tuple[int, ...]:
    return tuple(int(part) for part in compiled["triton"].split(".")[:2])


def on_nvidia(compiled, *names):
    """(kernel on target, figures) of these kernels on every NVIDIA target."""
    found = [
        (f"{name} on {target}", kernels[name])
        for target, kernels in compiled["kernels"].items()
        for name in names
        if target.startswith("cuda")
    ]
    assert found
    return found


def test_every_target_was_compiled(compiled):
    blackwell = {"cuda:100"} if version(compiled) >= (3, 3) else set()  # 3.2 ships an assembler without sm_100
    assert {"cuda:80", "cuda:90"} | blackwell <= set(compiled["kernels"])
    assert set(compiled["kernels"]) | set(compiled["not_compiled"]) == {
        "cuda:80", "cuda:90", "cuda:100", "hip:gfx90a", "hip:gfx942", "hip:gfx950"
    }  # fmt: skip


@pytest.mark.parametrize("name", WIDTHS)
def test_accesses_are_16_bytes_wide(compiled, name):
    for key, figures in on_nvidia(compiled, name):
        assert (figures["load128"], figures["store128"]) == WIDTHS[name], key


@pytest.mark.parametrize("name", LEAST_WIDTHS)
def test_accesses_in_float64_are_16_bytes_wide(compiled, name):
    for key, figures in on_nvidia(compiled, name):
        loads, stores = LEAST_WIDTHS[name]
        assert figures["load128"] >= loads, key
        assert figures["store128"] == stores, key


@pytest.mark.parametrize("kernel", ["dampen", "merge", "accumulate"])
@pytest.mark.parametrize("flaw", ["no alignment hint", "mask element by element"])
def test_the_width_check_can_fail(compiled, kernel, flaw):
    figures = compiled["mutants"][f"{kernel}: {flaw}"]
    assert figures["load128"] < WIDTHS[f"{kernel} fp32"][0]


@pytest.mark.parametrize("flaw", ["hint before the cast", "theta by element"])
def test_the_width_check_sees_each_of_the_hints(compiled, flaw):
    figures = compiled["mutants"][f"dampen: {flaw}"]
    assert (figures["load128"], figures["store128"]) != WIDTHS["dampen fp32"]


def test_nothing_lies_in_local_memory(compiled):
    for key, figures in on_nvidia(compiled, *WIDTHS, *LEAST_WIDTHS):
        assert figures["local"] == 0, key


@pytest.mark.parametrize("kernel", ["dampen", "merge", "accumulate"])
def test_the_local_memory_check_can_fail(compiled, kernel):
    assert compiled["mutants"][f"{kernel}: too few registers"]["local"] > 0


def test_registers_stay_under_the_ceiling(compiled):
    for key, figures in on_nvidia(compiled, *WIDTHS):
        assert figures["registers"] <= CEILING, key
        assert figures["warps"] >= triton_host.NUM_WARPS * triton_host.RESIDENT, key
    for key, figures in on_nvidia(compiled, *COMPUTED_IN_FLOAT64):
        assert figures["registers"] <= WIDE_CEILING, key
        assert figures["warps"] >= triton_host.NUM_WARPS * triton_host.RESIDENT_WIDE, key
    assert compiled["mutants"]["dampen: more registers"]["registers"] > CEILING, "this check cannot fail"


@pytest.mark.parametrize(
    "name", ["dampen fp32", "dampen bf16", "dampen fp16", "dampen fp32 mean", "merge fp32 mean", "dampen fp64"]
)
def test_division_is_ieee(compiled, name):
    """Each is div.rn in PTX, and in SASS a reciprocal with the check (FCHK) that leads to the exact path."""
    for key, figures in on_nvidia(compiled, name):
        assert figures["div_rn"] > 0, key
        assert figures["approximate"] == 0, key
        assert figures["division_checks"] == (0 if name == "dampen fp64" else figures["div_rn"]), key


def test_the_division_check_can_fail(compiled):
    for kernel in ("dampen", "merge"):
        figures = compiled["mutants"][f"{kernel}: approximate division"]
        assert figures["approximate"] > 0
        assert figures["div_rn"] == figures["division_checks"] == 0
    assert compiled["mutants"]["dampen: flushing division"]["approximate"] > 0  # tl.div_rn, in Triton 3.2 to 3.5


def test_nothing_is_contracted(compiled):
    for key, figures in on_nvidia(compiled, *WIDTHS, "dampen fp64"):  # an exponent's float64 logarithm is made of them
        # a reciprocal takes two, the quotient made of it two, and alpha I is one that adds 0, so that -0 becomes 0
        assert figures["fma"] == 5 * figures["reciprocals"], key
        quick = key.startswith("dampen") and "fp64" not in key
        assert (figures["reciprocals"] > 0) == quick, key
        assert figures["pairs_fused"] == figures["pairs_meant"], key  # on sm_100, where some ptxas contract pairs


@pytest.mark.parametrize("kernel", ["dampen", "merge", "accumulate"])
def test_the_contraction_check_can_fail(compiled, kernel):
    figures = compiled["mutants"][f"{kernel}: fused multiply-add"]
    assert figures["fma"] > 5 * figures["reciprocals"]


def test_the_maximum_passes_nan_on(compiled):
    for key, figures in on_nvidia(compiled, "dampen fp32", "merge fp32"):
        assert figures["nan_max"] > 0, key
    assert compiled["mutants"]["dampen: maximum without NaN"]["nan_max"] == 0, "this check cannot fail"


def test_counters_do_not_fence(compiled):
    for key, figures in on_nvidia(compiled, "dampen fp32"):
        assert figures["fences"] == 0, key
    assert compiled["mutants"]["dampen: fenced counters"]["fences"] > 0, "this check cannot fail"


@pytest.mark.parametrize("target", ["hip:gfx90a", "hip:gfx942", "hip:gfx950"])
def test_the_same_source_compiles_for_amd(compiled, target):
    if target in compiled["not_compiled"]:
        pytest.skip(f"Triton {compiled['triton']} cannot compile for {target}: {compiled['not_compiled'][target]}")
    for name, figures in compiled["kernels"][target].items():
        assert figures["local"] == 0, name
        assert figures["registers"] <= 64, name  # of a wavefront's lane; eight wavefronts fit a SIMD
        assert figures["load128"] >= 4, name
        assert figures["store128"] >= (1 if name == "dampen bf16" else 2), name
        assert figures["approximate"] == figures["flushes"] == 0, name
        assert (figures["div_rn"] > 0) == (name.startswith("dampen") or name.endswith("mean")), name


def test_the_page_has_the_figures_of_amd(compiled):
    kept = json.loads(AMD_RESULTS.read_text())
    assert set(kept["kernels"]) == {"hip:gfx90a", "hip:gfx942", "hip:gfx950"}
    page = (ROOT / "docs" / "kernels.md").read_text()
    for name, row in kept["kernels"]["hip:gfx950"].items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"/ {row['registers']} |" in line, name
        assert f"/ {row['instructions']} |" in line, name
    if kept["triton"] == compiled["triton"]:
        assert {target: compiled["kernels"][target] for target in kept["kernels"]} == kept["kernels"]


WARMUP = """
from fiun_fast.kernels import triton_aot
from fiun_fast.errors import ArgumentError
names = []
count = triton_aot.warmup("cuda:90", names.append)
assert count == len(names) == len(set(names)) > 20, names
try:
    triton_aot.warmup("sm_90")
except ArgumentError as error:
    assert "cuda:90" in str(error)
else:
    raise AssertionError
from triton.runtime import driver
assert "StandIn" not in repr(vars(driver)), "the real driver is not back"
"""


def test_warmup_compiles_the_standard_set_for_a_target_that_is_not_here():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", WARMUP], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
