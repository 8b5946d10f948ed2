"""The cpu extension under AddressSanitizer and UndefinedBehaviorSanitizer, then ThreadSanitizer, as Python calls it.

    python tests/sanitize_python.py [--quick]

Builds the extension with the sanitizers into a copy of the package in a temporary folder, and runs tests on that copy,
the sanitizer's library loaded before Python (which is built without, as torch is): every block that torch allocates has
a fence round it then, and every access of the extension is looked at. Leaks are not: Python leaves much at its end.

ThreadSanitizer sees the extension's own accesses, and locks and threads of whatever library. It does not see how
libgomp hands out work (futexes, by system calls of its own) and takes that for a race, so that threads are those of the
extension's pool here, not torch's.

Copies of the source with a mistake in them show that it would be found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-omit-frame-pointer"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-sanitize-recover=all"]
POOL = """from fiun_fast.kernels import cpu

cpu.openmp_of_torch = lambda: (0, 0)
cpu.extension().use_openmp(0, 0)
"""


@dataclass(frozen=True)
class Kind:
    """A set of sanitizers: what is run under them, and a mistake that they must find.

    Attributes:
        options: of pytest, what is run.
        quick: the same for a fast run.
        mistake: a file of csrc/cpu, its text, what a careless change would write.
        shows: options of pytest that run into the mistake.
        complaint: what the sanitizer says then.

    """

    sanitizers: str
    library: str
    environment: dict[str, str]
    options: tuple[str, ...]
    quick: tuple[str, ...]
    mistake: tuple[str, str, str]
    shows: tuple[str, ...]
    complaint: str


ONE_BACKEND = "not reference and not triton and not interpreted and not cuda"

KINDS = [
    Kind(
        "address,undefined",
        "libasan.so",
        {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        ("core", "kernels", "estimators", "compat", "fuzz", "-k", "not cuda and not triton"),
        ("core/test_moved_memory.py", "core/test_memory.py", "kernels/test_parity.py", "fuzz", "-k", ONE_BACKEND),
        ("run.cpp", "std::min(from + step, numel)", "std::min(from + step, numel + 1)"),
        ("kernels/test_parity.py", "-k", "every-size and not reference and not triton and not cuda"),
        "heap-buffer-overflow",
    ),
    Kind(
        "thread",
        "libtsan.so",
        {"TSAN_OPTIONS": "exitcode=66 ignore_noninstrumented_modules=1 report_signal_unsafe=0"},
        ("core", "kernels/test_cpu_backend.py", "fuzz", "-k", "thread and not cuda and not triton"),
        (
            "core/test_undisturbed.py",
            "kernels/test_cpu_backend.py",
            "-k",
            "(many_threads or python_threads) and not triton and not cuda",
        ),
        ("pool.cpp", "job.work(job.context", "static int jobs = 0;\n    ++jobs;\n    job.work(job.context"),
        ("kernels/test_cpu_backend.py", "-k", "several_python_threads_at_once"),
        "data race",
    ),
]


def build(kind: Kind, folder: Path, mistake: tuple[str, str, str] | None = None) -> None:
    """The package with a sanitized extension, in `folder`; with a mistake, only that file is compiled again."""
    import pybind11

    if mistake is None:
        shutil.copytree(ROOT / "fiun_fast", folder / "fiun_fast", ignore=shutil.ignore_patterns("_cpu*", "__pycache__"))
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        (folder / "own_pool.py").write_text(POOL)
    source = folder / "csrc" / "cpu"
    sources = sorted(source.glob("*.cpp"))
    if mistake is not None:
        file, old, new = mistake
        text = (source / file).read_text()
        if old not in text:
            raise SystemExit(f"not in the source any more: {old}")
        (source / file).write_text(text.replace(old, new))
        sources = [source / file]
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = [*FLAGS, f"-fsanitize={kind.sanitizers}"]

    def compiled(path: Path) -> None:
        subprocess.run([COMPILER, *flags, *include, "-c", str(path), "-o", str(path.with_suffix(".o"))], check=True)

    longest_first = sorted(sources, key=lambda path: path.name != "module.cpp")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compiled, longest_first))
    target = folder / "fiun_fast" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([COMPILER, "-shared", *flags, *map(str, source.glob("*.o")), "-o", str(target)], check=True)


def library(name: str) -> str:
    """Where the compiler has a library of its own."""
    found = subprocess.run(
        [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"{COMPILER} has no {name}: install the sanitizers of your compiler")
    return found


def run(kind: Kind, folder: Path, options: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Tests on the package in `folder`, which is found first because it is where Python starts."""
    tests = [str(ROOT / "tests" / option) if (ROOT / "tests" / option).exists() else option for option in options]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | kind.environment
    environment["LD_PRELOAD"] = f"{library(kind.library)} {library('libstdc++.so')}"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *tests]
    if kind.sanitizers == "thread":
        command += ["-p", "own_pool"]
    return subprocess.run(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def main() -> None:
    """Exit status 0 if the extension is clean and the copies with a mistake are not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tests, and no copies with a mistake")
    quick = parser.parse_args().quick
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            build(kind, folder)
            done = run(kind, folder, kind.quick if quick else kind.options)
            if done.returncode != 0:
                raise SystemExit(f"{done.stdout[-20000:]}\nnot clean under -fsanitize={kind.sanitizers}")
            print(f"-fsanitize={kind.sanitizers}: clean, {done.stdout.strip().splitlines()[-1]}", flush=True)
            if quick:
                continue
            build(kind, folder, kind.mistake)
            done = run(kind, folder, kind.shows)
            if done.returncode == 0 or kind.complaint not in done.stdout:
                raise SystemExit(f"{done.stdout[-4000:]}\n{kind.sanitizers} does not see {kind.mistake[2]!r}")
            print(f"seen, as it should be: {kind.mistake[2]!r} ({kind.complaint})", flush=True)


if __name__ == "__main__":
    main()
