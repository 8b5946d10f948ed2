"""The record of a run, `fiun-fast.json`: what was done to what, and digests by which anyone can check it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..version import __version__
from .digests import Digests
from .disk import BLOCK, Source, down, room, up
from .entries import ForgetEntry, ModelEntry, Tree
from .family import Family
from .header import read_header
from .schedule import Item
from .stored import StoredFisher

NAME = "fiun-fast.json"
FORMAT = "fiun_fast.checkpoints/1"
_CHUNK = 4 << 20  # bytes read at a time
Counts = Mapping[tuple[int, int], tuple[int, int, int]]  # (item, node) -> selected, zeroed, nonfinite


def tree_to_dict(tree: Tree) -> dict[str, Any]:
    """A tree as plain data."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(tree))


def tree_from_dict(found: Mapping[str, Any]) -> Tree:
    """What `tree_to_dict` was given."""

    def path(text: str | None) -> Path | None:
        return None if text is None else Path(text)

    models = (
        ModelEntry(
            **{**one, "path": Path(one["path"]), "fisher": path(one["fisher"]), "parents": tuple(one["parents"])}
        )
        for one in found["models"]
    )
    forget = (ForgetEntry(**{**one, "fisher": Path(one["fisher"])}) for one in found["forget"])
    return Tree(**{**found, "models": tuple(models), "forget": tuple(forget), "source": path(found["source"])})


def make(
    family: Family,
    items: list[Item],
    counts: Counts,
    digests: Digests,
    others: Mapping[str, Mapping[str, str]],
    mode: str,
) -> dict[str, Any]:
    """The record of a run.

    Args:
        family, items: what was run.
        counts: of each item and node.
        digests: of all tensors read.
        others: model -> other file -> SHA-256.
        mode: "out" or "in place".

    """
    node_of = {name: n for n, name in enumerate(family.names)}
    found = {(part.span.file, part.entry.name): (item.index, part.who) for item in items for part in item.thetas}
    models = []
    for model in family.tree.models:
        weights = family.weights.get(model.name)
        if weights is None:
            continue
        first, files = family.first_of(weights), []
        for i, (source, header) in enumerate(zip(weights.files, weights.headers, strict=True)):
            tensors = {}
            for name, entry in header.tensors.items():
                line: dict[str, Any] = {"dtype": entry.dtype, "shape": list(entry.shape)}
                if (where := found.get((first + i, name))) is not None:
                    line |= dict(zip(("selected", "zeroed", "nonfinite"), counts[where], strict=True))
                if (digest := digests.of((first + i, name))) is not None:
                    line |= {"sha256_before": digest[0], "sha256": digest[1]}
                tensors[name] = line
            files.append(
                {"file": source.path.name, "size": source.size, "header_sha256": header.sha256, "tensors": tensors}
            )
        line = {"name": model.name, "path": model.name if mode == "out" else str(weights.root)}
        if model.name in node_of:
            n = node_of[model.name]
            requests = family.program.nodes[n].requests
            line |= {"alpha": float(family.dampening.alpha[n]), "lam": float(family.dampening.lam[n])}
            line |= {"requests": [family.tree.forget[k].origin for k in requests]}
        models.append({**line, "files": files, "others": dict(others.get(model.name, {}))})
    return {
        "format": FORMAT,
        "fiun_fast": __version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mode": mode,
        "tree": tree_to_dict(family.tree),
        "models": models,
        "fishers": [_fisher(family, fisher, digests) for fisher in family.fishers],
    }


def _fisher(family: Family, fisher: StoredFisher, digests: Digests) -> dict[str, Any]:
    tensors = {}
    for name in fisher.layout.names:
        file, entry = family.stored(fisher, name)
        if (digest := digests.of((file, entry.name))) is not None:
            tensors[name] = digest[0]
    return {"path": str(fisher.path), "sha256": tensors}


