"""Fishers on disk: a safetensors file with one tensor a parameter, and layout and provenance in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import whole_file
from .errors import FisherFileError
from .layout import Layout
from .version import __version__

FORMAT = "fiun_fast.fisher/1"


def write(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    layout = {name: list(t.shape) for name, t in tensors.items()}
    metadata = {"format": FORMAT, "layout": json.dumps(layout), "provenance": json.dumps(dict(record))}
    metadata["version"] = __version__
    whole_file.save(path, tensors, metadata)


def read(path: str | os.PathLike[str]) -> tuple[torch.Tensor, Layout, dict[str, Any]]:
    """Flat buffer [numel] on the CPU, layout and provenance record of a file that `write` made.

    Raises:
        FisherFileError: it is truncated, foreign, or its tensors do not match its own metadata.
        FileNotFoundError: there is none.

    """
    from safetensors import SafetensorError, safe_open

    where = os.fspath(path)
    if not Path(where).exists():
        raise FileNotFoundError(f"no Fisher file at {where}")
    try:
        with safe_open(where, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                found = metadata.get("format", "none")
                raise FisherFileError(f"{where}: not a Fisher of this package (format {found}, expected {FORMAT})")
            layout = Layout(json.loads(metadata["layout"]))
            kept = json.loads(metadata["provenance"])
            record = {key: kept[key] for key in ("estimator", "steps", "samples")} | {"how": kept.get("how", {})}
            names = set(file.keys())
            if names != set(layout.names):
                raise FisherFileError(f"{where}: its tensors are not those of its layout: {names ^ set(layout.names)}")
            first = file.get_tensor(layout.names[0])
            buffer = torch.empty(layout.numel, dtype=first.dtype)
            for name, view in layout.views(buffer).items():
                tensor = file.get_tensor(name)
                if tensor.shape != view.shape or tensor.dtype != buffer.dtype:
                    raise FisherFileError(
                        f"{where}: {name!r} is {tensor.dtype} {list(tensor.shape)}, not as its layout says"
                    )
                view.copy_(tensor)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, OSError) as error:
        raise FisherFileError(f"{where}: truncated or not a Fisher file: {error}") from error
    return buffer, layout, record
