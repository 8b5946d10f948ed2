"""What measurements leave behind: what they ran on, JSON files with a row a line, tables between the marks of a page.

No host name and no path is kept.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..files import write_text
from .measure import last_level_cache


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a measurement ran on: hardware and versions, by name."""
    device = torch.device(device)
    found = {
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


def machine_kind(found: Mapping[str, Any]) -> str:
    """A name for results of machines like this one, as part of a file name."""
    text = str(found["gpu"]) if "gpu" in found else f"{found['cpu']} {found['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe(found: Mapping[str, Any]) -> str:
    """The machine and what ran on it, in a line."""
    return f"{found.get('gpu') or found['cpu']}, {found['threads']} threads, torch {found['torch']}"


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


def write_json(path: Path, result: dict[str, Any], digits: int = 6) -> None:
    """Write a result, all or nothing, into a folder that is made if need be.

    Args:
        path: where.
        result: what JSON can hold; "rows" come last, each on a line of its own: readable, and a fifth of the size.
        digits: significant digits that floats keep. NaN and infinity become null.

    """
    plain = _plain(result, digits)
    rows = plain.pop("rows", None)
    text = json.dumps(plain, indent=1)
    if rows is not None:
        lines = ",\n  ".join(map(json.dumps, rows))
        text = f'{text[:-2]},\n "rows": [\n  {lines}\n ]\n}}'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A table in Markdown; all but the first `left` columns stand on the right."""
    lines = [heads, ["---" if i < left else "---:" for i in range(len(heads))], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def fill(page: Path, mark: str, text: str) -> bool:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->`; False if the page has no such place."""
    if not page.exists():
        return False
    marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
    new, found = marked.subn(lambda m: f"{m[1]}{text}{m[2]}", page.read_text(encoding="utf-8"))
    if found:
        write_text(page, new)
    return bool(found)


def _plain(value: Any, digits: int) -> Any:
    """JSON types only."""
    if isinstance(value, dict):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
