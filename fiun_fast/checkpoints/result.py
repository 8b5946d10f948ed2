"""What a run did, or would do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DagError
from ..report import table

_HEAD = ("model", "from", "alpha", "lambda", "elements", "selected", "share", "zeroed", "nonfinite", "copied")


@dataclass(frozen=True)
class ModelResult:
    """One model, in elements of its parameters.

    Attributes:
        name: of the model.
        path: of the result; of the model itself where nothing was written.
        sources: origins of the requests that reach it; empty: it was copied as it is, or not touched in place.
        alpha, lam: the values used; None where no request reaches it.
        numel: elements compared.
        selected, zeroed, nonfinite: as in `NodeReport`.
        copied: tensors that no Fisher names, with their dtypes as in the file.
        left: files of the folder that were not taken along: links, hidden folders, the weights in another form. They
            hold what they held before.

    """

    name: str
    path: Path
    sources: tuple[str, ...] = ()
    alpha: float | None = None
    lam: float | None = None
    numel: int = 0
    selected: int = 0
    zeroed: int = 0
    nonfinite: int = 0
    copied: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Selected elements over elements compared, 0..1."""
        return self.selected / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Result:
    """A run over models on disk: `result["chat"].selected`, all models by iteration.

    Attributes:
        mode: "out", "in place", "rolled back", or "dry run": nothing was written.
        where: the new folder, or the journal; None for a dry run.
        models: by name, in the order of the tree.
        bytes_read, bytes_written: of files; what a dry run says of writing is what a run would write at most.
        memory: bytes of the buffers that a run takes.
        seconds: that it took.

    """

    mode: str
    where: Path | None
    models: Mapping[str, ModelResult]
    bytes_read: int
    bytes_written: int
    memory: int
    seconds: float

    def __getitem__(self, name: str) -> ModelResult:
        """Return what became of a model.

        Raises:
            DagError: there is none of that name.

        """
        if name not in self.models:
            raise DagError(f"no model {name!r} in this result; models: {', '.join(list(self.models)[:8])}")
        return self.models[name]

    def __iter__(self) -> Iterator[ModelResult]:
        return iter(self.models.values())

    def __len__(self) -> int:
        return len(self.models)

    @property
    def selected(self) -> int:
        """Elements selected in all models."""
        return sum(model.selected for model in self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dump."""
        models = [{**asdict(model), "path": str(model.path), "share": model.share} for model in self]
        where = None if self.where is None else str(self.where)
        return {**vars(self), "where": where, "models": models}

    def __str__(self) -> str:
        rows = [
            (
                m.name,
                ", ".join(m.sources),
                "" if m.alpha is None else f"{m.alpha:g}",
                "" if m.lam is None else f"{m.lam:g}",
                *(f"{m.numel:,}", f"{m.selected:,}", f"{m.share:.2%}", f"{m.zeroed:,}", f"{m.nonfinite:,}"),
                f"{len(m.copied):,}",
            )
            for m in self
        ]
        lines = [table(_HEAD, rows, left=2)] if rows else []
        lines += [f"left out of {m.name}: {', '.join(m.left[:8])}" for m in self if m.left]
        written = "would be written at most" if self.mode == "dry run" else "written"
        lines.append(
            f"{self.bytes_read:,} bytes read, {self.bytes_written:,} {written}, {self.memory:,} of memory for buffers, "
            f"{self.seconds:.1f} s"
        )
        return "\n".join(lines)
