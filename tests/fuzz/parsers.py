"""The readers of both file formats under coverage-guided fuzzing: Atheris, which is libFuzzer (`pip install atheris`).

    python tests/fuzz/parsers.py [-max_total_time=60] [-seed=1] [folder of a corpus]

The formats without a checksum, since almost nothing passes one; what loads is used, as in files.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fiun_fast"]):
    from files import FORMATS, judged

WHERE = Path(tempfile.mkdtemp())
KINDS = [FORMATS[name](WHERE) for name in ("Fisher without checksum", "undo without checksum")]
CASES = [(kind, k) for kind in KINDS for k in range(len(kind.originals))]


def one(data: bytes) -> None:
    """The first byte chooses the format and what it is compared with, the rest is the file."""
    kind, k = CASES[(data[0] if data else 0) % len(CASES)]
    path = WHERE / "case"
    path.write_bytes(data[1:])
    judged(kind, path, k)


def main() -> None:
    """Begin with the files as they were written."""
    seeds = WHERE / "seeds"
    seeds.mkdir()
    for i, (kind, k) in enumerate(CASES):
        (seeds / str(i)).write_bytes(bytes([i]) + kind.originals[k])
    atheris.Setup([*sys.argv, "-max_len=4096", str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
