"""Files that are whole or not there at all, and safetensors files with a checksum of their contents."""

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

from .arguments import short
from .errors import ArgumentError, FileWriteError, FiunError

CHECKSUM = "crc32"  # an entry of the metadata


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
            flush_folder(target.parent)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, FiunError):
            failed = FileWriteError(f"{target}: not written: {error.strerror or error}")
            failed.errno = error.errno
            raise failed from error
        raise


def flush_folder(folder: Path) -> None:
    """Have a folder's own entries on disk: names that were added, changed or taken out; an OSError as of the system."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, UTF-8, all or nothing; errors as `replaced`."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Write a safetensors file with a checksum in its metadata, all or nothing; the checksum is returned too.

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
    return whole[CHECKSUM]


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


def open_tensors(
    path: str | os.PathLike[str], kind: str, formats: Iterable[str], error: type[FiunError]
) -> tuple[Any, dict[str, str]]:
    """Open a safetensors file of one of our formats: the file, on the CPU, a context manager; and its metadata.

    Its tensors are mapped, and must be copied before it is closed: a file that somebody shortens later would end the
    process.

    Args:
        path: the file.
        kind: what it is, for messages: "a Fisher", "an undo log".
        formats: what its metadata may say.
        error: raised where it is truncated or foreign.

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
    with unless_damaged(where, kind, error):
        file = safe_open(where, framework="pt", device="cpu")
        metadata = file.metadata() or {}
    if (found := metadata.get("format", "none")) not in formats:
        raise error(f"{where}: not {kind} of this package (format {found}, expected {' or '.join(formats)})")
    return file, metadata


@contextmanager
def opened(
    path: str | os.PathLike[str], kind: str, formats: Iterable[str], error: type[FiunError]
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The same, closed at the end of `with`; `error` stands for whatever goes wrong inside, too."""
    file, metadata = open_tensors(path, kind, formats, error)
    with unless_damaged(location(path), kind, error), file:
        yield file, metadata


@contextmanager
def unless_damaged(where: Path, kind: str, error: type[FiunError]) -> Iterator[None]:
    """Turn whatever a damaged file leads to, of the library, of json, of torch, into `error`, which names the file."""
    try:
        yield
    except (FiunError, MemoryError):
        raise
    except Exception as found:
        raise error(f"{where}: truncated or not {kind} file: {found}") from found


def check_whole(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Raise a ValueError, which `unless_damaged` turns into its error, where a file's checksum is another.

    Files of the first formats, which end in /1, have none.
    """
    if metadata["format"].endswith("/1") and CHECKSUM not in metadata:
        return
    if metadata.get(CHECKSUM) != f"{checksum(tensors, metadata):08x}":
        raise ValueError("its checksum is another: it was damaged since it was written")
