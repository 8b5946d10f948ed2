"""The Triton suite under other versions of Triton: tests, registers, spills. Writes bench/results/triton-versions.json.

    python tests/triton_versions.py               the versions below, and the table of docs/kernels.md
    python tests/triton_versions.py 3.4.0 3.6.0   only these; those of an earlier run stay in the file
    python tests/triton_versions.py --figures …   registers and spills without the tests

Each version is installed by pip into a temporary folder that comes first on PYTHONPATH; torch stays as it is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# The oldest is what torch 2.6 pins, 3.7.1 is pinned by torch 2.13, 3.8.0 by 2.14; all minor versions in between.
VERSIONS = ("3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
PINS = {"3.2.0": "2.6", "3.7.1": "2.13", "3.8.0": "2.14"}
HERE = Path(__file__).parent
RESULTS = HERE.parent / "bench" / "results" / "triton-versions.json"
TESTS = ("test_triton_aot.py", "test_triton_schedule.py", "test_interface.py", "test_parity.py")


def run(folder: str, *command: str) -> subprocess.CompletedProcess[str]:
    """A command that finds this Triton first."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": folder}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=HERE.parent)


def examine(version: str, test: bool = True) -> dict:
    """Install, test, compile."""
    with tempfile.TemporaryDirectory() as folder:
        pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"triton=={version}")
        old = ("numpy<2.4",) if version < "3.7" else ()  # what their interpreters need
        subprocess.run([sys.executable, *pip, *old], check=True)
        counts = []
        if test:
            tests = run(folder, "-m", "pytest", "-q", "-k", "triton", *(str(HERE / "kernels" / name) for name in TESTS))
            counts = re.findall(r"(\d+) (passed|failed|skipped|error)", tests.stdout.splitlines()[-1])
        figures = run(folder, str(HERE / "sass.py"), "--json")
        if figures.returncode:
            raise SystemExit(f"triton {version}: {figures.stderr}")
        found = json.loads(figures.stdout)
        assert found.pop("triton") == version
        del found["mutants"]
        return {"tests": {outcome: int(n) for n, outcome in counts}, **found}


def table(results: dict[str, dict]) -> str:
    """Markdown: a line for each version."""
    lines = [
        "| Triton | pinned by | tests passed | failed | registers of dampen fp32, sm_80 / 90 / 100 | of merge fp32 | "
        "of accumulate fp32 | in local memory | AMD |",
        "| --- | --- | ---: | ---: | --- | --- | --- | ---: | --- |",
    ]
    for version, found in results.items():
        kernels = found["kernels"]
        nvidia = [target for target in ("cuda:80", "cuda:90", "cuda:100") if target in kernels]
        registers = [
            " / ".join(str(kernels[target][name]["registers"]) for target in nvidia)
            for name in ("dampen fp32", "merge fp32", "accumulate fp32")
        ]
        local = sum(row["local"] for target in nvidia for row in kernels[target].values())
        tests, pinned = found["tests"], PINS.get(version)
        cells = (
            version,
            f"torch {pinned}" if pinned else "",
            tests.get("passed", ""),
            tests.get("failed", 0) + tests.get("error", 0) if tests else "",
            *registers,
            local,
            "compiles" if "hip:gfx942" in kernels else "needs ROCm's linker",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _one_line_a_kernel(text: str) -> str:
    return re.sub(r"\{\s+([^{}]*?)\s+\}", lambda match: "{" + " ".join(match[1].split()) + "}", text)


def main() -> None:
    """Examine the versions named, or all; keep the results, print the table."""
    test = "--figures" not in sys.argv
    for version in [word for word in sys.argv[1:] if not word.startswith("-")] or VERSIONS:
        print(f"Triton {version} …", file=sys.stderr)
        found = examine(version, test)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[version] = found
        ordered = dict(sorted(results.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
        RESULTS.write_text(_one_line_a_kernel(json.dumps(ordered, indent=1)) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
