"""A mark beside each model that a run in place has begun to change: until it is gone, no other run takes the model.

Without it, whoever forgets a run that was killed, and begins another, would dampen the same elements twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import CheckpointError
from . import disk
from .family import Family

SUFFIX = ".unfinished"


def mark(family: Family, journal: Path, plan: str) -> None:
    """Mark all models, on disk when this returns; `plan`: the checksum by which the journal is known if it moves."""
    text = json.dumps({"not finished": "a run of fiun-fast in place", "journal": str(journal.resolve()), "plan": plan})
    for path in first_files(family):
        disk.write_whole(_beside(path), text + "\n")


def clear(files: Iterable[Path], plan: str) -> None:
    """Remove the marks of that journal beside these files."""
    for path in files:
        beside = _beside(path)
        partial = beside.with_name(f"{beside.name}.partial")  # of a kill while it was written
        if partial.exists() or _read(beside).get("plan") == plan:
            with disk.said_of(beside):
                partial.unlink(missing_ok=True)
                if _read(beside).get("plan") == plan:
                    beside.unlink()
            disk.flush_folder(path.parent)


def check(family: Family, plan: str | None = None) -> None:
    """Raise a CheckpointError where a model is marked, unless by the journal with that plan."""
    for path in first_files(family):
        beside = _beside(path)
        if beside.exists() and (plan is None or _read(beside).get("plan") != plan):
            by = _read(beside).get("journal", "a journal that it does not name")
            raise CheckpointError(
                f"{path}: a run in place has begun to change it and did not finish: resume or roll back {by} first. If "
                f"that is lost, some tensors may be dampened and others not: bring back a copy, and delete {beside}"
            )


def first_files(family: Family) -> list[Path]:
    """Of each model."""
    return [weights.files[0].path for weights in family.weights.values() if weights.files]


def _beside(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
