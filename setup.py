"""Builds the optional C++ extensions fiun_fast._cpu and _cuda; all else about the package is in pyproject.toml.

FIUN_FAST_CPU=0 or FIUN_FAST_CUDA=0 leaves one out, 1 makes a failure to build it an error (for wheels). Without either,
what cannot be built is left out, and so is _cuda on a machine without an NVIDIA GPU, because it takes minutes;
FIUN_FAST_CUDA=auto builds it wherever there is nvcc. What is built is printed (`pip install -v` shows it), and
`fiun-fast doctor` says what is missing. nvcc is that of CUDA_HOME, else the one on PATH or in /usr/local/cuda.
FIUN_FAST_CUDA_ARCHS, as "80,90,90+PTX", names the GPU architectures; else a wheel gets all of ARCHS that the toolkit
knows and PTX for the newest, an editable install code and PTX for the first.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CHOICE = {kind: os.environ.get(f"FIUN_FAST_{kind.upper()}", "").strip() for kind in ("cpu", "cuda")}
LEFT_OUT: dict[str, str] = {}  # extension -> why it is not built
NEEDS = {"cpu": "a C++17 compiler (g++ or clang++)", "cuda": "the CUDA toolkit 12.8 or newer (docs/clusters.md)"}

# The bits of each step are part of the contract: no contraction to fused multiply-adds, nothing of fast-math even if
# CXXFLAGS ask for it. The last two -fno change no result; they let the compiler vectorise what has selects.
ARITHMETIC = ["-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
GNU = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread", *ARITHMETIC]
MSVC = ["/std:c++17", "/O2", "/fp:precise", "/EHsc"]
WINDOWS = sys.platform == "win32"

ARCHS = ("80", "86", "89", "90", "100", "120")
CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
PLACES = f"{CUDA_HOME}/bin" if CUDA_HOME else f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin"
NVCC = shutil.which("nvcc", path=PLACES)
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0"]


class Build(build_ext):
    """Says plainly what is missing when an extension cannot be built; nvcc builds the one for CUDA."""

    def run(self) -> None:
        """Build all; says first what that is."""
        names = [f"{ext.name} (some minutes)" if ext.name.endswith("_cuda") else ext.name for ext in self.extensions]
        building = ", ".join(names) or "no extension"
        print(f"fiun_fast: building {building}", *(f"no _{kind}: {why}" for kind, why in LEFT_OUT.items()), sep="; ")
        self.local = self.inplace or self.editable_mode  # inplace is reset on the way to build_extension
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link, or warn."""
        kind = ext.name.rpartition("_")[2]
        try:
            self.build_cuda(ext) if kind == "cuda" else self.build_cpu(ext)
        except Exception as error:
            if CHOICE[kind] == "1":
                raise
            self.warn(f"{ext.name} could not be built ({error}); fiun_fast works without the {kind} backend. "
                      f"To have it, install {NEEDS[kind]} and install fiun_fast again.")  # fmt: skip

    def build_cpu(self, ext: Extension) -> None:
        """Build as setuptools does, with all sources compiled at once: it would take them one after another."""
        compile_these = self.compiler.compile
        Path(self.build_temp, Path(ext.sources[0]).parent).mkdir(parents=True, exist_ok=True)

        def at_once(sources: list[str], *args: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = list(pool.map(lambda source: compile_these([source], *args, **options), sources))
            return [path for paths in made for path in paths]

        self.compiler.compile = at_once
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_these

    def architectures(self) -> list[str]:
        """As ["80", "90", "90+PTX"]: those asked for, else those of ARCHS that nvcc knows."""
        listed = subprocess.check_output([str(NVCC), "--list-gpu-code"], text=True)
        known = sorted((code for code in re.findall(r"sm_(\d+)", listed) if int(code) >= int(ARCHS[0])), key=int)
        asked = re.split(r"[,;\s]+", os.environ.get("FIUN_FAST_CUDA_ARCHS", "").strip())
        if asked != [""]:
            for arch in asked:
                if arch.removesuffix("+PTX") not in known:
                    expected = f"expected some of {', '.join(known)}, each as it is or with +PTX"
                    raise SystemExit(f"FIUN_FAST_CUDA_ARCHS has {arch!r}; {expected}")
            return asked
        archs = [arch for arch in ARCHS if arch in known][: 1 if self.local else None]
        return [*archs, f"{archs[-1]}+PTX"]

    def build_cuda(self, ext: Extension) -> None:
        """Compile each source for all architectures, as many at once as there are cores, and link; static runtime."""
        archs = self.architectures()
        code = [f"-gencode=arch=compute_{n},code={'compute' if ptx else 'sm'}_{n}"
                for n, _, ptx in (arch.partition("+") for arch in archs)]  # fmt: skip
        include = [f"-I{path}" for path in (*ext.include_dirs, sysconfig.get_path("include"))]
        cores = os.cpu_count() or 1
        workers = min(cores, len(ext.sources))
        threads = f"--threads={min(len(code), -(-cores // workers))}"
        flags = [*NVCC_FLAGS, threads, *code, *include, f'-DFIUN_CUDA_ARCHS="{",".join(archs)}"']
        folder, target = Path(self.build_temp, "cuda"), Path(self.get_ext_fullpath(ext.name))
        self.mkpath(str(folder))
        self.mkpath(str(target.parent))

        def compiled(source: str) -> str:
            made = f"{folder / Path(source).name}.o"
            subprocess.run([str(NVCC), *flags, "-c", source, "-o", made], check=True)
            return made

        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(compiled, ext.sources))
        libraries = f"-L{Path(str(NVCC)).parent.parent / 'lib'}"  # lib64 is known to nvcc; its wheels have it in lib
        link = [str(NVCC), "-shared", "-cudart=static", libraries, "-Xlinker=-s", *code, "-o", str(target)]
        subprocess.run([*link, *objects], check=True)


