"""Nothing is lost: kills and losses of power at any instant, errors and short writes at every call that writes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from families import Family, read_model, same
from faults import Faulty, Power

import fiun_fast as ff
from fiun_fast.checkpoints import disk, journal, resume, rollback, unlearn, verify

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # the threads of the parent hold nothing here
]
MEMORY = "2500KB"  # a few windows


@pytest.fixture(scope="module")
def root():
    """In main memory where that can be: hundreds of runs flush hundreds of times."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def commits(monkeypatch):
    """More than one in a run; and writes past the page cache, where the file system has these."""
    monkeypatch.setattr(journal, "COMMIT", 60_000)
    monkeypatch.setattr(disk, "DIRECT_LEAST", disk.BLOCK)


@pytest.fixture(scope="module")
def family(root):
    return Family(root / "family", 5, models=3, wide=60, origins=["m1", "m2"], small=True)


@pytest.fixture(scope="module")
def expected(family):
    tensors, counts = family.expected()
    assert sum(count > 0 for count in counts.values()) >= 2
    return tensors


class Copy:
    """A copy of the family that a test may spoil."""

    def __init__(self, family: Family, root: Path) -> None:
        self.family, self.root = family, Path(tempfile.mkdtemp(dir=root))
        for name in family.tensors:
            shutil.copytree(family.root / name, self.root / name)
        models = tuple(replace(model, path=self.root / model.name) for model in family.tree.models)
        self.tree = replace(family.tree, models=models)
        self.journal, self.out = self.root / "journal", self.root / "out"

    def is_old(self) -> bool:
        return all(same(read_model(self.root / n), t) == [] for n, t in self.family.tensors.items())

    def is_new(self, expected, where: Path | None = None) -> bool:
        return all(same(read_model((where or self.root) / n), t) == [] for n, t in expected.items())

    def marks(self) -> list[Path]:
        return list(self.root.rglob("*.unfinished*"))

    def in_place(self):
        return unlearn(self.tree, in_place=True, journal=self.journal, memory=MEMORY)

    def into(self):
        return unlearn(self.tree, out=self.out, memory=MEMORY)


@pytest.fixture
def copy(family, root):
    made = Copy(family, root)
    yield made
    shutil.rmtree(made.root)


def child(action, system=None) -> int:
    """Start an action in a process of its own; return its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if system is not None:
            disk.SYSTEM = system
        action()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def ended(pid: int) -> int:
    """Its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def calls(action, monkeypatch) -> int:
    """How many calls that write an action makes."""
    system = Faulty(-1, "none")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "SYSTEM", system)
        action()
    return system.calls


def check_in_place(copy, expected, dice, *, power=False) -> None:
    """After whatever happened: back or on, by way of a resume or a rollback that is stopped too."""
    begun = (copy.journal / "journal.json").exists()
    if begun and dice.random() < 0.3:
        action = dice.choice([resume, rollback])
        pid = child(lambda: quietly(action, copy.journal), Power(dice.randint(0, 20), dice.random()) if power else None)
        if not power:
            time.sleep(dice.random() * 0.05)
            os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (0, 77, -9)
    if not begun:
        assert copy.is_old()
        copy.in_place()
        assert copy.is_new(expected)
        assert copy.marks() == []
        return
    if dice.random() < 0.4 or not quietly(resume, copy.journal):
        rollback(copy.journal)
        assert copy.is_old()
        if dice.random() < 0.3:
            rollback(copy.journal)
            resume(copy.journal)
            assert copy.is_new(expected)
        assert copy.marks() == []
        return
    assert copy.is_new(expected)
    assert copy.marks() == []
    if dice.random() < 0.3:
        assert verify(copy.journal)
        rollback(copy.journal)
        assert copy.is_old()


