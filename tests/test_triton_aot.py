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

pytest.importorskip("triton", reason="Triton is not installed")

REGISTERS = {"dampen fp32 exponent": 144, "dampen fp64": 168}  # the others: 80
# 16-byte loads and stores of a thread in the aligned path. A stream of 4-byte elements takes 4 (2048 elements, 128
# threads). dampen loads F twice in the code (the first source, and the loop over the others), I and theta.
WIDE = {
    "dampen fp32": (16, 4),
    "dampen bf16": (14, 2),
    "dampen fp16": (14, 2),
    "dampen fp32 mean": (16, 4),
    "dampen fp32 exponent": (16, 4),
    "dampen fp64": (32, 8),
    "merge fp32": (8, 4),
    "merge fp32 sum": (8, 4),
    "accumulate fp32": (8, 4),
    "accumulate bf16": (6, 4),
    "accumulate fp32 zeroing": (8, 8),
    "accumulate one fp32": (8, 4),
}


@pytest.fixture(scope="session")
def compiled():
    """What tests/sass.py found."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("sass.py")
    run = subprocess.run([sys.executable, script, "--json"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def by_name(compiled, *names):
    """(name with target, figures) of these kernels on every target."""
    found = [(key, figures) for key, figures in compiled["kernels"].items() if key.rsplit(" ", 1)[0] in names]
    assert found
    return found


def test_every_target_was_compiled(compiled):
    targets = {key.rsplit(" ", 1)[1] for key in compiled["kernels"]}
    blackwell = {"cuda:100"} if compiled["triton"] >= "3.3" else set()  # 3.2 ships an assembler without sm_100
    assert targets == {"cuda:80", "cuda:90"} | blackwell


@pytest.mark.parametrize("name", WIDE)
def test_accesses_are_16_bytes_wide(compiled, name):
    for key, figures in by_name(compiled, name):
        assert (figures["load128"], figures["store128"]) == WIDE[name], key


@pytest.mark.parametrize(
    "mutant", ["no alignment hint", "hint before the cast", "mask element by element", "theta by element"]
)
def test_the_width_check_can_fail(compiled, mutant):
    figures = compiled["mutants"][mutant]
    assert (figures["load128"], figures["store128"]) != WIDE["dampen fp32"]


def test_nothing_spills_and_registers_stay_under_the_ceiling(compiled):
    # Triton 3.2's assembler keeps 16 bytes of `dampen fp32` in local memory
    allowed = 8 if compiled["triton"] < "3.3" else 0
    for key, figures in by_name(compiled, *WIDE):
        assert figures["local"] <= allowed, key
        assert figures["registers"] <= REGISTERS.get(key.rsplit(" ", 1)[0], 80), key


def test_the_spill_check_can_fail(compiled):
    assert compiled["mutants"]["too few registers"]["local"] > 100


@pytest.mark.parametrize("name", ["dampen fp32", "dampen bf16", "dampen fp16", "dampen fp32 mean"])
def test_division_is_ieee(compiled, name):
    """Each is div.rn in PTX, and in SASS a reciprocal with the check (FCHK) that leads to the exact path."""
    for key, figures in by_name(compiled, name):
        assert figures["div_rn"] > 0, key
        assert figures["approximate"] == 0, key
        assert figures["division_checks"] == figures["div_rn"], key


def test_float64_division_is_ieee(compiled):
    for key, figures in by_name(compiled, "dampen fp64"):
        assert figures["div_rn"] > 0, key
        assert figures["approximate"] == 0, key


def test_the_division_check_can_fail(compiled):
    figures = compiled["mutants"]["approximate division"]
    assert figures["approximate"] > 0
    assert figures["div_rn"] == figures["division_checks"] == 0


def test_nothing_is_contracted(compiled):
    for key, figures in by_name(compiled, *(set(WIDE) - {"dampen fp32 exponent"})):
        assert figures["fma"] == 0, key  # the exponent's float64 logarithm is made of them


def test_the_contraction_check_can_fail(compiled):
    assert compiled["mutants"]["fused multiply-add"]["fma"] > 0


def test_the_maximum_passes_nan_on(compiled):
    for key, figures in by_name(compiled, "dampen fp32", "merge fp32"):
        assert figures["nan_max"] > 0, key


def test_counters_do_not_fence(compiled):
    for key, figures in by_name(compiled, "dampen fp32"):
        assert figures["fences"] == 0, key
    assert compiled["mutants"]["fenced counters"]["fences"] > 0, "this check cannot fail"


WARMUP = """
from fiun_fast.kernels import triton_aot
from fiun_fast.errors import ArgumentError
names = []
count = triton_aot.warmup("cuda:90", names.append)
assert count == len(names) == len(set(names)) > 20, names
hip = triton_aot.compile_variant(triton_aot.standard_variants()[0], "hip:gfx942") if {hip} else None
assert hip is None or "amdgcn" in hip.asm
try:
    triton_aot.warmup("sm_90")
except ArgumentError as error:
    assert "cuda:90" in str(error)
else:
    raise AssertionError
from triton.runtime import driver
assert "StandIn" not in repr(vars(driver)), "the real driver is not back"
"""


def test_warmup_compiles_the_standard_set_for_a_target_that_is_not_here(compiled):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = WARMUP.format(hip=compiled["triton"] >= "3.3")  # 3.2 needs ROCm's linker, which its wheel does not carry
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
