"""Data in the place of Fishers: what a plan lacks is estimated, in one sweep over each loader, and kept."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from .dag import ForgetRequest, InheritanceDAG, Node
from .errors import ArgumentError, FiunError
from .estimates import Estimates
from .estimators.estimate import Wanted, estimate_fisher, sweep
from .estimators.job import OWN_LOSSES, Options
from .estimators.loaders import as_dict, is_iterator
from .estimators.totals import BY_SAMPLE
from .fisher import Fisher
from .scope import LAST, Params, for_several, select_parameters
from .wrappers import unwrap

FEWEST = 8  # batches: `batch` is a mean over these
Estimate = Mapping[str, Any]  # keywords of `estimate_fisher`
_OTHERS = {"model", "loader", "group"}  # over ranks, plans are made of Fishers
KNOWN = tuple(name for name in inspect.signature(estimate_fisher).parameters if name not in _OTHERS)


class Complete(NamedTuple):
    """Requests that have Fishers, and original Fishers of the nodes that have none of their own."""

    requests: list[ForgetRequest]
    originals: dict[str, Fisher]


@dataclass(frozen=True, eq=False)
class _Lack:
    """Fishers of one model over some data that somebody lacks: one for each way to estimate."""

    what: str  # for messages
    model: nn.Module
    data: Any
    estimates: Estimates  # where they are kept
    scope: Mapping[str, Tensor]  # name -> parameter
    most: int | None  # samples

    def found(self, way: Options) -> Fisher | None:
        return self.estimates.find((way, self.most, *self.scope), self.model, self.data)

    def keep(self, way: Options, fisher: Fisher) -> None:
        how = (way, self.most, *self.scope)
        self.estimates.keep(how, self.model, self.data, list(self.scope.values()), fisher)


def completed(
    dag: InheritanceDAG, requests: Sequence[ForgetRequest], estimate: Estimate | None = None, backend: str | None = None
) -> Complete:
    """The requests with Fishers, and the original Fishers that nodes lack: what `plan` does with data.

    Args:
        dag, requests: as checked by `plan`.
        estimate: keywords of `estimate_fisher`; None: its defaults, over the last layer.
        backend: for those that name none.

    Raises:
        ArgumentError: an unknown keyword; or as `complete_for`.
        FiunError: as `complete_for`.

    """
    keywords = {"backend": backend} | check_estimate(estimate)
    if not any(request.fisher is None for request in requests) and not dag.lacks_fishers:
        return Complete(list(requests), {})
    params, progress = keywords.pop("params", LAST), bool(keywords.pop("progress", False))
    (found,) = complete_for(dag, requests, params, [Options(**keywords)], progress=progress)
    return found


def check_estimate(estimate: Estimate | None) -> dict[str, Any]:
    """The keywords as a dict of one's own.

    Raises:
        ArgumentError: one that `estimate_fisher` does not take.

    """
    if estimate is not None and not isinstance(estimate, Mapping):
        raise ArgumentError(f"estimate is a {type(estimate).__name__}, expected a dict of estimate_fisher's keywords")
    for name in estimate or {}:
        if name not in KNOWN:
            raise ArgumentError(f"estimate has {name!r}, expected keywords of estimate_fisher: {', '.join(KNOWN)}")
    return dict(estimate or {})


def options_for(estimators: Iterable[Any], keywords: Estimate) -> list[Options]:
    """For each estimator its options, without what it does not take: a loss where it has its own, `per` by batches."""
    found = []
    for estimator in estimators:
        own = {"estimator": estimator, **keywords}
        if estimator in OWN_LOSSES:
            own.pop("loss_fn", None)
        if estimator not in BY_SAMPLE:
            own.pop("per", None)
        found.append(Options(**own))
    return found


def complete_for(
    dag: InheritanceDAG,
    requests: Sequence[ForgetRequest],
    params: Params,
    ways: Sequence[Options],
    *,
    most: int | None = None,
    progress: bool = False,
) -> list[Complete]:
    """The same for several ways to estimate, for all of which each loader is gone over once.

    Nodes and requests that have Fishers keep them, and where some are given the others are estimated over the
    parameters that those are of. What was estimated before is used again (`Estimates`).

    Args:
        dag, requests: as checked by `plan`.
        params: which parameters.
        ways: the estimators, with their options.
        most: samples of each loader that are used, about (`some`); None: all.
        progress: show a progress bar.

    Raises:
        ArgumentError: data of a node whose model is a dict of tensors; no loader.
        EstimationError: an empty loader, or an iterator that is used up; else as `estimate_fisher`. The message begins
            with the node or request.
        FiunError: as `estimate_fisher`.

    """
    reached = dag.reached(requests)
    fishers = [*(request.fisher for request in requests), *(node.fisher for node, _ in reached)]
    given = [fisher for fisher in fishers if fisher is not None]
    scope = list(given[0].layout.names) if given else for_several(params)
    nodes = {
        node.name: _lack(f"data of node {node.name!r}", node, node.data, node.estimates, scope, most)
        for node, _ in reached
        if node.fisher is None and node.data is not None
    }
    forgets = {
        k: _lack(f"data of request {k} ({one.origin!r})", dag[one.origin], one.data, one.estimates, scope, most)
        for k, one in enumerate(requests)
        if one.fisher is None
    }
    lacks = [*nodes.values(), *forgets.values()]
    found = {(lack, way): lack.found(way) for lack in lacks for way in ways}
    for together in _sweeps([lack for lack in lacks if any(found[lack, way] is None for way in ways)]):
        missing = [way for way in ways if any(found[lack, way] is None for lack in together)]
        with _about(together):
            wanted = {lack.what: Wanted(lack.model, list(lack.scope), missing) for lack in together}
            fresh = sweep(wanted, together[0].data if most is None else some(together[0].data, most), progress)
        for lack in together:
            for way, fisher in zip(missing, fresh[lack.what], strict=True):
                if found[lack, way] is None:
                    lack.keep(way, fisher)
                    found[lack, way] = fisher
    return [
        Complete(
            [_with(one, found[forgets[k], way]) if k in forgets else one for k, one in enumerate(requests)],
            {name: made for name, lack in nodes.items() if (made := found[lack, way]) is not None},
        )
        for way in ways
    ]


def some(loader: Any, samples: int) -> Any:
    """About so many samples of a loader, in at least `FEWEST` batches that are spread over all of it evenly.

    The loader itself where it does not say how many batches it has, or has no more than that.
    """
    if isinstance(loader, (Tensor, Dataset)):  # no loader, as it will be told
        return loader
    try:
        total = len(loader)
    except (TypeError, NotImplementedError):
        return loader
    return loader if total <= FEWEST or is_iterator(loader) else _Some(loader, samples, total)


class _Some:
    def __init__(self, loader: Any, samples: int, total: int) -> None:
        self._loader, self._samples, self._total = loader, samples, total

    def __iter__(self) -> Iterator[Any]:
        taken: set[int] | None = None
        for number, batch in enumerate(self._loader):
            if taken is None:
                leaves = tree_leaves(as_dict(batch))
                each = max((len(leaf) for leaf in leaves if len(getattr(leaf, "shape", ()))), default=1)
                wanted = min(self._total, max(FEWEST, -(-self._samples // each)))
                taken = {k * self._total // wanted for k in range(wanted)}
            if number in taken:
                yield batch


def _lack(what: str, node: Node, data: Any, estimates: Estimates, params: Params, most: int | None) -> _Lack:
    if not isinstance(node.model, nn.Module):
        raise ArgumentError(
            f"{what}: the model of node {node.name!r} is a {type(node.model).__name__} of tensors, which cannot be "
            "run: pass the module, or a Fisher"
        )
    try:
        return _Lack(what, node.model, data, estimates, select_parameters(unwrap(node.model).module, params), most)
    except FiunError as error:
        error.args = (f"{what}: {error}",)
        raise


def _sweeps(lacks: Iterable[_Lack]) -> list[list[_Lack]]:
    """Those that share a loader together, each model once."""
    found: list[list[_Lack]] = []
    for lack in lacks:
        for together in found:
            if together[0].data is lack.data and all(other.model is not lack.model for other in together):
                together.append(lack)
                break
        else:
            found.append([lack])
    return found


@contextmanager
def _about(lacks: Sequence[_Lack]) -> Iterator[None]:
    """Errors say whose data it is about."""
    try:
        yield
    except FiunError as error:
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        error.args = (f"{', '.join(lack.what for lack in lacks[:3])}{more}: {error}",)
        raise


def _with(request: ForgetRequest, fisher: Fisher | None) -> ForgetRequest:
    assert fisher is not None
    return ForgetRequest(request.origin, fisher, request.weight)
