"""Files that are damaged, replaced, linked, private or too large: refused by name, or written and read right."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fuzz.files import FORMATS, aged, fuzz
from torch import nn

import fiun_fast as ff

LAYOUT = ff.Layout({"weight": (40, 50), "bias": (40,)})


def fisher(seed: int = 0) -> ff.Fisher:
    return ff.Fisher(torch.rand(LAYOUT.numel, generator=torch.Generator().manual_seed(seed)), LAYOUT)


def logged(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An undo log at that path; the model as it is now, and as it was."""
    dice = torch.Generator().manual_seed(3)
    model = {s.name: torch.randn(s.shape, generator=dice) for s in LAYOUT}
    before = {name: tensor.clone() for name, tensor in model.items()}
    ff.dampen_(model, fisher(1), fisher(2), alpha=0.5, undo=True).undo.save(path)
    return model, before


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


# ---- after it was loaded, a file does not matter ---------------------------------------------------------------------


def test_a_file_may_go_once_it_is_loaded(tmp_path):
    """In a process of its own: reading on from a mapping of a shortened file would end it."""
    script = f"""
import os, sys, torch, fiun_fast as ff
from fiun_fast import fisher_file
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_file_safety import fisher, logged, same
for spoil in (lambda path: os.truncate(path, 100), lambda path: open(path, "r+b").write(bytes([255]) * 9000)):
    model, before = logged({str(tmp_path / "log")!r})
    fisher().save({str(tmp_path / "fisher")!r})
    log, loaded = ff.UndoLog.load({str(tmp_path / "log")!r}), ff.Fisher.load({str(tmp_path / "fisher")!r})
    with fisher_file.opened({str(tmp_path / "fisher")!r}) as file:
        part = file.read("weight", 100, 1000)
    spoil({str(tmp_path / "log")!r}), spoil({str(tmp_path / "fisher")!r})
    log.undo_(model)
    numbers = fisher().buffer
    print(same(model, before), torch.equal(loaded.buffer, numbers), torch.equal(part, numbers[100:1000]))
"""
    paths = os.pathsep.join([str(Path(ff.__file__).parents[1]), str(Path(__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "True True True\n" * 2), done.stderr


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0.3, 0.6, 0.999])
def test_a_flipped_bit_is_found(tmp_path, at):
    path = tmp_path / "file"
    for write, load, error in (
        (logged, ff.UndoLog.load, ff.UndoFileError),
        (lambda path: fisher().save(path), ff.Fisher.load, ff.FisherFileError),
    ):
        write(path)
        data = bytearray(path.read_bytes())
        data[int(at * len(data))] ^= 0x40
        path.write_bytes(data)
        with pytest.raises(error, match="its checksum is another: it was damaged since it was written"):
            load(path)


def test_files_without_a_checksum_are_still_read(tmp_path):
    """As version 0.1 wrote them."""
    path = tmp_path / "file"
    model, before = logged(path)
    path.write_bytes(aged(path.read_bytes()))
    ff.UndoLog.load(path).undo_(model)
    assert same(model, before)
    fisher().save(path)
    whole = path.read_bytes()
    path.write_bytes(aged(whole))
    assert torch.equal(ff.Fisher.load(path).buffer, fisher().buffer)
    path.write_bytes(whole.replace(b"fisher/2", b"fisher/3"))
    with pytest.raises(ff.FisherFileError, match=r"format fiun_fast.fisher/3, expected fiun_fast.fisher/2 or"):
        ff.Fisher.load(path)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_refused_or_right(name):
    """A short part of tests/fuzz/files.py."""
    outcomes = fuzz(name, cases=120, seed=20)
    assert sum(outcomes.values()) == 120
    assert any(what.endswith("FileError") for what in outcomes)


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path):
    """Both ways to write a file, and how to tell that it is whole."""
    model, _ = logged(tmp_path / "made")
    log = ff.UndoLog.load(tmp_path / "made")
    (tmp_path / "made").unlink()
    return [(fisher().save, ff.Fisher.load), (log.save, ff.UndoLog.load)]


