"""What a run did: counts a node, read from the device only when somebody looks."""

from __future__ import annotations

import datetime
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from .errors import DagError, UndoError
from .fisher import Fisher
from .gradient import Gradient
from .ranks import Ranks
from .values import Number, Slots, Values
from .vectors import Vector
from .version import __version__

_HEAD = ["node", "from", "alpha", "lambda", "elements", "selected", "share", "zeroed", "nonfinite"]
_SHOWN = 40  # rows that print(report) shows


@dataclass(frozen=True)
class ParameterReport:
    """Counts of one parameter of one node, in elements; only an audited run has them.

    Attributes:
        name, shape, dtype: the parameter.
        numel: elements compared.
        selected, zeroed, nonfinite: as in `NodeReport`.
        change: ‖Δθ‖, the L2 norm of what the run adds to the parameter; NaN where θ is not finite.

    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    selected: int
    zeroed: int
    nonfinite: int
    change: float

    @property
    def share(self) -> float:
        """Selected elements over elements compared, 0..1."""
        return self.selected / self.numel if self.numel else 0.0


class Undo(Protocol):
    """The way back that a run with `undo=True` leaves: an `UndoLog`."""

    def undo_(self, models: Any = None, *, force: bool = False) -> None:
        """Put the old bits back."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file."""

    @property
    def numel(self) -> int:
        """Elements kept."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes with a selection."""


@dataclass(frozen=True)
class Facts:
    """What a plan says about itself, for the record; models and Fishers are not kept alive by it."""

    nodes: Sequence[tuple[str, tuple[str, ...], tuple[str, ...], int]]  # reached: name, origins, skipped, elements
    known: frozenset[str]  # all nodes of the DAG
    options: Mapping[str, float | str]
    backends: tuple[str, ...]
    requests: tuple[tuple[str, float, weakref.ref[Fisher] | None, weakref.ref[Gradient] | None], ...]  # origin, w, F, g
    originals: Mapping[str, weakref.ref[Fisher]]  # node -> I, of those that lie here
    signed: bool  # whether the requests have gradients


@dataclass(frozen=True)
class Audit:
    """What an audited run adds to its report."""

    time: str  # when the run began, UTC, ISO 8601
    parameters: Mapping[str, tuple[ParameterReport, ...]]  # node -> its parameters
    sha256: Mapping[int, str]  # id of a reference to a Fisher or gradient, in Facts -> digest, taken before the run


def audit_of(facts: Facts, parameters: Mapping[str, tuple[ParameterReport, ...]]) -> Audit:
    """The audit of a run that is about to begin: its time, these figures, and hashes of all Fishers and gradients."""
    time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    references: list[Any] = [one for *_, fisher, gradient in facts.requests for one in (fisher, gradient)]
    references += facts.originals.values()
    vectors = {id(one): vector for one in references if one is not None and (vector := one()) is not None}
    digests = {id(vector): vector.sha256() for vector in vectors.values()}
    return Audit(time, parameters, {reference: digests[id(vector)] for reference, vector in vectors.items()})


@dataclass(frozen=True)
class NodeReport:
    """Counts of one node, in elements.

    Attributes:
        name: the node.
        sources: origins of the requests that reach it; empty: not touched.
        skipped: parameters left out by on_mismatch="skip".
        alpha, lam: the values used, {pattern: number} where parameters were told apart; None where the node is not
            touched. Alpha is infinite where `tune` left it alone.
        numel: elements compared.
        selected: elements with m > alpha I, and in a signed run g * theta < 0.
        zeroed: selected elements that are exactly 0 afterwards.
        nonfinite: elements whose m, I or g is NaN or infinite.
        parameters: the same for each parameter, of an audited run.

    """

    name: str
    sources: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    alpha: Number | None = None
    lam: Number | None = None
    numel: int = 0
    selected: int = 0
    zeroed: int = 0
    nonfinite: int = 0
    parameters: tuple[ParameterReport, ...] = ()

    @property
    def share(self) -> float:
        """Selected elements over elements compared, 0..1."""
        return self.selected / self.numel if self.numel else 0.0

    @property
    def change(self) -> float | None:
        """‖Δθ‖ over all parameters of an audited run, else None."""
        return math.hypot(*(p.change for p in self.parameters)) if self.parameters else None

    def __str__(self) -> str:
        """A table of the parameters, after an audited run; else one line."""
        if not self.parameters:
            return f"{self.name}: {self.selected:,} of {self.numel:,} elements selected ({self.share:.2%})"
        head = ("parameter", "shape", "dtype", "elements", "selected", "share", "zeroed", "nonfinite", "‖Δθ‖")
        rows = [(p.name, "×".join(map(str, p.shape)) or "scalar", p.dtype, *_figures(p)) for p in self.parameters]
        if len(rows) > 1:
            rows.append((self.name, "", "", *_figures(self)))
        return table(head, rows, left=3)


