"""What is no model, or a damaged one, is refused with a message that says what to do."""

from __future__ import annotations

import json
import random

import pytest
import torch
from families import write_model
from safetensors.torch import save_file

import fiun_fast as ff
from fiun_fast.checkpoints import ModelEntry
from fiun_fast.checkpoints.disk import Source
from fiun_fast.checkpoints.folder import INDEX, open_weights
from fiun_fast.checkpoints.header import read_header
from fiun_fast.checkpoints.matching import match


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.rand(3, 5) for name in names}


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model", tensors("a", "b", "c") | {"d": torch.zeros(0), "e": torch.ones(())}, 3)


def fake(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "'b' overlaps what is before it"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "'b' follows a hole of 4 bytes"),
        ({"a": entry()}, 12, "tensors end at byte"),
        ({"a": entry()}, 7, "tensors end at byte"),
        ({"a": entry(offsets=(0, 12))}, 12, r"F32 \[2\] takes 8 bytes"),
        ({"a": entry(offsets=(8, 0))}, 8, "takes 8 bytes"),
        ({"a": entry(shape=(-2,))}, 8, "expected whole numbers"),
        ({"a": entry(shape=(2.0,))}, 8, "expected whole numbers"),
        ({"a": entry(shape=(True, 2))}, 8, "expected whole numbers"),
        ({"a": entry(shape=(1 << 70,))}, 8, "expected whole numbers"),
        ({"a": entry(dtype="F99")}, 8, "dtype 'F99', expected one of"),
        ({"a": {**entry(), "more": 1}}, 8, "has not just dtype, shape and data_offsets"),
        ({"a": [1]}, 8, "has not just"),
        ({"a": entry(), "__metadata__": {"x": 1}}, 8, "__metadata__ is not a table of strings"),
        (b'{"a": 1, "a": 2}', 0, "'a' is there twice"),
        (b"[]", 0, "does not begin with {"),
        (b"{" * 200_000, 0, "truncated or not a safetensors file"),
        (b'{"a": \xff}', 0, "truncated or not a safetensors file"),
    ],
)
def test_a_header_that_is_wrong(tmp_path, header, data, message):
    source = Source(fake(tmp_path / "x.safetensors", header, bytes(data)))
    with pytest.raises(ff.CheckpointError, match=message):
        read_header(source)
    source.close()


@pytest.mark.parametrize(("length", "message"), [(1 << 40, "more than"), (5000, "in a file of"), (99, "in a file of")])
def test_a_header_of_a_wrong_length(tmp_path, length, message):
    with pytest.raises(ff.CheckpointError, match=message):
        open_weights(fake(tmp_path / "x.safetensors", {"a": entry()}, bytes(8), length))


def test_the_header_says_where_everything_is(folder):
    for path in sorted(folder.glob("*.safetensors")):
        source = Source(path)
        header, raw = read_header(source), path.read_bytes()
        for found in header.tensors.values():
            held = torch.frombuffer(bytearray(raw[found.start : found.stop]) or bytearray(4), dtype=torch.float32)
            loaded = __import__("safetensors.torch").torch.load_file(path)[found.name]
            assert torch.equal(held[: found.numel], loaded.view(-1))
        source.close()


def test_a_thousand_mutations(folder):
    """A changed byte in a header or an index is refused, or changes nothing in where tensors lie in whole files."""
    dice = random.Random(7)
    paths = [*sorted(folder.glob("*.safetensors")), folder / INDEX]
    refused = 0
    for _ in range(1000):
        path = dice.choice(paths)
        before = path.read_bytes()
        spoilt = bytearray(before)
        end = len(before) if path.name == INDEX else 8 + int.from_bytes(before[:8], "little")
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(min(end, len(spoilt)))
            kind = dice.random()
            if kind < 0.6:
                spoilt[at] = dice.randrange(256)
            elif kind < 0.8:
                del spoilt[at : at + dice.randint(1, 9)]
            else:
                spoilt[at:at] = bytes(dice.choices(b'0123456789{}[]",:.\\/-e', k=dice.randint(1, 4)))
        path.write_bytes(spoilt)
        try:
            found = open_weights(folder)
        except ff.CheckpointError as error:
            refused += 1
            assert str(error).startswith(str(folder))  # noqa: PT017
        else:
            for file, header in zip(found.files, found.headers, strict=True):
                ends = sorted((e.start, e.stop) for e in header.tensors.values())
                assert [header.data, *(stop for _, stop in ends)] == [*(start for start, _ in ends), file.size]
                assert file.path.parent == folder
            found.close()
        path.write_bytes(before)
    assert refused > 700
    open_weights(folder).close()


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b"]
)
def test_an_index_leads_nowhere_else(folder, name):
    other = write_model(folder.parent / "other", tensors("a"))
    assert other.exists()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ff.CheckpointError, match="expected the name of a file of that folder"):
        open_weights(folder)


def test_links_are_refused(folder, tmp_path):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    with pytest.raises(ff.CheckpointError, match="a symbolic link, to a file that others may use too"):
        open_weights(folder)


