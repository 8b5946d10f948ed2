"""Bytes of files: aligned reads and writes past the page cache where the system can, locks, flushing, copying.

All of the package's traffic with disks goes through `SYSTEM`, so that a test may let any call fail.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, FileWriteError

try:
    import fcntl
except ImportError:  # Windows: no locks, no clones
    fcntl = None  # type: ignore[assignment]

BLOCK = 4096  # offsets, lengths and addresses of direct traffic are multiples of it
_DIRECT = getattr(os, "O_DIRECT", 0)
DIRECT_LEAST = 16 * BLOCK  # what is shorter goes through the page cache
_MOST = 1 << 30  # bytes a call
_FICLONE = 0x40049409
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # what a file system without direct traffic says


class System:
    """The calls that move bytes or make them last."""

    pread = staticmethod(os.preadv) if hasattr(os, "preadv") else None
    pwrite = staticmethod(os.pwrite) if hasattr(os, "pwrite") else None
    fsync = staticmethod(os.fsync)
    rename = staticmethod(os.replace)
    truncate = staticmethod(os.ftruncate)
    allocate = staticmethod(getattr(os, "posix_fallocate", os.truncate))


SYSTEM: Any = System()


def down(offset: int) -> int:
    """The block that a byte lies in."""
    return offset // BLOCK * BLOCK


def up(offset: int) -> int:
    """The end of the blocks before a byte."""
    return -(-offset // BLOCK) * BLOCK


def room(size: int) -> np.ndarray:
    """Bytes that begin at a page, as direct traffic wants them."""
    return np.frombuffer(mmap(-1, max(BLOCK, up(size))), np.uint8)


class Source:
    """A file that is read, as it was when it was opened.

    Raises:
        CheckpointError: it is not there, no regular file, or must not be read.

    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self.path, self._fd, self._cached, self._once = path, -1, -1, threading.Lock()
        mode = os.O_RDWR if writable else os.O_RDONLY
        self._mode = mode
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(f"{path}: no regular file")
            self._fd = _opened(path, mode, direct=True)
            found = os.fstat(self._fd)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be {'written' if writable else 'read'}: {error.strerror}") from error
        self.size, self.mtime, self.identity = found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino)
        self.links = found.st_nlink

    def read(self, into: np.ndarray, offset: int, needed: int, what: str = "") -> None:
        """Fill `into` from `offset` on, both by blocks; `needed` bytes must be there, more need not.

        Raises:
            CheckpointError: the file is shorter than it was, or the disk failed.

        """
        done = 0
        try:
            with _if_aligned():
                while done < needed and done % BLOCK == 0:  # after a short read, or at the end, it is not aligned
                    got = SYSTEM.pread(self._fd, [into[done : done + _MOST]], offset + done)
                    if got == 0:
                        break
                    done += got
            while done < needed:
                got = SYSTEM.pread(self.cached, [into[done:needed]], offset + done)
                if got == 0:
                    raise CheckpointError(f"{self.path}{what}: truncated: it ends at byte {offset + done:,}")
                done += got
        except OSError as error:
            raise CheckpointError(f"{self.path}{what}: not read: {error.strerror}") from error

    @property
    def cached(self) -> int:
        """A descriptor for what is not aligned."""
        with self._once:
            if self._cached < 0:
                self._cached = _opened(self.path, self._mode, direct=False)
                found = os.fstat(self._cached)
                if (found.st_dev, found.st_ino) != self.identity:
                    raise CheckpointError(f"{self.path}: was replaced meanwhile")
            return self._cached

    def write(self, data: np.ndarray, offset: int) -> None:
        """Write in place; a FileWriteError says what failed."""
        _write(self.path, self._fd, self.cached, data, offset)

    def flush(self) -> None:
        """What was written outlasts a loss of power."""
        flush(self.path, self._fd)

    def truncate(self, size: int) -> None:
        """Cut the file, for good: what is gone is gone after a loss of power too."""
        try:
            SYSTEM.truncate(self._fd, size)
        except OSError as error:
            raise failed(self.path, error) from error
        self.size = size
        self.flush()

    def lock(self, *, alone: bool) -> None:
        """Until it is closed: share the file with readers, or have it alone.

        Raises:
            CheckpointError: another process has it.

        """
        _lock(self._fd, self.path, alone)

    def check_unchanged(self) -> None:
        """Raise a CheckpointError where somebody wrote to the file since it was opened."""
        try:
            found, now = os.fstat(self._fd), self.path.stat()
        except OSError as error:
            raise CheckpointError(f"{self.path}: gone meanwhile: {error.strerror}") from error
        same = (found.st_size, found.st_mtime_ns) == (self.size, self.mtime)
        if not same or (now.st_dev, now.st_ino) != self.identity:
            raise CheckpointError(f"{self.path}: changed since planning; run again when nobody writes to it")

    def close(self) -> None:
        """Close it, which ends the lock."""
        for fd in (self._fd, self._cached):
            if fd >= 0:
                os.close(fd)
        self._fd = self._cached = -1


