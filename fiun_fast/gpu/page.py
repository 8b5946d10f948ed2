"""The page of a run, in Markdown, from what its JSON holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..bench.baselines import COMPILED
from ..bench.files import describe, markdown

DRY = (
    "**Dry run on the CPU. It shows that every step works. No number on this page says anything about a GPU.** "
    "In the place of `cuda` stand its kernels on the tests' shim (in a checkout with a compiler) or the C++ backend, "
    "in the place of `triton` its interpreter."
)
BEST = 4  # settings of a case that the page shows


def page(record: Mapping[str, Any]) -> str:
    """Steps, what failed, speed, the host's time and memory, settings; a table of a dry run says so in its title."""
    steps, label = {row["step"]: row for row in record["rows"]}, " (dry run, simulated)" if record["dry"] else ""
    parts = [f"# fiun-fast gpu{label}\n"]
    if record["dry"]:
        parts.append(f"{DRY}\n")
    found = record["environment"]
    more = ", ".join(
        f"{key} {found[key]}" for key in ("fiun_fast", "commit", "triton", "cuda", "driver") if found.get(key)
    )
    parts.append(f"{describe(found)}; {more}. Began {record['began']}, {record['minutes']:g} minutes at the most.\n")
    parts.append(f"## Steps{label}\n\n{_steps(record['rows'])}")
    failures = "".join(_failures(record["rows"]))
    if failures:
        parts.append(f"## What failed\n\n{failures}")
    figures = {name: _figures(row) for name, row in steps.items()}
    if rows := [row for each in figures.get("bench", {}).values() for row in each.get("rows", ())]:
        parts.append(f"## Speed{label}\n\n{_speed(rows)}")
    if costs := figures.get("costs"):
        parts.append(f"## Host's time and memory{label}\n\n{_costs(costs)}")
    if settings := list(figures.get("sweep", {}).values()):
        parts.append(f"## Settings of the Triton kernels{label}\n\n{_settings(settings)}")
    return "\n".join(parts)


def _figures(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Item -> what it measured."""
    return {item["item"]: item["figures"] for item in row.get("items", ()) if item.get("figures")}


def _steps(rows: list[dict[str, Any]]) -> str:
    def line(row: dict[str, Any]) -> list[object]:
        counts = Counter(item["status"] for item in row.get("items", ()))
        items = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
        whys = [row.get("why", ""), *(i.get("why", "") for i in row.get("items", ()) if i["status"] == "skipped")]
        why = "; ".join(dict.fromkeys(_one_line(why) for why in whys if why))
        return [f"{row['step']}: {row['title']}", row["status"], items, why, f"{row['seconds']:.0f}"]

    return markdown(["step", "", "items", "why", "s"], map(line, rows), left=4)


def _failures(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        for item in row.get("items", ()):
            if item["status"] == "failed":
                yield f"- **{row['step']}, {item['item']}**: {_one_line(item['why'])}\n"
        if row["status"] == "failed":
            yield f"\n{row['step']} ended with:\n\n```text\n{row.get('tail', '').strip()[-1500:]}\n```\n\n"


def _speed(rows: list[dict[str, Any]]) -> str:
    """A line a case: what each of ours reaches, as GB/s and as a share of a copy, and how plain torch compares."""

    def line(case: str) -> list[object]:
        its = [row for row in rows if row["case"] == case]
        ours = {row["variant"]: row for row in its if row["kind"] == "ours"}
        compiled = min((row["ms"] for row in its if row["variant"] in COMPILED), default=None)
        torch = min((row["ms"] for row in its if row["kind"] == "torch"), default=None)
        best = min((row["ms"] for row in ours.values()), default=None)
        cells = [_reached(row) for name, row in sorted(ours.items())]
        names = ", ".join(f"{name} {cell}" for name, cell in zip(sorted(ours), cells, strict=True))
        ratio = [f"{other / best:.2f}" if other and best else "" for other in (compiled, torch)]
        return [f"{case}: {its[0]['title']}", names, f"{its[0]['copy_gbps']:,.0f}", *ratio]

    cases = dict.fromkeys(row["case"] for row in rows)
    heads = ["case", "ours: ms, GB/s, share of the copy", "copy, GB/s", "torch.compile ÷ ours", "best of torch ÷ ours"]
    return markdown(heads, map(line, cases), left=2)


def _reached(row: Mapping[str, Any]) -> str:
    speed = f", {row['gbps']:,.0f}, {row['share']:.0%}" if "gbps" in row else ""
    return f"{row['ms']:.3g}{speed}"


def _costs(items: Mapping[str, Mapping[str, Any]]) -> str:
    def line(item: tuple[str, Mapping[str, Any]]) -> list[str]:
        name, figures = item
        return [name, ", ".join(f"{key.replace('_', ' ')} {value:,.0f}" for key, value in figures.items())]

    return markdown(["", "measured"], map(line, items.items()), left=2)


def _settings(rows: list[dict[str, Any]]) -> str:
    lines: list[list[object]] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        ranked = sorted((row for row in rows if row["case"] == case), key=lambda row: row["microseconds"])
        for i, row in enumerate(ranked):
            if i < BEST or row["shipped"]:
                share = f"{row['share']:.0%}" if "share" in row else ""
                launch = [f"{row['block']:,}", row["warps"], row["registers"] or "free", row["stages"]]
                note = "shipped" if row["shipped"] else ""
                lines.append([case, note, *launch, f"{row['microseconds']:,.1f}", share])
    return markdown(["case", "", "tile", "warps", "registers", "stages", "µs", "of a copy"], lines, left=2)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]
