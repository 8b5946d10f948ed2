"""The lineage of the models in a folder, as it is written down beside them; nothing is written."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx

from .. import fisher_file
from ..errors import CheckpointError, FiunError
from ..files import location
from .alike import Place, Shared, alike
from .claims import ADAPTER, CONFIG, MERGES, Claim, read_claims
from .folder import INDEX, PICKLES, open_weights

MOST_FOLDERS, MOST_MODELS = 100_000, 10_000
_CACHED = re.compile(r"models--(.+)--(.+)")  # a folder of the Hugging Face cache; the models are in snapshots/ below
_SINGLE = ("model.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class Origin:
    """A parent, or a claim of one that led to no folder.

    Attributes:
        claim: what a file says.
        parent: name of the model that is meant; "" where none was found.
        why: what is wrong, where none was found.

    """

    claim: Claim
    parent: str = ""
    why: str = ""


@dataclass
class Found:
    """A model that was found.

    Attributes:
        name: path from the folder that was looked through.
        path: of its folder, or of its one file.
        adapter: whether it is the adapter of a base, by PEFT.
        size: bytes of its weights.
        tensors: how many.
        dtypes: dtype as files have it, "BF16" -> elements.
        origins: parents, and claims that led nowhere.
        odd: what could not be read.
        fisher: a Fisher beside it, by its name, or None.

    """

    name: str
    path: Path
    adapter: bool = False
    size: int = 0
    tensors: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    origins: list[Origin] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    fisher: Path | None = None

    @property
    def parents(self) -> list[str]:
        """Names of the models that it came from, each once."""
        return list(dict.fromkeys(origin.parent for origin in self.origins if origin.parent))

    @property
    def unresolved(self) -> list[Origin]:
        """Claims that led to no folder."""
        return [origin for origin in self.origins if not origin.parent]


@dataclass
class Lineage:
    """What `tree` found: models by name, and what they have in common.

    Attributes:
        folder: that was looked through.
        models: by name; parents before children.
        shared: pairs of models that hold the same bytes, in part or in whole.
        sampled: whether only samples of the tensors were compared.
        odd: what could not be looked at, or was left out.

    """

    folder: Path
    models: dict[str, Found]
    shared: list[Shared]
    sampled: bool
    odd: list[str]

    def __getitem__(self, name: str) -> Found:
        """Return a model.

        Raises:
            CheckpointError: there is none of that name.

        """
        if name not in self.models:
            raise CheckpointError(f"no model {name!r} in {self.folder}; models: {', '.join(list(self.models)[:8])}")
        return self.models[name]

    def __iter__(self) -> Iterator[Found]:
        return iter(self.models.values())

    def __len__(self) -> int:
        return len(self.models)

    @property
    def edges(self) -> list[tuple[str, str]]:
        """(parent, child) for each."""
        return [(parent, found.name) for found in self for parent in found.parents]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dump."""
        models = [
            {
                **{key: value for key, value in asdict(found).items() if key != "origins"},
                "path": str(found.path),
                "fisher": None if found.fisher is None else str(found.fisher),
                "parents": found.parents,
                "origins": [{**asdict(o.claim), "parent": o.parent or None, "why": o.why} for o in found.origins],
            }
            for found in self
        ]
        shared = [{**asdict(pair), "whole": pair.whole} for pair in self.shared]
        return {
            "folder": str(self.folder),
            "models": models,
            "shared": shared,
            "sampled": self.sampled,
            "odd": self.odd,
        }

    def __str__(self) -> str:
        from .lineage_text import as_text

        return as_text(self)


