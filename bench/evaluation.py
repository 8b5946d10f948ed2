"""What the demo's networks still know of what they forgot, beside retraining: the tables of docs/evaluation.md.

    python bench/evaluation.py            bench/results/evaluation.json and the tables; some ten minutes of one core
    python bench/evaluation.py --tables   only the tables, from the committed results

For each network and seed one class, forgotten in the last layer as `fiun-fast demo` does it, and for the transfer
network a random tenth of the samples. Of each, the last node is measured in every way that `fiun_fast.evaluation` has
for a single model, and heads trained on its features are attacked by U-LiRA. What the results have of the same commit
is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.demo.data import load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.gone import EVERY, STEPS, class_gone, random_gone
from fiun_fast.demo.networks import SCENARIOS, grow
from fiun_fast.demo.report import Gone
from fiun_fast.demo.run import REQUESTS

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "evaluation.json", ROOT / "docs" / "evaluation.md"
SEEDS = (0, 1, 2)
ROWS = {
    "forget": "accuracy, forgotten",
    "retain": "accuracy, retained",
    "test": "accuracy, test",
    "tow": "ToW",
    "entropy": "entropy attack",
    "confidence": "SVC efficacy",
    "rmia": "RMIA, AUC",
    "zrf": "ZRF",
    "probe": "linear probe",
    "nearest_mean": "nearest class mean",
    "int8": "int8",
    "int4": "int4",
    "relearned": f"{STEPS} steps on retained",
    "relearned_few": f"{STEPS} steps on 8 forgotten",
    "ulira_trained": "U-LiRA, AUC, trained heads",
    "ulira_unlearned": "U-LiRA, AUC, unlearned",
    "ulira_trained_tpr": "U-LiRA, TPR at 1 %, trained",
    "ulira_unlearned_tpr": "U-LiRA, TPR at 1 %, unlearned",
}


def study(results: Path = RESULTS, seeds: Sequence[int] = SEEDS, effort: float = 1.0) -> dict[str, Any]:
    """All networks of all seeds, one after another; written after each."""
    torch.set_num_threads(1)  # these models are too small to share
    result: dict[str, Any] = {"settings": {"scope": "last-layer", "effort": effort}, "environment": environment()}
    before = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    alike = all(before.get(key) == result[key] for key in result)
    result |= {key: before[key] if alike else start for key, start in (("seconds", 0.0), ("rows", []))}
    done = {(row["scenario"], row["seed"]) for row in result["rows"]}
    for seed, scenario in product(seeds, REQUESTS):
        if (scenario, seed) in done:
            continue
        began = time.process_time()
        result["rows"] += [{"seed": seed, **asdict(one)} for one in measured(scenario, seed, effort)]
        result["seconds"] += time.process_time() - began
        write_json(results, result)
        print(f"seed {seed}, {scenario}: {result['seconds']:.0f} CPU s", flush=True)
    return result


def measured(scenario: str, seed: int, effort: float) -> list[Gone]:
    """One network."""
    digits = load_digits(seed)
    recipe = SCENARIOS[scenario](digits, seed)
    network = Network(recipe, digits, grow(recipe, effort=effort), "last-layer")
    case = network.forget(REQUESTS[scenario][0])
    found = [class_gone(network, case, network.retrain(case, effort=effort), EVERY)]
    return [*found, random_gone(network, effort, EVERY)] if scenario == "transfer" else found


def tables(result: dict[str, Any]) -> str:
    """A row a measure: of the unlearned network, of the retrained one behind a stroke; means and spread over seeds."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        columns.setdefault(f"{row['scenario']}, {row['node']}: {row['request']}", []).append(row["measured"])
    lines = [[head, *(_cell([one.get(name) for one in of]) for of in columns.values())] for name, head in ROWS.items()]
    return markdown(["measure", *columns], lines)


def _cell(pairs: list[list[Any] | None]) -> str:
    there = [pair for pair in pairs if pair is not None]
    sides = [[side["value"] for side in of if side is not None] for of in zip(*there, strict=True)]
    return " / ".join(f"{mean(of):.2f} ± {stdev(of):.2f}" if len(of) > 1 else f"{of[0]:.2f}" for of in sides if of)


def main() -> None:
    """Run the study, or only write its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", action="store_true")
    if not parser.parse_args().tables:
        study()
    text = tables(json.loads(RESULTS.read_text(encoding="utf-8")))
    print(text)
    fill(PAGE, "tables", f"\n{text}\n")


if __name__ == "__main__":
    main()
