"""What changing the import gains, and what undo and audit cost, on a ResNet-18: time and peak extra memory.

`python bench/migrate.py` measures (about a minute), writes bench/results/migrate.json and the tables of docs/migrate.md
and docs/audit.md. Every variant runs in turn in each round, from the same cold state; the median counts. What a call
costs beside its work is measured on a LeNet-5, with the caches as a loop over requests leaves them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

import fiun_fast as ff
from fiun_fast.bench import baselines
from fiun_fast.bench.dampening import ResNet18
from fiun_fast.bench.files import describe, environment, fill, markdown, write_json
from fiun_fast.bench.measure import Case, Effort, Kept, Machine, Variant, alone, check, extra_bytes, nothing, race
from fiun_fast.compat.ssd import ParameterPerturber

RESULTS = Path(__file__).parent / "results" / "migrate.json"
DOCS = Path(__file__).parents[1] / "docs"
ROUNDS, SMALL_ROUNDS = 15, 201
SHARES = (0.01, 0.1, 0.5)  # selected, in the rows of undo and audit
CPU = torch.device("cpu")


class Setting:
    """The model, its importances, and the ways to work on them."""

    def __init__(self, model: nn.Module) -> None:
        torch.manual_seed(0)
        self.model = model
        self.kept = Kept([[p.detach() for p in self.model.parameters()]])
        self.pdr = ParameterPerturber(self.model, parameters={"selection_weighting": 1, "dampening_constant": 1})
        self.importances = [self.pdr.zerolike_params_dict(self.model) for _ in range(2)]  # original, forget
        for value in (*self.importances[0].values(), *self.importances[1].values()):
            value.uniform_(1e-3, 1)
        self.apart = [{name: v.clone() for name, v in d.items()} for d in self.importances]
        self.fishers = [ff.Fisher.from_dict(d) for d in self.apart]
        dag = ff.InheritanceDAG()
        dag.add_model("model", self.model, fisher=self.fishers[0])
        self.plan = ff.plan(dag, [ff.ForgetRequest("model", self.fishers[1])])

    def modify(self) -> Iterator[Variant]:
        """`modify_weight`."""
        original, forget = (list(d.values()) for d in self.apart)
        network = (self.kept.tensors, [original], [forget], [baselines.Group((0,), (0,))])
        published = partial(baselines.unlearn, baselines.WAYS["naive"][1], network, 1.0, 1.0)
        yield Variant("published class", "", published, self.kept.restore)
        for name, of in ("of calc_importance", self.importances), ("built by hand", self.apart):
            run = partial(self.pdr.modify_weight, *of)
            yield Variant(f"drop-in, dicts {name}", "", run, self.kept.restore)

    def small(self) -> Iterator[Variant]:
        """`modify_weight` and its like, with importances that are new each time, as for each request of a script."""
        self.select(0.1)
        alpha = float(self.plan.parts[0].dampening.alpha[0])
        self.pdr.selection_weighting = alpha
        new: list[list] = [[], []]

        def dicts() -> None:
            self.kept.restore()
            new[:] = [self.pdr.zerolike_params_dict(self.model) for _ in range(2)]
            for one, values in zip(new, self.apart, strict=True):
                for name, value in values.items():
                    one[name].copy_(value)

        def fishers() -> None:
            dicts()
            new[:] = [ff.Fisher.from_dict(one) for one in new]

        def published() -> None:
            original, forget = (list(one.values()) for one in new)
            network = (self.kept.tensors, [original], [forget], [baselines.Group((0,), (0,))])
            baselines.unlearn(baselines.WAYS["naive"][1], network, alpha, 1.0)

        part, counts = self.plan.parts[0], torch.zeros(1, 3, dtype=torch.int64)
        yield Variant("published class", "", published, dicts)
        yield Variant("drop-in", "", lambda: self.pdr.modify_weight(*new), dicts)
        yield Variant("`ff.dampen_`", "", lambda: ff.dampen_(self.model, *new, alpha=alpha), fishers)
        yield Variant("`run_()` of a plan", "", self.plan.run_, self.kept.restore)
        yield Variant("its kernel alone", "", lambda: part.launch.run(counts, False), self.kept.restore)

    def accumulate(self) -> Iterator[Variant]:
        """What `calc_importance` does after the backward of a batch."""
        gradients = [torch.randn_like(p) for p in self.model.parameters()]
        for p, gradient in zip(self.model.parameters(), gradients, strict=True):
            p.grad = gradient
        totals = [torch.zeros_like(gradient) for gradient in gradients]
        yield Variant("published class", "", partial(baselines.accumulate_naive, gradients, totals), nothing)
        yield Variant("drop-in", "", ff.FisherAccumulator(self.model).update, nothing)

    def select(self, share: float) -> None:
        """Let the plan select this share."""
        ratios = self.fishers[1].buffer / self.fishers[0].buffer
        self.plan.set_values_(alpha=float(ratios.kthvalue(1 + int((1 - share) * (len(ratios) - 1))).values))

    def undo(self, share: float) -> Iterator[Variant]:
        """Runs with and without a log, and with an audit."""
        self.select(share)
        held: list[ff.Report] = []

        def recorded() -> None:
            held[:] = [self.plan.run_(undo=True)]

        def ran() -> None:
            self.kept.restore()
            recorded()

        yield Variant("run_()", "", self.plan.run_, self.kept.restore)
        yield Variant("run_(undo=True)", "", recorded, self.kept.restore)
        yield Variant("report.undo_()", "", lambda: held[0].undo_(), ran)
        yield Variant("run_(audit=True)", "", partial(self.plan.run_, audit=True), self.kept.restore)


GROUPS: dict[str, Callable[[Setting], Iterator[Variant]]] = {  # group of rows -> its variants
    "modify_weight": Setting.modify,
    "one batch of calc_importance, after backward": Setting.accumulate,
    **{f"undo and audit, {share:.0%} selected": partial(Setting.undo, share=share) for share in SHARES},
}


def lenet() -> nn.Module:
    """LeNet-5: 61,706 elements in 10 parameters."""
    body = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10))


def weights_of(group: str, width: int) -> dict[str, int]:
    """Peak extra memory of each variant of a group, in bytes."""
    return {v.name: extra_bytes(v, CPU) for v in GROUPS[group](Setting(ResNet18(width)))}


def overhead() -> Iterator[dict]:
    """A row a variant, on a model so small that what a call costs beside its work shows."""
    case = Case(None, 0, list(Setting(lenet()).small()))
    check(case)
    times = race(case, Machine(CPU, small=True), Effort(SMALL_ROUNDS, SMALL_ROUNDS, 0.0))
    for v in case.variants:
        yield {"variant": v.name, "seconds": statistics.median(times[v.name])}


def measure(width: int) -> Iterator[dict]:
    """A row a variant, and one for the size of each log."""
    machine = Machine(CPU)
    for group, variants in GROUPS.items():
        extra, case = alone(weights_of, group, width), Case(None, 0, list(variants(Setting(ResNet18(width)))))
        check(case)
        times = race(case, machine, Effort(ROUNDS, ROUNDS, 0.0))
        for v in case.variants:
            seconds = statistics.median(times[v.name])
            yield {"group": group, "variant": v.name, "seconds": seconds, "extra_bytes": extra[v.name]}
    setting = Setting(ResNet18(width))
    for share in SHARES:
        setting.select(share)
        log = setting.plan.run_(undo=True).undo
        setting.kept.restore()
        yield {"group": f"undo and audit, {share:.0%} selected", "variant": "log", "bytes": log.nbytes}


def tables(record: dict) -> dict[str, str]:
    """Page -> what stands between its marks."""
    machine, millions = describe(record["environment"]), record["elements"] / 1e6
    logs = {row["group"]: megabytes(row["bytes"]) for row in record["rows"] if row["variant"] == "log"}
    moving, undoing = [], []
    for row in record["rows"]:
        if row["variant"] == "log":
            continue
        cells = (f"{row['seconds'] * 1e3:.3g} ms", megabytes(row["extra_bytes"]))
        if row["group"] in logs:
            share = row["group"].split()[3]
            undoing.append((share, logs[row["group"]], f"`{row['variant']}`", *cells))
        else:
            moving.append((row["group"], row["variant"], *cells))
    found = {
        "migrate.md": markdown(["", "", "time", "peak extra memory"], moving, left=2),
        "audit.md": markdown(["selected", "log", "call", "time", "peak extra memory"], undoing, left=3),
    }
    note = f"A ResNet-18's 62 parameters, {millions:.1f} million, float32; {machine}."
    small = [(row["variant"], f"{row['seconds'] * 1e3:.3f} ms") for row in record["small"]["rows"]]
    network = (
        "A LeNet-5, 61,706 elements in 10 parameters, new importances or Fishers at each call; "
        f"{describe(record['small']['environment'])}:"
    )
    found["migrate.md"] += f"\n\n{network}\n\n{markdown(['', 'time'], small)}"
    return {page: f"\n{note}\n\n{table}\n" for page, table in found.items()}


def megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else "under 0.1 MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18; with another nothing is written")
    parser.add_argument("--small", action="store_true", help="the LeNet-5 alone; of the rest, what was measured last")
    options = parser.parse_args()
    if options.small:
        record = json.loads(RESULTS.read_text(encoding="utf-8"))
    else:
        elements = sum(p.numel() for p in ResNet18(options.width).parameters())
        record = {"environment": environment(CPU), "elements": elements, "rows": list(measure(options.width))}
    record["small"] = {"environment": environment(CPU), "rows": list(overhead())}
    keep = options.small or options.width == parser.get_default("width")
    for page, text in tables(record).items():
        print(text)
        if keep:
            fill(DOCS / page, "measured", text)
    if keep:
        write_json(RESULTS, record)


if __name__ == "__main__":
    main()
