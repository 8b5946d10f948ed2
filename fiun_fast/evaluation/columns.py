"""The measures that a table can have, what each needs, and one node that they are taken of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from ..estimators.reading import Forward
from .accuracies import tow_of
from .distances import untrained, zrf_of
from .intervals import Estimate, share
from .membership import confidence_attack, entropy_attack, rmia
from .outputs import Answers, answers, check_again
from .probes import Probe, probe_of
from .relearning import Relearning, relearn
from .rounding import quantised

Measure = Literal[
    "forget", "retain", "test", "tow", "entropy", "confidence", "rmia", "zrf",
    "probe", "nearest_mean", "int8", "int4", "relearned", "relearned_few",
]  # fmt: skip
MEASURES: tuple[str, ...] = get_args(Measure)


@dataclass(frozen=True)
class Measured:
    """One cell: of the model, and of the retrained model where there is one that the measure can be taken of."""

    model: Estimate
    retrained: Estimate | None = None


@dataclass(frozen=True)
class Options:
    """Of the measures: those of `relearn`, how batches are read, and the seed of all."""

    steps: int
    few: int
    lr: float
    forward_fn: Forward | None
    seed: int


class Node:
    """A model, the one that it is compared with, and the data; whatever several columns use is made once.

    Args:
        model: the node's.
        given: "forget", "retain", "test", "retrained", "references" -> what was given for this node, or None.
        options: of the measures.

    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any], options: Options) -> None:
        for what in ("forget", "retain", "test"):
            check_again(what, given[what])
        self.model, self.given, self.options = model, given, options
        self._made: dict[Any, Any] = {}

    def measured(self, measures: Iterable[str]) -> dict[str, Measured]:
        """The cells that what was given allows."""
        found, again = {}, self.given["retrained"]
        for name in measures:
            column = COLUMNS[name]
            if all(self.given[what] is not None for what in column.needs):
                beside = None if again is None or "retrained" in column.needs else column.take(self, again)
                found[name] = Measured(column.take(self, self.model), beside)
        return found

    def answers(self, model: nn.Module, what: str) -> Answers:
        """Those of the model on a set; with features where a probe may want them."""
        features = what != "test" and self.given["retain"] is not None and self.given["forget"] is not None
        read = partial(answers, features=features, what=what, forward_fn=self.options.forward_fn)
        return self._once((id(model), what), lambda: read(model, self.given[what]))

    def tow(self, model: nn.Module) -> Estimate:
        """`tow`."""
        own, again = ([self.answers(one, what) for what in SETS] for one in (model, self.given["retrained"]))
        return tow_of(own, again, seed=self.options.seed)

    def attacked(self, model: nn.Module, attack: Callable[..., Estimate]) -> Estimate:
        """An attack that takes all three sets."""
        return attack(model, **{what: self.answers(model, what) for what in SETS})

    def rmia(self, model: nn.Module) -> Estimate:
        """`rmia`."""
        sets = {what: self.given[what] for what in ("forget", "test", "references")}
        return rmia(model, **sets, forward_fn=self.options.forward_fn, seed=self.options.seed).auc

    def zrf(self, model: nn.Module) -> Estimate:
        """`zrf`, with one teacher for both models."""
        teacher = self._once("teacher", lambda: untrained(self.model, self.options.seed))
        own, random = (self.answers(one, "forget") for one in (model, teacher))
        return zrf_of(own, random, seed=self.options.seed)

    def probed(self, model: nn.Module) -> Probe:
        """`probe`."""
        gone, kept = (self.answers(model, what) for what in ("forget", "retain"))
        return self._once(("probe", id(model)), lambda: probe_of(gone, kept, seed=self.options.seed))

    def rounded(self, model: nn.Module, bits: int) -> Estimate:
        """Forget accuracy of the quantised model."""
        forward_fn, gone = self.options.forward_fn, self.given["forget"]
        return share(answers(quantised(model, bits), gone, what="forget", forward_fn=forward_fn).right)

    def relearned(self, model: nn.Module, on: str) -> Estimate:
        """The end of a curve of `relearn`."""
        o, gone, kept = self.options, self.given["forget"], self.given["retain"]
        how: dict[str, Any] = {"few": o.few, "lr": o.lr, "forward_fn": o.forward_fn, "seed": o.seed}
        make: Callable[..., Relearning] = partial(relearn, forget=gone, retain=kept, steps=(o.steps,), **how)
        found = self._once(("relearn", id(model)), lambda: make(model))
        return next(iter(getattr(found, on).values()))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Column(NamedTuple):
    """A measure: its heading, what has to be given, and how it is taken."""

    head: str
    needs: tuple[str, ...]
    take: Callable[[Node, nn.Module], Estimate]


def _confidence(node: Node, model: nn.Module) -> Estimate:
    return node.attacked(model, partial(confidence_attack, seed=node.options.seed))


SETS, TRAINED = ("forget", "retain", "test"), ("forget", "retain")
COLUMNS: dict[str, Column] = {
    "forget": Column("forget", ("forget",), lambda node, m: share(node.answers(m, "forget").right)),
    "retain": Column("retain", ("retain",), lambda node, m: share(node.answers(m, "retain").right)),
    "test": Column("test", ("test",), lambda node, m: share(node.answers(m, "test").right)),
    "tow": Column("ToW", (*SETS, "retrained"), Node.tow),
    "entropy": Column("entropy MIA", SETS, lambda node, m: node.attacked(m, entropy_attack)),
    "confidence": Column("SVC efficacy", SETS, _confidence),
    "rmia": Column("RMIA AUC", ("forget", "test", "references"), Node.rmia),
    "zrf": Column("ZRF", ("forget",), Node.zrf),
    "probe": Column("probe", TRAINED, lambda node, m: node.probed(m).linear),
    "nearest_mean": Column("class mean", TRAINED, lambda node, m: node.probed(m).nearest_mean),
    "int8": Column("int8", ("forget",), lambda node, m: node.rounded(m, 8)),
    "int4": Column("int4", ("forget",), lambda node, m: node.rounded(m, 4)),
    "relearned": Column("relearned", TRAINED, lambda node, m: node.relearned(m, "on_retain")),
    "relearned_few": Column("… of few", TRAINED, lambda node, m: node.relearned(m, "on_few")),
}
