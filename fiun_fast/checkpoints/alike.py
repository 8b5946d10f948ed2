"""Which tensors of several models hold the same bytes: samples are compared first, then what is alike, in whole."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ..errors import CheckpointError

BLOCK, BLOCKS = 4096, 8  # a sample: so many blocks of so many bytes, over the whole length; the first and the last too
PIECE = 1 << 23  # bytes that are read at a time
THREADS = 4


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are, and what they mean."""

    file: Path
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shared:
    """What two models have in common: tensors, and their bytes; `of` is the bytes of the smaller one."""

    first: str
    second: str
    tensors: int
    size: int
    of: int

    @property
    def whole(self) -> bool:
        """Whether the smaller one has nothing else."""
        return self.size == self.of


def alike(
    models: Mapping[str, Sequence[Place]], *, full: bool = True, watch: Callable[[int, int], None] | None = None
) -> list[Shared]:
    """Which pairs of models have tensors of the same dtype, shape and bytes, whatever they are called.

    Tensors that hold one value over and over (zeros, ones) say nothing, and are left out on both sides.

    Args:
        models: name -> its tensors.
        full: read what is alike by its samples in whole.
        watch: is called with bytes read so far, and all that are to be read, of the latter.

    Raises:
        CheckpointError: a file cannot be read, or ends too early.

    """
    held: dict[str, dict[bytes, int]] = {name: {} for name in models}  # model -> digest of a tensor -> bytes
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        places = {place for own in models.values() for place in own if place.size}
        sampled = dict(zip(places, pool.map(_sampled, places), strict=True))
        owners: dict[bytes, set[str]] = defaultdict(set)
        for name, own in models.items():
            for place in own:
                if (digest := sampled.get(place)) is not None:
                    owners[digest].add(name)
        candidates = [place for place, digest in sampled.items() if digest and len(owners[digest]) > 1 and full]
        exact = dict(_whole(candidates, sampled, pool, watch))
    for name, own in models.items():
        for place in own:
            if (digest := exact.get(place, sampled.get(place))) is not None:
                held[name][digest] = place.size
    return list(_pairs(held))


def _pairs(held: Mapping[str, Mapping[bytes, int]]) -> Iterator[Shared]:
    owners: dict[bytes, list[str]] = defaultdict(list)
    for name, own in held.items():
        for digest in own:
            owners[digest].append(name)
    common: dict[tuple[str, str], list[int]] = defaultdict(list)
    for digest, names in owners.items():
        for pair in combinations(names, 2):
            common[pair].append(held[names[0]][digest])
    order = {name: k for k, name in enumerate(held)}
    for first, second in sorted(common, key=lambda pair: (order[pair[0]], order[pair[1]])):
        sizes = common[first, second]
        least = min(sum(held[name].values()) for name in (first, second))
        yield Shared(first, second, len(sizes), sum(sizes), least)


def _sampled(place: Place) -> bytes | None:
    """Digest of dtype, shape and a sample; None where the sample is one value over and over."""
    last = place.size - BLOCK
    if place.size <= BLOCK * BLOCKS:
        ranges = [(place.start, place.stop)]
    else:
        ranges = [(at, at + BLOCK) for at in (place.start + last * k // (BLOCKS - 1) // 8 * 8 for k in range(BLOCKS))]
    data = b"".join(_read(place.file, ranges))
    width = max(1, place.size // max(1, _count(place.shape)))
    if data == data[:width] * (len(data) // width):
        return None
    return _digest(place, [data])


def _whole(
    places: Iterable[Place],
    sampled: Mapping[Place, bytes | None],
    pool: ThreadPoolExecutor,
    watch: Callable[[int, int], None] | None,
) -> Iterator[tuple[Place, bytes]]:
    """Digest of each, over all its bytes; those of one place in one file are read once."""
    places = sorted(places, key=lambda place: (str(place.file), place.start))
    real = {path: path.stat() for path in {place.file for place in places}}
    same: dict[tuple, list[Place]] = defaultdict(list)  # hard links, and links to one file
    for place in places:
        found = real[place.file]
        same[(found.st_dev, found.st_ino, place.start, place.stop, place.dtype, place.shape)].append(place)
    once = [group[0] for group in same.values()]
    done, total = 0, sum(place.size for place in once)
    for group, digest in zip(same.values(), pool.map(lambda p: _digest(p, _pieces(p)), once), strict=True):
        done += group[0].size
        if watch is not None:
            watch(done, total)
        yield from ((place, digest) for place in group)


def _pieces(place: Place) -> Iterator[bytes]:
    ranges = ((at, min(at + PIECE, place.stop)) for at in range(place.start, place.stop, PIECE))
    return _read(place.file, ranges)


def _digest(place: Place, pieces: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256(f"{place.dtype} {place.shape}\n".encode())
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _read(path: Path, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for start, stop in ranges:
                file.seek(start)
                data = file.read(stop - start)
                if len(data) < stop - start:
                    raise CheckpointError(f"{path}: truncated: it ends at byte {start + len(data):,}")
                yield data
    except OSError as error:
        raise CheckpointError(f"{path}: not read: {error.strerror or error}") from error


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
