"""The CUDA kernels' own source under AddressSanitizer and UndefinedBehaviorSanitizer, on the CPU.

    python tests/sanitize_shim.py

Runs tests/kernels/test_parity.py on the backend `cuda_shim`: every tensor of the case table is a block of memory that
ends where its data ends, so that an access beyond it is found. Changed copies of the source show that it would be.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

# what is wrong -> (file in csrc/cuda, its text, what a careless change would write, what the sanitizer says)
MUTANTS = {
    "loads beyond the end": (
        "lanes.h",
        "if (u * stride < left) load<shared>(forget + u * stride, loaded[u]);",
        "if (u * stride <= left) load<shared>(forget + u * stride, loaded[u]);",
        "heap-buffer-overflow",
    ),
    "a shift by more bits than there are": (
        "dampen.h",
        "const bool here = chosen >> (u * unit + i) & 1;",
        "const bool here = chosen >> 8 * (u * unit + i) & 1;",
        "shift exponent",
    ),
}


def library(name: str) -> str:
    """Where the compiler has a library of its own."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
    return path.strip()


def parity(csrc: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The parity tests on the shim, built with the sanitizers from that source."""
    environment = os.environ | {"FIUN_SHIM_FLAGS": FLAGS, "FIUN_SHIM_CSRC": str(csrc)}
    build = [sys.executable, "-c", "import shim; shim.library()"]
    subprocess.run(build, env=environment, cwd=TESTS, check=True)  # first, because the compiler needs no preloading
    environment |= {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",  # Python itself is built without
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        *options,
        "tests/kernels/test_parity.py",
    ]
    return subprocess.run(
        command, env=environment, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def main() -> None:
    """Exit status 0 if the kernels are clean and the spoiled copies are not."""
    done = parity(CSRC, "-k", "cuda_shim")
    print(done.stdout[-4000:])
    if done.returncode != 0:
        raise SystemExit("the CUDA kernels are not clean")
    for name, (file, old, new, complaint) in MUTANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            csrc = Path(folder) / "csrc"
            shutil.copytree(CSRC, csrc)
            source = csrc / "cuda" / file
            text = source.read_text()
            if old not in text:
                raise SystemExit(f"not in the source any more: {old}")
            source.write_text(text.replace(old, new))
            done = parity(csrc, "-k", "cuda_shim and (every-size or tiles)")
        if done.returncode == 0 or complaint not in done.stdout:
            raise SystemExit(f"{done.stdout[-4000:]}\nthe sanitizers do not see {name!r}: these checks cannot fail")
        print(f"seen, as it should be: {name} ({complaint})")


if __name__ == "__main__":
    main()
