"""What the compiler made of the Triton kernels: registers, spills, access widths, division. No GPU is needed.

    python tests/sass.py            a table for each of sm_80, sm_90, sm_100, gfx90a, gfx942 and gfx950
    python tests/sass.py --json     the same and the deliberately bad kernels, for test_triton_aot.py

It runs in a process of its own, because kernels are either compiled or interpreted, for the life of a process.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from fiun_fast.kernels import triton_histogram, triton_kernels
from fiun_fast.kernels import triton_host as host
from fiun_fast.kernels.triton_aot import Variant, accumulate_variant, compile_variant, dampen_variant, merge_variant

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx90a", "hip:gfx942", "hip:gfx950")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

VARIANTS: dict[str, Variant] = {
    "dampen fp32": dampen_variant(FP32, FP32),
    "dampen bf16": dampen_variant(FP32, BF16),
    "dampen fp16": dampen_variant(FP32, FP16),
    "dampen fp32 mean": dampen_variant(FP32, FP32, "mean"),
    "dampen fp32 exponent": dampen_variant(FP32, FP32, "max", True),
    "dampen fp64": dampen_variant(FP64, FP64),
    "dampen fp32 signed": dampen_variant(FP32, FP32, signed=True),
    "dampen bf16 signed": dampen_variant(FP32, BF16, signed=True),
    "merge fp32": merge_variant(FP32),
    "merge fp32 sum": merge_variant(FP32, "sum"),
    "merge fp32 mean": merge_variant(FP32, "mean"),
    "accumulate fp32": accumulate_variant(FP32, FP32),
    "accumulate bf16": accumulate_variant(BF16, FP32),
    "accumulate fp16": accumulate_variant(FP16, FP32),
    "accumulate fp32 |g|": accumulate_variant(FP32, FP32, power=1),
    "accumulate fp32 zeroing": accumulate_variant(FP32, FP32, zero=True),
    "accumulate one fp32": accumulate_variant(FP32, FP32, one=True),
}

INT64 = torch.int64
HISTOGRAM = Variant(
    "histogram",
    (INT64, INT64, INT64, INT64, FP32, INT64, FP32, INT64, INT64, 1, 1),
    triton_histogram.constants(FP32, "max"),
)

AMD_VARIANTS = ("dampen fp32", "dampen bf16", "merge fp32", "merge fp32 mean", "accumulate fp32 zeroing")

NO_HINT = {"pointer = tl.multiple_of(pointer, 16)": "pass"}
HINT_BEFORE_CAST = {
    "address.to(tl.pointer_type(DTYPE), bitcast=True)": (
        "tl.multiple_of(address, 16).to(tl.pointer_type(DTYPE), bitcast=True)"
    )
}
SELECTED_FIRST = {  # the quick way too knows it before it reads theta
    "    touched = tl.broadcast_to((above": "    selected = difference < 0\n    touched = tl.broadcast_to((above",
}
NO_ASM = {"elif FLUSHES:": "elif False:"}
FLUSHING = 'tl.inline_asm_elementwise("div.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)'

# name -> (variant, text in the device code -> what a careless change would write, further compiler options)
MUTANTS: dict[str, tuple[str, dict[str, str], dict[str, object]]] = {
    "dampen: no alignment hint": ("dampen fp32", NO_HINT, {}),
    "dampen: hint before the cast": ("dampen fp32", HINT_BEFORE_CAST | NO_HINT, {}),
    "dampen: mask element by element": ("dampen fp32", {"rows < length // VECTOR": "offsets < length"}, {}),
    "dampen: theta by element": ("dampen fp32", {"mask=touched": "mask=selected"} | SELECTED_FIRST, {}),
    "dampen: approximate division": ("dampen fp32", NO_ASM | {"tl.div_rn(x, y)": "x / y"}, {}),
    "dampen: flushing division": ("dampen fp32", NO_ASM | {"tl.div_rn(x, y)": FLUSHING}, {}),
    "dampen: too few registers": ("dampen fp32", {}, {"maxnreg": 40}),
    "dampen: more registers": ("dampen fp32", {}, {"maxnreg": 255, "num_warps": 2}),
    "dampen: fused multiply-add": ("dampen fp32 mean", {}, {"enable_fp_fusion": True}),
    "dampen: fenced counters": ("dampen fp32", {', sem="relaxed"': ""}, {}),
    "dampen: maximum without NaN": ("dampen fp32", {", propagate_nan=tl.PropagateNan.ALL": ""}, {}),
    "merge: no alignment hint": ("merge fp32", NO_HINT, {}),
    "merge: mask element by element": ("merge fp32", {"rows < length // VECTOR": "offsets < length"}, {}),
    "merge: approximate division": ("merge fp32 mean", NO_ASM | {"tl.div_rn(x, y)": "x / y"}, {}),
    "merge: too few registers": ("merge fp32", {}, {"maxnreg": 24}),
    "merge: fused multiply-add": ("merge fp32 sum", {}, {"enable_fp_fusion": True}),
    "accumulate: no alignment hint": ("accumulate fp32", NO_HINT, {}),
    "accumulate: mask element by element": ("accumulate fp32", {"rows < length // VECTOR": "offsets < length"}, {}),
    "accumulate: too few registers": ("accumulate fp32 zeroing", {}, {"maxnreg": 24}),
    "accumulate: fused multiply-add": ("accumulate fp32", {}, {"enable_fp_fusion": True}),
}


RECIPROCAL = "rcp.approx.ftz.f32"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.M)


def tool(name: str) -> str:
    """A program of the CUDA toolkit, from Triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compiled(name: str, target: str):
    """Triton's compiled kernel; "histogram fp32" is not among the variants, because its code stands elsewhere."""
    if name != "histogram fp32":
        return compile_variant(VARIANTS[name], target)
    both = SimpleNamespace(histogram=triton_histogram.histogram, dampen=triton_kernels.dampen)
    with mock.patch.object(host, "device_code", return_value=both):
        return compile_variant(HISTOGRAM, target)


