"""Random families as TOML files, by the command line, against the textbook chain in numpy: every bit, every count."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import llama_folders as llama
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fiun_fast as ff
from fiun_fast import cli

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::fiun_fast.ProvenanceWarning")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WORDS = [f"{a}{b}" for a in ("base", "chat", "code", "my model", "x.y", "ü") for b in ("", "-1", "_2")]


def chain(theta, original, forgets, weights, wide, *, alpha, lam, exponent, cap, merge, scale):
    """docs/semantics.md in numpy, one rounding a step: new values, the product in `wide`; and which are selected."""
    kind = original.dtype.type
    with np.errstate(all="ignore"):
        weighed = [f if w == 1 else f * kind(w) for f, w in zip(forgets, weights, strict=True)]
        m = weighed[0]
        for other in weighed[1:]:
            m = np.maximum(m, other) if merge == "max" else m + other
        if merge == "mean" and len(weighed) > 1:
            m = m / kind(len(weighed))
        if scale != 1:
            m = m * kind(scale)
        selected = m > original * kind(alpha)
        ratio = original * kind(lam) / m
        factor = np.minimum(ratio if exponent == 1 else ratio ** kind(exponent), kind(cap))
        return theta.astype(wide) * factor.astype(wide), selected


def numbers(dice: np.random.Generator, count: int, dtype: type) -> np.ndarray:
    """Fisher entries over many decades; zeros, and some that are denormal."""
    found = np.exp2(dice.uniform(-18, 4, count)).astype(dtype)
    found[dice.random(count) < 0.04] = 0
    found[dice.random(count) < 0.02] *= 1e-38
    return found


class Family:
    """What is on disk, the TOML file, and what is to come out."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.dice, self.numbers = root, random.Random(seed), np.random.default_rng(seed)
        dice = self.dice
        self.fisher_dtype = dice.choice((np.float32, np.float32, np.float64))
        self.rounded = self.fisher_dtype is np.float32 and dice.random() < 0.3
        self.shapes = {
            **{f"model.layers.{k}.mlp.weight": (dice.randint(1, 30), dice.randint(1, 50)) for k in range(4)},
            "model.norm.weight": (dice.randint(1, 700),), "lm_head.weight": (7, dice.randint(1, 9)), "model.scale": (),
        }  # fmt: skip
        self.top = {
            "alpha": dice.choice((0.3, 1, 2.5)), "lam": dice.choice((1, 0.5, 3.0)), "cap": dice.choice((1, 1, 0.5)),
            "scale": dice.choice((1, 1, 0.75)), "merge": dice.choice(("max", "max", "sum", "mean")),
        }  # fmt: skip
        self.names = dice.sample(WORDS, dice.randint(2, 5))
        self.parents = {n: dice.sample(self.names[:k], dice.randint(0, min(k, 2))) for k, n in enumerate(self.names)}
        origins = [dice.choice(self.names) for _ in range(dice.randint(1, 2))]
        self.requests = [(name, dice.choice((1, 1, 0.5, 2.25))) for name in origins]
        self.models = {name: self._model(k, name) for k, name in enumerate(self.names)}
        self.forgets = [self._fisher(f"forget {k}.fisher", self.shapes) for k in range(len(self.requests))]
        self.own = {n: {k: dice.choice((0.1, 4)) for k in ("alpha", "lam") if dice.random() < 0.3} for n in self.names}
        self.originals = {n: self._fisher(f"{n}.fisher", self.shapes) for n in self.names if self.reaching(n)}
        (root / "tree.toml").write_text(self._toml(), encoding="utf-8")

    def reaching(self, name: str) -> list[int]:
        above = {name}
        for one in reversed(self.names):  # children come after their parents
            above |= set(self.parents[one]) if one in above else set()
        return [k for k, (origin, _) in enumerate(self.requests) if origin in above]

    def _fisher(self, file: str, shapes: dict) -> dict[str, np.ndarray]:
        values = {n: numbers(self.numbers, int(np.prod(s)), self.fisher_dtype).reshape(s) for n, s in shapes.items()}
        keys = self.dice.sample(list(values), len(values))
        made = ff.Fisher.from_dict({key: torch.from_numpy(np.array(values[key])) for key in keys})
        size = self.dice.choice((None, None, 500, "4KB"))
        made.save(self.root / file, shard_size=size, dtype=torch.bfloat16 if self.rounded else None)
        read = ff.Fisher.load(self.root / file)
        return {key: read[key].numpy().copy() for key in values}

    def _model(self, k: int, name: str) -> dict[str, torch.Tensor]:
        """A folder or a file, with names of its own and tensors that no Fisher has; name in the Fishers -> tensor."""
        dice = self.dice
        self.called = getattr(self, "called", {})
        way = dice.choice(("same", "same", "bare", "renamed"))
        held, self.called[name] = {}, {}
        for key, shape in self.shapes.items():
            disk = key.removeprefix("model.") if way == "bare" else key
            if way == "renamed" and key == "lm_head.weight":
                disk = "output.weight"
            dtype = DTYPES[k % 4] if dice.random() < 0.8 else dice.choice(DTYPES)
            held[disk] = torch.from_numpy(np.asarray(self.numbers.normal(size=shape))).to(dtype)
            self.called[name][key] = disk
        held["ids"] = torch.arange(dice.randint(0, 40), dtype=torch.uint8)
        held["more.weight"] = torch.randn(3, 2, generator=torch.Generator().manual_seed(k))
        if dice.random() < 0.2:
            save_file(held, self.root / f"{name}.safetensors", {"by": "test"})
        else:
            llama.write(self.root / "models" / name, held, shards=dice.randint(1, 4))
        return held

    def path(self, name: str) -> Path:
        single = self.root / f"{name}.safetensors"
        return single if single.exists() else self.root / "models" / name

    def _toml(self) -> str:
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.top.items() if value != 1]
        self.top.setdefault("alpha", 1)
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.top.items()]
        for name in self.dice.sample(self.names, len(self.names)):
            path = self.path(name).relative_to(self.root)
            lines += ["[[model]]", f"name = {json.dumps(name, ensure_ascii=False)}"]
            lines += [f"path = {json.dumps(str(path), ensure_ascii=False)}"]
            lines += [f"parents = {json.dumps(self.parents[name], ensure_ascii=False)}"]
            lines += [f"{key} = {value}" for key, value in self.own[name].items()]
            if name in self.originals:
                lines += [f"fisher = {json.dumps(f'{name}.fisher', ensure_ascii=False)}"]
            if "output.weight" in self.models[name]:
                lines += ["[model.rename]", '"lm_head.weight" = "output.weight"']
        for k, (origin, weight) in enumerate(self.requests):
            lines += [
                "[[forget]]",
                f"origin = {json.dumps(origin, ensure_ascii=False)}",
                f'fisher = "forget {k}.fisher"',
            ]
            lines += [f"weight = {weight}"]
        return "\n".join(lines)

    def expected(self, name: str) -> tuple[dict[str, torch.Tensor], int, int]:
        """Name on disk -> tensor; elements selected, and of these 0."""
        result, count, zeroed = dict(self.models[name]), 0, 0
        if not (reaching := self.reaching(name)):
            return result, 0, 0
        options = {"exponent": 1.0, **self.top, **self.own[name]}
        for key, disk in self.called[name].items():
            theta = self.models[name][disk]
            half = theta.dtype in (torch.bfloat16, torch.float16)
            wide = np.float32 if half else np.promote_types(self.fisher_dtype, str(theta.dtype).removeprefix("torch."))
            plain = theta.float().numpy() if half else theta.numpy()
            forgets = [self.forgets[k][key] for k in reaching]
            weights = [self.requests[k][1] for k in reaching]
            new, selected = chain(plain, self.originals[name][key], forgets, weights, wide, **options)
            changed = torch.from_numpy(np.asarray(new)).to(theta.dtype)
            result[disk] = torch.where(torch.from_numpy(np.asarray(selected)), changed, theta)
            count += int(selected.sum())
            zeroed += int((result[disk][torch.from_numpy(np.asarray(selected))] == 0).sum())
        return result, count, zeroed


