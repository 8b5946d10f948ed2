"""Many linear heads on the same features, trained and estimated as one batched computation in one storage."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..fisher import Fisher
from ..guards import signals_deferred
from ..layout import Layout
from ..storage import stack_

Loaders = dict[str, list[tuple[Tensor, Tensor]]]


class Heads:
    """S heads [C, D] on features x [N, D] with labels y [N], each of which knows some of the samples.

    Args:
        x: features; samples in question come first.
        y: labels.
        classes: C.
        member: which head knows which of the samples in question, [S, n] bool; the others are known to all.
        seed: of the heads' beginning and of the mini-batches.

    """

    def __init__(self, x: Tensor, y: Tensor, classes: int, member: Tensor, seed: int) -> None:
        self.x, self.y, self.classes, self.member = x.float(), y, classes, member
        everything = torch.ones(len(member), len(y) - member.shape[1], dtype=torch.bool)
        self.known = torch.cat([member, everything], 1)  # [S, N]
        self._dice = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.modules = {str(k): nn.Linear(x.shape[1], classes) for k in range(len(member))}
        self._storage = stack_(self.modules)  # [S, C D + C]: weight, bias

    def train(self, steps: int, lr: float, batch: int, smoothing: float) -> None:
        """Of each mini-batch every head takes the samples that it knows; AdamW without decay, a cosine to 0."""
        theta = self._storage.detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([theta], lr=lr, weight_decay=0.0)
        with torch.inference_mode(False), torch.enable_grad():
            for k in range(steps):
                optimizer.param_groups[0]["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * k / steps))
                rows = torch.randint(len(self.y), (min(batch, len(self.y)),), generator=self._dice)
                logits, known = self._logits(theta, self.x[rows]), self.known[:, rows]
                losses = functional.cross_entropy(
                    logits.transpose(1, 2),
                    self.y[rows].expand(len(logits), -1),
                    reduction="none",
                    label_smoothing=smoothing,
                )
                loss = ((losses * known).sum(1) / known.sum(1).clamp(min=1)).sum()  # heads do not meet in it
                (theta.grad,) = torch.autograd.grad(loss, theta)
                optimizer.step()
        with torch.no_grad(), signals_deferred():
            self._storage.copy_(theta)

    def phi(self) -> Tensor:
        """log(p_y / (1 - p_y)) of every head on every sample in question: [S, n] float64."""
        count = self.member.shape[1]
        logits = self._logits(self._storage.double(), self.x[:count].double())
        at = self.y[:count].expand(len(logits), -1)[..., None]
        others = logits.scatter(2, at, -torch.inf).logsumexp(2)
        return logits.gather(2, at)[..., 0] - others

    def fishers(self, estimator: str, batch: int) -> tuple[dict[str, Fisher], dict[str, Fisher]]:
        """For each head the Fisher over all that it knows, and that over the samples in question that it knows.

        What `ff.estimate_fisher` gives for each head by itself over mini-batches that hold `batch` of its samples on
        average, in closed form: with δ = p - onehot(y), `batch` squares δ^T x of each mini-batch's mean loss, `sample`
        adds up (δ²)^T x², `expected` (p (1 - p))^T x².
        """
        count = self.member.shape[1]
        layout = Layout.from_module(self.modules["0"])
        every = torch.randperm(len(self.y), generator=self._dice)
        found = []
        for rows in (every, every[every < count]):
            known_by_each = int(self.known[:, rows].sum()) / len(self.known)
            chunks = rows.tensor_split(max(1, round(known_by_each / batch)))
            buffer = self.fisher(chunks, estimator)
            found.append({name: Fisher(row, layout) for name, row in zip(self.modules, buffer, strict=True)})
        return found[0], found[1]

    def fisher(self, chunks: tuple[Tensor, ...], estimator: str) -> Tensor:
        """[S, C D + C], a mean over the mini-batches of which a head knows a sample, or over its samples."""
        total = torch.zeros_like(self._storage.detach())
        steps = torch.zeros(len(total))
        for rows in chunks:
            known, x = self.known[:, rows], self.x[rows]
            with torch.no_grad():
                p = self._logits(self._storage, x).softmax(2)
            d = p - functional.one_hot(self.y[rows], self.classes) if estimator != "expected" else (p * (1 - p)).sqrt()
            d = d * known[..., None]
            if estimator == "batch":
                d = d / known.sum(1).clamp(min=1)[:, None, None]
                total += self._joined(torch.einsum("snc,nd->scd", d, x), d.sum(1)).square_()
                steps += known.any(1)
            else:
                d = d.square()
                total += self._joined(torch.einsum("snc,nd->scd", d, x.square()), d.sum(1))
                steps += known.sum(1)
        return total / steps.clamp(min=1)[:, None]

    def loaders(self, batch: int) -> tuple[Loaders, Loaders]:
        """For each head batches of the samples in question that it knows, and of all others."""
        count = self.member.shape[1]
        kept = self._batches(torch.arange(count, len(self.y)), batch)
        return (
            {k: self._batches(row.nonzero()[:, 0], batch) for k, row in zip(self.modules, self.member, strict=True)},
            dict.fromkeys(self.modules, kept),
        )

    def _batches(self, rows: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        return [(self.x[of], self.y[of]) for of in rows.split(size)]

    def _logits(self, theta: Tensor, x: Tensor) -> Tensor:
        """[S, n, C] of rows [S, C D + C] and features [n, D]."""
        size = self.classes * x.shape[1]
        weight = theta[:, :size].unflatten(1, (self.classes, x.shape[1]))
        return torch.einsum("nd,scd->snc", x, weight) + theta[:, None, size:]

    @staticmethod
    def _joined(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([weight.flatten(1), bias], 1)
