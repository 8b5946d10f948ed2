"""Try a model on one and on two samples: what has a closed form, on which axis the samples lie, what does not fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import FiunError
from . import rules
from .capture import Signature, Trace, Use, Watch, step_by_step_attention
from .job import Job, NotApartError, count, take
from .per_sample import backward, weighted
from .predictions import IGNORED
from .reading import OwnLoss, check_loss
from .rounds import Round, predicted
from .rules import Axis
from .totals import Totals

AGREE = {torch.float16: 0.1, torch.bfloat16: 0.1}  # relative to a parameter's largest entry
AGREE_FLOAT = 1e-2  # a GPU may compute autograd's convolutions in tf32


@dataclass
class Learned:
    """What a first batch has shown.

    samples: how many that batch had.
    separable: one sample of a batch can be evaluated alone.
    axes: for every use with a closed form, the axis of the samples.
    closed: parameters with a closed form, and how often each use of them occurs.
    reasons: for all others, why not.
    """

    samples: int
    separable: bool = True
    axes: dict[Signature, Axis] = field(default_factory=dict)
    closed: dict[str, Counter[Signature]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def fitting(self, trace: Trace) -> set[str]:
        """The closed-form parameters that this pass used as the first one did; records why the others do not fit."""
        seen = _by_parameter(trace)
        fits = {n for n, uses in self.closed.items() if n not in trace.strange and seen.get(n, Counter()) == uses}
        for name in self.closed.keys() - fits:
            self.reasons.setdefault(name, "not used alike in every batch")
        return fits


def learn(job: Job, batch: Any, samples: int) -> Learned:
    """Compare one and two samples of a batch, and every closed form with autograd on one of the two.

    Raises:
        FiunError: what any estimator would refuse: a batch of an unknown form, a loss that depends on nothing.

    """
    learned = Learned(samples)
    for p in job.selected.values():
        p.requires_grad_(True)
    try:
        if samples == 0:
            raise ValueError("it holds no tensor")
        alone = Watch(job.selected)
        with step_by_step_attention(), alone:
            single, targets = job.forward(take(batch, slice(0, 1), samples))
        if isinstance(targets, OwnLoss) and single is None:
            raise NotApartError("the model returns its loss alone")
        if count(single) != 1:
            raise ValueError(f"one sample gives {count(single)} outputs")
        if samples > 1:
            _compare(job, learned, alone.trace, single, take(batch, slice(0, 2), samples))
    except NotApartError:
        learned.reasons = dict.fromkeys(job.selected, "the loss is the model's own, one number for a whole batch")
    except FiunError:
        raise
    except Exception as error:  # a model may raise anything on a batch of one; its own errors come on the whole batch
        learned.separable = False
        what = str(error).strip().partition("\n")[0][:80]
        learned.reasons = dict.fromkeys(job.selected, f"a batch cannot be cut into samples: {what}")
    return learned


def _compare(job: Job, learned: Learned, alone: Trace, single: Any, two: Any) -> None:
    """Fill in `learned` from a forward and backward on two samples, of which only the second has a loss."""
    watch = Watch(job.selected)
    totals = Totals(job.selected, job.estimator, backend=job.options.backend)
    with step_by_step_attention(), watch:
        outputs, targets = job.forward(two)
        if count(outputs) != 2:
            raise ValueError(f"two samples give {count(outputs)} outputs")
        losses = weighted(job, outputs, targets, _likeliest(outputs, targets) if job.estimator == "expected" else None)
        check_loss(losses[1], job.selected)
        trace = watch.trace
        if not _same(single, take(outputs, slice(0, 1), 2)):
            learned.reasons = dict.fromkeys(job.selected, "the outputs of a sample depend on the others of its batch")
            return
        axes = _axes(alone, trace, learned.reasons)
        mixed: set[Signature] = set()

        def meet(use: Use, given: Tensor, gradient: Tensor) -> None:
            fitting = [axis for axis in axes[use.signature] if not axis.first(gradient, 2)[0].any()]
            if len(fitting) == 1:
                axes[use.signature] = fitting
                rules.apply(totals, use, given, gradient, fitting[0], 2)
            else:
                mixed.add(use.signature)

        for use in trace.uses:
            if use.signature in axes:
                use.meet = meet
        watch.backward_begins()
        gradients = backward(losses[1], job.selected)

    for use in trace.uses:
        if use.signature in mixed or len(axes.get(use.signature, ())) != 1:
            for rows in use.roles.values():
                learned.reasons.setdefault(rows.name, f"samples cannot be told apart in the input of {use.rule}")
    for name, what in trace.strange.items():
        learned.reasons[name] = f"used by {what}"
    for name in _overlapping(trace, job.selected):
        learned.reasons.setdefault(name, "used more than once")
    uses = _by_parameter(trace)
    for name, gradient in gradients.items():
        if name in learned.reasons:
            continue
        if name not in uses and gradient is not None:
            learned.reasons[name] = "used in a way that cannot be watched"
        elif gradient is not None and not _agree(totals.views[name], gradient):
            learned.reasons[name] = "its closed form disagrees with autograd"
        else:
            learned.closed[name] = uses.get(name, Counter())
    learned.axes = {s: axes[s][0] for found in learned.closed.values() for s in found}


def _axes(one: Trace, two: Trace, reasons: dict[str, str]) -> dict[Signature, list[Axis]]:
    """Where the samples may lie: the axis along which two take twice the space of one, and begin with that one."""
    axes: dict[Signature, list[Axis]] = {}
    alike = [use.signature for use in one.uses] == [use.signature for use in two.uses]
    for i, use in enumerate(two.uses):
        small, large = one.uses[i].given if alike else None, use.given
        why: str | None = f"samples cannot be told apart in the input of {use.rule}"
        if small is not None and large is not None and small.dim() == large.dim():
            grown = [k for k in range(large.dim()) if large.shape[k] == 2 * small.shape[k] > 0]
            same = [k for k in range(large.dim()) if large.shape[k] == small.shape[k]]
            if len(grown) == 1 and len(same) == large.dim() - 1:
                orders = [False] if small.shape[grown[0]] == 1 else [False, True]
                found = [Axis(grown[0], inner) for inner in orders]
                found = [axis for axis in found if _same(axis.first(small, 1)[0], axis.first(large, 2)[0])]
                why = rules.unsupported(use, grown[0]) if found else why
        if why is None:
            axes[use.signature] = found
        else:
            for rows in use.roles.values():
                reasons.setdefault(rows.name, why)
    return axes


def _overlapping(trace: Trace, selected: dict[str, Any]) -> set[str]:
    """Parameters with an element that is used more than once."""
    found, taken = set(), {name: torch.zeros(p.shape[0] if p.dim() else 1, dtype=torch.bool, device="cpu")
                           for name, p in selected.items()}  # fmt: skip
    for use in trace.uses:
        for rows in use.roles.values():
            part = taken[rows.name][rows.start : rows.stop]
            if part.any():
                found.add(rows.name)
            part.fill_(True)
    return found


def _by_parameter(trace: Trace) -> dict[str, Counter[Signature]]:
    found: dict[str, Counter[Signature]] = {}
    for use in trace.uses:
        for rows in use.roles.values():
            found.setdefault(rows.name, Counter())[use.signature] += 1
    return found


def _likeliest(outputs: Any, targets: Any) -> Round:
    """Labels to try a loss with where targets do not matter."""
    found = predicted(outputs, targets)
    likeliest = found.scores.detach().argmax(-1)
    return Round(torch.where(found.counted, likeliest, IGNORED), outputs.detach().new_ones(len(outputs)), found.last)


def _agree(squares: Tensor, gradient: Tensor) -> bool:
    expected = gradient.to_dense().to(squares.dtype).square()
    bound = AGREE.get(gradient.dtype, AGREE_FLOAT) * expected.max() if expected.numel() else 0
    return bool(((squares - expected).abs() <= bound).all())


def _same(a: Any, b: Any) -> bool:
    """Whether two trees of outputs are equal up to what the order of sums may change."""
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(x, Tensor) and not x.is_floating_point():
            if not torch.equal(x, y):
                return False
        elif isinstance(x, Tensor):
            x, y = x.detach(), y.detach()
            bound = AGREE.get(x.dtype, AGREE_FLOAT) * max(float(x.abs().max()), 1e-30) if x.numel() else 0
            if x.shape != y.shape or not bool(((x - y).abs() <= bound).all()):
                return False
    return True
