"""What the numbers were measured on; no host name, no path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from .measure import last_level_cache


def environment(device: torch.device) -> dict[str, str | int | None]:
    """Findings by name."""
    found: dict[str, str | int | None] = {
        "device": device.type,
        "cpu": cpu_name(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fiun_fast": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["driver"] = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return found


def machine_kind(found: dict[str, str | int | None]) -> str:
    """A name for results of machines like this one, as part of a file name."""
    text = str(found["gpu"]) if "gpu" in found else f"{found['cpu']} {found['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_name() -> str:
    """As the system calls it."""
    path = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file lies in, with a plus where it is changed; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    commit = _command("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = _command("git", "-C", str(root), "status", "--porcelain", "--", "csrc", "fiun_fast")
    return f"{commit}+" if commit and changed else commit


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