def test_links_are_followed_and_modes_kept(tmp_path, both):
    (tmp_path / "there").mkdir()
    real, link, dangling = tmp_path / "there" / "real", tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(real)
    dangling.symlink_to(Path("there") / "later")
    for save, load in both:
        real.write_bytes(b"old")
        real.chmod(0o600)
        for path in (link, dangling):
            save(path)
            assert path.is_symlink()
            load(path.resolve())
        assert stat.S_IMODE(real.stat().st_mode) == 0o600
        assert sorted(os.listdir(tmp_path / "there")) == ["later", "real"]
    before = os.umask(0o027)
    try:
        for i, (save, _) in enumerate(both):
            save(tmp_path / f"new{i}")
            assert stat.S_IMODE((tmp_path / f"new{i}").stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_long_names_and_names_that_no_file_can_have(tmp_path, both):
    for save, load in both:
        for name in ("n" * 250, "ä" * 127):
            save(tmp_path / name)
            load(tmp_path / name)
            load(os.fsencode(tmp_path / name))
        with pytest.raises(ff.FileWriteError, match="not written: File name too long"):
            save(tmp_path / ("n" * 256))
        for bad in ("", "a\0b", 5, None):
            for run in (save, load):
                with pytest.raises(ff.ArgumentError, match="path is"):
                    run(bad)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_what_is_no_file_is_left_alone(tmp_path, both):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "round").symlink_to(tmp_path / "about")
    (tmp_path / "about").symlink_to(tmp_path / "round")
    held = sorted(os.listdir(tmp_path))
    for save, load in both:
        for name in ("pipe", "folder"):
            with pytest.raises(ff.FileWriteError, match="it is there, and not a regular file"):
                save(tmp_path / name)
            with pytest.raises(ff.FiunError, match="it is no regular file"):
                load(tmp_path / name)
        with pytest.raises(ff.FileWriteError, match="go in a circle"):
            save(tmp_path / "round")
        with pytest.raises(OSError, match="not written: No such file"):
            save(tmp_path / "nowhere" / "file")
    assert sorted(os.listdir(tmp_path)) == held


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit of file sizes on this system")
def test_a_full_disk(tmp_path, both):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for save, _ in both:
        save(tmp_path / "file")
        whole = (tmp_path / "file").read_bytes()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
            with pytest.raises(ff.FileWriteError, match="not written: .*File too large"):
                save(tmp_path / "file")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "file").read_bytes() == whole
        assert os.listdir(tmp_path) == ["file"]
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_of_parameters_that_no_file_can_hold(tmp_path, name):
    with pytest.raises(ff.ArgumentError, match="a file cannot hold a tensor of that name"):
        ff.Fisher(torch.ones(1), ff.Layout({name: (1,)})).save(tmp_path / "file")
    assert os.listdir(tmp_path) == []


def test_a_provenance_that_no_file_can_hold(tmp_path):
    for kept, says in (
        (("batch", 1, 2, {"w": object()}), "how is not a dict of strings"),
        (("batch", 1, "x"), "samples is a str, expected int"),
        ((None, 1, 2), "estimator is a NoneType, expected str"),
    ):
        made = ff.Fisher(torch.ones(1), ff.Layout({"w": (1,)}), ff.Provenance(*kept))
        with pytest.raises(ff.ArgumentError, match=f"the provenance of a Fisher to be saved: {says}"):
            made.save(tmp_path / "file")
    with pytest.raises(ff.ArgumentError, match="provenance is a str, expected a fiun_fast.Provenance"):
        ff.Fisher(torch.ones(1), ff.Layout({"w": (1,)}), "batch")


# ---- where, and by whom, a file is read ------------------------------------------------------------------------------


def test_devices_that_are_not_there(tmp_path):
    fisher().save(tmp_path / "file")
    with torch.device("meta"):
        loaded = ff.Fisher.load(tmp_path / "file")
    assert torch.equal(loaded.buffer, fisher().buffer)
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    for device in ("meta", "nowhere", missing, [1]):
        with pytest.raises(ff.DeviceError):
            ff.Fisher.load(tmp_path / "file", device=device)


# ---- undo ------------------------------------------------------------------------------------------------------------


def test_undo_of_what_is_no_model(tmp_path):
    model, before = logged(tmp_path / "log")
    now = {name: tensor.clone() for name, tensor in model.items()}
    log = ff.UndoLog.load(tmp_path / "log")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(50, 40))
        rows = model["weight"].to_sparse_csr()
    for bad in (
        *("foo", 5, [model], object(), {}, {5: model}, {"model": 5}, {"model": "foo"}, scripted),
        *({**model, "weight": weight} for weight in ("foo", rows, model["weight"].to("meta"), None)),
        nn.Linear(50, 40, device="meta"),
    ):
        for force in (False, True):
            with pytest.raises(ff.FiunError):
                log.undo_(bad, force=force)
    assert same(model, now)
    log.undo_(model)
    assert same(model, before)
