"""What a little training brings back: forget accuracy of a copy that goes on learning, beside a retrained model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..arguments import check_count, check_number
from ..errors import ArgumentError, EstimationError, FiunError
from ..estimators.loaders import NumberedBatches
from ..estimators.looking import predicted
from ..estimators.reading import Forward, OwnLoss, Reading, count
from ..wrappers import unwrap
from .intervals import Estimate, share
from .outputs import answers, check_again

Curve = dict[int, Estimate]  # steps -> accuracy on forgotten samples that were not trained on


@dataclass(frozen=True)
class Relearning:
    """Accuracy on forgotten samples after so many steps, on those that no copy was shown.

    Attributes:
        on_retain: while a copy trains on retained data alone.
        on_few: while a copy trains on a few forgotten samples.
        retrained_on_retain, retrained_on_few: the same of the retrained model; None where it was not given.
        shown: how many forgotten samples `on_few` trains on.

    """

    on_retain: Curve
    on_few: Curve
    retrained_on_retain: Curve | None
    retrained_on_few: Curve | None
    shown: int

    def __str__(self) -> str:
        lines = []
        for name, curve in (
            ("on retained data", self.on_retain),
            (f"on {self.shown} forgotten samples", self.on_few),
            ("retrained, on retained data", self.retrained_on_retain),
            (f"retrained, on {self.shown} forgotten samples", self.retrained_on_few),
        ):
            if curve is not None:
                lines.append(f"{name}: " + ", ".join(f"{e.value:.1%} after {k}" for k, e in curve.items()))
        return "\n".join(lines)


def relearn(
    model: nn.Module,
    *,
    forget: Iterable[Any],
    retain: Iterable[Any],
    retrained: nn.Module | None = None,
    steps: Sequence[int] = (0, 5, 20),
    few: int = 8,
    lr: float = 1e-3,
    forward_fn: Forward | None = None,
    seed: int = 0,
) -> Relearning:
    """Train copies of the model on, and look at what comes back: what is hidden returns sooner than it is learned.

    One copy trains on retained data, batch after batch as the loader has them; another on the first `few` forgotten
    samples, over and over. AdamW at `lr`, torch's defaults otherwise, in train mode, every parameter that requires
    grad. Accuracy is that on the forgotten samples that were not among the first `few`. What counts is how much
    sooner it rises than the retrained model's. Source: the time to relearn, as in arXiv 2201.05629 (Anamnesis
    index); relearning from few samples, arXiv 2406.13356. Wilson's intervals.

    Args:
        model: a classifier, [B, C]; stays as it is.
        forget: the data that was to be forgotten; gone over once, so that it may be shuffled.
        retain: the rest of the training data.
        retrained: a model trained without the forget set.
        steps: at which to look, ascending.
        few: forgotten samples to train on.
        lr: learning rate.
        forward_fn: as for `ff.estimate_fisher`.
        seed: of dropout and the like while training.

    Raises:
        ArgumentError: no steps, or descending; a learning rate that is no positive number.
        EstimationError: as `answers`, naming the set; or no forgotten sample is left to be looked at.

    """
    checked = [check_count("steps", k, least=0) for k in steps]
    if not checked or checked != sorted(set(checked)):
        raise ArgumentError(f"steps is {list(steps)!r:.60}, expected ascending numbers such as (0, 5, 20)")
    if not (lr := check_number("lr", lr)):
        raise ArgumentError("lr is 0, expected a positive learning rate")
    check_again("retain", retain)
    few, reading = check_count("few", few), Reading("loss", forward_fn)
    gone = _batches("forget", forget, reading, model, None)
    kept = _batches("retain", retain, reading, model, max(1, checked[-1]))
    shown = _first(gone, few)
    if (total := sum(map(count, gone))) <= few:
        raise EstimationError(f"forget: {total} samples, of which {few} are trained on: none is left to be looked at")

    def curve(one: nn.Module, batches: list[Any]) -> Curve:
        other, found, done = copy.deepcopy(one), Curve(), 0
        optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=lr)
        cuda = sorted({p.device.index or 0 for p in other.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            endless = cycle(batches)
            for k in checked:
                _train(other.train(), optimizer, islice(endless, k - done), reading)
                done = k
                seen = answers(other, gone, what="forget", forward_fn=forward_fn)
                found[k] = share(seen.right[few:])
        return found

    own = [curve(model, kept), curve(model, shown)]
    again = [None, None] if retrained is None else [curve(retrained, kept), curve(retrained, shown)]
    return Relearning(own[0], own[1], again[0], again[1], few)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any], reading: Reading) -> None:
    bare = unwrap(model).module
    for batch in batches:
        optimizer.zero_grad()
        outputs, targets = reading.forward(bare, batch)
        loss = targets.loss if isinstance(targets, OwnLoss) else predicted(outputs, targets).mean()
        loss.backward()
        optimizer.step()


def _batches(what: str, loader: Iterable[Any], reading: Reading, model: nn.Module, most: int | None) -> list[Any]:
    try:
        numbered = NumberedBatches(loader, reading, unwrap(model).module)
        found = [batch for _, batch in islice(numbered, most)]
    except FiunError as error:
        error.args = (f"{what}: {error}",)
        raise
    if not found:
        raise EstimationError(f"{what}: it is empty: no sample with a label to evaluate on")
    return found


def _first(batches: list[Any], number: int) -> list[Any]:
    """The first samples alone, in one batch where they fit together: BatchNorm cannot train on a last one of one."""
    found: list[Any] = []
    for batch in batches:
        size = count(batch)
        if number <= 0:
            break

        def cut(leaf: Tensor, size: int = size, most: int = number) -> Tensor:
            return leaf[:most] if leaf.dim() and len(leaf) == size else leaf

        found.append(pytree.tree_map_only(Tensor, cut, batch))
        number -= size
    return _joined(found)


def _joined(batches: list[Any]) -> list[Any]:
    leaves, forms = zip(*map(pytree.tree_flatten, batches), strict=True)
    if any(form != forms[0] for form in forms):
        return batches
    joined = []
    for parts in zip(*leaves, strict=True):
        if not isinstance(parts[0], Tensor) or not parts[0].dim():
            joined.append(parts[0])
        elif all(part.shape[1:] == parts[0].shape[1:] for part in parts):
            joined.append(torch.cat(parts))
        else:  # padded to unlike lengths
            return batches
    return [pytree.tree_unflatten(joined, forms[0])]
