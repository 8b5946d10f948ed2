"""The kernels of csrc/cuda as plain C++ on tests/cuda_shim: the backend `cuda_shim`, which only tests know."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fiun_fast.kernels.cuda import CudaBackend

NAME = "cuda_shim"
ROOT = Path(__file__).parent.parent
CSRC = Path(os.environ.get("FIUN_SHIM_CSRC", ROOT / "csrc"))
SHIM = ROOT / "tests" / "cuda_shim"
SOURCES = [*sorted((CSRC / "cuda").glob("*.c[up]*")), SHIM / "shim.cpp"]
FLAGS = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
FLAGS += os.environ.get("FIUN_SHIM_FLAGS", "").split()  # how tests/sanitize_shim.py adds the sanitizers


def compile_shim(folder: Path, sources: list[Path], *flags: str) -> list[Path]:
    """Compile the sources as plain C++ into objects, two at a time.

    Raises:
        RuntimeError: the compiler refused one.

    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    folder.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        includes = [f"-I{SHIM}", f"-I{CSRC / 'cuda'}"]
        command = [compiler, *FLAGS, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile against the shim:\n{done.stderr}")
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


@functools.cache
def library() -> Path:
    """The extension built on the shim; built once for each state of the sources, in build/.

    Raises:
        RuntimeError: it does not compile.

    """
    import pybind11

    headers = [*CSRC.rglob("*.h"), *SHIM.glob("*.h"), Path(__file__)]
    state = hashlib.sha256(f"{sys.version} {FLAGS}".encode())
    for path in sorted([*SOURCES, *headers]):
        state.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_shim" / state.hexdigest()[:16]
    finished = folder / f"{NAME}.so"
    with one_at_a_time(folder):
        if finished.exists():
            return finished
        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", f"-DFIUN_CUDA_MODULE={NAME}"]
        objects = compile_shim(folder, SOURCES, "-O1", "-fPIC", *python)
        part = folder / f"{NAME}.{os.getpid()}"
        compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
        sanitizers = [flag for flag in FLAGS if flag.startswith("-fsanitize")]
        subprocess.run([compiler, "-shared", *sanitizers, *map(str, objects), "-o", str(part)], check=True)
        part.replace(finished)
    return finished


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Inside, no other process is: the workers of `make test` want the same file at the same time."""
    import fcntl  # not on Windows, where everything else in this file is imported too

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a crash
        yield


@functools.cache
def why_not() -> str | None:
    """None where it can be built, else why not; errors of the kernels' own source are not hidden."""
    if not (CSRC / "cuda").is_dir():
        return "the kernels' source is not here: these tests were copied out of the source tree"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        return "no C++ compiler to build the CUDA kernels for the CPU"
    return None


@functools.cache
def extension() -> ModuleType | str:
    """The kernels built for the CPU, or the reason why they cannot be."""
    if reason := why_not():
        return reason
    spec = importlib.util.spec_from_file_location(NAME, library())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def backend() -> CudaBackend:
    """The `cuda` backend with that extension, on CPU tensors; `control()` is the other end."""
    from fiun_fast.kernels.cuda import CudaBackend, CudaExtension

    class Shim(CudaExtension):
        """Needs no driver and no GPU."""

        def why_not_here(self) -> None:
            return None

    return CudaBackend(Shim(NAME, extension), "cpu")


@contextmanager
def registered() -> Iterator[None]:
    """Inside, `cuda_shim` is one of the backends that fiun_fast knows."""
    from fiun_fast import kernels

    kernels.register(backend())
    try:
        yield
    finally:
        kernels.unregister(NAME)


@functools.cache
def control() -> ctypes.CDLL:
    """What tests/cuda_shim/shim.h offers."""
    return ctypes.CDLL(str(library()))


def take_traffic() -> dict[str, int]:
    """What the kernels have accessed since the last call."""
    counters = (ctypes.c_int64 * 5)()
    control().shim_take_traffic(counters)
    return dict(zip(("loaded", "stored", "wide", "narrow", "atomics"), counters, strict=True))
