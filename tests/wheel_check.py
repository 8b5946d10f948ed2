"""A wheel as its users meet it: a new virtual environment, no compiler, no source tree.

    python tests/wheel_check.py dist/fiun_fast-….whl --torch 2.13.0

It looks at what is inside (size, libraries needed, GPU architectures), installs the wheel beside that torch, and runs
on what was installed tests/kernels/test_parity.py, the demo's short mode, `fiun-fast unlearn` and `fiun-fast doctor`.
Exit status 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from cuda_code import tool
from elftools.elf.elffile import ELFFile

TESTS = Path(__file__).parent
MOST_BYTES = 20e6
# What every Linux has. Nothing of torch or CUDA: the wheel goes with any torch, and imports where there is no driver.
SYSTEM = re.compile(r"(libc|libm|libpthread|libdl|librt|libgcc_s|libstdc\+\+|ld-linux-[\w-]+)\.so\.\d+")
SAY_ARCHITECTURES = (
    "from fiun_fast.kernels import cuda; "
    "print(*([] if isinstance(cuda.load(), str) else cuda.BACKEND.extension.architectures()))"
)
MAKE_MODELS = """
from pathlib import Path
import torch, llama_folders as llama
llama.write(Path("models/base"), llama.tensors(0), shards=2)
llama.write(Path("models/chat"), llama.tensors(1, torch.bfloat16), card="base_model: somebody/base")
llama.fisher(0).save("models/base.fisher", shard_size=5000)
llama.fisher(1).save("models/chat.fisher", dtype=torch.bfloat16)
llama.fisher(2).save("forget.fisher")
"""
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ptxas")


def fail(why: str) -> None:
    """Stop, and say why."""
    raise SystemExit(f"wheel check failed: {why}")


def needed(library: Path) -> list[str]:
    """The shared libraries that an ELF file asks for."""
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return [tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]


def listing(library: Path, usage: bool = False) -> str:
    """The GPU code in a library, or what its kernels use."""
    options = ["-res-usage"] if usage else ["-lelf", "-lptx"]
    return subprocess.run(
        [str(tool("cuobjdump")), *options, library], capture_output=True, text=True, check=True
    ).stdout


def look_inside(wheel: Path, folder: Path) -> set[str] | None:
    """Size, needed libraries; returns the GPU code inside, as {"90", "90+PTX"}, None where nothing can list it."""
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    if wheel.stat().st_size >= MOST_BYTES:
        fail(f"it is larger than {MOST_BYTES / 1e6:.0f} MB")
    if "manylinux" not in wheel.name:
        fail("it has no manylinux tag: `make wheel` repairs it")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    libraries, gpu_code = sorted(folder.rglob("*.so*")), set() if tool("cuobjdump") else None
    if not any(library.name.startswith("_cpu.") for library in libraries):
        fail("fiun_fast._cpu is not inside: a C++17 compiler has to be there when it is built")
    for library in libraries:
        asked = needed(library)
        print(f"  {library.relative_to(folder)} needs {', '.join(asked)}")
        if foreign := [name for name in asked if not SYSTEM.fullmatch(name)]:
            fail(f"{library.name} needs {', '.join(foreign)}")
        if gpu_code is not None and library.name.startswith("_cuda."):
            gpu_code |= {
                n + "+PTX" * (kind == "ptx") for n, kind in re.findall(r"\.sm_(\w+)\.(cubin|ptx)", listing(library))
            }
            usage = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing(library, True))
            if not usage or (bad := {kernel for kernel, *memory in usage if memory != ["0", "0"]}):
                fail(f"kernels that spill or use local memory: {', '.join(sorted(bad)) if usage else 'none is listed'}")
            print(f"    {len(usage)} kernels over all architectures; none spills, none uses local memory")
    return gpu_code


def install(wheel: Path, torch: str, folder: Path) -> Path:
    """A new virtual environment with that torch, the wheel, and what the tests and the demo import."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    for wanted in ([], [f"{wheel.resolve()}[demo]", "pytest>=8", "hypothesis>=6.100"]):  # torch first, as users have it
        done = subprocess.run([*pip, f"torch=={torch}", *wanted], capture_output=True, text=True)
        if done.returncode != 0:
            fail(f"pip could not install {' '.join([f'torch=={torch}', *wanted])}\n{done.stderr}")
    return folder / "bin"


def check_installed(programs: Path, folder: Path, gpu_code: set[str] | None) -> None:
    """Everything from here on sees the installed package only: its folder has a few tests' files, PATH no compiler."""
    environment = {"PATH": str(programs), "HOME": str(folder), "LANG": "C.UTF-8"}
    if compilers := [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]:
        fail(f"{programs} has {', '.join(compilers)}")
    for name in ("kernels/test_parity.py", "cases.py", "conftest.py", "shim.py"):
        shutil.copy(TESTS / name, folder)

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(programs / command[0]), *command[1:]],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            fail(f"`{' '.join(command)}` ended with {done.returncode}\n{done.stdout}")
        return done.stdout

    where = run("python", "-c", "import fiun_fast, torch; print(torch.__version__, fiun_fast.__file__)").split()
    if not Path(where[1]).is_relative_to(programs.parent):
        fail(f"fiun_fast was imported from {where[1]}")
    print(f"\nbeside torch {where[0]}, no compiler on PATH:")
    print(run("fiun-fast", "doctor"))
    inside = run("python", "-c", SAY_ARCHITECTURES).strip()
    if gpu_code is not None and gpu_code != set(inside.split()):
        fail(f"the extension says that it has code for {inside or 'nothing'}; cuobjdump finds {sorted(gpu_code)}")
    print(f"GPU architectures inside: {inside or 'none, because nvcc was not there when it was built'}")
    tests = run("pytest", "-q", "--strict-markers", "-p", "no:cacheprovider", "test_parity.py")
    print("parity suite: " + tests[tests.index("run: ") :].strip())
    if "cpu on cpu (" not in tests.partition("not run: ")[0]:
        fail("the parity suite did not run on the cpu backend")
    written = run("fiun-fast", "demo", "--quick", "--out", "demo-out")
    print(f"demo --quick: {written.strip().splitlines()[-1]}")
    check_models_on_disk(run, folder)


def check_models_on_disk(run: Callable[..., str], folder: Path) -> None:
    """Small folders of models, found, dampened and verified by the command line."""
    shutil.copy(TESTS / "checkpoints" / "llama_folders.py", folder)
    run("python", "-c", MAKE_MODELS)
    run("fiun-fast", "tree", "models", "--write", "tree.toml")
    run("fiun-fast", "unlearn", "tree.toml", "--out", "clean", "--memory", "100MB")
    verified = run("fiun-fast", "verify", "clean").strip()
    if not verified.endswith("all as recorded") or 'parents = ["base"]' not in (folder / "tree.toml").read_text():
        fail(f"models on disk: {verified}")
    print(f"models on disk: unlearn, verify: {verified}")


def main() -> None:
    """Check one wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", required=True, help="the version to install beside it")
    options = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "tests").mkdir()
        gpu_code = look_inside(options.wheel, folder / "unpacked")
        check_installed(install(options.wheel, options.torch, folder / "venv"), folder / "tests", gpu_code)
    print("wheel check passed")


if __name__ == "__main__":
    main()
