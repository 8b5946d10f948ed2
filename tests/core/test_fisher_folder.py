"""Fishers in folders of shards, and rounded to bfloat16: the same numbers again, and all or nothing."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fiun_fast as ff
from fiun_fast import files, fisher_file
from fiun_fast.arguments import check_size

SHAPES = {"embed": (50, 8), "a.weight": (30, 40), "a.bias": (30,), "scalar": (), "none": (0, 3), "ä": (17,)}


def fisher(seed: int = 0, dtype: torch.dtype = torch.float32) -> ff.Fisher:
    layout = ff.Layout(SHAPES)
    values = torch.rand(layout.numel, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return ff.Fisher(values, layout, ff.Provenance("batch", 7, 99, {"embed": "by hand"}, per="token"))


def same(a: ff.Fisher, b: ff.Fisher) -> bool:
    return torch.equal(a.buffer, b.buffer) and a.layout == b.layout and a.provenance.compared == b.provenance.compared


def shards(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 200, "2KB", "1MiB", 1 << 40])
def test_a_folder_holds_the_same(tmp_path, size, dtype):
    made = fisher(dtype=dtype)
    made.save(tmp_path / "f", shard_size=size)
    assert same(ff.Fisher.load(tmp_path / "f"), made)
    assert ff.Fisher.load(tmp_path / "f", layout=made.layout).dtype == dtype
    index = json.loads((tmp_path / "f" / fisher_file.INDEX).read_text(encoding="utf-8"))
    assert list(index["weight_map"]) == list(SHAPES)
    assert sorted({*index["weight_map"].values()}) == sorted(index["shards"]) == shards(tmp_path / "f")
    held = {name: made[name].nbytes for name in SHAPES}
    for name in index["shards"]:
        parts = [key for key, shard in index["weight_map"].items() if shard == name]
        assert sum(held[key] for key in parts) <= check_size("", size) or len([p for p in parts if held[p]]) == 1


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Nearest bfloat16, ties to even, by integers: an independent rounding of what is not NaN."""
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)


