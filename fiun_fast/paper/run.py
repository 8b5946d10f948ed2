"""`fiun-fast paper`: every network, request, seed and method; a results file, which is resumed, and its tables."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..arguments import check_one_of
from ..bench.files import environment, fill, write_json
from ..demo.data import load_digits
from ..errors import ArgumentError, FileWriteError
from . import methods, published
from .networks import NETWORKS, REQUESTS
from .report import tables

SEEDS = (0, 1, 2, 3, 4)
MARK = "measured"


def run_paper(
    *,
    out: Path | str,
    page: Path | str | None = None,
    networks: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    quick: bool = False,
) -> dict[str, Any]:
    """Run the comparison, write it, print its tables and return what was written.

    A network, a request and a seed make a unit; the file is written after each. What is there already is not done
    again, if it was made with the same settings, by the same commit and versions, on the same kind of machine.

    Args:
        out: the results file, JSON.
        page: a page in Markdown, of which the tables between its marks are replaced; None: none.
        networks: names out of `NETWORKS`; None: all.
        seeds: of data split, training, and which classes go.
        quick: trains briefly and tries little, for tests.

    Raises:
        ArgumentError: an unknown network, no seed, a file `out` that holds something else or was made otherwise, which
            says what differs, or a page without the marks.
        FileWriteError: the folder of `out` cannot be made.

    """
    networks, seeds = list(dict.fromkeys(networks or NETWORKS)), list(dict.fromkeys(seeds))  # each once
    for network in networks:
        check_one_of("network", network, tuple(NETWORKS))
    if not seeds:
        raise ArgumentError("seeds is empty: nothing to run")
    console, out = Console(), Path(out)
    before = _there(out)
    if page is not None:
        _check_marked(Path(page))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share: faster, and the same bits on any number of cores
    try:
        result: dict[str, Any] = {
            "settings": settings_of(quick),
            "environment": environment(),
            "seconds": 0.0,
            "rows": [],
        }
        result = json.loads(json.dumps(result))  # as it comes back from a file
        if before is not None:
            _check_alike(out, before, result)
            result = before
        done = {(row["network"], row["request"], row["seed"]) for row in result["rows"]}
        for seed in seeds:
            for network in networks:
                for request in REQUESTS:
                    if (network, request, seed) not in done:
                        began = time.process_time()
                        result["rows"] += unit(network, request, seed, quick)
                        result["seconds"] += time.process_time() - began
                        write_json(out, result)
                        console.print(f"{network}, {request}, seed {seed}: {result['seconds']:.0f} CPU s", style="dim")
    finally:
        torch.set_num_threads(threads)
    text = tables(json.loads(out.read_text(encoding="utf-8")))
    print(text)
    if page is not None:
        fill(Path(page), MARK, f"\n{text}\n")
    console.print(f"wrote {out}")
    return result


def settings_of(quick: bool) -> dict[str, Any]:
    """All that a row depends on, beside where it ran."""
    return {
        "quick": quick,
        "methods": list(methods.METHODS),
        "fine_tuning": methods.TUNING,
        "scrub": methods.SCRUB | methods.SCRUB_LOSS,
        "points": methods.SEARCH,
    }


def _check_alike(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Rows of unlike runs make no table: an ArgumentError that names what differs."""
    found = []
    for part in ("settings", "environment"):
        was, now_is = before[part], now[part]
        for key in dict.fromkeys([*was, *now_is]):
            if was.get(key) != now_is.get(key):
                found.append(f"{key} was {was.get(key)!r:.60} and is {now_is.get(key)!r:.60}")
    if found:
        raise ArgumentError(
            f"out: {out} is of another run, and would be mixed with this one: {'; '.join(found)}. Name another file, "
            "or delete this one"
        )


def _there(out: Path) -> dict[str, Any] | None:
    """The results that are there; None: there is no file, and its folder is made."""
    try:
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            return None
        found = json.loads(out.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileWriteError(f"out: {out} cannot be used: {error.strerror}") from None
    except ValueError:
        found = None
    kinds = {"settings": dict, "environment": dict, "seconds": float, "rows": list}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise ArgumentError(f"out: {out} is there and holds no results of this command; name another file")
    return found


def _check_marked(page: Path) -> None:
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"page: {page} cannot be read: {error}") from None
    if not 0 <= text.find(f"<!-- {MARK} -->\n") < text.find(f"<!-- /{MARK} -->"):
        raise ArgumentError(f"page: {page} has no lines <!-- {MARK} --> and <!-- /{MARK} -->, between which tables go")


def unit(name: str, request: str, seed: int, quick: bool) -> list[dict[str, Any]]:
    """All methods on one trained network, and what the published measurements would do there."""
    digits = load_digits(seed)
    network = methods.Network(NETWORKS[name](digits, seed, request), digits, quick)
    rows: list[dict[str, Any]] = []
    for method, apply in methods.METHODS.items():
        models, seconds = apply(network)
        nodes = {node: methods.accuracies(network, node, model) for node, model in models.items()}
        rows.append({"part": "method", "method": method, "nodes": nodes, "seconds": seconds})
    rows += published.at_alphas(network)
    if request == REQUESTS[0]:
        rows.append(published.timers(network))
        rows += [published.loop_or_launch(network, scope) for scope in ("last layer", "whole model")]
    else:
        rows += published.at_divisors(network)
    where = {"network": name, "request": request, "seed": seed}
    return [where | row for row in rows]
