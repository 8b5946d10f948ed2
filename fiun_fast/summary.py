"""What a plan is about to do, in words and bytes: `print(plan)` and `plan.traffic`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from .arguments import short
from .binding import Part
from .compiling import Program
from .kernels.table import Dampening, Merging
from .report import Facts


@dataclass(frozen=True)
class Traffic:
    """Bytes that one run moves where everything is selected; with nothing selected, `theta` falls away."""

    forget: int  # each forget Fisher once a group
    original: int  # each original Fisher once
    theta: int  # read and written
    gradient: int = 0  # each gradient once a group

    @property
    def total(self) -> int:
        """Dense bytes of one run."""
        return self.forget + self.original + self.theta + self.gradient


def traffic_of(parts: Sequence[Part]) -> Traffic:
    """Dense bytes of one run over these parts."""
    forget = original = theta = gradient = 0
    for table in (part.table for part in parts):
        length, k, n = (table.rows[:, column].astype(object) for column in (0, 2, 4))  # Python ints: no overflow
        assert table.theta_dtype is not None
        merged = table.fisher_dtype.itemsize * int((length * k).sum())
        forget += merged
        gradient += merged if table.signed else 0
        original += table.fisher_dtype.itemsize * int((length * n).sum())
        theta += 2 * table.theta_dtype.itemsize * int((length * n).sum())
    return Traffic(forget, original, theta, gradient)


def summary(parts: Sequence[Part], facts: Facts, how: str) -> str:
    """Nodes, elements, requests; groups, rows, launches; bytes; what was left out. `how` they are merged."""
    traffic, elements = traffic_of(parts), sum(numel for *_, numel in facts.nodes)
    groups, rows = (sum(len(getattr(part.table, what)) for part in parts) for what in ("groups", "rows"))
    launches = ", ".join(
        f"{part.backend.name} on {part.table.device} "
        f"({short(part.table.theta_dtype)}, Fishers {short(part.table.fisher_dtype)})"
        for part in parts
        if part.table.theta_dtype is not None
    )
    lines = [
        f"{_count(len(facts.nodes), 'node')} of {len(facts.known):,}, {_count(elements, 'element')}, "
        f"{_count(len(facts.requests), 'request')}, merged by {how}" + (", signed" if facts.signed else ""),
        f"{_count(groups, 'group')}, {_count(rows, 'contiguous run')}, {_count(len(parts), 'launch')}: {launches}",
        f"moves at most {_bytes(traffic.total)} a run: {_bytes(traffic.forget)} forget Fishers, "
        + (f"{_bytes(traffic.gradient)} gradients, " if facts.signed else "")
        + f"{_bytes(traffic.original)} original Fishers, {_bytes(traffic.theta)} parameters read and written",
    ]
    left_out = {name: None for _, _, skipped, _ in facts.nodes for name in skipped}
    if left_out:
        lines.append(f"left out for another shape or no counterpart: {', '.join(left_out)}")
    return "\n".join(lines)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("ch") else "s")


def _bytes(n: int) -> str:
    size, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{n} B" if unit == "B" else f"{size:.3g} {unit}"


def facts_of(
    program: Program, parts: Sequence[Part], known: frozenset[str], merging: Merging, dampening: Dampening
) -> Facts:
    """What a report says of a plan beside the counts."""
    origins = {
        reaching: tuple(program.requests[k].origin for k in reaching)
        for reaching in {node.requests for node in program.nodes}
    }
    options = {"exponent": dampening.exponent, "cap": dampening.cap, "scale": merging.scale, "merge": merging.how}
    return Facts(
        [
            (node.name, origins[node.requests], match.skipped, match.numel)
            for node, match in zip(program.nodes, program.matches, strict=True)
        ],
        known,
        options,
        tuple(dict.fromkeys(part.backend.name for part in parts)),
        tuple(
            (r.origin, float(r.weight), weakref.ref(r.fisher), None if r.gradient is None else weakref.ref(r.gradient))
            for r in program.requests
        ),
        {node.name: weakref.ref(node.fisher) for node in program.nodes},
        any(one.gradient is not None for one in program.requests),
    )
