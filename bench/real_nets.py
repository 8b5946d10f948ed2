"""What `sample` costs beside `batch` on small nets of the shapes that people have: BERT, GPT-2, Llama, ViT and others.

    python bench/real_nets.py               prints a table, writes bench/results/real-nets.json, fills docs/fishers.md

Needs transformers; weights are random, nothing is downloaded. Wall time of `estimate_fisher` over eight batches of 16,
the trial on the first batch included, all threads; medians of interleaved rounds, and of the ratios of each round.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fiun_fast as ff
from fiun_fast.bench.files import describe, environment, fill, markdown, write_json

ROOT = Path(__file__).parents[1]
TARGET, PAGE = ROOT / "bench" / "results" / "real-nets.json", ROOT / "docs" / "fishers.md"
ROUNDS, BATCHES, SAMPLES, TOKENS, IMAGE, WORDS, CLASSES = 5, 8, 16, 64, 32, 1000, 10
HEADS = ["network", "parameters", "`batch`", "`sample`", "`sample` / `batch`", "without a closed form"]
TEXT = {"vocab_size": WORDS, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
PATCHES = {"image_size": IMAGE, "num_labels": CLASSES}


def networks() -> dict[str, tuple[Callable[[], torch.nn.Module], str]]:
    """Name -> what makes it, and what it reads: "text", "next token", "image" or "large image"."""
    import transformers as hf

    vit = {**TEXT, **PATCHES, "patch_size": 4, "intermediate_size": 512}
    vit.pop("vocab_size")
    swin = {**PATCHES, "patch_size": 2, "embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6], "window_size": 4}
    convnext = {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 2, 1], "num_labels": CLASSES}
    classes = {"intermediate_size": 512, "num_labels": CLASSES}
    gated = {"intermediate_size": 344, "num_key_value_heads": 2}
    gpt2 = {"vocab_size": WORDS, "n_embd": 128, "n_layer": 4, "n_head": 4}
    return {
        "BERT": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **classes)), "text"),
        "GPT-2, tied": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)), "next token"),
        "Llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **gated)), "next token"),
        "Mixtral, 4 experts": (
            lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, **gated, num_local_experts=4)),
            "next token",
        ),
        "ViT": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**vit)), "image"),
        "Swin": (lambda: hf.SwinForImageClassification(hf.SwinConfig(**swin)), "image"),
        "ConvNeXt": (lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**convnext)), "large image"),
    }


def batches(reads: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random inputs and labels; a large image is twice as wide."""
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(BATCHES):
        if reads.endswith("image"):
            size = 2 * IMAGE if reads == "large image" else IMAGE
            x = torch.randn(SAMPLES, 3, size, size, generator=g)
        else:
            x = torch.randint(WORDS, (SAMPLES, TOKENS), generator=g)
        y = x if reads == "next token" else torch.randint(CLASSES, (SAMPLES,), generator=g)
        made.append((x, y))
    return made


def forward(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
    """Logits [B, classes, …] and labels [B, …]."""
    x, y = batch
    if x.is_floating_point():
        return model(pixel_values=x).logits, y
    logits = model(input_ids=x).logits
    return (logits, y) if y.dim() == 1 else (logits[:, :-1].transpose(1, 2), y[:, 1:])


def measured(model: torch.nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Seconds of both estimators, their ratio, and the parameters that took another way than a closed form."""
    seconds: dict[str, list[float]] = {"batch": [], "sample": []}
    for _ in range(ROUNDS + 1):
        for estimator, taken in seconds.items():
            start = time.perf_counter()
            fisher = ff.estimate_fisher(model, data, estimator=estimator, forward_fn=forward)
            taken.append(time.perf_counter() - start)
    slow = [name for name, how in fisher.provenance.how.items() if how.startswith("per-sample")]
    warm = {estimator: taken[1:] for estimator, taken in seconds.items()}
    ratios = [sample / batch for batch, sample in zip(warm["batch"], warm["sample"], strict=True)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        **{f"{estimator}_seconds": statistics.median(taken) for estimator, taken in warm.items()},
        "ratio": statistics.median(ratios),
        "without_closed_form": slow,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: a line for each network."""
    rows = []
    for name, row in result["networks"].items():
        times = [f"{1e3 * row[f'{estimator}_seconds']:.0f} ms" for estimator in ("batch", "sample")]
        slow = len(row["without_closed_form"]) or "none"
        rows.append([name, f"{row['parameters'] / 1e6:.2f} M", *times, f"{row['ratio']:.2f}", slow])
    return f"{describe(result['environment'])}, transformers {result['transformers']}:\n\n{markdown(HEADS, rows)}"


def main() -> None:
    """Measure, print, write."""
    import transformers

    warnings.simplefilter("ignore", ff.FallbackWarning)
    found = {}
    for name, (make, reads) in networks().items():
        torch.manual_seed(0)
        found[name] = measured(make().eval(), batches(reads))
        print(f"{name:20} {found[name]}", flush=True)
    result = {"environment": environment(), "transformers": transformers.__version__, "networks": found}
    write_json(TARGET, result, digits=4)
    fill(PAGE, "nets", table(json.loads(TARGET.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
