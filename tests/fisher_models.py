"""Models for the estimators of exact Fishers: a small one for each layer kind, and small whole networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 5


@dataclass(frozen=True)
class Subject:
    """A model, its input, and how its parameters are expected to be computed."""

    id: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one sample
    tokens: int = 0  # above 0: inputs are indices below it
    fallback: tuple[str, ...] = ()  # parameters (prefixes) that have no closed form
    extra: dict[str, Any] = field(default_factory=dict)

    def batches(self, sizes: tuple[int, ...] = (4, 3, 1, 2, 5), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        draw = (
            (lambda n: torch.randint(self.tokens, (n, *self.shape), generator=g))
            if self.tokens
            else (lambda n: torch.randn(n, *self.shape, generator=g))
        )
        return [(draw(n), torch.randint(CLASSES, (n,), generator=g)) for n in sizes]


def headed(*layers: nn.Module, features: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, CLASSES))


def settled(model: nn.Module) -> nn.Module:
    """Norms with weights, biases and statistics that are not their initial ones and zeros."""
    for module in model.modules():
        for name, t in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
                if name in ("weight", "running_var"):
                    t.data.uniform_(0.5, 2)
                elif t.is_floating_point():
                    t.data.normal_()
    return model


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """A ResNet's block, with ReLUs that write in place."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    blocks = [Residual(4, 6, 2), Residual(6, 8, 2)]
    return headed(*stem, *blocks, nn.AdaptiveAvgPool2d(1), features=8)


class Attention(nn.Module):
    """Self- or cross-attention of torch, then a head."""

    def __init__(self, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, **options)
        self.cross, self.first = cross, options.get("batch_first", False)
        self.key = nn.Linear(8, options.get("kdim") or 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        memory = self.key(x) if self.cross else x
        y, _ = self.mha(x, memory, memory, need_weights=False)
        return self.head(y.mean(1 if self.first else 0))


class Vit(nn.Module):
    """Patches, class token, position, a pre-norm transformer block of torch, head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.block(x))[:, 0])


class Gpt(nn.Module):
    """Token and position embeddings, one causal block as GPT-2 writes it (addmm on flattened tokens), head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.ln1, self.ln2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv_weight, self.qkv_bias = nn.Parameter(torch.randn(8, 24) / 3), nn.Parameter(torch.randn(24) / 3)
        self.out = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11 if tied else CLASSES, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        b, t = x.shape
        h = self.tokens(x) + self.positions(torch.arange(t).expand(b, t))
        flat = torch.addmm(self.qkv_bias, self.ln1(h).view(-1, 8), self.qkv_weight)
        q, k, v = (z.view(b, t, 2, 4).transpose(1, 2) for z in flat.view(b, t, 24).split(8, 2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(y.transpose(1, 2).reshape(b, t, 8))
        h = h + self.mlp(self.ln2(h))
        return self.head(self.norm(h).mean(1))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(7, 4), nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0][:, -1])


class Twice(nn.Module):
    """A layer that is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


class Hidden(torch.autograd.Function):
    """x W^T as a function that torch does not show to a watch."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, d):
        x, weight = ctx.saved_tensors
        return d @ weight, d.t() @ x


class Custom(nn.Module):
    """One weight inside an autograd.Function, another both there and in a watched call."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.both = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(Hidden.apply(x, self.hidden))
        return self.head(torch.tanh(self.both(x)) + Hidden.apply(x, self.both.weight))


class SequenceFirst(nn.Module):
    """[T, B, E] inside, with as many positions as there may be samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.fc(x.transpose(0, 1)))).mean(0))


class Windows(nn.Module):
    """Samples and windows share an axis, as in Swin: [B * windows, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.gn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        b, w = x.shape[:2]
        y = torch.tanh(self.gn(self.bn(self.conv(x.flatten(0, 1)))))
        return self.head(y.mean((2, 3)).view(b, w, 4).sum(1))


class Permuted(nn.Module):
    """A layer that sees the samples in another order, as a router of experts may hand them on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(x.flip(0))).flip(0))


def conv(kind: type, channels: tuple[int, int], features: int, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    pool = {nn.Conv1d: nn.AdaptiveAvgPool1d, nn.Conv2d: nn.AdaptiveAvgPool2d, nn.Conv3d: nn.AdaptiveAvgPool3d}[kind]
    return lambda: headed(kind(*channels, *args, **options), nn.Tanh(), pool(2), features=features)


def checkpointed(reentrant: bool) -> nn.Module:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, self.first(x), use_reentrant=reentrant))

    return Checkpointed()


def embedding(**options: Any) -> Callable[[], nn.Module]:
    return lambda: headed(
        nn.Embedding(7, 4, **options), Lambda(lambda x: torch.tanh(x).flatten(1, -2).mean(1)), features=4
    )


