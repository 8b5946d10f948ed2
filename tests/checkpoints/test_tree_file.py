"""The TOML file of a family: what it says as a Tree, and errors that name file, table, key, expected and found."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

import fiun_fast as ff
from fiun_fast.checkpoints.tree_file import read_tree

WHOLE = """
alpha = 5
lam = 0.5
exponent = 2.0
cap = 0.75
merge = "sum"
scale = 3

[rename]
"lm_head.weight" = "model.embed_tokens.weight"

[[model]]
name = "chat"
path = "models/chat"
fisher = "chat.fisher"
parents = ["base", "other base"]
alpha = 2.5
lam = 0

[model.rename]
"a.weight" = "b.weight"
"lm_head.weight" = "head"

[[model]]
name = "base"
path = "models/base"
fisher = "base.fisher"

[[model]]
name = "other base"
path = "../elsewhere.safetensors"

[[forget]]
origin = "base"
fisher = "alice.fisher"

[[forget]]
origin = "chat"
fisher = "alice.fisher"
weight = 0.25
"""

FORGET = WHOLE[WHOLE.index("[[forget]]") :].partition('[[forget]]\norigin = "chat"')[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "place"
    for name in ("models/chat", "models/base"):
        (place / name).mkdir(parents=True)
    for name in ("chat.fisher", "base.fisher", "alice.fisher", "../elsewhere.safetensors"):
        (place / name).touch()
    return place


def write(folder: Path, text: str) -> Path:
    (folder / "tree.toml").write_text(text, encoding="utf-8")
    return folder / "tree.toml"


def test_a_whole_file(folder):
    tree = read_tree(write(folder, WHOLE))
    assert (tree.alpha, tree.lam, tree.exponent, tree.cap, tree.merge, tree.scale) == (5.0, 0.5, 2.0, 0.75, "sum", 3.0)
    assert all(type(number) is float for number in (tree.alpha, tree.scale))
    base, other, chat = tree.models
    assert (base.name, base.path, base.fisher) == ("base", folder / "models/base", folder / "base.fisher")
    assert (base.parents, base.alpha, base.lam) == ((), None, None)
    assert base.rename == {"lm_head.weight": "model.embed_tokens.weight"}
    assert (other.name, other.path.resolve(), other.fisher) == (
        "other base",
        folder.parent / "elsewhere.safetensors",
        None,
    )
    assert (chat.parents, chat.alpha, chat.lam) == (("base", "other base"), 2.5, 0.0)
    assert chat.rename == {"a.weight": "b.weight", "lm_head.weight": "head"}
    assert [(f.origin, f.fisher, f.weight) for f in tree.forget] == [
        ("base", folder / "alice.fisher", 1.0),
        ("chat", folder / "alice.fisher", 0.25),
    ]
    assert tree.source == folder / "tree.toml"
    assert read_tree(str(folder / "tree.toml")) == read_tree(os.fsencode(folder / "tree.toml")) == tree


def test_what_is_left_out_has_the_values_of_a_plan(folder):
    text = WHOLE[WHOLE.index('[[model]]\nname = "base"') : WHOLE.index('[[model]]\nname = "other')] + FORGET
    tree = read_tree(write(folder, text))
    assert (tree.alpha, tree.lam, tree.exponent, tree.cap, tree.merge, tree.scale) == (10, 1, 1, 1, "max", 1)


WRONG = [  # what is replaced in WHOLE, by what, and the error
    ("alpha = 5", "alfa = 5", r"unknown key 'alfa'; near names: alpha.*; known are alpha, lam, exponent"),
    ("alpha = 2.5", "alhpa = 2.5", r"\[\[model\]\] 1: unknown key 'alhpa'; near names: alpha.*; known are name, path"),
    ("weight = 0.25", "wieght = 1", r"\[\[forget\]\] 2: unknown key 'wieght'; near names: weight"),
    ("alpha = 5", "alpha = -5", r"tree.toml: alpha is -5.0, expected a finite number that is not negative"),
    ("alpha = 5", "alpha = nan", r"tree.toml: alpha is nan, expected a finite number"),
    ("alpha = 5", f"alpha = 1{'0' * 400}", r"tree.toml: alpha is too large for a float, expected a finite number"),
    ("alpha = 5", 'alpha = "auto"', r"tree.toml: alpha is a string, expected a number that is not negative"),
    ("alpha = 5", "alpha = true", r"tree.toml: alpha is a boolean, expected a number"),
    ("alpha = 5", "alpha = 2020-01-01", r"tree.toml: alpha is a date or time, expected a number"),
    ("alpha = 2.5", "alpha = []", r"\[\[model\]\] 'chat': alpha is an array, expected a number"),
    ("lam = 0\n", "lam = inf\n", r"\[\[model\]\] 'chat': lam is inf, expected a finite number"),
    ("weight = 0.25", "weight = -1", r"\[\[forget\]\] 2: weight is -1.0, expected a finite number"),
    ('merge = "sum"', 'merge = "median"', r"tree.toml: merge is 'median', expected one of max, mean, sum"),
    ('merge = "sum"', "merge = 1", r"tree.toml: merge is 1, expected one of max, mean, sum"),
    ('name = "base"', "name = 7", r"\[\[model\]\] 2: name is an integer, expected a string"),
    ('name = "base"\n', "", r"\[\[model\]\] 2: name is missing, expected a string"),
    ('name = "base"', 'name = " "', r"\[\[model\]\] 2: name is empty, expected a string"),
    ('name = "base"', 'name = "chat"', r"\[\[model\]\] 'chat': name is there twice, expected another for each model"),
    ('name = "base"', 'name = "../base"', r"name is '../base', expected what a folder can be called"),
    ('name = "base"', 'name = ".."', r"name is '..', expected what a folder can be called"),
    ('path = "models/base"\n', "", r"\[\[model\]\] 'base': path is missing, expected a string"),
    ('path = "models/base"', 'path = "model/base"', r"'base': path is 'model/base', where nothing is: .*model/base"),
    ('path = "models/base"', 'path = "a\\u0000b"', r"'base': path is 'a\\x00b', where nothing is"),
    ('path = "models/base"', f'path = "{"x" * 5000}"', r"'base': path is 'xxx.*, where nothing is"),
    ('path = "models/base"', 'path = "models/chat"', r"'base': path is that of 'chat' too, expected another for each"),
    ('fisher = "base.fisher"', 'fisher = "basis.fisher"', r"'base': fisher is 'basis.fisher', where nothing is"),
    ('fisher = "base.fisher"\n', "", r"'base': fisher is missing, .*: \[\[forget\]\] 1 at 'base' reaches it"),
    ('fisher = "chat.fisher"\n', "", r"'chat': fisher is missing, .*: \[\[forget\]\] 1 at 'base' reaches it"),
    ('["base", "other base"]', '"base"', r"parents is a string, expected an array of strings, such as"),
    ('["base", "other base"]', '["base", 5]', r"'chat': parents hold an integer, expected an array of strings"),
    ('["base", "other base"]', '["bass"]', r"parents name 'bass', which is no model; near names: base, other"),
    ('["base", "other base"]', '["base", "base"]', r"'chat': parents name 'base' twice, expected each once"),
    ('["base", "other base"]', '["chat"]', r"'chat': parents go in a circle: chat -> chat"),
    ('"models/base"\n', '"models/base"\nparents = ["chat"]\n', r"parents go in a circle: (chat -> )?base -> chat"),
    ('origin = "base"', 'origin = "bse"', r"\[\[forget\]\] 1: origin is 'bse', which is no model; near names: base"),
    ('origin = "chat"', 'origin = "base"', r"\[\[forget\]\] 2: fisher is that of \[\[forget\]\] 1 too, at one origin"),
    ('"a.weight" = "b.weight"', '"a.weight" = 5', r"'chat': rename: 'a.weight' is an integer, expected the"),
    ('"a.weight" = "b.weight"', '"a.weight" = "head"', r"rename: 'lm_head.weight' is 'head', as 'a.weight' is"),
    ("[model.rename]", "[[model.rename]]", r"'chat': rename is an array, expected a table of names"),
    ("[[model]]", "[model]", r"no valid TOML"),
    ("lam = 0.5", "alpha = 0.5", r"no valid TOML: .*alpha|no valid TOML: Cannot overwrite a value"),
    ("alpha = 5", "alpha =", r"no valid TOML: .*line 2"),
    (WHOLE, "", r"tree.toml: model is missing, expected at least one \[\[model\]\]"),
    (WHOLE, "model = []", r"tree.toml: model is empty, expected at least one \[\[model\]\]"),
    (WHOLE, "model = [1]", r"tree.toml: model holds an integer at 1, expected \[\[model\]\] tables"),
    (WHOLE, "model = 1", r"tree.toml: model is an integer, expected at least one \[\[model\]\]"),
    (WHOLE, WHOLE.partition("[[forget]]")[0], r"tree.toml: forget is missing, expected at least one \[\[forget\]\]"),
    (WHOLE, "x = " + "[" * 100_000, r"no valid TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named(folder, old, new, message):
    assert old in WHOLE
    with pytest.raises(ff.TreeFileError, match=message) as raised:
        read_tree(write(folder, WHOLE.replace(old, new, 1)))
    assert str(raised.value).startswith(f"{folder / 'tree.toml'}: ")


def test_files_that_are_none(folder):
    with pytest.raises(ff.TreeFileError, match="nowhere.toml: no such file; expected a TOML file"):
        read_tree(folder / "nowhere.toml")
    with pytest.raises(ff.TreeFileError, match="models: no such file"):
        read_tree(folder / "models")
    (folder / "tree.toml").write_bytes(WHOLE.encode() + b"\xff")
    with pytest.raises(ff.TreeFileError, match=f"no valid TOML: not UTF-8 at byte {len(WHOLE.encode())}"):
        read_tree(folder / "tree.toml")
    with (folder / "large.toml").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ff.TreeFileError, match="large.toml: .* bytes, expected a TOML file of at most"):
        read_tree(folder / "large.toml")
    for bad in ("", "a\0b", 5, None):
        with pytest.raises(ff.ArgumentError, match="path is"):
            read_tree(bad)


@pytest.mark.parametrize("seed", range(3))
def test_parents_come_first_in_random_families(folder, seed):
    """Any order in the file; models that do not depend on each other keep that order."""
    dice = random.Random(seed)
    names = [f"m{k}" for k in range(20)]
    parents = {name: dice.sample(names[:k], min(k, dice.randrange(3))) for k, name in enumerate(names)}
    shuffled = dice.sample(names, len(names))
    lines = []
    for name in shuffled:
        (folder / name).mkdir()
        lines += [
            "[[model]]",
            f"name = '{name}'",
            f"path = '{name}'",
            f"parents = {parents[name]}",
            "fisher = 'base.fisher'",
        ]
    lines += ["[[forget]]", "origin = 'm0'", "fisher = 'alice.fisher'"]
    tree = read_tree(write(folder, "\n".join(lines)))
    found = [model.name for model in tree.models]
    assert sorted(found) == sorted(names)
    for model in tree.models:
        assert list(model.parents) == parents[model.name]
        assert all(found.index(parent) < found.index(model.name) for parent in model.parents)
    ready: list[str] = []
    for name in found:  # each is the first of the file's order that could have come
        could = [n for n in shuffled if n not in ready and set(parents[n]) <= set(ready)]
        assert name == could[0]
        ready.append(name)


def test_mutated_files_are_refused_or_read(folder):
    dice = random.Random(17)
    whole = WHOLE.encode()
    outcomes = {"read": 0, "refused": 0}
    odd = b'[[ ]] = " { } \x00 \xff 1e999 inf'.split()
    words = [*re.findall(rb"\S+", whole), *odd, b"[" * 500]
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 1, 2, 4))):
            at = dice.randrange(len(data))
            what = dice.randrange(4)
            if what == 0:
                data[at] ^= 1 << dice.randrange(8)
            elif what == 1:
                del data[at : at + dice.choice((1, 5, 40))]
            else:
                data[at : at + dice.choice((0, 1, 8))] = dice.choice(words)
        (folder / "tree.toml").write_bytes(data)
        try:
            tree = read_tree(folder / "tree.toml")
        except ff.TreeFileError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert {request.origin for request in tree.forget} <= {model.name for model in tree.models}
        assert all(0 <= n < float("inf") for n in (tree.alpha, tree.lam, tree.exponent, tree.cap, tree.scale))
    assert min(outcomes.values()) > 20, outcomes
