"""How far the kernels' machine code is from the roof that memory sets, on GPUs that are not here.

    python tests/roofline.py             all kernels, the table; writes bench/results/roofline.json and docs/kernels.md
    python tests/roofline.py --page      the same from the results that are there

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
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import cuda_code
from machine_code import Code, Instruction, by_pipe, in_flight

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "roofline.json"
BEFORE = ROOT / "bench" / "results" / "roofline-before.json"  # of the kernels that had no such test
PAGE = ROOT / "docs" / "kernels.md"
TABLE = json.loads((ROOT / "tests" / "gpus.json").read_text())
ARCHS: tuple[str, ...] = tuple(TABLE["architectures"])
FLOOR = 1.5
BYTES = {"float": 4, "fp32": 4, "double": 8, "fp64": 8, "bf16": 2, "fp16": 2}
Kernels = dict[str, dict[str, dict[str, Any]]]  # backend -> architecture -> kernel -> figures
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
    asks: int = -1  # loops outside the innermost where it prefetches, once in `period` turns of this case
    period: int = 1
    asked: int = 128  # bytes of a thread that it then asks for


@dataclass(frozen=True)
class Kernel:
    """What is compiled, and the ways through it; `held`: the floor is asserted."""

    backend: str
    name: str
    cases: tuple[Case, ...]
    held: bool = True


@dataclass
class Cost:
    """One case on one architecture, per element; `flight` per thread; `atomics`: to memory, anywhere in its loop."""

    moved: float
    flight: int
    atomics: int
    pipes: dict[str, float]


# ----------------------------------------------------------------------------------------------------------- kernels
def dampen_cases(
    elements: int, theta: int, fisher: int, streams: int, turn: dict, step: dict, name: str
) -> Iterator[Case]:
    """Of a node's turn when a tile has many nodes, and of all that is done where it has one.

    `turn` and `step` say where these are, `name` how many forget Fishers the second reads; `streams`: these and the
    gradients beside them.
    """
    for selected in (False, True):
        how, write = ("all" if selected else "none") + " selected", 2 * theta * selected
        own = theta * selected
        yield Case(f"turn, {how}", elements, fisher + write, selected, (fisher + own) * elements, STORE, **turn)
        read = fisher * (1 + streams)
        yield Case(f"{name}, {how}", elements, read + write, selected, (read + own) * elements, **step)


def cuda_kernels() -> Iterator[Kernel]:
    """Those of csrc/cuda; a lane holds 32 bytes of the wider dtype."""
    turn = {"asks": 1, "period": 4}  # nodes are gone through in groups of 4
    step = {"loop": STORE, "outward": 2, "asks": 2, "period": 2}
    for types, elements, streams in (
        ("float, float", 8, 1), ("bf16, float", 8, 1), ("fp16, float", 8, 1), ("double, double", 4, 1),
        ("float, float, signed", 8, 2), ("bf16, float, signed", 8, 2),
    ):  # fmt: skip
        theta, fisher = (BYTES[name] for name in types.split(", ")[:2])
        cases = dampen_cases(elements, theta, fisher, streams, turn, step, "step, K = 1")
        yield Kernel("cuda", f"dampen<{types}>", tuple(cases), held=streams == 1 and fisher == 4)
    for gradient in ("float", "bf16", "fp16"):
        yield Kernel("cuda", f"accumulate<{gradient}, float>", (Case("step", 8, BYTES[gradient] + 8, loop=STORE),))
    yield Kernel("cuda", "merge<float>", (Case("step, K = 2", 8, 12, loaded=64, loop=STORE),))
    yield Kernel("cuda", "histogram<float, float>", (Case("step", 8, 8, False, 64, LOAD, 1),), held=False)


def triton_kernels() -> Iterator[Kernel]:
    """Those of Triton, as tests/sass.py names them."""
    for types, elements, streams in (
        ("fp32", 16, 1), ("bf16", 16, 1), ("fp16", 16, 1), ("fp64", 8, 1), ("fp32 signed", 8, 2), ("bf16 signed", 8, 2),
    ):  # fmt: skip
        theta = BYTES[types.split()[0]]
        whole = streams == 1 and theta < 8
        turn = {"asks": 0, "asked": 64}  # the tile of the next node
        step = turn if whole else {"loop": STORE, "outward": 1}
        cases = dampen_cases(elements, theta, max(theta, 4), streams, turn, step, "tile, K = 1")
        yield Kernel("triton", f"dampen {types}", tuple(cases), held=whole)
    for gradient in ("fp32", "bf16", "fp16"):
        yield Kernel("triton", f"accumulate {gradient}", (Case("tile", 16, BYTES[gradient] + 8),))
    yield Kernel("triton", "accumulate one fp32", (Case("tile", 16, 12),))
    yield Kernel("triton", "merge fp32", (Case("tile, K = 2", 16, 12, loaded=128),))
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
    path: list[Instruction] = code.path(top, body, case.stores, case.loaded)
    count, flight = by_pipe(path), in_flight(path, repeats=bool(case.loop))
    if case.asks >= 0:
        extra, prefetched = prefetching(code, case, path)
        flight += prefetched
        count.update({pipe: number / case.period for pipe, number in extra.items()})
    atomics = sum(code.blocks[block].count(r"ATOMG?\b|REDG?\b") for block in body) if case.loop else 0
    pipes = {pipe: round(number / case.elements, 2) for pipe, number in sorted(count.items())}
    return Cost(case.moved, flight, atomics, pipes)


def prefetching(code: Code, case: Case, path: list[Instruction]) -> tuple[Counter[str], int]:
    """What the loop that prefetches costs beside this case, by pipe, and bytes of a thread that it asks for."""
    top, body = code.loop_with(case.loop, case.asks) if case.loop else code.whole()
    inner = code.loop_with(case.loop, case.asks - 1)[1] if case.asks else set()
    blocks = [code.blocks[block].instructions for block in body - inner if code.blocks[block].has(r"CCTL.*PF2")]
    if not blocks:
        return Counter(), 0
    counted = {id(one) for one in path}
    extra = by_pipe([one for block in blocks for one in block if id(one) not in counted])
    if case.asks > case.outward:  # the loop's own overhead as well
        extra.update(by_pipe(code.path(top, body, case.stores, case.loaded)) - by_pipe(path))
    return extra, case.asked


def resident_warps(arch: str, registers: int, shared: int) -> int:
    """Warps that a multiprocessor holds at once: by registers, shared memory, blocks and warps."""
    limits = TABLE["architectures"][arch]
    warps = BLOCK_THREADS // 32
    blocks = [limits["blocks"], limits["warps"] // warps, 65536 // (-(-registers // 8) * 8 * 32) // warps]
    blocks.append(limits["shared_kib"] * 1024 // (shared + 1024))  # each block keeps 1 KiB for the system
    return min(blocks) * warps


def figures(
    backend: str, arch: str, kernels: Iterable[Kernel], csrc: Path = cuda_code.CSRC
) -> dict[str, dict[str, Any]]:
    """Kernel -> registers, warps, cases; for one backend and architecture."""
    codes = cuda_codes(arch, kernels, csrc) if backend == "cuda" else triton_codes(arch, kernels)
    found = {}
    for kernel in kernels:
        if kernel.name not in codes:
            continue
        sass, registers, shared = codes[kernel.name]
        code = Code(sass)
        found[kernel.name] = {
            "registers": registers,
            "warps": resident_warps(arch, registers, shared),
            "local": sum(block.count(r"LDL|STL") for block in code.blocks),  # accesses: spills, arrays
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


EVERY = {"cuda": tuple(cuda_kernels()), "triton": tuple(triton_kernels())}


def held(backend: str) -> tuple[Kernel, ...]:
    """The kernels of a backend that the floor is asserted of."""
    return tuple(kernel for kernel in EVERY[backend] if kernel.held)


def examine(targets: Iterable[tuple[str, str]], held_only: bool = False) -> Kernels:
    """Backend -> architecture -> kernel -> figures, of pairs of the first two; compiled by two processes."""
    jobs = [(backend, arch, held(backend) if held_only else EVERY[backend]) for backend, arch in targets]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(figures, *zip(*jobs, strict=True)))
    kernels: Kernels = {}
    for (backend, arch, _), found in zip(jobs, results, strict=True):
        kernels.setdefault(backend, {})[arch] = found
    return kernels


def head_rooms(by_arch: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Kernel -> GPU -> case -> head room; of one backend."""
    rooms: dict = {}
    for name, gpu in TABLE["gpus"].items():
        for kernel, row in by_arch.get(gpu["arch"], {}).items():
            cases = {case: head_room(gpu, row, figure) for case, figure in row["cases"].items()}
            rooms.setdefault(kernel, {})[name] = cases
    return rooms


