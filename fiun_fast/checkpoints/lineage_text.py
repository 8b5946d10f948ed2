"""A lineage to read, as a tree; and as a TOML file to begin with."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import networkx as nx

from ..errors import FileWriteError
from ..files import location, write_text
from .alike import Shared
from .entries import Tree
from .wording import counted, human_size, shown

if TYPE_CHECKING:
    import rich.tree
    from rich.text import Text

    from .lineage import Found, Lineage

_NONE = Shared("", "", 0, 0, 0)
_SMALL = 0.01  # share of bytes below which what two models have in common is not shown


def as_text(lineage: Lineage) -> str:
    """All of it, for print."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=10_000, color_system=None)
    console.print(as_rich(lineage))
    for line in remarks(lineage):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().split("\n"))


def as_rich(lineage: Lineage) -> rich.tree.Tree:
    """The models as a tree; one with several parents has its children at the first, and is named at the others."""
    from rich.text import Text
    from rich.tree import Tree as Branch

    top = Branch(Text(f"{shown(lineage.folder.name or lineage.folder)}: {counted(len(lineage), 'model')}"))
    branches: dict[str, Branch] = {}
    for found in lineage:
        first, *others = found.parents or [""]
        branches[found.name] = branches.get(first, top).add(_line(found, lineage))
        for parent in others:
            branches[parent].add(Text(f"{shown(found.name)}, which is at {shown(first)}", style="dim"))
    return top


def _line(found: Found, lineage: Lineage) -> Text:
    from rich.text import Text

    line = Text(shown(found.name), style="bold")
    relations = [o.claim.relation for o in found.origins if o.parent and o.claim.relation]
    facts = (
        [*dict.fromkeys(map(shown, relations)), f"{human_size(found.size)}", _dtypes(found)] if found.tensors else []
    )
    if not found.tensors:
        facts = ["not readable" if found.odd else "no tensors"]
    if others := found.parents[1:]:
        facts.append(f"also from {', '.join(map(shown, others))}")
    line.append(f"  {', '.join(filter(None, facts))}", style="default not bold")
    for pair in lineage.shared:
        other = {pair.first: pair.second, pair.second: pair.first}.get(found.name)
        if other in found.parents and not pair.whole and pair.size >= _SMALL * pair.of:
            line.append(f", {pair.size / pair.of:.0%} of its bytes as in {shown(other)}", style="default not bold")
    return line


def _dtypes(found: Found) -> str:
    total = sum(found.dtypes.values())
    parts = []
    for name, count in found.dtypes.items():
        share = "" if count == total else " <1%" if count < 0.005 * total else f" {min(0.99, count / total):.0%}"
        parts.append(f"{shown(name)}{share}")
    return f"{counted(found.tensors, 'tensor')}, {' + '.join(parts[:4])}"


def remarks(lineage: Lineage) -> list[str]:
    """What else there is to say, a line each."""
    lines = _in_common(lineage)
    for found in lineage:
        lines += [
            f"not resolved: {shown(found.name)} came from {shown(o.claim.base)} ({o.claim.source}): {shown(o.why)}"
            for o in found.unresolved
        ]
    for found in lineage:
        lines += [f"not read: {shown(found.name)}: {shown(what, 400)}" for what in found.odd]
    return lines + [f"left out: {shown(what, 400)}" for what in lineage.odd]


