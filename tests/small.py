"""A small network and data for it, for tests that look at something else."""

from __future__ import annotations

import torch
from torch import nn


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(count: int = 3, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dice = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 6, generator=dice), torch.randint(3, (4,), generator=dice)) for _ in range(count)]
