"""The CUDA kernels' machine code: what it must and must not contain. No GPU is needed, but nvcc.

tests/cuda_code.py compiles them; each check is also held against source that is bad on purpose.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import cuda_code
import pytest

reason = cuda_code.why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"machine code of the CUDA kernels: {reason}")

TARGETS = (
    "90",
    "100",
)  # for the time it takes; `python tests/cuda_code.py` has all, `make wheel-check` reads the wheel's
SIZES = {"float": 4, "double": 8, "bf16": 2, "fp16": 2}
# By __launch_bounds__: on a multiprocessor five blocks of 128 threads of a float32 dampen, four from sm_100 on and of a
# float64 one; of signed ones four and two.
REGISTERS = {
    "dampen_f32": 128,
    "dampen_f64": 128,
    "dampen_signed_f32": 128,
    "dampen_signed_f64": 255,
    "merge": 80,
    "accumulate": 64,
    "add_squares": 64,
}
MOST_REGISTERS = 128  # of a kernel that has no line there


@pytest.fixture(scope="session")
def found():
    """(kernel, architecture) -> figures."""
    return cuda_code.every_kernel(TARGETS)


@pytest.fixture(scope="session")
def mutants():
    """Name -> kernel -> figures, of source that is bad on purpose."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cuda_code.MUTANTS, pool.map(cuda_code.mutant, cuda_code.MUTANTS), strict=True))


def parts(kernel: str) -> tuple[str, list[str]]:
    """dampen<float, double, exponent> as ("dampen", ["float", "double", "exponent"])."""
    match = re.fullmatch(r"(\w+)<(.*)>", kernel)
    return (match[1], match[2].split(", ")) if match else (kernel, [])


