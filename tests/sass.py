"""What the compiler made of the Triton kernels: registers, spills, access widths, division. No GPU is needed.

    python tests/sass.py            a table, for sm_80, sm_90 and sm_100
    python tests/sass.py --json     the same and the deliberately bad kernels, for test_triton_aot.py

It runs in a process of its own, because kernels are either compiled or interpreted, for the life of a process.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import triton

from fiun_fast.kernels import triton as backend
from fiun_fast.kernels import triton_aot, triton_kernels
from fiun_fast.kernels.triton_aot import Variant, accumulate_variant, compile_variant, dampen_variant, merge_variant

TARGETS = ("cuda:80", "cuda:90", "cuda:100")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

VARIANTS: dict[str, Variant] = {
    "dampen fp32": dampen_variant(FP32, FP32),
    "dampen bf16": dampen_variant(FP32, BF16),
    "dampen fp16": dampen_variant(FP32, FP16),
    "dampen fp32 mean": dampen_variant(FP32, FP32, "mean"),
    "dampen fp32 exponent": dampen_variant(FP32, FP32, "max", True),
    "dampen fp64": dampen_variant(FP64, FP64),
    "merge fp32": merge_variant(FP32),
    "merge fp32 sum": merge_variant(FP32, "sum"),
    "accumulate fp32": accumulate_variant(FP32, FP32),
    "accumulate bf16": accumulate_variant(BF16, FP32),
    "accumulate fp32 zeroing": accumulate_variant(FP32, FP32, zero=True),
    "accumulate one fp32": accumulate_variant(FP32, FP32, one=True),
}

# name -> (variant, text in triton_kernels.py -> what a careless change would write, further compiler options)
MUTANTS: dict[str, tuple[str, dict[str, str], dict[str, object]]] = {
    "no alignment hint": ("dampen fp32", {"pointer = tl.multiple_of(pointer, 16)": "pass"}, {}),
    "hint before the cast": (
        "dampen fp32",
        {
            "address.to(tl.pointer_type(DTYPE), bitcast=True)": (
                "tl.multiple_of(address, 16).to(tl.pointer_type(DTYPE), bitcast=True)"
            ),
            "pointer = tl.multiple_of(pointer, 16)": "pass",
        },
        {},
    ),
    "mask element by element": ("dampen fp32", {"rows < length // VECTOR": "offsets < length"}, {}),
    "theta by element": ("dampen fp32", {"mask=touched": "mask=selected"}, {}),
    "approximate division": ("dampen fp32", {"tl.div_rn(x, y)": "x / y"}, {}),
    "fused multiply-add": ("accumulate fp32", {}, {"enable_fp_fusion": True}),
    "too few registers": ("dampen fp32", {}, {"maxnreg": 40}),
    "fenced counters": ("dampen fp32", {', sem="relaxed"': ""}, {}),
}


def tool(name: str) -> str:
    """A program of the CUDA toolkit, from Triton's wheel."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def figures(kernel) -> dict[str, object]:
    """What the machine code of a compiled kernel says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = re.sub(r"//.*", "", kernel.asm["ptx"])
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass, re.M)
    count = collections.Counter(code)

    def matching(pattern: str) -> int:
        return sum(n for op, n in count.items() if re.match(pattern, op))

    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    warps = kernel.metadata.num_warps
    return {
        "registers": registers,
        "warps_per_sm": min(64, 65536 // (-(-registers // 8) * 8 * 32 * warps) * warps),
        "instructions": len(code),
        "load128": matching(r"LDG\.E(\.\w+)*\.128"),
        "store128": matching(r"STG\.E(\.\w+)*\.128"),
        "load16_or_32": matching(r"LDG\.E(\.EF)?(\.U16)?(\.CONSTANT)?$"),
        "local": matching(r"LDL|STL"),
        "fences": matching(r"MEMBAR|FENCE|CCTL|ERRBAR"),
        "reciprocals": matching(r"MUFU\.RCP$"),
        "division_checks": matching(r"FCHK"),
        "div_rn": len(re.findall(r"\bdiv\.rn\.f", ptx)),
        "approximate": len(re.findall(r"\.(?:approx|full)\b|\.ftz\b", ptx)),
        "fma": len(re.findall(r"\bfma\.rn\.f(?:32|64)", ptx)),
        "nan_max": len(re.findall(r"\bmax\.NaN\.f32", ptx)),
    }


@contextmanager
def changed(replacements: dict[str, str]):
    """Inside, the kernels are those of a changed copy of triton_kernels.py."""
    source = Path(triton_kernels.__file__).read_text()
    for old, new in replacements.items():
        assert old in source, old
        source = source.replace(old, new)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed_kernels.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("changed_kernels", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with mock.patch.object(triton_aot, "device_code", return_value=module):
            yield


def mutant_figures(name: str, target: str = "cuda:90") -> dict[str, object]:
    """Figures of one deliberately bad kernel."""
    variant, replacements, flags = MUTANTS[name]
    original = backend.options

    def options(*arguments) -> dict[str, object]:
        return original(*arguments) | flags

    with changed(replacements), mock.patch.object(triton_aot, "options", options):
        return figures(compile_variant(VARIANTS[variant], target))


def targets() -> tuple[str, ...]:
    """Those that this Triton's assembler knows."""
    known = subprocess.run([tool("ptxas"), "--help"], capture_output=True, text=True, check=True).stdout
    if Path(tool("ptxas-blackwell")).exists():
        known += "sm_100"
    return tuple(target for target in TARGETS if f"sm_{target.partition(':')[2]}" in known)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {
        f"{name} {target}": figures(compile_variant(v, target)) for target in targets() for name, v in VARIANTS.items()
    }
    if arguments.json:
        mutants = {name: mutant_figures(name) for name in MUTANTS}
        json.dump({"triton": triton.__version__, "kernels": found, "mutants": mutants}, sys.stdout)
        return
    columns = (
        "registers",
        "warps_per_sm",
        "instructions",
        "load128",
        "store128",
        "local",
        "div_rn",
        "approximate",
        "fma",
    )
    print(f"Triton {triton.__version__}, tiles of {backend.BLOCK} elements, {backend.NUM_WARPS} warps")
    print(f"{'kernel':34}" + "".join(f"{column:>13}" for column in columns))
    for name, row in found.items():
        print(f"{name:34}" + "".join(f"{row[column]:>13}" for column in columns))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