def _in_common(lineage: Lineage) -> list[str]:
    """Copies; and of models that no file relates, the two that have most in common."""
    graph = nx.Graph(lineage.edges)
    graph.add_nodes_from(found.name for found in lineage)
    graph.add_edges_from((pair.first, pair.second) for pair in lineage.shared if pair.whole)
    family = {name: k for k, names in enumerate(nx.connected_components(graph)) for name in names}
    most: dict[tuple[int, int], Shared] = {}
    lines = []
    by_samples = " (by their samples)" if lineage.sampled else ""
    for pair in lineage.shared:
        if pair.whole:
            less = "" if lineage[pair.first].size == lineage[pair.second].size else ", as far as the smaller one goes"
            lines.append(f"same weights: {shown(pair.first)} and {shown(pair.second)}{less}{by_samples}")
            continue
        here, there = sorted((family[pair.first], family[pair.second]))
        if here != there and pair.size >= _SMALL * pair.of and pair.size > most.get((here, there), _NONE).size:
            most[here, there] = pair
    for pair in most.values():
        tensors = f"{counted(pair.tensors, 'tensor')}{by_samples}, {pair.size / pair.of:.0%} of the smaller one's bytes"
        names = f"{shown(pair.first)} and {shown(pair.second)}"
        lines.append(f"in common: {names} have {tensors}; no file says that they are related")
    return lines


# ---- a TOML file to begin with --------------------------------------------------------------------------------------


def write_tree(lineage: Lineage, path: str | os.PathLike[str]) -> None:
    """Write a TOML file with the models that were found; what only its author can know stands there as a comment.

    Raises:
        FileWriteError: there is something already, or the folder cannot be written.
        ArgumentError: `path` is no path.

    """
    where = location(path)
    if where.exists():
        raise FileWriteError(f"{where}: not written: it is there already; move it away, or give another name")
    write_text(where, as_toml(lineage, where.parent))


def as_toml(lineage: Lineage, folder: Path) -> str:
    """The text of that file, with paths from the folder that it is to be in."""
    names = _names(lineage)
    lines = [
        f"# Models as found in {shown(lineage.folder)}. Paths are relative to this file.",
        "# Before `fiun-fast unlearn`: look through parents, and give each model its original Fisher, made with",
        '#     ff.estimate_fisher(model, training_data).save("….fisher")',
        "# and each request the Fisher of what is to be forgotten, at the model where it came in (origin).",
        "",
        f"alpha = {Tree.alpha}  # an element is selected where F > alpha * I, and multiplied by lam * I / F",
        f"lam = {Tree.lam}",
        "",
    ]
    root = ""
    for found in lineage:
        lines += [f"# {shown(found.name)}: {shown(what, 400)}" for what in found.odd]
        lines += [f"# came from {shown(o.claim.base)} ({o.claim.source}): {shown(o.why)}" for o in found.unresolved]
        place = _quoted(os.path.relpath(found.path, folder))
        if not found.tensors or place is None:
            lines += [f"# not listed: {'its name is not UTF-8' if place is None else 'it is not readable'}", ""]
            continue
        known = [names[parent] for parent in found.parents if parent in names]
        root = root or ("" if known else names[found.name])
        beside = os.path.relpath(found.fisher, folder) if found.fisher else f"{names[found.name]}.fisher"
        lines += ["[[model]]", f"name = {_quoted(names[found.name])}", f"path = {place}"]
        lines.append(f"fisher = {_quoted(beside)}{'' if found.fisher else '  # to be made'}")
        if known:
            lines.append(f"parents = [{', '.join(str(_quoted(parent)) for parent in known)}]")
        lines.append("")
    lines += ["[[forget]]", f"origin = {_quoted(root)}  # where the data entered"]
    lines += ['fisher = "forget.fisher"  # to be made', "weight = 1.0", ""]
    return "\n".join(lines)


def _names(lineage: Lineage) -> dict[str, str]:
    """What models are called in the file, as folders are: by the last step of the path where no other has that."""
    readable = [found.name for found in lineage if found.tensors and _quoted(found.name) is not None]
    last = {name: Path(name).stem if name.endswith(".safetensors") else Path(name).name for name in readable}
    taken = [one.casefold() for one in last.values()]
    names: dict[str, str] = {}
    for name in readable:
        new = last[name] if taken.count(last[name].casefold()) == 1 else name.replace("/", "-")
        new = new.replace("\\", "-")
        while new in names.values():
            new += "-"
        names[name] = new
    return names


def _quoted(text: str) -> str | None:
    """A string of TOML; None where none can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
