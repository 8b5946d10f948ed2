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

from ..errors import ArgumentError, EstimationError, FiunError
from .reading import Reading


class NumberedBatches:
    """A loader's batches with their numbers, those without a sample left out.

    Args:
        loader: yields batches.
        reading: how they are read.
        model: floating-point numpy arrays take the dtype of its parameters.
        prepare: called with each batch first; what it returns takes the batch's place.

    Raises:
        ArgumentError: it is no loader: one batch, a dataset of single samples, or nothing that can be gone over.

    """

    def __init__(self, loader: Iterable[Any], reading: Reading, model: nn.Module, prepare: Any = None) -> None:
        check_loader(loader, reading)
        self._loader, self._reading, self._prepare = loader, reading, prepare
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        self.seen = self.taken = 0  # batches that were yielded, and those among them that hold samples

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, batch in enumerate(self._loader):
            self.seen += 1
            with of_batch(number):
                batch = plain(batch if self._prepare is None else self._prepare(batch), self._reading, self._dtype)
                empty = self._reading.is_empty(batch)
            if not empty:
                self.taken += 1
                yield number, batch

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
        if t.is_floating_point() and not bool(t.isfinite().all()):
            return f"{name!r} of the model holds values that are not finite, and so would the Fisher"
    return (
        "its loss or a gradient is not finite, and so would the Fisher be: an overflow in half precision, a logarithm "
        "of 0, or labels of which none counts"
    )


@contextmanager
def of_batch(number: int) -> Iterator[None]:
    """Errors inside begin with the batch's number; those of others than this package keep their text and get a note."""
    try:
        yield
    except EstimationError as error:
        if not str(error).startswith("batch "):
            error.args = (f"batch {number}: {error}",)
        raise
    except FiunError:
        raise
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"in batch {number} of the loader")
        raise


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
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise ArgumentError(f"loader is a {what}, expected an iterable of batches, such as a DataLoader")
    if isinstance(loader, (tuple, list)) and loader and reading.forward_fn is None and _is_one_batch(loader, reading):
        shapes = ", ".join(str(list(part.shape)) for part in loader)
        raise ArgumentError(
            f"loader is a {what} of tensors, {shapes}, which looks like one batch; pass a list of batches, [batch]"
        )


def _is_one_batch(parts: Sequence[Any], reading: Reading) -> bool:
    """Whether a sequence of tensors is (x, y) rather than batches of inputs alone, which some estimators take."""
    if not all(isinstance(part, (Tensor, np.ndarray)) for part in parts):
        return False
    if len(parts) > 1 and (reading.needs_labels or isinstance(parts, tuple)):
        return True
    alike = {(np.dtype(p.dtype).kind if isinstance(p, np.ndarray) else p.is_floating_point(), p.ndim) for p in parts}
    return len(alike) > 1