def wide_accesses(kernel: str) -> tuple[int, int] | None:
    """16-byte loads and stores of the aligned path; None for a kernel whose accesses are not stated here.

    A lane holds 32 bytes of the wider dtype, and as many elements of the other. They form units of at most 16 bytes of
    the narrower; a unit below 16 bytes is one smaller access. dampen has the code for I three times (the first node;
    the next one after a turn without and with a selection), for F and if signed for g twice (the first source, others),
    and for theta; it stores theta twice where it has a quick way (csrc/cuda/quick.h). merge has two sources at once;
    accumulate loads and stores both of its streams, the gradient to zero it.
    """
    family, types = parts(kernel)
    if family not in ("dampen", "merge", "accumulate"):
        return None
    sizes = [SIZES[name] for name in types if name in SIZES]
    elements = 32 // max(sizes)
    unit = min(elements, 16 // min(sizes))

    def stream(size: int) -> int:
        return elements * size // 16 if unit * size >= 16 else 0

    if family == "dampen":
        theta, fisher = sizes
        quick = fisher == 4 and "exponent" not in types
        return (7 if "signed" in types else 5) * stream(fisher) + stream(theta), (2 if quick else 1) * stream(theta)
    if family == "merge":
        return 2 * stream(sizes[0]), stream(sizes[0])
    return sum(map(stream, sizes)), sum(map(stream, sizes))


def test_every_kernel_was_compiled_for_every_target(found):
    kernels = {kernel for kernel, _ in found}
    assert {(kernel, arch) for kernel in kernels for arch in TARGETS} == set(found)
    families = [parts(kernel)[0] for kernel in kernels]
    assert (families.count("dampen"), families.count("merge"), families.count("accumulate")) == (32, 2, 8)


def test_nothing_spills_and_nothing_is_in_local_memory(found):
    for key, figures in found.items():
        assert (figures["spills"], figures["stack"], figures["local"]) == (0, 0, 0), key


def test_registers_stay_under_the_ceiling(found):
    for (kernel, arch), figures in found.items():
        family, types = parts(kernel)
        if family == "dampen":
            family += ("_signed" if "signed" in types else "") + ("_f64" if types[1] == "double" else "_f32")
        assert figures["registers"] <= REGISTERS.get(family, MOST_REGISTERS), (kernel, arch)


def test_the_spill_check_can_fail(mutants):
    figures = mutants["too few registers"]["dampen<float, float>"]
    assert figures["spills"] > 0
    assert figures["stack"] > 0
    assert figures["local"] > 0


def test_the_local_memory_check_can_fail(mutants):
    figures = mutants["arrays indexed at run time"]["dampen<float, float>"]
    assert figures["stack"] > 0
    assert figures["local"] > 0


def test_accesses_are_16_bytes_wide(found):
    checked = 0
    for (kernel, arch), figures in found.items():
        if (expected := wide_accesses(kernel)) is not None:
            loads, stores = expected
            # in float64, and where a power is taken, ptxas may double a load on the way to it
            doubled = "exponent" in kernel or "double" in kernel
            assert figures["load128"] == loads or (doubled and figures["load128"] > loads), (kernel, arch)
            assert figures["store128"] == stores, (kernel, arch)
            checked += 1
    assert checked == 42 * len(TARGETS)


@pytest.mark.parametrize(
    ("mutant", "kernel"),
    [("accesses of 8 bytes", "accumulate<float, float>"), ("theta by element", "dampen<float, float>")],
)
def test_the_width_check_can_fail(mutants, mutant, kernel):
    figures = mutants[mutant][kernel]
    assert (figures["load128"], figures["store128"]) != wide_accesses(kernel)


def test_division_is_ieee(found):
    """Each is div.rn in PTX; in machine code a float32 one has the check (FCHK) that leads to the exact path."""
    for (kernel, arch), figures in found.items():
        family, types = parts(kernel)
        if family == "accumulate":
            assert figures["div_rn_f32"] + figures["div_rn_f64"] == 0, (kernel, arch)
        elif family in ("dampen", "merge"):
            assert figures["div_rn_f64" if types[:2][-1] == "double" else "div_rn_f32"] > 0, (kernel, arch)
        assert figures["division_checks"] == figures["div_rn_f32"], (kernel, arch)
        if "exponent" not in types:  # a power is made of approximations and fused steps, and rounds as it says
            assert figures["approximate"] == 0, (kernel, arch)


def test_the_division_check_can_fail(mutants):
    figures = mutants["approximate division"]["dampen<float, float>"]
    assert figures["approximate"] > 0
    assert figures["div_rn_f32"] == figures["division_checks"] == 0


def test_nothing_is_contracted(found):
    for (kernel, arch), figures in found.items():
        assert figures["fusible"] == 0, (kernel, arch)
        if wide_accesses(kernel) is not None and "exponent" not in kernel:  # others may ask for one by name
            # a reciprocal takes two, the quotient made of it two, alpha I is one that adds 0; sm_100 computes in pairs,
            # of which the path for addresses at odd offsets fills one half: four numbers, two steps
            pairs = arch == "100"
            products = figures["reciprocals"] if pairs else figures["products"]
            idle = 8 if pairs and figures["reciprocals"] else 0
            assert figures["fma"] == 4 * figures["reciprocals"] + products + idle, (kernel, arch)
            assert (products > 0) == (figures["reciprocals"] > 0), (kernel, arch)
            assert figures["pairs_fused"] == figures["pairs_meant"], (kernel, arch)


def test_only_ordinary_numbers_are_divided_by_hand(found):
    for (kernel, arch), figures in found.items():
        family, types = parts(kernel)
        if "exponent" not in types:  # a power has a reciprocal too
            by_hand = family == "dampen" and types[1] == "float"
            assert (figures["reciprocals"] > 0) == by_hand, (kernel, arch)


def test_pairs_of_numbers_are_not_contracted():
    """ptxas does that in spite of .rn; sm_100 alone has such instructions."""
    as_it_is, bad = (cuda_code.mutant(name, "100")["dampen<float, float>"] for name in ("as it is", "pairs contracted"))
    assert as_it_is["pairs_fused"] == as_it_is["pairs_meant"] > 0
    assert bad["pairs_fused"] > bad["pairs_meant"], "this check cannot fail"
    assert as_it_is["spills"] == as_it_is["local"] == 0


def test_the_contraction_check_can_fail(mutants):
    assert mutants["contraction"]["accumulate<float, float>"]["fusible"] > 0
