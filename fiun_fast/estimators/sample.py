"""The estimators `sample` and `expected`: squared per-sample gradients for about the price of one backward per batch.

Before the first batch the model is tried on one and on two of its samples (`learn`). That shows which calls use the
selected parameters and whether each closed form agrees with autograd; a parameter for which anything does not fit
goes the per-sample way, and the provenance says so.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .job import Estimate, Job, NotApartError, checked, count, in_backward_of, take
from .learn import Learned, learn
from .per_sample import PerSample, weighted
from .predictions import Predictions
from .reading import check_loss
from .rounds import Round, drawn, every_class, number_of, one_position_each, predicted, probabilities
from .totals import Totals

FEWEST = 3  # samples that make a closed form worthwhile; with fewer, one after another is as cheap
GRAPH = "per-sample gradients, one backward per sample through the whole batch"


class SampleEstimate(Estimate):
    """(1/N) sum_n g_n^2 (`sample`), or (1/N) sum_n E_{y ~ p(y|x_n)} g_n(y)^2 (`expected`); n a sequence, or a token.

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
                "it holds a sparse tensor, which cannot be cut into samples: pass tensor.to_dense(), or take "
                'estimator="batch"'
            )
        samples = count(batch)
        if self._learned is None or (self._learned.samples < FEWEST <= samples):
            self._learned = learn(self._job, batch, samples)
        if not self._learned.separable:
            number = self._through_graph(batch)
        else:
            closed = self._closed(batch, samples) if samples >= FEWEST and self._learned.axes else None
            rest, rounds, number = closed or (list(self._job.selected), *self._plan_of(batch, samples))
            self._one_by_one(batch, samples, rest, rounds)
        self._totals.count(number)

    @property
    def totals(self) -> Totals:
        """Squares so far."""
        return self._totals

    def _closed(self, batch: Any, samples: int) -> tuple[list[str], Sequence[Round | None], int] | None:
        """Closed forms for all that have one; returns the other parameters, the rounds, and the number of samples.

        None: the loss of this batch, unlike the first one's, cannot be taken apart; nothing was added.
        """
        job, learned = self._job, self._learned
        assert learned is not None
        for p in job.selected.values():
            p.requires_grad_(False)  # no weight gradient is computed: the graph starts at the watch's anchor
        watch = Watch(job.selected, learned.calls, samples)
        with step_by_step(), watch:
            outputs, targets = job.forward(batch)
            if count(outputs) != samples:
                raise EstimationError(f"{samples} samples give {count(outputs)} outputs")
            try:
                rounds, number = self._plan(outputs, targets, samples)
                losses = weighted(job, outputs, targets, rounds[0])
            except NotApartError:
                return None
            fits = learned.fitting(watch.trace)
            uses = watch.trace.uses
            for use in uses:
                use.roles = {role: made for role, made in use.roles.items() if fits.issuperset(made.names)}
            uses = [use for use in uses if use.roles]
            gathering = Gathering(self._totals, job.selected, uses, samples)
            for use in uses:
                use.meet = partial(self._meet, gathering)
            if job.estimator == "expected":
                self._exact_at_head(list(filter(gathering.alone, uses)), predicted(outputs, targets))
            ways: dict[str, dict[str, None]] = {}
            for use in uses:
                for role, made in use.roles.items():
                    for name in made.names:
                        ways.setdefault(name, {})[rules.how(use, role)] = None
            watch.backward_begins()
            for i, round_ in enumerate(rounds):
                if i:
                    losses = weighted(job, outputs, targets, round_)
                if losses.requires_grad:
                    last = i == len(rounds) - 1
                    torch.autograd.backward([losses.sum()], retain_graph=not last)
                gathering.end()
        for name in fits:
            self._how[name] |= ways.get(name, {"no gradient reached it": None})
        return [name for name in job.selected if name not in fits], rounds, number

    def _meet(self, gathering: Gathering, use: Use, given: Tensor | None, gradient: Tensor) -> None:
        assert self._learned is not None
        gathering.meet(use, given, gradient, self._learned.axes.get(use.signature, rules.Axis(0)))

    def _one_by_one(self, batch: Any, samples: int, names: list[str], rounds: Sequence[Round | None]) -> None:
        if not names:
            return
        way = self._per_sample.add(batch, samples, names, rounds)
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
        rounds, number = self._plan(outputs, targets, count(outputs))
        counted = predicted(outputs, targets).counted if job.estimator == "expected" else job.counted(outputs, targets)
        for round_ in rounds:
            losses = weighted(job, outputs, targets, round_)
            check_loss(losses.sum(), job.selected)
            for n in range(len(losses)):
                if counted is not None and not bool(counted[n].any()):
                    continue
                one = [take(part, slice(n, n + 1), len(losses)) for part in (outputs, targets)]
                with in_backward_of(job, *one):
                    self._per_sample.add_gradients(losses[n], list(job.selected), keep_graph=True)
        assert self._learned is not None
        self._warn(list(job.selected))
        for name in job.selected:
            self._how[name][f"{GRAPH}; {self._learned.reasons[name]}"] = None
        return number

    def _plan_of(self, batch: Any, samples: int) -> tuple[Sequence[Round | None], int]:
        """The rounds and the number of samples of a batch that has not been forwarded yet."""
        if self._job.options.loss_fn is not None:
            return [None], samples
        with torch.no_grad():
            return self._plan(*self._job.forward(batch), samples)

    def _plan(self, outputs: Any, targets: Any, samples: int) -> tuple[Sequence[Round | None], int]:
        """Losses whose squared gradients add up to what is wanted, None for that of the targets; and over how many.

        Samples without a prediction that counts are none.
        """
        job, options = self._job, self._job.options
        self._totals.note(outputs, reduction="" if options.loss_fn else "mean", per=options.per)
        if job.estimator == "expected":
            found = predicted(outputs, targets)
            number = number_of(found, options.per)
            if options.samples == 0:
                return every_class(found, options.per), number
            return drawn(found, options.samples, options.per, self._generator), number
        if options.per == "token":
            known = job.known_loss(outputs, targets)
            if not isinstance(known, Predictions):
                raise EstimationError(
                    "per='token' needs logits and a label for each token, and the model's own loss is not the cross "
                    "entropy of these; pass forward_fn=lambda model, batch: (logits, targets)"
                )
            return one_position_each(checked(known)), number_of(known, "token")
        counted = job.counted(outputs, targets)
        return [None], samples if counted is None else int(counted.sum())

    def _exact_at_head(self, uses: Sequence[Use], predictions: Predictions) -> None:
        """Where the logits are a linear layer's own, the expectation over labels needs no draw: E[δ^2] = p (1 - p).

        Predictions at several positions are uncorrelated, so each counts as a sample of its own, by its weight.
        """
        for use in uses:
            if use.rule != "linear" or use.output is not predictions.logits or use.owners is not None:
                continue
            if not predictions.last and predictions.logits.dim() > 2:  # its features are positions
                continue
            p, counted = probabilities(predictions), predictions.counted.reshape(len(predictions.logits), -1)
            weight = counted / (1 if self._job.options.per == "token" else counted.sum(1, keepdim=True).clamp(min=1))
            delta = (p * (1 - p)).sqrt() * weight.view(*p.shape[:-1], 1)
            delta = delta.flatten(0, -2)
            use.meet = _Once(Gathering(self._totals, self._job.selected, [use], len(delta)), delta)
            use.note = ", exact over classes"

    def result(self) -> Fisher:
        """The mean over the samples."""
        how = {name: " and ".join(ways) + (f" ({self._why})" if self._why else "") for name, ways in self._how.items()}
        return self._totals.fisher(how)


def _some(names: Sequence[str], most: int = 4) -> str:
    """The first few of them."""
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


class _Once:
    """Meets once, in the first round, with gradients of its own, [samples, C]; later rounds are ignored."""

    def __init__(self, gathering: Gathering, gradient: Tensor) -> None:
        self._gathering: Gathering | None = gathering
        self._gradient = gradient

    def __call__(self, use: Use, given: Tensor | None, gradient: Tensor) -> None:
        if self._gathering is not None:
            assert given is not None
            self._gathering.meet(use, given.reshape(-1, given.shape[-1]), self._gradient, rules.Axis(0))
            self._gathering = None
