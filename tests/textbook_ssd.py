"""The published classes, re-stated in our own words and as plainly as possible: SSD's, and what FIUn's copy changes.

Nothing here is shared with the package. Each step is one torch operation on one parameter, in the order in which those
classes take it, so that the bits are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

Values = dict[str, torch.Tensor]


def importance(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence,
    loss_of: Callable[[nn.Module, object], torch.Tensor],
    size: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient.pow(2),
) -> Values:
    """Mean over the batches of the squared gradient; the model is used in whatever mode it is in."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                totals[name].data += size(p.grad.data.clone())
    for total in totals.values():
        total.data /= float(len(batches))
    return totals


@torch.no_grad()
def modify(
    model: nn.Module,
    original: Values,
    forget: Values,
    alpha: float,
    lam: float = 1,
    exponent: float = 1,
    cap: float = 1,
    only: Sequence[str] | None = None,
    reverse: bool = False,
) -> None:
    """Shrink what matters more to the forget data; `reverse` is FIUn's: what matters less to it."""
    for name, p in model.named_parameters():
        if only is not None and name not in only:
            continue
        i, f = original[name], forget[name]
        threshold = i.mul(alpha)
        places = torch.where(f < threshold) if reverse else torch.where(f > threshold)
        upper, lower = (f, i) if reverse else (i, f)
        factor = upper.mul(lam).div(lower).pow(exponent)[places]
        factor[torch.where(factor > cap)] = cap
        p[places] = p[places].mul(factor)


def merged(importances: Sequence[Values], only: Sequence[str], divisor: float) -> Values:
    """FIUn's merge for several sources: maximum, then one division for each source after the first."""
    result = {name: value.clone() for name, value in importances[0].items()}
    for name in only:
        for other in importances[1:]:
            result[name] = torch.max(result[name], other[name])
        for _ in importances[1:]:
            result[name] /= divisor
    return result


class Block(nn.Module):
    """A residual block with BatchNorm, as in ResNet-18."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Small, but with everything that matters here: BatchNorm, shortcuts, dropout, a head.

    outputs: "tensor", "tuple", or "object" (with .logits; with .loss where labels are given).
    """

    def __init__(self, outputs: str = "tensor", classes: int = 5) -> None:
        super().__init__()
        self.outputs = outputs
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.layer2 = nn.Sequential(Block(16, 16, 1))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None):
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.layer2(self.layer1(out)).mean((2, 3))
        logits = self.fc(self.dropout(out))
        if self.outputs == "tensor":
            return logits
        if self.outputs == "tuple":
            return logits, out
        return Output(logits, None if labels is None else nn.functional.cross_entropy(logits, labels))


class Output:
    """What a language model's library returns: attributes."""

    def __init__(self, logits: torch.Tensor, loss: torch.Tensor | None) -> None:
        self.logits, self.loss = logits, loss