def read(folder: Path) -> dict[str, Any]:
    """The record in a folder.

    Raises:
        CheckpointError: there is none, or it is damaged.

    """
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        for model in found["models"]:
            for file in model["files"]:
                _ = model["name"], model["path"], model["others"], file["file"], file["size"], file["header_sha256"]
                _ = [line.get("sha256") for line in file["tensors"].values()]
    except OSError as error:
        raise CheckpointError(f"{folder / NAME}: no record of a run: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{folder / NAME}: damaged or not the record of a run: {error!r:.200}") from error
    return found


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        differences: a line for each thing that is not as the record has it; empty: all is.
        files: that were looked at.
        bytes_read: from them.

    """

    differences: tuple[str, ...]
    files: int
    bytes_read: int

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        head = f"{self.files:,} files, {self.bytes_read:,} bytes read: "
        if not self.differences:
            return head + "all as recorded"
        return "\n".join([f"{head}{len(self.differences)} differ from the record", *self.differences])


def verify(folder: str | Path) -> Verification:
    """Compare a result with its record, tensor by tensor: a folder of `unlearn(out=…)`, or the journal of one in place.

    Raises:
        CheckpointError: there is no record, or it is damaged.

    """
    where = Path(folder)
    found = read(where)
    differences: list[str] = []
    files = total = 0
    with ThreadPoolExecutor(4, "fiun_fast.verify") as pool:
        for model in found["models"]:
            root = where / model["path"]
            for line in model["files"]:
                files += 1
                total += _verify_weights(root / line["file"], line, differences, pool)
            for name, digest in model["others"].items():
                files += 1
                try:
                    size, found_digest = _digest_of_file(root / name)
                except OSError as error:
                    differences.append(f"{root / name}: {error.strerror}")
                    continue
                total += size
                if found_digest != digest:
                    differences.append(f"{root / name}: another content")
    return Verification(tuple(differences), files, total)


def _verify_weights(path: Path, line: Mapping[str, Any], differences: list[str], pool: ThreadPoolExecutor) -> int:
    """Compare one file; return the bytes read."""
    try:
        source = Source(path)
    except CheckpointError as error:
        differences.append(str(error))
        return 0
    try:
        if source.size != line["size"]:
            differences.append(f"{path}: {source.size:,} bytes, {line['size']:,} in the record")
            return 0
        try:
            header = read_header(source)
        except CheckpointError as error:
            differences.append(str(error))
            return 0
        if header.sha256 != line["header_sha256"]:
            differences.append(f"{path}: another header")
            return header.data
        names = [name for name, one in line["tensors"].items() if one.get("sha256") and name in header.tensors]
        places = [(header.tensors[name].start, header.tensors[name].stop) for name in names]
        for name, digest in zip(names, pool.map(lambda place: digest_of(source, *place), places), strict=True):
            if digest != line["tensors"][name]["sha256"]:
                differences.append(f"{path}: tensor {name!r} has another content")
        return header.data + sum(stop - start for start, stop in places)
    except CheckpointError as error:
        differences.append(str(error))
        return 0
    finally:
        source.close()


def digest_of(source: Source, start: int, stop: int) -> str:
    """SHA-256, hex, of bytes start..stop of a file."""
    digest = hashlib.sha256()
    for piece in pieces_of(source, start, stop):
        digest.update(piece.data)
    return digest.hexdigest()


def pieces_of(source: Source, start: int, stop: int) -> Iterator[np.ndarray]:
    """Bytes start..stop of a file, some at a time; each piece is valid until the next one."""
    array = room(_CHUNK + BLOCK)
    at = start
    while at < stop:
        end = min(stop, at + _CHUNK)
        source.read(array[: up(end) - down(at)], down(at), end - down(at))
        yield array[at - down(at) : end - down(at)]
        at = end


def digests_of(paths: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """Name -> SHA-256 of whole files."""
    return {name: _digest_of_file(path)[1] for name, path in paths}


def _digest_of_file(path: Path) -> tuple[int, str]:
    """Bytes of a file, and their SHA-256; some are read at a time: a folder of a model may hold anything."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()
