"""A family of models on disk, and what is to be forgotten: what a TOML file says (`tree_file.py`), as plain objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class ModelEntry:
    """One model: a folder, or one .safetensors file."""

    name: str
    path: Path
    fisher: Path | None = None  # original Fisher: a file of `Fisher.save`, or a folder of shards
    parents: tuple[str, ...] = ()
    alpha: float | None = None  # None: the tree's
    lam: float | None = None
    rename: Mapping[str, str] = field(default_factory=dict)  # name in the Fishers -> name on disk


@dataclass(frozen=True)
class ForgetEntry:
    """One request: the forget Fisher that was taken at a model, and its weight."""

    origin: str
    fisher: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Tree:
    """Models, requests and the numbers of a dampening."""

    models: tuple[ModelEntry, ...]
    forget: tuple[ForgetEntry, ...]
    alpha: float = 10.0
    lam: float = 1.0
    exponent: float = 1.0
    cap: float = 1.0
    merge: str = "max"
    scale: float = 1.0
    source: Path | None = None  # the file it was read from


def absolute(tree: Tree) -> Tree:
    """The same tree, whatever the working folder is later."""

    def whole(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    models = tuple(replace(m, path=m.path.absolute(), fisher=whole(m.fisher)) for m in tree.models)
    forget = tuple(replace(one, fisher=one.fisher.absolute()) for one in tree.forget)
    return replace(tree, models=models, forget=forget, source=whole(tree.source))
