"""A table for the whole DAG: one row a node, a column for each measure that the given data and models allow."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..arguments import check_one_of
from ..dag import InheritanceDAG
from ..errors import ArgumentError, FiunError
from ..estimators.reading import Forward
from .columns import COLUMNS, MEASURES, Measure, Measured, Node, Options


@dataclass(frozen=True)
class Evaluation:
    """What `table` returns: prints as a table, and gives plain data.

    Attributes:
        rows: node -> measure -> cell, in the order of the DAG.
        notes: what the columns mean, line by line.

    """

    rows: Mapping[str, Mapping[str, Measured]]
    notes: tuple[str, ...] = ()

    def __getitem__(self, node: str) -> Mapping[str, Measured]:
        """The cells of a node."""
        if node not in self.rows:
            raise ArgumentError(f"no row {node!r}; there are {', '.join(map(repr, self.rows))}")
        return self.rows[node]

    @property
    def columns(self) -> list[str]:
        """The measures."""
        return [name for name in MEASURES if any(name in row for row in self.rows.values())]

    def to_dict(self) -> dict[str, dict[str, dict[str, list[float] | None]]]:
        """Node -> measure -> {"model": [value, low, high], "retrained": the same or None}."""
        plain = lambda e: None if e is None else [e.value, e.low, e.high]  # noqa: E731
        return {
            node: {name: {"model": plain(cell.model), "retrained": plain(cell.retrained)} for name, cell in row.items()}
            for node, row in self.rows.items()
        }

    def __rich__(self) -> Any:
        """A cell: the model's value, the retrained model's behind a stroke, the model's interval below."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table

        made = Table("node", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for name in self.columns:
            made.add_column(COLUMNS[name].head, justify="right", no_wrap=True)
        for node, row in self.rows.items():
            made.add_row(node, *(_cell(row[name]) if name in row else "" for name in self.columns))
        return Group(made, *self.notes)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=20 + 16 * len(self.columns), no_color=True).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _cell(cell: Measured) -> str:
    beside = "" if cell.retrained is None else f" / {cell.retrained.value:.2f}"
    return f"{cell.model.value:.2f}{beside}\n[dim]{cell.model.low:.2f}–{cell.model.high:.2f}[/]"


def table(
    models: InheritanceDAG | Mapping[str, nn.Module] | nn.Module,
    *,
    forget: Any = None,
    retain: Any = None,
    test: Any = None,
    retrained: Mapping[str, nn.Module] | nn.Module | None = None,
    references: Mapping[str, Sequence[nn.Module]] | Sequence[nn.Module] | None = None,
    measures: Sequence[Measure] | None = None,
    steps: int = 20,
    few: int = 8,
    lr: float = 1e-3,
    forward_fn: Forward | None = None,
    seed: int = 0,
) -> Evaluation:
    """Take every measure that the given data and models allow, of every node.

    | measure | needs | what |
    | --- | --- | --- |
    | `forget`, `retain`, `test` | the set | accuracy |
    | `tow` | all three sets, `retrained` | `tow` |
    | `entropy`, `confidence` | all three sets | `entropy_attack`, `confidence_attack` |
    | `rmia` | forget, test, `references` | area under the curve of `rmia` |
    | `zrf` | forget | `zrf` |
    | `probe`, `nearest_mean` | forget, retain | `probe`, on forgotten data |
    | `int8`, `int4` | forget | forget accuracy after `quantised` |
    | `relearned` | forget, retain | forget accuracy after `steps` of `relearn` on retained data |
    | `relearned_few` | forget, retain | the same on a few forgotten samples |

    Args:
        models: a DAG, {name: module}, or one module, whose row is called "model".
        forget, retain, test: loaders, gone over several times; or {node: loader}. Nodes without one have no such
            column; of a DAG, nodes for which {node: loader} has no forget set have no row.
        retrained: what the nodes would be without the forget set; {node: model}, or a model where there is one node.
        references: for `rmia`; {node: models}, or models for all nodes.
        measures: only these; None: all. Those that train (`relearned`, `relearned_few`) cost most.
        steps, few, lr: of `relearn`.
        forward_fn: as for `ff.estimate_fisher`.
        seed: as for the measures.

    Raises:
        ArgumentError: no data, no model, a node's model is a dict of tensors, an unknown measure, or one that needs
            what was not given.
        EstimationError: as the measures, naming node and set.

    """
    modules = _modules(models)
    for name in measures or ():
        check_one_of("measure", name, MEASURES)
    given = {"forget": forget, "retain": retain, "test": test, "retrained": retrained, "references": references}
    if forget is None and retain is None and test is None:
        raise ArgumentError("no data: pass forget=, retain= or test=")
    for what, part in given.items():
        if isinstance(part, Mapping) and (unknown := part.keys() - modules.keys()):
            raise ArgumentError(f"{what} names {sorted(map(str, unknown))}, but the nodes are {list(modules)}")
    if isinstance(retrained, nn.Module) and len(modules) > 1:
        raise ArgumentError(f"retrained is one model for {len(modules)} nodes: pass {{node: model}}")
    for name in measures or ():
        if missing := [what for what in COLUMNS[name].needs if given[what] is None]:
            raise ArgumentError(f"measure {name!r} needs {', '.join(missing)}")
    rows, options = {}, Options(steps, few, lr, forward_fn, seed)
    for node, model in modules.items():
        own = {what: _of(part, node) for what, part in given.items()}
        if forget is not None and own["forget"] is None:
            continue
        try:
            rows[node] = Node(model, own, options).measured(measures or MEASURES)
        except FiunError as error:
            error.args = (f"node {node!r}: {error}",)
            raise
    notes = ("value / that of the retrained model; below: 95 % interval",) if retrained is not None else ()
    return Evaluation(rows, notes)


def _modules(models: Any) -> dict[str, nn.Module]:
    if isinstance(models, nn.Module):
        return {"model": models}
    if isinstance(models, InheritanceDAG):
        found: dict[str, Any] = {name: models[name].model for name in models}
    elif isinstance(models, Mapping):
        found = dict(models)
    else:
        raise ArgumentError(f"models is a {type(models).__name__}, expected an InheritanceDAG, a dict or a module")
    if not found:
        raise ArgumentError("there is no model")
    for name, model in found.items():
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"node {name!r} is a {type(model).__name__}, expected a module that can be run")
    return found


def _of(part: Any, node: str) -> Any:
    return part.get(node) if isinstance(part, Mapping) else part
