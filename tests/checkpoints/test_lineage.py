"""Lineage as it is written down beside models: who is meant and what is alike."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import llama_folders as llama
import pytest
import torch
from llama_folders import model, small
from safetensors.torch import save_file

import fiun_fast as ff
from fiun_fast import checkpoints
from fiun_fast.checkpoints import alike


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A base in shards, two fine-tunes, a merge, an adapter, a copy, a stranger with a tensor of it."""
    root, base = tmp_path / "models", llama.tensors(0, torch.bfloat16)
    llama.write(root / "llama", base, shards=2, config={"_name_or_path": "meta/llama"})
    chat = {name: tensor + 1 if "mlp" in name else tensor for name, tensor in base.items()}
    llama.write(
        root / "chat", chat, card="license: mit\nbase_model: meta/llama\nbase_model_relation: finetune\ntags:\n- x"
    )
    llama.write(root / "acme--code", llama.tensors(3, torch.bfloat16), card="base_model:\n- meta/llama")
    llama.write(root / "merged", llama.tensors(4))
    recipe = "models:\n  - model: ../chat\n  - model: acme/code\nbase_model: meta/llama\nmerge_method: ties\n"
    (root / "merged" / "mergekit_config.yml").write_text(recipe)
    (root / "lora").mkdir()
    save_file({"base_model.model.q.lora_A.weight": torch.randn(4, 16)}, root / "lora" / "adapter_model.safetensors")
    (root / "lora" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/x/chat"}))
    shutil.copytree(root / "llama", root / "copy of llama")
    strange = {**llama.tensors(9, torch.bfloat16), "head": base["lm_head.weight"]}
    llama.write(root / "stranger", strange, card="base_model: someone/absent")
    return root


def test_a_family(family):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in family.rglob("*") if path.is_file()}
    found = checkpoints.tree(family)
    assert {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in family.rglob("*") if path.is_file()
    } == before
    edges = {(parent, child) for parent, child in found.edges}
    assert edges == {
        ("llama", "chat"), ("llama", "acme--code"), ("llama", "copy of llama"), ("llama", "merged"), ("chat", "merged"),
        ("acme--code", "merged"), ("chat", "lora"),
    }  # fmt: skip
    names = list(found.models)
    assert all(names.index(parent) < names.index(child) for parent, child in edges)
    assert found["lora"].adapter and not found["chat"].adapter
    size = sum(path.stat().st_size for path in (family / "llama").glob("*.safetensors"))
    assert (found["llama"].size, found["llama"].tensors) == (size, 21)
    assert found["llama"].dtypes == {"BF16": sum(torch.Size(shape).numel() for shape in llama.shapes().values())}
    (stranger,) = found["stranger"].unresolved
    assert (stranger.claim.base, stranger.claim.source) == ("someone/absent", "README.md")
    whole = [(pair.first, pair.second) for pair in found.shared if pair.whole]
    assert whole == [("llama", "copy of llama")]
    kept = [name for name in llama.shapes() if "mlp" not in name and "norm" not in name]
    with_chat = next(pair for pair in found.shared if {pair.first, pair.second} == {"llama", "chat"})
    numel = sum(torch.Size(shape).numel() for name, shape in llama.shapes().items() if "mlp" not in name)
    assert with_chat.size == 2 * numel and with_chat.tensors >= len(kept)
    json.dumps(found.to_dict())
    with pytest.raises(ff.CheckpointError, match="no model 'nobody' in .*; models: "):
        found["nobody"]


def test_what_is_printed(family):
    text = str(checkpoints.tree(family))
    lines = text.split("\n")
    assert lines[0] == "models: 7 models"
    for line in (
        "├── llama  12.5 kB, 21 tensors, BF16",
        "│   ├── chat  finetune, 12.5 kB, 21 tensors, BF16, 56% of its bytes as in llama",
        "│   │   ├── lora  adapter, 360 bytes, 1 tensor, F32",
        "│   │   └── merged, which is at llama",
        "│   └── merged  merge, 22.9 kB, 21 tensors, F32, also from chat, acme--code",
        "same weights: llama and copy of llama",
        "in common: llama and stranger have 1 tensor, 12% of the smaller one's bytes; no file says that they are "
        "related",
        "not resolved: stranger came from someone/absent (README.md): no folder of that name here",
    ):
        assert line in lines, text


