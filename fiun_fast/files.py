"""Files that are whole or not there at all, with a checksum; and the format of Fishers: a tensor for each parameter."""

from __future__ import annotations

import json
import os
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .arguments import FISHER_DTYPES, short
from .errors import ArgumentError, FileWriteError, FisherFileError, FiunError
from .kernels.cpu import expect_writes
from .layout import Layout
from .version import __version__

FISHER_FORMATS = ("fiun_fast.fisher/2", "fiun_fast.fisher/1")  # written, and read too: without a checksum
CHECKSUM = "crc32"  # an entry of the metadata
NEEDED = {"estimator": str, "steps": int, "samples": int}  # what the record of a provenance holds
OPTIONAL = {"how": dict, "reduction": str, "dtype": str, "per": str}  # empty where it is not there
RECORD = NEEDED | OPTIONAL


def location(path: str | os.PathLike[str]) -> Path:
    """Where a file is to be: the path itself, or what a symbolic link there points to.

    Raises:
        ArgumentError: it is no path.

    """
    try:
        where = os.fsdecode(path)
    except TypeError:
        raise ArgumentError(f"path is a {type(path).__name__}, expected a string or a path") from None
    if not where or "\0" in where:
        raise ArgumentError(f"path is {where!r}, which no file can have")
    return Path(os.path.realpath(where))


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file beside `path`, to be written inside `with`; then flush it to disk and rename it to `path`.

    A symbolic link is followed and stays. A file that is replaced hands on its mode, a new one gets what umask leaves.

    Raises:
        ArgumentError: `path` is no path.
        FileWriteError: the folder does not exist or cannot be written, the disk is full, or what is there is no regular
            file; no partial file is left, also after an error inside.

    """
    target = location(path)
    temporary = None
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        if mode is not None and not target.is_file():
            raise OSError("it is there, and not a regular file")
        if target.is_symlink():  # all links were followed
            raise OSError("its symbolic links go in a circle")
        temporary = target.with_name(f".{target.name[:32]}.{secrets.token_hex(6)}.partial")  # short, whatever that is
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666 if mode is None else 0o600))
        mode = stat.S_IMODE(temporary.stat().st_mode) if mode is None else mode  # what the umask left
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # whoever wrote may have put a file of its own there
        temporary.replace(target)
        with suppress(OSError):  # the new name too; not every file system can
            _flush_folder(target.parent)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, FiunError):
            failed = FileWriteError(f"{target}: not written: {error.strerror or error}")
            failed.errno = error.errno
            raise failed from error
        raise


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, UTF-8, all or nothing; errors as `replaced`."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum in its metadata, all or nothing.

    Raises:
        ArgumentError: a name that a file cannot hold.
        ArgumentError, FileWriteError: as `replaced`.

    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name in tensors:
        if not isinstance(name, str) or name == "__metadata__" or name.encode(errors="ignore").decode() != name:
            raise ArgumentError(f"{name!r}: a file cannot hold a tensor of that name")
    kept = {name: t.detach() for name, t in tensors.items()}
    whole = {**metadata, CHECKSUM: f"{checksum(kept, metadata):08x}"}
    with replaced(path) as temporary:
        try:
            save_file(kept, temporary, metadata=whole)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error


def checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """CRC-32 of a file's contents: of the metadata, as sorted JSON, then of each tensor by name: a line and its bytes.

    The line is `name dtype [shape]`, the bytes are those in the file. It finds damage, not forgery.
    """
    crc = zlib.crc32(json.dumps({k: v for k, v in metadata.items() if k != CHECKSUM}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"\n{name} {short(tensor.dtype)} {list(tensor.shape)}\n".encode(), crc)
        flat = tensor.detach().reshape(-1)
        for piece in flat.split(1 << 24):  # from a GPU piece by piece
            crc = zlib.crc32(piece.cpu().view(torch.uint8).numpy(), crc)
    return crc


@contextmanager
def opened(
    path: str | os.PathLike[str], kind: str, formats: Iterable[str], error: type[FiunError]
) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a safetensors file of one of our formats: the file, on the CPU, and its metadata.

    Its tensors are mapped, and must be copied before they leave `with`: a file that somebody shortens later would end
    the process.

    Args:
        path: the file.
        kind: what it is, for messages: "a Fisher", "an undo log".
        formats: what its metadata may say.
        error: raised where it is truncated or foreign, also by what is read inside `with`.

    Raises:
        FileNotFoundError: there is none.
        ArgumentError: `path` is no path.

    """
    from safetensors import safe_open

    where = location(path)
    if not where.exists():
        raise FileNotFoundError(f"no {kind.partition(' ')[2]} file at {where}")
    if not where.is_file():
        raise error(f"{where}: truncated or not {kind} file: it is no regular file")
    try:
        with safe_open(where, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if (found := metadata.get("format", "none")) not in formats:
                raise error(f"{where}: not {kind} of this package (format {found}, expected {' or '.join(formats)})")
            yield file, metadata
    except (FiunError, MemoryError):
        raise
    except Exception as found:  # whatever a damaged file leads to: of the library, of json, of torch
        raise error(f"{where}: truncated or not {kind} file: {found}") from found


def check_whole(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Raise a ValueError, which `opened` turns into its error, where the checksum of a file's contents is another.

    Files of the first formats, which end in /1, have none.
    """
    if metadata["format"].endswith("/1") and CHECKSUM not in metadata:
        return
    if metadata[CHECKSUM] != f"{checksum(tensors, metadata):08x}":
        raise ValueError("its checksum is another: it was damaged since it was written")


# ---- Fishers --------------------------------------------------------------------------------------------------------


def unfit_record(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a provenance record, or None."""
    for key, kind in RECORD.items():
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            return f"{key} is a {type(record[key]).__name__}, expected {kind.__name__}"
    if not all(isinstance(text, str) for pair in record["how"].items() for text in pair):
        return "how is not a dict of strings"
    return None


def write_fisher(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all; errors as `save`, and an ArgumentError for an unfit record."""
    layout = {name: list(t.shape) for name, t in tensors.items()}
    if (unfit := unfit_record(record)) is not None:
        raise ArgumentError(f"the provenance of a Fisher to be saved: {unfit}")
    metadata = {"format": FISHER_FORMATS[0], "layout": json.dumps(layout), "provenance": json.dumps(dict(record))}
    metadata["version"] = __version__
    save(path, tensors, metadata)


class FisherFile:
    """An open file: `layout`, `record` (the provenance), and the numbers, by name and range."""

    def __init__(self, where: str, file: Any, metadata: Mapping[str, str]) -> None:
        self._where, self._file, self.metadata = where, file, metadata
        try:
            self.layout = Layout(json.loads(metadata["layout"]))
        except FiunError as error:
            raise FisherFileError(f"{where}: truncated or not a Fisher file: {error}") from error
        kept = json.loads(metadata["provenance"])
        self.record = {key: kept[key] for key in NEEDED} | {key: kept.get(key, new()) for key, new in OPTIONAL.items()}
        if (unfit := unfit_record(self.record)) is not None:
            raise FisherFileError(f"{where}: truncated or not a Fisher file: its provenance: {unfit}")
        if (names := set(file.keys())) != set(self.layout.names):
            raise FisherFileError(f"{where}: its tensors are not those of its layout: {names ^ set(self.layout.names)}")
        for segment in self.layout:
            if tuple(file.get_slice(segment.name).get_shape()) != segment.shape:
                found = file.get_tensor(segment.name)
                raise FisherFileError(
                    f"{where}: {segment.name!r} is {found.dtype} {list(found.shape)}, not as its layout says"
                )

    def mapped(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements start..stop of a parameter, flat, on the CPU; all of them by default. Valid while the file is open.

        Raises:
            LayoutError: there is no such parameter.

        """
        segment = self.layout[name]
        stop = segment.numel if stop is None else stop
        if not segment.shape or (start == 0 and stop == segment.numel):
            return self._file.get_tensor(name).reshape(-1)[start:stop]
        row = segment.numel // max(1, segment.shape[0])
        first = start // max(1, row)  # only the rows that the range touches are read
        part = self._file.get_slice(name)[first : -(-stop // max(1, row))]
        return part.reshape(-1)[start - first * row : stop - first * row]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The same, in memory of its own. No checksum is looked at, which is that of the whole file."""
        return self.mapped(name, start, stop).clone()


@contextmanager
def opened_fisher(path: str | os.PathLike[str]) -> Iterator[FisherFile]:
    """Open a file that `write_fisher` made.

    Raises:
        FisherFileError: it is truncated, foreign, or its tensors do not match its own metadata.
        FileNotFoundError: there is none.

    """
    with opened(path, "a Fisher", FISHER_FORMATS, FisherFileError) as (file, metadata):
        yield FisherFile(os.fspath(path), file, metadata)


def read_fisher(path: str | os.PathLike[str]) -> tuple[torch.Tensor, Layout, dict[str, Any]]:
    """Flat buffer [numel] on the CPU, layout and provenance record; errors as `opened_fisher`."""
    with opened_fisher(path) as file:
        first = file.mapped(file.layout.names[0])
        if first.dtype not in FISHER_DTYPES:
            raise FisherFileError(f"{os.fspath(path)}: its numbers are {first.dtype}, expected float32 or float64")
        buffer = expect_writes(torch.empty(file.layout.numel, dtype=first.dtype, device="cpu"))
        for segment in file.layout:
            values = file.mapped(segment.name)
            if values.dtype != buffer.dtype:
                raise FisherFileError(
                    f"{os.fspath(path)}: {segment.name!r} is {values.dtype}, expected {buffer.dtype} as the others"
                )
            buffer[segment.offset : segment.offset + segment.numel] = values
        check_whole(file.layout.views(buffer), file.metadata)
    return buffer, file.layout, file.record
