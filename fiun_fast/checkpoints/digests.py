"""SHA-256 of every tensor read and written, on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import Any

import numpy as np

from .schedule import Span

Key = tuple[int, str]  # file, tensor or HEADER


class Digests:
    """Digests of tensors whose pieces come in order; what is written has that of what was read until one changes."""

    def __init__(self) -> None:
        self._read: dict[Key, tuple[Any, int]] = {}  # and the offset up to which it goes
        self._written: dict[Key, Any] = {}

    def read(self, spans: Iterable[Span], bytes_of: Callable[[Span], np.ndarray], pool: Executor) -> dict[Span, Any]:
        """Take up what was read; return for each span the digest before it."""
        before: dict[Span, Any] = {}
        waiting = []
        for key, own in _by_tensor(spans).items():
            digest, at = self._read.get(key, (None, own[0].start))
            digest = digest or hashlib.sha256()
            fresh = [span for span in own if span.start >= at]  # a tensor that two items read is taken once
            if fresh:
                self._read[key] = digest, fresh[-1].stop
                waiting.append(pool.submit(_update, digest, fresh, bytes_of, before))
        for one in waiting:
            one.result()
        return before

    def write(
        self,
        spans: Iterable[Span],
        changed: Iterable[Span],
        before: dict[Span, Any],
        bytes_of: Callable[[Span], np.ndarray],
        pool: Executor,
    ) -> list[Any]:
        """Take up what is to be written, of which some changed; return what to wait for."""
        new = set(changed)
        waiting = []
        for key, own in _by_tensor(spans).items():
            while own and key not in self._written and own[0] not in new:
                own.pop(0)
            if own:
                digest = self._written.setdefault(key, before[own[0]])
                waiting.append(pool.submit(_update, digest, own, bytes_of, None))
        return waiting

    def of(self, key: Key) -> tuple[str, str] | None:
        """Of a tensor as it was read and as it is written; None where it was not read."""
        if key not in self._read:
            return None
        digest = self._read[key][0]
        return digest.hexdigest(), self._written.get(key, digest).hexdigest()

    def keys(self) -> Iterable[Key]:
        """All that were read."""
        return self._read.keys()


def _by_tensor(spans: Iterable[Span]) -> dict[Key, list[Span]]:
    found: dict[Key, list[Span]] = {}
    for span in sorted(spans):
        found.setdefault((span.file, span.tensor), []).append(span)
    return found


def _update(digest: Any, spans: list[Span], bytes_of: Callable[[Span], np.ndarray], before: dict | None) -> None:
    for span in spans:
        if before is not None:
            before[span] = digest.copy()
        digest.update(bytes_of(span).data)
