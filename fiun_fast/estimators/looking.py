"""A model looked at: eval mode, no gradients, left as it was; what it predicts on each batch of a loader.

Whoever measures a model reads a loader as the estimators do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import EstimationError, FiunError
from ..scope import check_module
from ..wrappers import check_gathered, silenced, unwrap
from . import claims
from .loaders import NumberedBatches, is_iterator, of_batch
from .predictions import Predictions, fitted
from .preserving import preserved
from .reading import Forward, OwnLoss, Reading

Found = TypeVar("Found")


@contextmanager
def looking(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its wrappers, in eval mode and without gradients; it is as before afterwards."""
    check_module("model", model)
    check_gathered("model", model, for_good=True)
    bare = unwrap(model).module
    with (
        claims.estimating({"model": bare}),
        claims.uncompiled(),
        silenced(model),
        preserved([(bare, ())]),
        torch.no_grad(),
    ):
        yield bare


def each_batch(
    model: nn.Module,
    loader: Iterable[Any],
    what: str,
    take: Callable[[Predictions, Any], Found],
    prepare: Callable[[nn.Module, ExitStack], None] | None = None,
    *,
    forward_fn: Forward | None = None,
    target_index: int | None = None,
) -> list[Found]:
    """What `take` makes of each batch.

    Args:
        model: any; it is as before afterwards.
        loader: batches with labels.
        what: what the set is called in messages.
        take: predictions, and the batch that the loader gave -> anything.
        prepare: called with the bare model before the first batch, and with what is undone after the last.
        forward_fn, target_index: as for `ff.estimate_fisher`.

    Raises:
        EstimationError, ArgumentError: as `answers`.

    """
    reading, found = Reading("loss", forward_fn, target_index), []
    try:
        with looking(model) as bare, ExitStack() as stack:
            if prepare is not None:
                prepare(bare, stack)
            batches = NumberedBatches(loader, reading, bare)
            for number, batch in batches:
                with of_batch(number):
                    found.append(take(predicted(*reading.forward(bare, batch)), batch))
            if not batches.taken:
                once = " (an iterator can be gone over once: pass a list or a DataLoader)" * is_iterator(loader)
                raise EstimationError(f"it is empty: no sample with a label to evaluate on{once}")
    except FiunError as error:
        error.args = (f"{what}: {error}",)
        raise
    return found


def predicted(outputs: Any, targets: Any) -> Predictions:
    """Outputs and targets as predictions with checked labels and finite logits.

    Raises:
        EstimationError: they are none.

    """
    if isinstance(targets, OwnLoss):
        apart = targets.apart
        if not isinstance(apart, Predictions):
            apart = fitted(targets.outputs, targets.labels)  # its loss is another, its labels are those
    else:
        apart = fitted(outputs, targets)
    apart.check()
    if not bool(apart.scores.float().logsumexp(-1)[apart.counted].isfinite().all()):
        raise EstimationError("the model's outputs are not finite (NaN, or infinite), so that nothing can be measured")
    return apart


def one_a_sample(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """Logits [B, C], and a class for each sample [B].

    Raises:
        EstimationError: there are more predictions a sample, or targets are not one class.

    """
    logits, labels = predictions.logits, predictions.labels
    if logits.dim() != 2:
        raise EstimationError(
            f"the outputs are {list(logits.shape)}, expected one prediction a sample, [B, classes]; for language "
            "models there are forget_quality and privleak"
        )
    if labels.is_floating_point():
        best = labels.argmax(1)
        if not bool((labels.gather(1, best[:, None]) == 1).all()):
            raise EstimationError("the targets are probabilities of classes, expected one class a sample")
        labels = best
    return logits, labels
