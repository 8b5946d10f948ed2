"""How a Fisher was obtained, and a warning where two that are compared were obtained in unlike ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .arguments import ESTIMATORS
from .errors import ProvenanceWarning, warn

BY_BATCH = {"batch", "softened", "label_free"}  # the size of a batch changes these


@dataclass(frozen=True)
class Provenance:
    """How a Fisher was obtained; saved with it."""

    estimator: str = "unknown"
    steps: int = 0  # mini-batches that were averaged
    samples: int = 0  # examples seen
    how: Mapping[str, str] = field(default_factory=dict, compare=False)  # parameter -> the way it was computed
    reduction: str = field(default="", compare=False)  # of a batch's or sample's loss: "mean", "sum"; "": not known
    dtype: str = field(default="", compare=False)  # of the outputs in the forward, such as "bfloat16"
    per: str = field(default="", compare=False)  # what one sample is, "sequence" or "token", where samples are averaged

    def __str__(self) -> str:
        """The ways parameters were computed, one line each, with the parameters."""
        ways: dict[str, list[str]] = {}
        for name, way in self.how.items():
            ways.setdefault(way, []).append(name)
        known = {"per token": self.per == "token", f"{self.reduction} loss": self.reduction}
        known[f"{self.dtype} outputs"] = self.dtype
        seen = [f"estimator {self.estimator}", f"{self.steps} steps", f"{self.samples} samples"]
        lines = [", ".join([*seen, *(text for text, there in known.items() if there)])]
        for way, names in ways.items():
            more = f", … {len(names) - 6} more" if len(names) > 6 else ""
            lines.append(f"  {way}: {', '.join(names[:6])}{more}")
        return "\n".join(lines)

    @property
    def estimators(self) -> set[str]:
        """Those that are in it, of several where it is of a merged Fisher; Adam's moments are squares of batches."""
        names = self.estimator.rpartition(": ")[2].replace("optimizer", "batch").split(", ")
        return {name for name in names if name in ESTIMATORS}

    @property
    def compared(self) -> tuple[Any, ...]:
        """All that `unlike` looks at."""
        return self.estimator, self.steps, self.samples, self.reduction, self.dtype, self.per

    @property
    def batch_size(self) -> float:
        """Samples a mini-batch, on average; 0 where it is not known."""
        return self.samples / self.steps if self.steps else 0.0


def merged(how: str, records: Iterable[Provenance]) -> Provenance:
    """The provenance of a Fisher that was merged of others."""
    records = list(records)
    estimators = ", ".join(dict.fromkeys(record.estimator for record in records))
    steps, samples = (sum(getattr(record, key) for record in records) for key in ("steps", "samples"))
    alike = {key: getattr(records[0], key) for key in ("reduction", "dtype", "per")}
    alike = {key: text for key, text in alike.items() if all(getattr(one, key) == text for one in records)}
    return Provenance(f"{how} of {len(records)}: {estimators}", steps, samples, **alike)


def unlike(a: Provenance, b: Provenance) -> list[str]:
    """In what two differ that makes their numbers incomparable, as far as both know; the values of both are named."""
    found = []
    if a.estimators and b.estimators and a.estimators != b.estimators:
        found.append(f"estimator {'/'.join(sorted(a.estimators))} and {'/'.join(sorted(b.estimators))}")
    small, large = sorted((a.batch_size, b.batch_size))
    if 0 < 2 * small <= large and a.estimators and b.estimators and (a.estimators | b.estimators) <= BY_BATCH:
        found.append(f"batches of {a.batch_size:.4g} and {b.batch_size:.4g} samples on average")
    for key, what in (("reduction", "reduction of the loss"), ("dtype", "outputs in"), ("per", "samples per")):
        one, other = getattr(a, key), getattr(b, key)
        if one and other and one != other:
            found.append(f"{what} {one} and {other}")
    return found


def warn_if_unlike(pairs: Iterable[tuple[str, Provenance, str, Provenance]]) -> None:
    """Give one ProvenanceWarning for pairs, each with names, that were obtained in unlike ways; it says both."""
    seen: set[tuple[Any, ...]] = set()
    first, more = "", 0
    for name, a, other, b in pairs:
        if (key := (a.compared, b.compared)) in seen:
            continue
        seen.add(key)
        if found := unlike(a, b):
            more += bool(first)
            first = first or f"{name} and {other} were made in unlike ways: {'; '.join(found)}"
    if first:
        warn(
            f"{first}{f', and {more} other pairs' if more else ''}; their ratio says little: estimate both alike, or "
            "silence this by warnings.simplefilter('ignore', fiun_fast.ProvenanceWarning)",
            ProvenanceWarning,
        )
