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

    A network, a request and a seed make a unit; the file is written after each. What is there of the same settings and
    the same commit is not done again.

    Args:
        out: the results file, JSON.
        page: a page in Markdown, of which the tables between its marks are replaced; None: none.
        networks: names out of `NETWORKS`; None: all.
        seeds: of data split, training, and which classes go.
        quick: trains briefly and tries little, for tests.

    Raises:
        ArgumentError: an unknown network, no seed, a file `out` that holds something else, or a page without the marks.
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
    settings = {
        "quick": quick,
        "fine_tuning": methods.TUNING,
        "scrub": methods.SCRUB | methods.SCRUB_LOSS,
        "points": methods.SEARCH,
    }
    result: dict[str, Any] = {"settings": settings, "environment": environment(), "seconds": 0.0, "rows": []}
    result = json.loads(json.dumps(result))  # as it comes back from a file
    if before is not None and all(before[key] == result[key] for key in ("settings", "environment")):
        result = before
    done = {(row["network"], row["request"], row["seed"]) for row in result["rows"]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share: faster, and the same bits on any number of cores
    try:
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
    if not isinstance(found, dict) or not found.keys() >= {"settings", "environment", "seconds", "rows"}:
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
