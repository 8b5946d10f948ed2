"""What `unlearn_` did: what each node was dampened with, what is left there and what it cost, and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import DagError
from .planning import Plan
from .report import Report, table
from .scores import Seen
from .tuned import Tuned


@dataclass(frozen=True)
class Bound:
    """What is to be reached at every node, on validation data; shares 0..1.

    Attributes:
        left: of the forgotten, at most so much is left.
        lost: of what was kept before, at most so much is lost.

    """

    left: float
    lost: float

    def __str__(self) -> str:
        return f"at most {self.left:.4g} left and {self.lost:.4g} lost"


@dataclass(frozen=True)
class NodeOutcome:
    """One node that the requests reach.

    Attributes:
        name: the node.
        estimator: of the Fishers it was dampened by; "given" where these came from outside and do not say.
        alpha, lam: what it was dampened with; alpha is infinite where the node was left alone.
        score: of these on validation data.
        selected, numel: elements selected, and compared.
        before, after: what the score's data showed before and after; None where the score says nothing but a number.
        met: whether the bound was met; of a score that says nothing but a number, whether any candidate beat leaving
            the node alone.
        doubt: what there is to say against the choice (`Tuned.doubts`).
        centered: whether the mean of its rows was taken off the last layer before that.

    """

    name: str
    estimator: str
    alpha: Any
    lam: Any
    score: float
    selected: int
    numel: int
    before: Seen | None
    after: Seen | None
    met: bool
    doubt: str
    centered: bool = False

    @property
    def share(self) -> float:
        """Selected elements over elements compared, 0..1."""
        return self.selected / self.numel if self.numel else 0.0


class Outcome:
    """What `unlearn_` returns: `outcome["u1"].alpha`; `print` shows a line for each node.

    Attributes:
        nodes: name -> what became of it, in the order of the DAG.
        bound: what was to be reached.
        seconds: what took how long: "Fishers", "choosing" (all measurements on validation data are in it), "run".
        report: of the one run; `report.undo` is its log, also of what was centred before it.
        tuned: estimator -> every point that was tried; those with centred rows under "batch, rows centred".
        plan: what ran.

    """

    def __init__(
        self,
        nodes: Mapping[str, NodeOutcome],
        bound: Bound,
        seconds: Mapping[str, float],
        report: Report,
        tuned: Mapping[str, Tuned],
        plan: Plan,
    ) -> None:
        self.nodes, self.bound, self.seconds = dict(nodes), bound, dict(seconds)
        self.report, self.tuned, self.plan = report, dict(tuned), plan

    @property
    def unmet(self) -> list[str]:
        """Names of the nodes where nothing met the bound."""
        return [name for name, node in self.nodes.items() if not node.met]

    def undo_(self) -> None:
        """Put every bit back as it was; errors as `Report.undo_`."""
        self.report.undo_()

    def __getitem__(self, name: str) -> NodeOutcome:
        """Return what became of a node.

        Raises:
            DagError: no request reached such a node.

        """
        if name not in self.nodes:
            raise DagError(f"no node {name!r} among those reached: {', '.join(list(self.nodes)[:8])}")
        return self.nodes[name]

    def __iter__(self) -> Iterator[NodeOutcome]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dump; numbers of a node that are not finite, such as its alpha, are None."""
        return {
            "bound": asdict(self.bound),
            "seconds": self.seconds,
            "unmet": self.unmet,
            "nodes": [_plain({**asdict(node), "share": node.share}) for node in self],
            "report": self.report.to_dict(),
        }

    def __str__(self) -> str:
        head = ("node", "Fishers", "alpha", "lambda", "selected", "left", "kept", "score", "")
        rows = []
        for node in self:
            numbers = (_shown(node.alpha), _shown(node.lam), f"{node.share:.2%}", *_moved(node), f"{node.score:.4g}")
            said = [text for text, so in (("rows centred", node.centered), ("bound not met", not node.met)) if so]
            rows.append((node.name, node.estimator, *numbers, ", ".join(said)))
        lines = [table(head, rows, left=2)]
        unmet = [how_far(node.name, node.score, node.before, node.after) for node in self if not node.met]
        lines += [f"not met: {text}; wanted {self.bound}" for text in unmet]
        lines.append(", ".join(f"{what} {seconds:.3g} s" for what, seconds in self.seconds.items()))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Outcome({len(self)} nodes, {len(self) - len(self.unmet)} within the bound)"


def how_far(name: str, score: float, before: Seen | None, after: Seen | None) -> str:
    """For messages: a node, and what was reached there."""
    if before is None or after is None:
        return f"node {name!r}: no candidate beats leaving it alone, score {score:.4g}"
    lost = before.kept - after.kept
    return f"node {name!r}: {after.left:.4g} left of {before.left:.4g}, {lost:.4g} lost"


def _moved(node: NodeOutcome) -> tuple[str, str]:
    if node.before is None or node.after is None:
        return "", ""
    return (
        f"{node.before.left:.1%} → {node.after.left:.1%}",
        f"{node.before.kept:.1%} → {node.after.kept:.1%}",
    )


def _shown(value: Any) -> str:
    return "by layer" if isinstance(value, Mapping) else f"{value:g}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
