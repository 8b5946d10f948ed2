"""A model on disk: one .safetensors file, or a folder with one or with shards and an index, and what else is there."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .disk import Source
from .header import Entry, Header, read_header

INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
LARGEST_INDEX = 1 << 28  # bytes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# other forms of the same weights: a clean folder must not carry them along
_WEIGHTS = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".tflite", ".npz", ".distcp")


@dataclass
class Weights:
    """The weights of a model, open.

    Attributes:
        root: the folder, or that of the one file.
        files: in the order of their names.
        headers: of each file.
        others: files that a copy of the folder takes along, relative to it: configuration, tokenizer, README.
        left: what it does not: links, hidden folders, the same weights in another form.

    """

    root: Path
    files: list[Source] = field(default_factory=list)
    headers: list[Header] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._where: dict[str, tuple[int, Entry]] = {}

    def open(self, path: Path, *, writable: bool) -> None:
        """Add a file; a CheckpointError where it is damaged, or has a tensor that another one has."""
        self.files.append(Source(path, writable=writable))
        header = read_header(self.files[-1])
        for name, entry in header.tensors.items():
            if name in self._where:
                other = self.files[self._where[name][0]].path.name
                raise CheckpointError(f"{path}: tensor {name!r} is in {other} too")
            self._where[name] = len(self.files) - 1, entry
        self.headers.append(header)

    def __getitem__(self, name: str) -> tuple[int, Entry]:
        return self._where[name]

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def json(self, name: str) -> dict[str, Any]:
        """A file of settings of the folder; empty where it is not there or not a table."""
        try:
            found = json.loads((self.root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()


def open_weights(path: Path, *, writable: bool = False, links: bool = False) -> Weights:
    """Open a model: a folder or one .safetensors file. `links`: its files may be symbolic links, for reading only.

    Raises:
        CheckpointError: there is none, in a form that is not read, with a missing or damaged part; the message says
            what, and how to convert it.

    """
    if path.is_dir():
        names = _names_of_weights(path, links)
        weights = Weights(path)
        weights.others, weights.left = _beside(path, set(names))
    elif path.suffix in PICKLES:
        raise CheckpointError(_pickles(path, path.name))
    elif not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    else:
        names, weights = [path.name], Weights(path.parent)
    index = _index(path, links) if path.is_dir() and (path / INDEX).exists() else {}
    try:
        for name in names:
            _check_plain(weights.root, name, links)
            weights.open(weights.root / name, writable=writable)
        for tensor, name in index.items():
            if tensor not in weights or weights.files[weights[tensor][0]].path.name != name:
                raise CheckpointError(f"{path / INDEX}: names tensor {tensor!r} in {name}, which does not hold it")
    except BaseException:
        weights.close()
        raise
    return weights


def _names_of_weights(folder: Path, links: bool) -> list[str]:
    """The files of a folder that hold the weights."""
    there = sorted(p.name for p in folder.iterdir())
    single = [name for name in ("model.safetensors", ADAPTER) if name in there]
    if ADAPTER in single and ADAPTER_CONFIG not in there:
        single.remove(ADAPTER)
    if INDEX in there:
        if "model.safetensors" in single:
            raise CheckpointError(f"{folder}: has {INDEX} and model.safetensors: which of them? Move one away")
        return sorted(set(_index(folder, links).values()))
    if len(single) == 2:
        raise CheckpointError(f"{folder}: has model.safetensors and {ADAPTER}; name the one that is meant as the path")
    if single:
        return single
    found = [name for name in there if name.endswith(".safetensors")]
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{folder}: {len(found)} .safetensors files without {INDEX}: {', '.join(found[:4])}")
    if ".metadata" in there or any(name.endswith(".distcp") for name in there):
        raise CheckpointError(
            f"{folder}: a torch.distributed.checkpoint; convert it: `python -m torch.distributed.checkpoint."
            "format_utils dcp_to_torch FOLDER model.pt`, then safetensors.torch.save_file(torch.load('model.pt'), FILE)"
        )
    if pickles := [name for name in there if name.endswith(PICKLES)]:
        raise CheckpointError(_pickles(folder, pickles[0]))
    raise CheckpointError(f"{folder}: no model: neither {INDEX}, model.safetensors nor {ADAPTER}")


def _pickles(where: Path, name: str) -> str:
    return (
        f"{where}: {name} is a pickle, which is not read; convert it: AutoModel….from_pretrained(FOLDER)"
        ".save_pretrained(NEW, safe_serialization=True), or safetensors.torch.save_file(torch.load(FILE), …)"
    )


def _check_plain(folder: Path, name: str, links: bool) -> None:
    """A weights file lies in its folder itself: what an index or a link leads to elsewhere may not be ours to write."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder / INDEX}: names {name!r:.80}, expected the name of a file of that folder")
    path = folder / name
    try:
        linked = stat.S_ISLNK(path.lstat().st_mode)
    except OSError as error:  # not there, or too long a name
        raise CheckpointError(f"{path!s:.300}: missing, and named by {INDEX}: {error.strerror}") from error
    if linked and not links:
        raise CheckpointError(
            f"{path}: a symbolic link, to a file that others may use too (a Hugging Face cache has these); make a copy "
            "first, such as `cp -rL FOLDER NEW` or `hf download MODEL --local-dir NEW`"
        )
    if not path.exists():
        raise CheckpointError(f"{path}: missing: a symbolic link to nothing")


def _index(folder: Path, links: bool) -> dict[str, str]:
    """Tensor -> name of the file that holds it."""
    path = folder / INDEX

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name is there twice")
        return found

    try:
        if (path.is_symlink() and not links) or not path.is_file():
            raise ValueError("it is no regular file")
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"it has more than {LARGEST_INDEX >> 20} MiB")
        found = json.loads(path.read_bytes(), object_pairs_hook=unique)
        where = found["weight_map"] if isinstance(found, dict) else None
        if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
            raise ValueError("weight_map is not a table of tensors and files")
    except OSError as error:
        raise CheckpointError(f"{path}: not read: {error.strerror}") from error
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or not an index: {error}") from error
    for name in set(where.values()):
        _check_plain(folder, name, links)
    return where


def _beside(folder: Path, weights: set[str]) -> tuple[list[Path], list[Path]]:
    """All other files, relative to the folder: to be taken along, and to be left."""
    others: list[Path] = []
    left: list[Path] = []
    for where, folders, names in os.walk(folder):
        here = Path(where)
        for name in [name for name in folders if name.startswith(".") or (here / name).is_symlink()]:
            folders.remove(name)
            left.append((here / name).relative_to(folder))
        for name in names:
            path = here / name
            if here == folder and name in weights:
                continue
            plain = path.is_file() and not path.is_symlink()
            kept = plain and not name.endswith(_WEIGHTS) and not (name.endswith(".index.json") and name != INDEX)
            (others if kept else left).append(path.relative_to(folder))
    return sorted(others), sorted(left)
