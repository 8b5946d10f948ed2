"""R, the finite ratios m / I of each node: how many there are, where they lie, and any percentile of them, exactly.

A ratio that is finite and not negative has bits which, read as an integer, ascend with it. So the k-th smallest ratio
is found digit by digit: count the ratios by their leading bits, keep the bin that holds the k-th, count those inside by
the next bits. Three passes over the Fishers settle float32 and six float64, for all nodes at once; nothing is sorted or
copied, and R itself is never written down.

What is in R: IEEE quotients in the Fishers' dtype that are finite. 0 / 0 is not (NaN), x / 0 is not (infinite), and
neither is a quotient that overflows; 0 / x is, as 0, and so are subnormal quotients. Where m is infinite or NaN there
is no finite ratio; where I is infinite and m is not, the ratio is 0. In a signed table, elements whose gradient and
parameter do not differ in sign have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .arguments import MERGE_RULES, MergeRule, check_fraction, check_number, check_one_of, renamed
from .errors import ArgumentError, LayoutError
from .fisher import Fisher, check_alike, listed_fishers
from .kernels import select
from .kernels.interface import Histogram
from .kernels.table import BINS, Group, Merging, Table
from .memory import check_no_mode
from .provenance import warn_if_unlike
from .ranks import Ranks

FRACTION = "samples to forget over samples trained on, in (0, 1]"


@dataclass(frozen=True)
class Digits:
    """How the ratios' bits are read, for one dtype of Fishers."""

    kind: type[np.floating]
    integer: type[np.signedinteger]
    lows: tuple[int, ...]  # the lowest bit of each digit, from the first to the last
    infinite: int  # the first digit of infinity


DIGITS = {
    torch.float32: Digits(np.float32, np.int32, (20, 9, 0), 0x7F8),
    torch.float64: Digits(np.float64, np.int64, (52, 41, 30, 19, 8, 0), 0x7FF),
}


