"""Small hand-made nets with what the models of transformers, timm and peft do to their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fisher_models import CLASSES, Lambda, Subject, headed
from torch import Tensor, nn
from torch.nn import functional

E, T, WORDS = 8, 5, 11


class Rms(nn.Module):
    """RMSNorm as Llama writes it, or Gemma: 1 + weight."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(E)), offset

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * (self.offset + self.weight.float()) if self.offset else self.weight * x


class Llama(nn.Module):
    """Rotary attention with a shared key, gated MLP, and RMSNorm, also of queries."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, E)
        self.norm1, self.norm2, self.norm3 = Rms(offset), Rms(offset), Rms(offset)
        self.q, self.k, self.v, self.o = (nn.Linear(E, n, bias=False) for n in (E, 4, 4, E))
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.gate, self.up, self.down = nn.Linear(E, 6), nn.Linear(E, 6), nn.Linear(6, E)
        self.head = nn.Linear(E, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        y = self.norm1(h)
        q, k, v = (p(y).view(*x.shape, -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        q, k = (z * angle.cos() + torch.cat([-z[..., 2:], z[..., :2]], -1) * angle.sin() for z in (q, k))
        y = functional.scaled_dot_product_attention(q * self.scale.exp(), k, v, is_causal=True, enable_gqa=True)
        h = h + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(h)
        return self.head(self.norm3(h + self.down(functional.silu(self.gate(y)) * self.up(y))).mean(1))


class Bert(nn.Module):
    """Positions looked up once for the whole batch; logits by the tied words, with a bias of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(WORDS, E), nn.Embedding(7, E), nn.Embedding(2, E)
        self.norm, self.bias = nn.LayerNorm(E), nn.Parameter(torch.randn(WORDS))
        self.register_buffer("numbers", torch.arange(7)[None])

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(self.numbers[:, : x.shape[1]]) + self.kinds(torch.zeros_like(x))
        return functional.linear(self.norm(torch.tanh(h)).sum(1), self.words.weight, self.bias)


