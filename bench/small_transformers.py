"""Transformers of a few hundred thousand parameters in the shapes that people use, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, LAYERS, LONGEST = 96, 4, 3, 24


class RMSNorm(nn.Module):
    """As in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised by the root of the mean square."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotated(x: Tensor) -> Tensor:
    """Queries or keys [B, heads, T, d], turned by their position."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Attention(nn.Module):
    """One fused projection in, one out."""

    def __init__(self, causal: bool, rotary: bool, bias: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias), nn.Linear(WIDTH, WIDTH, bias)
        self._causal, self._rotary = causal, rotary

    def forward(self, x: Tensor) -> Tensor:
        """Of all positions, [B, T, width] -> the same."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self._rotary:
            q, k = rotated(q), rotated(k)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self._causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Llama's feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Position by position."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Normalised before each part, as in GPT-2 and Llama."""

    def __init__(self, llama: bool, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (RMSNorm() if llama else nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = Attention(causal, rotary=llama, bias=not llama)
        plain = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.feed = Gated() if llama else plain

    def forward(self, x: Tensor) -> Tensor:
        """Residual."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


def positions() -> nn.Embedding:
    """Learned, and small at first beside what the tokens say."""
    found = nn.Embedding(LONGEST, WIDTH)
    nn.init.normal_(found.weight, std=0.02)
    return found


class Language(nn.Module):
    """GPT-2-shaped: learned positions, LayerNorm, a tied head; Llama-shaped: rotary, RMSNorm, gated, its own head."""

    def __init__(self, vocabulary: int, llama: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.position = None if llama else positions()
        self.blocks = nn.Sequential(*(Block(llama, causal=True) for _ in range(LAYERS)))
        self.norm = RMSNorm() if llama else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.5 if llama else 0.1)
        if not llama:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, T, vocabulary]."""
        x = self.embed(ids)
        if self.position is not None:
            x = x + self.position(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Classifier(nn.Module):
    """BERT-shaped: attention in both directions, the mean of the last layer classified."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, WIDTH), positions()
        self.blocks = nn.Sequential(*(Block(llama=False, causal=False) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> logits [B, classes]."""
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)).mean(1))


class Adapted(nn.Module):
    """A frozen linear layer and a trained product of two thin ones beside it (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.a.weight, std=base.in_features**-0.5)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.base(x) + self.b(self.a(x))


def adapt(model: Language, rank: int = 16) -> Language:
    """Freeze a model and put an adapter beside every linear layer of its blocks, in place."""
    model.requires_grad_(False)
    for block in model.blocks:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, Adapted(child, rank))
    return model
