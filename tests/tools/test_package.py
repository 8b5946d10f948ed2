"""The package as a whole: a lean import, names that exist, the command line, errors that explain themselves."""

import subprocess
import sys

import pytest
import torch

import fiun_fast as ff
from fiun_fast import cli, doctor, kernels

HEAVY = (
    "triton",
    "matplotlib",
    "sklearn",
    "rich",
    "safetensors",
    "fiun_fast._cuda",
    "fiun_fast.kernels.triton_kernels",
)


def test_import_is_lean():
    """No compiler, no GPU, nothing heavy beyond torch, numpy and networkx."""
    code = f"""
import sys, torch
before = set(sys.modules)
import fiun_fast
loaded = set(sys.modules) - before
heavy = [m for m in {HEAVY!r} if m in loaded]
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_public_names_exist_and_are_documented():
    for name in ff.__all__:
        assert getattr(ff, name).__doc__ or name == "__version__", name


def test_errors_are_what_python_people_expect():
    for error, builtin in [
        (ff.ArgumentError, ValueError),
        (ff.LayoutError, ValueError),
        (ff.DTypeError, TypeError),
        (ff.DeviceError, ValueError),
        (ff.DagError, ValueError),
        (ff.FisherFileError, ValueError),
        (ff.EstimationError, ValueError),
        (ff.BackendError, RuntimeError),
    ]:
        assert issubclass(error, ff.FiunError)
        assert issubclass(error, builtin)


def test_choice_of_backend(monkeypatch):
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    usual = kernels.select(None, "cpu").name
    assert "reference" in ff.available_backends()
    with ff.use_backend("reference"):
        assert kernels.select(None, "cpu").name == "reference"
    assert kernels.select(None, "cpu").name == usual
    monkeypatch.setenv(kernels.ENVIRONMENT, "reference")
    assert kernels.select(None, "cpu").name == "reference"
    ff.use_backend("reference")
    ff.use_backend(None)
    monkeypatch.setenv(kernels.ENVIRONMENT, "warp")
    with pytest.raises(ff.BackendError, match="unknown backend 'warp'; known are reference, cpu"):
        kernels.select(None, "cpu")


def test_nothing_falls_back_silently(monkeypatch):
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    with pytest.raises(ff.BackendError, match=r"backend 'cpu' cannot be used for cuda tensors: .*; usable: reference"):
        kernels.select("cpu", "cuda")
    from fiun_fast.kernels import cpu

    monkeypatch.setattr(
        cpu.BACKEND, "why_not", lambda device_type: "its C++ extension was not built; install a C++17 compiler"
    )
    assert kernels.select(None, "cpu").name == "reference"  # the documented default where there is no compiler
    with pytest.raises(ff.BackendError, match=r"not: cpu: its C\+\+ extension was not built"):
        kernels.select("cpu", "cpu")


def test_doctor(capsys, monkeypatch):
    findings = doctor.examine()
    assert findings["fiun_fast"]["version"] == ff.__version__
    assert findings["packages"]["torch"] == torch.__version__
    assert set(findings["backends"]) == set(kernels.known())
    assert cli.main(["doctor"]) == (0 if len(ff.available_backends()) > 1 else 1)
    assert "works on cpu" in capsys.readouterr().out
    from fiun_fast.kernels import cpu

    monkeypatch.setattr(
        cpu.BACKEND, "why_not", lambda device_type: "its C++ extension was not built; install a C++17 compiler"
    )
    assert doctor.examine()["backends"]["cpu"] == "no: its C++ extension was not built; install a C++17 compiler"


def test_command_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert ff.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--scenario", "nonsense"])
    assert stop.value.code == 2
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_demo_without_its_extras_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiun_fast.demo.run", None)
    assert cli.main(["demo"]) == 1
    assert "pip install 'fiun_fast[demo]'" in capsys.readouterr().err