def read(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return found


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [
        name
        for name, one in expected.items()
        if found[name].dtype != one.dtype
        or found[name].shape != one.shape
        or found[name].reshape(-1).view(torch.uint8).tolist() != one.reshape(-1).view(torch.uint8).tolist()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("seed", range(12))
def test_a_random_family(tmp_path, monkeypatch, capsys, seed):
    family = Family(tmp_path, seed)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    memory = random.Random(seed).choice(("least", "8MB", "1GB"))

    def run(*arguments: str) -> dict:
        if arguments[-1] == "least":  # what the error says that is needed does
            assert cli.main([*arguments[:-1], "1KB", "--quiet"]) == 1
            needed = re.search(r"memory is 1,000 bytes, at least ([\d,]+) are needed", capsys.readouterr().err)[1]
            arguments = (*arguments[:-1], needed.replace(",", ""))
        assert cli.main([*arguments, "--json", "--quiet"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    counted = run("unlearn", "tree.toml", "--dry-run", "--memory", memory)
    assert contents(tmp_path) == before
    result = run("unlearn", "tree.toml", "--out", "clean", "--memory", memory)
    keys = ("name", "alpha", "lam", "numel", "selected", "zeroed", "nonfinite", "sources")
    assert [[m[key] for key in keys] for m in counted["models"]] == [[m[key] for key in keys] for m in result["models"]]
    found = {m["name"]: m for m in result["models"]}
    for name in family.names:
        tensors, selected, zeroed = family.expected(name)
        assert differing(read(tmp_path / "clean" / name), tensors) == [], name
        assert (found[name]["selected"], found[name]["zeroed"]) == (selected, zeroed), name
        assert found[name]["sources"] == [family.requests[k][0] for k in family.reaching(name)]
    assert run("verify", "clean")["same"]
    clean = {name: read(tmp_path / "clean" / name) for name in family.names}
    shutil.rmtree(tmp_path / "clean")
    run("unlearn", "tree.toml", "--in-place", "--journal", "j", "--memory", memory)
    assert [name for name in family.names if differing(read(family.path(name)), clean[name])] == []
    run("rollback", "j")
    shutil.rmtree(tmp_path / "j")
    assert contents(tmp_path) == before


def test_the_chain_is_the_one_of_the_page():
    """By hand: not selected, selected, capped, I = 0, m = I = 0."""
    theta, original = np.float32([8, 8, 8, 8, 8]), np.float32([1, 1, 3, 0, 0])
    options = {"alpha": 2, "lam": 4, "exponent": 1, "cap": 0.75, "merge": "max", "scale": 1}
    new, selected = chain(theta, original, [np.float32([1, 4, 2, 1, 0])], [2], np.float32, **options)
    assert selected.tolist() == [False, True, False, True, False]
    assert new[selected].tolist() == [4, 0]
