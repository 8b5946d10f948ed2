"""What `ff.unlearn_` costs beside the training of what it is called on: a chain of three small CNNs, images of 28x28.

    python bench/unlearn.py             bench/results/unlearn.json and its sentence in docs/unlearn.md
    python bench/unlearn.py --sentence  only the sentence, from the committed results

scikit-learn's handwritten digits, enlarged from 8x8. u0 learns them, u1 goes on with a copy of them that is turned,
shifted and scaled a little, u2 with another. Every class in turn is forgotten from u0 on, by one call with its
defaults: Fishers of three models by two estimators, tuning on validation data, one run. Times are CPU seconds on one
thread, which neighbours on a machine disturb least; accuracies are on test data, which nothing was chosen by.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import fiun_fast as ff
from fiun_fast.bench.files import environment, fill, write_json
from fiun_fast.demo.data import CLASSES, Samples, jitter, load_digits

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "unlearn.json", ROOT / "docs" / "unlearn.md"
EPOCHS = {"u0": 20, "u1": 8, "u2": 8}
SIZE, SEED = 64, 0


def seen(number: int, samples: Samples) -> Samples:
    """The samples as the node of that number has them: [n, 1, 28, 28]; those of the first are as they are."""
    images = samples.images
    if number:
        images = jitter(images, torch.Generator().manual_seed(number))
    return Samples(functional.interpolate(images, (28, 28), mode="bilinear", align_corners=False), samples.labels)


def loader(samples: Samples, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of it."""
    return DataLoader(TensorDataset(*samples), batch_size=SIZE, shuffle=shuffle)


def network() -> nn.Sequential:
    """Two blocks of convolutions, one hidden layer, a head: 105,914 parameters."""

    def block(n_in: int, n_out: int) -> list[nn.Module]:
        return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, CLASSES)
    )


def train(model: nn.Module, batches: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """AdamW, labels smoothed by 0.1; leaves the model in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracies(model: nn.Module, samples: Samples, label: int) -> tuple[float, float]:
    """On a class, and on the others."""
    right, gone = (model(samples.images).argmax(1) == samples.labels).double(), samples.labels == label
    return right[gone].mean().item(), right[~gone].mean().item()


def measure() -> dict[str, Any]:
    """Train once, forget every class in turn, put the models back each time."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    digits = load_digits(SEED)
    data = {name: [seen(k, part) for part in digits] for k, name in enumerate(EPOCHS)}  # train, validation, test
    models: dict[str, nn.Module] = {}
    began = time.process_time()
    for name, epochs in EPOCHS.items():
        models[name] = copy.deepcopy(list(models.values())[-1]) if models else network()
        train(models[name], loader(data[name][0], shuffle=True), epochs)
    training = time.process_time() - began
    rows = []
    for label in range(CLASSES):
        dag, names = ff.InheritanceDAG(), list(models)
        for k, name in enumerate(names):
            dag.add_model(name, models[name], data=loader(data[name][0]), parents=names[k - 1 : k] if k else [])
        before = {name: accuracies(models[name], data[name][2], label) for name in names}
        validation = {name: loader(data[name][1]) for name in names}
        forget = loader(data["u0"][0].only([label]))
        began = time.process_time()
        score = ff.ClassScore(validation, forget=label)
        outcome = ff.unlearn_(dag, [ff.ForgetRequest("u0", data=forget)], score)
        seconds = time.process_time() - began
        after = {name: accuracies(models[name], data[name][2], label) for name in names}
        rows.append(
            {
                "class": label,
                "seconds": seconds,
                "parts": {part: one / sum(outcome.seconds.values()) for part, one in outcome.seconds.items()},
                "share": seconds / training,
                "unmet": outcome.unmet,
                "estimators": {node.name: node.estimator for node in outcome},
                "left": {name: after[name][0] for name in names},
                "lost": {name: before[name][1] - after[name][1] for name in names},
            }
        )
        outcome.undo_()
    numel = sum(p.numel() for p in models["u0"].parameters())
    how = {"epochs": EPOCHS, "images": len(digits.train.labels), "parameters": numel}
    return {"settings": how, "environment": environment("cpu"), "training_seconds": training, "rows": rows}


def sentence(result: dict[str, Any]) -> str:
    """What the page says of it."""
    rows, how = result["rows"], result["settings"]
    parts = {part: mean(row["parts"][part] for row in rows) for part in rows[0]["parts"]}
    left = [share for row in rows for share in row["left"].values()]
    lost = [share for row in rows for share in row["lost"].values()]
    within = sum(a <= 0.01 and b <= 0.02 for a, b in zip(left, lost, strict=True))
    shares, seconds = [row["share"] for row in rows], mean(row["seconds"] for row in rows)
    epochs = " + ".join(map(str, how["epochs"].values()))
    return (
        f"A chain of three CNNs ({how['parameters']:,} parameters, {how['images']:,} images of 28×28, {epochs} epochs) "
        f"trains for {result['training_seconds']:.1f} CPU seconds, on one thread. One call takes {seconds:.2f} s on "
        f"average over the ten classes, {mean(shares):.1%} of that, at most {max(shares):.1%}; {parts['Fishers']:.0%} "
        f"of it for Fishers, {parts['choosing']:.0%} for choosing, {parts['run']:.1%} for the run. On test data "
        f"{mean(left):.1%} of the class is left and {100 * mean(lost):.2f} points are lost on average; {within} of the "
        f"{len(left)} pairs of a class and a model are within 1 % left and 2 points lost."
    )


def main() -> None:
    """Measure and write, or write the sentence alone."""
    parser = argparse.ArgumentParser(description="what unlearn_ costs beside training")
    parser.add_argument("--sentence", action="store_true", help="from the committed results")
    if not parser.parse_args().sentence:
        write_json(RESULTS, measure())
    fill(PAGE, "unlearn", sentence(json.loads(RESULTS.read_text())) + "\n")


if __name__ == "__main__":
    main()
