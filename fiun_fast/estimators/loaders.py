"""Going over a loader: what is none, batches that hold nothing, and which batch an error is about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from ..dtensors import local_tensor
from ..errors import ArgumentError, EstimationError
from ..memory import check_loaded
from .predictions import IGNORED
from .raised import RaisedError, described, in_function, passes, said
from .reading import Reading


class NumberedBatches:
    """A loader's batches with their numbers, those without a sample left out.

    Args:
        loader: yields batches.
        reading: how they are read.
        model: floating-point numpy arrays take the dtype of its parameters.
        prepare: called with each batch first; what it returns takes the batch's place.
        kept: says which batches hold no sample, in the place of `reading`.

    Raises:
        FiunError: a part of the model has no memory, and no forward_fn may go around it.
        ArgumentError: it is no loader: one batch, a dataset of single samples, or nothing that can be gone over.

    """

    def __init__(
        self,
        loader: Iterable[Any],
        reading: Reading,
        model: nn.Module,
        prepare: Any = None,
        kept: Reading | None = None,
    ) -> None:
        check_loader(loader, reading)
        if reading.forward_fn is None:
            check_loaded(model)
        self._loader, self._reading, self._prepare, self._kept = loader, reading, prepare, kept or reading
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        self._model, self._first = model, ""
        self._kind: tuple[bool, int] | None = None
        self.seen = self.taken = 0  # batches that were yielded, and those among them that hold samples

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, batch in enumerate(self._loader):
            self.seen += 1
            with of_batch(number):
                if self._prepare is not None:
                    with in_function("batch_fn", batch):
                        batch = self._prepare(batch)
                batch = plain(batch, self._reading, self._dtype)
                self._check_alike(batch)
                self._reading.check_samples(self._model, batch)
                empty = self._kept.is_empty(batch)
            if not empty:
                self.taken += 1
                yield number, batch

    def _check_alike(self, batch: Any) -> None:
        """Raise an EstimationError where bare tensors come one after another that are no batches of one kind."""
        if self._reading.forward_fn is not None:
            return
        kind = (batch.is_floating_point(), batch.dim()) if isinstance(batch, Tensor) else None
        first, self._first = self._first, self._first or described(batch)
        before, self._kind = self._kind, kind
        if before is not None and kind is not None and kind != before:
            raise EstimationError(
                f"it is {described(batch)}, after {first}: is the loader one batch? Then pass [batch]; batches of "
                "inputs alone are tensors of one kind"
            )

    def check_not_empty(self) -> None:
        """Raise an EstimationError if there was no batch with a sample."""
        if self.taken:
            return
        if self.seen:
            raise EstimationError(
                f"the loader is empty: none of its {self.seen} batches holds a sample with a label that counts"
            )
        once = " (an iterator can be gone over once: pass a list or a DataLoader)" if is_iterator(self._loader) else ""
        raise EstimationError(f"the loader is empty: no batch to estimate a Fisher from{once}")


def why_not_finite(batch: Any, model: nn.Module) -> str:
    """What is not finite where a sum is not any more: an input, a parameter, or what comes of them."""
    for path, leaf in pytree.tree_leaves_with_path(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            return f"its part {pytree.keystr(path) or 'x'} holds values that are not finite, and so would the Fisher"
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point() and not bool(local_tensor(t).isfinite().all()):
            return f"{name!r} of the model holds values that are not finite, and so would the Fisher"
    return (
        "its loss or a gradient is not finite, and so would the Fisher be: an overflow in half precision, a logarithm "
        "of 0, or labels of which none counts"
    )


@contextmanager
def of_batch(number: int) -> Iterator[None]:
    """Errors inside begin with the batch's number; what others than this package raise becomes an EstimationError."""
    try:
        yield
    except EstimationError as error:
        if not str(error).startswith("batch "):
            error.args = (f"batch {number}: {error}",)
        raise
    except Exception as error:
        if passes(error):
            raise
        raise RaisedError(
            f"batch {number}: {said(error)}, raised outside the model's forward and the loss, such as in a backward, "
            "by a hook or an autograd.Function"
        ) from error


