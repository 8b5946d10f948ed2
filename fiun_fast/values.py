"""Alpha and lambda of every node: one number for all its parameters, or one for each pattern of names.

A *slot* is where some parameters of a node find their numbers, and where what was done to them is counted: kernels know
slots, and nothing of patterns. A node has one slot, or as many as its patterns tell its parameters apart.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from .arguments import check_number
from .errors import ArgumentError, LayoutError
from .kernels.table import Dampening
from .naming import Names, near
from .wrappers import plain_name

if TYPE_CHECKING:
    from .compiling import ReachedNode
    from .dag import Node
    from .fisher import Fisher

Number = float | Mapping[str, float]  # of one node: for all its parameters, or {pattern: number}
PerNode = float | Mapping[str, float]
PerGroup = float | Mapping[str, Number]  # of all nodes: a number, or {node: a number or {pattern: number}}
Check = Callable[[str, object], float]
N = TypeVar("N")


@dataclass(frozen=True)
class Choice:
    """What a node is to be dampened with, and what `evaluate` said of it.

    Attributes:
        alpha: selection threshold, or {pattern: threshold} of parameters; infinite where a node or a part of it is to
            be left alone and no finite one does that, because I is 0 where m is not.
        lam: dampening constant, or {pattern: constant}.
        score: of the node dampened with these.

    """

    alpha: Number
    lam: Number
    score: float


@dataclass(frozen=True)
class Split:
    """Numbers of one node by pattern."""

    numbers: Mapping[str, float]  # pattern -> number, in the order given
    pattern: Mapping[str, str]  # parameter -> the pattern whose number it takes

    def __getitem__(self, name: str) -> float:
        return self.numbers[self.pattern[name]]


@dataclass(frozen=True)
class Slots:
    """Which slot each parameter of each node has: [slots], those of a node one after another."""

    node: np.ndarray  # [slots] int64, ascending
    names: Mapping[int, tuple[str, ...]] = field(
        default_factory=dict
    )  # slot -> its parameters, where they are told apart

    @classmethod
    def plain(cls, nodes: int) -> Slots:
        """A slot for each node."""
        return cls(np.arange(nodes))

    def __len__(self) -> int:
        return len(self.node)

    def alike(self, nodes: Sequence[int], names: Sequence[str]) -> dict[tuple[int, ...], list[int]]:
        """Nodes by how their slots tell these parameters apart: for each name a place among the node's slots."""
        if not self.names:
            return {(0,) * len(names): list(nodes)}
        found: dict[tuple[int, ...], list[int]] = {}
        for node in nodes:
            place = {name: k for k, own in enumerate(self.groups(node)) for name in own}
            found.setdefault(tuple(place.get(name, 0) for name in names), []).append(node)
        return found

    def at(self, nodes: Sequence[int], place: int) -> list[int]:
        """The slot of each node at that place among its own."""
        return (np.searchsorted(self.node, nodes) + place).tolist()

    def groups(self, node: int) -> list[tuple[str, ...]]:
        """The parameters of each slot of a node, where they are told apart; else nothing."""
        first, after = (int(np.searchsorted(self.node, node, side)) for side in ("left", "right"))
        return [self.names[slot] for slot in range(first, after) if slot in self.names]

    def rows(self, nodes: Sequence[str], layers: Sequence[tuple[str, Sequence[str]]]) -> np.ndarray:
        """Which of these layers each slot belongs to, [slots] int64; they have all of its parameters."""
        of = {(node, name): row for row, (node, names) in enumerate(layers) for name in names}
        owners = []
        for slot, node in enumerate(self.node.tolist()):
            found = {of.get((nodes[node], name)) for name in self.names.get(slot, ())} - {None}
            assert len(found) <= 1, "the values of the plan do not tell these layers apart"
            owners.append(next(iter(found), 0))  # a slot without any compares nothing
        return np.array(owners, dtype=np.int64)

    def sums(self, counts: np.ndarray, nodes: int) -> np.ndarray:
        """Counts [slots, n] added up by node: [nodes, n]."""
        if len(self) == nodes:
            return counts
        found = np.zeros((nodes, *counts.shape[1:]), dtype=counts.dtype)
        np.add.at(found, self.node, counts)
        return found


