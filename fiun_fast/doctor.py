"""What is installed, which backends work here, and why the others do not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata

import torch

from . import kernels
from .errors import BackendError
from .version import __version__

AMD_COMPILED = ("gfx942", "gfx950")  # docs/kernels.md has their figures; MI300 and MI350
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "networkx",
    "safetensors",
    "rich",
    "pyyaml",
    "scikit-learn",
    "scipy",
    "matplotlib",
)


def examine() -> dict[str, dict[str, str]]:
    """Findings by section, each a name -> text; the same on every call, and nothing is changed."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "GPUs": ", ".join(gpus) or "none that torch can use",
        "C++ compiler": next(
            (found for c in ("c++", "g++", "clang++", "cl") if (found := shutil.which(c))), "none found"
        ),
    }
    backends = {}
    for name in kernels.known():
        kinds = ["cuda"] if name == "cuda" else ["cpu", "cuda"] if gpus else ["cpu"]
        reasons = {kind: kernels.load(name).why_not(kind) for kind in kinds}
        works = [kind for kind, reason in reasons.items() if reason is None]
        backends[name] = f"works on {', '.join(works)}" if works else f"no: {next(iter(reasons.values()))}"
        if name == "cpu" and works:
            from .kernels import cpu

            backends[name] += f", instruction set {cpu.isa()} (compiled: {', '.join(cpu.isas())})"
    defaults = {}
    for kind in ["cpu", "cuda"] if gpus else ["cpu"]:
        try:
            defaults[f"for {kind} tensors"] = kernels.select(None, kind).name
        except BackendError as error:
            defaults[f"for {kind} tensors"] = str(error)
    return {
        "fiun_fast": {"version": __version__},
        "machine": machine,
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": backends,
        "CUDA extension": _cuda_extension(),
        **({} if torch.version.hip is None else {"AMD GPUs": _amd()}),
        "used by default": defaults,
    }


def doctor() -> int:
    """Print the findings as a table; 0 where a fast backend works, 1 where only the reference does."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2))
    for section, findings in examine().items():
        table.add_row(f"[bold]{section}[/bold]", "", "")
        for name, text in findings.items():
            table.add_row("", name, text)
    Console(file=sys.stdout).print(table)
    fast = [name for name in kernels.available_backends() if name != "reference"]
    return 0 if fast else 1


def _cuda_extension() -> dict[str, str]:
    """What fiun_fast._cuda has inside, what it meets here, and whether the two go together."""
    from .kernels import cuda

    if torch.version.hip is not None:
        return {"runs here": f"no: {cuda.AMD}"}
    extension = cuda.BACKEND.extension
    try:
        inside = extension.architectures()
        findings = {
            "machine code for": ", ".join(f"sm_{a}" for a in inside if not a.endswith("+PTX")) or "none",
            "PTX for": ", ".join(f"compute_{a.removesuffix('+PTX')}" for a in inside if a.endswith("+PTX")) or "none",
            "built with": extension.toolkit(),
            "driver here": extension.driver(),
        }
    except BackendError as error:
        return {"runs here": f"no: {error}"}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        covered = "" if cuda.runs_on(10 * major + minor, inside) else ", which none of this runs on"
        findings[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}{covered}"
    reason = cuda.BACKEND.why_not("cuda")
    return findings | {"runs here": "yes" if reason is None else f"no: {reason}"}


def _amd() -> dict[str, str]:
    """What works with a torch that is built for ROCm."""
    findings = {"ROCm": str(torch.version.hip)}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(i)
        architecture = getattr(found, "gcnArchName", "of unknown architecture").partition(":")[0]
        lanes = getattr(found, "warp_size", 64)
        known = "" if architecture in AMD_COMPILED else "; its kernels were compiled for others only"
        findings[f"GPU {i}"] = f"{found.name}, {architecture}, {lanes} lanes a wavefront{known}"
    reason = kernels.load("triton").why_not("cuda")
    return findings | {
        "triton": f"works; inspected for {', '.join(AMD_COMPILED)}, not run by us"
        if reason is None
        else f"no: {reason}",
        "estimators, cpu, reference": "work as anywhere: plain torch, and the CPU",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