class Target:
    """A new file of known size, written piece by piece, in any order.

    Raises:
        FileWriteError: it is there already, the disk is full, or the folder must not be written.

    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._fd, self._cached, self._left = path, -1, -1, size
        try:
            fd = _opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, direct=False)
            try:
                if size:
                    _allocate(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise failed(path, error) from error

    def write(self, data: np.ndarray, offset: int) -> None:
        """Write a piece; a FileWriteError says what failed. Threads may do so at once."""
        _write(self.path, self._fd, self._cached, data, offset)

    def open(self) -> None:
        """Before anything is written."""
        if self._fd < 0:
            try:
                self._fd = _opened(self.path, os.O_RDWR, direct=True)
                self._cached = _opened(self.path, os.O_RDWR, direct=False)
            except OSError as error:
                raise failed(self.path, error) from error

    def wrote(self, count: int) -> None:
        """So many bytes are there; when all are, they are flushed and the file is closed."""
        self._left -= count
        if self._left == 0:
            flush(self.path, self._fd)
            self.close()

    def close(self) -> None:
        """Close it, whole or not."""
        for fd in (self._fd, self._cached):
            if fd >= 0:
                os.close(fd)
        self._fd = self._cached = -1


def failed(path: Path, error: OSError) -> FileWriteError:
    """The error for a file that could not be written."""
    made = FileWriteError(f"{path}: not written: {error.strerror or error}")
    made.errno = error.errno
    return made


def _opened(path: Path, mode: int, *, direct: bool) -> int:
    mode |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if direct and _DIRECT:
        try:
            return os.open(path, mode | _DIRECT, 0o666)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            mode &= ~os.O_EXCL  # some file systems have made the file by then
    return os.open(path, mode, 0o666)


def _allocate(fd: int, size: int) -> None:
    """Room for the whole file now: a full disk is found before anything is computed."""
    try:
        SYSTEM.allocate(fd, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(fd, size)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        os.ftruncate(fd, size)


@contextlib.contextmanager
def _if_aligned() -> Iterator[None]:
    """Direct traffic that a device refuses, as its blocks are larger, goes through the page cache after this."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def _write(path: Path, fd: int, cached: int, data: np.ndarray, offset: int) -> None:
    """Whole blocks directly, where memory is aligned as the file is; edges and small things through the cache."""
    try:
        first, last = up(offset) - offset, down(offset + len(data)) - offset
        if last - first < DIRECT_LEAST or (data.ctypes.data + first) % BLOCK:
            write_all(cached, data, offset)
            return
        at = first
        with _if_aligned():
            while at < last and (at - first) % BLOCK == 0:  # after a short write it is not aligned
                at += SYSTEM.pwrite(fd, data[at : min(last, at + _MOST)], offset + at)
        if first:
            write_all(cached, data[:first], offset)
        if at < len(data):
            write_all(cached, data[at:], offset + at)
    except OSError as error:
        if isinstance(error, FileWriteError):
            raise
        raise failed(path, error) from error


def write_all(fd: int, data: Any, offset: int) -> None:
    """All of it, however little the system takes at a time; an OSError says what failed."""
    data = memoryview(data).cast("B")
    done = 0
    while done < len(data):
        wrote = SYSTEM.pwrite(fd, data[done : done + _MOST], offset + done)
        if wrote == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += wrote


def flush(path: Path, fd: int) -> None:
    """What was written to a file outlasts a loss of power; a FileWriteError says what failed."""
    try:
        SYSTEM.fsync(fd)
    except OSError as error:
        raise failed(path, error) from error


def write_whole(path: Path, text: str) -> None:
    """A small file, whole or not at all, flushed with its name."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(fd, text.encode(), 0)
            SYSTEM.fsync(fd)
        finally:
            os.close(fd)
        SYSTEM.rename(partial, path)
    except OSError as error:
        raise failed(path, error) from error
    flush_folder(path.parent)


@contextlib.contextmanager
def said_of(path: Path) -> Iterator[None]:
    """Turn an OSError inside `with` into a FileWriteError that names the path."""
    try:
        yield
    except OSError as error:
        raise error if isinstance(error, FileWriteError) else failed(path, error) from error


def flush_folder(folder: Path) -> None:
    """The names in a folder outlast a loss of power."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            SYSTEM.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise failed(folder, error) from error


def _lock(fd: int, path: Path, alone: bool) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise CheckpointError(f"{path}: another process works on it; wait for it") from error


@contextlib.contextmanager
def locked_folder(folder: Path, *, make: bool = False) -> Iterator[None]:
    """Have a folder alone inside `with`, made before if asked for.

    Raises:
        CheckpointError: another process has it.
        FileWriteError: it cannot be made.

    """
    if make:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise failed(folder, error) from error
    fd = os.open(folder, os.O_RDONLY)
    try:
        _lock(fd, folder, alone=True)
        yield
    finally:
        os.close(fd)


def clone(source: Source, target: Path) -> bool:
    """Copy on write, where the file system has it: the new file shares blocks until one of the two changes."""
    if fcntl is None:
        return False
    fd = _opened(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, direct=False)
    try:
        fcntl.ioctl(fd, _FICLONE, source.cached)
    except OSError:
        target.unlink()
        return False
    finally:
        os.close(fd)
    return True
