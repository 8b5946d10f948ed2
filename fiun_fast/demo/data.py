"""Real data that needs no download, and the small network that learns it.

scikit-learn's 1,797 handwritten digits, split once per seed: training data teaches, validation data chooses alpha and
lambda, test data is only ever measured on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
TEST, VALIDATION = 0.3, 0.2  # shares of the digits; the rest is for training


class Samples(NamedTuple):
    """Images with their labels."""

    images: Tensor  # [n, 1, 8, 8] float32 in 0..1
    labels: Tensor  # [n] int64

    def take(self, rows: Tensor) -> Samples:
        """These rows: [m] int64, or [n] bool."""
        return Samples(self.images[rows], self.labels[rows])

    def only(self, classes: Iterable[int]) -> Samples:
        """The samples of these classes."""
        return self.take(torch.isin(self.labels, torch.tensor(sorted(classes), dtype=torch.int64)))

    def without(self, classes: Iterable[int]) -> Samples:
        """The samples of every other class."""
        return self.only(self.classes - set(classes))

    @property
    def classes(self) -> frozenset[int]:
        """The labels that occur."""
        return frozenset(self.labels.tolist())

    def by_class(self, seed: int) -> list[Tensor]:
        """The rows of each class, in random order."""
        generator = torch.Generator().manual_seed(seed)
        rows = [(self.labels == label).nonzero()[:, 0] for label in range(CLASSES)]
        return [of[torch.randperm(len(of), generator=generator)] for of in rows]


def join(parts: Iterable[Samples]) -> Samples:
    """All parts, one after another."""
    return Samples(*map(torch.cat, zip(*parts, strict=True)))


class Digits(NamedTuple):
    """One stratified split."""

    train: Samples
    validation: Samples
    test: Samples


def load_digits(seed: int) -> Digits:
    """Split the digits, class by class, into train, validation and test."""
    from sklearn.datasets import load_digits as load  # heavy, and only the demo needs it

    images, labels = map(torch.tensor, load(return_X_y=True))
    digits = Samples(images.float().view(-1, 1, 8, 8) / 16, labels.long())
    parts = []
    for rows in digits.by_class(seed):
        sizes = [round(TEST * len(rows)), round(VALIDATION * len(rows))]
        parts.append(rows.split([*sizes, len(rows) - sum(sizes)]))
    test, validation, train = (digits.take(torch.cat(rows)) for rows in zip(*parts, strict=True))
    return Digits(train, validation, test)


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, shift by up to 0.6 pixel, scale by up to 10 %: [n, 1, 8, 8] -> [n, 1, 8, 8]."""
    turn, scale, dx, dy = (torch.rand(4, len(images), generator=generator) * 2 - 1).unbind()
    turn, scale = turn * math.radians(12), 1 + 0.1 * scale
    dx, dy = dx * 0.6 * 2 / 8, dy * 0.6 * 2 / 8  # affine_grid spans -1..1 over 8 pixels
    cos, sin = turn.cos() * scale, turn.sin() * scale
    matrix = torch.stack([cos, -sin, dx, sin, cos, dy], 1).view(-1, 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def jittered(samples: Samples, copies: int, generator: torch.Generator) -> Samples:
    """Jittered versions of every sample, `copies` of each, at least one."""
    return Samples(torch.cat([jitter(samples.images, generator) for _ in range(copies)]), samples.labels.repeat(copies))


def batches(samples: Samples, size: int, generator: torch.Generator) -> Iterator[Samples]:
    """Shuffled mini-batches. A short last one is left out: in the batch estimator each batch weighs the same."""
    size = min(size, len(samples.labels))
    rows = torch.randperm(len(samples.labels), generator=generator)
    return (samples.take(of) for of in rows.split(size) if len(of) == size)


class DigitNet(nn.Module):
    """`body`: images [n, 1, 8, 8] -> features [n, 64]; `head`: features -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()

        def block(n_in: int, n_out: int) -> list[nn.Module]:
            return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]

        convolutions = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.MaxPool2d(2)]
        last = [nn.Linear(128, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
        self.body = nn.Sequential(*convolutions, nn.Flatten(), *last)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images [n, 1, 8, 8] -> logits [n, 10]."""
        return self.head(self.body(images))


def fresh(seed: int) -> DigitNet:
    """A newly initialised network; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitNet()


@torch.no_grad()
def accuracies(model: nn.Module, samples: Samples, forgotten: Iterable[int]) -> tuple[float, float]:
    """Of a model in eval mode: on the forgotten classes (nan if there is none), and on the others."""
    right = (model(samples.images).argmax(1) == samples.labels).float()
    gone = torch.isin(samples.labels, torch.tensor(list(forgotten), device=samples.labels.device))
    return right[gone].mean().item(), right[~gone].mean().item()
