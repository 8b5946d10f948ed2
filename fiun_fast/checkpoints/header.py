"""The header of a safetensors file, read strictly: where each tensor's bytes are, and that nothing else is there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from .disk import Source, room

LARGEST = 100_000_000  # bytes of a header; the limit of the format's own library
# bits an element
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
FLOATS = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file; start and stop in bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says of itself: tensors in the order of the file."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data: int  # where the header ends
    sha256: str  # of the header's bytes, its length included


def read_header(source: Source) -> Header:
    """Read and check it all: names, dtypes, shapes, and that the tensors fill the file without a hole or an overlap.

    Raises:
        CheckpointError: the message names the file and says what is wrong.

    """

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{source.path}: truncated or not a safetensors file: {what}")

    if source.size < 8:
        raise wrong(f"it has {source.size} bytes")
    length = int.from_bytes(_bytes(source, 8), "little")
    if length > LARGEST:
        raise wrong(f"a header of {length:,} bytes, more than {LARGEST:,}")
    if length + 8 > source.size:
        raise wrong(f"a header of {length:,} bytes in a file of {source.size:,}")
    raw = _bytes(source, 8 + length)
    try:
        if raw[8:9] != b"{":
            raise ValueError("its header does not begin with {")
        found = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_without_duplicates)
        metadata = _metadata(found.pop("__metadata__", None))
        entries = [_entry(name, line, 8 + length) for name, line in found.items()]
        _check_filled(entries, 8 + length, source.size)
    except (ValueError, RecursionError) as error:
        raise wrong(str(error)) from error
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    return Header({e.name: e for e in entries}, metadata, 8 + length, hashlib.sha256(raw).hexdigest())


def _bytes(source: Source, count: int) -> bytes:
    array = room(count)
    source.read(array, 0, count)
    return array[:count].tobytes()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r:.80} is there twice")
    return found


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its __metadata__ is not a table of strings")
    return found


def _entry(name: str, line: Any, data: int) -> Entry:
    if not isinstance(line, dict) or line.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.80} has not just dtype, shape and data_offsets")
    dtype, shape, offsets = line["dtype"], line["shape"], line["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r:.80}: dtype {dtype!r:.40}, expected one of {', '.join(BITS)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"{name!r:.80}: {what} {numbers!r:.80}, expected whole numbers")
    bits = math.prod(shape) * BITS[dtype]
    if len(offsets) != 2 or offsets[0] > offsets[1] or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise ValueError(
            f"{name!r:.80}: {dtype} {shape!r:.80} takes {bits / 8:g} bytes, data_offsets are {offsets!r:.80}"
        )
    return Entry(name, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _check_filled(entries: list[Entry], data: int, size: int) -> None:
    at = data
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != at:
            what = "overlaps what is before it" if entry.start < at else f"follows a hole of {entry.start - at:,} bytes"
            raise ValueError(f"{entry.name!r:.80} {what}")
        at = entry.stop
    if at != size:
        raise ValueError(f"its tensors end at byte {at:,}, and the file at {size:,}")
