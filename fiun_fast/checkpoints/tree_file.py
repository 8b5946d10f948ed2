"""The TOML file of a family of models: read, and everything in it checked that can be without opening a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import networkx as nx

from ..arguments import MERGE_RULES, check_number, check_one_of
from ..errors import ArgumentError, TreeFileError
from ..files import location
from ..naming import near
from .entries import ForgetEntry, ModelEntry, Tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST = 1 << 26  # bytes
NUMBERS = ("alpha", "lam", "exponent", "cap", "scale")
TOP = (*NUMBERS, "merge", "rename", "model", "forget")
MODEL = ("name", "path", "fisher", "parents", "alpha", "lam", "rename")
FORGET = ("origin", "fisher", "weight")
_KINDS = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array", dict: "a table"}


def read_tree(path: str | os.PathLike[str]) -> Tree:
    """Read a family of models, and what is to be forgotten, from a TOML file.

    Paths in it are relative to the file. Parents come before children in the result, in the file's order otherwise.

    Raises:
        TreeFileError: there is no such file, it is no TOML, or something in it is unknown, missing, there twice, of
            another type or out of range; the message names file, table, key, what was expected and what was found.
        ArgumentError: `path` is no path.

    """
    where = location(path)
    file = _File(where)
    text = file.text()
    try:
        contents = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TreeFileError(f"{where}: no valid TOML: {error}") from None
    top = _Table(file, "", contents, TOP)
    numbers = {key: top.number(key) for key in NUMBERS if key in contents}
    merge = top.one_of("merge", MERGE_RULES) if "merge" in contents else Tree.merge
    names = top.renames()
    models = [_model(table, names) for table in top.tables("model", MODEL)]
    forget = [_request(table) for table in top.tables("forget", FORGET)]
    graph = file.graph(models)
    file.check_requests(graph, models, forget)
    order = {model.name: k for k, model in enumerate(models)}
    sorted_names = nx.lexicographical_topological_sort(graph, key=order.__getitem__)
    ordered = tuple(models[order[name]] for name in sorted_names)
    return Tree(ordered, tuple(forget), merge=merge, source=where, **numbers)


def _model(table: _Table, names: Mapping[str, str]) -> ModelEntry:
    name = table.string("name")
    table.called(f"[[model]] {name!r}")
    if name in (".", "..") or set(name) & {"/", "\\", "\0"} or len(os.fsencode(name)) > 200:
        table.wrong(
            "name", f"is {name!r:.80}, expected what a folder can be called: results are in --out, by this name"
        )
    path = table.path("path")
    fisher = table.path("fisher") if "fisher" in table else None
    parents = table.strings("parents")
    own = {key: table.number(key) if key in table else None for key in ("alpha", "lam")}
    return ModelEntry(name, path, fisher, parents, own["alpha"], own["lam"], {**names, **table.renames()})


def _request(table: _Table) -> ForgetEntry:
    weight = table.number("weight") if "weight" in table else ForgetEntry.weight
    return ForgetEntry(table.string("origin"), table.path("fisher"), weight)


class _File:
    """The file, for reading and for messages."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def text(self) -> str:
        try:
            if not self.where.is_file():
                raise TreeFileError(f"{self.where}: no such file; expected a TOML file with [[model]] and [[forget]]")
            if (size := self.where.stat().st_size) > LARGEST:
                raise TreeFileError(f"{self.where}: {size:,} bytes, expected a TOML file of at most {LARGEST:,}")
            return self.where.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise TreeFileError(f"{self.where}: no valid TOML: not UTF-8 at byte {error.start}") from None
        except OSError as error:
            raise TreeFileError(f"{self.where}: cannot be read: {error.strerror or error}") from error

    def wrong(self, table: str, what: str) -> NoReturn:
        """Raise the error: table "" is the top of the file."""
        raise TreeFileError(f"{self.where}: {table}{': ' if table else ''}{what}")

    def graph(self, models: list[ModelEntry]) -> nx.DiGraph:
        """Who inherited from whom; an error for names or paths that are there twice, unknown parents, a cycle."""
        graph = nx.DiGraph()
        places: dict[str, str] = {}
        for model in models:
            table = f"[[model]] {model.name!r}"
            if model.name in graph:
                self.wrong(table, "name is there twice, expected another for each model")
            graph.add_node(model.name)
            if (other := places.setdefault(os.path.realpath(model.path), model.name)) != model.name:
                self.wrong(table, f"path is that of {other!r} too, expected another for each model: {model.path}")
        for model in models:
            table = f"[[model]] {model.name!r}"
            for parent in model.parents:
                if parent not in graph:
                    self.wrong(table, f"parents name {parent!r:.80}, which is no model{near(parent, graph)}")
                if graph.has_edge(parent, model.name):
                    self.wrong(table, f"parents name {parent!r} twice, expected each once")
                graph.add_edge(parent, model.name)
        if not nx.is_directed_acyclic_graph(graph):
            circle = [parent for parent, _ in nx.find_cycle(graph)]
            self.wrong(f"[[model]] {circle[0]!r}", f"parents go in a circle: {' -> '.join([*circle, circle[0]])}")
        return graph

    def check_requests(self, graph: nx.DiGraph, models: list[ModelEntry], forget: list[ForgetEntry]) -> None:
        """Raise an error for an unknown origin, a request that is there twice, a model that lacks its Fisher."""
        without = {model.name for model in models if model.fisher is None}
        seen: dict[tuple[str, str], int] = {}
        for k, request in enumerate(forget, 1):
            table = f"[[forget]] {k}"
            if request.origin not in graph:
                self.wrong(table, f"origin is {request.origin!r:.80}, which is no model{near(request.origin, graph)}")
            key = (request.origin, os.path.realpath(request.fisher))
            if key in seen:
                self.wrong(table, f"fisher is that of [[forget]] {seen[key]} too, at one origin; give one a weight")
            seen[key] = k
            for name in sorted(without & {request.origin, *nx.descendants(graph, request.origin)}):
                what = f"fisher is missing, expected its original Fisher: {table} at {request.origin!r} reaches it"
                self.wrong(f"[[model]] {name!r}", what)


