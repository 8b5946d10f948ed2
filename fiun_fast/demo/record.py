"""What the demo leaves on disk: JSON, and what its figures depend on."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """What the figures depend on; nothing that names a machine or a path on it."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "unknown")


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: beside, then renamed. Undefined figures (nan) become null."""
    beside = path.with_suffix(".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(_text(_plain(result)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _text(result: dict[str, Any]) -> str:
    """Indented JSON with one row of figures a line: readable, and a fifth of the size."""
    rows = result.pop("rows", None)
    text = json.dumps(result, indent=1)
    if rows is None:
        return text
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    return f'{text[:-2]},\n "rows": [\n  {lines}\n ]\n}}'


def _plain(value: Any) -> Any:
    """JSON types only, floats to six significant digits."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
