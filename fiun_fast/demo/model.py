"""A small convolutional network with BatchNorm, how it is trained, and how several become one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import CLASSES, Samples, jitter

View = Callable[[Tensor], Tensor]  # how a model sees the images: [n, 1, 8, 8] -> [n, 1, 8, 8]


class DigitNet(nn.Module):
    """`body`: images [n, 1, 8, 8] -> features [n, 64]; `head`: features -> logits [n, 10]."""

    def __init__(self, width: int = 16, features: int = 64) -> None:
        super().__init__()

        def block(n_in: int, n_out: int) -> list[nn.Module]:
            return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]

        self.body = nn.Sequential(
            *block(1, width),
            *block(width, 2 * width),
            nn.MaxPool2d(2),
            *block(2 * width, 2 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * width, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(),
        )
        self.head = nn.Linear(features, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 1, 8, 8] -> logits [n, 10]."""
        return self.head(self.body(images))


def fresh(seed: int) -> DigitNet:
    """A newly initialised network; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitNet()


def train(
    model: DigitNet,
    samples: Samples,
    shown: Sequence[int],
    *,
    steps: int,
    rate: float,
    seed: int,
    view: View,
    device: str,
    smoothing: float = 0.1,
) -> DigitNet:
    """Train in place with AdamW on jittered mini-batches of 64; returns the model in eval mode.

    Label smoothing keeps every prediction a little unsure. Without it a class that is learned perfectly has little
    gradient left, and its empirical forget Fisher nearly vanishes (docs/choosing.md).

    The loss ranks only the classes `shown` to this model: a client does not unlearn what others know, and a chain does
    not push down classes that are still to come.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.zeros(CLASSES, dtype=torch.int64)
    rank[list(shown)] = torch.arange(len(shown))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    for step in range(steps):
        warmup, decay = min(1.0, (step + 1) / 10), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = rate * warmup * decay
        rows = torch.randint(len(samples.labels), (64,), generator=generator)
        images = view(jitter(samples.images[rows], generator)).to(device)
        logits = model(images)[:, list(shown)]
        loss = functional.cross_entropy(logits, rank[samples.labels[rows]].to(device), label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def average(models: Sequence[DigitNet], seen: Tensor) -> DigitNet:
    """The mean of several models; a class' row of the head weighs each model by how many samples of it that model saw.

    seen: [models, classes]. A client that never saw a class has nothing to say about its row; a plain mean would
    dilute the row of a class that only one client holds.
    """
    result = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, value in result.state_dict().items():
        value.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    seen = torch.where(seen.sum(0) > 0, seen, torch.ones_like(seen)).to(result.head.weight)
    weights = seen / seen.sum(0)
    for name, value in result.head.named_parameters():
        rows = torch.stack([model.head.get_parameter(name) for model in models])  # [models, classes(, features)]
        value.copy_((weights.view(*weights.shape, *[1] * (rows.ndim - 2)) * rows).sum(0))
    return result.eval()
