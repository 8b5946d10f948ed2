"""A disk that fails: errors and short writes at a chosen call, and losses of power that take what was not flushed."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable

from fiun_fast.checkpoints.disk import System

WRITES = ("pwrite", "fsync", "rename", "truncate", "allocate")


class Faulty(System):
    """The k-th call that writes goes wrong; k < 0: none does. `calls` counts them."""

    def __init__(self, k: int, kind: str) -> None:
        self.k, self.kind, self.calls = k, kind, 0

    def __getattribute__(self, name: str):
        found = object.__getattribute__(self, name)
        return (lambda *a: self.call(name, found, a)) if name in WRITES else found

    def call(self, name: str, function: Callable, arguments: tuple):
        number, self.calls = self.calls, self.calls + 1
        if number != self.k:
            return self.plain(name, function, arguments)
        if self.kind == "short":
            if name == "pwrite" and len(arguments[1]) > 1:
                fd, data, offset = arguments
                return (
                    function(fd, bytes(memoryview(data)[: len(data) // 2]), offset)
                    if not _is_direct(fd)
                    else (function(fd, data[: max(4096, len(data) // 2 // 4096 * 4096)], offset))
                )
            return self.plain(name, function, arguments)
        raise OSError(getattr(errno, self.kind, errno.EIO), os.strerror(getattr(errno, self.kind, errno.EIO)))

    def plain(self, name: str, function: Callable, arguments: tuple):
        return function(*arguments)


def _is_direct(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


class Power(Faulty):
    """At the k-th call power fails: half of it happens, and of all that was not flushed some is lost."""

    def __init__(self, k: int, seed: int) -> None:
        super().__init__(k, "power")
        self.dice, self.lock = random.Random(seed), threading.Lock()
        self.unflushed: dict[tuple[int, int], list[tuple[int, int, bytes]]] = {}  # file -> fd, offset, bytes before

    def call(self, name: str, function: Callable, arguments: tuple):
        with self.lock:  # one call at a time, so that what is lost is what was there before
            number, self.calls = self.calls, self.calls + 1
            if number != self.k:
                return self.plain(name, function, arguments)
            if name == "pwrite" and self.dice.random() < 0.7:
                self.plain(name, function, arguments)
            for writes in self.unflushed.values():
                for fd, offset, before in reversed([write for write in writes if self.dice.random() < 0.5]):
                    os.pwrite(fd, before, offset)
            os._exit(77)

    def plain(self, name: str, function: Callable, arguments: tuple):
        if name == "pwrite":
            fd, data, offset = arguments
            plain = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            before = os.pread(plain, len(data), offset)
            before += bytes(len(data) - len(before))
            self.unflushed.setdefault(_file(fd), []).append((plain, offset, before))
        result = function(*arguments)
        if name == "fsync":
            for fd, _, _ in self.unflushed.pop(_file(arguments[0]), []):
                os.close(fd)
        return result


def _file(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
