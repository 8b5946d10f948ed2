"""How far the kernels' machine code is from the memory's roof, on every GPU of tests/gpus.json. No GPU is needed.

tests/roofline.py compiles and counts; each check is also held against kernels that are bad on purpose.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_code
import pytest
import roofline
from machine_code import Code, by_pipe, in_flight, pipe

reason = cuda_code.why_not()
needs_nvcc = pytest.mark.skipif(reason is not None, reason=f"machine code of the CUDA kernels: {reason}")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
TRITON_ARCHS = ("80", "90", "100")  # with fast memory, for the time it takes; the committed table has all


def compiled(*targets: str):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, roofline.__file__, "--json", *targets]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="session")
def cuda():
    """Architecture -> kernel -> figures."""
    return compiled(*(f"cuda:{arch}" for arch in roofline.ARCHS))["cuda"]


@pytest.fixture(scope="session")
def triton():
    """The same of Triton's kernels."""
    return compiled(*(f"triton:{arch}" for arch in TRITON_ARCHS))["triton"]


def misses(by_arch, names) -> list[str]:
    """What is under the floor, of all GPUs there are figures for."""
    rooms, found = roofline.head_rooms(by_arch), []
    for name in names:
        assert rooms[name]
        for gpu, cases in rooms[name].items():
            found += [
                f"{name}, {case}, {gpu}: {room}"
                for case, room in cases.items()
                if min(room["issue"], room["flight"]) < roofline.FLOOR
            ]
    return found


def faults(by_arch) -> list[str]:
    """What no head room makes up for: local memory; in the CUDA kernels' loops also atomics to memory."""
    return [
        f"{name}, sm_{arch}: {row['local']} accesses to local memory; {row['cases']}"
        for arch, rows in by_arch.items()
        for name, row in rows.items()
        if row["local"] or ("<" in name and any(case["atomics"] for case in row["cases"].values()))
    ]


def drift(by_arch) -> list[str]:
    """Where the CUDA kernels are not those of the committed table, to a tenth: releases of ptxas differ a little."""
    kept = json.loads(roofline.RESULTS.read_text())["cuda"]
    return [
        f"{name}, sm_{arch}, {case}: {cost} and before {old}"
        for arch, rows in by_arch.items()
        for name, row in rows.items()
        for case, cost in row["cases"].items()
        if (old := kept[arch][name]["cases"][case])
        and (cost["pipes"]["issue"] != pytest.approx(old["pipes"]["issue"], rel=0.1) or cost["flight"] != old["flight"])
    ]


@needs_nvcc
def test_cuda_kernels_are_half_as_fast_again_as_memory_on_every_gpu(cuda):
    names = [kernel.name for kernel in roofline.held("cuda")]
    assert set(cuda) == set(roofline.ARCHS)
    assert misses(cuda, names) == []
    assert faults(cuda) == []
    assert {gpu["arch"] for gpu in roofline.TABLE["gpus"].values()} == set(cuda)


@needs_triton
def test_triton_kernels_are_half_as_fast_again_as_memory(triton):
    if "100" not in triton or not triton["100"]:
        pytest.skip("this Triton's assembler does not know sm_100")
    assert misses(triton, [kernel.name for kernel in roofline.held("triton")]) == []
    assert faults(triton) == []


SPOILED = {  # name -> (kernel, text in csrc/cuda -> what a careless change would write, what then is too little)
    "loads as late as ptxas likes": ("accumulate<float, float>", {", sizeof(T) == 2 ? 12 : 8)": ")"}, "flight"),
    "nothing prefetched": (
        "dampen<float, float>",
        {"constexpr bool prefetches = true": "constexpr bool prefetches = false"},
        "flight",
    ),
    "every quotient checked by itself": (
        "dampen<bf16, float>",
        {"maybe_quick = has_quick<F> && !with_exponent": "maybe_quick = false && has_quick<F>"},
        "issue",
    ),
    "too few registers": ("dampen<float, float>", {"blocks_at_once<with_sign, T, F>)\n": "8)\n"}, "faults"),
    "counters in memory": (
        "dampen<float, float>",
        {
            "selected_here += counts & 1023": (
                "atomicAdd(reinterpret_cast<unsigned long long*>(args.counts) + 3 * targets[n].node, counts & 1023ull)"
            )
        },
        "faults",
    ),
    "a second division": (
        "dampen<float, float>",
        {"minus(fused(alpha, two_of(original + i), {0, 0})": "minus({alpha.a / original[i], alpha.b}"},
        "drift",
    ),
}