class Report:
    """Result of a run: `report["u1"].selected`, totals as `report.selected`, all nodes by iteration.

    Only nodes that a request reaches are listed; any other node of the DAG can be asked for by name and shows zeros.
    """

    def __init__(
        self,
        facts: Facts,
        counts: Sequence[torch.Tensor],
        values: Values,
        slots: Slots,
        *,
        dry_run: bool,
        audit: Audit | None = None,
        undo: Undo | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Keep what is needed to say it all later.

        Args:
            facts: of the plan.
            counts: for each device [slots, 3] int64: selected, zeroed, nonfinite; this run's own, added up when read.
            values: alpha and lambda of the nodes, as the run used them.
            slots: what the counts are of.
            dry_run: whether nothing was written.
            audit, undo: what a run with these options adds.
            ranks: over which the counts are to be added up when they are read.

        """
        self.dry_run, self.undo = dry_run, undo
        self._ranks = ranks
        self._facts, self._audit = facts, audit
        self._counts, self._values, self._slots = counts, values, slots
        self._read: dict[str, NodeReport] | None = None

    def among(self, facts: Facts, rows: Sequence[int], values: Values, ranks: Ranks) -> Report:
        """The same as a part of a report on more nodes, of which other ranks have the others; not read yet.

        Args:
            facts: of all nodes.
            rows: where this report's nodes stand among them.
            values: of all nodes.
            ranks: all that have parts.

        """
        to = torch.from_numpy(np.asarray(rows, dtype=np.int64)[self._slots.node])
        counts = [
            torch.zeros(len(facts.nodes), 3, dtype=torch.int64, device=own.device).index_add_(0, to.to(own.device), own)
            for own in self._counts
        ]
        of = facts, counts, values, Slots.plain(len(facts.nodes))
        return Report(*of, dry_run=self.dry_run, audit=self._audit, undo=self.undo, ranks=ranks)

    @property
    def nodes(self) -> dict[str, NodeReport]:
        """Name -> report of each node reached, in the order of the DAG. The first look waits for the device.

        Of models that are spread over ranks it adds up what all of them counted: every rank has to look.
        """
        if self._read is None:
            zeros = torch.zeros(len(self._slots), 3, dtype=torch.int64, device="cpu")
            by_slot = sum((counts.cpu() for counts in self._counts), zeros)
            by_slot = by_slot if self._ranks is None else self._ranks.sum(by_slot)
            counts = self._slots.sums(by_slot.numpy(), len(self))
            audited = {} if self._audit is None else self._audit.parameters
            values = zip(self._values.alpha.all(), self._values.lam.all(), counts.tolist(), strict=True)
            self._read = {
                name: NodeReport(
                    name, origins, skipped, alpha, lam, numel, row[0], row[1], row[2], audited.get(name, ())
                )
                for (name, origins, skipped, numel), (alpha, lam, row) in zip(self._facts.nodes, values, strict=True)
            }
            self._counts = []
        return self._read

    def __getitem__(self, name: str) -> NodeReport:
        """Return the report of a node; one that no request reaches shows zeros.

        Raises:
            DagError: the DAG has no such node.

        """
        if name in self.nodes:
            return self.nodes[name]
        if name in self._facts.known:
            return NodeReport(name)
        raise DagError(f"no node {name!r} in this report; nodes reached: {', '.join(list(self.nodes)[:8])}")

    def __iter__(self) -> Iterator[NodeReport]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self._facts.nodes)

    @property
    def numel(self) -> int:
        """Elements compared in all nodes."""
        return sum(n.numel for n in self)

    @property
    def selected(self) -> int:
        """Elements selected in all nodes."""
        return sum(n.selected for n in self)

    @property
    def zeroed(self) -> int:
        """Elements that became exactly 0, in all nodes."""
        return sum(n.zeroed for n in self)

    @property
    def nonfinite(self) -> int:
        """Elements with a NaN or infinity in m, I or g, in all nodes."""
        return sum(n.nonfinite for n in self)

    def undo_(self, *, force: bool = False) -> None:
        """Restore every bit that the run changed: `report.undo.undo_()`, which says when it refuses.

        Raises:
            UndoError: the run kept no log, or `UndoLog.undo_` refuses.

        """
        if self.undo is None:
            why = "changed nothing" if self.dry_run else "kept no undo log: run_(undo=True) does"
            raise UndoError(f"this run {why}")
        self.undo.undo_(force=force)

    def to_dict(self, *, sha256: bool = True) -> dict[str, Any]:
        """Plain data, ready for json.dump: what was done, to what, by what (docs/audit.md lists the keys).

        Args:
            sha256: with the SHA-256 of each Fisher and gradient. An audited run took them before it began; otherwise
                each is read through here, as it is now, and one that is gone is None.

        """
        audit, facts = self._audit, self._facts

        def digest(reference: weakref.ref[Any] | None, key: str = "sha256") -> dict[str, str | None]:
            if not sha256 or reference is None:
                return {}
            vector: Vector | None = reference()
            if audit is not None:
                return {key: audit.sha256.get(id(reference))}
            return {key: None if vector is None else digests.setdefault(id(vector), vector.sha256())}

        digests: dict[int, str] = {}
        return {
            "fiun_fast": __version__,
            "torch": torch.__version__,
            "backends": list(facts.backends),
            **({} if audit is None else {"time": audit.time}),
            "dry_run": self.dry_run,
            **facts.options,
            **{key: getattr(self, key) for key in ("numel", "selected", "zeroed", "nonfinite")},
            "signed": facts.signed,
            "requests": [
                {"origin": origin, "weight": weight, **digest(fisher), **digest(gradient, "gradient_sha256")}
                for origin, weight, fisher, gradient in facts.requests
            ],
            "nodes": [{**_plain(node), **digest(facts.originals.get(node.name))} for node in self],
        }

    def __str__(self) -> str:
        nodes = list(self)
        head = _HEAD
        rows = [_row(n) for n in nodes[:_SHOWN]]
        if len(nodes) > _SHOWN:
            rows.append((f"… {len(nodes) - _SHOWN:,} more", *[""] * (len(head) - 1)))
        if len(nodes) > 1:
            parameters = tuple(p for n in nodes for p in n.parameters)
            total = (self.numel, self.selected, self.zeroed, self.nonfinite, parameters)
            rows.append(_row(NodeReport("all", (), (), None, None, *total)))
        if any(n.parameters for n in nodes):
            head = [*_HEAD, "‖Δθ‖"]
            rows = [(*row, *[""] * (len(head) - len(row))) for row in rows]  # nothing fitted: nothing was measured
        lines = [table(head, rows, left=2)] if rows else []
        lines += [f"left out of {n.name}: {', '.join(n.skipped)}" for n in nodes[:_SHOWN] if n.skipped]
        if self._facts.signed:
            lines.append("signed: only elements whose gradient and value differ in sign")
        if self.dry_run:
            lines.append("dry run: nothing was changed")
        return "\n".join(lines)

    def __repr__(self) -> str:
        state = "not read yet" if self._read is None else f"{self.selected:,} of {self.numel:,} elements selected"
        return f"Report({len(self)} nodes, {state})"


def _row(n: NodeReport) -> tuple[str, ...]:
    return (n.name, ", ".join(n.sources), shown(n.alpha), shown(n.lam), *_figures(n))


def shown(number: Number | None) -> str:
    """Alpha or lambda in a table: of several, the least and the greatest."""
    if number is None:
        return ""
    if not isinstance(number, Mapping):
        return f"{number:g}"
    least, most = min(number.values()), max(number.values())
    return f"{least:g}" if least == most else f"{least:g}…{most:g}"


def _figures(n: NodeReport | ParameterReport) -> tuple[str, ...]:
    counts = (f"{n.numel:,}", f"{n.selected:,}", f"{n.share:.2%}", f"{n.zeroed:,}", f"{n.nonfinite:,}")
    return counts if n.change is None else (*counts, f"{n.change:.4g}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Columns side by side under a rule; the first `left` are flush left, the others right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(f"{cell:{'<' if i < left else '>'}{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in [head, *rows]
    ]
    lines.insert(1, "─" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def _plain(n: NodeReport) -> dict[str, Any]:
    """A node's report as plain data; an alpha or a change that is not finite becomes None, which JSON can hold."""
    plain = {**asdict(n), "share": n.share}
    if isinstance(n.alpha, Mapping):
        plain["alpha"] = {pattern: None if one == math.inf else one for pattern, one in n.alpha.items()}
    elif n.alpha == math.inf:  # left alone
        plain["alpha"] = None
    if n.change is None:
        del plain["parameters"]
        return plain
    for shown, p in zip(plain["parameters"], n.parameters, strict=True):
        shown |= {"share": p.share, "change": p.change if math.isfinite(p.change) else None}
    return plain | {"change": n.change if math.isfinite(n.change) else None}
