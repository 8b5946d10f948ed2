"""Small folders of models as the hub has them: names and shapes of a Llama, config.json, a model card, shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import fiun_fast as ff

WIDTH, INNER, WORDS = 16, 24, 40


def shapes(layers: int = 2, head: bool = True) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order in which transformers saves them."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for k in range(layers):
        at = f"model.layers.{k}"
        found[f"{at}.input_layernorm.weight"] = (WIDTH,)
        for name, rows in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2), ("o", WIDTH)):
            found[f"{at}.self_attn.{name}_proj.weight"] = (rows, WIDTH)
        for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            found[f"{at}.mlp.{name}_proj.weight"] = shape
        found[f"{at}.post_attention_layernorm.weight"] = (WIDTH,)
    found["model.norm.weight"] = (WIDTH,)
    if head:
        found["lm_head.weight"] = (WORDS, WIDTH)
    return found


def tensors(seed: int, dtype: torch.dtype = torch.float32, layers: int = 2) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=dice).to(dtype) for name, shape in shapes(layers).items()}


def write(
    folder: Path,
    held: dict[str, torch.Tensor],
    *,
    shards: int = 1,
    config: dict | None = None,
    card: str | None = None,
) -> Path:
    """A folder with these tensors in one file, or several with an index; `card` is the YAML head of README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(held.values())).dtype).removeprefix("torch.")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype, **(config or {})}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# A model\n", encoding="utf-8")
    names = list(held)
    parts = [names[k::shards] for k in range(shards)]
    if shards == 1:
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {}
    for k, part in enumerate(parts, 1):
        file = f"model-{k:05d}-of-{shards:05d}.safetensors"
        save_file({name: held[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in held.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def fisher(seed: int, scale: float = 1.0, layers: int = 2) -> ff.Fisher:
    """Random numbers, log-uniform over about four decades, as Fishers have them."""
    layout = ff.Layout(shapes(layers))
    dice = torch.Generator().manual_seed(seed)
    return ff.Fisher(torch.empty(layout.numel).uniform_(-14, 0, generator=dice).exp2() * scale, layout)


def small(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two tensors, for tests about who is meant."""
    dice = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(9, 7, generator=dice), "b": torch.randn(5, generator=dice), **more}


def model(folder: Path, seed: int = 0, **options) -> Path:
    return write(folder, small(seed), **options)
