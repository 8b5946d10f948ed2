"""Triton's way of ordinary numbers, which is written in PTX, under the interpreter with these instructions in NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import ptx
import pytest
import test_interface
import test_parity
from cases import CASES, DTYPES

from fiun_fast.kernels import load

pytest.importorskip("triton", reason="Triton is not installed")
TRITON = load("triton")
reason = TRITON.why_not("cpu")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"backend triton: {reason}")
GROUPS = [((0, 3, 4), 2, (7, 1, 33, 160)), ((1,), 1, (5, 300)), ((2, 5), 3, (64,))]
PLACE = SimpleNamespace(name="triton", device="cpu", kernels=TRITON)


@pytest.mark.parametrize("how", [1, 2], ids=["one by one", "two by two"])
@pytest.mark.parametrize("theta", DTYPES, ids=str)
def test_ordinary_numbers_are_dampened_as_in_the_reference(theta, how):
    with ptx.quick_way(how) as met:
        test_interface.check_ordinary(PLACE, theta, GROUPS)
    assert sum("rcp" in asm for asm in met) > 10
    assert any("f32x2" in asm for asm in met) == (how == 2 and theta.itemsize == 2)
    assert any("prmt" in asm for asm in met) == (theta.itemsize == 2)


@pytest.mark.parametrize("case", [case for case in CASES if case.values != "random"], ids=lambda case: case.id)
def test_edges_take_the_other_way(case):
    with ptx.quick_way(1 + (len(case.id) % 2)):
        test_parity.test_every_case_is_as_in_the_textbook(PLACE, case)