@pytest.mark.parametrize("size", [None, 300])
def test_rounded_to_bfloat16(tmp_path, size):
    made = fisher()
    edges = [0.0, 1e-45, 9.2e-41, 4.6e-41, 1.1754942e-38, 3.3895e38, 3.4028235e38, 1.00390625, 1.01171875, torch.inf]
    made.buffer[: len(edges)] = torch.tensor(edges)
    made.save(tmp_path / "f", shard_size=size, dtype=torch.bfloat16)
    again = ff.Fisher.load(tmp_path / "f")
    assert again.dtype == torch.float32
    assert torch.equal(again.buffer, rounded(made.buffer))
    usual = (made.buffer > 1e-37) & (made.buffer < 3.38e38)
    assert ((again.buffer / made.buffer)[usual] - 1).abs().max() <= 2**-8
    written = sum(path.stat().st_size for path in (tmp_path / "f").rglob("*.safetensors")) if size else 0
    assert written < made.buffer.nbytes or not size
    with fisher_file.opened(tmp_path / "f") as file:
        assert (file.stored, file.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(file.read("a.weight", 5, 900), again["a.weight"].reshape(-1)[5:900])
        assert file.mapped("a.weight", 5, 900).dtype == torch.bfloat16
    made.buffer[3] = torch.nan
    made.save(tmp_path / "f", shard_size=size, dtype=torch.bfloat16)
    assert torch.equal(ff.Fisher.load(tmp_path / "f").buffer.isnan().nonzero(), torch.tensor([[3]]))


def test_what_rounding_may_select(tmp_path):
    """Only elements within 0.8 % of the threshold change sides; ff.Fisher.save says so."""
    dice = torch.Generator().manual_seed(4)
    layout = ff.Layout({"w": (200_000,)})
    exact = [ff.Fisher(torch.rand(layout.numel, generator=dice).exp2() * 1e-6, layout) for _ in range(2)]
    for k, one in enumerate(exact):
        one.save(tmp_path / f"{k}", dtype=torch.bfloat16)
    read = [ff.Fisher.load(tmp_path / f"{k}") for k in range(2)]
    selected = [(forget.buffer > 1.25 * original.buffer) for original, forget in (exact, read)]
    changed = selected[0] != selected[1]
    ratio = exact[1].buffer.double() / exact[0].buffer.double() / 1.25
    assert changed.any()
    assert ((ratio - 1).abs()[changed] < 0.008).all()


def test_windows_are_read_by_name_and_range(tmp_path):
    made = fisher(3)
    made.save(tmp_path / "f", shard_size=500)
    dice = random.Random(5)
    with fisher_file.opened(tmp_path / "f") as file:
        assert file.layout == made.layout
        assert len(file.paths) == len(shards(tmp_path / "f")) > 2
        for name in SHAPES:
            whole = made[name].reshape(-1)
            assert file.path_of(name).parent == tmp_path / "f"
            for _ in range(20):
                start, stop = sorted(dice.choices(range(whole.numel() + 1), k=2))
                assert torch.equal(file.read(name, start, stop), whole[start:stop])
        with pytest.raises(ff.LayoutError, match="no parameter 'a.weigth'.*near names: a.weight"):
            file.read("a.weigth")
    with pytest.raises(ZeroDivisionError), fisher_file.opened(tmp_path / "f") as file:
        raise ZeroDivisionError  # no error of the caller becomes one of the file


def test_saving_again_replaces_all_and_touches_nothing_else(tmp_path):
    fisher(1).save(tmp_path / "f", shard_size=200)
    (tmp_path / "f" / "notes.txt").write_text("mine")
    (tmp_path / "f" / "model-00001-of-00001.safetensors").write_text("mine too")
    first = set(shards(tmp_path / "f"))
    fisher(2).save(tmp_path / "f", shard_size=5000)
    assert same(ff.Fisher.load(tmp_path / "f"), fisher(2))
    now = set(os.listdir(tmp_path / "f"))
    assert now & first == {"model-00001-of-00001.safetensors"}
    assert now >= {"notes.txt", fisher_file.INDEX}
    assert len(now) == 3 + len(json.loads((tmp_path / "f" / fisher_file.INDEX).read_text())["shards"])


def replacing(count: int, then: Callable[[], None]) -> Callable[[Path, Path], Path]:
    """What stands for Path.replace: it works `count` times, then something happens first."""
    replace, left = Path.replace, [count]

    def replaced(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            then()
        return replace(self, target)

    return replaced


def no_space() -> None:
    raise OSError(28, "No space left on device")


def test_a_failure_at_any_file_leaves_what_was_there(tmp_path, monkeypatch):
    fisher(1).save(tmp_path / "f", shard_size=900)
    before = sorted(os.listdir(tmp_path / "f"))
    for count in range(len(before)):
        for folder in ("f", "new"):
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", replacing(count, no_space))
                with pytest.raises(ff.FileWriteError, match="not written: No space left on device"):
                    fisher(2).save(tmp_path / folder, shard_size=900)
        assert same(ff.Fisher.load(tmp_path / "f"), fisher(1))
        assert sorted(os.listdir(tmp_path / "f")) == before
        assert not (tmp_path / "new").exists()
    fisher(2).save(tmp_path / "f", shard_size=900)
    assert same(ff.Fisher.load(tmp_path / "f"), fisher(2))
    assert len(before) > 3


def test_a_signal_after_the_index_is_in_place(tmp_path, monkeypatch):
    """The Fisher is the new one then, with all its shards."""
    fisher(1).save(tmp_path / "f", shard_size=900)
    flushed = []

    def flush(folder):
        flushed.append(folder)
        if len(flushed) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush_folder", flush)
    with pytest.raises(KeyboardInterrupt):
        fisher(2).save(tmp_path / "f", shard_size=900)
    assert same(ff.Fisher.load(tmp_path / "f"), fisher(2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_while_saving(tmp_path, monkeypatch):
    """At the rename of each file in turn: what was there before is there, and none of what comes after."""
    fisher(1).save(tmp_path / "f", shard_size=900)
    for count in range(len(shards(tmp_path / "f")) + 1):
        child = os.fork()
        if child == 0:
            try:
                monkeypatch.setattr(Path, "replace", replacing(count, lambda: os.kill(os.getpid(), signal.SIGKILL)))
                fisher(2).save(tmp_path / "f", shard_size=900)
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert same(ff.Fisher.load(tmp_path / "f"), fisher(1))


def test_damage_is_named(tmp_path):
    folder = tmp_path / "f"
    fisher(1).save(folder, shard_size=900)
    other = tmp_path / "other"
    fisher(2).save(other, shard_size=900)
    index = (folder / fisher_file.INDEX).read_bytes()
    first, second = shards(folder)[:2]
    whole = (folder / first).read_bytes()

    def refused(says: str) -> None:
        with pytest.raises(ff.FisherFileError, match=says):
            ff.Fisher.load(folder)

    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        (folder / first).write_bytes(whole[:size])
        refused(f"{first}: truncated or not a shard of a Fisher file")
    (folder / first).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    refused(f"{first}: .*its checksum is another: it was damaged since it was written")
    (folder / first).write_bytes((other / shards(other)[0]).read_bytes())
    refused(f"{first}: its checksum is not the one in {fisher_file.INDEX}: a shard of another Fisher")
    (folder / first).unlink()
    refused(f"{first} is missing, which its {fisher_file.INDEX} names")
    (folder / first).write_bytes(whole)
    (folder / fisher_file.INDEX).write_bytes(index.replace(b'"steps": 7', b'"steps": 8'))
    refused("its checksum is another: it was damaged since it was written")
    (folder / fisher_file.INDEX).unlink()
    refused(f"a folder without {fisher_file.INDEX}")
    (folder / fisher_file.INDEX).write_bytes(index)
    assert same(ff.Fisher.load(folder), fisher(1))


def test_an_index_names_files_of_its_folder_only(tmp_path):
    fisher(1).save(tmp_path / "f", shard_size=1 << 20)
    fisher(1).save(tmp_path / "other", shard_size=1 << 20)
    (name,) = shards(tmp_path / "f")
    path = tmp_path / "f" / fisher_file.INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    for bad in (f"../other/{name}", "..", "", str(tmp_path / "f" / name), "notes.txt", "\0"):
        forged = index | {"shards": {bad: index["shards"][name]}}
        forged["crc32"] = fisher_file.checksum_of(forged)
        path.write_text(json.dumps(forged), encoding="utf-8")
        with pytest.raises(ff.FisherFileError, match="expected a name such as fisher-00001-of-00002"):
            ff.Fisher.load(tmp_path / "f")


def test_mutated_indices_are_refused_or_right(tmp_path):
    made = fisher(1)
    made.save(tmp_path / "f", shard_size=900)
    path = tmp_path / "f" / fisher_file.INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    dice = random.Random(11)
    odd = [None, [], {}, -1, 1e999, True, "x", 10**400, "../x", [[]], {"w": [3]}, {"embed": [50, 8]}]
    outcomes = set()
    for _ in range(300):
        forged = json.loads(json.dumps(index))
        node = forged
        while True:
            key = dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or not node[key] or dice.random() < 0.3:
                break
            node = node[key]
        node[key] = dice.choice(odd)
        forged["crc32"] = fisher_file.checksum_of(forged)
        path.write_text(json.dumps(forged), encoding="utf-8")
        try:
            outcomes.add(torch.equal(ff.Fisher.load(tmp_path / "f").buffer, made.buffer))
        except ff.FiunError as error:
            outcomes.add(type(error))
    assert outcomes >= {True, ff.FisherFileError}
    assert False not in outcomes
    for data in (b"", b"[" * 100_000, b"\xff\xfe", b"{}", b"null", b'{"format": 5}'):
        path.write_bytes(data)
        with pytest.raises(ff.FisherFileError, match="truncated or not the index of a Fisher"):
            ff.Fisher.load(tmp_path / "f")


def test_arguments(tmp_path):
    made = fisher()
    for size in (0, -1, 2.5, True, "2 furlongs", "GB", "", "-1GB", "1e3", "0.0001KB", [1]):
        with pytest.raises(ff.ArgumentError, match="shard_size is"):
            made.save(tmp_path / "f", shard_size=size)
    for dtype, one in ((torch.float16, made), (torch.float32, made), (torch.bfloat16, fisher(dtype=torch.float64))):
        with pytest.raises(ff.DTypeError, match="expected None, or torch.bfloat16 for a float32 one"):
            one.save(tmp_path / "f", dtype=dtype)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ff.FileWriteError, match="it is there, and not a folder"):
        made.save(tmp_path / "file", shard_size=100)
    with pytest.raises(ff.FileWriteError, match="not written: No such file"):
        made.save(tmp_path / "nowhere" / "f", shard_size=100)
    assert [check_size("", s) for s in ("2GB", "500 MB", "1.5GiB", "7", "7B", 7, "1KiB", "3TB")] == [
        2 * 10**9, 5 * 10**8, 3 * 2**29, 7, 7, 7, 1024, 3 * 10**12,
    ]  # fmt: skip