LAYERS = [
    Subject("linear", lambda: headed(nn.Linear(7, 6), nn.Tanh(), features=6), (7,)),
    Subject("linear-no-bias", lambda: headed(nn.Linear(7, 6, bias=False), nn.Tanh(), features=6), (7,)),
    Subject("linear-positions", lambda: headed(nn.Linear(7, 6), nn.Tanh(), features=18), (3, 7)),
    Subject("linear-two-axes", lambda: headed(nn.Linear(3, 2), nn.Tanh(), features=40), (4, 5, 3)),
    Subject("linear-as-many-positions", SequenceFirst, (4, 6)),
    Subject("sequence-first", SequenceFirst, (5, 6)),
    Subject("conv1d", conv(nn.Conv1d, (3, 4), 8, 3), (3, 9)),
    Subject("conv1d-stride-dilation", conv(nn.Conv1d, (4, 6), 12, 3, 2, 1, 2, groups=2), (4, 11)),
    Subject("conv2d", conv(nn.Conv2d, (3, 4), 16, 3, padding=1), (3, 6, 5)),
    Subject("conv2d-no-bias-1x1", conv(nn.Conv2d, (3, 4), 16, 1, bias=False), (3, 6, 5)),
    Subject("conv2d-stride-past-the-edge", conv(nn.Conv2d, (2, 4), 16, (3, 2), (2, 3), (1, 0)), (2, 8, 9)),
    Subject("conv2d-dilation-groups", conv(nn.Conv2d, (4, 8), 32, 3, 1, 2, (2, 1), groups=4), (4, 7, 6)),
    Subject("conv2d-depthwise", conv(nn.Conv2d, (4, 8), 32, 3, padding=1, groups=4), (4, 5, 5)),
    Subject("conv2d-same", conv(nn.Conv2d, (2, 3), 12, (4, 3), padding="same", dilation=(1, 2)), (2, 6, 7)),
    Subject("conv2d-valid", conv(nn.Conv2d, (2, 3), 12, 3, padding="valid"), (2, 6, 7)),
    *(
        Subject(f"conv2d-{mode}", conv(nn.Conv2d, (2, 3), 12, 3, padding=(1, 2), padding_mode=mode), (2, 6, 7))
        for mode in ("reflect", "replicate", "circular")
    ),
    Subject("conv2d-same-circular", conv(nn.Conv2d, (2, 3), 12, 4, padding="same", padding_mode="circular"), (2, 6, 7)),
    Subject("conv3d", conv(nn.Conv3d, (2, 4), 32, (2, 3, 2), (1, 2, 1), (0, 1, 1), groups=2), (2, 4, 5, 4)),
    Subject("embedding", embedding(), (6,), tokens=7),
    Subject("embedding-padding", embedding(padding_idx=-2), (6,), tokens=7),
    Subject("embedding-sparse", embedding(sparse=True), (2, 3), tokens=7),
    Subject("embedding-by-frequency", embedding(scale_grad_by_freq=True), (6,), tokens=7, fallback=("0.weight",)),
    Subject("layer-norm", lambda: headed(nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), features=18), (3, 6)),
    Subject("layer-norm-two-axes", lambda: headed(nn.LayerNorm((3, 4)), nn.Tanh(), features=24), (2, 3, 4)),
    Subject("layer-norm-no-bias", lambda: headed(nn.LayerNorm(6, bias=False, eps=0.1), nn.Tanh(), features=6), (6,)),
    Subject("rms-norm", lambda: headed(nn.RMSNorm(6), nn.Tanh(), features=18), (3, 6)),
    Subject("rms-norm-eps", lambda: headed(nn.RMSNorm((3, 4), eps=0.1), nn.Tanh(), features=24), (2, 3, 4)),
    Subject("group-norm", lambda: headed(nn.GroupNorm(2, 4, eps=0.01), nn.Tanh(), features=36), (4, 3, 3)),
    Subject("batch-norm-1d", lambda: headed(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), features=5), (6,)),
    Subject("batch-norm-2d", lambda: headed(nn.BatchNorm2d(3, eps=0.1), nn.Tanh(), features=36), (3, 3, 4)),
    Subject("attention", lambda: Attention(batch_first=True), (5, 8)),
    Subject("attention-sequence-first", Attention, (4, 8)),
    Subject("attention-cross", lambda: Attention(cross=True, batch_first=True), (5, 8)),
    Subject("attention-other-widths", lambda: Attention(cross=True, batch_first=True, kdim=6, vdim=6), (5, 8)),
    Subject("windows", Windows, (3, 2, 5, 5)),
    Subject("called-twice", Twice, (6,)),
    Subject("permuted", Permuted, (6,), fallback=("fc.",)),
    Subject("custom-function", Custom, (6,), fallback=("hidden", "both.weight")),
    Subject("transposed-conv", lambda: headed(nn.ConvTranspose1d(2, 3, 3), nn.Tanh(), features=21), (2, 5)),
    Subject("weight-norm", lambda: headed(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), features=6), (6,)),
    Subject("checkpoint", lambda: checkpointed(False), (6,)),
    Subject("checkpoint-reentrant", lambda: checkpointed(True), (6,), fallback=("body",)),
]  # fmt: skip
NETWORKS = [
    Subject("resnet", resnet, (3, 8, 8)),
    Subject("vit", Vit, (3, 4, 4)),
    Subject("gpt", Gpt, (6,), tokens=11),
    Subject("gpt-tied", lambda: Gpt(tied=True), (6,), tokens=11),
    Subject("lstm", Lstm, (5,), tokens=7, fallback=("lstm.",)),
]
