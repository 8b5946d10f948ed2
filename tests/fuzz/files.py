"""Mutated files: whatever is done to a file that was written, it is an error of this package or a right load.

    python tests/fuzz/files.py --cases 10000 --seed 1

prints, for each format, how many cases there were, how long they took and what became of them; the first case that did
anything else is written to --keep, and ends the run with status 1.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import fiun_fast as ff

SIZES = (0, 1, 2, 7, 8, 9, 127, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**30, -1)
PLACED = (
    "null",
    "[]",
    "{}",
    "-1",
    "1e999",
    "NaN",
    "true",
    '"x"',
    "9" * 5000,
    "[" * 2000,
    '"\\ud800"',
    '"F64"',
    '"I32"',
    '""',
)


class WrongError(AssertionError):
    """A case that was neither refused nor right."""


@dataclass
class Format:
    """A format: files as they were written, and what is to be made of a mutated one.

    `load` returns whether what it read is what had been written.
    """

    originals: list[bytes]
    load: Callable[[Path, int], bool]
    checked: bool  # has a checksum: whatever loads must be right


# ---- mutations -------------------------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and tensors of a safetensors file, where it has a header."""
    length = int.from_bytes(data[:8], "little")
    try:
        return json.loads(data[8 : 8 + length]), data[8 + length :]
    except (ValueError, RecursionError):
        return None


def joined(header: dict[str, Any] | str, tensors: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + tensors


def flip(data: bytearray, dice: random.Random) -> None:
    """A few bits, anywhere."""
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def cut(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data)) :]


def grow(data: bytearray, dice: random.Random) -> None:
    data += dice.randbytes(dice.choice((1, 4, 4096)))


def take_out(data: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(data))
    del data[at : at + dice.choice((1, 4, 64))]


def overwrite(data: bytearray, dice: random.Random) -> None:
    """A piece of the file over another, zeros, or noise."""
    size = dice.choice((1, 4, 16, 256))
    start, at = dice.randrange(len(data)), dice.randrange(len(data))
    data[at : at + size] = dice.choice((bytes(size), dice.randbytes(size), bytes(data[start : start + size])))


def length(data: bytearray, dice: random.Random) -> None:
    """The length of the header."""
    data[:8] = (dice.choice(SIZES) & (2**64 - 1)).to_bytes(8, "little")


def number(data: bytearray, dice: random.Random) -> None:
    """Another digit somewhere in the header: shapes, offsets, counts, the checksum."""
    end = 8 + min(int.from_bytes(data[:8], "little"), len(data))
    digits = [i for i in range(8, min(end, len(data))) if chr(data[i]).isdigit()]
    if digits:
        data[dice.choice(digits)] = ord(dice.choice("0123456789-"))


def value(data: bytearray, dice: random.Random) -> None:
    """Another value somewhere in the header, or in the JSON inside of its metadata."""
    if (parts := split(bytes(data))) is None or not isinstance(parts[0], dict):
        return
    header, tensors = parts
    metadata = header.get("__metadata__")
    inner = [key for key in ("layout", "provenance", "entries") if isinstance(metadata, dict) and key in metadata]
    if inner and dice.random() < 0.7:
        key = dice.choice(inner)
        try:
            metadata[key] = planted(json.loads(metadata[key]), dice)
        except (ValueError, TypeError, RecursionError):
            return
        text: dict[str, Any] | str = header
    else:
        text = planted(header, dice)
    data[:] = joined(text, tensors)


def planted(tree: Any, dice: random.Random) -> str:
    """The JSON of a tree with something else at one place."""
    mark = "\ue000"
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    if not places:
        return dice.choice(PLACED)
    node, key = dice.choice(places)
    what = dice.random()
    if what < 0.15:
        del node[key]
    elif what < 0.3:
        other, at = dice.choice(places)
        node[key] = json.loads(json.dumps(other[at])) if at in other or isinstance(other, list) else None
    elif what < 0.5:
        node[key] = dice.choice(SIZES)
    else:
        node[key] = mark
    return json.dumps(tree, ensure_ascii=False).replace(f'"{mark}"', dice.choice(PLACED))


MUTATIONS = (flip, flip, cut, grow, take_out, overwrite, length, number, value, value)


def mutated(original: bytes, dice: random.Random) -> bytes:
    data = bytearray(original)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        if data:
            dice.choice(MUTATIONS)(data, dice)
    return bytes(data)


# ---- formats ---------------------------------------------------------------------------------------------------------


def fisher_files(folder: Path, checked: bool) -> Format:
    """Fisher files of a few shapes and dtypes."""
    written, originals = [], []
    for k, (dtype, shapes) in enumerate(
        [
            (torch.float32, {"fc.weight": (3, 5), "fc.bias": (3,), "scale": ()}),
            (torch.float64, {"ä.weight": (4, 2, 2), "none": (0, 3)}),
            (torch.float32, {"w": (300,)}),
        ]
    ):
        layout = ff.Layout(shapes)
        values = torch.rand(layout.numel, generator=torch.Generator().manual_seed(k), dtype=dtype)
        written.append(ff.Fisher(values, layout, ff.Provenance("batch", 3, 12, {layout.names[0]: "by hand"})))
        written[-1].save(folder / "fisher")
        originals.append((folder / "fisher").read_bytes())

    def load(path: Path, k: int) -> bool:
        fisher = ff.Fisher.load(path)
        if bool((fisher.buffer < 0).any()) or fisher.buffer.numel() != fisher.layout.numel:
            raise WrongError("a Fisher that is none")
        fisher.sha256()
        wanted = written[k]
        same = torch.equal(fisher.buffer.view(torch.uint8), wanted.buffer.view(torch.uint8))
        return same and fisher.layout == wanted.layout and fisher.provenance == wanted.provenance

    return Format(originals if checked else [aged(one) for one in originals], load, checked)