# -------------------------------------------------------------------------------------------------------------- table
def least(cases: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """The case with the least head room by instructions, and by bytes in flight."""
    return min(cases, key=lambda case: cases[case]["issue"]), min(cases, key=lambda case: cases[case]["flight"])


def show(kernels: Kernels) -> None:
    """Print, for each kernel and GPU, both head rooms."""
    for backend, by_arch in kernels.items():
        found = head_rooms(by_arch)
        gpus = list(dict.fromkeys(gpu for rooms in found.values() for gpu in rooms))
        print(f"\n{backend:44}" + "".join(f"{gpu[:13]:>14}" for gpu in gpus))
        for kernel, rooms in found.items():
            for case in next(iter(rooms.values())):
                cells = (rooms[gpu][case] for gpu in gpus)
                text = "".join(f"{c['issue']:6.1f} {c['limit'][:2]} {c['flight']:4.1f}" for c in cells)
                print(f"{kernel[:22] + ' ' + case:44}"[:44] + text)
    print("\nof each: head room by instructions, the pipe that is the limit (is: issue slots), by bytes in flight")


SHOWN = ("A100 SXM 80 GB", "RTX 4090", "H100 SXM", "H200", "B200", "RTX 5090")
LIMITED = {"A100": "A100 SXM 80 GB", "H100": "H100 SXM", "B200": "B200"}
NAMES = {
    "issue": "issue slots",
    "alu": "integer",
    "lsu": "loads",
    "xu": "reciprocals",
    "fp32": "fp32",
    "fp64": "fp64",
    "flight": "bytes",
}


def page_table(kernels: Kernels, before: Kernels) -> str:
    """For docs/kernels.md: the least head room of each kernel, and where it was before, in brackets."""
    lines = ["| kernel | " + " | ".join(SHOWN) + " | least on " + ", ".join(LIMITED) + " |"]
    lines.append("| --- |" + " --- |" * (len(SHOWN) + 1))
    for backend, by_arch in kernels.items():
        old = head_rooms(before[backend])
        for kernel, rooms in head_rooms(by_arch).items():
            cells = []
            for gpu in SHOWN:
                if gpu not in rooms:
                    cells.append("")
                    continue
                cells.append(
                    " / ".join(
                        f"{_least(rooms[gpu], key):.1f} ({_least(old[kernel][gpu], key):.1f})"
                        for key in ("issue", "flight")
                    )
                )
            what = ", ".join(_limit(rooms[gpu]) for gpu in LIMITED.values() if gpu in rooms)
            lines.append(f"| {backend}: `{kernel}` | " + " | ".join(cells) + f" | {what} |")
    return "\n".join(lines) + "\n"


def cost_table(kernels: Kernels) -> str:
    """For docs/kernels.md: what each case costs on an H100 and a B200."""
    lines = ["| kernel | way | bytes | instructions, sm_90 / sm_100 | integer | registers | warps | in flight, KB |"]
    lines.append("| --- | --- | ---: | --- | --- | --- | --- | --- |")
    for backend, by_arch in kernels.items():
        for kernel, row in by_arch["100"].items():
            rows = [by_arch["90"][kernel], row]
            for case in row["cases"]:
                each = [one["cases"][case] for one in rows]
                flight = " / ".join(
                    f"{one['warps'] * 32 * cost['flight'] / 1000:.0f}" for one, cost in zip(rows, each, strict=True)
                )
                columns = (
                    [f"{cost['pipes']['issue']:.1f}" for cost in each],
                    [f"{cost['pipes'].get('alu', 0):.1f}" for cost in each],
                )
                columns += [str(one["registers"]) for one in rows], [str(one["warps"]) for one in rows]
                texts = " | ".join(" / ".join(column) for column in columns)
                lines.append(f"| {backend}: `{kernel}` | {case} | {each[1]['moved']:g} | {texts} | {flight} |")
    return "\n".join(lines) + "\n"


def _limit(cases: dict[str, dict[str, Any]]) -> str:
    """What has the least head room, and whether it is below the roof."""
    by_instructions, by_bytes = (cases[case] for case in least(cases))
    room = min(by_instructions["issue"], by_bytes["flight"])
    name = by_instructions["limit"] if by_instructions["issue"] <= by_bytes["flight"] else "flight"
    return NAMES.get(name, name) + (" (below the roof)" if room < 1 else "")


def _least(cases: dict[str, dict[str, Any]], key: str) -> float:
    return min(case[key] for case in cases.values())


def fill_page(kernels: Kernels) -> None:
    """Write both tables into docs/kernels.md."""
    from fiun_fast.bench.files import fill

    before = json.loads(BEFORE.read_text())
    fill(PAGE, "roofline", page_table(kernels, before))
    fill(PAGE, "costs", cost_table(kernels))


def write(kernels: Kernels) -> None:
    """Write the results, a kernel a line."""
    lines = [
        f"  {json.dumps(arch)}: {{\n"
        + ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        + "\n  }"
        for backend in kernels
        for arch, rows in kernels[backend].items()
    ]
    per = iter(lines)
    parts = [
        f" {json.dumps(backend)}: {{\n" + ",\n".join(next(per) for _ in kernels[backend]) + "\n }"
        for backend in kernels
    ]
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    """Examine, print, write."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", nargs="+", metavar="BACKEND:ARCH", help="only what the tests hold, as JSON")
    parser.add_argument("--page", action="store_true", help="only write the page, from the results that are there")
    given = parser.parse_args()
    if given.json:
        json.dump(examine((tuple(target.split(":")) for target in given.json), held_only=True), sys.stdout)
        return
    if given.page:
        kernels = json.loads(RESULTS.read_text())
    else:
        kernels = examine((backend, arch) for backend in EVERY for arch in ARCHS)
        write(kernels)
    show(kernels)
    fill_page(kernels)


if __name__ == "__main__":
    main()