class _Table:
    """A table of the file: its keys are checked when it is made, its values when they are asked for."""

    def __init__(self, file: _File, name: str, contents: Mapping[str, Any], known: Iterable[str]) -> None:
        self._file, self._name, self._contents = file, name, contents
        for key in contents:
            if key not in known:
                self._file.wrong(name, f"unknown key {key!r:.80}{near(key, known)}; known are {', '.join(known)}")

    def __contains__(self, key: str) -> bool:
        return key in self._contents

    def called(self, name: str) -> None:
        """From now on messages call the table so."""
        self._name = name

    def wrong(self, key: str, what: str) -> NoReturn:
        """Raise the error: `what` says something of the key."""
        self._file.wrong(self._name, f"{key} {what}")

    def _value(self, key: str, kind: type, expected: str) -> Any:
        if key not in self._contents:
            self.wrong(key, f"is missing, expected {expected}")
        value = self._contents[key]
        if not isinstance(value, kind):
            self.wrong(key, f"is {_KINDS.get(type(value), 'a date or time')}, expected {expected}")
        return value

    def string(self, key: str) -> str:
        if not (value := self._value(key, str, "a string")).strip():
            self.wrong(key, "is empty, expected a string")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        values = self._value(key, list, 'an array of strings, such as ["base"]') if key in self else []
        for value in values:
            if not isinstance(value, str):
                found = _KINDS.get(type(value), "a date or time")
                self.wrong(key, f'hold {found}, expected an array of strings, such as ["base"]')
        return tuple(values)

    def number(self, key: str) -> float:
        value = self._contents[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.wrong(key, f"is {_KINDS.get(type(value), 'a date or time')}, expected a number that is not negative")
        try:
            return check_number("", value)
        except ArgumentError as error:
            self.wrong(key, str(error).strip())

    def one_of(self, key: str, known: Iterable[str]) -> str:
        try:
            check_one_of("", self._contents[key], known)
        except ArgumentError as error:
            self.wrong(key, str(error).strip())
        return self._contents[key]

    def path(self, key: str) -> Path:
        """Where it is, from the folder of the file; an error where nothing is there."""
        said = self.string(key)
        path = self._file.where.parent / said
        try:
            there = path.exists()
        except (OSError, ValueError):  # too long a name, or a NUL
            there = False
        if not there:
            self.wrong(key, f"is {said!r:.200}, where nothing is: {str(path)!r:.300}; paths are relative to this file")
        return path

    def renames(self) -> dict[str, str]:
        """The table `rename`: name in the Fishers -> name on disk."""
        names = self._value("rename", dict, "a table of names") if "rename" in self else {}
        for name, other in names.items():
            if not isinstance(other, str) or not other:
                found = _KINDS.get(type(other), "a date or time") if other != "" else "empty"
                self.wrong(f"rename: {name!r:.200}", f"is {found}, expected the parameter's name on disk, a string")
        first: dict[str, str] = {}
        for name, other in names.items():
            if first.setdefault(other, name) != name:
                self.wrong(
                    f"rename: {name!r:.200}", f"is {other!r:.200}, as {first[other]!r:.200} is; expected another"
                )
        return names

    def tables(self, key: str, known: Iterable[str]) -> list[_Table]:
        """The tables [[key]], at least one."""
        tables = self._value(key, list, f"at least one [[{key}]]")
        if not tables:
            self.wrong(key, f"is empty, expected at least one [[{key}]]")
        for k, contents in enumerate(tables, 1):
            if not isinstance(contents, dict):
                self.wrong(
                    key, f"holds {_KINDS.get(type(contents), 'a date or time')} at {k}, expected [[{key}]] tables"
                )
        return [_Table(self._file, f"[[{key}]] {k}", contents, known) for k, contents in enumerate(tables, 1)]
