"""Pictures for the README from committed results: bars, roofline, scaling. SVG, readable alone.

Nothing is measured here. For each device one full results file of bench/results/ is drawn; where several machines have
one, name the file to be used.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median_high
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fiun_fast.bench.files import describe, fill, markdown
from fiun_fast.bench.results import Record, short, size

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "img"
LOOPS = RESULTS / "cpu-kernel.json"
TABLES = {ROOT / "README.md": True, ROOT / "docs" / "performance.md": False}  # file -> only the cases of README
IN_README = ("a", "b-clustered", "c", "d", "f-fp32", "g", "h-8", "j-demo")
BARS = ("a", "b-none", "b-clustered", "b-scattered", "c", "d", "e", "e-stack", "f-fp32", "f-bf16")
BARS += ("g", "g-zero", "h-2", "h-8", "h-32")
AIMS: dict[str, tuple[float | None, float | None]] = {  # case -> how many times faster than existing code, than torch
    "a": (60, 1.2),
    "b-none": (None, 2.0),
    "b-clustered": (80, 1.4),
    "c": (40, 1.7),
    "d": (18, 1.25),
    "e": (None, 1.0),
    "e-stack": (None, 1.2),
    "f-bf16": (None, 1.2),
    "g": (2.5, 1.0),
    "k-sample": (None, 1.4),
}
ROOF = {  # case -> its name in the roofline, and where that stands
    "b-clustered": ("1 % selected", (-92, 24)),
    "g": ("accumulate g²", (-96, 6)),
    "c": ("DAG of ResNets", (-70, 40)),
    "d": ("DAG of heads", (-60, 52)),
    "h-8": ("merge 8", (-48, -42)),
}
# Okabe and Ito's colours; each kind also has a marker of its own.
LOOK = {"naive": ("#D55E00", "s"), "torch": ("#56B4E9", "D"), "ours": ("#0072B2", "o")}
NAMES = {"naive": "existing code", "torch": "best in plain torch", "ours": "fiun_fast"}
REACH = ["", "case", "aim: existing code", "found", "aim: best torch", "found", "the best torch", "takes by itself"]
HEADS = ["", "case", *NAMES.values(), "faster than existing", "than best torch", "of copy bandwidth"]
FOOT = {"fontsize": 8, "color": "#555555"}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "legend.frameon": False,
    "svg.hashsalt": "fiun_fast",
    "figure.facecolor": "white",
}


def machine(record: Record) -> str:
    """What it was measured on, for the foot of a picture."""
    return f"{describe(record.environment)}, fiun_fast {record.environment['fiun_fast']}"


def speed(record: Record) -> Figure:
    """How many times faster than existing code, case by case; log scale."""
    ours = [row for c in reversed(BARS) if (row := record.best(c, "ours")) and row.vs_naive]
    figure, axes = plt.subplots(figsize=(8.4, 0.36 * len(ours) + 1.6), layout="constrained")
    figures = []
    for y, row in enumerate(ours):
        torch, share = record.best(row.case, "torch"), f"   {row.share:4.0%} of copy" if row.share else ""
        axes.barh(y, row.vs_naive - 1, left=1, height=0.62, color=LOOK["ours"][0])
        if torch and torch.vs_naive:
            axes.plot(torch.vs_naive, y, LOOK["torch"][1], color=LOOK["torch"][0], mec="black", mew=0.6, ms=8, zorder=3)
        figures.append(f"{short(row.vs_naive):>4}×{share}")
    axes.set_yticks(range(len(ours)), [row.title for row in ours])
    right = axes.twinx()
    right.set(ylim=axes.get_ylim())
    right.set_yticks(range(len(ours)), figures, family="DejaVu Sans Mono", fontsize=9)
    for side in (axes, right):
        side.tick_params(axis="y", length=0)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["existing\ncode", "2×", "5×", "10×", "20×", "50×", "100×"])
    axes.set_xlim(1, max(axes.get_xlim()[1], 20))
    axes.set_xticks([], minor=True)
    axes.plot([], [], LOOK["torch"][1], color=LOOK["torch"][0], mec="black", mew=0.6, ms=8, label=NAMES["torch"])
    axes.bar([1], [0], color=LOOK["ours"][0], label=NAMES["ours"])
    figure.legend(loc="outside upper right", ncols=2)
    figure.suptitle("Times faster than existing unlearning code", x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.supxlabel(f"{machine(record)}. of copy: bytes that must move, a second, over a plain copy's.", **FOOT)
    return figure


def roofline(record: Record) -> Figure:
    """Useful bytes a second against bytes of work: a slope where a fixed cost rules, a roof where memory does."""
    figure, axes = plt.subplots(figsize=(8.4, 4.6), layout="constrained")
    series = [c for c in record.cases if c.startswith("parameters-")] + ["f-fp32"]

    def points(kind: str, cases: Iterable[str]) -> tuple[list, list]:
        rows = [r for c in cases if (r := record.best(c, kind)) and r.floor_bytes]
        return [r.floor_bytes for r in rows], [r.gbps for r in rows]

    for kind, (color, marker) in LOOK.items():
        axes.plot(*points(kind, series), "-", color=color, lw=1.5)
        axes.plot(*points(kind, [*series, *ROOF]), marker, color=color, mec="white", ms=8, label=NAMES[kind])
    for case, (label, place) in ROOF.items():
        for at in zip(*points("ours", [case]), strict=True):
            arrow = {"arrowstyle": "-", "color": "#777777", "lw": 0.7}
            axes.annotate(label, at, place, textcoords="offset points", fontsize=9, arrowprops=arrow)
    roof = _copy(record)
    axes.axhline(roof, color="black", lw=1.2)
    axes.text(0.01, roof * 1.1, f"a plain copy: {roof:.0f} GB/s", transform=axes.get_yaxis_transform(), fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="bytes that the work moves at least", ylabel="of these, GB/s")
    axes.set_ylim(top=roof * 5)
    axes.xaxis.set_major_formatter(lambda v, _: size(round(v)))
    axes.yaxis.set_major_formatter(PLAIN)
    axes.legend(loc="lower right")
    axes.set_title("Distance from the memory's roof (lines: one model of growing size)")
    figure.supxlabel(machine(record), **FOOT)
    return figure


def scaling(record: Record) -> Figure:
    """Time against nodes, and against parameters."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.9), sharey=True, layout="constrained")
    families = {"nodes-": "heads of 5,130 parameters in one DAG", "parameters-": "parameters of one model"}
    roof = _copy(record) * 1e6  # bytes a millisecond
    for axes, (prefix, label) in zip(panels, families.items(), strict=True):
        at = {name: int(name.removeprefix(prefix)) for name in record.cases if name.startswith(prefix)}
        if prefix == "parameters-" and (row := record.best("f-fp32", "ours")):
            at[row.case] = row.elements
        for kind in ("naive", "ours"):
            color, marker = LOOK[kind]
            ms = [row.ms for name in at if (row := record.best(name, kind))]
            axes.plot([*at.values()], ms, marker=marker, color=color, mec="white", ms=7, label=NAMES[kind])
        floors = [row.floor_bytes / roof for name in at if (row := record.best(name, "ours")) and row.floor_bytes]
        axes.plot([*at.values()], floors, ":", color="black", lw=1.2, label="least bytes at copy bandwidth")
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_ylim(bottom=3e-3)
        axes.yaxis.set_major_formatter(PLAIN)
    panels[0].set_ylabel("ms")
    panels[0].legend(loc="upper left", fontsize=9)
    figure.suptitle("Time to dampen", x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.supxlabel(machine(record), **FOOT)
    return figure


def table(records: Iterable[Record], few: bool) -> str:
    """Markdown: a line a case."""
    text = ""
    for record in records:
        rows = []
        for case in record.cases:
            naive, torch, ours = (record.best(case, kind) for kind in LOOK)
            if ours is None or (few and case not in IN_README):
                continue
            cells = [case, ours.title, *(f"{short(r.ms)} ms" if r else "" for r in (naive, torch, ours))]
            cells += [f"{v:.3g}×" if v else "" for v in (ours.vs_naive, ours.vs_torch)]
            rows.append([*cells, f"{ours.share:.2f}" if ours.share else ""])
        text += f"{machine(record)}:\n\n{markdown(HEADS, rows, left=2)}"
    return text


def reach(records: Iterable[Record]) -> str:
    """Markdown: what was aimed at and found, against which rival, and what bounds it."""
    text = ""
    for record in records:
        rows = []
        for case, aims in AIMS.items():
            torch, ours = (record.best(case, kind) for kind in ("torch", "ours"))
            if ours is None:
                continue
            cells = [case, ours.title]
            for aim, found in zip(aims, (ours.vs_naive, ours.vs_torch), strict=True):
                cells += [f"{aim:g}×", _bold(found < aim, f"{found:.3g}×")] if aim and found else ["", ""]
            shares = sorted(((ms / ours.ms, name) for name, ms in (ours.bound or {}).items()), reverse=True)
            parts = ", ".join(f"{name} {share:.0%}" for share, name in shares)
            rows.append([*cells, torch.variant if torch else "", parts])
        text += f"{machine(record)}:\n\n{markdown(REACH, rows, left=2)}"
        if (one := record.ours("a-thread")) and (every := record.ours("a")):
            ours, copy = one.ms / every.ms, every.copy_gbps / one.copy_gbps
            text += f"\nCase a is {ours:.2f} times as fast on {record.environment['threads']} threads as on one, "
            text += f"a plain copy {copy:.2f} times.\n"
    return text


def loops(found: dict[str, Any]) -> str:
    """Markdown of what `bench/cpu_kernel.py` measured: ns a line, and that over a copy's in the same place."""
    rows = []
    for name, places in found["ns_per_line"].items():
        cells = [name]
        for taken in places.values():
            cells += [f"{ns:.1f} ({ns / taken['copy']:.1f}×)" for isa, ns in taken.items() if isa != "copy"]
        rows.append(cells)
    heads = ["loop"]
    for place, taken in next(iter(found["ns_per_line"].values())).items():
        heads += [f"{isa}, {place}" for isa in taken if isa != "copy"]
    text = f"{describe(found['environment'])}; a copy takes {_copies(found)}:\n\n{markdown(heads, rows, left=1)}\n"
    two = [[name, *(f"{ms:g} ms" for ms in taken.values())] for name, taken in found["milliseconds_by_threads"].items()]
    threads = [
        f"{count} thread{'s' * (count != '1')}" for count in next(iter(found["milliseconds_by_threads"].values()))
    ]
    return text + markdown(["least of 22 runs", *threads], two, left=1)


def _copies(found: dict[str, Any]) -> str:
    """What a line of a copy takes in each place, the median over the loops."""
    places = next(iter(found["ns_per_line"].values()))
    took = {p: median_high(loop[p]["copy"] for loop in found["ns_per_line"].values()) for p in places}
    return " and ".join(f"{ns:.1f} ns in {place}" for place, ns in took.items())


def _bold(yes: bool, text: str) -> str:
    return f"**{text}**" if yes else text


def fill_pages(records: dict[str, Record]) -> Iterator[Path]:
    """Write the tables into the pages that have a place for them; these."""
    for path, few in TABLES.items():
        filled = [fill(path, "bench", table(records.values(), few)), fill(path, "reach", reach(records.values()))]
        filled.append(fill(path, "loops", loops(json.loads(LOOPS.read_text()))))
        if any(filled):
            yield path


def chosen(paths: list[Path]) -> dict[str, Record]:
    """Device -> its record."""
    found: dict[str, Record] = {}
    for path in paths or sorted(RESULTS.glob("*.json")):
        if not paths and json.loads(path.read_text()).get("mode") != "full":
            continue  # other sizes, or another kind of results
        record = Record.load(path)
        device = record.environment["device"]
        if device in found:
            raise SystemExit(f"several results files for {device}: name the one to draw")
        found[device] = record
    if not found:
        raise SystemExit("no results in bench/results/: run `make bench` first")
    return found


def _copy(record: Record) -> float:
    """GB/s, the median over the cases."""
    return median_high({row.case: row.copy_gbps for row in record.rows}.values())


def main() -> None:
    """Draw and write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    records = chosen(parser.parse_args().files)
    IMAGES.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for device, record in records.items():
            for draw in (speed, roofline, scaling):
                path = IMAGES / f"{draw.__name__}-{device}.svg"
                draw(record).savefig(path, metadata={"Date": None})
                print(path.relative_to(ROOT))
    for path in fill_pages(records):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
