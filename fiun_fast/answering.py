"""One model's logits on one set of data, asked again and again while it changes: by its tail alone where that will do.

Dampening the last layer changes nothing before it. What goes into it is therefore kept, and a look at the model is one
matrix product. That a part of a model, called its tail, makes the answers of what goes into it is tried, not assumed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .dtensors import is_dtensor, reshard_, sharding_modules
from .errors import ScopeWarning
from .estimators.looking import each_batch, one_a_sample
from .estimators.predictions import HALF, Predictions
from .estimators.preserving import preserved
from .estimators.reading import Forward, OwnLoss, Reading
from .scope import LAST, select_parameters
from .watching import Watched
from .wrappers import unwrap

Mark = Callable[[Any, Tensor], Tensor]  # (batch, labels [B] int64) -> [B] bool
CLOSE, CLOSE_HALF = 1e-4, 2e-2  # of the largest logit: how well a tail must give the model's own


class Answered(NamedTuple):
    """What a model answers to [N] samples, in the order of the loader, without those whose label does not count."""

    logits: Tensor  # [N, C]
    labels: Tensor  # [N] int64
    marked: Tensor  # [N] bool


class Answering:
    """A model's answers, as it is when asked: in eval mode, without gradients; it is left as it was.

    At first the tail is the last layer. Where something else was written to since, the tail grows to the smallest
    submodule around all that was; where the model was rebuilt, everything begins anew. The whole model runs where the
    tail is called more than once or with more than one tensor, where its output is not itself the model's, where what
    goes into it turns out to depend on its own parameters, and where parameters are spread over ranks.

    Args:
        model: any module that makes one prediction a sample, logits [B, C].
        loader: batches with labels; gone over again where the whole model has to run.
        mark: says which samples are of the one kind and which of the other.
        what: what the data are called in messages.
        forward_fn, target_index: as for `estimate_fisher`.

    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        mark: Mark,
        what: str,
        forward_fn: Forward | None = None,
        target_index: int | None = None,
    ) -> None:
        self._model, self._bare, self._loader, self._mark = model, unwrap(model).module, loader, mark
        self._what, self._forward_fn, self._target_index = what, forward_fn, target_index
        self._tail = self._last()
        self._kept: _Kept | None = None
        self._cast = False  # whether the logits had another dtype than what the tail gave
        self._first: Any = None  # batch of those that were gone over last

    def _last(self) -> nn.Module | None:
        reshard_(sharding_modules([self._bare]))
        if any(map(is_dtensor, self._bare.parameters())):  # a part by itself may not know how to gather its parameters
            return None
        with warnings.catch_warnings():  # nothing is chosen here, so that there is nothing to warn of
            warnings.simplefilter("ignore", ScopeWarning)
            return _around(self._bare, select_parameters(self._bare, LAST).values())

    def __call__(self) -> Answered:
        """The answers of the model as it is now.

        Raises:
            EstimationError: as `estimators.looking.each_batch`.

        """
        if self._kept is not None:
            if self._kept.watched.rebuilt():
                self._tail, self._kept = self._last(), None
            elif self._tail is not None and (written := self._kept.watched.written()):
                self._tail, self._kept = _around(self._bare, [*self._tail.parameters(), *written]), None
        if self._tail is None:
            return _joined(self._run(self._loader)[0])
        return self._captured(self._tail) if self._kept is None else self._by(self._tail, self._kept)

    @property
    def head(self) -> nn.Module | None:
        """The submodule whose output itself is the logits, bit for bit, as far as was seen; None: there is none."""
        if self._tail is None:
            return self._bare if self._forward_fn is None and type(self._bare) is nn.Linear else None
        return None if self._kept is None or self._cast or not self._is_of_softmax() else self._tail

    def _is_of_softmax(self) -> bool:
        """Whether the model's own loss, if batches with labels have it make one, is a cross entropy of its logits."""
        if self._forward_fn is not None or not isinstance(self._first, Mapping):
            return True
        with preserved([(self._bare, ())]), torch.no_grad():
            _, targets = Reading().forward(self._bare, self._first)
        return not isinstance(targets, OwnLoss) or isinstance(targets.apart, Predictions)

    def renew(self) -> None:
        """Forget what is kept, if the model was written to in a way that no counter tells."""
        if self._kept is not None and (self._kept.watched.changed() or self._kept.watched.rewritten()):
            self._tail, self._kept = self._last(), None

    def _captured(self, tail: nn.Module) -> Answered:
        """The answers by the whole model, which keeps what went into the tail."""
        answers, given = self._run(self._loader, tail)
        found = _joined(answers)
        if given is None or not _alike(_apply(tail, given[:1]), answers[0].logits):
            self._tail = None
            return found
        if len({part.shape[1:] for part in given}) == 1:
            given = [torch.cat(given)]
        self._kept = _Kept(given, found, self._first, Watched(self._bare, tail, bits=True), _versions(tail))
        return found

    def _by(self, tail: nn.Module, kept: _Kept) -> Answered:
        """The answers by the tail; tried on the first batch once its parameters have changed for the first time."""
        logits = _apply(tail, kept.given)
        if logits is None:
            self._tail, self._kept = None, None
            return self()
        if kept.versions is not None and kept.versions != _versions(tail):
            whole = _joined(self._run([kept.first])[0])
            if not _alike(logits[: len(whole.logits)], whole.logits):
                self._tail, self._kept = None, None
                return self()
            kept.versions = None
        return kept.answers._replace(logits=logits)

    def _run(self, loader: Iterable[Any], tail: nn.Module | None = None) -> tuple[list[Answered], list[Tensor] | None]:
        """The answers batch by batch by the whole model, and with a tail what goes into it, if that is one tensor."""
        met: list[Tensor | None] = []
        made: list[tuple[Any, int]] = []  # what the tail gave, and its version then
        given: list[Tensor] = []
        fits, cast = True, False

        def take(predictions: Predictions, batch: Any) -> Answered:
            nonlocal fits, cast
            logits, labels = one_a_sample(predictions)
            counted = labels >= 0
            if fits and tail is not None:
                one = met[0] if len(met) == 1 else None
                fits = one is not None and one.dim() > 0 and len(one) == len(labels) and _is(logits, made)
                if fits and one is not None:
                    given.append(one[counted])
                    cast = cast or made[-1][0].dtype != logits.dtype
                if len(given) == 1:
                    self._first = batch
            met.clear()
            made.clear()
            return Answered(logits[counted], labels[counted], self._mark(batch, labels)[counted])

        def prepare(_: nn.Module, stack: ExitStack) -> None:
            if tail is not None:
                hook = tail.register_forward_pre_hook(
                    lambda _, args, named: met.append(_one(args, named)), with_kwargs=True
                )
                stack.callback(hook.remove)
                hook = tail.register_forward_hook(lambda _, args, output: made.append((output, _version(output))))
                stack.callback(hook.remove)

        answers = each_batch(
            self._model,
            loader,
            self._what,
            take,
            prepare,
            forward_fn=self._forward_fn,
            target_index=self._target_index,
        )
        self._cast = cast if tail is not None else self._cast
        return answers, given if fits and tail is not None else None