# ---- who is meant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "folder", "meant"),
    [
        ("org/base", "base", True),
        ("org/base", "org/base", True),
        ("org/base", "org--base", True),
        ("Org/BASE", "org/base", True),
        ("org/base@main", "base", True),
        ("../base", "base", True),
        ("./base/", "base", True),
        ("base", "base", True),
        ("/somewhere/else/base", "base", True),
        ("C:\\models\\base", "base", True),
        ("{root}/base", "base", True),
        ("{root}/x/../base", "base", True),
        ("base", "base.safetensors", True),
        ("other/bases", "base", False),
        ("org", "org--base", False),
        ("base/org", "base", False),
        ("..", "base", False),
        ("child", "base", False),
        ("", "base", False),
        ("~", "base", False),
    ],
)
def test_who_is_meant(tmp_path, said, folder, meant):
    if folder.endswith(".safetensors"):
        save_file(small(1), tmp_path / folder)
    else:
        model(tmp_path / folder, 1)
    (tmp_path / "x").mkdir()
    model(
        tmp_path / "child", 2, card="base_model: " + (said if said == "~" else json.dumps(said.format(root=tmp_path)))
    )
    found = checkpoints.tree(tmp_path)
    assert found.edges == ([(folder, "child")] if meant else [])
    assert len(found["child"].unresolved) == (not meant and said not in ("", "~"))


def test_the_better_match_wins_and_ties_are_not_guessed(tmp_path):
    for name in ("a/org/base", "b/org/base", "other/base"):
        model(tmp_path / name, len(name))
    model(tmp_path / "child", 7, card="base_model: org/base")
    (origin,) = checkpoints.tree(tmp_path)["child"].unresolved
    assert origin.why == "may be a/org/base, b/org/base"
    shutil.rmtree(tmp_path / "b")
    assert checkpoints.tree(tmp_path).edges == [("a/org/base", "child")]
    model(tmp_path / "b" / "org" / "base", 5)
    model(tmp_path / "b" / "child", 7, card="base_model: base")  # each collection has its own
    assert ("b/org/base", "b/child") in checkpoints.tree(tmp_path).edges


def test_what_config_says_counts_last(tmp_path):
    model(tmp_path / "base", 1, config={"_name_or_path": "org/base"})
    model(tmp_path / "chat", 2, config={"_name_or_path": "org/base"})
    model(tmp_path / "tuned", 3, config={"_name_or_path": "/x/base"}, card="base_model: org/chat")
    model(tmp_path / "lost", 4, config={"_name_or_path": "../base"}, card="base_model: org/absent")
    model(tmp_path / "odd", 5, config={"_name_or_path": 7})
    found = checkpoints.tree(tmp_path)
    assert set(found.edges) == {("base", "chat"), ("chat", "tuned"), ("base", "lost")}
    assert [o.claim.base for o in found["lost"].unresolved] == ["org/absent"]
    assert found["base"].unresolved == []
    assert found["odd"].odd == ["config.json: _name_or_path is of type int, expected a string"]


def test_folders_of_the_hub_cache(tmp_path):
    """Snapshots whose files are links to blobs: read, though they are not to be written."""
    for k, (name, card) in enumerate((("org--base", None), ("me--chat", "base_model: org/base"))):
        made = model(tmp_path / "made" / name, k, card=card)
        repo = tmp_path / "hub" / f"models--{name}"
        (repo / "blobs").mkdir(parents=True)
        (repo / "snapshots" / "0123abc").mkdir(parents=True)
        for path in made.iterdir():
            blob = repo / "blobs" / f"{path.name[::-1].replace('.', '')}"
            shutil.copy(path, blob)
            (repo / "snapshots" / "0123abc" / path.name).symlink_to(
                os.path.relpath(blob, repo / "snapshots" / "0123abc")
            )
    found = checkpoints.tree(tmp_path / "hub")
    base, chat = (f"models--{name}/snapshots/0123abc" for name in ("org--base", "me--chat"))
    assert found.edges == [(base, chat)]
    assert found[base].tensors == 2


def test_links_to_folders(tmp_path):
    """A link to a model elsewhere is one; links in a circle, to what is found anyway, or to the root lead nowhere."""
    model(tmp_path / "elsewhere" / "base", 1)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "base").symlink_to(tmp_path / "elsewhere" / "base")
    model(tmp_path / "here" / "chat", 2, card="base_model: x/base")
    for name, target in (
        ("loop", "."),
        ("up", ".."),
        ("root", "/"),
        ("twice", "chat"),
        ("dangling", "nowhere"),
        ("self", "self"),
    ):
        (tmp_path / "here" / name).symlink_to(target)
    found = checkpoints.tree(tmp_path / "here")
    assert list(found.models) == ["base", "chat"]
    assert found.edges == [("base", "chat")]


