"""What is read, computed and written when: tensors cut into pieces, pieces put into windows that fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..compiling import GroupPlan
from ..errors import ArgumentError
from .disk import BLOCK, down, up
from .family import Family
from .header import BITS, Entry
from .stored import StoredFisher

# windows at a time: one is read, one is hashed, one is computed, one is written; and room for computing
SLOTS = 4
LARGEST = 64 << 20  # bytes of a window: more makes nothing faster
_LEAST = 1024  # elements of a piece, where its tensor has as many
HEADER = "__metadata__"  # in place of a tensor's name: the one that no tensor has
_STEP = 4096  # elements; pieces begin at multiples of it, where they are long enough


class Span(NamedTuple):
    """Bytes of a file: of the tensor of that name, or of its HEADER."""

    file: int
    start: int
    stop: int
    tensor: str


class Part(NamedTuple):
    """Elements of a parameter of a node, or of a Fisher's."""

    who: int  # index of the node or the request
    name: str
    span: Span
    entry: Entry


@dataclass(frozen=True)
class Piece:
    """Elements of one parameter, for all nodes and requests that have it: what one launch works on."""

    item: int
    groups: tuple[GroupPlan, ...]
    numel: int
    thetas: tuple[Part, ...]
    originals: tuple[Part, ...]
    forgets: tuple[Part, ...]

    @property
    def spans(self) -> Iterator[Span]:
        """All that it reads, each once."""
        parts = (*self.thetas, *self.originals, *self.forgets)
        return iter(dict.fromkeys(part.span for part in parts))


class Region(NamedTuple):
    """Whole blocks of a file, and where they lie in a slot."""

    file: int
    start: int
    stop: int
    at: int
    needed: int  # bytes of it that the file must have


@dataclass
class Window:
    """What is in memory together.

    Attributes:
        number: in the order of a run.
        pieces: to be computed.
        copies: to be copied.
        regions: to be read, by file and place.
        places: where each span lies in a slot.

    """

    number: int
    pieces: list[Piece] = field(default_factory=list)
    copies: list[Span] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    places: dict[Span, int] = field(default_factory=dict)

    def settle(self) -> None:
        """Say where everything lies: neighbours in a file together, every byte at its place within a block."""
        spans = dict.fromkeys([*(span for piece in self.pieces for span in piece.spans), *self.copies])
        runs: list[list[Span]] = []
        end = 0
        for span in sorted(spans):
            if not runs or span.file != runs[-1][0].file or down(span.start) > up(end):
                runs.append([])
                end = 0
            runs[-1].append(span)
            end = max(end, span.stop)
        at = 0
        for run in runs:
            start, end = down(run[0].start), max(span.stop for span in run)
            self.places.update({span: at + span.start - start for span in run})
            self.regions.append(Region(run[0].file, start, up(end), at, end - start))
            at += up(end) - start

    @property
    def read(self) -> int:
        """Bytes that it reads."""
        return sum(region.needed for region in self.regions)


