"""What others do to a journal, to models and to Fishers between a kill and what comes then: an error, nothing mixed."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import read_model, same, write_model
from faults import Faulty
from safetensors.torch import save_file

import fiun_fast as ff
from fiun_fast.checkpoints import ForgetEntry, ModelEntry, Tree, disk, journal, resume, rollback, unlearn, verify
from fiun_fast.checkpoints.window import LINE, changed

pytestmark = pytest.mark.usefixtures("one_thread")


def small(root, numel=20_000) -> Tree:
    write_model(root / "m", {"w": torch.randn(numel), "ids": torch.arange(9, dtype=torch.int8), "b": torch.randn(3)})
    ff.Fisher.from_dict({"w": torch.rand(numel)}).save(root / "i")
    ff.Fisher.from_dict({"w": torch.rand(numel) * 20 * (torch.rand(numel) < 0.03)}).save(root / "f")
    return Tree((ModelEntry("m", root / "m", root / "i"),), (ForgetEntry("m", root / "f"),))


def files(root) -> dict:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def stop(tree, root, monkeypatch, wanted) -> None:
    """A run in place that is stopped where `wanted` of its log is true."""
    before = files(root)
    monkeypatch.setattr(journal, "COMMIT", 25_000)
    for k in range(5, 60):
        for path, raw in before.items():
            path.write_bytes(raw)
        shutil.rmtree(root / "j", ignore_errors=True)
        (root / "m" / "model.safetensors.unfinished").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "SYSTEM", Faulty(k, "EIO"))
            with pytest.raises(ff.FileWriteError, match="resume it, or roll it back"):
                unlearn(tree, in_place=True, journal=root / "j", memory="600KB")
        with journal.Journal(root / "j") as opened:
            if opened.log.records and wanted(opened.log):
                return
    pytest.fail("no such instant")


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run in place that stopped in its middle, after a commit and some windows more: its tree."""
    tree = small(tmp_path)
    stop(tree, tmp_path, monkeypatch, lambda log: log.committed >= 0 and log.records[-1].kind == "window")
    return tree


def refused(root, action, message) -> None:
    before = files(root)
    with pytest.raises(ff.CheckpointError, match=message):
        action(root / "j")
    assert files(root) == before


def test_a_fisher_that_changed_before_a_resume(tmp_path, stopped):
    """The rest of the model would be dampened by other numbers than its beginning."""
    fisher = ff.Fisher.load(tmp_path / "f")
    ff.Fisher(fisher.buffer * 2, fisher.layout).save(tmp_path / "f")
    with pytest.raises(ff.CheckpointError, match=r"/f: changed since .*/j was begun.*roll it back"):
        resume(tmp_path / "j")
    rollback(tmp_path / "j")
    shutil.rmtree(tmp_path / "j")
    unlearn(stopped, in_place=True, journal=tmp_path / "j")


@pytest.mark.parametrize("action", [rollback, resume])
def test_another_model_under_the_same_header(tmp_path, monkeypatch, action):
    """Before the first commit too: old bytes of one model are not put into another one."""
    small(tmp_path)
    tree = small(tmp_path / "x")
    stop(tree, tmp_path / "x", monkeypatch, lambda log: log.committed == -1)
    path = tmp_path / "x" / "m" / "model.safetensors"
    path.write_bytes((tmp_path / "m" / "model.safetensors").read_bytes())
    refused(tmp_path / "x", action, "tensor 'w' is not as this journal left it")


@pytest.mark.parametrize("action", [rollback, resume])
def test_a_damaged_log(tmp_path, stopped, action):
    """A bit of an entry that others follow: what was taken for an end that was never written lost all old bytes."""
    log = tmp_path / "j" / "log"
    raw = log.read_bytes()
    with journal.Journal(tmp_path / "j") as opened:
        starts = [record.start for record in opened.log.records]
    for start in starts[:-1]:
        log.write_bytes(raw[: start + 60] + bytes([raw[start + 60] ^ 1]) + raw[start + 61 :])
        refused(tmp_path, action, f"log: damaged at byte {start:,}")
    log.write_bytes(raw)
    action(tmp_path / "j")


