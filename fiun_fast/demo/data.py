"""Real data that needs no download: scikit-learn's 1,797 handwritten digits, split once per seed.

Training data teaches, validation data chooses alpha and lambda, test data is only ever measured on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CLASSES = 10


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


def load_digits(seed: int, *, validation: float = 0.2, test: float = 0.3) -> Digits:
    """Split the digits, class by class, into train (the remainder), validation and test."""
    from sklearn.datasets import load_digits as load  # heavy, and only the demo needs it

    raw = load()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {"test": [], "validation": [], "train": []}
    for label in range(CLASSES):
        rows = shuffled((labels == label).nonzero()[:, 0], generator)
        n_test, n_validation = round(test * len(rows)), round(validation * len(rows))
        sizes = [n_test, n_validation, len(rows) - n_test - n_validation]
        for part, chosen in zip(parts.values(), rows.split(sizes), strict=True):
            part.append(chosen)
    indices = {name: torch.cat(rows) for name, rows in parts.items()}
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
    """`copies` jittered versions of every sample, one at least."""
    return Samples(torch.cat([jitter(samples.images, generator) for _ in range(copies)]), samples.labels.repeat(copies))


def batches(samples: Samples, size: int, generator: torch.Generator, device: str = "cpu") -> Iterator[Samples]:
    """Shuffled mini-batches. A short last one is left out: in the batch estimator each batch weighs the same."""
    size = min(size, len(samples.labels))
    for rows in shuffled(torch.arange(len(samples.labels)), generator).split(size):
        if len(rows) == size:
            yield Samples(samples.images[rows].to(device), samples.labels[rows].to(device))