def quietly(action, folder) -> bool:
    """Whether it was done; a resume is not, where a rollback was begun by one that was killed."""
    try:
        action(folder)
    except ff.CheckpointError as error:
        if "a rollback was begun" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_instant(family, root, expected, seed):
    """SIGKILL: 14 times in place, and again while that is repaired; 26 times into a new folder."""
    dice = random.Random(seed)
    for _ in range(14):
        copy = Copy(family, root)
        pid = child(copy.in_place)
        time.sleep(dice.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (0, -9)
        check_in_place(copy, expected, dice)
        shutil.rmtree(copy.root)
    copy = Copy(family, root)
    for _ in range(26):
        pid = child(copy.into)
        time.sleep(dice.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (0, -9)
        if copy.out.exists():
            assert copy.is_new(expected, copy.out)
            assert verify(copy.out)
            shutil.rmtree(copy.out)
    assert copy.is_old()
    copy.into()
    assert copy.is_new(expected, copy.out)
    assert not copy.out.with_name("out.incomplete").exists()
    shutil.rmtree(copy.root)


def test_power_fails_at_every_write(family, root, expected, monkeypatch):
    """What was not flushed comes to the disk or does not, block by block; then power fails again."""
    first = Copy(family, root)
    count = calls(first.in_place, monkeypatch)
    shutil.rmtree(first.root)
    assert count > 20
    for k in range(count):
        copy = Copy(family, root)
        assert ended(child(copy.in_place, Power(k, k))) in (77, 0)
        check_in_place(copy, expected, random.Random(k), power=True)
        shutil.rmtree(copy.root)


@pytest.mark.parametrize("action", ["in_place", "into"])
@pytest.mark.parametrize("kinds", [("ENOSPC", "EIO"), ("short",)])
def test_a_write_fails(family, root, expected, monkeypatch, kinds, action):
    """An error names the file; nothing is left of a new folder, and what was changed in place can be put back."""
    first = Copy(family, root)
    count = calls(getattr(first, action), monkeypatch)
    shutil.rmtree(first.root)
    for k in range(count):
        kind = kinds[k % len(kinds)]
        copy, failed = Copy(family, root), None
        with monkeypatch.context() as patch:
            patch.setattr(disk, "SYSTEM", Faulty(k, kind))
            try:
                getattr(copy, action)()
            except ff.FileWriteError as error:
                failed = str(error)
        assert (failed is None) == (kind == "short")
        assert failed is None or str(copy.root) in failed
        if action == "into" and failed:
            assert copy.is_old()
            assert not copy.out.exists() or copy.is_new(expected, copy.out)
            assert not copy.out.with_name("out.incomplete").exists()
        elif failed:
            check_in_place(copy, expected, random.Random(k))
        else:
            assert copy.is_new(expected, copy.out if action == "into" else None)
        shutil.rmtree(copy.root)


def test_a_read_fails(copy, monkeypatch):
    class Broken(Faulty):
        def call(self, name, function, arguments):
            return function(*arguments)

    broken = Broken(-1, "none")
    count = [0]

    def pread(fd, views, offset):
        count[0] += 1
        if count[0] == 40:
            raise OSError(5, "Input/output error")
        return os.preadv(fd, views, offset)

    broken.pread = pread
    monkeypatch.setattr(disk, "SYSTEM", broken)
    with pytest.raises(ff.CheckpointError, match="not read: Input/output error"):
        copy.into()
    assert not copy.out.exists()


def test_two_processes(copy, expected):
    """The second is refused, whatever it wants with the same files."""
    held = disk.Source(copy.root / copy.tree.models[0].name / "config.json")
    held.lock(alone=True)
    held.close()
    reached = [model for model in copy.tree.models if copy.family.reached()[model.name]]
    weights = sorted(reached[0].path.glob("*.safetensors"))[0]
    file = disk.Source(weights)
    file.lock(alone=True)
    for action in (copy.into, copy.in_place):
        with pytest.raises(ff.CheckpointError, match="another process works on it"):
            action()
    file.close()
    assert copy.is_old()
    copy.in_place()
    with disk.locked_folder(copy.journal):
        for action in (resume, rollback):
            with pytest.raises(ff.CheckpointError, match="another process works on it"):
                action(copy.journal)
    rollback(copy.journal)
    copy.out.with_name("out.incomplete").mkdir()
    other = disk.locked_folder(copy.out.with_name("out.incomplete"))
    with other, pytest.raises(ff.CheckpointError, match="another process works on it"):
        copy.into()
    copy.into()
    assert copy.is_new(expected, copy.out)
