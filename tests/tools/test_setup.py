"""What setup.py builds where: with programs in the place of nvcc and nvidia-smi that only note how they are called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("pybind11", reason="setup.py builds with it")
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="these tests were copied out of the source tree"),
    pytest.mark.skipif(sys.platform == "win32", reason="its programs are shell scripts"),
]

NVCC = """#!/bin/sh
echo "$@" >> {folder}/calls
case "$1" in --list-gpu-code) echo "sm_75 sm_80 sm_90"; exit;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
exit {status}
"""


class Machine:
    """A machine with or without nvcc and a GPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = folder / "bin"
        self.places.mkdir()
        self.calls = folder / "calls"

    def program(self, name: str, text: str) -> None:
        path = self.places / name
        path.write_text(text)
        path.chmod(0o755)

    def nvcc(self, status: int = 0) -> None:
        self.program("nvcc", NVCC.format(folder=self.folder, status=status))

    def build(self, cuda: str | None) -> subprocess.CompletedProcess:
        """`setup.py build_ext` without the CPU extension, into the folder."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("FIUN_FAST", "CUDA"))}
        environment |= {"FIUN_FAST_CPU": "0", "PATH": f"{self.places}:/usr/bin:/bin", "CUDA_HOME": str(self.folder)}
        if cuda is not None:
            environment["FIUN_FAST_CUDA"] = cuda
        command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext"]
        command += ["--build-lib", str(self.folder / "lib"), "--build-temp", str(self.folder / "temp")]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    def built(self) -> bool:
        return any((self.folder / "lib").rglob("_cuda*.so"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def without_gpu() -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")


def test_without_a_gpu_nothing_is_compiled_for_one_unless_asked(machine):
    without_gpu()
    machine.nvcc()
    machine.program("nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI has failed: no driver' >&2\nexit 9\n")
    done = machine.build(None)
    assert done.returncode == 0, done.stderr
    assert not machine.calls.exists()
    assert not machine.built()
    assert "building no extension; no _cpu: FIUN_FAST_CPU=0; no _cuda: this machine has no NVIDIA GPU" in done.stdout
    assert "FIUN_FAST_CUDA=1 builds it all the same" in done.stdout


@pytest.mark.parametrize(("cuda", "gpu"), [("1", False), ("auto", False), (None, True)])
def test_it_is_compiled_where_it_is_asked_for_or_a_gpu_is_there(machine, cuda, gpu):
    machine.nvcc()
    if gpu:
        machine.program("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    done = machine.build(cuda)
    assert done.returncode == 0, done.stderr
    assert "building fiun_fast._cuda (some minutes); no _cpu" in done.stdout
    assert machine.built()
    compiled = [line for line in machine.calls.read_text().splitlines() if " -c " in line]
    assert len(compiled) == len(list((ROOT / "csrc" / "cuda").glob("*.c[up]*")))
    for line in compiled:  # all that this nvcc knows, and PTX for the newest: a wheel is for GPUs elsewhere
        for code in ("code=sm_80", "code=sm_90", "code=compute_90"):
            assert code in line
        assert "sm_75" not in line
        threads = int(re.search(r"--threads=(\d+) ", line)[1])
        assert threads * min(os.cpu_count(), len(compiled)) >= min(os.cpu_count(), 3 * len(compiled))  # all cores work


def test_nothing_is_compiled_where_it_is_not_wanted(machine):
    machine.nvcc()
    done = machine.build("0")
    assert (done.returncode, machine.calls.exists(), machine.built()) == (0, False, False)
    assert "no _cuda: FIUN_FAST_CUDA=0" in done.stdout


def test_a_failure_is_an_error_only_where_it_was_asked_for(machine):
    machine.nvcc(status=2)
    done = machine.build("auto")
    assert done.returncode == 0, done.stderr
    assert "fiun_fast works without the cuda backend" in done.stderr + done.stdout
    assert machine.build("1").returncode != 0


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_only_wheels_are_compiled_for_gpus_elsewhere(tmp_path):
    """`make demo` on a machine with nvcc and no GPU compiles for the CPU only; no test needs more."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FIUN_FAST", "MAKE"))}
    done = {}
    for target in ("install", "demo", "test", "wheel"):
        command = ["make", "--dry-run", f"VENV={tmp_path / 'new'}", target]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        done[target] = run.stdout
        assert "pip install" in run.stdout
    assert {target for target, text in done.items() if "FIUN_FAST_CUDA" in text} == {"wheel"}
    assert "FIUN_FAST_CUDA=${FIUN_FAST_CUDA:-auto}" in done["wheel"]


def test_a_source_distribution_has_all_that_the_tests_read(tmp_path):
    """What is in the repository, as setup.py would pack it, but for settings of git and of hooks in a checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "egg_info", "--egg-base", str(tmp_path)]
    environment = os.environ | {"FIUN_FAST_CPU": "0", "FIUN_FAST_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    packed = set(next(tmp_path.glob("*.egg-info/SOURCES.txt")).read_text().splitlines())
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    there = {name for name in listed if name and (ROOT / name).exists()}
    assert len(there) > 300
    assert sorted(there - packed) == [".gitignore", ".pre-commit-config.yaml"]
    foreign = {name for name in packed if (ROOT / name).exists()} - there
    assert not [name for name in foreign if name.endswith((".so", ".pyc", ".o"))]


def test_what_is_missing_is_named(machine):
    done = machine.build(None)
    assert (done.returncode, machine.built()) == (0, False)
    assert "no _cuda: nvcc was not found" in done.stdout
    done = machine.build("1")
    assert done.returncode != 0
    assert "FIUN_FAST_CUDA=1, but nvcc was not found" in done.stderr
    done = machine.build("yes")
    assert "FIUN_FAST_CUDA is 'yes', expected 0, 1 or auto" in done.stderr
