"""Results as tables in Markdown: means over the models of a network, then over seeds, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from ..bench.files import markdown

Row = dict[str, Any]
ALL = "all four"
MEASURES = {"forgotten": 0, "retained": 1, "forgotten, training data": 2, "retained, training data": 3}


def tables(result: dict[str, Any]) -> str:
    """All of them."""
    rows = result["rows"]
    methods = _of(rows, "method")
    seeds = ", ".join(map(str, _values(methods, "seed")))
    parts = [
        f"Seeds {seeds}; torch {result['environment']['torch']}, {result['seconds']:.0f} CPU seconds altogether.\n",
        "**All networks**, test data, %: mean ± standard deviation over seeds\n",
        _overview(methods),
        "**CPU seconds a network**, one class, one thread\n",
        _times(methods),
    ]
    for request in _values(methods, "request"):
        for network in _values(methods, "network"):
            parts += [f"**{network}, {request}**\n", _network([*_where(methods, network=network, request=request)])]
    parts += [
        "**Training data in the place of test data**: points that it adds, all networks\n",
        _on_training_data(methods),
        "**α**, last layer, λ = 1, the same α at every node; all networks, %\n",
        _sweep(_of(rows, "alpha"), "α"),
        _picked(_of(rows, "alpha")),
        "**The merge's divisor**, last layer, α = 1, λ = 1; nodes that both requests reach, %\n",
        _sweep(_of(rows, "divisor"), "divided by"),
        "**Loop and launch**: milliseconds of CPU to dampen all models, everything else ready\n",
        _launches(_of(rows, "launch")),
        "**Timers**: milliseconds of CPU of SSD's loop in the last layer, one class\n",
        _timers(_of(rows, "timers"), methods),
    ]
    return "\n".join(parts)


def _of(rows: Iterable[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _where(rows: Iterable[Row], **wanted: Any) -> Iterable[Row]:
    return (row for row in rows if all(row[key] == value for key, value in wanted.items()))


def _by_seed(rows: Iterable[Row], value: Callable[[Row], float]) -> list[float]:
    """Of each seed the mean."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(value(row))
    return [mean(values) for values in found.values()]


def _spread(values: Sequence[float], digits: int = 1, factor: float = 100.0) -> str:
    """Mean ± standard deviation over the seeds."""
    text = f"{factor * mean(values):.{digits}f}"
    return f"{text} ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else text


def _measure(index: int) -> Callable[[Row], float]:
    return lambda row: mean(node[index] for node in row["nodes"].values())


def _worst(row: Row) -> float:
    return max(node[0] for node in row["nodes"].values())


def _total(row: Row) -> float:
    return sum(row["seconds"].values())


def _overview(rows: Sequence[Row]) -> str:
    requests = _values(rows, "request")
    heads = ["method", *(f"{measure}, {request}" for request in requests for measure in ("forgotten", "retained"))]
    lines = []
    for method in _values(rows, "method"):
        cells = [
            _spread(_by_seed(_where(rows, method=method, request=request), _measure(index)))
            for request in requests
            for index in (0, 1)
        ]
        lines.append([method, *cells])
    return markdown(heads, lines)


def _on_training_data(rows: Sequence[Row]) -> str:
    requests = _values(rows, "request")
    heads = ["method", *(f"{measure}, {request}" for request in requests for measure in ("forgotten", "retained"))]
    lines = []
    for method in _values(rows, "method"):
        cells = [
            _spread(_by_seed(of, lambda row, i=index: _measure(i + 2)(row) - _measure(i)(row)))  # type: ignore[misc]
            for request in requests
            for of in [[*_where(rows, method=method, request=request)]]
            for index in (0, 1)
        ]
        lines.append([method, *cells])
    return markdown(heads, lines)