def has_gpu() -> bool:
    """Whether the driver knows an NVIDIA GPU here; torch, which would know, is not there while building."""
    smi = shutil.which("nvidia-smi")
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True).stdout if smi else ""
    return "GPU 0" in listed or Path("/dev/nvidia0").exists()


def extension(kind: str, **options: list[str]) -> list[Extension]:
    """The extension fiun_fast._<kind>, unless it is not wanted or cannot be built."""
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*"))]
    sources = [file for file in files if Path(file).parent.name == kind and file.endswith((".cpp", ".cu"))]
    missing = "nvcc" if kind == "cuda" and not NVCC else ""
    try:
        from pybind11 import get_include
    except ImportError:
        missing = "pybind11"
    variable = f"FIUN_FAST_{kind.upper()}"
    if CHOICE[kind] not in ("", "0", "1", "auto"):
        raise SystemExit(f"{variable} is {CHOICE[kind]!r}, expected 0, 1 or auto")
    if missing and CHOICE[kind] == "1":
        raise SystemExit(f"{variable}=1, but {missing} was not found: install {NEEDS[kind]} and pybind11")
    if CHOICE[kind] == "0":
        LEFT_OUT[kind] = f"{variable}=0"
    elif missing:
        LEFT_OUT[kind] = f"{missing} was not found"
    elif kind == "cuda" and not CHOICE[kind] and not has_gpu():
        LEFT_OUT[kind] = f"this machine has no NVIDIA GPU; {variable}=1 builds it all the same"
    if kind in LEFT_OUT:
        return []
    options |= {"sources": sources, "depends": files, "include_dirs": [get_include()]}
    return [Extension(f"fiun_fast._{kind}", language="c++", optional=CHOICE[kind] != "1", **options)]


CPU = {"extra_compile_args": MSVC} if WINDOWS else {"extra_compile_args": GNU, "extra_link_args": ["-pthread"]}
setup(ext_modules=[*extension("cpu", **CPU), *extension("cuda")], cmdclass={"build_ext": Build})
