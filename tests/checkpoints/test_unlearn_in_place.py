"""In place: the bits of the textbook chain, old bytes for good, nothing written where nothing is selected."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from families import Family, read_model, same, write_model
from safetensors.torch import save_file

import fiun_fast as ff
from fiun_fast.checkpoints import ForgetEntry, ModelEntry, Tree, disk, output, resume, rollback, unlearn, verify


@pytest.mark.parametrize("seed", range(4))
def test_there_and_back(tmp_path, seed):
    family = Family(tmp_path / "f", 20 + seed, wide=300 * (seed % 2), rounded=seed == 3)
    expected, counts = family.expected()
    before = {path: path.read_bytes() for path in family.root.rglob("*") if path.is_file()}
    journal = tmp_path / "journal"
    result = unlearn(family.tree, in_place=True, journal=journal, memory=["2MB", "1GB"][seed % 2])
    assert {model.name: model.selected for model in result} == counts
    assert all(same(read_model(family.root / n), t) == [] for n, t in expected.items())
    for path, raw in before.items():  # whatever is no parameter that a request reaches is as it was
        if path.suffix != ".safetensors":
            assert path.read_bytes() == raw
    for name, reaching in family.reached().items():
        if not reaching:
            assert all(p.read_bytes() == before[p] for p in (family.root / name).rglob("*") if p.is_file())
    assert verify(journal)
    again = resume(journal)  # nothing is left to do
    assert {model.name: model.selected for model in again} == counts
    assert again.bytes_written == 0
    for _ in range(2):
        rollback(journal)
        assert all(path.read_bytes() == raw for path, raw in before.items())
    resume(journal, threads=1)
    assert all(same(read_model(family.root / n), t) == [] for n, t in expected.items())
    assert {model.name: model.selected for model in resume(journal)} == counts


def one(root, theta, original, forget, **numbers) -> Tree:
    """A tree of one model with one request."""
    write_model(root / "m", theta)
    ff.Fisher.from_dict(original).save(root / "i")
    ff.Fisher.from_dict(forget).save(root / "f")
    return Tree((ModelEntry("m", root / "m", root / "i"),), (ForgetEntry("m", root / "f"),), **numbers)


def test_only_blocks_with_a_selection_are_written(tmp_path, monkeypatch):
    numel = 64 * 1024
    forget = torch.zeros(numel)
    forget[[5000, 5001, 40_000]] = 1.0  # in two blocks of 1024 elements
    theta = {"w": torch.randn(numel)}
    tree = one(tmp_path, theta, {"w": torch.full((numel,), 1e-6)}, {"w": forget})
    path = tmp_path / "m" / "model.safetensors"
    written = []
    plain = disk.SYSTEM.pwrite

    def pwrite(fd, data, offset):
        if os.fstat(fd).st_ino == path.stat().st_ino:
            written.append((offset, len(data)))
        return plain(fd, data, offset)

    monkeypatch.setattr(disk.SYSTEM, "pwrite", pwrite, raising=False)
    result = unlearn(tree, in_place=True, journal=tmp_path / "j")
    assert result.selected == 3
    data = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    blocks = {(data + 4 * k) // 4096 for k in (5000, 40_000)}
    assert {offset // 4096 for offset, _ in written} == blocks
    assert sum(size for _, size in written) <= 2 * 4096
    assert (tmp_path / "j" / "log").stat().st_size < 4 * 4096


def test_devices_that_refuse_direct_traffic(tmp_path, monkeypatch):
    """Blocks may be larger than ours: then everything goes through the page cache."""
    direct = getattr(os, "O_DIRECT", 0)
    fcntl = pytest.importorskip("fcntl")
    refused = []

    class Coarse(disk.System):
        @staticmethod
        def checked(fd, function, *arguments):
            if fcntl.fcntl(fd, fcntl.F_GETFL) & direct:
                refused.append(fd)
                raise OSError(22, "Invalid argument")
            return function(fd, *arguments)

        def pread(self, fd, *arguments):
            return self.checked(fd, os.preadv, *arguments)

        def pwrite(self, fd, *arguments):
            return self.checked(fd, os.pwrite, *arguments)

    family = Family(tmp_path / "f", 22, wide=300)
    expected, _ = family.expected()
    monkeypatch.setattr(disk, "SYSTEM", Coarse())
    unlearn(family.tree, out=tmp_path / "out")
    unlearn(family.tree, in_place=True, journal=tmp_path / "j")
    for where in (tmp_path / "out", family.root):
        assert all(same(read_model(where / n), t) == [] for n, t in expected.items())
    assert verify(tmp_path / "j")
    rollback(tmp_path / "j")
    assert same(read_model(family.root / "m0"), family.tensors["m0"]) == []
    assert refused or not direct


def test_a_clone_gets_only_what_changed(tmp_path, monkeypatch):
    """Where the file system copies on write; here a copy stands for that."""
    family = Family(tmp_path / "f", 31, wide=300)
    cloned = []

    def clone(source, target):
        shutil.copyfile(source.path, target)
        cloned.append(target)
        return len(cloned) != 2  # one file cannot be cloned

    def clone_or_not(source, target):
        made = clone(source, target)
        if not made:
            target.unlink()
        return made

    monkeypatch.setattr(output.disk, "clone", clone_or_not)
    result = unlearn(family.tree, out=tmp_path / "out", memory="3MB")
    expected, counts = family.expected()
    assert {model.name: model.selected for model in result} == counts
    assert all(same(read_model(tmp_path / "out" / n), t) == [] for n, t in expected.items())
    assert verify(tmp_path / "out")
    assert len(cloned) > 2
    assert same(read_model(family.root / "m0"), family.tensors["m0"]) == []


def test_a_dry_run_writes_nothing(tmp_path):
    family = Family(tmp_path / "f", 3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    _, counts = family.expected()
    for more in ({}, {"out": tmp_path / "out"}, {"in_place": True}):
        result = unlearn(family.tree, dry_run=True, **more)
        assert {model.name: model.selected for model in result} == counts
        assert result.mode == "dry run"
        assert result.bytes_written > 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_progress_ends_at_its_total(tmp_path):
    family = Family(tmp_path / "f", 3)
    seen: list[tuple[int, int]] = []
    unlearn(family.tree, out=tmp_path / "out", memory="2MB", progress=lambda *one: seen.append(one))
    done = [one for one, _ in seen]
    assert done == sorted(done)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


def test_verify_says_what_differs(tmp_path):
    family = Family(tmp_path / "f", 3)
    unlearn(family.tree, out=tmp_path / "out")
    found = verify(tmp_path / "out")
    assert found
    assert "all as recorded" in str(found)
    path = sorted((tmp_path / "out").rglob("*.safetensors"))[0]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (tmp_path / "out" / "m1" / "config.json").write_text("{}")
    (tmp_path / "out" / "m2" / "README.md").unlink()
    found = verify(tmp_path / "out")
    assert not found
    assert len(found.differences) == 3
    assert f"{path}: tensor " in str(found)
    assert "config.json: another content" in str(found)
    assert "README.md: No such file" in str(found)
    path.write_bytes(raw[:-3])
    assert "in the record" in str(verify(tmp_path / "out"))
    with pytest.raises(ff.CheckpointError, match="no record of a run"):
        verify(tmp_path)
    (tmp_path / "out" / "fiun-fast.json").write_text("{}")
    with pytest.raises(ff.CheckpointError, match="damaged or not the record"):
        verify(tmp_path / "out")


def test_the_record_says_what_was_done(tmp_path):
    family = Family(tmp_path / "f", 3)
    result = unlearn(family.tree, out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "fiun-fast.json").read_text())
    assert record["fiun_fast"] == ff.__version__
    assert [model["name"] for model in record["models"]] == [model.name for model in result]
    for model in record["models"]:
        lines = [line for file in model["files"] for line in file["tensors"].values()]
        assert sum(line.get("selected", 0) for line in lines) == result[model["name"]].selected
        changed = [line for line in lines if line.get("sha256") != line.get("sha256_before")]
        assert bool(changed) == bool(result[model["name"]].selected)
        assert all(line["selected"] for line in changed)


# ---- what is refused ------------------------------------------------------------------------------------------------


def plain(root, **more) -> Tree:
    theta = {"w": torch.randn(40, 30), "ids": torch.arange(5, dtype=torch.int8)}
    return one(root, theta, {"w": torch.rand(40, 30)}, {"w": torch.rand(40, 30) * 40}, **more)


def refused(tree, where, error, message, **more):
    before = {path: path.read_bytes() for path in where.rglob("*") if path.is_file()}
    more = more or {"out": where / "out"}
    with pytest.raises(error, match=message):
        unlearn(tree, **more)
    assert {path: path.read_bytes() for path in where.rglob("*") if path.is_file()} == before


def test_refused_before_anything_is_written(tmp_path):
    tree = plain(tmp_path)
    refused(tree, tmp_path, ff.ArgumentError, "memory is 1,000 bytes, at least", out=tmp_path / "o", memory=1000)
    refused(tree, tmp_path, ff.ArgumentError, "either out=folder, or in_place", memory="1GB")
    refused(tree, tmp_path, ff.ArgumentError, "go together", in_place=True)
    refused(tree, tmp_path, ff.FileWriteError, "is there already", out=tmp_path / "m")
    refused(tree, tmp_path, ff.FileWriteError, "no such folder", out=tmp_path / "x" / "y")
    refused(tree, tmp_path, ff.FileWriteError, "lies inside the model 'm'", out=tmp_path / "m" / "clean")
    refused(replace(tree, alpha=-1.0), tmp_path, ff.ArgumentError, "alpha")
    refused(replace(tree, merge="most"), tmp_path, ff.ArgumentError, "merge")
    model = tree.models[0]
    refused(replace(tree, models=(model, model)), tmp_path, ff.DagError, "is there twice")
    refused(replace(tree, models=(replace(model, parents=("x",)),)), tmp_path, ff.DagError, "unknown parent 'x'")
    loop = (replace(model, parents=("b",)), replace(model, name="b", parents=("m",)))
    refused(replace(tree, models=loop), tmp_path, ff.DagError, "circle")
    refused(replace(tree, models=(replace(model, fisher=None),)), tmp_path, ff.ArgumentError, "no original Fisher")
    refused(replace(tree, models=(replace(model, name="a/b"),)), tmp_path, ff.DagError, "unknown origin")
    bad = replace(tree, models=(replace(model, name="a/b"),), forget=(replace(tree.forget[0], origin="a/b"),))
    refused(bad, tmp_path, ff.ArgumentError, "no name for a folder")
    refused(tree, tmp_path, ff.CheckpointError, "is there already, and no journal", in_place=True, journal=tmp_path)
    both = replace(tree, models=(model, replace(model, name="b", parents=("m",))))
    refused(both, tmp_path, ff.CheckpointError, "are one file", in_place=True, journal=tmp_path / "j")
    os.link(tmp_path / "m" / "model.safetensors", tmp_path / "other")
    refused(tree, tmp_path, ff.CheckpointError, "has 2 names", in_place=True, journal=tmp_path / "j")


def test_a_fisher_that_does_not_fit(tmp_path):
    tree = plain(tmp_path)
    for name, value in (("ids", torch.rand(5)), ("w", torch.rand(40, 31))):
        for path in (tmp_path / "i", tmp_path / "f"):
            ff.Fisher.from_dict({name: value}).save(path)
        refused(tree, tmp_path, (ff.DTypeError, ff.LayoutError), "'ids'.*int8|shape \\[40, 30\\] in the model")
    ff.Fisher.from_dict({"v": torch.rand(2)}).save(tmp_path / "i")
    refused(tree, tmp_path, ff.LayoutError, "no tensor 'v' in .*near names")
    (tmp_path / "i").unlink()
    refused(tree, tmp_path, FileNotFoundError, "i")


def test_a_negative_entry(tmp_path):
    tree = plain(tmp_path)
    values = torch.rand(40, 30)
    values[3, 4] = -1
    fisher = ff.Fisher(values.view(-1), ff.Layout({"w": (40, 30)}))
    fisher.save(tmp_path / "f")
    refused(tree, tmp_path, ff.ArgumentError, "'w' has negative entries")
    values[0, 0] = torch.nan
    fisher.save(tmp_path / "f")
    refused(tree, tmp_path, ff.ArgumentError, "'w' has negative entries")


def test_a_file_that_changes_meanwhile(tmp_path, monkeypatch):
    tree = plain(tmp_path)
    plain_stream = __import__("fiun_fast.checkpoints.engine", fromlist=["x"]).stream

    def stream(*arguments):
        plain_stream(*arguments)
        os.utime(tmp_path / "f", ns=(1, 1))

    monkeypatch.setattr("fiun_fast.checkpoints.engine.stream", stream)
    with pytest.raises(ff.CheckpointError, match="changed since planning"):
        unlearn(tree, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.incomplete").exists()


def test_a_journal_whose_files_others_changed(tmp_path):
    tree = plain(tmp_path)
    unlearn(tree, in_place=True, journal=tmp_path / "j")
    with pytest.raises(ff.CheckpointError, match="a journal is there already"):
        unlearn(tree, in_place=True, journal=tmp_path / "j")
    path = tmp_path / "m" / "model.safetensors"
    raw = path.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    spoilt = raw[:data] + bytes(len(raw) - data)
    path.write_bytes(spoilt)
    for action in (rollback, resume):
        with pytest.raises(ff.CheckpointError, match="somebody else has changed it"):
            action(tmp_path / "j")
    assert path.read_bytes() == spoilt
    save_file({"v": torch.rand(3)}, path)
    for action in (rollback, resume):
        with pytest.raises(ff.CheckpointError, match="another file than the one"):
            action(tmp_path / "j")
    for action in (rollback, resume):
        with pytest.raises(ff.CheckpointError, match="no journal"):
            action(tmp_path / "nothing")
    (tmp_path / "j" / "journal.json").write_text("[]")
    with pytest.raises(ff.CheckpointError, match="damaged or not a journal"):
        rollback(tmp_path / "j")