def spoiled(name: str, folder: Path):
    kernel, replacements, _ = SPOILED[name]
    csrc = folder / re.sub(r"\W", "_", name)
    shutil.copytree(cuda_code.CSRC, csrc)
    changed = dict.fromkeys(replacements, 0)
    for path in (csrc / "cuda").iterdir():
        text = path.read_text()
        for old, new in replacements.items():
            changed[old] += old in text
            text = text.replace(old, new)
        path.write_text(text)
    assert all(changed.values()), f"not in the source any more: {changed}"
    chosen = [one for one in roofline.held("cuda") if one.name == kernel]
    return {"100": roofline.figures("cuda", "100", chosen, csrc)}


@needs_nvcc
def test_what_is_spoiled_is_found(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(SPOILED, pool.map(lambda name: spoiled(name, tmp_path), SPOILED), strict=True))
    for name, by_arch in found.items():
        kernel, _, less = SPOILED[name]
        if less in ("issue", "flight"):
            assert misses(by_arch, [kernel]), name
            cases = roofline.head_rooms(by_arch)[kernel]["B200"].values()
            assert min(case[less] for case in cases) < roofline.FLOOR, name
        assert {"faults": faults, "drift": drift}.get(less, drift)(by_arch), name


@needs_nvcc
def test_narrow_loads_are_no_way_that_is_known(tmp_path):
    SPOILED["narrow"] = (
        "accumulate<float, float>",
        {"smaller_of(16, int(sizeof(T)) * n)": "smaller_of(8, int(sizeof(T)) * n)"},
        "",
    )
    try:
        with pytest.raises(LookupError):
            spoiled("narrow", tmp_path)
    finally:
        del SPOILED["narrow"]


@needs_nvcc
def test_the_committed_table_is_of_these_kernels(cuda):
    assert drift(cuda) == []


def test_the_page_has_the_committed_table():
    kept, before = (json.loads(path.read_text()) for path in (roofline.RESULTS, roofline.BEFORE))
    page = roofline.PAGE.read_text()
    assert roofline.page_table(kept, before) in page
    assert roofline.cost_table(kept) in page


# ------------------------------------------------------------------------------------------------- the counting itself
LOOP = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.EF.128 R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   IADD3 R3, R3, 0x1, RZ ;
        /*0040*/                   FMUL R4, R4, R4 ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
        /*0060*/                   MUFU.RCP R5, R4 ;
        /*0070*/                   CALL.REL.NOINC `($__slow) ;
.L_x_2:
        /*0080*/               @P1 BRA `(.L_x_3) ;
        /*0090*/                   FFMA2 R8, R8.F32x2.HI_LO, R4.F32x2.HI_LO, R8.F32x2.HI_LO ;
        /*00a0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
.L_x_3:
        /*00b0*/               @P2 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
"""


def test_ways_through_a_loop_are_counted():
    code = Code(LOOP)
    top, body = code.loop_with("STG")
    stored, unstored = code.path(top, body), code.path(top, body, stores=False)
    assert [one.operation for one in stored] == [
        "LDG.E.128", "LDG.E.EF.128", "IADD3", "FMUL", "BRA", "BRA", "FFMA2", "STG.E.128", "BRA",
    ]  # fmt: skip
    assert len(unstored) == 7
    assert by_pipe(stored) == {"lsu": 12, "alu": 1, "fp32": 3, "control": 3, "issue": 9}
    assert in_flight(stored, repeats=True) == 32
    assert in_flight(code.path(*code.whole()), repeats=False) == 32
    with pytest.raises(LookupError):
        code.path(top, body, loaded=64)
    with pytest.raises(LookupError):
        code.loop_with("LDS")


@pytest.mark.parametrize(
    ("operation", "name"),
    [("FSETP.GT.AND", "alu"), ("FMNMX", "alu"), ("FFMA", "fp32"), ("IMAD.WIDE", "imad"), ("MUFU.RCP", "xu"),
     ("LDG.E", "lsu"), ("BRA.U", "control"), ("ULDC.64", "uniform"), ("DFMA", "fp64"), ("F2FP.BF16.PACK_AB", "xu")],
)  # fmt: skip
def test_each_operation_has_its_pipe(operation, name):
    assert pipe(operation) == name


def test_residency_is_what_runs_out_first():
    assert roofline.resident_warps("90", 96, 0) == 20
    assert roofline.resident_warps("90", 32, 0) == 64
    assert roofline.resident_warps("86", 32, 0) == 48
    assert roofline.resident_warps("86", 32, 49 * 1024) == 8
