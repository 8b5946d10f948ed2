"""How far a run over files has come: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

EVERY = 10.0  # seconds between plain lines


@contextmanager
def shown_progress(
    what: str, *, quiet: bool = False, stream: TextIO | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Give a function of bytes done and bytes in all that shows bytes, GB/s and the time left, on standard error.

    Args:
        what: is being done, for the beginning of a line.
        quiet: show nothing.
        stream: another file than standard error.

    """
    stream = sys.stderr if stream is None else stream
    if quiet:
        yield lambda done, total: None
    elif stream.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(file=stream), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        lines = _Lines(what, stream)
        yield lines.tell


class _Lines:
    """Plain lines, EVERY seconds, for logs; none for what is over by then."""

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what, self._stream = what, stream
        self._began = self._last = time.monotonic()

    def tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < EVERY or not done:
            return
        self._last = now
        speed = done / (now - self._began)
        left = int((total - done) / speed)
        so_far = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s"
        print(f"{self._what}: {so_far}, {left // 60}:{left % 60:02d} left", file=self._stream, flush=True)
