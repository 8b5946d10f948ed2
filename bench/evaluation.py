"""What the demo's networks still know of what they forgot, beside retraining: the tables of docs/evaluation.md.

    python bench/evaluation.py            bench/results/evaluation.json and the tables; minutes
    python bench/evaluation.py --tables   only the tables, from the committed results

For each network one class, forgotten in the last layer as `fiun-fast demo` does it, and for the transfer network a
random tenth of the samples. Of each, the last node is measured in every way that `fiun_fast.evaluation` has for a
single model, and heads trained on its features are attacked by U-LiRA.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.demo.data import load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.gone import EVERY, STEPS, class_gone, random_gone
from fiun_fast.demo.networks import SCENARIOS, grow
from fiun_fast.demo.run import REQUESTS

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "evaluation.json", ROOT / "docs" / "evaluation.md"
SEED = 0
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


def study() -> dict:
    """All networks, one after another."""
    torch.set_num_threads(1)  # these models are too small to share
    began, digits, found = time.perf_counter(), load_digits(SEED), []
    for scenario, requests in REQUESTS.items():
        recipe = SCENARIOS[scenario](digits, SEED)
        network = Network(recipe, digits, grow(recipe), "last-layer")
        case = network.forget(requests[0])
        found.append(class_gone(network, case, network.retrain(case, effort=1.0), EVERY))
        if scenario == "transfer":
            found.append(random_gone(network, 1.0, EVERY))
        print(f"{scenario}: {time.perf_counter() - began:.0f} s", flush=True)
    return {
        "settings": {"seed": SEED, "scope": "last-layer"},
        "environment": environment(),
        "seconds": time.perf_counter() - began,
        "rows": [asdict(one) for one in found],
    }


def tables(result: dict) -> str:
    """A row a measure: of the unlearned network with its interval, of the retrained one behind a stroke."""
    found = result["rows"]
    heads = ["measure", *(f"{one['scenario']}, {one['node']}: {one['request']}" for one in found)]
    lines = [[head, *(_cell(one["measured"].get(name)) for one in found)] for name, head in ROWS.items()]
    return markdown(heads, lines)


def _cell(pair: list | None) -> str:
    if pair is None:
        return ""
    own, again = pair
    text = f"{own['value']:.2f} [{own['low']:.2f}, {own['high']:.2f}]"
    return text if again is None else f"{text} / {again['value']:.2f}"


def main() -> None:
    """Run the study, or only write its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tables", action="store_true")
    if not parser.parse_args().tables:
        write_json(RESULTS, study())
    text = tables(json.loads(RESULTS.read_text(encoding="utf-8")))
    print(text)
    fill(PAGE, "tables", f"\n{text}\n")


if __name__ == "__main__":
    main()