def fisher_folders(folder: Path) -> Format:
    """A folder of shards: its index, or a shard, is what is mutated."""
    layout = ff.Layout({"a": (3, 5), "b": (40,), "c": ()})
    written = ff.Fisher(torch.rand(layout.numel, generator=torch.Generator().manual_seed(5)), layout)
    written.save(folder / "fisher", shard_size=100)
    names = sorted(path.name for path in (folder / "fisher").iterdir())
    originals = [(folder / "fisher" / name).read_bytes() for name in names]

    def load(path: Path, k: int) -> bool:
        (folder / "fisher" / names[k]).write_bytes(path.read_bytes())
        try:
            fisher = ff.Fisher.load(folder / "fisher")
        finally:
            (folder / "fisher" / names[k]).write_bytes(originals[k])
        return torch.equal(fisher.buffer, written.buffer) and fisher.layout == layout

    return Format(originals, load, True)


def undo_files(folder: Path, checked: bool) -> Format:
    """Undo logs of dicts, one in half precision; what loads is applied to parameters with guards on both sides."""
    written: list[tuple[dict, dict]] = []
    originals = []
    for k, dtype in enumerate((torch.float32, torch.bfloat16)):
        layout = ff.Layout({"a.weight": (5, 6), "b": (40,)})
        dice = torch.Generator().manual_seed(k)
        model = {s.name: torch.randn(s.shape, generator=dice).to(dtype) for s in layout}
        before = {name: tensor.clone() for name, tensor in model.items()}
        fishers = [ff.Fisher(torch.rand(layout.numel, generator=dice), layout) for _ in range(2)]
        log = ff.dampen_(model, *fishers, alpha=0.5, lam=0.1, undo=True, backend="reference").undo
        log.save(folder / "log")
        written.append((before, model))
        originals.append((folder / "log").read_bytes())

    def load(path: Path, k: int) -> bool:
        before, after = written[k]
        log = ff.UndoLog.load(path)
        memory = {name: torch.full((tensor.numel() + 64,), 7, dtype=tensor.dtype) for name, tensor in after.items()}
        model = {name: memory[name][32:-32].view(tensor.shape).copy_(tensor) for name, tensor in after.items()}
        try:
            log.undo_(model, force=not checked)
        except ff.FiunError:
            if not all(torch.equal(model[name], tensor) for name, tensor in after.items()):
                raise WrongError("a refusal that has changed something") from None
            raise
        if any(bool((m[:32] != 7).any() or (m[-32:] != 7).any()) for m in memory.values()):
            raise WrongError("something was written beside the parameter")
        return all(torch.equal(model[name], tensor) for name, tensor in before.items())

    return Format(originals if checked else [aged(one) for one in originals], load, checked)


def aged(data: bytes) -> bytes:
    """The file as version 0.1 would have written it: without a checksum."""
    parts = split(data)
    assert parts is not None
    metadata = parts[0]["__metadata__"]
    del metadata["crc32"]
    metadata["format"] = metadata["format"].replace("/2", "/1")
    tensors = safetensors.torch.load(data)
    return safetensors.torch.save(tensors, metadata)


FORMATS: dict[str, Callable[[Path], Format]] = {
    "Fisher": lambda folder: fisher_files(folder, True),
    "Fisher in shards": fisher_folders,
    "undo": lambda folder: undo_files(folder, True),
    "Fisher without checksum": lambda folder: fisher_files(folder, False),
    "undo without checksum": lambda folder: undo_files(folder, False),
}


def fuzz(name: str, cases: int, seed: int, keep: Path | None = None) -> Counter[str]:
    """Try that many mutated files; what became of them, by outcome. `keep`: where a case that is wrong is left.

    Raises:
        WrongError: one was neither refused by an error of this package nor right.

    """
    outcomes: Counter[str] = Counter()
    dice = random.Random(f"{name} {seed}")
    with tempfile.TemporaryDirectory() as where:
        kind, path = FORMATS[name](Path(where)), Path(where) / "mutated"
        for k, original in enumerate(kind.originals):
            path.write_bytes(original)
            if not kind.load(path, k):
                raise WrongError("the original is not what was written")
        for case in range(cases):
            k = dice.randrange(len(kind.originals))
            data = mutated(kind.originals[k], dice)
            path.write_bytes(data)
            try:
                outcomes[judged(kind, path, k)] += 1
            except WrongError as wrong:
                if keep is not None:
                    keep.write_bytes(data)
                raise WrongError(f"{name}, seed {seed}, case {case}: {wrong}") from wrong
    return outcomes


def judged(kind: Format, path: Path, k: int) -> str:
    try:
        right = kind.load(path, k)
    except ff.FiunError as error:
        return type(error).__name__
    except WrongError:
        raise
    except BaseException as error:
        raise WrongError(f"{type(error).__name__}: {error}") from error
    if not right and kind.checked:
        raise WrongError("it was loaded, and is not what was written")
    return "right" if right else "loaded, changed where nothing checks it"


def main() -> int:
    """Every format in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="mutated files of each format")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-case"), help="where a case that is wrong is written")
    options = parser.parse_args()
    for name in FORMATS:
        begun = time.perf_counter()
        try:
            outcomes = fuzz(name, options.cases, options.seed, options.keep)
        except WrongError as wrong:
            print(f"{wrong} (the file is {options.keep})")
            return 1
        found = ", ".join(f"{count} {what}" for what, count in outcomes.most_common())
        print(f"{name}: {options.cases} cases in {time.perf_counter() - begun:.1f} s: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
