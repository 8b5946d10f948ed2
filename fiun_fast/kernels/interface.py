"""What a backend is: the interface that plans and estimators see. `reference` states what each must compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from .table import Dampening, Merging, Table


class Launch(ABC):
    """A prepared dampening of one table, run as often as wanted. It never waits for the device."""

    in_one_call = False  # whether `run` writes in a single call into C, between whose parts no signal handler runs

    @abstractmethod
    def run(self, counts: torch.Tensor, dry_run: bool = False) -> None:
        """Dampen every node of the table, or with `dry_run` only count.

        Args:
            counts: [nodes, 3] int64 on the table's device, contiguous; selected, zeroed and nonfinite elements of each
                node are added to it.
            dry_run: write nothing but the counts.

        """

    def refresh(self) -> None:  # noqa: B027  (most backends keep no copy)
        """Take over what has been written to the dampening's alpha and lam."""

    def warmup(self) -> None:  # noqa: B027  (most backends compile nothing)
        """Compile and load in advance what a run needs, so that the first one may be captured in a graph."""


class Histogram(ABC):
    """A prepared count of the ratios m / I of every node of a table; of a signed one, where the sign admits it.

    Parameters are read for their sign alone, and not written.
    """

    @abstractmethod
    def run(self, counts: torch.Tensor, bases: np.ndarray, low: int, nearest: bool) -> None:
        """Add to the counts; `reference.ratio_bins` has the rule.

        Args:
            counts: [nodes, BINS] int64 on the table's device, contiguous.
            bases: [nodes] int64, subtracted from each node's bins.
            low: the lowest bit of a ratio that belongs to its bin.
            nearest: count a ratio beyond either end of the bins in the bin there, instead of leaving it out.

        """


class Backend(ABC):
    """One way to compute. Instances have no state beyond what they have loaded."""

    name: str

    @abstractmethod
    def why_not(self, device_type: str) -> str | None:
        """None where it works on tensors of that kind of device, else the reason why it does not."""

    @abstractmethod
    def dampen(self, table: Table, merging: Merging, dampening: Dampening) -> Launch:
        """Prepare a dampening.

        Raises:
            DTypeError: parameters or Fishers of a dtype that the backend does not take.
            BackendError: the extension has no code for the table's device, or a call to it failed.

        """

    @abstractmethod
    def histogram(self, table: Table, merging: Merging) -> Histogram:
        """Prepare a histogram; errors as for `dampen`."""

    @abstractmethod
    def merge(
        self, sources: Sequence[torch.Tensor], weights: Sequence[float], merging: Merging, out: torch.Tensor
    ) -> None:
        """Write m = scale * reduce_k (w_k F_k) to `out`; all are flat [n], contiguous, of one dtype and device.

        Raises:
            DTypeError: dtypes that differ or that the backend does not take.
            BackendError: a call to the extension failed.

        """

    @abstractmethod
    def accumulate(
        self, gradients: Sequence[torch.Tensor], into: Sequence[torch.Tensor], power: int, zero: bool
    ) -> None:
        """For each pair: into += |g| (power 1) or g^2 (power 2), in the accumulator's dtype.

        Args:
            gradients: of any shape and strides, in one of THETA_DTYPES, on one device.
            into: flat accumulators, contiguous, in one of FISHER_DTYPES, each with as many elements as its gradient.
            power: 1 or 2.
            zero: set the gradients to zero in the same pass.

        Raises:
            DTypeError: a dtype that the backend does not take.
            BackendError: a call to the extension failed.

        """

    @abstractmethod
    def outer_square_accumulate(self, left: torch.Tensor, right: torch.Tensor, into: torch.Tensor) -> None:
        """into += sum_b (sum_t left_bgmt right_bgkt)^2: the squared per-sample gradients of a linear layer, summed.

        Args:
            left: [B, G, M, T], any strides; dtype and device of `into`.
            right: [B, G, K, T], the same.
            into: flat [G * M * K], contiguous, in one of FISHER_DTYPES.

        Raises:
            DTypeError: dtypes that differ or that the backend does not take.
            BackendError: a call to the extension failed.

        """