class Swin(nn.Module):
    """Windows in the batch's axis, a table of relative positions, shifted windows with a mask."""

    def __init__(self, continuous: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.continuous = nn.Linear(E, 3 * E), nn.Linear(E, E), continuous
        self.table = None if continuous else nn.Parameter(torch.randn(9, 2))
        self.mlp = nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)) if continuous else None
        at = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + 1
        self.register_buffer("index", apart[..., 0] * 3 + apart[..., 1])
        self.register_buffer("places", torch.randn(9, 2))
        self.register_buffer("mask", torch.where(torch.rand(4, 4, 4) < 0.2, -5.0, 0.0))
        self.head = nn.Linear(E, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        x = torch.roll(x, (1, 1), (1, 2)).view(b, 2, 2, 2, 2, E).transpose(2, 3).reshape(b * 4, 4, E)
        q, k, v = self.qkv(x).view(b * 4, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        table = 2 * torch.sigmoid(self.mlp(self.places)) if self.continuous else self.table
        bias = table[self.index.view(-1)].view(4, 4, 2).permute(2, 0, 1).contiguous()
        scores = q @ k.transpose(-2, -1) + bias.unsqueeze(0)
        scores = scores.view(b, 4, 2, 4, 4) + self.mask[:, None]
        y = (scores.view(b * 4, 2, 4, 4).softmax(-1) @ v).transpose(1, 2).reshape(b * 4, 4, E)
        return self.head(torch.tanh(self.proj(y)).view(b, 16, E).mean(1))


class ConvNext(nn.Module):
    """Depthwise convolution, channels last, LayerScale, and a squeeze-and-excite of EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, E, 2, 2), nn.Conv2d(E, E, 7, padding=3, groups=E)
        self.norm, self.up, self.down = nn.LayerNorm(E), nn.Linear(E, 12), nn.Linear(12, E)
        self.gamma = nn.Parameter(torch.rand(E) + 0.5)
        self.squeeze, self.excite = nn.Conv2d(E, 3, 1), nn.Conv2d(3, E, 1)
        self.last = nn.Conv2d(E, E, 3, stride=2, groups=E, padding=1)
        self.head = nn.Linear(E, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        y = self.down(functional.gelu(self.up(y))).permute(0, 3, 1, 2)
        x = x + y * self.gamma.reshape(1, -1, 1, 1)
        x = x * torch.sigmoid(self.excite(functional.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(torch.tanh(self.last(x)).mean((2, 3)))


class Experts(nn.Module):
    """A router and experts: layers of their own, slices of one parameter, or one grouped product."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.router, self.head = kind, nn.Linear(E, 3), nn.Linear(E, CLASSES)
        if kind == "layers":
            self.experts = nn.ModuleList(nn.Linear(E, E) for _ in range(3))
        else:
            self.up = nn.Parameter(torch.randn(3, E, E) / 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, E)
        weight, chosen = self.router(flat).softmax(-1).topk(2)
        if self.kind == "grouped":
            sort, order = chosen.view(-1).sort()
            ends = torch.bincount(sort, minlength=3).cumsum(0, dtype=torch.int32)
            y = functional.grouped_mm(flat[order // 2], self.up.transpose(-2, -1), offs=ends)
            y = (torch.tanh(y) * weight.view(-1)[order, None])[order.argsort()].view(len(flat), 2, E).sum(1)
        else:
            y = torch.zeros_like(flat)
            for i in range(3):
                token, place = torch.where(chosen == i)
                if not len(token):
                    continue
                part = (
                    self.experts[i](flat[token])
                    if self.kind == "layers"
                    else functional.linear(flat[token], self.up[i])
                )
                y.index_add_(0, token, torch.tanh(part) * weight[token, place, None])
        return self.head(y.view(x.shape).mean(1))


class Lora(nn.Module):
    """Adapters beside a frozen layer: A and B apart, or merged into a weight that is then scaled to a length."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(E, E), nn.Linear(E, 2, bias=False), nn.Linear(2, E, bias=False)
        self.length, self.merged, self.head = nn.Parameter(torch.rand(E, 1) + 0.5), merged, nn.Linear(E, CLASSES)
        self.base.requires_grad_(False)
        self.length.requires_grad_(merged)

    def forward(self, x: Tensor) -> Tensor:
        if not self.merged:
            return self.head(torch.tanh(self.base(x) + 2.0 * self.b(self.a(x))).mean(1))
        weight = self.base.weight + 2.0 * self.b(self.a(torch.eye(E).to(x))).T
        weight = self.length * weight / weight.norm(dim=1, keepdim=True)
        return self.head(torch.tanh(functional.linear(x, weight, self.base.bias)).mean(1))


class Tokens(nn.Module):
    """A class token, learned queries that read the input, and positions that are looked up in a plain parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.queries = nn.Parameter(torch.randn(1, 1, E)), nn.Parameter(torch.randn(3, E))
        self.places, self.norm = nn.Parameter(torch.randn(T + 1, E)), nn.LayerNorm(E)
        self.q, self.heads = nn.Linear(E, E), nn.Parameter(torch.randn(2, 3, 4))
        self.mask, self.head = nn.Parameter(torch.randn(3, T + 1)), nn.Linear(E, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        b = len(x)
        x = torch.cat([self.token.expand(b, -1, -1), x], 1) + self.places[torch.arange(T + 1)]
        queries = self.q(self.norm(self.queries.unsqueeze(0).repeat(b, 1, 1)))
        y = functional.scaled_dot_product_attention(queries, x, x, attn_mask=self.mask)
        by_head = y.view(b, 3, 2, 4).transpose(1, 2).reshape(b * 2, 3, 4) * self.heads.repeat(b, 1, 1)
        return self.head(by_head.view(b, 2, 3, 4).transpose(1, 2).reshape(b, 3, E).tanh().mean(1))


class Products(nn.Module):
    """Weights from either side, transposed, sliced, standardised, by number, and added to themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.left = nn.Parameter(torch.randn(E, E) / 3), nn.Parameter(torch.randn(T, T) / 3)
        self.both = nn.Parameter(torch.randn(2, E, E) / 3)
        self.halves, self.table = nn.Parameter(torch.randn(E, 2 * E) / 3), nn.Parameter(torch.randn(4, E))
        self.bias, self.head = nn.Parameter(torch.randn(E)), nn.Linear(E, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.right) + torch.tanh(self.left @ x)
        x = torch.tanh(torch.matmul(x, self.right.t())) + functional.linear(
            x, self.both[1], torch.cat([self.bias[:4]] * 2)
        )
        x = x + self.table[(x.detach().sum(-1) > 0).long()]
        x = functional.linear(torch.tanh(x), self.halves[:, :E]) + functional.linear(x, self.halves[:, E:])
        weight = self.both[0] - self.both[0].mean(1, keepdim=True)
        x = functional.linear(torch.tanh(x), torch.relu(weight) + weight)
        return self.head(torch.where(x > 0, x, x * self.bias).mean(1))


def transposed(kind: type, channels: tuple[int, int], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        kind(*channels, *args, **options),
        nn.Tanh(),
        Lambda(lambda x: x.flatten(2).mean(2)),
        nn.Linear(channels[1], CLASSES),
    )


SHAPES = [
    Subject("llama", Llama, (T,), tokens=WORDS),
    Subject("gemma", lambda: Llama(1.0), (T,), tokens=WORDS),
    Subject("bert", Bert, (T,), tokens=WORDS),
    Subject("swin", Swin, (4, 4, E)),
    Subject("swin-continuous", lambda: Swin(True), (4, 4, E)),
    Subject("convnext", ConvNext, (3, 8, 8)),
    Subject("convnext-one-position", ConvNext, (3, 2, 2)),
    *(Subject(f"experts-{kind}", lambda kind=kind: Experts(kind), (T, E)) for kind in ("layers", "slices", "grouped")),
    Subject("lora", lambda: Lora(False), (T, E)),
    Subject("lora-merged", lambda: Lora(True), (T, E)),
    Subject("tokens", Tokens, (T, E)),
    Subject("products", Products, (T, E)),
    Subject("prelu", lambda: headed(nn.Linear(6, 4), nn.PReLU(4), nn.PReLU(), features=4), (6,)),
    Subject("prelu-channels", lambda: headed(nn.PReLU(4), nn.Tanh(), features=12), (4, 3)),
    Subject("instance-norm", lambda: headed(nn.InstanceNorm1d(3, affine=True), nn.Tanh(), features=12), (3, 4)),
    Subject("transposed-1d", transposed(nn.ConvTranspose1d, (4, 6), 3, 2, 1, 1, 2), (4, 5)),
    Subject("transposed-2d", transposed(nn.ConvTranspose2d, (2, 3), (3, 2), 2, padding=1, dilation=2), (2, 4, 3)),
    Subject("transposed-depthwise", transposed(nn.ConvTranspose2d, (4, 4), 3, 2, groups=4, bias=False), (4, 3, 3)),
]  # fmt: skip
