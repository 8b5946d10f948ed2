"""What changing the import gains, and what undo and audit cost, on a ResNet-18: time and peak extra memory.

`python bench/migrate.py` measures (about a minute), writes bench/results/migrate.json and the tables of docs/migrate.md
and docs/audit.md. Every variant runs in turn in each round, from the same cold state; the median counts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import fiun_fast as ff
from fiun_fast.bench import baselines
from fiun_fast.bench.dampening import ResNet18
from fiun_fast.bench.files import describe, environment, fill, markdown, write_json
from fiun_fast.bench.measure import Case, Effort, Machine, Variant, alone, check, extra_bytes, nothing, race
from fiun_fast.compat.ssd import ParameterPerturber

RESULTS = Path(__file__).parent / "results" / "migrate.json"
DOCS = Path(__file__).parents[1] / "docs"
ROUNDS = 15
SHARES = (0.01, 0.1, 0.5)  # selected, in the rows of undo and audit
UNDO = ("run_()", "run_(undo=True)", "report.undo_()", "run_(audit=True)")


class Setting:
    """The model, its importances, and how to put the weights back."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        self.model = ResNet18(width)
        self.parameters = dict(self.model.named_parameters())
        self.kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.pdr = ParameterPerturber(self.model, parameters={"selection_weighting": 1, "dampening_constant": 1})
        self.original, self.forget = (self.pdr.zerolike_params_dict(self.model) for _ in range(2))
        for value in (*self.original.values(), *self.forget.values()):
            value.uniform_(1e-3, 1)
        self.apart = [{name: v.clone() for name, v in d.items()} for d in (self.original, self.forget)]
        self.fishers = [ff.Fisher.from_dict(d) for d in self.apart]
        dag = ff.InheritanceDAG()
        dag.add_model("model", self.model, fisher=self.fishers[0])
        self.plan = ff.plan(dag, [ff.ForgetRequest("model", self.fishers[1])])

    @torch.no_grad()
    def restore(self) -> None:
        """The weights as they were."""
        for name, p in self.parameters.items():
            p.copy_(self.kept[name])

    def alpha(self, share: float) -> float:
        """The alpha that selects this share."""
        ratios = self.fishers[1].buffer / self.fishers[0].buffer
        return float(ratios.kthvalue(1 + int((1 - share) * (len(ratios) - 1))).values)


def modify_variants(s: Setting) -> list[Variant]:
    thetas, lists = [p.detach() for p in s.parameters.values()], [list(d.values()) for d in s.apart]
    network = ([thetas], [lists[0]], [lists[1]], [baselines.Group((0,), (0,))])
    _, published = baselines.WAYS["naive"]
    ways: dict[str, Callable[[], object]] = {
        "published class": lambda: baselines.unlearn(published, network, 1.0, 1.0),
        "drop-in, dicts of calc_importance": lambda: s.pdr.modify_weight(s.original, s.forget),
        "drop-in, dicts built by hand": lambda: s.pdr.modify_weight(*s.apart),
    }
    return [Variant(name, "", run, s.restore) for name, run in ways.items()]


def accumulate_variants(s: Setting) -> list[Variant]:
    for p in s.parameters.values():
        p.grad = torch.randn_like(p)
    gradients = [p.grad for p in s.parameters.values()]
    totals = [torch.zeros_like(p) for p in s.parameters.values()]
    ways = {
        "published class": lambda: baselines.accumulate_naive(gradients, totals),
        "drop-in": ff.FisherAccumulator(s.model).update,
    }
    return [Variant(name, "", run, nothing) for name, run in ways.items()]


def undo_variants(s: Setting, share: float) -> list[Variant]:
    s.plan.set_values_(alpha=s.alpha(share))
    held: list[ff.Report] = []

    def recorded() -> None:
        held[:] = [s.plan.run_(undo=True)]

    def ran() -> None:
        s.restore()
        recorded()

    runs = (s.plan.run_, recorded, lambda: held[0].undo_(), lambda: s.plan.run_(audit=True))
    restores = (s.restore, s.restore, ran, s.restore)
    return [Variant(name, "", run, back) for name, run, back in zip(UNDO, runs, restores, strict=True)]


def groups_of(width: int) -> dict[str, Callable[[], list[Variant]]]:
    """Group of rows -> its variants, made anew."""
    made = {
        "modify_weight": lambda: modify_variants(Setting(width)),
        "one batch of calc_importance, after backward": lambda: accumulate_variants(Setting(width)),
    }
    for share in SHARES:
        made[f"undo and audit, {share:.0%} selected"] = lambda share=share: undo_variants(Setting(width), share)
    return made


def weights_of(group: str, width: int) -> dict[str, int]:
    """Peak extra memory of each variant of a group, in bytes."""
    return {v.name: extra_bytes(v, torch.device("cpu")) for v in groups_of(width)[group]()}


def measure(variants: list[Variant], machine: Machine) -> dict[str, float]:
    """Median seconds of each, after a run to warm up."""
    case = Case(None, 0, variants)
    check(case)
    times = race(case, machine, Effort(ROUNDS, ROUNDS, 0.0))
    return {v.name: statistics.median(times[v.name]) for v in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18; with another nothing is written")
    width = parser.parse_args().width
    device = torch.device("cpu")
    machine, rows = Machine(device), []
    for group, make in groups_of(width).items():
        extra = alone(weights_of, group, width)
        for name, seconds in measure(make(), machine).items():
            rows.append({"group": group, "variant": name, "seconds": seconds, "extra_bytes": extra[name]})
    setting = Setting(width)
    elements = sum(p.numel() for p in setting.parameters.values())
    for share in SHARES:
        setting.plan.set_values_(alpha=setting.alpha(share))
        log = setting.plan.run_(undo=True).undo
        setting.restore()
        rows.append({"group": f"undo and audit, {share:.0%} selected", "variant": "log", "bytes": log.nbytes})
    record = {"environment": environment(device), "elements": elements, "rows": rows}
    for page, text in tables(record).items():
        print(text)
        if width == parser.get_default("width"):
            fill(DOCS / page, "measured", text)
    if width == parser.get_default("width"):
        write_json(RESULTS, record)


def tables(record: dict) -> dict[str, str]:
    """Page -> what stands between its marks."""
    machine, millions = describe(record["environment"]), record["elements"] / 1e6
    note = f"A ResNet-18's 62 parameters, {millions:.1f} million, float32; {machine}."
    moving = [
        (row["group"], row["variant"], milliseconds(row), megabytes(row["extra_bytes"]))
        for row in record["rows"]
        if not row["group"].startswith("undo")
    ]
    undoing = []
    for share in SHARES:
        rows = {r["variant"]: r for r in record["rows"] if r["group"] == f"undo and audit, {share:.0%} selected"}
        log = megabytes(rows["log"]["bytes"])
        for name in UNDO:
            cells = (f"`{name}`", milliseconds(rows[name]), megabytes(rows[name]["extra_bytes"]))
            undoing.append((f"{share:.0%}", log, *cells))
    found = {
        "migrate.md": markdown(["", "", "time", "peak extra memory"], moving, left=2),
        "audit.md": markdown(["selected", "log", "call", "time", "peak extra memory"], undoing, left=3),
    }
    return {page: f"\n{note}\n\n{table}\n" for page, table in found.items()}


def milliseconds(row: dict) -> str:
    return f"{row['seconds'] * 1e3:.3g} ms"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else "under 0.1 MB"


if __name__ == "__main__":
    main()