def _times(rows: Sequence[Row]) -> str:
    mine = [*_where(rows, request=rows[0]["request"])]
    again = mean(_total(row) for row in _where(mine, method="retraining"))
    parts = _values([{"part": part} for row in mine for part in row["seconds"]], "part")
    lines = []
    for method in _values(mine, "method"):
        of = [*_where(mine, method=method)]
        if not any(row["seconds"] for row in of):
            continue
        split = [mean(row["seconds"].get(part, 0.0) for row in of) for part in parts]
        cells = [f"{seconds:.4f}" if 0 < seconds < 0.1 else f"{seconds:.2f}" if seconds else "" for seconds in split]
        lines.append([method, *cells, _spread(_by_seed(of, _total), 2, 1.0), f"{100 * sum(split) / again:.0f} %"])
    return markdown(["method", *parts, "all", "of retraining"], lines)


def _network(rows: Sequence[Row]) -> str:
    heads = ["method", "forgotten", "worst model", "retained", "forgotten, train", "retained, train", "CPU s"]
    lines = []
    for method in _values(rows, "method"):
        of = [*_where(rows, method=method)]
        found = [_spread(_by_seed(of, _measure(index))) for index in MEASURES.values()]
        worst, seconds = _spread(_by_seed(of, _worst)), _spread(_by_seed(of, _total), 2, 1.0)
        lines.append([method, found[0], worst, *found[1:], seconds if any(map(_total, of)) else ""])
    return markdown(heads, lines)


def _sweep(rows: Sequence[Row], head: str) -> str:
    requests = _values(rows, "request")
    heads = [head, *(f"{measure}, {request}" for request in requests for measure in MEASURES)]
    lines = []
    for value in _values(rows, "value"):
        cells = [
            _spread(_by_seed(_where(rows, value=value, request=request), lambda row, i=index: row["mean"][i]))  # type: ignore[misc]
            for request in requests
            for index in MEASURES.values()
        ]
        lines.append([f"{value:g}", *cells])
    return markdown(heads, lines)


def _picked(rows: Sequence[Row]) -> str:
    """Per network and seed the alpha that is best by accuracies on training data: what these show, and test data."""
    lines = []
    for request in _values(rows, "request"):
        best = []
        for network in _values(rows, "network"):
            for seed in _values(rows, "seed"):
                mine = [*_where(rows, request=request, network=network, seed=seed)]
                best += [max(mine, key=lambda row: row["mean"][3] - row["mean"][2])] if mine else []
        shown = [_spread(_by_seed(best, lambda row, i=index: row["mean"][i])) for index in (2, 3, 0, 1)]  # type: ignore[misc]
        lines.append([request, ", ".join(f"{value:g}" for value in sorted({row["value"] for row in best})), *shown])
    heads = ["best α by training data", "which", "forgotten, training", "retained, training", "forgotten", "retained"]
    return markdown(heads, lines)


def _launches(rows: Sequence[Row]) -> str:
    lines = []
    for scope in _values(rows, "scope"):
        for network in _values(rows, "network"):
            of = [*_where(rows, scope=scope, network=network)]
            loop, launch = (_spread([row[key] for row in of], 3, 1e3) for key in ("loop", "launch"))
            times = mean(row["loop"] for row in of) / mean(row["launch"] for row in of)
            lines.append([f"{network}, {scope}", of[0]["models"], loop, launch, f"{times:.0f}×"])
    return markdown(["", "models", "loop over models", "one launch", "faster"], lines)


def _timers(rows: Sequence[Row], methods: Sequence[Row]) -> str:
    lines = []
    for network in _values(rows, "network"):
        of = [*_where(rows, network=network)]
        parts = [_spread([row["seconds"][part] for row in of], 2, 1e3) for part in of[0]["seconds"]]
        mine = [*_where(methods, network=network, request=of[0]["request"])]
        again = mean(_total(row) for row in _where(mine, method="retraining"))
        first = mean(sum(v for part, v in row["seconds"].items() if part.startswith("origin")) for row in of)
        whole = mean(_total(row) for row in of)
        chosen = mean(_total(row) for row in _where(mine, method="fiun_fast, last layer"))
        lines.append([network, *parts, *(f"{100 * (1 - part / again):.1f} %" for part in (first, whole, chosen))])
    heads = ["", *rows[0]["seconds"], "saved by the first timer", "saved by all", "saved with α and λ chosen"]
    return markdown(heads, lines)