@dataclass(frozen=True)
class Item:
    """One parameter, for all nodes and requests that have it."""

    index: int
    name: str  # as the first request's Fisher has it
    numel: int
    groups: tuple[GroupPlan, ...]
    thetas: tuple[Part, ...]
    originals: tuple[Part, ...]
    forgets: tuple[Part, ...]

    def piece(self, start: int, stop: int) -> Piece:
        """Elements start..stop of it."""

        def cut(parts: tuple[Part, ...]) -> tuple[Part, ...]:
            return tuple(part._replace(span=_bytes_of(part, start, stop)) for part in parts)

        return Piece(self.index, self.groups, stop - start, cut(self.thetas), cut(self.originals), cut(self.forgets))

    def cost(self, keep: bool) -> tuple[float, int]:
        """Bytes of memory an element, and on top; `keep`: old bytes of parameters are kept beside the new ones."""
        sizes = {part.span: BITS[part.entry.dtype] // 8 for part in (*self.thetas, *self.originals, *self.forgets)}
        fishers = {part.span: part.entry for part in (*self.originals, *self.forgets)}
        widened = sum(4 for entry in fishers.values() if entry.dtype == "BF16")
        moved = sum(BITS[e.dtype] // 8 for e in fishers.values() if e.start % (BITS[e.dtype] // 8))
        thetas = sum(BITS[part.entry.dtype] // 8 for part in self.thetas)
        return sum(sizes.values()) + widened + moved + (3 * thetas if keep else 0), 2 * BLOCK * len(sizes)


def _bytes_of(part: Part, start: int, stop: int) -> Span:
    size, entry = BITS[part.entry.dtype] // 8, part.entry
    return part.span._replace(start=entry.start + start * size, stop=entry.start + stop * size)


def items_of(family: Family) -> list[Item]:
    """The parameters of a program, in the order in which they lie in the first model's files."""
    program = family.program
    found: dict[tuple[int, str, int], list[tuple[GroupPlan, str]]] = {}
    for group in program.groups:
        k = group.requests[0]
        for s in group.segments:
            segment = group.match.segments[s]
            called = group.match.called.get(k, {}).get(segment.name, segment.name)
            found.setdefault((k, called, segment.numel), []).append((group, segment.name))
    items = []
    for (_, called, numel), members in found.items():
        thetas: dict[int, Part] = {}
        originals: dict[int, Part] = {}
        forgets: dict[tuple[int, str], Part] = {}
        for group, name in members:
            for n in group.nodes:
                thetas[n] = _part(n, name, *family.theta(n, name))
                fisher = program.nodes[n].fisher
                assert isinstance(fisher, StoredFisher)
                originals[n] = _part(n, name, *family.stored(fisher, name))
            for k in group.requests:
                theirs = group.match.called.get(k, {}).get(name, name)
                fisher = program.requests[k].fisher
                assert isinstance(fisher, StoredFisher)
                forgets[k, theirs] = _part(k, theirs, *family.stored(fisher, theirs))
        groups = tuple(group for group, _ in members)
        parts = tuple(thetas.values()), tuple(originals.values()), tuple(forgets.values())
        items.append(Item(0, called, numel, groups, *parts))
    items.sort(key=lambda item: item.thetas[0].span)
    return [Item(i, *list(vars(item).values())[1:]) for i, item in enumerate(items)]


def _part(index: int, name: str, file: int, entry: Entry) -> Part:
    return Part(index, name, Span(file, entry.start, entry.stop, entry.name), entry)


def rest_of(family: Family, items: Iterable[Item]) -> list[Span]:
    """All bytes of the models' files that no item has: headers, other tensors, models that no request reaches."""
    reached = {part.span for item in items for part in item.thetas}
    spans = []
    for weights in family.weights.values():
        first = family.first_of(weights)
        for i, header in enumerate(weights.headers):
            whole = [Span(first + i, 0, header.data, HEADER)]
            whole += [Span(first + i, e.start, e.stop, e.name) for e in header.tensors.values() if e.stop > e.start]
            spans += [span for span in whole if span not in reached]
    return spans


class Schedule:
    """The windows of a run.

    Args:
        items: what is computed.
        rest: what is copied after it.
        memory: bytes that a run may take for its buffers, all together.
        keep: whether old bytes are kept beside new ones.

    Attributes:
        capacity: bytes of a slot.

    Raises:
        ArgumentError: the memory is too little for the smallest pieces; it says how much is needed.

    """

    def __init__(self, items: list[Item], rest: list[Span], memory: int, *, keep: bool) -> None:
        self.items, self.rest, self._keep = items, rest, keep
        costs = [item.cost(keep) for item in items]
        least = max(
            [4 * BLOCK, *(int(each * min(_LEAST, i.numel)) + top for i, (each, top) in zip(items, costs, strict=True))]
        )
        if memory < 2 * SLOTS * up(least):
            raise ArgumentError(f"memory is {memory:,} bytes, at least {2 * SLOTS * up(least):,} are needed here")
        whole = sum(each * item.numel + top for item, (each, top) in zip(items, costs, strict=True))
        whole += sum(span.stop - span.start + 2 * BLOCK for span in rest)
        self.capacity = down(min(LARGEST, memory // (2 * SLOTS), max(up(least), up(int(whole)))))

    @property
    def buffers(self) -> int:
        """Bytes that a run takes for them."""
        return (SLOTS + 1) * self.capacity

    def __iter__(self) -> Iterator[Window]:
        window, free = Window(0), float(self.capacity)
        for item in self.items:
            each, top = item.cost(self._keep)
            start = 0
            while start < item.numel:
                room = int((free - top) // each)
                left = item.numel - start
                if room < min(left, max(_LEAST, int(self.capacity / each / 8))) and (window.pieces or window.copies):
                    yield self._settled(window)
                    window, free = Window(window.number + 1), float(self.capacity)
                    continue
                stop = item.numel if room >= left else start + (room // _STEP * _STEP or room)
                window.pieces.append(item.piece(start, stop))
                free -= each * (stop - start) + top
                start = stop
        for span in self.rest:
            start = span.start
            while start < span.stop:
                if free < 3 * BLOCK:
                    yield self._settled(window)
                    window, free = Window(window.number + 1), float(self.capacity)
                stop = min(span.stop, start + down(int(free)) - 2 * BLOCK)
                window.copies.append(span._replace(start=start, stop=stop))
                free -= stop - start + 2 * BLOCK
                start = stop
        if window.pieces or window.copies:
            yield self._settled(window)

    @staticmethod
    def _settled(window: Window) -> Window:
        window.settle()
        return window
