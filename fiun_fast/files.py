"""Files that are whole or not there at all, and the format of Fishers: safetensors, one tensor for each parameter."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .arguments import FISHER_DTYPES
from .errors import FisherFileError, FiunError
from .layout import Layout
from .version import __version__

FISHER_FORMAT = "fiun_fast.fisher/1"


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file beside `path`, to be written inside `with`; then flush it to disk and rename it to `path`.

    Raises:
        OSError: the folder does not exist or cannot be written; no partial file is left, also after an error inside.

    """
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; this one should look like any other
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, UTF-8, all or nothing; errors as `replaced`."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, all or nothing; errors as `replaced`."""
    from safetensors.torch import save_file

    with replaced(path) as temporary:
        save_file({name: t.detach() for name, t in tensors.items()}, temporary, metadata=dict(metadata))


@contextmanager
def opened(
    path: str | os.PathLike[str], kind: str, file_format: str, error: type[FiunError]
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a safetensors file of one of our formats: the file, on the CPU, and its metadata.

    Args:
        path: the file.
        kind: what it is, for messages: "a Fisher", "an undo log".
        file_format: what its metadata must say.
        error: raised where it is truncated or foreign, also by what is read inside `with`.

    Raises:
        FileNotFoundError: there is none.

    """
    from safetensors import SafetensorError, safe_open

    where = os.fspath(path)
    if not Path(where).exists():
        raise FileNotFoundError(f"no {kind.partition(' ')[2]} file at {where}")
    try:
        with safe_open(where, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != file_format:
                found = metadata.get("format", "none")
                raise error(f"{where}: not {kind} of this package (format {found}, expected {file_format})")
            yield file, metadata
    except FiunError:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as found:
        raise error(f"{where}: truncated or not {kind} file: {found}") from found
    except (OSError, RuntimeError) as found:
        raise error(f"{where}: truncated or not {kind} file: {found}") from found


# ---- Fishers --------------------------------------------------------------------------------------------------------


def write_fisher(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    layout = {name: list(t.shape) for name, t in tensors.items()}
    metadata = {"format": FISHER_FORMAT, "layout": json.dumps(layout), "provenance": json.dumps(dict(record))}
    metadata["version"] = __version__
    save(path, tensors, metadata)


class FisherFile:
    """An open file: `layout`, `record` (the provenance), and the numbers, by name and range."""

    def __init__(self, where: str, file: Any, metadata: Mapping[str, str]) -> None:
        self._where, self._file = where, file
        try:
            self.layout = Layout(json.loads(metadata["layout"]))
        except FiunError as error:
            raise FisherFileError(f"{where}: truncated or not a Fisher file: {error}") from error
        kept = json.loads(metadata["provenance"])
        self.record = {key: kept[key] for key in ("estimator", "steps", "samples")} | {"how": kept.get("how", {})}
        if not isinstance(self.record["how"], dict):
            raise FisherFileError(f"{where}: truncated or not a Fisher file: its provenance is no record")
        if (names := set(file.keys())) != set(self.layout.names):
            raise FisherFileError(f"{where}: its tensors are not those of its layout: {names ^ set(self.layout.names)}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start..stop of a parameter, flat, on the CPU; all of them by default.

        Raises:
            FisherFileError: the tensor has another shape than the layout says.
            LayoutError: there is no such parameter.

        """
        segment = self.layout[name]
        part = self._file.get_slice(name)
        if tuple(part.get_shape()) != segment.shape:
            found = self._file.get_tensor(name)
            raise FisherFileError(
                f"{self._where}: {name!r} is {found.dtype} {list(found.shape)}, not as its layout says"
            )
        stop = segment.numel if stop is None else stop
        if not segment.shape or (start == 0 and stop == segment.numel):
            return self._file.get_tensor(name).reshape(-1)[start:stop]
        row = segment.numel // max(1, segment.shape[0])
        first = start // max(1, row)  # only the rows that the range touches are read
        return part[first : -(-stop // max(1, row))].reshape(-1)[start - first * row : stop - first * row]


@contextmanager
def opened_fisher(path: str | os.PathLike[str]) -> Iterator[FisherFile]:
    """Open a file that `write_fisher` made.

    Raises:
        FisherFileError: it is truncated, foreign, or its tensors do not match its own metadata.
        FileNotFoundError: there is none.

    """
    with opened(path, "a Fisher", FISHER_FORMAT, FisherFileError) as (file, metadata):
        yield FisherFile(os.fspath(path), file, metadata)


def read_fisher(path: str | os.PathLike[str]) -> tuple[torch.Tensor, Layout, dict[str, Any]]:
    """Flat buffer [numel] on the CPU, layout and provenance record; errors as `opened_fisher`."""
    with opened_fisher(path) as file:
        first = file.read(file.layout.names[0])
        if first.dtype not in FISHER_DTYPES:
            raise FisherFileError(f"{os.fspath(path)}: its numbers are {first.dtype}, expected float32 or float64")
        buffer = torch.empty(file.layout.numel, dtype=first.dtype, device="cpu")
        for segment in file.layout:
            values = file.read(segment.name)
            if values.dtype != buffer.dtype:
                raise FisherFileError(
                    f"{os.fspath(path)}: {segment.name!r} is {values.dtype}, expected {buffer.dtype} as the others"
                )
            buffer[segment.offset : segment.offset + segment.numel] = values
    return buffer, file.layout, file.record
