"""The estimators `sample` and `expected`: squared per-sample gradients for about the price of one backward per batch.

Before the first batch the model is tried on one and on two of its samples (`learn`). That shows which calls use the
selected parameters and whether each closed form agrees with autograd; a parameter for which anything does not fit
goes the per-sample way, and the provenance says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import EstimationError, FallbackWarning, warn
from ..fisher import Fisher
from . import rules
from .capture import Use, Watch, step_by_step
from .gathering import Gathering
from .job import Estimate, Job, count
from .learn import Learned, learn
from .per_sample import PerSample, Round, weighted
from .reading import check_loss
from .totals import Totals

FEWEST = 3  # samples that make a closed form worthwhile; with fewer, one after another is as cheap
GRAPH = "per-sample gradients, one backward per sample through the whole batch"


class SampleEstimate(Estimate):
    """(1/N) sum_n g_n^2 (`sample`), or (1/N) sum_n E_{y ~ p(y|x_n)} g_n(y)^2 (`expected`).

    why: why no cheaper way was taken; goes into the provenance.
    """

    def __init__(self, job: Job, why: str = "") -> None:
        self._job, self._why = job, why
        for name, p in job.selected.items():
            if p._backward_hooks:
                raise EstimationError(
                    f"parameter {name!r} has a gradient hook, which does not see the gradients of single samples: "
                    'remove it meanwhile, or take estimator="batch"'
                )
        self._totals = Totals(job.selected, job.estimator, backend=job.options.backend)
        self._per_sample = PerSample(job, self._totals)
        self._learned: Learned | None = None
        self._how: dict[str, dict[str, None]] = {name: {} for name in job.selected}  # each way once, in order
        self._slow: set[str] = set()  # parameters that were warned of
        self._generator = torch.Generator(self._totals.buffer.device).manual_seed(job.options.seed)

    def step(self, batch: Any) -> None:
        """Add the squares of every sample of a batch."""
        if any(isinstance(leaf, Tensor) and "sparse" in str(leaf.layout) for leaf in pytree.tree_leaves(batch)):
            raise EstimationError(
                f"batch {self._totals.steps} holds a sparse tensor, which cannot be cut into samples: pass "
                'tensor.to_dense(), or take estimator="batch"'
            )
        samples = count(batch)
        if self._learned is None or (self._learned.samples < FEWEST <= samples):
            self._learned = learn(self._job, batch, samples)
        if not self._learned.separable:
            samples = self._through_graph(batch)
        else:
            rest, rounds = self._closed(batch, samples) if samples >= FEWEST and self._learned.axes else (None, None)
            self._one_by_one(batch, samples, list(self._job.selected) if rest is None else rest, rounds)
        self._totals.count(samples)

    def _closed(self, batch: Any, samples: int) -> tuple[list[str], Sequence[Round | None]]:
        """Closed forms for all parameters that have one; returns the others, and the rounds."""
        job, learned = self._job, self._learned
        assert learned is not None
        for p in job.selected.values():
            p.requires_grad_(False)  # no weight gradient is computed: the graph starts at the watch's anchor
        watch = Watch(job.selected, learned.calls, samples)
        with step_by_step(), watch:
            outputs, targets = job.forward(batch)
            if count(outputs) != samples:
                raise EstimationError(f"batch {self._totals.steps}: {samples} samples give {count(outputs)} outputs")
            rounds = self._rounds(outputs)
            losses = weighted(job, outputs, targets, rounds[0], self._totals.steps)
            fits = learned.fitting(watch.trace)
            uses = watch.trace.uses
            for use in uses:
                use.roles = {role: made for role, made in use.roles.items() if fits.issuperset(made.names)}
            uses = [use for use in uses if use.roles]
            gathering = Gathering(self._totals, job.selected, uses, samples)
            for use in uses:
                use.meet = partial(self._meet, gathering)
            if job.estimator == "expected":
                _exact_at_head(filter(gathering.alone, uses), outputs)
            ways: dict[str, dict[str, None]] = {}
            for use in uses:
                for role, made in use.roles.items():
                    for name in made.names:
                        ways.setdefault(name, {})[rules.how(use, role)] = None
            watch.backward_begins()
            for i, round_ in enumerate(rounds):
                if i:
                    losses = weighted(job, outputs, targets, round_, self._totals.steps)
                if losses.requires_grad:
                    last = i == len(rounds) - 1
                    torch.autograd.backward([losses.sum()], retain_graph=not last)
                gathering.end()
        for name in fits:
            self._how[name] |= ways.get(name, {"no gradient reached it": None})
        return [name for name in job.selected if name not in fits], rounds

    def _meet(self, gathering: Gathering, use: Use, given: Tensor | None, gradient: Tensor) -> None:
        assert self._learned is not None
        gathering.meet(use, given, gradient, self._learned.axes.get(use.signature, rules.Axis(0)))

    def _one_by_one(self, batch: Any, samples: int, names: list[str], rounds: Sequence[Round | None] | None) -> None:
        if not names:
            return
        if rounds is None:
            with torch.no_grad():
                rounds = [None] if self._job.estimator == "sample" else self._rounds(self._job.forward(batch)[0])
        way = self._per_sample.add(batch, samples, names, rounds, self._totals.steps)
        assert self._learned is not None
        if samples >= FEWEST:
            self._warn(names)
        for name in names:
            why = self._learned.reasons.get(name)
            self._how[name][f"{way}; {why}" if why and samples >= FEWEST else way] = None

    def _warn(self, names: Sequence[str]) -> None:
        """Say once which parameters take a backward for every sample, and why."""
        assert self._learned is not None
        reasons: dict[str, list[str]] = {}
        for name in names:
            if name not in self._slow:
                reasons.setdefault(self._learned.reasons.get(name, "nothing in the model uses it alike"), []).append(
                    name
                )
        self._slow.update(names)
        if reasons:
            which = "; ".join(f"{_some(found)}: {why}" for why, found in reasons.items())
            number = sum(map(len, reasons.values()))
            warn(
                f"{number} of {len(self._how)} parameters have no closed form and take a backward for every sample, "
                f"which is slow. {which}",
                FallbackWarning,
            )

    def _through_graph(self, batch: Any) -> int:
        """The last resort, for a batch that cannot be cut into samples: one forward, one backward per sample."""
        job = self._job
        for p in job.selected.values():
            p.requires_grad_(True)
        outputs, targets = job.forward(batch)
        for round_ in self._rounds(outputs):
            losses = weighted(job, outputs, targets, round_, self._totals.steps)
            check_loss(losses.sum(), self._totals.steps, job.selected)
            for n in range(len(losses)):
                self._per_sample.add_gradients(losses[n], list(job.selected), keep_graph=True)
        assert self._learned is not None
        self._warn(list(job.selected))
        for name in job.selected:
            self._how[name][f"{GRAPH}; {self._learned.reasons[name]}"] = None
        return len(losses)

    def _rounds(self, outputs: Any) -> list[Round | None]:
        """Labels and factors whose squared gradients add up to the expectation; for `sample` the targets themselves."""
        if self._job.estimator == "sample":
            return [None]
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            found = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise EstimationError(f"batch {self._totals.steps}: outputs of {found}, expected logits [B, classes]")
        p = outputs.detach().float().softmax(1)
        if self._job.options.samples == 0:
            return [Round(torch.full_like(p[:, c], c, dtype=torch.long), p[:, c].sqrt()) for c in range(p.shape[1])]
        drawn = torch.multinomial(p, self._job.options.samples, replacement=True, generator=self._generator)
        return [Round(labels, torch.full_like(p[:, 0], self._job.options.samples**-0.5)) for labels in drawn.unbind(1)]

    def result(self) -> Fisher:
        """The mean over the samples."""
        how = {name: " and ".join(ways) + (f" ({self._why})" if self._why else "") for name, ways in self._how.items()}
        return self._totals.fisher(how)


def _some(names: Sequence[str], most: int = 4) -> str:
    """The first few of them."""
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _exact_at_head(uses: Iterable[Use], outputs: Tensor) -> None:
    """Where the outputs are a linear layer's own, its expectation over labels needs no draw: E[δ^2] = p (1 - p)."""
    for use in uses:
        if use.rule == "linear" and use.output is outputs and use.meet is not None:
            p = outputs.detach().float().softmax(1)
            use.meet, use.note = _Once(use.meet, (p * (1 - p)).sqrt()), ", exact over classes"


class _Once:
    """Meets once, in the first round, with a gradient of its own; later rounds are ignored."""

    def __init__(self, meet: Callable[[Use, Tensor | None, Tensor], None], gradient: Tensor) -> None:
        self._meet: Callable[[Use, Tensor | None, Tensor], None] | None = meet
        self._gradient = gradient

    def __call__(self, use: Use, given: Tensor | None, gradient: Tensor) -> None:
        if self._meet is not None:
            self._meet(use, given, self._gradient)
            self._meet = None
