"""Loops and paths in the machine code of a kernel (SASS, from nvdisasm), and what one turn of a loop costs.

A path is what a warp executes from the top of a loop back to it; of several the one is taken that a case asks for: with
parameters stored (`selected`) or without. The slow path of a division is left out: no lane takes it while numbers are
ordinary, and the branch that tests for it is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)

SLOW_PATH = r"CALL.*\$__"  # a subroutine of the compiler's, for numbers that are not ordinary

# Operation -> pipe; the first match counts. What is in none of the first four only takes an issue slot. FCHK, the check
# of a division, is documented nowhere; it is counted with the reciprocal that it goes with.
PIPES = {
    "fp64": r"D(ADD|MUL|FMA|SETP|MNMX)",
    "fp32": r"F(FMA|MUL|ADD|SWZADD)|H(FMA2|MUL2|ADD2)",
    "imad": r"IMAD|IDP",
    "xu": r"MUFU|FCHK|POPC|FLO|BREV|I2F|F2I|I2I|F2F|I2FP|F2IP",
    "lsu": r"LDG|STG|LDS|STS|LD\b|ST\b|LDL|STL|ATOM|RED|SHFL|CCTL|LDGSTS|LDSM|MEMBAR|QSPC",
    "control": (
        r"BRA|BRX|JMP|BSSY|BSYNC|BREAK|CALL|RET|EXIT|NOP|WARPSYNC|YIELD|DEPBAR|LDGDEPBAR|BAR|ERRBAR|BMOV|SYNCS"
    ),
    "uniform": r"U[A-Z]|R2UR|S2UR|LDCU|LDC|REDUX|S2R|CS2R|ELECT|ARRIVES|PREEXIT|ACQBULK",
    "alu": r"",
}


def pipe(operation: str) -> str:
    """The pipe of an operation."""
    return next(name for name, pattern in PIPES.items() if re.match(pattern, operation))


@dataclass(frozen=True)
class Instruction:
    """One instruction: whether it has a predicate, what it does, to what."""

    predicate: str
    operation: str
    operands: str

    @cached_property
    def registers(self) -> frozenset[str]:
        """All that it mentions."""
        return frozenset(re.findall(r"\bR\d+", self.operands))

    @cached_property
    def wide_bytes(self) -> int:
        """Bytes of an access of 16 or 32 bytes, else 0."""
        match = re.match(r"(?:LDG|STG)\.E.*\.(128|256)\b", self.operation)
        return int(match[1]) // 8 if match else 0

    @property
    def loads(self) -> bool:
        """Whether it is a wide load."""
        return self.operation.startswith("LDG") and self.wide_bytes > 0

    @property
    def stores(self) -> bool:
        """Whether it is a wide store."""
        return self.operation.startswith("STG") and self.wide_bytes > 0

    @property
    def conditional(self) -> bool:
        """Whether a branch may fall through."""
        return bool(self.predicate.strip()) or bool(re.match(r"!?U?P\d+|UP\d+|!UP\d+", self.operands))


@dataclass
class Block:
    """Instructions that are executed one after another, and the blocks that may come next."""

    instructions: list[Instruction] = field(default_factory=list)
    following: list[int] = field(default_factory=list)

    def has(self, pattern: str) -> bool:
        """Whether an operation of it, with its operands, matches."""
        return self.count(pattern) > 0

    def count(self, pattern: str) -> int:
        """How many do."""
        return sum(bool(re.match(pattern, f"{one.operation} {one.operands}")) for one in self.instructions)


class Code:
    """The control flow of one kernel."""

    def __init__(self, sass: str) -> None:
        self.blocks: list[Block] = [Block()]
        labels: dict[str, int] = {}
        targets: list[tuple[int, str]] = []
        falls = True

        def begin() -> None:
            if self.blocks[-1].instructions:
                if falls:
                    self.blocks[-1].following.append(len(self.blocks))
                self.blocks.append(Block())

        for line in sass.splitlines():
            if label := re.match(r"^(\.L_x_\d+):", line):
                begin()
                labels[label[1]] = len(self.blocks) - 1
                falls = True
            elif match := LINE.match(line):
                if not falls and self.blocks[-1].instructions:
                    begin()
                falls = True
                one = Instruction(match[1] or "", match[2], match[3])
                self.blocks[-1].instructions.append(one)
                if re.match(r"BRA\.(DIV|CONV)", one.operation):  # where a warp has come apart, which none of ours does
                    continue
                if re.match(r"BRA|JMP", one.operation) or (one.operation.startswith("CALL") and ".L_x" in one.operands):
                    targets.append((len(self.blocks) - 1, re.findall(r"\.L_x_\d+", one.operands)[-1]))
                    falls = one.conditional
                    begin()
                    falls = True
                elif re.match(r"EXIT|RET|BRX", one.operation):
                    falls = one.conditional
                    begin()
                    falls = True
        for block, label in targets:
            self.blocks[block].following.append(labels[label])

    @cached_property
    def reachable(self) -> set[int]:
        """Blocks that the entry leads to."""
        return self._from(0)

    def _from(self, start: int, without: int = -1) -> set[int]:
        found, open_ = set(), [start]
        while open_:
            block = open_.pop()
            if block not in found and block != without:
                found.add(block)
                open_ += self.blocks[block].following
        return found

    def _dominates(self, above: int, below: int) -> bool:
        return above == below or below not in self._from(0, without=above)

    @cached_property
    def back_edges(self) -> list[tuple[int, int]]:
        """(from, to) of every branch back to the top of a loop."""
        return [
            (block, to)
            for block in sorted(self.reachable)
            for to in self.blocks[block].following
            if to <= block and self._dominates(to, block)
        ]

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """Top of each loop -> its blocks."""
        before: dict[int, set[int]] = {}
        for block in self.reachable:
            for to in self.blocks[block].following:
                before.setdefault(to, set()).add(block)
        found: dict[int, set[int]] = {}
        for end, top in self.back_edges:
            body = found.setdefault(top, {top})
            open_ = [end]
            while open_:
                block = open_.pop()
                if block not in body:
                    body.add(block)
                    open_ += before.get(block, ())
        return found

    def loop_with(self, pattern: str, outward: int = 0) -> tuple[int, set[int]]:
        """The smallest loop with such an operation, or the one so many loops outside it.

        Raises:
            LookupError: there is none.

        """
        around = sorted(
            (
                (len(body), top)
                for top, body in self.loops.items()
                if any(self.blocks[block].has(pattern) for block in body)
            ),
        )
        if not around:
            raise LookupError(f"no loop with {pattern}")
        smallest = self.loops[around[0][1]]
        enclosing = [top for _, top in around if smallest <= self.loops[top]]
        top = enclosing[min(outward, len(enclosing) - 1)]
        return top, self.loops[top]

    def path(
        self, top: int, body: Iterable[int], stores: bool = True, loaded: int = 0, cold: str = SLOW_PATH
    ) -> list[Instruction]:
        """What is executed from `top` to the end of `body`, each loop inside that has wide stores once.

        Of all ways one with the most wide stores, or none; of these through as many of these loops as there can be;
        then with the fewest wide loads that are at least `loaded` bytes a thread; then with the fewest instructions.
        Blocks with an operation that matches `cold` are not entered.

        Raises:
            LookupError: there is no such way.

        """
        inside, back = set(body), set(self.back_edges)
        ends = {block for block, to in back if to == top} if top else set()
        order = [block for block in self._after(top, inside, back) if not self.blocks[block].has(cold)]
        # loops inside; where they store nothing, they may be passed by
        tops = {at for at, blocks in self.loops.items() if at != top and any(map(self._stores, blocks))}
        # from a block on: (loops, stored, loaded) -> the cheapest way
        ways: dict[int, dict[tuple[int, int, int], tuple[int, list[int]]]] = {}
        for block in order:
            here = self.blocks[block].instructions
            stored = sum(one.wide_bytes for one in here if one.stores)
            read = sum(one.wide_bytes for one in here if one.loads)
            onward = [ways[to] for to in self.blocks[block].following if to in ways and (block, to) not in back]
            if block in ends or here[-1].operation == "EXIT":
                onward.append({(0, 0, 0): (0, [])})
            found = ways.setdefault(block, {})
            for (t, s, r), (cost, rest) in (item for some in onward for item in some.items()):
                key, way = (t + (block in tops), s + stored, r + read), (cost + len(here), [block, *rest])
                if key not in found or way[0] < found[key][0]:
                    found[key] = way
        known = ways.get(top, {})
        most = max((key[1] for key in known), default=0) if stores else 0
        fitting = [key for key in known if key[1] == most and key[2] >= loaded]
        key = min(fitting, key=lambda key: (-key[0], key[2]), default=None)
        if key is None:
            raise LookupError("no such path")
        return [one for block in known[key][1] for one in self.blocks[block].instructions]

    def _stores(self, block: int) -> bool:
        return any(one.stores for one in self.blocks[block].instructions)

    def whole(self) -> tuple[int, set[int]]:
        """The entry and all blocks, where a thread does one tile and ends."""
        return 0, self.reachable

    def _after(self, top: int, inside: set[int], back: set[tuple[int, int]]) -> list[int]:
        """Blocks of a body from `top` on, each after all that may follow it."""
        done: list[int] = []
        seen: set[int] = set()
        open_ = [(top, False)]
        while open_:
            block, closing = open_.pop()
            if closing:
                done.append(block)
            elif block not in seen:
                seen.add(block)
                open_.append((block, True))
                open_ += [
                    (to, False) for to in self.blocks[block].following if to in inside and (block, to) not in back
                ]
        return done


def by_pipe(path: Iterable[Instruction]) -> Counter[str]:
    """Lane operations of a path by pipe, and instructions as `issue`.

    An operation on two numbers a lane (FFMA2) counts twice in its pipe, a wide access once for each 4 bytes.
    """
    count: Counter[str] = Counter()
    for one in path:
        twice = bool(re.match(r"F(FMA|MUL|ADD)2\b", one.operation))
        count[pipe(one.operation)] += one.wide_bytes // 4 or 1 + twice
        count["issue"] += 1
    return count


def in_flight(path: list[Instruction], repeats: bool) -> int:
    """Most bytes of a thread that wide loads have asked for and nothing has used yet."""
    waiting: list[tuple[set[str], int]] = []
    most = 0
    for one in path * (2 if repeats else 1):
        waiting = [(registers, size) for registers, size in waiting if not registers & one.registers]
        if one.loads and (target := re.match(r"R(\d+)", one.operands)):
            registers = {f"R{int(target[1]) + i}" for i in range(one.wide_bytes // 4)}
            waiting.append((registers, one.wide_bytes))
            most = max(most, sum(size for _, size in waiting))
    return most
