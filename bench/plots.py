"""Pictures for the README from committed results: bars, roofline, scaling. SVG, readable alone.

Nothing is measured here. For each device one full results file of bench/results/ is drawn; where several machines have
one, name the file to be used.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from fiun_fast.bench.results import Record, Row, short, size

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "img"
TABLES = {ROOT / "README.md": True, ROOT / "docs" / "performance.md": False}  # file -> only the cases of README
IN_README = ("a", "b-clustered", "c", "d", "f-fp32", "g", "h-8", "j-demo")
BARS = (
    "a-all",
    "a",
    "b-clustered",
    "b-scattered",
    "c",
    "d",
    "e",
    "f-fp32",
    "f-bf16",
    "g",
    "g-zero",
    "h-2",
    "h-8",
    "h-32",
)
# Okabe and Ito's colours; each kind also has a marker of its own.
LOOK = {"naive": ("#D55E00", "s"), "torch": ("#56B4E9", "D"), "ours": ("#0072B2", "o")}
NAMES = {"naive": "existing code", "torch": "best in plain torch", "ours": "fiun_fast"}
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


def best(record: Record, case: str, kind: str) -> Row | None:
    """The fastest row of a kind."""
    return min((r for r in record.rows if r.case == case and r.kind == kind), key=lambda r: r.ms, default=None)


def machine(record: Record) -> str:
    """What it was measured on, for the foot of a picture."""
    e = record.environment
    return f"{e.get('gpu') or e['cpu']}, {e['threads']} threads, torch {e['torch']}, fiun_fast {e['fiun_fast']}"


def speed(record: Record) -> Figure:
    """How many times faster than existing code, case by case; log scale."""
    cases = [c for c in BARS if best(record, c, "ours") and best(record, c, "naive")]
    figure, axes = plt.subplots(figsize=(8.4, 0.42 * len(cases) + 1.7), layout="constrained")
    for y, case in enumerate(reversed(cases)):
        ours, torch = best(record, case, "ours"), best(record, case, "torch")
        assert ours is not None
        assert ours.vs_naive is not None
        axes.barh(y, ours.vs_naive - 0.5, left=0.5, height=0.62, color=LOOK["ours"][0])
        label = f" {ours.vs_naive:.3g}×" + (f"  {ours.share:.0%} of copy" if ours.share else "")
        axes.text(ours.vs_naive, y, label, va="center", fontsize=9)
        if torch is not None and torch.vs_naive is not None:
            axes.plot(torch.vs_naive, y, LOOK["torch"][1], color=LOOK["torch"][0], mec="white", ms=8, zorder=3)
    axes.set_yticks(range(len(cases)), [f"{_title(record, c)}  ({c})" for c in reversed(cases)])
    axes.set_xscale("log")
    axes.set_xlim(0.5, axes.get_xlim()[1] * 3)
    axes.axvline(1, color=LOOK["naive"][0], lw=1.5, zorder=0)
    axes.text(1, len(cases) - 0.4, "existing code", color=LOOK["naive"][0], ha="center", fontsize=9)
    axes.set_xticks([1, 10, 100], ["1×", "10×", "100×"])
    axes.plot([], [], LOOK["torch"][1], color=LOOK["torch"][0], ms=8, label=NAMES["torch"])
    axes.bar([0], [0], color=LOOK["ours"][0], label=NAMES["ours"])
    axes.legend(loc="lower right")
    axes.set_title("Times faster than existing unlearning code", pad=16)
    axes.set_xlabel(machine(record), fontsize=8, color="#555555")
    return figure


def roofline(record: Record) -> Figure:
    """Useful bytes a second against bytes of work; the roof is the copy bandwidth, the slope a fixed cost a run."""
    figure, axes = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
    roof = _copy(record)
    cases = [c for c in dict.fromkeys(r.case for r in record.rows) if (o := best(record, c, "ours")) and o.floor_bytes]
    for kind, (color, marker) in LOOK.items():
        rows = sorted((r for c in cases if (r := best(record, c, kind)) and r.gbps), key=lambda r: r.floor_bytes or 0)
        axes.plot(
            [r.floor_bytes for r in rows],
            [r.gbps for r in rows],
            marker,
            color=color,
            ms=7,
            mec="white",
            label=NAMES[kind],
        )
        if kind == "ours":
            for row in rows:
                if row.case in IN_README:
                    place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 9}
                    axes.annotate(row.case, (row.floor_bytes, row.gbps), **place)
    axes.axhline(roof, color="black", lw=1.2)
    axes.text(axes.get_xlim()[0], roof * 1.12, f"copy bandwidth, {roof:.0f} GB/s", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="bytes the work moves at least", ylabel="of these, GB/s")
    axes.set_ylim(top=roof * 3)
    axes.xaxis.set_major_formatter(lambda v, _: size(round(v)))
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.legend(loc="lower right")
    axes.set_title("How far from the memory's roof")
    axes.text(0, -0.2, machine(record), transform=axes.transAxes, fontsize=8, color="#555555")
    return figure


def scaling(record: Record) -> Figure:
    """Time against nodes, and against parameters."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.9), sharey=True, layout="constrained")
    families = {"nodes-": "heads of 5,130 parameters in one DAG", "parameters-": "parameters of one model"}
    roof = _copy(record) * 1e6  # bytes a millisecond
    for axes, (prefix, label) in zip(panels, families.items(), strict=True):
        names = [c for c in dict.fromkeys(r.case for r in record.rows) if c.startswith(prefix)]
        at = [int(name.removeprefix(prefix)) for name in names]
        if prefix == "parameters-" and best(record, "f-fp32", "ours"):
            names.append("f-fp32")
            at.append(best(record, "f-fp32", "ours").elements)  # type: ignore[union-attr]
        for kind in ("naive", "ours"):
            color, marker = LOOK[kind]
            rows = [best(record, name, kind) for name in names]
            axes.plot(at, [r.ms for r in rows if r], marker=marker, color=color, mec="white", ms=7, label=NAMES[kind])
        floors = [r.floor_bytes / roof for n in names if (r := best(record, n, "ours")) and r.floor_bytes]
        axes.plot(at, floors, ":", color="black", lw=1.2, label="least bytes at copy bandwidth")
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.set_ylim(bottom=3e-3)
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    panels[0].set_ylabel("ms")
    panels[0].legend(loc="upper left", fontsize=9)
    figure.suptitle("Time to dampen", x=0.01, ha="left", fontweight="bold", fontsize=12)
    figure.supxlabel(machine(record), fontsize=8, color="#555555")
    return figure


