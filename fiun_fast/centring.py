"""The mean over its rows taken off a last layer: no probability changes, and 0 is the mean logit of every sample.

Dampening pulls logits towards 0. Cross entropy does not say where 0 is, and training may drift: where every logit but
one is negative, the class whose row was dampened to nothing still wins. With rows w_c and a softmax over the logits
w_c a + b_c, the same vector may be taken off every w_c, and the same number off every b_c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .compiling import ReachedNode
from .dag import ForgetRequest
from .errors import UndoError
from .fisher import Fisher
from .guards import alone, denormals_kept, signals_deferred
from .homes import Home
from .naming import Names
from .report import Report
from .undo import UndoLog

ROWS = 1 << 10  # that are made float64 at a time
CLOSE = 1e-3  # of losses of the same probabilities


class Centring:
    """Layers that were centred, and the way back: where its block ends in an error, all are as they were.

    Iterating gives the names of their nodes.
    """

    def __init__(self) -> None:
        self._logs: dict[str, UndoLog] = {}

    def __enter__(self) -> Centring:
        """Begin with none."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Put all back after an error."""
        failed: UndoError | None = None
        if error is not None:
            with signals_deferred():
                for name in self:
                    try:
                        self.put_back_(name)
                    except UndoError as one:
                        failed = one
        if failed is not None:
            raise failed from error

    def __contains__(self, name: object) -> bool:
        """Whether that node's layer is centred."""
        return name in self._logs

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._logs))

    def centre_(self, name: str, layer: nn.Linear, roles: Mapping[str, str]) -> None:
        """Take the mean of its rows off a node's layer, in place, once; where it was 0 already, it is not centred.

        Args:
            name: the node.
            layer: what `roles_of` was asked of.
            roles: what it said.

        """
        if name in self._logs:
            return
        homes = {called: Home.of(layer._parameters, role) for called, role in roles.items()}
        with alone, signals_deferred():  # the way back is there before anything is written
            self._logs[name] = UndoLog.of_all(name, homes)
            changed = [take_mean_off_(layer._parameters[role]) for role in roles.values()]  # type: ignore[arg-type]
            if not any(changed):
                del self._logs[name]
            elif not all(bool(layer._parameters[role].isfinite().all()) for role in roles.values()):  # type: ignore[union-attr]
                self.put_back_(name)  # an overflow in half precision

    def put_back_(self, name: str) -> None:
        """Give a node's layer its old bits.

        Raises:
            UndoError: it was moved, replaced or taken away meanwhile.

        """
        with signals_deferred():
            self._logs[name].restore_()
            del self._logs[name]

    def join_(self, report: Report) -> None:
        """Have the log of a run, now that it is over, put back what was centred before it too."""
        if self._logs:
            assert isinstance(report.undo, UndoLog), "the run kept a log"
            report.undo = report.undo.following(self._logs.values())


def roles_of(node: ReachedNode, requests: Sequence[ForgetRequest], layer: nn.Module | None) -> dict[str, str] | None:
    """What a node's Fisher calls weight and bias of a layer, if it may be centred: name -> role; None: it may not.

    That is an `nn.Linear` of two rows or more and all of what it owns, which nothing else has and nothing hooks, is
    finite and in scope; and the Fishers are of the softmax's loss, as far as they say: `label_free` is of the logits.

    Args:
        node: with its original Fisher.
        requests: what `ReachedNode.requests` counts.
        layer: whose output itself is the model's logits (`Answering.head`).

    """
    if not isinstance(node.model, nn.Module) or layer is None or not _is_plain(layer):
        return None
    own = {id(p): role for role, p in layer._parameters.items() if p is not None}
    names = Names(node.model)
    if sum(id(p) in own for p in names.every.values()) != len(own):  # tied
        return None
    fishers = [node.fisher, *(requests[k].fisher for k in node.requests)]
    first = [_meant(fisher, names) for fisher in fishers]
    its = {first: own[id(p)] for first, p in names.first.items() if id(p) in own}
    if first[0] is None or first[0].keys() != its.keys() or not all(one and its.keys() <= one.keys() for one in first):
        return None
    for record in (fisher.provenance for fisher in fishers):
        if not record.estimators or "label_free" in record.estimators or not record.reduction:
            return None
    return {called: its[one] for one, called in first[0].items()}


def _meant(fisher: Fisher, names: Names) -> dict[str, str] | None:
    """First name of the model -> what the Fisher calls it; None where two names mean one, or a shape does not fit."""
    found: dict[str, str] = {}
    for segment in fisher.layout:
        one = names.find(segment.name)
        if one is None or one in found or tuple(names.first[one].shape) != segment.shape or segment.place is not None:
            return None
        found[one] = segment.name
    return found


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is a linear layer and nothing else, with two rows of finite numbers or more."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or layer._modules or layer._buffers:
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or torch.nn.modules.module._has_any_global_hook():
        return False
    own = {role: p for role, p in layer._parameters.items() if p is not None}
    if not {"weight"} <= own.keys() <= {"weight", "bias"} or any(p._backward_hooks for p in own.values()):
        return False  # of weight_norm or pruning, which make the weight from others; or watched by somebody
    return len(own["weight"]) > 1 and all(bool(p.isfinite().all()) for p in own.values())


@torch.no_grad()
@denormals_kept()
def take_mean_off_(parameter: Tensor) -> bool:
    """From every row [C, …] the mean of all, in float64, rounded once, in place; whether anything changed."""
    mean, changed = parameter.mean(0, dtype=torch.float64), False
    for rows in parameter.split(ROWS):
        centred = (rows.double() - mean).to(rows.dtype)
        changed = changed or not torch.equal(centred, rows)
        rows.copy_(centred)
    return changed


def of_probabilities(loss_fn: Callable[[Any, Any], Any] | None, classes: int, like: Tensor) -> bool:
    """Whether a loss is the same for the same probabilities, tried on made-up logits [8, C] and labels [8].

    `like`: a tensor of the logits' device and dtype.

    Cross entropy is, also of logits over a temperature; a loss of sigmoids or of the logits themselves is not. None is
    cross entropy.
    """
    if loss_fn is None:
        return True
    labels = torch.arange(8, device=like.device) % classes
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    logits = 3 * torch.sin(torch.arange(8.0 * classes, dtype=dtype, device=like.device)).view(8, classes)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = [torch.as_tensor(loss_fn(logits + shift, labels)) for shift in (0.0, 2.0, -2.0)]
            return all(torch.allclose(one, found[0], CLOSE, CLOSE) for one in found[1:])
    except Exception:  # takes something else; then what it is of is not known
        return False
