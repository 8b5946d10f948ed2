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
from .capture import Signature, Trace, Use, Watch, step_by_step
from .gathering import Gathering
from .job import Job, NotApartError, count, take
from .made import Calls, tensors
from .per_sample import backward, weighted
from .predictions import IGNORED
from .raised import RaisedError
from .reading import OwnLoss, check_loss
from .rounds import Round, predicted
from .rules import Axis
from .totals import Totals

AGREE = {torch.float16: 0.1, torch.bfloat16: 0.1}  # relative to a parameter's largest entry
AGREE_FLOAT = 1e-2  # a GPU may compute autograd's convolutions in tf32
NOISE = {torch.float16: 1e-2, torch.bfloat16: 1e-2}  # of the largest gradient of any parameter
NOISE_FLOAT = 2e-6


@dataclass
class Learned:
    """What a first batch has shown.

    samples: how many that batch had.
    separable: one sample of a batch can be evaluated alone.
    calls: how calls are known again.
    axes: for every use with a closed form, the axis of the samples.
    closed: parameters with a closed form, and how often each use of them occurs.
    routed: rules that were right for rows picked from several samples.
    reasons: for all others, why not.
    """

    samples: int
    separable: bool = True
    calls: Calls = field(default_factory=Calls)
    axes: dict[Signature, Axis] = field(default_factory=dict)
    closed: dict[str, Counter[Signature]] = field(default_factory=dict)
    routed: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)

    def fitting(self, trace: Trace) -> set[str]:
        """The closed-form parameters that this pass used as the first one did; records why the others do not fit."""
        seen = _by_parameter(trace)
        fits = {n for n, uses in self.closed.items() if n not in trace.strange and seen.get(n, Counter()) == uses}
        for name, rule in _routed(trace).items():  # how often depends on the data; an expert may come up later
            if name in self.closed and name not in trace.strange and rule is not None and rule in self.routed:
                fits.add(name)
        together = [set(made.names) for use in trace.uses for made in use.roles.values() if len(made.names) > 1]
        while broken := [names for names in together if names & fits and not names <= fits]:
            fits -= set().union(*broken)  # what was made of several parameters has a closed form for all or none
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
        one = take(batch, slice(0, 1), samples)
        learned.calls.begin(1)
        with step_by_step(), Watch(job.selected, learned.calls, 1, tensors(one)) as watch:
            single, targets = job.forward(one)
            if watch.trace.ragged:
                raise ValueError("offsets say where samples begin in embedding_bag")
        if isinstance(targets, OwnLoss) and single is None:
            raise NotApartError("the model returns its loss alone")
        if count(single) != 1:
            raise ValueError(f"one sample gives {count(single)} outputs")
        if samples > 1:
            learned.calls.begin(2)
            _compare(job, learned, single, take(batch, slice(0, 2), samples))
    except NotApartError:
        learned.reasons = dict.fromkeys(job.selected, "the loss is the model's own, one number for a whole batch")
    except Exception as error:  # a model may raise anything on a batch of one; its own errors come on the whole batch
        if isinstance(error, FiunError) and not isinstance(error, RaisedError):
            raise
        learned.separable = False
        what = str(error.__cause__ or error).strip().partition("\n")[0][:80]
        learned.reasons = dict.fromkeys(job.selected, f"a batch cannot be cut into samples: {what}")
    learned.calls.begin(3)
    return learned


def _compare(job: Job, learned: Learned, single: Any, two: Any) -> None:
    """Fill in `learned` from a forward and backward on two samples, of which only the second has a loss."""
    watch = Watch(job.selected, learned.calls, 2)
    totals = Totals(job.selected, job.estimator, backend=job.options.backend)
    with step_by_step(), watch:
        outputs, targets = job.forward(two)
        if count(outputs) != 2:
            raise ValueError(f"two samples give {count(outputs)} outputs")
        losses = weighted(job, outputs, targets, _likeliest(outputs, targets) if job.estimator == "expected" else None)
        check_loss(losses[1], job.selected)
        trace = watch.trace
        if not _same(single, take(outputs, slice(0, 1), 2)):
            learned.reasons = dict.fromkeys(job.selected, "the outputs of a sample depend on the others of its batch")
            return
        axes = _axes(trace, learned.reasons)
        mixed: set[Signature] = set()
        known = [use for use in trace.uses if use.signature in axes]
        gathering = Gathering(totals, job.selected, known, 2)

        def meet(use: Use, given: Tensor | None, gradient: Tensor) -> None:
            if use.owners is None:
                fitting = [axis for axis in axes[use.signature] if not axis.first(gradient, 2)[0].any()]
            else:
                fitting = [] if gradient[use.owners == 0].any() else [Axis(0)]
            if len(fitting) == 1:
                axes[use.signature] = fitting
                gathering.meet(use, given, gradient, fitting[0])
            else:
                mixed.add(use.signature)

        for use in known:
            use.meet = meet
        watch.backward_begins()
        gradients = backward(losses[1], job.selected)
        gathering.end()

    for use in trace.uses:
        if use.signature in mixed or len(axes.get(use.signature, ())) != 1:
            for name in use.names:
                learned.reasons.setdefault(name, f"samples cannot be told apart in {use.rule}")
    for name, what in trace.strange.items():
        learned.reasons[name] = f"used by {what}"
    uses = _by_parameter(trace)
    agrees = _agreement(totals, gradients)
    for name, gradient in gradients.items():
        if name in learned.reasons:
            continue
        if name not in uses and gradient is not None:
            learned.reasons[name] = "used in a way that cannot be watched"
        elif gradient is not None and not agrees[name]:
            learned.reasons[name] = "its closed form disagrees with autograd"
        else:
            learned.closed[name] = uses.get(name, Counter())
    learned.axes = {s: axes[s][0] for found in learned.closed.values() for s in found}
    learned.routed = {rule for name, rule in _routed(trace).items() if rule is not None and name in learned.closed}