def table(records: Iterable[Record], few: bool) -> str:
    """Markdown: a line a case."""
    lines = []
    for record in records:
        cases = [c for c in dict.fromkeys(r.case for r in record.rows) if best(record, c, "ours")]
        lines += [
            f"{machine(record)}:",
            "",
            "| | case | existing code | best plain torch | fiun_fast | faster than existing | than best torch | "
            "of copy bandwidth |",
            "| --- | --- | --: | --: | --: | --: | --: | --: |",
        ]
        for case in cases:
            if few and case not in IN_README:
                continue
            naive, torch, ours = (best(record, case, kind) for kind in LOOK)
            assert ours is not None
            cells = [case, ours.title, *(f"{short(r.ms)} ms" if r else "" for r in (naive, torch, ours))]
            ratio = [f"{v:.3g}×" if v else "" for v in (ours.vs_naive, ours.vs_torch)]
            lines.append(f"| {' | '.join([*cells, *ratio, f'{ours.share:.2f}' if ours.share else ''])} |")
        lines.append("")
    return "\n".join(lines)


def rewrite(path: Path, text: str) -> bool:
    """Replace what stands between `<!-- bench -->` and `<!-- /bench -->`; False where the file has no such place."""
    if not path.exists():
        return False
    marked = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.S)
    old = path.read_text()
    path.write_text(marked.sub(lambda m: f"{m[1]}{text}{m[2]}", old))
    return bool(marked.search(old))


def chosen(paths: list[Path]) -> dict[str, Record]:
    """Device -> its record."""
    found: dict[str, Record] = {}
    for path in paths or sorted(RESULTS.glob("*.json")):
        if (not paths and path.stem.endswith(("-quick", "-tiny"))) or path.name.startswith("demo"):
            continue
        record = Record.load(path)
        device = record.environment["device"]
        if device in found:
            raise SystemExit(f"several results files for {device}: name the one to draw")
        found[device] = record
    if not found:
        raise SystemExit("no results in bench/results/: run `make bench` first")
    return found


def _copy(record: Record) -> float:
    """Median over the cases."""
    values = sorted({r.case: r.copy_gbps for r in record.rows}.values())
    return values[len(values) // 2]


def _title(record: Record, case: str) -> str:
    """The case's line, with what "the same" stands for."""
    row = best(record, case, "ours")
    text = row.title if row else case
    if not text.startswith("the same"):
        return text
    family = best(record, case.split("-")[0], "ours")
    return text.replace("the same", family.title.split(",")[0], 1) if family else text


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
    for path, few in TABLES.items():
        if rewrite(path, table(records.values(), few)):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
