"""The compiled extensions, fiun_fast._cpu and fiun_fast._cuda: loading them, and what their operations may be given."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import torch

from ..arguments import FISHER_DTYPES, THETA_DTYPES
from ..errors import BackendError, DTypeError

PACKAGE = __name__.rsplit(".", 2)[0]

# Numbers of the dtypes in C++ (csrc/kinds.h). Parameters and gradients have one of the first, Fishers of the second.
KINDS = {dtype: number for number, dtype in enumerate(THETA_DTYPES)}
FISHER_KINDS = {dtype: KINDS[dtype] for dtype in FISHER_DTYPES}


# ----------------------------------------------------------------------------------------------------------- loading
def load(name: str, what: str, not_built: str) -> ModuleType | str:
    """Import an extension; the reason why not, where that fails.

    Args:
        name: of the module, inside fiun_fast.
        what: what the reason calls the extension.
        not_built: the reason where there is no such module.

    """
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError:
        return not_built
    except ImportError as error:
        return f"{what} does not load: {error}"


def require(backend: str, found: ModuleType | str) -> ModuleType:
    """The module that `load` found.

    Raises:
        BackendError: `load` found none; the message gives its reason.

    """
    if isinstance(found, str):
        raise BackendError(f"backend {backend!r} cannot be used: {found}")
    return found


# ---------------------------------------------------------- operands: the Triton kernels take what the extensions take
def kind(backend: str, dtype: torch.dtype | None, known: Mapping[torch.dtype, int]) -> int:
    """The number of a dtype in `known`, which is KINDS or FISHER_KINDS.

    Raises:
        DTypeError: it has none there; the message names the backend.

    """
    if dtype is None or dtype not in known:
        raise unknown(backend, dtype, known)
    return known[dtype]


def unknown(backend: str, dtype: torch.dtype | None, known: Mapping[torch.dtype, int]) -> DTypeError:
    """The error that says which dtypes a backend takes."""
    return DTypeError(f"backend {backend!r} takes {', '.join(map(str, known))} here, found {dtype}")


def merge_kind(backend: str, sources: Sequence[torch.Tensor], out: torch.Tensor) -> int:
    """The number of the dtype that all tensors of a merge have.

    Raises:
        DTypeError: a Fisher cannot have that dtype, or the tensors differ in it.

    """
    number = kind(backend, out.dtype, FISHER_KINDS)
    if any(source.dtype != out.dtype for source in sources):
        raise DTypeError(
            f"merge: sources of {[str(s.dtype) for s in sources]}, output of {out.dtype}; expected one dtype"
        )
    return number


def pairs_of(backend: str, gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor]) -> np.ndarray:
    """What an extension accumulates, [pairs, 5] int64: addresses of both, elements, kinds of both.

    Raises:
        DTypeError: a dtype that it does not take.

    """
    pairs = np.empty((len(gradients), 5), dtype=np.int64)
    try:  # few calls per pair: with many small parameters they would take longer than the sums
        pairs[:, 0] = [g.data_ptr() for g in gradients]
        pairs[:, 1] = [total.data_ptr() for total in into]
        pairs[:, 2] = [total.numel() for total in into]
        pairs[:, 3] = [KINDS[g.dtype] for g in gradients]
        pairs[:, 4] = [FISHER_KINDS[total.dtype] for total in into]
    except KeyError as error:
        raise unknown(backend, error.args[0], KINDS) from None
    return pairs


def outer_square_without_kernel(backend: str, left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> bool:
    """Check the operands of `outer_square_accumulate`, and do it here if torch does it best; False: a kernel has to.

    With one position and one group the squares of products are products of squares: one matrix product.

    Raises:
        DTypeError: the dtypes differ, or a Fisher cannot have them.

    """
    kind(backend, into.dtype, FISHER_KINDS)
    if left.dtype != into.dtype or right.dtype != into.dtype:
        raise DTypeError(f"outer_square_accumulate: {left.dtype} and {right.dtype}, expected {into.dtype}")
    samples, groups, m, t = left.shape
    k = right.shape[2]
    if into.numel() == 0 or samples == 0 or t == 0:
        return True
    if t == 1 and groups == 1:
        into.view(m, k).addmm_(left.reshape(samples, m).square().t(), right.reshape(samples, k).square())
        return True
    return False
