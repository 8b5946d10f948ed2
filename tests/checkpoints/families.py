"""Families of models on disk for the tests: random trees, dtypes, shards, and what the textbook chain makes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fiun_fast as ff
from fiun_fast.checkpoints import ForgetEntry, ModelEntry, Tree

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, metadata: dict | None = None) -> Path:
    """A folder with one file or with shards and an index, a config and a card."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return folder
    names, where = list(tensors), {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = names[k::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def read_model(path: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor, of all files of a folder, or of one file."""
    found: dict[str, torch.Tensor] = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return found


def textbook(theta, original, forgets, weights, *, alpha, lam, how="max", scale=1.0, exponent=1.0, cap=1.0):
    """The chain of docs/semantics.md in plain torch: the new parameter, and how many elements were selected."""
    merged = [f if w == 1 else f * torch.tensor(w, dtype=f.dtype) for f, w in zip(forgets, weights, strict=True)]
    m = merged[0]
    for other in merged[1:]:
        m = torch.maximum(m, other) if how == "max" else m + other
    if how == "mean" and len(merged) > 1:
        m = m / len(merged)
    if scale != 1:
        m = m * torch.tensor(scale, dtype=m.dtype)
    a, b = torch.tensor(alpha, dtype=m.dtype), torch.tensor(lam, dtype=m.dtype)
    selected = m > original * a
    factor = (original * b / m) ** exponent if exponent != 1 else original * b / m
    factor = factor.clamp(max=cap)
    halves = theta.dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if halves else torch.promote_types(theta.dtype, factor.dtype)
    new = torch.where(selected, (theta.to(wide) * factor.to(wide)).to(theta.dtype), theta)
    return new, int(selected.sum())


def values(generator: torch.Generator, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Fisher entries over many decades, with zeros."""
    found = torch.empty(numel, dtype=dtype).uniform_(-20, 4, generator=generator).exp2()
    found[torch.rand(numel, generator=generator) < 0.05] = 0
    return found


class Family:
    """A random tree of sharded models on disk, and the same in memory."""

    def __init__(
        self,
        root: Path,
        seed: int,
        *,
        fisher_dtype=torch.float32,
        rounded=False,
        models=4,
        wide=0,
        origins=None,
        small=False,
    ) -> None:
        dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.root, self.small = root, small
        shapes = {f"layer.{k}.weight": (dice.randint(1, 40), dice.randint(1, 60)) for k in range(2 if small else 6)}
        shapes |= {f"layer.{k}.bias": (dice.randint(1, 90),) for k in range(1 if small else 4)} | {"scale": ()}
        shapes |= {"wide": (wide, 257)} if wide else {}
        names = [f"m{k}" for k in range(models)]
        self.parents = {n: tuple(dice.sample(names[:k], dice.randint(0, min(2, k)))) for k, n in enumerate(names)}
        self.tensors, self.originals, entries = {}, {}, []
        for k, name in enumerate(names):
            tensors = {}
            for key, shape in shapes.items():
                dtype = dice.choice(FLOATS) if dice.random() < 0.3 else FLOATS[k % 2 * 2]
                tensors[key] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            tensors["ids"] = torch.arange(11, dtype=torch.int8)
            tensors["frozen"] = torch.randn(7, 3, generator=generator).bfloat16()
            tensors["empty"] = torch.zeros(0, 4)
            keys = list(tensors)
            dice.shuffle(keys)
            self.tensors[name] = {key: tensors[key] for key in keys}
            write_model(
                root / name, self.tensors[name], dice.randint(1, 2 if small else 4), {"format": "pt", "by": "tests"}
            )
            layout = ff.Layout(shapes)
            buffer = values(generator, layout.numel, fisher_dtype)
            self.originals[name] = self._saved(ff.Fisher(buffer, layout), f"{name}.fisher", dice, rounded)
            alpha = dice.choice([None, 0.5, 3.0])
            lam = dice.choice([None, 0.25])
            entries.append(ModelEntry(name, root / name, root / f"{name}.fisher", self.parents[name], alpha, lam))
        self.forgets, forget = [], []
        for k in range(dice.randint(1, 3) if origins is None else len(origins)):
            layout = ff.Layout(shapes)
            fisher = ff.Fisher(values(generator, layout.numel, fisher_dtype), layout)
            self.forgets.append(self._saved(fisher, f"f{k}.fisher", dice, rounded))
            forget.append(
                ForgetEntry(
                    dice.choice(names) if origins is None else origins[k],
                    root / f"f{k}.fisher",
                    dice.choice([1.0, 1.0, 0.3]),
                )
            )
        self.tree = Tree(tuple(entries), tuple(forget), alpha=1.5, lam=0.7, merge=dice.choice(["max", "max", "sum"]))

    def _saved(self, fisher: ff.Fisher, name: str, dice: random.Random, rounded: bool) -> ff.Fisher:
        more = {"shard_size": dice.choice([2000, 9000])} if dice.random() < 0.5 and not self.small else {}
        more |= {"dtype": torch.bfloat16} if rounded else {}
        fisher.save(self.root / name, **more)
        return ff.Fisher.load(self.root / name)

    def reached(self) -> dict[str, list[int]]:
        """Model -> requests that reach it."""
        found: dict[str, set[int]] = {}
        for name, parents in self.parents.items():
            own = {k for k, one in enumerate(self.tree.forget) if one.origin == name}
            found[name] = own.union(*(found[parent] for parent in parents))
        return {name: sorted(reaching) for name, reaching in found.items()}

    def expected(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, int]]:
        """Tensors of every model after the textbook chain, and how many elements of each were selected."""
        tensors = {name: dict(one) for name, one in self.tensors.items()}
        counts = dict.fromkeys(tensors, 0)
        for model in self.tree.models:
            requests = self.reached()[model.name]
            if not requests:
                continue
            original = self.originals[model.name]
            for segment in original.layout:
                new, selected = textbook(
                    self.tensors[model.name][segment.name],
                    original[segment.name],
                    [self.forgets[k][segment.name] for k in requests],
                    [self.tree.forget[k].weight for k in requests],
                    alpha=self.tree.alpha if model.alpha is None else model.alpha,
                    lam=self.tree.lam if model.lam is None else model.lam,
                    how=self.tree.merge,
                )
                tensors[model.name][segment.name] = new
                counts[model.name] += selected
        return tensors, counts

    def in_memory(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a plan in memory makes of them."""
        dag = ff.InheritanceDAG()
        states = {name: {k: t.clone() for k, t in one.items()} for name, one in self.tensors.items()}
        for name, parents in self.parents.items():
            own = {k: states[name][k] for k in self.originals[name].layout.names}
            dag.add_model(name, own, self.originals[name], parents=parents)
        requests = [
            ff.ForgetRequest(one.origin, fisher, one.weight)
            for one, fisher in zip(self.tree.forget, self.forgets, strict=True)
        ]
        numbers = {
            what: {
                m.name: getattr(self.tree, what) if getattr(m, what) is None else getattr(m, what)
                for m in self.tree.models
            }
            for what in ("alpha", "lam")
        }
        ff.plan(dag, requests, **numbers, merge=self.tree.merge, scale=self.tree.scale).run_()
        return states


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors whose bits differ, NaNs apart; empty: all are the same."""
    assert found.keys() == expected.keys()
    differ = []
    for name, one in expected.items():
        other = found[name]
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        nan = one.isnan() if one.is_floating_point() else torch.zeros_like(one, dtype=torch.bool)
        bits = BITS[one.element_size()]
        equal = (other.isnan() == nan).all() if one.is_floating_point() else True
        if not equal or not torch.equal(one[~nan].view(bits), other[~nan].view(bits)):
            differ.append(name)
    return differ
