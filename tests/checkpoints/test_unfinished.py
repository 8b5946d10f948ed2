"""A model that a run in place has begun to change is taken by no other run until that one is resumed or rolled back."""

from __future__ import annotations

import shutil

import pytest
from families import Family, read_model, same
from faults import Faulty

import fiun_fast as ff
from fiun_fast.checkpoints import disk, resume, rollback, unlearn


def marks(folder):
    return sorted(folder.rglob("*.unfinished*"))


@pytest.fixture
def family(tmp_path):
    return Family(tmp_path / "f", 5)


@pytest.fixture
def stopped(family, tmp_path, monkeypatch):
    """The journal of a run that the disk stopped after it had written to models."""
    before = {path: path.read_bytes() for path in family.root.rglob("*") if path.is_file()}
    for k in range(8, 200):
        journal = tmp_path / f"journal {k}"
        with monkeypatch.context() as patch:
            patch.setattr(disk, "SYSTEM", Faulty(k, "EIO"))
            with pytest.raises(ff.FileWriteError):
                unlearn(family.tree, in_place=True, journal=journal)
        if any(path.read_bytes() != raw for path, raw in before.items()):
            return journal
        rollback(journal)
        shutil.rmtree(journal)
    raise AssertionError("never stopped half way")


def test_no_other_run_takes_it(family, stopped, tmp_path):
    assert marks(family.root)
    left = {path: path.read_bytes() for path in family.root.rglob("*") if path.is_file()}
    for how in ({"in_place": True, "journal": tmp_path / "other"}, {"out": tmp_path / "out"}, {"dry_run": True}):
        with pytest.raises(ff.CheckpointError, match=f"did not finish: resume or roll back {stopped} first"):
            unlearn(family.tree, **how)
    assert left == {path: path.read_bytes() for path in family.root.rglob("*") if path.is_file()}
    assert not (tmp_path / "other").exists() and not (tmp_path / "out").exists()
    resume(stopped)
    assert marks(family.root) == []
    expected, _ = family.expected()
    assert all(same(read_model(family.root / n), t) == [] for n, t in expected.items())


def test_a_rollback_takes_the_marks_away(family, stopped, tmp_path):
    assert marks(family.root)
    rollback(stopped)
    assert marks(family.root) == []
    unlearn(family.tree, in_place=True, journal=tmp_path / "other")
    assert marks(family.root) == []


def test_a_journal_that_has_moved_is_still_the_one(family, stopped, tmp_path):
    moved = stopped.rename(tmp_path / "moved")
    resume(moved)
    assert marks(family.root) == []


def test_a_mark_that_cannot_be_read_counts(family, stopped, tmp_path):
    marks(family.root)[0].write_text("{")
    with pytest.raises(ff.CheckpointError, match="a journal that it does not name"):
        unlearn(family.tree, out=tmp_path / "out")