def test_what_is_missing_or_twice(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.rename(folder / "x")
    with pytest.raises(ff.CheckpointError, match=f"{path.name}: missing, and named by {INDEX}"):
        open_weights(folder)
    (folder / "x").rename(path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["z"] = path.name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ff.CheckpointError, match=f"names tensor 'z' in {path.name}, which does not hold it"):
        open_weights(folder)
    save_file(tensors("a", "c"), folder / index["weight_map"]["c"])
    with pytest.raises(ff.CheckpointError, match="tensor 'a' is in"):
        open_weights(folder)
    save_file(tensors("a"), folder / "model.safetensors")
    with pytest.raises(ff.CheckpointError, match="which of them"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], "a pickle, which is not read; convert it"),
        ([".metadata", "__0_0.distcp"], "a torch.distributed.checkpoint; convert it: `python -m torch.distributed"),
        (["config.json"], "no model: neither"),
        (["a.safetensors", "b.safetensors"], "2 .safetensors files without"),
    ],
)
def test_other_forms(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ff.CheckpointError, match=message):
        open_weights(tmp_path)


def test_a_pickle_and_nothing(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ff.CheckpointError, match="pickle"):
        open_weights(tmp_path / "model.pt")
    with pytest.raises(ff.CheckpointError, match="no such file or folder"):
        open_weights(tmp_path / "nothing")


def test_what_a_copy_takes_along(folder):
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "tokenizer.json", "flax.msgpack"):
        (folder / name).write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / ".git" / "blob").write_bytes(b"x")
    (folder / "link").symlink_to(folder / "tokenizer.json")
    found = open_weights(folder)
    assert {str(path) for path in found.others} == {
        "README.md", "config.json", "tokenizer.json", "tokenizer/vocab.txt", INDEX,
    }  # fmt: skip
    assert {str(path) for path in found.left} == {
        ".git", "link", "pytorch_model.bin", "consolidated.safetensors", "model.gguf", "flax.msgpack",
    }  # fmt: skip
    found.close()


# ---- names ----------------------------------------------------------------------------------------------------------


def named(tmp_path, disk, wanted, *, metadata=None, config=None, adapter=False, rename=None):
    folder = tmp_path / "named"
    folder.mkdir()
    if adapter:
        (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(config or {}))
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    save_file(tensors(*disk), folder / name, metadata)
    weights = open_weights(folder)
    try:
        return match(ModelEntry("m", folder, rename=rename or {}), wanted, weights)
    finally:
        weights.close()


@pytest.mark.parametrize(
    ("disk", "wanted", "more", "expected"),
    [
        (["model.a", "model.b"], ["a", "model.b"], {}, {"a": "model.a"}),
        (["a", "b"], ["model.a", "model.b"], {}, {"model.a": "a", "model.b": "b"}),
        (["a"], ["module.a"], {}, {"module.a": "a"}),
        (["base_model.model.x.w"], ["x.w"], {}, {"x.w": "base_model.model.x.w"}),
        (
            ["base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"],
            ["x.lora_A.default.weight", "base_model.model.x.lora_B.default.weight"],
            {"adapter": True},
            {
                "x.lora_A.default.weight": "base_model.model.x.lora_A.weight",
                "base_model.model.x.lora_B.default.weight": "base_model.model.x.lora_B.weight",
            },
        ),
        (["out"], ["in"], {"metadata": {"in": "out"}}, {"in": "out"}),
        (
            ["model.embed_tokens.weight", "x"],
            ["lm_head.weight"],
            {"config": {"tie_word_embeddings": True}},
            {"lm_head.weight": "model.embed_tokens.weight"},
        ),
        (
            ["lm_head.weight", "x"],
            ["model.embed_tokens.weight"],
            {"config": {"tie_word_embeddings": True}},
            {"model.embed_tokens.weight": "lm_head.weight"},
        ),
        (["a", "b"], ["a", "other"], {"rename": {"other": "b"}}, {"other": "b"}),
    ],
)
def test_names_are_found(tmp_path, disk, wanted, more, expected):
    assert named(tmp_path, disk, wanted, **more) == expected


@pytest.mark.parametrize(
    ("disk", "wanted", "more", "error", "message"),
    [
        (["encoder.weight"], ["encoder.wieght"], {}, ff.LayoutError, "near names: encoder.weight"),
        (["a"], ["lm_head.weight"], {}, ff.LayoutError, r"a table \[model.rename\] says which one"),
        (["a"], ["a", "b"], {"rename": {"b": "a"}}, ff.LayoutError, "'a' and 'b' of its Fisher both mean 'a'"),
        (["a"], ["b"], {"rename": {"b": "c"}}, ff.CheckpointError, "rename gives 'c' for 'b'"),
        (["module.a", "base_model.model.a"], ["a"], {}, ff.LayoutError, "no tensor 'a'"),
    ],
)
def test_names_that_mean_nothing_or_two_things(tmp_path, disk, wanted, more, error, message):
    with pytest.raises(error, match=message):
        named(tmp_path, disk, wanted, **more)
