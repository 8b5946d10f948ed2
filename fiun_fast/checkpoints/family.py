"""A tree, opened: its models' and Fishers' files, and the program of what meets what."""

from __future__ import annotations

import graphlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..arguments import MERGE_RULES, check_number, check_one_of
from ..compiling import Program, ReachedNode, compile_program, reached_nodes, warn_of_unlike
from ..dag import ForgetRequest, InheritanceDAG
from ..errors import ArgumentError, CheckpointError, DagError
from ..kernels.table import Dampening, Merging
from ..values import Slots, Values, narrowest
from .disk import Source
from .entries import ModelEntry, Tree
from .folder import Weights, open_weights
from .header import FLOATS, Entry
from .matching import match
from .stored import StoredFisher

_OTHERS = {"U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool, "I16": torch.int16, "I32": torch.int32}
_OTHERS |= {"I64": torch.int64, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "C64": torch.complex64}


@dataclass(frozen=True)
class Line:
    """A parameter as a header has it: all that a program needs to know."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Family:
    """Everything that a run reads, open and checked; use it in `with`.

    Attributes:
        tree: as given.
        weights: model -> its files, for all models.
        program: over the models that a request reaches.
        merging, dampening: the numbers.
        names: of those, in the order of the program.
        files: all of them, of models, then of Fishers.
        first_fisher: index of the first file of a Fisher.

    Raises:
        CheckpointError, FisherFileError, FileNotFoundError: a file is missing, damaged, in another form, or in use.
        LayoutError, DTypeError, DagError, ArgumentError: what does not fit together, as `plan`.

    """

    def __init__(self, tree: Tree, *, writable: bool) -> None:
        self.tree = tree
        self.weights: dict[str, Weights] = {}
        self.files: list[Source] = []
        self._first: dict[int, int] = {}  # id of weights or of a Fisher -> index of its first file
        self._fishers: dict[Path, StoredFisher] = {}
        self._disk: dict[int, dict[str, str]] = {}  # node -> name in its Fisher -> name on disk, where they differ
        try:
            self._open(writable)
        except BaseException:
            self.close()
            raise

    def _open(self, writable: bool) -> None:
        models = {model.name: model for model in self.tree.models}
        dag = self._dag(models)
        requests = []
        for k, forget in enumerate(self.tree.forget):
            fisher = self._fisher(forget.fisher)
            weight = check_number(f"request {k} ({forget.origin!r}): weight", forget.weight, fisher.dtype)
            requests.append(ForgetRequest(forget.origin, fisher, weight))
        if not requests:
            raise ArgumentError("no forget requests: nothing to do")
        nodes = reached_nodes(dag, requests)
        reached = {node.name for node in nodes}
        for model in self.tree.models:
            if writable and model.name not in reached:
                continue
            self.weights[model.name] = opened = open_weights(model.path, writable=writable)
            self._first[id(opened)] = len(self.files)
            self.files += opened.files
        self.first_fisher = len(self.files)
        for fisher in self._fishers.values():
            self._first[id(fisher)] = len(self.files)
            self.files += fisher.files
        self._check_distinct(writable)
        for i, file in enumerate(self.files):
            file.lock(alone=writable and i < self.first_fisher)
        self._compile(nodes, requests, models)

    def _dag(self, models: dict[str, ModelEntry]) -> InheritanceDAG:
        if len(models) < len(self.tree.models):
            names = [model.name for model in self.tree.models]
            raise DagError(f"model {next(n for n in names if names.count(n) > 1)!r} is there twice")
        for name, model in models.items():
            for parent in model.parents:
                if parent not in models:
                    raise DagError(f"model {name!r}: unknown parent {parent!r}; known models: {', '.join(models)}")
        try:
            order = list(graphlib.TopologicalSorter({n: m.parents for n, m in models.items()}).static_order())
        except graphlib.CycleError as error:
            raise DagError(f"the models' parents go in a circle: {' -> '.join(error.args[1])}") from error
        dag = InheritanceDAG()
        for name in order:
            at = models[name].fisher
            dag.add_model(name, {}, None if at is None else self._fisher(at), parents=models[name].parents)
        return dag

    def _fisher(self, path: Path) -> StoredFisher:
        where = path.resolve()
        if where not in self._fishers:
            self._fishers[where] = StoredFisher(path)
        return self._fishers[where]

    def _check_distinct(self, writable: bool) -> None:
        """Files that are written must be one model's alone."""
        if not writable:
            return
        owner: dict[tuple[int, int], Path] = {}
        for i, file in enumerate(self.files):
            if file.identity in owner:
                raise CheckpointError(
                    f"{file.path} and {owner[file.identity]} are one file: in place, one model a file"
                )
            if i < self.first_fisher:  # Fishers are read only, and may be one file
                owner[file.identity] = file.path
        for file in self.files[: self.first_fisher]:
            if file.links > 1:
                raise CheckpointError(
                    f"{file.path}: has {file.links} names (hard links), and all would change; make a copy first"
                )

    def _compile(self, nodes: list[ReachedNode], requests: list[ForgetRequest], models: dict[str, ModelEntry]) -> None:
        tree = self.tree
        self.names = [node.name for node in nodes]
        for i, node in enumerate(nodes):
            self._disk[i] = match(models[node.name], node.fisher.layout.names, self.weights[node.name])
        self.program: Program = compile_program(nodes, requests, "error", lambda ns, names: self._describe(ns, names))
        dtype = narrowest(request.fisher for request in requests)
        check_one_of("merge", tree.merge, MERGE_RULES)
        self.merging = Merging(tree.merge, check_number("scale", tree.scale, dtype))  # type: ignore[arg-type]
        alpha = {name: tree.alpha if model.alpha is None else model.alpha for name, model in models.items()}
        lam = {name: tree.lam if model.lam is None else model.lam for name, model in models.items()}
        exponent, cap = (check_number(what, getattr(tree, what), dtype) for what in ("exponent", "cap"))
        values = Values.of(nodes, models, dtype, alpha, lam)
        self.dampening: Dampening = values.dampening(Slots.plain(len(nodes)), exponent, cap)
        warn_of_unlike(nodes, requests)

    def _describe(self, nodes: Sequence[int], names: Sequence[str]) -> list[list[Line]]:
        return [[self._line(i, name) for i in nodes] for name in names]

    def _line(self, node: int, name: str) -> Line:
        _, entry = self.theta(node, name)
        dtype = FLOATS.get(entry.dtype) or _OTHERS.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"model {self.names[node]!r}: its Fisher names {name!r}, which is {entry.dtype} and is copied only"
            )
        return Line(entry.shape, dtype, torch.device("cpu"))

    def first_of(self, weights: Weights) -> int:
        """Index of a model's first file."""
        return self._first[id(weights)]

    def theta(self, node: int, name: str) -> tuple[int, Entry]:
        """Index of the file that has a parameter of a node, by its name in the node's Fisher; and its place there."""
        weights = self.weights[self.names[node]]
        file, entry = weights[self._disk[node].get(name, name)]
        return self._first[id(weights)] + file, entry

    def stored(self, fisher: StoredFisher, name: str) -> tuple[int, Entry]:
        """The same for a parameter of a Fisher."""
        file, entry = fisher.places[name]
        return self._first[id(fisher)] + file, entry

    def check_unchanged(self) -> None:
        """Raise a CheckpointError where somebody wrote to one of the files since they were opened."""
        for file in self.files:
            file.check_unchanged()

    @property
    def fishers(self) -> list[StoredFisher]:
        """Each once."""
        return list(self._fishers.values())

    def close(self) -> None:
        """Close all files, which ends their locks."""
        for weights in self.weights.values():
            weights.close()
        for fisher in self._fishers.values():
            fisher.close()

    def __enter__(self) -> Family:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
