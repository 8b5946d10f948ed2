"""What any alpha and lambda would do, from one pass: a histogram of log2(m / I)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .arguments import check_number
from .errors import ArgumentError, DagError
from .kernels.reference import ratio_bins
from .kernels.table import BINS
from .ranks import Ranks
from .ratios import Ratios
from .tiles import Tile, admitted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Bins are the ratio's leading bits as in float32: 8 of the exponent, 3 of the mantissa, so 8 bins an octave.
LOWS = {torch.float32: 20, torch.float64: 49}
BASES = {torch.float32: 0, torch.float64: (1023 - 127) * 8}
NORMAL, INFINITE = 8, 255 * 8  # the bins of 2^-126 and 2^128: what lies outside is one bin below, and `always` above
EDGES = np.concatenate([[0.0], np.ldexp(1 + np.arange(254 * 8) % 8 / 8, np.arange(254 * 8) // 8 - 126), [np.inf]])
_WIDE = 60  # characters of the widest bar


@dataclass(frozen=True)
class SelectionProfile:
    """How many elements lie where in m / I: 8 bins an octave.

    Alpha selects an element iff m > alpha I. At the edges of the bins (`alphas`) the number of elements with
    m / I > alpha is known exactly; m / I is rounded once here, alpha I once in dampening, so that an element within one
    rounding of an edge may count on the other side. Between two edges the number lies between those at both, and is
    interpolated in log2(alpha).

    Attributes:
        numel: elements compared.
        counts: [bins] int64; bin b holds alphas[b] < m / I <= alphas[b + 1]. The first is 0 and all below 2^-126.
        dtype: of the Fishers.
        always: elements that every alpha selects: I = 0 < m, m infinite, or m / I of 2^128 and more.
        never: elements that none selects: 0 / 0 or NaN, and with gradients those that the sign rules out.
        squares: [bins] float64, the sum of theta^2 of each bin's elements; None where no model was given.
        always_square, total_square: the sum of theta^2 of the elements in `always`, and of all.

    """

    numel: int
    counts: np.ndarray
    dtype: torch.dtype
    always: int
    never: int
    squares: np.ndarray | None = None
    always_square: float = 0.0
    total_square: float = 0.0

    @property
    def alphas(self) -> np.ndarray:
        """Where counts are exact, [bins + 1] float64: the largest numbers of the Fishers' dtype below 2^k (1 + j / 8).

        The first is -1, for all; the last is the largest number of the dtype.
        """
        kind = np.float32 if self.dtype == torch.float32 else np.float64
        below = np.nextafter(EDGES.astype(kind), kind(0)).astype(np.float64)
        below[0] = -1
        return below

    def selected(self, alpha: float) -> float:
        """Elements that alpha selects; a whole number at the edges, interpolated between them."""
        return self._above(alpha, self.counts.astype(np.float64), float(self.always))

    def bounds(self, alpha: float) -> tuple[int, int]:
        """The least and the most that alpha may select; equal at the edges."""
        alpha = check_number("alpha", alpha)
        above = self.always + np.append(self.counts[::-1].cumsum()[::-1], 0)
        low = int(np.searchsorted(self.alphas, alpha, "right")) - 1
        high = min(int(np.searchsorted(self.alphas, alpha, "left")), len(above) - 1)
        return int(above[high]), int(above[low])

    def share(self, alpha: float) -> float:
        """Selected elements over elements compared, 0..1."""
        return self.selected(alpha) / self.numel if self.numel else 0.0

    def alpha(self, share: float) -> float:
        """The smallest alpha among the edges that selects at most this share of the elements (0..1).

        The largest edge where even that selects more, because I is 0 in too many elements.
        """
        if not 0 <= check_number("share", share) <= 1:
            raise ArgumentError(f"share is {share:g}, expected 0..1")
        above = self.always + np.append(self.counts[::-1].cumsum()[::-1], 0)
        fits = np.flatnonzero(above <= share * self.numel * (1 + 1e-12))
        edge = int(fits[0]) if len(fits) else len(above) - 1
        return max(0.0, float(self.alphas[edge]))

    def removed(self, alpha: float, *, lam: float = 1.0, exponent: float = 1.0, cap: float = 1.0) -> float:
        """‖Δθ‖ / ‖θ‖ of dampening with these numbers, 0..1 for cap <= 1; m / I is taken as its bin's middle.

        Raises:
            ArgumentError: no model was given to the profile, or a number is out of range.

        """
        if self.squares is None:
            raise ArgumentError("this profile was made without a model: pass model= to selection_profile")
        lam, exponent, cap = (check_number(*pair) for pair in (("lam", lam), ("exponent", exponent), ("cap", cap)))
        low, high = EDGES[:-1], np.minimum(EDGES[1:], 2.0**128)
        middle = np.sqrt(np.maximum(low, high / 2) * high)
        kept = np.minimum((lam / middle) ** exponent, cap)
        gone = self._above(alpha, self.squares * (1 - kept) ** 2, self.always_square)
        return math.sqrt(gone / self.total_square) if self.total_square else 0.0

    def _above(self, alpha: float, values: np.ndarray, always: float) -> float:
        """The sum of values [bins] over what alpha selects."""
        alpha = check_number("alpha", alpha)
        bin_ = int(np.searchsorted(self.alphas, alpha, "right")) - 1
        if bin_ >= len(values):
            return always
        low, high = self.alphas[bin_], min(self.alphas[bin_ + 1], 2.0**128)
        if bin_ == 0:  # 0 and what is next to it; selected by no alpha that one would use
            part = 1.0 if alpha < 0 else 0.0
        else:
            part = 1.0 if alpha == low else 1 - (math.log2(alpha) - math.log2(low)) / (math.log2(high) - math.log2(low))
        return always + float(values[bin_ + 1 :].sum()) + part * float(values[bin_])

    def __str__(self) -> str:
        head = f"{self.numel:,} elements; I = 0 < F: {self.always:,}; never selected: {self.never:,}"
        octaves = self.counts[1:].reshape(-1, 8).sum(axis=1)
        inside = np.flatnonzero(octaves)
        lines = [head, f"F / I below 2^-126, mostly 0: {self.counts[0]:,}"]
        if not len(inside):
            return "\n".join(lines)
        shown, most = range(inside[-1], inside[0] - 1, -1), octaves.max()
        lines.append(f"{'log2(F / I)':>12}  {'elements':>12}  {'selected from here':>18}")
        total = self.always
        for octave in shown:
            total += int(octaves[octave])
            bar = "█" * math.ceil(_WIDE * octaves[octave] / most)
            lines.append(f"{octave - 126:>12}  {octaves[octave]:>12,}  {total / self.numel:>18.2%}  {bar}".rstrip())
        return "\n".join(lines)

    def plot(self, axes: Axes | None = None, *, alpha: float | None = None) -> Axes:
        """Draw the histogram and, on the right, the share selected; a line at alpha if given. Needs matplotlib."""
        if axes is None:
            from matplotlib import pyplot

            axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")[1]
        inside = np.flatnonzero(self.counts[1:]) + 1
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (126 * 8, 126 * 8)
        at = np.log2(np.minimum(EDGES[first : last + 2], 2.0**128))
        axes.bar(at[:-1], self.counts[first : last + 1], np.diff(at), align="edge", color="#56B4E9", linewidth=0)
        axes.set(xlabel="log2(F / I)", ylabel="elements")
        right: Any = axes.twinx()
        right.plot(at, [100 * self.share(float(edge)) for edge in self.alphas[first : last + 2]], color="#D55E00")
        right.set(ylabel="% selected by α = F / I", ylim=(0, None))
        if alpha is not None and alpha > 0:
            axes.axvline(math.log2(alpha), color="black", linestyle="--", linewidth=1)
        return axes


class Profiles(Mapping[str, SelectionProfile]):
    """The profiles of all nodes of a plan, by name; `print` shows a line each."""

    def __init__(self, found: Mapping[str, SelectionProfile]) -> None:
        self._found = dict(found)

    def __getitem__(self, name: str) -> SelectionProfile:
        """Return the profile of a node.

        Raises:
            DagError: no request reaches such a node.

        """
        if name not in self._found:
            raise DagError(f"no profile of node {name!r}; nodes reached: {', '.join(list(self._found)[:8])}")
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __str__(self) -> str:
        shares = (0.001, 0.01, 0.1, 0.5)
        width = max(len("node"), *map(len, self._found)) if self._found else 4
        head = f"{'node':{width}}  {'elements':>12}  {'always':>10}  " + "  ".join(
            f"α for {s:.1%}".rjust(11) for s in shares
        )
        lines = [head, "─" * len(head)]
        for name, p in self._found.items():
            alphas = "  ".join(f"{p.alpha(share):>11.4g}" for share in shares)
            lines.append(f"{name:{width}}  {p.numel:>12,}  {p.always:>10,}  {alphas}")
        return "\n".join(lines)


def profiles_of(ratios: Ratios, numels: Sequence[int]) -> list[SelectionProfile]:
    """A profile of each node, without squares; numels [nodes]."""
    counts = np.zeros((len(numels), BINS), dtype=np.int64)
    for dtype in dict.fromkeys(ratios.dtypes()):
        counts += ratios.count(dtype, np.full(len(numels), BASES[dtype]), LOWS[dtype], nearest=True)
    return [
        SelectionProfile(numel, _folded(row), dtype, int(row[INFINITE:].sum()), numel - int(row.sum()))
        for numel, row, dtype in zip(numels, counts, ratios.dtypes(), strict=True)
    ]


def _folded(row: np.ndarray) -> np.ndarray:
    """Without the bins above, and with those below 2^-126 as one."""
    return np.append(row[:NORMAL].sum(), row[NORMAL:INFINITE])


def with_squares(
    profiles: Sequence[SelectionProfile], tiles: Iterable[Tile], ranks: Ranks | None = None
) -> list[SelectionProfile]:
    """The same with theta^2 in each bin: a second pass, in plain torch, tile by tile; added up over ranks, if any."""
    squares = np.zeros((len(profiles), BINS))
    totals = np.zeros(len(profiles))
    for tile in tiles:
        dtype = tile.merged.dtype
        has_bin = ((tile.merged / tile.original) >= 0) & admitted(tile)
        bins = ratio_bins(tile.original[has_bin], tile.merged[has_bin], BASES[dtype], LOWS[dtype], True)
        square = tile.theta.double() ** 2
        squares[tile.node] += torch.bincount(bins, square[has_bin], BINS).cpu().numpy()
        totals[tile.node] += float(square.sum())
    if ranks is not None:
        squares, totals = ranks.sum_of(squares), ranks.sum_of(totals)
    return [
        replace(p, squares=_folded(row), always_square=float(row[INFINITE:].sum()), total_square=float(total))
        for p, row, total in zip(profiles, squares, totals, strict=True)
    ]
