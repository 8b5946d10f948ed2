"""Rounds of signed dampening: items forgotten little by little, each until it is, with repair in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import check_count, check_fraction, check_function
from .dag import ForgetRequest, InheritanceDAG
from .errors import ArgumentError, EstimationError, UndoError
from .estimators.preserving import preserved
from .fisher import Fisher
from .gradient import Gradient
from .guards import alone, signals_deferred
from .planning import Plan
from .scope import check_module, select_parameters
from .unlearning import plan

Losses = Callable[[nn.Module, Sequence[Any]], Tensor]  # loss of each item, [items]
Remembered = Callable[[nn.Module, Sequence[Any]], Iterable[bool]]  # of each item
FLOOR = (
    1e-30  # of the original Fisher, so that what the retained data never moved is scaled like the rest and not zeroed
)


@dataclass(frozen=True)
class Round:
    """One dampening.

    Attributes:
        turn: how many repairs came before it.
        active: items that were still remembered before it.
        loss: their mean loss before it.
        alpha: threshold that selected at most `share` of the elements.
        selected: elements scaled.

    """

    turn: int
    active: int
    loss: float
    alpha: float
    selected: int


class Rounds:
    """What `unlearn_rounds_` did: `print` shows a line a round.

    Attributes:
        rounds: all of them, in order.
        remembered: indices of the items that are still remembered at the end.

    """

    def __init__(self, rounds: list[Round], remembered: list[int], items: int, before: _Copies | None) -> None:
        self.rounds, self.remembered = rounds, remembered
        self._items, self._before = items, before

    def undo_(self) -> None:
        """Put every parameter and buffer of the model back as it was before the first round.

        Raises:
            UndoError: the call kept no copy (undo=True does), this was done already, or a tensor has another shape now.

        """
        if self._before is None:
            raise UndoError("no copy was kept, or it was put back already: unlearn_rounds_(…, undo=True) keeps one")
        self._before.put_back()
        self._before = None

    def __str__(self) -> str:
        lines = [f"{'turn':>4}  {'remembered':>10}  {'loss':>8}  {'alpha':>10}  {'selected':>10}"]
        lines += [
            f"{r.turn:>4}  {r.active:>10}  {r.loss:>8.4g}  {r.alpha:>10.4g}  {r.selected:>10,}" for r in self.rounds
        ]
        return "\n".join([*lines, f"{len(self.remembered)} of {self._items} items are still remembered"])


def unlearn_rounds_(
    model: nn.Module,
    items: Iterable[Any],
    original: Fisher,
    losses: Losses,
    remembered: Remembered,
    *,
    repair: Callable[[nn.Module], object] | None = None,
    share: float = 0.01,
    factor: float = 0.98,
    rounds: int = 12,
    turns: int = 6,
    batch: int = 64,
    backend: str | None = None,
    undo: bool = False,
    on_round: Callable[[Round], object] | None = None,
) -> Rounds:
    """Suppress single items in place, by many small signed dampenings that stop item by item.

    Up to `turns` times: up to `rounds` times, while any item is remembered, take the gradient g of the mean loss of
    those that are, and scale by `factor` the `share` of all elements with the largest g^2 / I among those with
    g * theta < 0; then call `repair`, if there is one. A diagonal Fisher cannot tell one memorised fact from another,
    so that one shot takes others along; docs/language-models.md says what this was measured to do, and what not: it
    hides facts rather than erasing them.

    Args:
        model: any module; in eval mode while losses are taken, otherwise as it is found.
        items: what is to be forgotten, in any form that `losses` and `remembered` take.
        original: Fisher I over the retained data; its parameters are those that may change. Entries below 1e-30 count
            as that.
        losses: (model, items) -> losses [items], differentiable. `sequences.answer_losses` is one.
        remembered: (model, items) -> [items] bool: whether each must still be worked on.
        repair: (model) -> anything: some training on retained data. It is called after each turn, with the modes that
            the model came with.
        share: of all elements, at most, in each round, in (0, 1].
        factor: what selected elements are multiplied by, in (0, 1].
        rounds: at most, between two repairs.
        turns: rounds and repair, this often; without `repair` it ends when nothing is remembered.
        batch: items that go through `losses` and `remembered` at once.
        backend: as in `plan`.
        undo: keep a copy of the model, for `Rounds.undo_`; it is put back as well where a callback raises.
        on_round: called with each `Round` when it is done; `print` will do.

    Raises:
        ArgumentError: no items, an argument out of range, a `share` of less than one element, or a function that takes
            other arguments.
        EstimationError: losses, or answers of `remembered`, that are not one an item; losses that are not
            finite, or do not depend on the parameters.
        FiunError: as `plan`. What `repair` and the other callbacks raise goes through; without `undo` the model is then
            as the last step left it.

    """
    listed = list(items)
    if not listed:
        raise ArgumentError("no items: nothing to forget")
    check_module("model", model)
    if not isinstance(original, Fisher):
        raise ArgumentError(f"original is a {type(original).__name__}, expected a fiun_fast.Fisher")
    check_function("losses", losses, "model", "items")
    check_function("remembered", remembered, "model", "items")
    for what, function, argument in (("repair", repair, "model"), ("on_round", on_round, "round")):
        if function is not None:
            check_function(what, function, argument)
    share = check_fraction("share", share, "a share of the elements, in (0, 1]")
    if int(share * original.numel) < 1:
        raise ArgumentError(f"share is {share:g} of {original.numel:,} elements, less than one: nothing would change")
    factor = check_fraction("factor", factor, "a factor in (0, 1]")
    rounds, turns, batch = (check_count(*pair) for pair in (("rounds", rounds), ("turns", turns), ("batch", batch)))
    state = _State(model, original, losses, remembered, batch, factor, backend)
    before = _Copies(model) if undo else None
    done: list[Round] = []
    try:
        for turn in range(turns):
            for _ in range(rounds):
                active = [listed[i] for i in state.still(listed)]
                if not active:
                    break
                done.append(state.dampened(turn, active, share))
                if on_round is not None:
                    on_round(done[-1])
                if done[-1].selected == 0:
                    break
            if repair is not None:
                repair(model)
            elif not state.still(listed):
                break
        return Rounds(done, state.still(listed), len(listed), before)
    except BaseException:
        if before is not None:
            before.put_back()
        raise


class _State:
    """A plan whose forget Fisher and gradient are written anew before each run."""

    def __init__(
        self,
        model: nn.Module,
        original: Fisher,
        losses: Losses,
        remembered: Remembered,
        batch: int,
        factor: float,
        backend: str | None,
    ) -> None:
        self._model, self._losses, self._remembered, self._batch = model, losses, remembered, batch
        selected = select_parameters(model, list(original.layout.names))
        self._parameters = [selected[name] for name in original.layout.names]
        floored = Fisher(original.buffer.clamp_min(FLOOR), original.layout, original.provenance)
        self._forget = Fisher(torch.zeros_like(original.buffer), original.layout)
        self._gradient = Gradient(torch.zeros_like(original.buffer), original.layout)
        dag = InheritanceDAG()
        dag.add_model("model", model, floored)
        request = ForgetRequest("model", self._forget, gradient=self._gradient)
        largest = torch.finfo(original.dtype).max  # so that every factor lambda I / m is beyond the cap
        self._plan: Plan = plan(dag, [request], lam=largest, cap=factor, backend=backend)

    def _chunks(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        for at in range(0, len(items), self._batch):
            yield items[at : at + self._batch]

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with preserved([(self._model, self._parameters)]) as on, on(0):
            yield

    def still(self, items: Sequence[Any]) -> list[int]:
        """Indices of the items that are remembered."""
        found: list[bool] = []
        with self._in_use(), torch.no_grad():
            for chunk in self._chunks(items):
                given = self._remembered(self._model, chunk)
                try:
                    answers = [bool(one) for one in given]
                except (TypeError, RuntimeError):  # one for all, or several for one
                    shape = list(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
                    raise EstimationError(
                        f"remembered gave {shape} for {len(chunk)} items, expected a bool for each"
                    ) from None
                if len(answers) != len(chunk):
                    raise EstimationError(f"remembered gave {len(answers)} values for {len(chunk)} items")
                found += answers
        return [i for i, one in enumerate(found) if one]

    def dampened(self, turn: int, active: Sequence[Any], share: float) -> Round:
        """One round over the items that are remembered."""
        loss = self._take_gradient(active)
        alpha = self._threshold(share)
        self._plan.set_values_(alpha=alpha)
        return Round(turn, len(active), loss, alpha, self._plan.run_().selected)

    def _take_gradient(self, active: Sequence[Any]) -> float:
        """Write the gradient of the mean loss, and its square."""
        into = self._gradient.buffer.zero_()
        total = 0.0
        with self._in_use():
            for chunk in self._chunks(active):
                each = self._losses(self._model, chunk)
                if not isinstance(each, Tensor) or each.shape != (len(chunk),):
                    shape = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
                    raise EstimationError(f"losses gave {shape} for {len(chunk)} items, expected [{len(chunk)}]")
                if not bool(each.isfinite().all()):
                    raise EstimationError(f"the loss of an item is not finite: {each.detach().tolist()}")
                if not each.requires_grad:
                    raise EstimationError("losses do not depend on the parameters of the original Fisher")
                mean = each.sum() / len(active)
                parts = torch.autograd.grad(mean, self._parameters, allow_unused=True)
                for part, view in zip(parts, self._gradient.as_dict().values(), strict=True):
                    if part is not None:
                        view += part.to(view.dtype)
                total += float(mean.detach())
        torch.mul(into, into, out=self._forget.buffer)
        if not bool(self._forget.buffer.isfinite().all()):
            raise EstimationError("the gradient of the losses is not finite, or its square is not")
        return total

    def _threshold(self, share: float) -> float:
        """The ratio g^2 / I that at most `share` of all elements exceed, among those that the sign admits."""
        profile = self._plan.profile()["model"]
        ranked = int(profile.counts.sum())  # with a finite ratio
        above = int(share * profile.numel)
        if above >= ranked:
            return 0.0
        rank = ranked - 1 - above
        ratio = self._plan.ratios().smallest(np.array([[rank]]))[0, 0]
        # a ratio is rounded: times I it may fall short of g^2 itself, its successor cannot
        kind = np.float64 if self._forget.dtype == torch.float64 else np.float32
        return float(min(np.nextafter(kind(ratio), kind(np.inf)), np.finfo(kind).max)) if ratio else 0.0


class _Copies:
    """All parameters and buffers of a model, as they were."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._kept = [(name, tensor, tensor.detach().clone()) for name, tensor in tensors]

    @torch.no_grad()
    def put_back(self) -> None:
        """Write them; all are checked first."""
        for name, tensor, copy in self._kept:
            if tensor.shape != copy.shape:
                raise UndoError(f"{name!r}: shape {list(tensor.shape)} now, {list(copy.shape)} before the rounds")
        with alone, signals_deferred():
            for _, tensor, copy in self._kept:
                tensor.copy_(copy)