def plain(batch: Any, reading: Reading, dtype: torch.dtype) -> Any:
    """The batch as autograd and torch's pytrees take it; where a forward_fn reads it, tensors alone are looked at.

    A Mapping of any kind (BatchEncoding, UserDict) becomes a dict and numpy arrays become tensors, floating-point ones
    in this dtype. Tensors made under inference_mode are cloned.
    """

    def leaf(part: Any) -> Any:
        if isinstance(part, np.ndarray) and reading.forward_fn is None and part.dtype.kind in "biuf":
            made = torch.from_numpy(part.astype(part.dtype.newbyteorder("=")))  # copied: an array may be read-only
            return made.to(dtype) if made.is_floating_point() else made
        return part.clone() if isinstance(part, Tensor) and part.is_inference() else part

    if reading.forward_fn is None:
        batch = as_dict(batch)
        if isinstance(batch, (tuple, list)) and any(isinstance(part, Mapping) for part in batch):
            batch = [as_dict(part) for part in batch]
    for path, part in pytree.tree_leaves_with_path(batch) if reading.forward_fn is None else ():
        if isinstance(part, Tensor) and part.is_meta:
            raise EstimationError(f"its part {pytree.keystr(path) or 'x'} is on meta and has no numbers")
    changed = [isinstance(part, np.ndarray) or (isinstance(part, Tensor) and part.is_inference())
               for part in pytree.tree_leaves(batch)]  # fmt: skip
    return pytree.tree_map(leaf, batch) if any(changed) else batch


def as_dict(batch: Any) -> Any:
    """A Mapping as a dict; anything else as it is."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def is_iterator(loader: object) -> bool:
    """Whether it is used up after one time."""
    return isinstance(loader, Iterator)


def check_loader(loader: object, reading: Reading) -> None:
    """Raise an ArgumentError for what yields no batches: one batch, a dataset of samples, no iterable at all."""
    what = type(loader).__name__
    if isinstance(loader, (Tensor, np.ndarray, Mapping, str, bytes)):
        raise ArgumentError(f"loader is a {what}, which looks like one batch; pass a list of batches, [batch]")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ArgumentError(
            f"loader is a {what}, a dataset of single samples; pass torch.utils.data.DataLoader(dataset, batch_size=…)"
        )
    if isinstance(loader, type):
        raise ArgumentError(f"loader is the class {loader.__name__}, expected one made of it, or a list of batches")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise ArgumentError(f"loader is a {what}, expected an iterable of batches, such as a DataLoader")
    if isinstance(loader, (tuple, list)) and loader and reading.forward_fn is None and _is_one_batch(loader, reading):
        tensors = all(isinstance(part, (Tensor, np.ndarray)) for part in loader)
        shapes = ", ".join(str(list(part.shape)) if tensors else described(part) for part in loader[:6])
        alone = "" if reading.needs_labels else "; if it is a list of inputs alone, pass [[x] for x in loader]"
        raise ArgumentError(
            f"loader is a {what} of {'tensors, ' if tensors else ''}{shapes}, which looks like one batch; pass a list "
            f"of batches, [batch]{alone}"
        )


def _is_one_batch(parts: Sequence[Any], reading: Reading) -> bool:
    """Whether a sequence is (x, y) rather than batches, which for some estimators may be inputs alone."""
    bare = [part for part in parts if isinstance(part, (Tensor, np.ndarray))]
    if not bare or len(parts) == 1:
        return False
    if len(bare) < len(parts):  # ({…}, y), [x, None], [x, ["a", "b"]]: no two batches of one loader
        return True
    if reading.needs_labels or isinstance(parts, tuple):
        return True
    x, *others = (torch.as_tensor(part) if isinstance(part, np.ndarray) else part for part in bare)
    return any(not _is_like(other, x) for other in others) or _is_companion(others[-1], x)


def _is_like(other: Tensor, x: Tensor) -> bool:
    """Whether two tensors may be batches of one kind: sequences alone differ in another dimension than the first."""
    if other.is_floating_point() != x.is_floating_point() or other.dim() != x.dim():
        return False
    if x.is_floating_point() or x.dim() != 2:
        return other.shape[1:] == x.shape[1:]
    return (other.shape[1] == 1) == (x.shape[1] == 1)


def _is_companion(part: Tensor, x: Tensor) -> bool:
    """Whether a tensor goes with another of its shape: labels that are its tokens, a mask of it, one-hot classes."""
    if len(part) != len(x) or x.numel() == 0 or part.is_meta or x.is_meta:
        return False
    binary = bool(((part == 0) | (part == 1)).all()) and not bool(((x == 0) | (x == 1)).all())
    return binary or (part.shape == x.shape and bool(((part == x) | (part == IGNORED)).all()))