class Ratios:
    """The ratios of every node of some work tables; of signed ones, those of the elements that may be selected.

    Args:
        parts: tables, and a histogram of each; a node may appear in several tables.
        names: of the nodes, for messages.
        node: [slots] int64, whose node each slot of the tables is; None: they are the nodes. Whatever is to have ratios
            of its own may be a "node" here: the layers of a model, if the slots tell them apart.
        dtypes: of the Fishers of each node; None: as the tables have them.
        ranks: over which the ratios are spread, so that every count is a sum over them.

    """

    def __init__(
        self,
        parts: Sequence[tuple[Table, Histogram]],
        names: Sequence[str],
        node: np.ndarray | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.names = list(names)
        self._dtypes, self._ranks = dtypes, ranks
        self._parts = list(parts)
        self._node = np.arange(len(self.names)) if node is None else node

    def dtypes(self) -> list[torch.dtype]:
        """Of the Fishers of each node, [nodes]."""
        if self._dtypes is not None:
            return list(self._dtypes)
        found = [torch.float32] * len(self.names)
        for table, _ in self._parts:
            for node in np.unique(self._node[table.targets[:, 2]]).tolist():
                found[node] = table.fisher_dtype
        return found

    def count(self, dtype: torch.dtype, bases: np.ndarray, low: int, nearest: bool = False) -> np.ndarray:
        """Ratios of each node by bin, [nodes, BINS] int64, in one pass; bases [nodes]. Other dtypes' nodes stay 0.

        A bin is the ratio's bits above the lowest `low`, less the base; what lies beyond the bins is left out, or with
        `nearest` counted at that end. Infinite ratios have bits and are counted like others, NaN are not.
        """
        found: dict[torch.device, torch.Tensor] = {}
        bases = bases[self._node]
        for table, histogram in self._parts:
            if table.fisher_dtype == dtype:
                if table.device not in found:
                    found[table.device] = torch.zeros(len(bases), BINS, dtype=torch.int64, device=table.device)
                histogram.run(found[table.device], bases, low, nearest)
        result = np.zeros((len(self.names), BINS), dtype=np.int64)
        for counts in found.values():
            np.add.at(result, self._node, counts.cpu().numpy())
        return result if self._ranks is None else self._ranks.sum_of(result)

    def percentiles(self, q: np.ndarray) -> np.ndarray:
        """The q-th percentile (0..100) of each node's finite ratios: [nodes] -> [nodes] float64.

        As numpy.percentile of these ratios in float64: between two ratios, linear.

        Raises:
            ArgumentError: a node has no finite ratio.

        """
        result = np.empty(len(self.names))
        dtypes = self.dtypes()
        for dtype in dict.fromkeys(dtypes):  # in one order on all ranks
            nodes = np.array([node for node, found in enumerate(dtypes) if found == dtype])
            result[nodes] = self._percentiles(dtype, nodes, q[nodes])
        return result

    def _percentiles(self, dtype: torch.dtype, nodes: np.ndarray, q: np.ndarray) -> np.ndarray:
        digits = DIGITS[dtype]
        counts = self.count(dtype, np.zeros(len(self.names), dtype=np.int64), digits.lows[0])[nodes]
        counts[:, digits.infinite :] = 0
        finite = counts.sum(axis=1)
        for node in nodes[finite == 0]:
            raise ArgumentError(
                f"node {self.names[node]!r}: no finite ratio F / I, so no percentile: "
                "its original or its forget Fisher is 0, infinite or NaN everywhere"
            )
        at = q / 100 * (finite - 1)
        below = np.floor(at).astype(np.int64)
        above = np.minimum(below + 1, finite - 1)
        lower, upper = self._smallest(dtype, nodes, counts, np.stack([below, above], axis=1)).T
        # as numpy interpolates: from the nearer end, so that neither end is missed by a rounding
        t, gap = at - below, upper - lower
        return np.where(t < 0.5, lower + gap * t, upper - gap * (1 - t))

    def smallest(self, ranks: np.ndarray) -> np.ndarray:
        """The ratios of these ranks, counted from 0 and from the smallest: [nodes, R] int64 -> [nodes, R] float64.

        Ranks are those among the finite ratios. Neighbours share passes as long as their leading bits agree.
        """
        result = np.empty(ranks.shape)
        dtypes = self.dtypes()
        for dtype in dict.fromkeys(dtypes):  # in one order on all ranks
            nodes = np.array([node for node, found in enumerate(dtypes) if found == dtype])
            bases = np.zeros(len(self.names), dtype=np.int64)
            counts = self.count(dtype, bases, DIGITS[dtype].lows[0])[nodes]
            result[nodes] = self._smallest(dtype, nodes, counts, ranks[nodes])
        return result

    def _smallest(self, dtype: torch.dtype, nodes: np.ndarray, counts: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Ranks [nodes, R] -> ratios [nodes, R]; counts [nodes, BINS] are those of the first digit."""
        digits = DIGITS[dtype]
        found = np.empty(ranks.shape)
        known: dict[tuple, np.ndarray] = {(digits.lows[0], bytes(len(nodes) * 8)): counts}
        for column, rank in enumerate(ranks.T):
            bits, before = np.zeros(len(nodes), dtype=np.int64), digits.lows[0]
            for low in digits.lows:
                bits, before = bits << (before - low), low
                if (low, bits.tobytes()) not in known:
                    bases = np.zeros(len(self.names), dtype=np.int64)
                    bases[nodes] = bits
                    known[low, bits.tobytes()] = self.count(dtype, bases, low)[nodes]
                upto = known[low, bits.tobytes()].cumsum(axis=1)
                digit = (upto > rank[:, None]).argmax(axis=1)
                rank = rank - np.where(digit > 0, np.take_along_axis(upto, digit[:, None] - 1, axis=1)[:, 0], 0)
                bits = bits + digit
            found[:, column] = bits.astype(digits.integer).view(digits.kind)
        return found


def ratios_of(
    original: Fisher,
    forget: Fisher | Sequence[Fisher],
    *,
    merge: MergeRule = "max",
    scale: float = 1.0,
    backend: str | None = None,
) -> Ratios:
    """The ratios of two Fishers; several forget Fishers are merged on the fly. One node, called "model".

    Raises:
        ArgumentError, LayoutError, DTypeError, DeviceError: as `adaptive_alpha`.

    """
    check_no_mode()
    forgets = check_fishers(original, forget)
    if original.layout.sharded:
        raise LayoutError(
            "these Fishers are one rank's parts: pass fisher.full(), or ask where the model is known: "
            'alpha="auto", plan.profile(), selection_profile(…, model)'
        )
    warn_if_unlike(("the original Fisher", original.provenance, "the forget Fisher", one.provenance) for one in forgets)
    check_one_of("merge", merge, MERGE_RULES)
    merging = Merging(merge, check_number("scale", scale, original.dtype))
    segments = [s for s in original.layout if s.numel]
    if not segments:
        raise ArgumentError("the Fishers have no elements")
    layouts = [f.layout.named_as(original.layout) for f in forgets]
    group = Group(
        names=tuple(s.name for s in segments),
        numels=np.array([s.numel for s in segments], dtype=np.int64),
        forgets=[f.buffer for f in forgets],
        forget_offsets=np.array([[layout[s.name].offset for s in segments] for layout in layouts], dtype=np.int64),
        weights=(1.0,) * len(forgets),
        originals=[original.buffer],
        original_offsets=np.array([s.offset for s in segments], dtype=np.int64),
        nodes=np.zeros(1, dtype=np.int64),
    )
    table = Table.pack(original.device, None, original.dtype, [group])
    return Ratios([(table, select(backend, original.device.type).histogram(table, merging))], ["model"])


def check_fishers(original: Fisher, forget: Fisher | Sequence[Fisher]) -> list[Fisher]:
    """The forget Fishers as a list, after it is sure that all fit the original one; errors as `adaptive_alpha`."""
    if not isinstance(original, Fisher):
        raise ArgumentError(f"original is a {type(original).__name__}, expected a fiun_fast.Fisher")
    forgets = listed_fishers("forget", forget)
    if not forgets:
        raise ArgumentError("no forget Fisher")
    for k, fisher in enumerate(forgets):
        check_alike(original, "original", fisher, "forget" if len(forgets) == 1 else f"forget[{k}]")
    return forgets


def check_forget_fraction(what: str, fraction: object) -> float:
    """|D_f| / |D| as a float; an ArgumentError names `what` where it is not in (0, 1]."""
    if fraction is None:
        raise ArgumentError(f'alpha="auto" needs {what}, {FRACTION}')
    return check_fraction(what, fraction, FRACTION)


def adaptive_percentile(forget_fraction: float) -> float:
    """q = 100 - ln(1 + 100 forget_fraction) of ASSD (arXiv 2402.10098): 100 for no data, 95.4 for all."""
    return 100 - math.log1p(100 * forget_fraction)


@renamed(share="forget_fraction")
def adaptive_alpha(
    original: Fisher,
    forget: Fisher | Sequence[Fisher],
    *,
    forget_fraction: float,
    merge: MergeRule = "max",
    scale: float = 1.0,
    backend: str | None = None,
) -> float:
    """Alpha from the Fishers alone, as ASSD (arXiv 2402.10098) chooses it; its lambda is 1.

    R = all finite F / I, over all parameters together; q = 100 - ln(1 + 100 forget_fraction); alpha is the q-th
    percentile of R, exactly, between two ratios linear as numpy.percentile. docs/semantics.md says what counts as
    finite. Where more than q % of the ratios are 0, so is alpha, and every parameter with F > 0 is selected.

    Args:
        original: Fisher I over the data the model was trained on.
        forget: Fisher F over the data to be forgotten; several are merged on the fly.
        forget_fraction: |D_f| / |D|, samples to be forgotten over samples trained on, in (0, 1].
        merge, scale: as in `plan`.
        backend: name of one; None for the default.

    Raises:
        ArgumentError: forget_fraction outside (0, 1], no finite ratio, or an argument of another type.
        LayoutError, DTypeError, DeviceError: the Fishers differ; the message says in what.
        BackendError: the backend cannot be used.

    """
    q = np.array([adaptive_percentile(check_forget_fraction("forget_fraction", forget_fraction))])
    return float(ratios_of(original, forget, merge=merge, scale=scale, backend=backend).percentiles(q)[0])
