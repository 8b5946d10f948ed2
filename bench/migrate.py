"""What changing the import brings, and what undo and audit cost: a ResNet-18's dict, time and peak extra memory.

`python bench/migrate.py` measures (about a minute), writes bench/results/migrate.json and the tables of docs/migrate.md
and docs/audit.md. Every variant runs in turn in each round, from the same cold state; the median counts.
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
DOCS = Path(__file__).parents[1] / "docs"
ROUNDS = 15
SHARES = (0.01, 0.1, 0.5)  # selected, in the rows of undo and audit
UNDO = ("run_()", "run_(undo=True)", "report.undo_()", "run_(audit=True)")


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
        self.fishers = fishers
        self.plan = ff.plan(dag, [ff.ForgetRequest("model", fishers[1])])

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

    runs = (s.plan.run_, recorded, lambda: held[0].undo_(), lambda: s.plan.run_(audit=True))
    return [
        variant(name, run, ran if name == "report.undo_()" else s.restore) for name, run in zip(UNDO, runs, strict=True)
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
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages whose tables are written")
    parser.add_argument(
        "--untimed", action="store_true", help="memory only: the machine has other work; times stay empty"
    )
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
        extra = peaks(group, options.width)
        times = dict.fromkeys(extra) if options.untimed else measure(make(), machine)
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
    write_tables(record, options.docs)


def write_tables(record: dict, docs: Path) -> None:
    """Print the tables and put them between the markers of the two pages."""
    where = record["environment"]
    machine = f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}"
    note = f"A ResNet-18's 62 parameters, {record['elements'] / 1e6:.1f} million, float32; {machine}."
    moving = [r for r in record["rows"] if not r["group"].startswith("undo")]
    lines = ["| | | time | peak extra memory |", "| --- | --- | ---: | ---: |"]
    for row in moving:
        lines.append(f"| {row['group']} | {row['variant']} | {milliseconds(row)} | {megabytes(row['extra_bytes'])} |")
    _between(docs / "migrate.md", [note, "", *lines])
    lines = ["| selected | log | call | time | peak extra memory |", "| ---: | ---: | --- | ---: | ---: |"]
    for share in SHARES:
        rows = {r["variant"]: r for r in record["rows"] if r["group"] == f"undo and audit, {share:.0%} selected"}
        log = megabytes(rows["log"]["bytes"])
        for name in UNDO:
            cells = [f"`{name}`", milliseconds(rows[name]), megabytes(rows[name]["extra_bytes"])]
            lines.append("| " + " | ".join([f"{share:.0%}", log, *cells]) + " |")
    _between(docs / "audit.md", [note, "", *lines])


def milliseconds(row: dict) -> str:
    return "" if row["seconds"] is None else f"{row['seconds'] * 1e3:.3g} ms"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else "under 0.1 MB"


def _between(page: Path, lines: list[str]) -> None:
    text = page.read_text(encoding="utf-8")
    head, rest = text.split("<!-- measured -->")
    tail = rest.split("<!-- end -->")[1]
    block = "\n".join(["<!-- measured -->", "", *lines, "", "<!-- end -->"])
    page.write_text(head + block + tail, encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