def figures(kernel) -> dict[str, int | None]:
    """What the machine code of a compiled kernel says."""
    return _amd(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _nvidia(kernel)


def _nvidia(kernel) -> dict[str, int | None]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = re.sub(r"//.*", "", kernel.asm["ptx"])
    matching = _counter(INSTRUCTION.findall(sass))
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    warps = kernel.metadata.num_warps
    return {
        "registers": registers,
        "warps": min(64, 65536 // (-(-registers // 8) * 8 * 32 * warps) * warps),  # of an SM with 64 Ki registers
        "instructions": matching(""),
        "node_loop": _node_loop(sass),
        "load128": matching(r"LDG\.E(\.\w+)*\.128"),
        "store128": matching(r"STG\.E(\.\w+)*\.128"),
        "local": matching(r"LDL|STL"),
        "fences": matching(r"MEMBAR|FENCE|CCTL(?!\.E\.PF)|ERRBAR"),
        "division_checks": matching(r"FCHK"),
        "div_rn": len(re.findall(r"\bdiv\.rn\.f", ptx)),
        "approximate": len(re.findall(r"\.(?:approx|full)\b|\.ftz\b", ptx.replace(RECIPROCAL, ""))),
        "reciprocals": ptx.count(RECIPROCAL),  # what exact quotients are made of
        "fma": len(re.findall(r"\bfma\.rn\.f(?:32|64)(?!x)", ptx)) + 2 * ptx.count("fma.rn.f32x2"),
        "pairs_fused": matching("FFMA2"),  # in machine code, of two numbers each; those of the PTX are what is meant
        "pairs_meant": ptx.count("fma.rn.f32x2"),
        "nan_max": len(re.findall(r"\bmax\.NaN\.f32", ptx)),
    }


def _node_loop(sass: str) -> int | None:
    """Instructions of dampen's loop over nodes, aligned path; None where there is no such loop.

    Its load of I is the only one of 16 bytes that says "evict first"; the loop begins at the label before it and ends
    with the last branch back there.
    """
    load = re.search(r"LDG\.E\.EF\.128", sass)
    labels = re.findall(r"^(\.L_x_\d+):", sass[: load.start()], re.M) if load else []
    for label in reversed(labels):
        begin = sass.index(f"\n{label}:")
        back = [m.end() for m in re.finditer(rf"BRA.*`\({re.escape(label)}\)", sass) if m.end() > load.start()]
        if back:
            return len(INSTRUCTION.findall(sass[begin : back[-1]]))
    return None


def _amd(assembly: str) -> dict[str, int]:
    def noted(key: str) -> int:
        return sum(int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", assembly))

    matching = _counter(re.findall(r"^\s+((?:global|flat|buffer|scratch|s|v|ds)_\w+)", assembly, re.M))
    registers = noted("vgpr_count") + noted("agpr_count")
    return {
        "registers": registers,
        "warps": 4 * min(8, 512 // (-(-registers // 8) * 8)),  # of a compute unit of four SIMDs, CDNA 2 and 3
        "instructions": matching(""),
        "load128": matching(r"(global|buffer|flat)_load_dwordx4"),
        "store128": matching(r"(global|buffer|flat)_store_dwordx4"),
        "local": matching("scratch_") + noted("vgpr_spill_count") + noted("private_segment_fixed_size"),
        "div_rn": matching("v_div_fixup"),
        "approximate": matching("v_rcp_f32") - matching("v_div_fixup_f32"),
        "flushes": int("amdhsa_float_denorm_mode_32 3" not in assembly),
    }


def _counter(operations: list[str]) -> Callable[[str], int]:
    count = collections.Counter(operations)
    return lambda pattern: sum(n for operation, n in count.items() if re.match(pattern, operation))


DEVICE_CODE = ("triton_kernels", "triton_quick", "triton_tiles")


@contextmanager
def changed(replacements: dict[str, str]):
    """Inside, the kernels are those of a changed copy of the files of device code."""
    sources = {name: Path(triton_kernels.__file__).with_name(f"{name}.py").read_text() for name in DEVICE_CODE}
    for old, new in replacements.items():
        assert any(old in source for source in sources.values()), old
        sources = {name: source.replace(old, new) for name, source in sources.items()}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "path", [folder, *sys.path]):
        package = Path(folder) / "changed_kernels"
        package.mkdir()
        for name, source in sources.items():
            (package / f"{name}.py").write_text(source)
        try:
            module = importlib.import_module("changed_kernels.triton_kernels")
            with mock.patch.object(host, "device_code", return_value=module):
                yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "changed_kernels"]:
                del sys.modules[name]


def mutant_figures(name: str, target: str = "cuda:90") -> dict[str, int | None]:
    """Figures of one deliberately bad kernel."""
    variant, replacements, flags = MUTANTS[name]
    original = host.options

    def options(*arguments) -> dict[str, object]:
        return original(*arguments) | flags

    with changed(replacements), mock.patch.object(host, "options", options):
        return figures(compile_variant(VARIANTS[variant], target))


def why_not(target: str) -> str | None:
    """None where this Triton can compile for the target, else the reason."""
    if target.startswith("cuda"):
        known = subprocess.run([tool("ptxas"), "--help"], capture_output=True, text=True, check=True).stdout
        if f"sm_{target.partition(':')[2]}" in known or (
            target == "cuda:100" and Path(tool("ptxas-blackwell")).exists()
        ):
            return None
        return "its assembler does not know the architecture"
    try:
        compile_variant(VARIANTS["accumulate one fp32"], target)
    except Exception as error:  # Triton raises a bare Exception for a missing linker
        return re.sub(r"/\S*/", "", str(error).strip().splitlines()[0])
    return None


def examine(mutants: bool = False) -> dict:
    """All figures: {"triton", "kernels": {target: {kernel: figures}}, "not_compiled": {target: why}, "mutants"}."""
    reasons = {target: why_not(target) for target in TARGETS}
    return {
        "triton": triton.__version__,
        "kernels": {
            target: {
                name: figures(compile_variant(VARIANTS[name], target))
                for name in (AMD_VARIANTS if target.startswith("hip") else VARIANTS)
            }
            for target, reason in reasons.items()
            if reason is None
        },
        "not_compiled": {target: reason for target, reason in reasons.items() if reason is not None},
        "mutants": {name: mutant_figures(name) for name in MUTANTS} if mutants else {},
    }


COLUMNS = {
    "registers": ("regs", "registers of a thread"),
    "warps": ("warps", "that a streaming multiprocessor (AMD: compute unit) holds at once with so many registers"),
    "instructions": ("ops", "instructions in all"),
    "node_loop": ("loop", "instructions of the loop over nodes, with all ways through it; tests/roofline.py has each"),
    "load128": ("ld128", "loads of 16 bytes"),
    "store128": ("st128", "stores of 16 bytes"),
    "local": ("local", "accesses to local memory: spills"),
    "div_rn": ("div", "IEEE divisions"),
    "approximate": ("bad", "approximate divisions, operations that flush subnormals (a power in float64 has its own)"),
    "fma": ("fma", "products contracted with sums (those of the power are meant)"),
}


def show(found: dict) -> None:
    """Print the figures, a table for each target, and what the columns are."""
    print(
        f"Triton {found['triton']}: tiles of {host.BLOCK:,} elements, {host.NUM_WARPS} warps, "
        f"at most {host.MAX_REGISTERS} registers ({host.MAX_REGISTERS_WIDE} where it computes in float64)"
    )
    names = max(map(len, VARIANTS))
    for target, kernels in found["kernels"].items():
        print(f"\n{target:{names}}" + "".join(f"{title:>6}" for title, _ in COLUMNS.values()))
        print("─" * (names + 6 * len(COLUMNS)))
        for name, row in kernels.items():
            cells = ("" if row.get(key) is None else str(row[key]) for key in COLUMNS)
            print(f"{name:{names}}" + "".join(f"{cell:>6}" for cell in cells).rstrip())
    for target, reason in found["not_compiled"].items():
        print(f"\n{target}: not compiled: {reason}")
    print()
    for title, meaning in COLUMNS.values():
        print(f"{title:>5}  {meaning}")


ROOT = Path(__file__).parent.parent
AMD_RESULTS, PAGE = ROOT / "bench" / "results" / "amd-code.json", ROOT / "docs" / "kernels.md"
AMD_COLUMNS = {
    "registers": "vector registers",
    "warps": "wavefronts of a compute unit",
    "instructions": "instructions",
    "load128": "16-byte loads",
    "store128": "stores",
    "local": "scratch, spills",
    "div_rn": "IEEE divisions",
}


def amd_table(found: dict) -> str:
    """For docs/kernels.md: a line for each kernel, a figure for each AMD target."""
    targets = [target for target in found["kernels"] if target.startswith("hip")]
    names = " / ".join(target.partition(":")[2] for target in targets)
    lines = [f"| Triton {found['triton']}, {names} | " + " | ".join(AMD_COLUMNS.values()) + " |"]
    lines.append("| --- |" + " --- |" * len(AMD_COLUMNS))
    for name in AMD_VARIANTS:
        rows = [found["kernels"][target][name] for target in targets]
        cells = (" / ".join(str(row[key]) for row in rows) for key in AMD_COLUMNS)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def fill_page(found: dict) -> None:
    """Keep the AMD targets' figures, and put them into docs/kernels.md."""
    from fiun_fast.bench.files import fill

    kept = {t: rows for t, rows in found["kernels"].items() if t.startswith("hip")}
    lines = (
        f"  {json.dumps(t)}: {{\n"
        + ",\n".join(f"   {json.dumps(n)}: {json.dumps(r)}" for n, r in rows.items())
        + "\n  }"
        for t, rows in kept.items()
    )
    text = f'{{\n "triton": {json.dumps(found["triton"])},\n "kernels": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    AMD_RESULTS.write_text(text)
    fill(PAGE, "amd", amd_table(json.loads(text)))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON, and those of the deliberately bad kernels")
    parser.add_argument(
        "--page", action="store_true", help="AMD's, into bench/results/amd-code.json and docs/kernels.md"
    )
    given = parser.parse_args()
    if given.json:
        json.dump(examine(mutants=True), sys.stdout)
    elif given.page:
        fill_page(examine())
    else:
        show(examine())


if __name__ == "__main__":
    main()
