"""Files beside models that anybody may have written: odd, malformed, long, mutated, too many."""

from __future__ import annotations

import json
import os
import random

import pytest
from llama_folders import model

import fiun_fast as ff
from fiun_fast import checkpoints
from fiun_fast.checkpoints import claims, lineage

ODD_CARDS = [
    ("base_model: [a", "README.md: is no valid YAML"),
    ("base_model: {a: 1}", "README.md: base_model is of type dict, expected a string"),
    ("base_model: [a, [5]]", "README.md: base_model is of type list, expected a string"),
    ("base_model: {? [a] : b}", "README.md: is no valid YAML"),
    ("base_model: *x", "README.md: is no valid YAML"),
    ("base_model: " + "[" * 800, "README.md: is no valid YAML"),
    ("base_model: &a [*a]", "README.md: is no valid YAML: found unconstructable recursive node"),
    ("base_model: " + "x" * 70_000, "README.md: has 70,012 characters of YAML, expected at most 32,768"),
    ("base_model: " + "x" * 2000, "README.md: names a model by 2,000 characters, expected at most 1,000"),
    ("base_model: [" + ",".join(f"m{k}" for k in range(200)) + "]", "README.md: names more than 64 models"),
    ("base_model: a\nbase_model_relation: [x]", "README.md: base_model_relation is of type list, expected a string"),
]


@pytest.mark.parametrize(("card", "says"), ODD_CARDS, ids=range(len(ODD_CARDS)))
def test_odd_cards(tmp_path, card, says):
    model(tmp_path / "base", 1)
    model(tmp_path / "odd", 2, card=card)
    found = checkpoints.tree(tmp_path)
    assert len(found["odd"].odd) == 1
    assert any(what in found["odd"].odd[0] for what in says.split("|"))
    assert "not read: odd: README.md" in str(found)


def test_nothing_of_a_card_is_called(tmp_path):
    model(tmp_path / "odd", 1, card=f"base_model: !!python/object/apply:os.mkdir [{tmp_path}/made]")
    (origin,) = checkpoints.tree(tmp_path)["odd"].unresolved
    assert origin.claim.base == f"{tmp_path}/made" and not (tmp_path / "made").exists()


def test_merge_keys_do_not_double(tmp_path):
    lines = ["a0: &a0 {model: x}", *(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}" for k in range(1, 60))]
    model(tmp_path / "odd", 1)
    (tmp_path / "odd" / "mergekit_config.yml").write_text("\n".join(lines))
    assert checkpoints.tree(tmp_path)["odd"].odd == []


def test_cards_that_are_long_or_have_no_head(tmp_path):
    rest = "".join(f"model-index-{k}:\n- a: {k}\n" for k in range(20_000))
    model(tmp_path / "base", 1)
    model(tmp_path / "a", 2, card=f"{rest}base_model:\n- base\n{rest}")
    model(tmp_path / "b", 3)
    (tmp_path / "b" / "README.md").write_text("# base_model: base\n---\nbase_model: base\n---\n")
    model(tmp_path / "c", 4)
    (tmp_path / "c" / "README.md").write_text("---\nbase_model: base\n")
    model(tmp_path / "d", 5)
    (tmp_path / "d" / "README.md").write_bytes(b'\xef\xbb\xbf---\r\n"base_model": base\r\n---\r\n')
    found = checkpoints.tree(tmp_path)
    assert set(found.edges) == {("base", "a"), ("base", "d")}
    assert found["c"].odd == ["README.md: its YAML head has no end"]


def test_odd_files(tmp_path):
    model(tmp_path / "a", 1)
    (tmp_path / "a" / "config.json").write_bytes(b"\xff{}")
    (tmp_path / "a" / "adapter_config.json").write_text("[" * 100_000)
    (tmp_path / "a" / "README.md").mkdir()
    (tmp_path / "a" / "mergekit_config.yml").symlink_to("mergekit_config.yml")
    model(tmp_path / "b", 2)
    with (tmp_path / "b" / "config.json").open("wb") as file:
        file.truncate(claims.LARGEST + 1)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "b" / "README.md")
    (tmp_path / "b" / "adapter_config.json").write_text("5")
    (tmp_path / "b" / "mergekit_config.yml").write_text("- a")
    found = checkpoints.tree(tmp_path)
    assert sorted(what.partition(":")[0] for what in found["a"].odd) == [
        "README.md", "adapter_config.json", "config.json", "mergekit_config.yml",
    ]  # fmt: skip
    assert "config.json: is not UTF-8 at byte 0" in found["a"].odd
    assert "adapter_config.json: is no valid JSON: nested too deeply" in found["a"].odd
    assert "config.json: is larger than 4 MiB" in found["b"].odd
    assert "adapter_config.json: is a JSON int, expected an object" in found["b"].odd
    assert "mergekit_config.yml: is no table" in found["b"].odd


