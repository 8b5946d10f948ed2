"""What surrounds reading and writing of models: one thread at a time, signals afterwards, denormal numbers kept."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

# SIGINT is replaced first and put back last
_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")
    if hasattr(signal, name)
)
_TINY, _ONE = np.float32(1e-45), np.float32(1)


# One lock for the process: two plans may have one model, and kernels use all threads anyway.
alone = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child finds no run half done, and a lock that nobody holds
    os.register_at_fork(before=alone.acquire, after_in_parent=alone.release, after_in_child=alone.release)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Handlers of signals run when the block has ended, not between two of its steps.

    Python runs them in the main thread only, so that elsewhere nothing is to be done. What is deferred is what has a
    handler in Python: Ctrl-C's KeyboardInterrupt, and the usual ones for an end, a timeout or a checkpoint.
    """
    if threading.get_ident() != threading.main_thread().ident:
        yield
        return
    caught: list[tuple[Callable[[int, Any], Any], int, Any]] = []
    over: list[bool] = []
    with ExitStack() as then, ExitStack() as stack:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):

                def note(number: int, frame: Any, handler: Callable[[int, Any], Any] = handler) -> None:
                    if over:  # putting handlers back was itself interrupted, by one that was back already
                        handler(number, frame)
                    else:
                        caught.append((handler, number, frame))

                stack.callback(signal.signal, number, handler)
                signal.signal(number, note)
        try:
            yield
        finally:
            over.append(True)
            for handler, number, frame in reversed(caught):  # each is called, also where another raises
                then.callback(handler, number, frame)


@contextmanager
def denormals_kept() -> Iterator[None]:
    """Plain torch computes with denormal numbers, after `torch.set_flush_denormal(True)` too.

    The mode belongs to a thread, and torch's workers have what the thread had that made them: so on this thread alone.
    """
    if _TINY * _ONE != 0:
        yield
        return
    with alone:  # threads that begin meanwhile take over the number of this one
        threads = torch.get_num_threads()
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(True)
