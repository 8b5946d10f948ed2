"""Peak extra memory of every variant of a case, measured in a process of its own.

On Linux from the kernel's high-water mark of resident memory, reset before the run; large blocks are taken from and
given back to the system one by one there, so nothing that was freed before hides what a run needs. On a GPU from
torch's allocator. `python -m fiun_fast.bench.memory CASE MODE DEVICE COMPILER` prints {variant: bytes} as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .cases import listed
from .measure import Variant

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peaks(case: str, mode: str, device: torch.device, compiler: str | None) -> dict[str, int]:
    """Variant -> bytes, by a subprocess; empty where the system does not tell."""
    if device.type == "cpu" and not CLEAR.exists():
        return {}
    words = [sys.executable, "-m", __spec__.name if __spec__ else __name__, case, mode, str(device), compiler or "none"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of case {case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def extra(variant: Variant, device: torch.device) -> int:
    """Bytes that one run needs at its peak on top of what is there before it; run once before, to warm up."""
    for _ in range(2):
        variant.restore()
        variant.run()
    variant.restore()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        variant.run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    variant.run()
    return max(0, _resident("VmHWM") - before)


def _resident(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main(name: str, mode: str, device_name: str, compiler: str) -> None:
    """Measure all variants of a case and print the result."""
    device = torch.device(device_name)
    case = listed(mode)[name](device, None if compiler == "none" else compiler)
    print(json.dumps({variant.name: extra(variant, device) for variant in case.variants}))


if __name__ == "__main__":
    main(*sys.argv[1:])