def test_models_that_cannot_be_read_are_listed_with_the_reason(tmp_path):
    for name, data in (("short", b"abc"), ("header", b"\xff" * 64), ("cut", None)):
        model(tmp_path / name, 1)
        path = tmp_path / name / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-3] if data is None else data)
    model(tmp_path / "pickled", 2)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    model(tmp_path / "gone", 3, shards=2)
    (tmp_path / "gone" / "model-00002-of-00002.safetensors").unlink()
    found = checkpoints.tree(tmp_path)
    assert len(found) == 5
    for name, says in (
        ("short", "it has 3 bytes"),
        ("header", "a header of"),
        ("cut", "the file at"),
        ("pickled", "pickle"),
        ("gone", "missing"),
    ):
        assert says in found[name].odd[0], name
        assert f"{name}  not readable" in str(found)


def test_names_that_are_no_text_and_names_for_a_terminal(tmp_path):
    model(tmp_path / "base\x1b[31m[bold]\nx", 1)
    folder = tmp_path / os.fsdecode(b"odd\xff\xfe")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no such names on this file system")
    for path in model(tmp_path / "made", 2, card='base_model: "org/\\e[2Jx\\u202e"').iterdir():
        path.rename(folder / path.name)
    (tmp_path / "made").rmdir()
    found = checkpoints.tree(tmp_path)
    text = str(found)
    assert r"base\x1b[31m[bold]\nx" in text and r"odd\udcff\udcfe" in text and r"\x1b[2Jx\u202e" in text
    assert text.encode().isascii() is False and "\x1b" not in text and "\u202e" not in text
    json.dumps(found.to_dict())
    checkpoints.write_tree(found, tmp_path / "tree.toml")
    assert "its name is not UTF-8" in (tmp_path / "tree.toml").read_text(encoding="utf-8")


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(ff.CheckpointError, match=f"{name}: no such folder"):
            checkpoints.tree(tmp_path / name)
    for bad in ("", "a\0b", 5, None):
        with pytest.raises(ff.ArgumentError, match="path is"):
            checkpoints.tree(bad)
    found = checkpoints.tree(tmp_path)
    assert (len(found), found.shared, str(found)) == (0, [], f"{tmp_path.name}: 0 models")


def test_too_many(tmp_path, monkeypatch):
    for k in range(4):
        model(tmp_path / f"m{k}", k)
    monkeypatch.setattr(lineage, "MOST_MODELS", 3)
    with pytest.raises(ff.CheckpointError, match="more than 3 models; name a folder further down"):
        checkpoints.tree(tmp_path)
    monkeypatch.setattr(lineage, "MOST_FOLDERS", 2)
    with pytest.raises(ff.CheckpointError, match="more than 2 folders; name one further down"):
        checkpoints.tree(tmp_path)


PIECES = [
    b"---\n",
    b"base_model",
    b": ",
    b"- ",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"'",
    b"&a ",
    b"*a",
    b"!!set ",
    b"\n",
    b"\t",
    b"\x00",
]
PIECES += [
    b"\xff",
    b"null",
    b"~",
    b"1e999",
    b"9" * 400,
    b"? ",
    b"<<: ",
    b"|",
    b">",
    b"%YAML 9",
    b"\xe2\x80\xa8",
    b"model: ",
    b"b" * 2000,
]


@pytest.mark.parametrize("name", ["README.md", "config.json", "adapter_config.json", "mergekit_config.yml"])
def test_mutated_files_never_stop_it(tmp_path, name):
    """Whatever the four files hold: a lineage, which can be printed."""
    model(tmp_path / "base", 1)
    folder = model(tmp_path / "odd", 2)
    whole = {
        "README.md": b"---\nlicense: mit\nbase_model:\n- base\n- 'org/x'\nbase_model_relation: merge\n---\ntext\n",
        "config.json": b'{"_name_or_path": "org/base", "x": {"y": [1, 2.5, null, "\\u1234"]}}',
        "adapter_config.json": b'{"base_model_name_or_path": "../base", "r": 8}',
        "mergekit_config.yml": b"models:\n  - model: base\n    parameters: {w: 0.5}\nbase_model: &b base\nagain: *b\n",
    }[name]
    dice = random.Random(name)
    outcomes = set()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(dice.choice((0, 1, 1, 2, 5))):
            at = dice.randrange(len(data) + 1)
            what = dice.randrange(3)
            if what == 0 and at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            elif what == 1:
                del data[at : at + dice.choice((1, 7, 60))]
            else:
                data[at:at] = dice.choice(PIECES) * dice.choice((1, 1, 3, 300))
        (folder / name).write_bytes(data)
        found = checkpoints.tree(tmp_path)
        assert "\x1b" not in str(found)
        outcomes.add((found.edges == [("base", "odd")], bool(found["odd"].odd)))
    assert {(True, False), (False, True)} <= outcomes
