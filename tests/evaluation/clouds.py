"""Clouds of points to classify, and a small network with everything that a look at a model might disturb."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    def __init__(self, seed: int = 0, classes: int = 3, inputs: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
            self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def cloud(count: int, seed: int, classes: int = 3, inputs: int = 6, distance: float = 2.0) -> tuple[Tensor, Tensor]:
    """Each class around its own corner."""
    dice = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=dice)
    labels[:classes] = torch.arange(classes)
    x = torch.randn(count, inputs, generator=dice)
    x[torch.arange(count), labels] += distance
    return x, labels


def batches(data: tuple[Tensor, Tensor], size: int = 16) -> Batches:
    return list(zip(data[0].split(size), data[1].split(size)))


def fit(model: nn.Module, loader: Batches, epochs: int = 15, lr: float = 0.01) -> nn.Module:
    """Train; dropout draws the same in whatever order tests run."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def only(data: tuple[Tensor, Tensor], label: int, without: bool = False) -> tuple[Tensor, Tensor]:
    rows = (data[1] != label) if without else (data[1] == label)
    return data[0][rows], data[1][rows]
