"""What nvcc made of every kernel in csrc/cuda: registers, spills, access widths, division. No GPU is needed.

python tests/cuda_code.py              a table, for all architectures of a wheel
python tests/cuda_code.py 90           only for this one
"""

from __future__ import annotations

import ast
import collections
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"


def setting(name: str):
    """A constant of setup.py, so that what is looked at here is what is built there."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"setup.py does not set {name}")


ARCHS: tuple[str, ...] = setting("ARCHS")
FLAGS: list[str] = setting("NVCC_FLAGS")

RECIPROCAL = "rcp.approx.ftz.f32"
FLAGS_OF = {"dampen": ("exponent", "signed"), "histogram": ("signed",)}  # what a kernel's first template arguments say

# One kernel in a file of its own, because the files that exist take longer to compile.
ONE = """#include "dampen.h"
namespace fiun { DampenKernel one() { return common::dampen<false, false, float, float>; } }
"""

# name -> (source, text in csrc -> what a careless change would write, further compiler options)
MUTANTS: dict[str, tuple[str, dict[str, str], list[str]]] = {
    "accesses of 8 bytes": (
        "streams.cu",
        {"smaller_of(16, int(sizeof(T)) * n)": "smaller_of(8, int(sizeof(T)) * n)"},
        [],
    ),
    "theta by element": (
        "one.cu",
        {
            "load<false>(reinterpret_cast<const V*>(theta + u * warp_threads * unit), values[u])": (
                "for (int i = 0; i < count; ++i) values[u][i] = "
                "reinterpret_cast<const V*>(theta + u * warp_threads * unit)[i]"
            )
        },
        [],
    ),
    "too few registers": ("one.cu", {"blocks_at_once<with_sign, T, F>)": "16)"}, []),
    "arrays indexed at run time": ("one.cu", {"#pragma unroll\n": "#pragma unroll 1\n"}, []),
    "approximate division": ("one.cu", {}, ["-prec-div=false"]),
    "contraction": ("streams.cu", {}, ["-fmad=true"]),
    "as it is": ("one.cu", {}, []),  # for architectures that are too many to look at all kernels
    "pairs contracted": (
        "one.cu",
        {"fused(alpha, two_of(original + i), {0, 0})": "times(alpha, two_of(original + i))"},
        [],
    ),
}


@functools.cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: in CUDA_HOME, on PATH, in /usr/local/cuda, or from Triton's wheel."""
    home, triton = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), importlib.util.find_spec("triton")
    places = [f"{home}/bin"] * bool(home) + [None, "/usr/local/cuda/bin"]
    places += [str(Path(str(triton.origin)).parent / "backends/nvidia/bin")] if triton else []
    return next((found for place in places if (found := shutil.which(name, path=place))), None)


def why_not() -> str | None:
    """None where the kernels can be compiled and read, else what is missing."""
    missing = [name for name in ("nvcc", "nvdisasm", "c++filt") if tool(name) is None]
    return (
        f"{' and '.join(missing)} not found: neither on PATH, nor in CUDA_HOME, nor in Triton's wheel"
        if missing
        else None
    )


