"""How far the kernels' machine code is from the roof that memory sets, on GPUs that are not here.

    python tests/roofline.py             all kernels, the table; writes bench/results/roofline.json and docs/kernels.md
    python tests/roofline.py --json      the kernels that the tests have a floor for, as JSON

Nothing is run. A kernel's main loop is found in its machine code, and what one turn of it costs is set against what
memory allows in that time (tests/gpus.json): head room 1 means that both need the same time, 2 that half of the issue
slots stay free. By Little's law memory is busy only while bandwidth x latency bytes are on their way: the second head
room is what the resident threads have asked for and not used yet, over that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import cuda_code
from machine_code import SLOW_PATH, Code, Instruction, by_pipe, in_flight

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "roofline.json"
TABLE = json.loads((ROOT / "tests" / "gpus.json").read_text())
ARCHS: tuple[str, ...] = tuple(TABLE["architectures"])
FLOOR = 1.5
BYTES = {"float": 4, "fp32": 4, "double": 8, "fp64": 8, "bf16": 2, "fp16": 2}
BLOCK_THREADS = 128  # of both backends
LOAD, STORE = r"LDG.*\.128", r"STG.*\.128"


@dataclass(frozen=True)
class Case:
    """A way through a kernel: a loop or the whole program, what a thread does in it and moves."""

    name: str
    elements: int  # of a thread
    moved: float  # bytes an element, from and to memory
    stores: bool = True
    loaded: int = 0  # bytes of a thread: the least that wide loads bring in where nothing is stored
    loop: str = ""  # an operation of the innermost loop that is meant; "": the whole program
    outward: int = 0  # loops outside that one


@dataclass(frozen=True)
class Kernel:
    """What is compiled, and the ways through it; `held`: the floor is asserted."""

    backend: str
    name: str
    cases: tuple[Case, ...]
    held: bool = True


@dataclass
class Cost:
    """One case on one architecture, per element; `flight` per thread."""

    moved: float
    flight: int
    pipes: dict[str, float]


# ----------------------------------------------------------------------------------------------------------- kernels
def dampen_cases(elements: int, theta: int, fisher: int, streams: int, step: dict, name: str) -> Iterator[Case]:
    """Of a node's turn when a tile has many nodes, and of one with a single node: `step` says where, `name` how many
    forget Fishers it reads; `streams`: these and the gradients beside them.
    """
    for selected in (False, True):
        how, write = ("all" if selected else "none") + " selected", 2 * theta * selected
        yield Case(f"turn, {how}", elements, fisher + write, selected, fisher * elements, STORE)
        read = fisher * (1 + streams)
        yield Case(f"{name}, {how}", elements, read + write, selected, read * elements, **step)


def cuda_kernels() -> Iterator[Kernel]:
    """Those of csrc/cuda; a lane holds 32 bytes of the wider dtype."""
    step = {"loop": STORE, "outward": 1}
    for types, elements, streams in (
        ("float, float", 8, 1), ("bf16, float", 8, 1), ("fp16, float", 8, 1), ("double, double", 4, 1),
        ("float, float, signed", 8, 2), ("bf16, float, signed", 8, 2),
    ):  # fmt: skip
        theta, fisher = (BYTES[name] for name in types.split(", ")[:2])
        cases = dampen_cases(elements, theta, fisher, streams, step, "step, K = 1")
        yield Kernel("cuda", f"dampen<{types}>", tuple(cases), held=streams == 1 and fisher == 4)
    for gradient in ("float", "bf16", "fp16"):
        yield Kernel("cuda", f"accumulate<{gradient}, float>", (Case("step", 8, BYTES[gradient] + 8, loop=STORE),))
    yield Kernel("cuda", "merge<float>", (Case("step, K = 1", 8, 8, loop=STORE),))
    yield Kernel("cuda", "histogram<float, float>", (Case("step", 8, 8, False, 64, LOAD, 1),), held=False)


def triton_kernels() -> Iterator[Kernel]:
    """Those of Triton, as tests/sass.py names them; what merges has the code of the first Fisher twice, hence K = 2."""
    for types, elements, streams in (
        ("fp32", 16, 2), ("bf16", 16, 2), ("fp16", 16, 2), ("fp64", 8, 2), ("fp32 signed", 8, 4), ("bf16 signed", 8, 4),
    ):  # fmt: skip
        theta = BYTES[types.split()[0]]
        whole = streams == 2 and theta < 8
        step = {} if whole else {"loop": STORE, "outward": 1}
        cases = dampen_cases(elements, theta, max(theta, 4), streams, step, "tile, K = 2")
        yield Kernel("triton", f"dampen {types}", tuple(cases), held=whole)
    for gradient in ("fp32", "bf16", "fp16"):
        yield Kernel("triton", f"accumulate {gradient}", (Case("tile", 16, BYTES[gradient] + 8),))
    yield Kernel("triton", "accumulate one fp32", (Case("tile", 16, 12),))
    yield Kernel("triton", "merge fp32", (Case("tile, K = 2", 16, 12),))
    yield Kernel("triton", "histogram fp32", (Case("step", 8, 8, False, 64, LOAD, 1),), held=False)


# -------------------------------------------------------------------------------------------------------- compilation
def disassembled(cubin: Path) -> dict[str, tuple[str, int, int]]:
    """Kernel -> its SASS, registers of a thread, bytes of shared memory of a block."""
    sass = _output("nvdisasm", "-c", cubin)
    usage = _output("cuobjdump", "-res-usage", cubin)
    known = dict(re.findall(r"Function (\w+):\n(.*)", usage))
    return {
        part.split()[0]: (
            part,
            *(int(re.findall(rf"{key}:(\d+)", known[part.split()[0]])[0]) for key in ("REG", "SHARED")),
        )
        for part in re.split(r"^//-+ \.text\.", sass, flags=re.M)[1:]
    }


def _output(tool: str, *arguments: object) -> str:
    command = [str(cuda_code.tool(tool)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_source(kernels: Iterable[Kernel], csrc: Path) -> str:
    """One file with just these kernels."""
    names = [kernel.name for kernel in kernels]
    used = {"dampen": "dampen.h", "accumulate": "streams.cu", "merge": "streams.cu", "histogram": "histogram.cu"}
    files = sorted({used[re.match(r"\w+", name)[0]] for name in names})
    lines = [f'#include "{csrc}/cuda/{file}"' for file in files] + ["namespace fiun { using namespace common;"]
    for i, name in enumerate(names):
        family, types = re.fullmatch(r"(\w+)<(.*)>", name).groups()
        flags = [f for f in types.split(", ") if f in ("signed", "exponent")]
        types = ", ".join(t for t in types.split(", ") if t not in flags)
        if family == "dampen":
            types = f"{str('exponent' in flags).lower()}, {str('signed' in flags).lower()}, {types}"
        if family == "histogram":
            types = f"{str('signed' in flags).lower()}, {types}"
        lines.append(f"void* k{i}() {{ return reinterpret_cast<void*>(&{family}<{types}>); }}")
    return "\n".join([*lines, "}"])


def cuda_codes(arch: str, kernels: Iterable[Kernel], csrc: Path = cuda_code.CSRC) -> dict[str, tuple[str, int, int]]:
    """Kernel -> as in `disassembled`, from one run of nvcc."""
    with tempfile.TemporaryDirectory() as name:
        source, cubin = Path(name) / "kernels.cu", Path(name) / "kernels.cubin"
        source.write_text(cuda_source(kernels, csrc))
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        subprocess.run(
            [str(cuda_code.tool("nvcc")), *cuda_code.FLAGS, target, "-cubin", "-o", str(cubin), str(source)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return {cuda_code._short(mangled): found for mangled, found in disassembled(cubin).items()}


def triton_codes(arch: str, kernels: Iterable[Kernel]) -> dict[str, tuple[str, int, int]]:
    """The same of Triton's compiler; only what it can compile."""
    import sass

    if sass.why_not(f"cuda:{arch}") is not None:
        return {}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for kernel in kernels:
            cubin = Path(name) / "kernel.cubin"
            compiled = sass.compiled(kernel.name, f"cuda:{arch}")
            cubin.write_bytes(compiled.asm["cubin"])
            ((code, registers, shared),) = disassembled(cubin).values()
            found[kernel.name] = code, registers, max(shared, compiled.metadata.shared)
    return found


