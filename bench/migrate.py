"""What changing the import brings, and what undo and audit cost: a ResNet-18's dict, time and peak extra memory.

`python bench/migrate.py` measures (about a minute), prints the tables of docs/migrate.md and docs/audit.md and writes
bench/results/migrate.json. Every variant runs in turn in each round, from the same cold state; the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fiun_fast as ff
from fiun_fast.bench import baselines, memory
from fiun_fast.bench.dampening import resnet18
from fiun_fast.bench.environment import environment
from fiun_fast.bench.measure import Machine, Variant
from fiun_fast.compat.ssd import ParameterPerturber

RESULTS = Path(__file__).parent / "results" / "migrate.json"
ROUNDS = 15
SHARES = (0.01, 0.1, 0.5)  # selected, in the rows of undo and audit


class Bag(nn.Module):
    """A ResNet-18's 62 parameters, without its forward."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_parameter(last, nn.Parameter(torch.randn(shape)))


class Setting:
    """The model, its importances, and how to put the weights back."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        self.model = Bag(resnet18(width))
        self.parameters = dict(self.model.named_parameters())
        self.kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.pdr = ParameterPerturber(self.model, parameters={"selection_weighting": 1, "dampening_constant": 1})
        self.original, self.forget = (self.pdr.zerolike_params_dict(self.model) for _ in range(2))
        for values in (self.original, self.forget):
            for value in values.values():
                value.uniform_(1e-3, 1)
        self.apart = [{name: v.clone() for name, v in d.items()} for d in (self.original, self.forget)]
        layout = ff.Layout.from_tensors(self.original)
        fishers = [ff.Fisher(torch.cat([v.reshape(-1) for v in d.values()]), layout) for d in self.apart]
        dag = ff.InheritanceDAG()
        dag.add_model("model", self.model, fishers[0])
        self.ratios = (fishers[1].buffer / fishers[0].buffer).sort().values
        self.plan = ff.plan(dag, [ff.ForgetRequest("model", fishers[1])])

    @torch.no_grad()
    def restore(self) -> None:
        """The weights as they were."""
        for name, p in self.parameters.items():
            p.copy_(self.kept[name])

    def alpha(self, share: float) -> float:
        """The alpha that selects this share."""
        return float(self.ratios[int((1 - share) * (len(self.ratios) - 1))])


def modify_variants(s: Setting) -> list[Variant]:
    lists = [list(d.values()) for d in s.apart]
    thetas, groups = [p.detach() for p in s.parameters.values()], [baselines.Group((0,), (0,))]

    def published() -> None:
        baselines.naive([thetas], [lists[0]], [lists[1]], groups, 1.0, 1.0)

    def variant(name: str, run: Callable[[], object]) -> Variant:
        return Variant(name, "", run, s.restore, None)

    return [
        variant("published class", published),
        variant("drop-in, dicts of calc_importance", lambda: s.pdr.modify_weight(s.original, s.forget)),
        variant("drop-in, dicts built by hand", lambda: s.pdr.modify_weight(*s.apart)),
    ]


def accumulate_variants(s: Setting) -> list[Variant]:
    for p in s.parameters.values():
        p.grad = torch.randn_like(p)
    gradients = [p.grad for p in s.parameters.values()]
    totals = [torch.zeros_like(p) for p in s.parameters.values()]
    accumulator = ff.FisherAccumulator(s.model)

    def variant(name: str, run: Callable[[], object]) -> Variant:
        return Variant(name, "", run, lambda: None, None)

    return [
        variant("published class", lambda: baselines.accumulate_naive(gradients, totals)),
        variant("drop-in", accumulator.update),
    ]


def undo_variants(s: Setting, share: float) -> list[Variant]:
    s.plan.set_values_(alpha=s.alpha(share))
    held: list[ff.Report] = []

    def recorded() -> None:
        held[:] = [s.plan.run_(undo=True)]

    def ran() -> None:
        s.restore()
        recorded()

    def variant(name: str, run: Callable[[], object], restore: Callable[[], object] = s.restore) -> Variant:
        return Variant(name, "", run, restore, None)

    return [
        variant("run_()", s.plan.run_),
        variant("run_(undo=True)", recorded),
        variant("report.undo_()", lambda: held[0].undo_(), ran),
        variant("run_(audit=True)", lambda: s.plan.run_(audit=True)),
    ]


def groups_of(width: int) -> dict[str, Callable[[], list[Variant]]]:
    """Group of rows -> its variants, made anew."""
    made = {
        "modify_weight": lambda: modify_variants(Setting(width)),
        "one batch of calc_importance, after backward": lambda: accumulate_variants(Setting(width)),
    }
    for share in SHARES:
        made[f"undo and audit, {share:.0%} selected"] = lambda share=share: undo_variants(Setting(width), share)
    return made


def measure(variants: list[Variant], machine: Machine) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {v.name: [] for v in variants}
    for r in range(ROUNDS + 2):
        for v in variants[r % len(variants) :] + variants[: r % len(variants)]:
            v.restore()
            machine.cool()
            seconds = machine.seconds(v.run)
            if r >= 2:
                times[v.name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def peaks(group: str, width: int) -> dict[str, int]:
    """Peak extra bytes of each variant of a group, in a process of its own."""
    words = [sys.executable, __file__, "--peaks", group, "--width", str(width)]
    surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, env=surroundings, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18; smaller to try things out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peaks", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device("cpu")
    if options.peaks:
        variants = groups_of(options.width)[options.peaks]()
        print(json.dumps({v.name: memory.extra(v, device) for v in variants}))
        return
    machine = Machine(device)
    record: dict = {"environment": environment(device), "elements": 0, "rows": []}
    for group, make in groups_of(options.width).items():
        times = measure(make(), machine)
        extra = peaks(group, options.width)
        for name, seconds in times.items():
            record["rows"].append({"group": group, "variant": name, "seconds": seconds, "extra_bytes": extra[name]})
    setting = Setting(options.width)
    record["elements"] = sum(p.numel() for p in setting.parameters.values())
    for share in SHARES:
        setting.plan.set_values_(alpha=setting.alpha(share))
        log = setting.plan.run_(undo=True).undo
        setting.restore()
        record["rows"].append({"group": f"undo and audit, {share:.0%} selected", "variant": "log", "bytes": log.nbytes})
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in record["rows"]:
        if "seconds" in row:
            shown = f"{row['seconds'] * 1e3:.3g} ms | {row['extra_bytes'] / 1e6:.3g} MB"
        else:
            shown = f"{row['bytes'] / 1e6:.3g} MB"
        print(f"| {row['group']} | {row['variant']} | {shown} |")


if __name__ == "__main__":
    main()