@pytest.mark.parametrize("action", [rollback, resume])
def test_a_log_that_was_cut_or_lost(tmp_path, action):
    tree = small(tmp_path)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    unlearn(tree, in_place=True, journal=tmp_path / "j", memory="600KB")
    log = tmp_path / "j" / "log"
    raw = log.read_bytes()
    for size in (0, 4096, len(raw) // 2):
        log.write_bytes(raw[:size])
        refused(tmp_path, action, "log: damaged: .* bytes of entries, and there were")
    log.unlink()
    refused(tmp_path, action, "log: cannot be")
    log.write_bytes(raw)
    (tmp_path / "j" / "fiun-fast.json").unlink()  # old bytes can be put back without the record
    rollback(tmp_path / "j")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_a_damaged_plan(tmp_path, stopped):
    """One digit, and the rest would be dampened by another alpha."""
    path = tmp_path / "j" / "journal.json"
    text = path.read_text()
    assert '"alpha": 10.0' in text
    path.write_text(text.replace('"alpha": 10.0', '"alpha": 11.0'))
    for action in (rollback, resume):
        refused(tmp_path, action, "journal.json: damaged or not a journal: .*checksum")


def test_the_journal_lies_outside_of_the_models(tmp_path):
    """A copy of a folder takes other files along: the old bytes, too."""
    tree = small(tmp_path)
    before = files(tmp_path)
    for folder in (tmp_path / "m" / "j", tmp_path / "m" / "tokenizer" / "j"):
        with pytest.raises(ff.FileWriteError, match="lies inside the model 'm'"):
            unlearn(tree, in_place=True, journal=folder)
    assert files(tmp_path) == before


def test_verify_in_place_sees_every_tensor(tmp_path):
    """Those that no Fisher names too."""
    tree = small(tmp_path, 50)
    unlearn(tree, in_place=True, journal=tmp_path / "j")
    path = tmp_path / "m" / "model.safetensors"
    raw = path.read_bytes()
    assert verify(tmp_path / "j")
    for k in range(len(raw)):
        path.write_bytes(raw[:k] + bytes([raw[k] ^ 16]) + raw[k + 1 :])
        assert not verify(tmp_path / "j"), k
    path.write_bytes(raw)
    assert verify(tmp_path / "j")
    assert resume(tmp_path / "j").bytes_written == 0


def test_a_link_as_the_path_of_a_model(tmp_path):
    tree = small(tmp_path)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "m" / "model.safetensors")
    tree = replace(tree, models=(replace(tree.models[0], path=tmp_path / "link.safetensors"),))
    for more in ({"in_place": True, "journal": tmp_path / "j"}, {"out": tmp_path / "out"}):
        with pytest.raises(ff.CheckpointError, match="link.safetensors: a symbolic link"):
            unlearn(tree, **more)


def test_fishers_may_be_one_file_by_two_names(tmp_path):
    tree = small(tmp_path)
    (tmp_path / "f").unlink()
    os.link(tmp_path / "i", tmp_path / "f")
    unlearn(replace(tree, alpha=0.5), in_place=True, journal=tmp_path / "j")


def test_a_tensor_without_a_name(tmp_path):
    """It is not the header of its file."""
    write_model(tmp_path / "m", {"": torch.randn(40), "w": torch.randn(50)})
    for name in ("i", "f"):
        ff.Fisher.from_dict({"w": torch.rand(50) * (90 if name == "f" else 1)}).save(tmp_path / name)
    tree = Tree((ModelEntry("m", tmp_path / "m", tmp_path / "i"),), (ForgetEntry("m", tmp_path / "f"),))
    unlearn(tree, out=tmp_path / "out")
    assert verify(tmp_path / "out")
    assert same({"": read_model(tmp_path / "out" / "m")[""]}, {"": read_model(tmp_path / "m")[""]}) == []


def test_other_files_are_hashed_in_parts(tmp_path, monkeypatch):
    """Whatever lies in a folder, memory is that of a part."""
    tree = small(tmp_path)
    (tmp_path / "m" / "data").write_bytes(os.urandom(100_000))
    monkeypatch.setattr(ff.checkpoints.record, "_CHUNK", 8192)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: pytest.fail(f"{path} is read whole"))
    unlearn(tree, out=tmp_path / "out")
    assert verify(tmp_path / "out")


@pytest.mark.parametrize("place", [".", "", "a\0b"])
def test_no_place_for_a_result(tmp_path, monkeypatch, place):
    tree = small(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises((ff.ArgumentError, ff.FileWriteError)):
        unlearn(tree, out=place)
    assert not list((tmp_path / "empty").iterdir())
    with pytest.raises(ff.ArgumentError, match="threads is"):
        unlearn(tree, out="out", threads=10**12)


def test_an_index_with_a_name_that_is_too_long(tmp_path):
    tree = small(tmp_path)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "a.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"w": "a.safetensors", "b": "{"x" * 300}"}}}}')
    with pytest.raises(ff.CheckpointError, match="missing, and named by .*too long"):
        unlearn(tree, out=tmp_path / "out")


def test_what_is_untouched_is_whole_lines(tmp_path):
    """Against a loop over lines, at any place of a span in its file."""
    dice = np.random.default_rng(0)
    for _ in range(200):
        start, size = int(dice.integers(0, 300)), int(dice.integers(1, 700))
        old = dice.integers(0, 256, size).astype(np.uint8)
        new = old.copy()
        hit = dice.random(size) < dice.choice([0, 0.003, 0.02, 1])
        new[hit] ^= 1
        change = changed(old, new, start)
        lines = range(0, size // LINE * LINE, LINE)  # from the first byte of the span on
        kept = [old[k : k + LINE] for k in lines if not hit[k : k + LINE].any()]
        expected = journal.zlib.crc32(np.concatenate([old[:0], *kept]))
        assert journal._untouched(old, start, change.runs) == expected
        assert journal._untouched(new, start, change.runs) == expected


def test_the_same_file_saved_again_is_refused_after_a_rollback_was_killed(tmp_path, stopped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(disk, "SYSTEM", Faulty(3, "EIO"))
        with pytest.raises(ff.FileWriteError):
            rollback(tmp_path / "j")
    tensors = read_model(tmp_path / "m")
    save_file({name: torch.ones_like(tensor) for name, tensor in tensors.items()}, tmp_path / "m" / "model.safetensors")
    refused(tmp_path, rollback, "tensor 'w' is not as this journal left it")
