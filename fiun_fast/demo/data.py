"""Real data that needs no download, and the small network that learns it.

scikit-learn's 1,797 handwritten digits, split once per seed: training data teaches, validation data chooses alpha and
lambda, test data is only ever measured on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
TEST, VALIDATION = 0.3, 0.2  # shares of the digits; the rest is for training
View = Callable[[Tensor], Tensor]  # how a model sees the images: [n, 1, 8, 8] -> [n, 1, 8, 8]


class Samples(NamedTuple):
    """Images with their labels."""

    images: Tensor  # [n, 1, 8, 8] float32 in 0..1
    labels: Tensor  # [n] int64

    def only(self, classes: Iterable[int]) -> Samples:
        """The samples of these classes."""
        keep = torch.isin(self.labels, torch.tensor(sorted(classes)))
        return Samples(self.images[keep], self.labels[keep])

    def without(self, classes: Iterable[int]) -> Samples:
        """The samples of every other class."""
        return self.only(set(range(CLASSES)) - set(classes))

    @property
    def classes(self) -> frozenset[int]:
        """The labels that occur."""
        return frozenset(self.labels.tolist())


def join(parts: Iterable[Samples]) -> Samples:
    """All parts, one after another."""
    images, labels = zip(*parts, strict=True)
    return Samples(torch.cat(images), torch.cat(labels))


@dataclass(frozen=True)
class Digits:
    """One stratified split; `indices` names the rows of the data set behind each part."""

    train: Samples
    validation: Samples
    test: Samples
    indices: dict[str, Tensor]


def load_digits(seed: int) -> Digits:
    """Split the digits, class by class, into train, validation and test."""
    from sklearn.datasets import load_digits as load  # heavy, and only the demo needs it

    raw, generator = load(), torch.Generator().manual_seed(seed)
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    parts = []
    for label in range(CLASSES):
        rows = shuffled((labels == label).nonzero()[:, 0], generator)
        sizes = [round(TEST * len(rows)), round(VALIDATION * len(rows))]
        parts.append(rows.split([*sizes, len(rows) - sum(sizes)]))
    names = ("test", "validation", "train")
    indices = {name: torch.cat(rows) for name, rows in zip(names, zip(*parts, strict=True), strict=True)}
    split = {name: Samples(images[rows], labels[rows]) for name, rows in indices.items()}
    return Digits(**split, indices=indices)


def shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    """The same rows in random order."""
    return rows[torch.randperm(len(rows), generator=generator)]


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, shift by up to 0.6 pixel, scale by up to 10 %: [n, 1, 8, 8] -> [n, 1, 8, 8]."""
    n = len(images)
    turn, scale, dx, dy = (torch.rand(4, n, generator=generator) * 2 - 1).unbind()
    turn, scale = turn * math.radians(12), 1 + 0.1 * scale
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = turn.cos() * scale
    matrix[:, 1, 0] = turn.sin() * scale
    matrix[:, 0, 1] = -matrix[:, 1, 0]
    matrix[:, 0, 2], matrix[:, 1, 2] = dx * 0.6 * 2 / 8, dy * 0.6 * 2 / 8  # affine_grid spans -1..1 over 8 pixels
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def jittered(samples: Samples, copies: int, generator: torch.Generator) -> Samples:
    """Jittered versions of every sample, `copies` of each, at least one."""
    return Samples(torch.cat([jitter(samples.images, generator) for _ in range(copies)]), samples.labels.repeat(copies))


def batches(samples: Samples, size: int, generator: torch.Generator, device: str = "cpu") -> Iterator[Samples]:
    """Shuffled mini-batches. A short last one is left out: in the batch estimator each batch weighs the same."""
    size = min(size, len(samples.labels))
    for rows in shuffled(torch.arange(len(samples.labels)), generator).split(size):
        if len(rows) == size:
            yield Samples(samples.images[rows].to(device), samples.labels[rows].to(device))


class DigitNet(nn.Module):
    """`body`: images [n, 1, 8, 8] -> features [n, 64]; `head`: features -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()

        def block(n_in: int, n_out: int) -> list[nn.Module]:
            return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]

        convolutions = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32)]
        last = [nn.Linear(128, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
        self.body = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *last)
        self.head = nn.Linear(64, CLASSES)

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
    smoothing: float,
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