@pytest.mark.parametrize(
    ("recipe", "parents"),
    [
        ("slices:\n- sources:\n  - model: a\n    layer_range: [0, 2]\n  - model: b\n", ["a", "b"]),
        ("models:\n- model: org/a+b\n- model: {model: {path: c}, lora: b}\nbase_model: d\n", ["a", "b", "c", "d"]),
        ("modules:\n  text_decoder:\n    models: [{model: {path: a}}]\n", ["a"]),
        ("base_model: a\nexperts:\n- source_model: b\n  positive_prompts: [x]\n", ["a", "b"]),
        ("models: &m\n- model: a\nagain: *m\n", ["a"]),
        ("x: 1\n", []),
    ],
)
def test_merge_recipes(tmp_path, recipe, parents):
    for name in "abcd":
        model(tmp_path / name, ord(name))
    model(tmp_path / "merged", 9)
    name = "mergekit_moe_config.yml" if "experts" in recipe else "mergekit_config.yml"
    (tmp_path / "merged" / name).write_text(recipe)
    found = checkpoints.tree(tmp_path)
    assert sorted(found["merged"].parents) == parents
    assert found["merged"].odd == []
    assert {o.claim.relation for o in found["merged"].origins} <= {"merge"}


@pytest.mark.parametrize("seed", range(4))
def test_random_families(tmp_path, seed):
    """Any DAG, written down in any of the ways: the same DAG."""
    dice = random.Random(seed)
    names = [f"m{k}" for k in range(12)]
    edges = set()
    for k, name in enumerate(names):
        parents = dice.sample(names[:k], dice.randrange(min(k, 3) + 1))
        folder = model(tmp_path / dice.choice(["", "sub", "sub/org"]) / name, k)
        edges |= {(parent, name) for parent in parents}
        said = [dice.choice([parent, f"org/{parent}", f"/data/{parent}", f"{parent}@v1"]) for parent in parents]
        how = dice.randrange(4) if len(said) == 1 else dice.randrange(2)
        if how == 0:
            text = f"---\ntags: [x]\nbase_model: {json.dumps(said)}\nlicense: mit\n---\n"
            (folder / "README.md").write_text(text)
        elif how == 1:
            models = "".join(f"- model: {json.dumps(one)}\n" for one in said)
            (folder / "mergekit_config.yml").write_text(f"merge_method: linear\nmodels:\n{models}")
        elif how == 2:
            (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": said[0]}))
        else:
            (folder / "config.json").write_text(json.dumps({"_name_or_path": said[0]}))
    found = checkpoints.tree(tmp_path)
    assert {(a.rpartition("/")[2], b.rpartition("/")[2]) for a, b in found.edges} == edges
    assert len(found) == len(names)
    assert all(f"m{k}" in str(found) for k in range(12))


def test_circles_are_opened_at_the_weakest_claim(tmp_path):
    model(tmp_path / "a", 1, config={"_name_or_path": "c"})
    model(tmp_path / "b", 2, card="base_model: a")
    model(tmp_path / "c", 3, card="base_model: b")
    found = checkpoints.tree(tmp_path)
    assert found.edges == [("a", "b"), ("b", "c")]
    assert "a circle; that a came from c is left out" in found.odd[0]
    (tmp_path / "a" / "README.md").write_text("---\nbase_model: [c, b]\n---\n")
    found = checkpoints.tree(tmp_path)
    assert len(found.odd) == 2 and len(found.edges) >= 2
    assert "left out" in str(found)


# ---- what is alike --------------------------------------------------------------------------------------------------


def test_samples_are_not_taken_for_the_whole(tmp_path):
    size = alike.BLOCK * alike.BLOCKS * 4
    tensor = torch.randint(1 << 30, (size,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    other = tensor.clone()
    other[alike.BLOCK // 4 + 5] += 1  # right behind the first block
    for name, one in (("a", tensor), ("b", other), ("c", tensor)):
        llama.write(tmp_path / name, {"w": one})
    pairs = {(p.first, p.second): p.whole for p in checkpoints.tree(tmp_path).shared}
    assert pairs == {("a", "c"): True}
    found = checkpoints.tree(tmp_path, full=False)
    assert {(p.first, p.second): p.whole for p in found.shared} == dict.fromkeys(
        [("a", "b"), ("a", "c"), ("b", "c")], True
    )
    assert "same weights: a and b (by their samples)" in str(found)
    seen = []
    checkpoints.tree(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4 * size, 12 * size), (8 * size, 12 * size), (12 * size, 12 * size)]


def test_what_says_nothing_is_no_likeness(tmp_path):
    """Zeros and ones, empty tensors; and the same numbers in another dtype or shape."""
    dice = torch.Generator().manual_seed(1)
    number = torch.randn(6, 4, generator=dice)
    plain = {"ones": torch.ones(5000), "zeros": torch.zeros(3, 3), "none": torch.zeros(0, 2), "one": torch.tensor(2.0)}
    llama.write(tmp_path / "a", {"x": torch.randn(5, generator=dice), "w": number, **plain})
    llama.write(tmp_path / "b", {"x": torch.randn(5, generator=dice), "w": number.reshape(4, 6), **plain})
    llama.write(tmp_path / "c", {"x": torch.randn(5, generator=dice), "w": number.view(torch.int32), **plain})
    assert checkpoints.tree(tmp_path).shared == []
    llama.write(tmp_path / "d", {"another name": number})
    (pair,) = checkpoints.tree(tmp_path).shared
    assert (pair.first, pair.second, pair.tensors, pair.size, pair.whole) == ("a", "d", 1, number.nbytes, True)


@pytest.mark.parametrize("seed", range(3))
def test_random_likeness(tmp_path, seed):
    """Against comparing every tensor with every other."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pool = [torch.randn(dice.choice([(40, 1000), (7,), (300, 9)]), generator=generator) for _ in range(8)]
    pool += [one.clone() for one in pool]
    for one in pool[8:]:
        one.view(-1)[dice.randrange(one.numel())] += 1
    held = {f"m{k}": [tensor.clone() for tensor in dice.sample(pool, 6)] for k in range(5)}
    for name, tensors in held.items():
        llama.write(tmp_path / name, {f"t{k}": tensor for k, tensor in enumerate(tensors)}, shards=dice.randint(1, 2))
    found = {frozenset((p.first, p.second)): (p.tensors, p.size) for p in checkpoints.tree(tmp_path).shared}
    for a, b in [(a, b) for a in held for b in held if a < b]:
        same = [x for x in held[a] if any(x.shape == y.shape and torch.equal(x, y) for y in held[b])]
        expected = (len(same), sum(x.nbytes for x in same)) if same else None
        assert found.get(frozenset((a, b))) == expected


def test_hard_links_are_read_once(tmp_path):
    model(tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a").iterdir():
        os.link(path, tmp_path / "b" / path.name)
    seen = []
    found = checkpoints.tree(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert [pair.whole for pair in found.shared] == [True]
    assert seen[-1] == (sum(t.nbytes for t in small(1).values()),) * 2


# ---- a file to begin with -------------------------------------------------------------------------------------------


def test_the_file_that_is_written_can_be_read_once_fishers_are_there(family, tmp_path):
    found = checkpoints.tree(family)
    llama.fisher(0).save(family / "llama.fisher", shard_size=3000)
    found = checkpoints.tree(family)
    assert found["llama"].fisher == family / "llama.fisher"
    path = tmp_path / "tree.toml"
    checkpoints.write_tree(found, path)
    text = path.read_text(encoding="utf-8")
    assert "# came from someone/absent (README.md): no folder of that name here" in text
    assert 'fisher = "chat.fisher"  # to be made' in text
    with pytest.raises(ff.TreeFileError, match="fisher is '.*.fisher', where nothing is"):
        checkpoints.read_tree(path)
    for name in [*found.models, "forget"]:
        llama.fisher(1).save(tmp_path / f"{name}.fisher")
    tree = checkpoints.read_tree(path)
    assert {(parent, m.name) for m in tree.models for parent in m.parents} == set(found.edges)
    assert {m.name: m.path.resolve() for m in tree.models} == {one.name: one.path for one in found}
    assert tree.models[0].fisher.resolve() == family / "llama.fisher"
    with pytest.raises(ff.FileWriteError, match=r"tree.toml: not written: it is there already"):
        checkpoints.write_tree(found, path)
    assert path.read_text(encoding="utf-8") == text


def test_names_in_it_are_names_of_folders(tmp_path):
    for k, name in enumerate(["a/chat", "b/chat", "b/Chat 2", 'quo"te', "tab\tname", "ü"]):
        model(tmp_path / "models" / name, k)
    save_file(small(8), tmp_path / "models" / "single.safetensors")
    found = checkpoints.tree(tmp_path / "models")
    checkpoints.write_tree(found, tmp_path / "tree.toml")
    for one in found:
        name = {"a/chat": "a-chat", "b/chat": "b-chat", "b/Chat 2": "Chat 2", "single.safetensors": "single"}.get(
            one.name
        )
        llama.fisher(0).save(tmp_path / f"{name or one.name}.fisher")
    llama.fisher(1).save(tmp_path / "forget.fisher")
    tree = checkpoints.read_tree(tmp_path / "tree.toml")
    assert {m.name for m in tree.models} == {"a-chat", "b-chat", "Chat 2", 'quo"te', "tab\tname", "ü", "single"}
    assert {m.path.resolve() for m in tree.models} == {one.path for one in found}
