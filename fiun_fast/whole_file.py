"""Safetensors files that are whole or not there at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch


def save(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write beside, flush to disk, rename: at `path` there is the whole new file or what was there before.

    Raises:
        OSError: the folder does not exist or cannot be written; no partial file is left.

    """
    from safetensors.torch import save_file

    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    try:
        save_file({name: t.detach() for name, t in tensors.items()}, temporary, metadata=dict(metadata))
        with Path(temporary).open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp makes files private; this one should look like any other
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
