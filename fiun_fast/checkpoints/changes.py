"""Changes of files that exist: the blocks in which something changed are written, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .disk import BLOCK, Source
from .schedule import Span
from .streaming import Loaded
from .window import Outcome


def write_changes(files: Mapping[int, Source], loaded: Loaded, outcome: Outcome, helpers: ThreadPoolExecutor) -> int:
    """Write the blocks in which something changed; return how many bytes."""
    waiting, total = [], 0
    for span, change in outcome.changed.items():
        if change is None or span.file not in files:
            continue
        pieces = list(blocks_of(span, change.runs))
        total += sum(stop - start for start, stop in pieces)
        waiting.append(helpers.submit(_write, files[span.file], loaded.bytes_of(span), span.start, pieces))
    for one in waiting:
        one.result()
    return total


def blocks_of(span: Span, runs: np.ndarray) -> Iterator[tuple[int, int]]:
    """The blocks of a file that runs lie in, as far as they belong to the span; neighbours together."""
    if not len(runs):
        return
    first, last = runs[:, 0] // BLOCK, (runs[:, 0] + runs[:, 1] - 1) // BLOCK
    apart = np.flatnonzero(first[1:] > last[:-1] + 1)
    for a, b in zip(
        first[np.concatenate(([0], apart + 1))], last[np.concatenate((apart, [len(runs) - 1]))], strict=True
    ):
        yield max(span.start, int(a) * BLOCK), min(span.stop, (int(b) + 1) * BLOCK)


def _write(file: Source, data: np.ndarray, start: int, pieces: list[tuple[int, int]]) -> None:
    for a, b in pieces:
        file.write(data[a - start : b - start], a)