def compiled(source: Path, arch: str, *options: str) -> dict[str, dict[str, int]]:
    """Kernel -> figures, for one source and one architecture.

    Raises:
        RuntimeError: nvcc refused it.

    """
    with tempfile.TemporaryDirectory() as name:
        folder, target = Path(name), f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [str(tool("nvcc")), *FLAGS, target, *options, "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
        cubin = folder / "kernels.cubin"
        done = subprocess.run([*command, "-cubin", "-o", str(cubin), str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
        machine_code = subprocess.run(
            [str(tool("nvdisasm")), "-c", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        ptx = re.sub(r"//.*", "", (folder / f"{source.stem}.ptx").read_text())
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?\n)\}\n", ptx, re.S))
    usage = dict(re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers)", done.stderr, re.S))
    code = {part.split()[0]: part for part in re.split(r"^//-+ \.text\.", machine_code, flags=re.M)[1:]}
    assert set(bodies) == set(usage) == set(code), (source, set(bodies), set(usage), set(code))
    return {_short(kernel): _figures(usage[kernel], bodies[kernel], code[kernel]) for kernel in code}


def _figures(usage: str, ptx: str, code: str) -> dict[str, int]:
    """What ptxas says of one kernel, its PTX, and its machine code."""
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code, re.M)
    count = collections.Counter(operations)

    def matching(pattern: str) -> int:
        return sum(n for operation, n in count.items() if re.match(pattern, operation))

    zeros = {"0f00000000", *re.findall(r"\bmov\.[bf]32\s+(%\w+), 0f00000000;", ptx)}  # what is added to products
    return {
        "registers": int(re.findall(r"Used (\d+) registers", usage)[0]),
        "stack": max(map(int, re.findall(r"(\d+) bytes stack frame", usage))),
        "spills": max(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", usage))),
        "local": matching(r"LDL|STL"),
        "instructions": len(operations),
        "load128": matching(r"LDG\.E(\.\w+)*\.128"),
        "store128": matching(r"STG\.E(\.\w+)*\.128"),
        "division_checks": matching(r"FCHK"),
        "div_rn_f32": len(re.findall(r"\bdiv\.rn\.f32", ptx)),
        "div_rn_f64": len(re.findall(r"\bdiv\.rn\.f64", ptx)),
        "approximate": len(re.findall(r"\.(?:approx|full)\b|\.ftz\b", ptx.replace(RECIPROCAL, ""))),
        "reciprocals": ptx.count(RECIPROCAL),  # what quick.h makes exact quotients of
        "fma": len(re.findall(r"\bfma\.rn\.f(?:32|64)(?!x)", ptx)) + 2 * ptx.count("fma.rn.f32x2"),
        "products": sum(addend in zeros for addend in re.findall(r"\bfma\.rn\.f32\s[^;]*, (\w+|%\w+);", ptx)),
        "pairs_fused": matching("FFMA2"),  # in machine code; those of the PTX are what is meant
        "pairs_meant": ptx.count("fma.rn.f32x2"),
        "fusible": len(re.findall(r"\b(?:mul|add|sub)\.f(?:32|64)", ptx)),  # with .rn ptxas keeps the two steps apart
    }


@functools.cache
def _short(mangled: str) -> str:
    """As dampen<float, float, exponent, signed>."""
    name = subprocess.run([str(tool("c++filt")), mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"^void |\(.*|fiun::|common::|\s+$", "", name, flags=re.S)
    family, _, arguments = name.removesuffix(">").partition("<")
    flags = [one == "true" for one in re.findall("true|false", arguments)]
    types = [one for one in arguments.split(", ") if one and one not in ("true", "false")]
    said = [word for word, flag in zip(FLAGS_OF.get(family, ()), flags, strict=True) if flag]
    return f"{family}<{', '.join([*types, *said])}>" if types else family


def every_kernel(archs: Iterable[str], csrc: Path = CSRC) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> figures, of all sources there are; two compilations at a time."""
    jobs = [(source, arch) for arch in archs for source in sorted((csrc / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: compiled(*job), jobs))
    return {(kernel, arch): row for (_, arch), rows in zip(jobs, results, strict=True) for kernel, row in rows.items()}


def mutant(name: str, arch: str = "90") -> dict[str, dict[str, int]]:
    """Kernel -> figures of one deliberately bad copy of the source."""
    source, replacements, options = MUTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(CSRC, csrc)
        (csrc / "cuda" / "one.cu").write_text(ONE)
        changed = dict.fromkeys(replacements, 0)
        for path in (*csrc.glob("*.h"), *(csrc / "cuda").iterdir()):
            text = path.read_text()
            for old, new in replacements.items():
                changed[old] += old in text
                text = text.replace(old, new)
            path.write_text(text)
        assert all(changed.values()), f"not in the source any more: {changed}"
        return compiled(csrc / "cuda" / source, arch, *options)


def table(found: Mapping[tuple[str, str], Mapping[str, int]]) -> str:
    """Registers by architecture; of the other figures the largest over all of them."""
    kernels = sorted({kernel for kernel, _ in found})
    archs = list(dict.fromkeys(arch for _, arch in found))
    others = ("load128", "store128", "local", "spills", "stack")
    lines = [f"{'registers of':34}" + "".join(f"{'sm_' + a:>8}" for a in archs) + "".join(f"{o:>10}" for o in others)]
    for kernel in kernels:
        rows = [found[kernel, arch] for arch in archs]
        lines.append(f"{kernel:34}" + "".join(f"{row['registers']:8}" for row in rows))
        lines[-1] += "".join(f"{max(row[other] for row in rows):10}" for other in others)
    return "\n".join(lines)


if __name__ == "__main__":
    if reason := why_not():
        raise SystemExit(reason)
    print(table(every_kernel(sys.argv[1:] or ARCHS)))