class _Kept:
    """What went into a tail, and how the model was then."""

    def __init__(
        self, given: list[Tensor], answers: Answered, first: Any, watched: Watched, versions: list[int]
    ) -> None:
        self.given, self.answers, self.first, self.watched = given, answers, first, watched
        self.versions: list[int] | None = versions  # of the tail's tensors; None once it was tried with others


def _around(model: nn.Module, tensors: Iterable[Tensor]) -> nn.Module | None:
    """The smallest submodule that has all of these parameters and buffers; None where that is the model itself."""
    wanted = {id(tensor) for tensor in tensors}
    smallest = model
    for module in model.modules():
        if wanted <= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}:
            smallest = module  # modules come before their parts
    return None if smallest is model else smallest


def _one(args: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """What a module was given, if that is one tensor. A copy: layers may write to it."""
    return args[0].detach().clone() if len(args) == 1 and not named and isinstance(args[0], Tensor) else None


def _is(logits: Tensor, made: list[tuple[Any, int]]) -> bool:
    """Whether a model's logits are what its tail gave, and nothing was made of that, but for another dtype.

    That they are alike is not enough: a clamp shows only where a logit is large.
    """
    output, version = made[-1]
    if not isinstance(output, Tensor) or output.is_inference() or _version(output) != version:
        return False
    if output.dtype != logits.dtype:
        return torch.equal(output.to(logits.dtype), logits)
    return output.data_ptr() == logits.data_ptr()


def _apply(tail: nn.Module, given: list[Tensor]) -> Tensor | None:
    """[N, C] of what goes into the tail; None where it gives something else."""
    if type(tail) is nn.Linear and not tail._forward_hooks and not tail._forward_pre_hooks:
        with torch.no_grad():  # no mode matters, and nothing can change but by a hook
            outputs = [tail(part) for part in given]
    else:
        with preserved([(tail, ())]), torch.no_grad():
            outputs = [tail(part.clone()) for part in given]
    if not all(isinstance(part, Tensor) and part.dim() == 2 for part in outputs):
        return None
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _alike(found: Tensor | None, wanted: Tensor) -> bool:
    if found is None or found.shape != wanted.shape:
        return False
    close = CLOSE_HALF if wanted.dtype in HALF or found.dtype in HALF else CLOSE
    return bool((found.double() - wanted.double()).abs().max() <= close * wanted.double().abs().max())


def _versions(tail: nn.Module) -> list[int]:
    return [_version(tensor) for tensor in (*tail.parameters(), *tail.buffers())]


def _version(tensor: Any) -> int:
    return -1 if not isinstance(tensor, Tensor) or tensor.is_inference() else tensor._version


def _joined(answers: list[Answered]) -> Answered:
    return Answered(*map(torch.cat, zip(*answers, strict=True)))