class Numbers:
    """Alpha, or lambda, of every node; not changed once it is made."""

    def __init__(self, each: np.ndarray, splits: Mapping[int, Split]) -> None:
        """`each`: [nodes] float64, of no meaning where the node has a split."""
        self.each, self.splits = each, splits

    @classmethod
    def given(cls, each: Sequence[Number]) -> Numbers:
        """Of nodes that are not here: what was given, patterns without what they mean."""
        splits = {i: Split(value, {}) for i, value in enumerate(each) if isinstance(value, Mapping)}
        return cls(np.array([0.0 if i in splits else value for i, value in enumerate(each)], dtype=np.float64), splits)

    def at(self, node: int) -> Number:
        """Of one node, as it was given."""
        return dict(self.splits[node].numbers) if node in self.splits else float(self.each[node])

    def all(self) -> list[Number]:
        """Of every node."""
        values: list[Number] = self.each.tolist()
        for node in self.splits:
            values[node] = self.at(node)
        return values

    def by_slot(self, slots: Slots) -> np.ndarray:
        """Of every slot, [slots] float64."""
        values: np.ndarray = self.each[slots.node]
        if self.splits:
            for slot, names in slots.names.items():
                if (split := self.splits.get(int(slots.node[slot]))) is not None:
                    values[slot] = split[names[0]]
        return values

    def changed(self, what: str, given: PerGroup | None, nodes: Sequence[ReachedNode], check: Check) -> Numbers:
        """With what `given` has; a number is for all parameters of its node, and None changes nothing."""
        if given is None:
            return self
        if not isinstance(given, Mapping):
            return Numbers(np.full(len(nodes), given), {})
        each, splits = self.each.copy(), dict(self.splits)
        known: dict[tuple, Mapping[str, str]] = {}
        for i, node in enumerate(nodes):
            if (value := given.get(node.name)) is None:
                continue
            splits.pop(i, None)
            if isinstance(value, Mapping):
                key = node.fisher.layout, tuple(value)
                if key not in known:
                    known[key] = patterns_of(f"{what}[{node.name!r}]", node, list(value))
                splits[i] = Split(value, known[key])
            else:
                each[i] = value
        return Numbers(each, splits)


@dataclass(frozen=True)
class Values:
    """Alpha and lambda of every node that a request reaches."""

    alpha: Numbers
    lam: Numbers

    @classmethod
    def of(
        cls, nodes: Sequence[ReachedNode], known: Iterable[str], dtype: torch.dtype, alpha: PerGroup, lam: PerGroup
    ) -> Values:
        """Checked; `dtype`: of the Fishers, which the numbers must fit into.

        Raises:
            ArgumentError: a number that is negative, not finite or too large, or a node or parameter without one.
            LayoutError: a pattern that matches no parameter of its node.

        """
        for what, given in (("alpha", alpha), ("lam", lam)):
            if given is None:  # which means "as it is" where there are values
                check_number(what, given, dtype)
        start = Numbers(np.zeros(len(nodes)), {})
        made = cls(start, start).changed(nodes, known, dtype, alpha, lam)
        _check_covered("alpha", alpha, nodes)
        _check_covered("lam", lam, nodes)
        return made

    def changed(
        self,
        nodes: Sequence[ReachedNode],
        known: Iterable[str],
        dtype: torch.dtype,
        alpha: PerGroup | None,
        lam: PerGroup | None,
        *,
        infinite: bool = False,
    ) -> Values:
        """With these for the nodes that they name; `infinite`: alpha may be, which selects nothing. Errors as `of`."""
        found = []
        for what, given, now in (("alpha", alpha, self.alpha), ("lam", lam, self.lam)):

            def check(name: str, value: object, endless: bool = infinite and what == "alpha") -> float:
                return math.inf if endless and value == math.inf else check_number(name, value, dtype)

            checked = None if given is None else _checked(what, given, known, check)
            found.append(now.changed(what, checked, nodes, check))
        return Values(*found)

    def slots(self, nodes: Sequence[ReachedNode]) -> Slots:
        """As few as tell apart what has other numbers."""
        apart = sorted(self.alpha.splits.keys() | self.lam.splits.keys())
        if not apart:
            return Slots.plain(len(nodes))
        owners: list[int] = []
        names: dict[int, tuple[str, ...]] = {}
        parted = set(apart)
        for i, node in enumerate(nodes):
            if i in parted:
                for group in self._groups(i, node):
                    names[len(owners)] = group
                    owners.append(i)
            else:
                owners.append(i)
        return Slots(np.array(owners, dtype=np.int64), names)

    def _groups(self, i: int, node: ReachedNode) -> list[tuple[str, ...]]:
        """The parameters of a node by the patterns whose numbers they take, in the order of its layout."""
        splits = [numbers.splits[i] for numbers in (self.alpha, self.lam) if i in numbers.splits]
        found: dict[tuple[str, ...], list[str]] = {}
        for name in node.fisher.layout.names:
            found.setdefault(tuple(split.pattern[name] for split in splits), []).append(name)
        return [tuple(own) for own in found.values()]

    def fit(self, slots: Slots) -> bool:
        """Whether each of these slots has one number of each kind: then no others are needed."""
        for numbers in (self.alpha, self.lam):
            for i, split in numbers.splits.items():
                groups = slots.groups(i)
                if not groups or any(len({split.pattern[name] for name in names}) > 1 for names in groups):
                    return False
        return True

    def dampening(self, slots: Slots, exponent: float, cap: float) -> Dampening:
        """What kernels take: a number a slot."""
        return Dampening(self.alpha.by_slot(slots), self.lam.by_slot(slots), exponent, cap)