def _axes(trace: Trace, reasons: dict[str, str]) -> dict[Signature, list[Axis]]:
    """Where the samples may lie: the axis along which two take twice the space of one, and begin with that one."""
    axes: dict[Signature, list[Axis]] = {}
    for use in trace.uses:
        small, large = use.before, use.given
        found = [Axis(use.axis), Axis(use.axis, True)]
        if use.owners is not None:
            found = found[:1]
        elif small is not None and large is not None:
            found = found[:1] if small.shape[use.axis] == 1 else found
            found = [axis for axis in found if _same(axis.first(small, 1)[0], axis.first(large, 2)[0])]
        elif use.output is not None and use.output.shape[use.axis] == 2:
            found = found[:1]
        why = rules.unsupported(use) if found else f"samples cannot be told apart in the input of {use.rule}"
        if why is None:
            axes[use.signature] = found
        else:
            for name in use.names:
                reasons.setdefault(name, why)
    return axes


def _by_parameter(trace: Trace) -> dict[str, Counter[Signature]]:
    found: dict[str, Counter[Signature]] = {}
    for use in trace.uses:
        for name in use.names:
            found.setdefault(name, Counter())[use.signature] += 1
    return found


def _routed(trace: Trace) -> dict[str, str | None]:
    """Parameters that met rows picked from several samples, by which rule; None where that is not all they met."""
    found: dict[str, str | None] = {}
    for use in trace.uses:
        for name in use.names:
            rule = use.rule if use.owners is not None else None
            found[name] = rule if found.get(name, rule) == rule else None
    return found


def _likeliest(outputs: Any, targets: Any) -> Round:
    """Labels to try a loss with where targets do not matter."""
    found = predicted(outputs, targets)
    likeliest = found.scores.detach().argmax(-1)
    return Round(torch.where(found.counted, likeliest, IGNORED), outputs.detach().new_ones(len(outputs)), found.last)


def _agreement(totals: Totals, gradients: dict[str, Tensor | None]) -> dict[str, bool]:
    """Whether each sum of squares is that of the gradient, up to rounding.

    A gradient far below the largest one of all may be nothing but rounding: that of a key's bias before a softmax is.
    """
    known = {name: g for name, g in gradients.items() if g is not None and g.numel()}
    squares = {name: g.to_dense().to(totals.buffer.dtype).square() for name, g in known.items()}
    largest = {name: float(square.max()) for name, square in squares.items()}
    noise = max((largest[name] * NOISE.get(g.dtype, NOISE_FLOAT) ** 2 for name, g in known.items()), default=0.0)
    agrees = dict.fromkeys(gradients, True)
    for name, square in squares.items():
        bound = AGREE.get(known[name].dtype, AGREE_FLOAT) * largest[name] + noise
        agrees[name] = torch.allclose(totals.views[name], square, rtol=0.0, atol=bound)
    return agrees


def _same(a: Any, b: Any) -> bool:
    """Whether two trees of outputs are equal up to what the order of sums may change."""
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(x, Tensor) and not x.is_floating_point():
            if not torch.equal(x, y):
                return False
        elif isinstance(x, Tensor):
            x, y = x.detach(), y.detach()
            bound = AGREE.get(x.dtype, AGREE_FLOAT) * max(float(x.abs().max()), 1e-30) if x.numel() else 0.0
            if x.shape != y.shape or not torch.allclose(x, y, rtol=0.0, atol=bound):
                return False
    return True