def tree(
    folder: str | os.PathLike[str], *, full: bool = True, progress: Callable[[int, int], None] | None = None
) -> Lineage:
    """Find the models in a folder and below it, and who came from whom; read-only.

    Read are `base_model` and `base_model_relation` of model cards, PEFT's `base_model_name_or_path`, mergekit's
    recipes, and where these lead to no folder `_name_or_path` of config.json. A name on the hub means a folder of
    that name.

    Args:
        folder: the folder; hidden folders are not entered, links to folders only where a model is there.
        full: read tensors that are alike by their samples in whole before it is said that they are.
        progress: called with bytes read for that, and bytes in all.

    Raises:
        CheckpointError: there is no such folder, there are too many, or a file was changed while it was read.
        ArgumentError: `folder` is no path.

    """
    root = location(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder")
    odd: list[str] = []
    models: dict[str, Found] = {}
    places: dict[str, list[Place]] = {}
    for path in _candidates(root, odd):
        found = Found(_name(root, path), path)
        if len(models) >= MOST_MODELS:
            raise CheckpointError(f"{root}: more than {MOST_MODELS:,} models; name a folder further down")
        models[found.name], places[found.name] = found, _read(found)
    _link(root, models)
    order = _in_order(models, odd)
    shared = alike({name: places[name] for name in order}, full=full, watch=progress)
    return Lineage(root, {name: models[name] for name in order}, shared, not full, odd)


def _name(root: Path, path: Path) -> str:
    inside = path.relative_to(root).as_posix()
    return root.name or "model" if inside == "." else inside


def _candidates(root: Path, odd: list[str]) -> Iterator[Path]:
    """Folders that hold a model, and files that are one."""
    seen: set[str] = set()
    count = 0

    def unreadable(error: OSError) -> None:
        odd.append(f"{error.filename}: cannot be read: {error.strerror}")

    for where, folders, files in os.walk(root, onerror=unreadable):
        here = Path(where)
        count += 1
        if count > MOST_FOLDERS:
            raise CheckpointError(f"{root}: more than {MOST_FOLDERS:,} folders; name one further down")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        seen.add(os.path.realpath(here))
        yield from _models_of(here, files)
        for name in folders:
            path = here / name
            if not path.is_symlink():
                continue
            try:
                files = [one.name for one in path.iterdir()]
            except OSError as error:
                unreadable(error)
                continue
            real = os.path.realpath(path)
            if real in seen or real.startswith(os.path.realpath(root) + os.sep):
                continue  # it is reached without the link
            seen.add(real)
            yield from _models_of(path, files)


def _models_of(folder: Path, files: list[str]) -> list[Path]:
    """The folder itself, or each of its files that is a model of its own, or nothing."""
    tensors = sorted(name for name in files if name.endswith(".safetensors") and not name.startswith("."))
    tensors = [name for name in tensors if not fisher_file.SHARD.fullmatch(name)]
    settings = {CONFIG, ADAPTER, INDEX, *MERGES, *_SINGLE} & set(files)
    pickled = any(name.endswith(PICKLES) for name in files) and settings
    if (settings and tensors) or INDEX in settings or ADAPTER in settings or pickled:
        return [folder]
    return [folder / name for name in tensors if not _is_fisher(folder / name)]


def _is_fisher(path: Path) -> bool:
    try:
        with fisher_file.opened(path):
            return True
    except (FiunError, OSError):
        return False


def _read(found: Found) -> list[Place]:
    """Fill in what the files say; return where the tensors are. Whatever is wrong with them is noted."""
    if found.path.is_dir():
        found.adapter = (found.path / ADAPTER).is_file()
        claims, found.odd = read_claims(found.path)
        found.origins = [Origin(claim) for claim in claims]
    stem = found.path.stem if found.path.suffix == ".safetensors" else found.path.name
    for beside in (f"{stem}.fisher", f"{stem}.fisher.safetensors"):
        path = found.path.parent / beside
        if found.fisher is None and path != found.path and path.exists() and _is_fisher(path):
            found.fisher = path
    try:
        weights = open_weights(found.path, links=True)
    except FiunError as error:
        found.odd.append(str(error))
        return []
    try:
        found.size, found.tensors = weights.size, len(weights)
        dtypes: Counter[str] = Counter()
        places = []
        for file, header in zip(weights.files, weights.headers, strict=True):
            for entry in header.tensors.values():
                dtypes[entry.dtype] += entry.numel
                places.append(Place(file.path, entry.start, entry.stop, entry.dtype, entry.shape))
        found.dtypes = dict(dtypes.most_common())
        return places
    finally:
        weights.close()


# ---- who is meant ---------------------------------------------------------------------------------------------------


def _link(root: Path, models: dict[str, Found]) -> None:
    """Find the folder that each claim means. What config.json says counts where nothing else led to a folder."""
    by_place = {os.path.realpath(found.path): found.name for found in models.values()}
    parts = {found.name: _parts(found.path) for found in models.values()}
    for found in models.values():
        strong = [_resolved(root, found, o.claim, by_place, parts) for o in found.origins if o.claim.source != CONFIG]
        weak = [_resolved(root, found, o.claim, by_place, parts) for o in found.origins if o.claim.source == CONFIG]
        weak = [origin for origin in weak if not _means(origin.claim.base, parts[found.name])]
        if any(origin.parent for origin in strong):
            weak = []
        elif strong:
            weak = [origin for origin in weak if origin.parent]
        found.origins = strong + weak


def _parts(path: Path) -> tuple[str, ...]:
    """The steps of a folder's path, as a name on the hub has them: the cache's folders are read as such names."""
    parts = path.absolute().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and (cached := _CACHED.fullmatch(parts[-3])):
        return (*parts[:-3], cached[1], cached[2])
    name = path.stem if path.suffix == ".safetensors" else path.name
    return (*parts[:-1], *name.split("--"))  # organisation--model, as downloads are often called


def _steps(base: str) -> list[str]:
    steps = [step for step in re.split(r"[/\\]+", base.partition("@")[0]) if step not in ("", ".", "..", "~")]
    if steps:
        steps[-1] = steps[-1].removesuffix(".safetensors")
    return steps


def _means(base: str, parts: tuple[str, ...], fold: bool = True) -> int:
    """How many steps of a name and a path agree, from the end."""
    count = 0
    for one, other in zip(reversed(_steps(base)), reversed(parts), strict=False):
        if one != other and not (fold and one.casefold() == other.casefold()):
            break
        count += 1
    return count


def _resolved(
    root: Path, found: Found, claim: Claim, by_place: dict[str, str], parts: dict[str, tuple[str, ...]]
) -> Origin:
    """The model that a claim means: at that path, or of that name; never the model itself."""
    outside = ""
    for start in (found.path, found.path.parent, root):
        try:
            place = (start / claim.base).resolve()  # an absolute path stays what it is
            there = place.is_dir()
        except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
            continue
        name = by_place.get(str(place))
        if name is not None and name != found.name:
            return Origin(claim, name)
        if there and name is None and not place.is_relative_to(root):
            outside = outside or str(place)
    for fold in (False, True):
        agree = {name: _means(claim.base, own, fold) for name, own in parts.items() if name != found.name}
        most = max(agree.values(), default=0)
        best = [name for name, count in agree.items() if count == most]
        here = found.path.absolute().parent.parts  # of several collections, each has its own base
        beside = [name for name in best if parts[name][: len(here)] == here]
        nearest = [name for name in beside if len(parts[name]) == min(len(parts[other]) for other in beside)]
        best = nearest if len(nearest) == 1 else best
        if most and len(best) == 1:
            return Origin(claim, best[0])
        if most:
            return Origin(claim, why=f"may be {', '.join(sorted(best)[:4])}")
    return Origin(
        claim, why=f"it is at {outside}, outside of this folder" if outside else "no folder of that name here"
    )


def _in_order(models: dict[str, Found], odd: list[str]) -> list[str]:
    """Names, parents first; what makes a circle is taken out, the weakest claim first, and said."""
    graph = nx.DiGraph()
    graph.add_nodes_from(models)
    graph.add_edges_from((parent, found.name) for found in models.values() for parent in found.parents)
    while not nx.is_directed_acyclic_graph(graph):
        circle = [(parent, child) for parent, child in nx.find_cycle(graph)]
        weak = [e for e in circle if all(o.claim.source == CONFIG for o in models[e[1]].origins if o.parent == e[0])]
        parent, child = (weak or circle)[-1]
        graph.remove_edge(parent, child)
        names = " -> ".join([circle[0][0], *(name for _, name in circle)])
        odd.append(f"{names}: a circle; that {child} came from {parent} is left out")
        models[child].origins = [
            Origin(o.claim, why=f"{parent}, which would make a circle") if o.parent == parent else o
            for o in models[child].origins
        ]
    order = {name: k for k, name in enumerate(models)}
    return list(nx.lexicographical_topological_sort(graph, key=order.__getitem__))