def patterns_of(what: str, node: ReachedNode, patterns: Sequence[str]) -> dict[str, str]:
    """Parameter -> the pattern that it takes: its own name if that is one, else the first glob that matches it.

    Raises:
        LayoutError: a pattern that matches nothing.
        ArgumentError: a parameter that nothing matches, or a pattern that is no string.

    """
    names = node.fisher.layout.names
    exact: dict[str, str] = {}
    globs: dict[str, str] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentError(f"{what} has a {type(pattern).__name__} for a pattern, expected a name or glob")
        found, is_name = _matching(node, names, pattern)
        if not found:
            raise LayoutError(f"{what}: no parameter of node {node.name!r} matches {pattern!r}{near(pattern, names)}")
        for name in found:
            (exact if is_name else globs).setdefault(name, pattern)
    for name in names:
        if name not in exact and name not in globs:
            raise ArgumentError(
                f'{what} has no pattern for parameter {name!r} of node {node.name!r}; add "*" for all that are left'
            )
    return {name: exact.get(name) or globs[name] for name in names}


def _matching(node: ReachedNode, names: Sequence[str], pattern: str) -> tuple[list[str], bool]:
    """The parameters of a Fisher that a pattern means, and whether it is the name of one."""
    own = set(names)
    for glob in dict.fromkeys((pattern, plain_name(pattern))):
        if glob in own:
            return [glob], True
        if found := [name for name in names if fnmatch.fnmatchcase(name, glob)]:
            return found, False
    if not isinstance(node.model, torch.nn.Module):
        return [], False
    called = Names(node.model)  # what is tied, or was wrapped, has other names
    if (first := called.find(pattern)) is not None and first in own:
        return [first], True
    hits = dict.fromkeys(called.first_of[name] for name in called.every if fnmatch.fnmatchcase(name, pattern))
    return [name for name in hits if name in own], False


def narrowest(fishers: Iterable[Fisher]) -> torch.dtype:
    """The dtype that numbers must fit into."""
    return min((fisher.dtype for fisher in fishers), key=lambda dtype: dtype.itemsize)


def check_early(what: str, given: PerGroup, known: Iterable[str], nodes: Sequence[Node]) -> None:
    """All of alpha or lambda that can be checked before there are Fishers: patterns mean parameters of these.

    Raises:
        ArgumentError: a number out of range, of a node that there is not, or none for one of `nodes`.

    """
    _checked(what, given, known, check_number)
    _check_covered(what, given, nodes)


def _checked(what: str, given: PerGroup, known: Iterable[str], check: Check) -> PerGroup:
    """All numbers, those of patterns too."""

    def one(name: str, value: object) -> Number:
        if not isinstance(value, Mapping):
            return check(name, value)
        return {pattern: check(f"{name}[{pattern!r}]", number) for pattern, number in value.items()}

    return values_per_node(what, given, known, one)


def values_per_node(
    what: str, value: object, known: Iterable[str], check: Callable[[str, object], N]
) -> N | dict[str, N]:
    """One number, or {node: number} of which each node is known; all checked.

    Raises:
        ArgumentError: a number out of range, or of a node that there is not.

    """
    if not isinstance(value, Mapping):
        return check(what, value)
    names = set(known) if isinstance(known, (list, tuple)) else known  # a DAG is quick to ask, and so are sets
    for name in value:
        if name not in names:
            advice = "; patterns go inside, {node: {pattern: number}}" if what in ("alpha", "lam") else ""
            raise ArgumentError(f"{what} has a value for {name!r}, which is no node of the DAG{advice}")
    return {name: check(f"{what}[{name!r}]", number) for name, number in value.items()}


def _check_covered(what: str, value: object, nodes: Sequence[ReachedNode] | Sequence[Node]) -> None:
    if not isinstance(value, Mapping):
        return
    for node in nodes:
        if node.name not in value:
            raise ArgumentError(f"{what} has no value for node {node.name!r}, which a request reaches")


def per_node(what: str, value: PerNode, nodes: Sequence[ReachedNode] | Sequence[Node]) -> np.ndarray:
    """[nodes] float64 of what `values_per_node` returned.

    Raises:
        ArgumentError: a node has no value.

    """
    if not isinstance(value, Mapping):
        return np.full(len(nodes), value)
    _check_covered(what, value, nodes)
    return np.array([value[node.name] for node in nodes], dtype=np.float64)
