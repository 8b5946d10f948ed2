"""The estimators `sample` and `expected`: squared per-sample gradients for about the price of one backward a batch.

Before the first batch the model is tried on one and on two of its samples (`learn`). That shows which calls use the
selected parameters and whether each closed form agrees with autograd; a parameter for which anything does not fit takes
the per-sample way, and the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import EstimationError
from ..fisher import Fisher, Provenance
from . import rules
from .capture import Use, Watch, step_by_step_attention
from .job import Estimate, Job, checked, count
from .learn import Learned, learn
from .per_sample import PerSample, Round, weighted
from .sums import Sums

FEWEST = 3  # samples in a batch worth a closed form; with fewer, one after another is as cheap
GRAPH = "per-sample gradients, a backward each through the whole batch"


class SampleEstimate(Estimate):
    """(1/N) sum_n g_n^2 (`sample`), or (1/N) sum_n E_{y ~ p(y|x_n)} g_n(y)^2 (`expected`).

    why: why no cheaper way was taken, for the record.
    """

    def __init__(self, job: Job, why: str = "") -> None:
        self._job, self._why = job, why
        self._sums = Sums(job.selected, job.backend)
        self._per_sample = PerSample(job, self._sums)
        self._learned: Learned | None = None
        self._how: dict[str, dict[str, None]] = {name: {} for name in job.selected}  # ways, each once, in order
        self._generator = torch.Generator(self._sums.buffer.device).manual_seed(job.seed)
        self._steps = self._samples = 0

    def step(self, batch: Any) -> None:
        """Add the squares of every sample of a batch."""
        samples = count(batch)
        if self._learned is None or (self._learned.samples < FEWEST <= samples):
            self._learned = learn(self._job, batch, samples)
        if not self._learned.separable:
            samples = self._through_graph(batch)
        else:
            rest, rounds = self._closed(batch, samples) if samples >= FEWEST and self._learned.axes else (None, None)
            self._one_by_one(batch, samples, list(self._job.selected) if rest is None else rest, rounds)
        self._steps += 1
        self._samples += samples

    def _closed(self, batch: Any, samples: int) -> tuple[list[str], Sequence[Round | None]]:
        """Closed forms for all parameters that have one; returns the others, and the rounds."""
        job, learned = self._job, self._learned
        assert learned is not None
        for p in job.selected.values():
            p.requires_grad_(False)  # no gradient of a weight is computed: the graph hangs on the watch's anchor
        watch = Watch(job.selected)
        with step_by_step_attention(), watch:
            outputs, targets = job.forward(batch)
            if count(outputs) != samples:
                raise EstimationError(f"batch {self._steps}: {samples} samples give {count(outputs)} outputs")
            rounds = self._rounds(outputs)
            losses = weighted(job, outputs, targets, rounds[0], self._steps)
            fits = learned.fitting(watch.trace)
            for use in watch.trace.uses:
                use.targets = {role: t for role, t in use.targets.items() if t.name in fits}
                if use.targets:
                    use.meet = partial(self._meet, samples=samples)
            if job.estimator == "expected":
                _exact_at_head(watch.trace.uses, outputs)
            ways = {t.name: rules.how(use, role) for use in watch.trace.uses for role, t in use.targets.items()}
            watch.backward_begins()
            for i, round_ in enumerate(rounds):
                if i:
                    losses = weighted(job, outputs, targets, round_, self._steps)
                if losses.requires_grad:
                    last = i == len(rounds) - 1
                    torch.autograd.backward([losses.sum()], retain_graph=not last)
        for name in fits:
            self._how[name][ways.get(name, "no gradient reached it")] = None
        return [name for name in job.selected if name not in fits], rounds

    def _meet(self, use: Use, given: Tensor, gradient: Tensor, samples: int) -> None:
        assert self._learned is not None
        rules.apply(self._sums, use, given, gradient, self._learned.axes[use.signature], samples)

    def _one_by_one(self, batch: Any, samples: int, names: list[str], rounds: Sequence[Round | None] | None) -> None:
        if not names:
            return
        if rounds is None:
            with torch.no_grad():
                rounds = [None] if self._job.estimator == "sample" else self._rounds(self._job.forward(batch)[0])
        way = self._per_sample.add(batch, samples, names, rounds, self._steps)
        assert self._learned is not None
        for name in names:
            why = self._learned.reasons.get(name)
            self._how[name][f"{way}; {why}" if why and samples >= FEWEST else way] = None

    def _through_graph(self, batch: Any) -> int:
        """The last resort, for a batch that cannot be cut into samples: one forward, a backward a sample."""
        job = self._job
        for p in job.selected.values():
            p.requires_grad_(True)
        outputs, targets = job.forward(batch)
        for round_ in self._rounds(outputs):
            losses = weighted(job, outputs, targets, round_, self._steps)
            checked(losses.sum(), self._steps, job.selected)
            for n in range(len(losses)):
                self._per_sample.add_gradients(losses[n], list(job.selected), keep_graph=True)
        assert self._learned is not None
        for name in job.selected:
            self._how[name][f"{GRAPH}; {self._learned.reasons[name]}"] = None
        return len(losses)

    def _rounds(self, outputs: Any) -> list[Round | None]:
        """Labels and factors whose squared gradients add up to the expectation; for `sample` the targets themselves."""
        if self._job.estimator == "sample":
            return [None]
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            found = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise EstimationError(f"batch {self._steps}: outputs of {found}, expected logits [B, classes]")
        p = outputs.detach().float().softmax(1)
        if self._job.samples == 0:
            return [Round(torch.full_like(p[:, c], c, dtype=torch.long), p[:, c].sqrt()) for c in range(p.shape[1])]
        drawn = torch.multinomial(p, self._job.samples, replacement=True, generator=self._generator)
        return [Round(labels, torch.full_like(p[:, 0], self._job.samples**-0.5)) for labels in drawn.unbind(1)]

    def result(self) -> Fisher:
        """The mean over the samples."""
        if self._steps == 0:
            raise EstimationError("the loader is empty: no batch to estimate a Fisher from")
        how = {name: " and ".join(ways) + (f" ({self._why})" if self._why else "") for name, ways in self._how.items()}
        record = Provenance(self._job.estimator, self._steps, self._samples, how)
        return Fisher(self._sums.buffer / self._samples, self._sums.layout, record)


def _exact_at_head(uses: Sequence[Use], outputs: Tensor) -> None:
    """Where the outputs are a linear layer's own, its expectation over labels needs no draw: E[δ^2] = p (1 - p)."""
    for use in uses:
        if use.rule == "linear" and use.output is outputs and use.meet is not None:
            p = outputs.detach().float().softmax(1)
            use.meet, use.note = _Once(use.meet, (p * (1 - p)).sqrt()), ", exact over classes"


class _Once:
    """In the first round, meets with a gradient of its own; in the others not at all."""

    def __init__(self, meet: Callable[[Use, Tensor, Tensor], None], gradient: Tensor) -> None:
        self._meet: Callable[[Use, Tensor, Tensor], None] | None = meet
        self._gradient = gradient

    def __call__(self, use: Use, given: Tensor, gradient: Tensor) -> None:
        if self._meet is not None:
            self._meet(use, given, self._gradient)
            self._meet = None