# -------------------------------------------------------------------------------------------------------------- costs
def cost(code: Code, case: Case) -> Cost:
    """What a case costs."""
    top, body = code.loop_with(case.loop, case.outward) if case.loop else code.whole()
    cold = f"{SLOW_PATH}|MUFU" if case.name.endswith("none selected") else SLOW_PATH
    path: list[Instruction] = code.path(top, body, case.stores, case.loaded, cold)
    pipes = {pipe: round(count / case.elements, 2) for pipe, count in sorted(by_pipe(path).items())}
    return Cost(case.moved, in_flight(path, repeats=bool(case.loop)), pipes)


def resident_warps(arch: str, registers: int, shared: int) -> int:
    """Warps that a multiprocessor holds at once: by registers, shared memory, blocks and warps."""
    limits = TABLE["architectures"][arch]
    warps = BLOCK_THREADS // 32
    blocks = [limits["blocks"], limits["warps"] // warps, 65536 // (-(-registers // 8) * 8 * 32) // warps]
    blocks.append(limits["shared_kib"] * 1024 // (shared + 1024))  # each block keeps 1 KiB for the system
    return min(blocks) * warps


def figures(job: tuple[str, str, tuple[Kernel, ...]]) -> dict[str, dict]:
    """Kernel -> registers, warps, cases; for one backend and architecture."""
    backend, arch, kernels = job
    codes = (cuda_codes if backend == "cuda" else triton_codes)(arch, kernels)
    found = {}
    for kernel in kernels:
        if kernel.name not in codes:
            continue
        sass, registers, shared = codes[kernel.name]
        code = Code(sass)
        found[kernel.name] = {
            "registers": registers,
            "warps": resident_warps(arch, registers, shared),
            "cases": {case.name: asdict(cost(code, case)) for case in kernel.cases},
        }
    return found


def head_room(gpu: dict, row: dict, case: dict) -> dict[str, float | str]:
    """Of one case on one GPU: by instructions, which limit that is, and by bytes in flight."""
    limits, clock = TABLE["architectures"][gpu["arch"]], gpu["boost_mhz"] * 1e6
    of = {"imad": 0.0, "fp32": 0.0} | case["pipes"]
    lanes = limits["lanes"]
    clocks = {"issue": of["issue"] / 128, "fp32": (of["fp32"] + of["imad"]) / lanes["fp32"]}
    clocks |= {pipe: of[pipe] / lanes[pipe] for pipe in ("imad", "alu", "xu", "lsu", "fp64") if pipe in of}
    limit = max(clocks, key=lambda pipe: clocks[pipe])
    memory = case["moved"] * gpu["sms"] * clock / (gpu["gb_s"] * 1e9)  # clocks of an SM that an element has
    needed = gpu["gb_s"] * TABLE["loaded_latency_ns"] / gpu["sms"]
    return {
        "issue": round(memory / clocks[limit], 2),
        "limit": limit,
        "flight": round(row["warps"] * 32 * case["flight"] / needed, 2),
    }


def examine(
    held_only: bool = False, backends: Iterable[str] = ("cuda", "triton"), archs: Iterable[str] = ARCHS
) -> dict:
    """{"kernels": {backend: {arch: {kernel: figures}}}, "head_room": {backend: {kernel: {gpu: {case: ...}}}}}."""
    every = {"cuda": tuple(cuda_kernels()), "triton": tuple(triton_kernels())}
    jobs = [
        (backend, arch, tuple(kernel for kernel in every[backend] if kernel.held or not held_only))
        for backend in backends
        for arch in archs
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(figures, jobs))
    kernels: dict = {}
    for (backend, arch, _), found in zip(jobs, results, strict=True):
        kernels.setdefault(backend, {})[arch] = found
    rooms: dict = {}
    for backend, by_arch in kernels.items():
        for name, gpu in TABLE["gpus"].items():
            for kernel, row in by_arch.get(gpu["arch"], {}).items():
                cases = {case: head_room(gpu, row, figure) for case, figure in row["cases"].items()}
                rooms.setdefault(backend, {}).setdefault(kernel, {})[name] = cases
    return {"kernels": kernels, "head_room": rooms}


# -------------------------------------------------------------------------------------------------------------- table
def lowest(found: dict, backend: str, kernel: str, gpu: str) -> tuple[float, str, str, float, str]:
    """The least head room by instructions, its limit and case; by bytes in flight, and its case."""
    cases = found["head_room"][backend][kernel][gpu]
    by_issue = min(cases, key=lambda case: cases[case]["issue"])
    by_flight = min(cases, key=lambda case: cases[case]["flight"])
    return cases[by_issue]["issue"], cases[by_issue]["limit"], by_issue, cases[by_flight]["flight"], by_flight


def show(found: dict) -> None:
    """Print, for each kernel and GPU, both head rooms."""
    for backend, kernels in found["head_room"].items():
        gpus = list(dict.fromkeys(gpu for rooms in kernels.values() for gpu in rooms))
        print(f"\n{backend:34}" + "".join(f"{gpu[:13]:>14}" for gpu in gpus))
        for kernel, rooms in kernels.items():
            for case in next(iter(rooms.values())):
                cells = (rooms[gpu][case] for gpu in gpus)
                text = "".join(f"{c['issue']:6.1f} {c['limit'][:2]} {c['flight']:4.1f}" for c in cells)
                print(f"{kernel[:20] + ' ' + case:44}"[:44] + text)
    print("\nof each: head room by instructions, the pipe that is the limit (is: issue slots), by bytes in flight")


def main() -> None:
    """Examine, print, write."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="only what the tests hold, as JSON")
    parser.add_argument("--backend", choices=("cuda", "triton"), action="append")
    parser.add_argument("--arch", choices=ARCHS, action="append")
    given = parser.parse_args()
    found = examine(given.json, given.backend or ("cuda", "triton"), given.arch or ARCHS)
    if given.json:
        json.dump(found, sys.stdout)
        return
    show(found)
    if not given.backend and not given.arch:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
