"""The commands for models on disk: `fiun-fast tree | unlearn | resume | rollback | verify`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .byte_progress import shown_progress
from .checkpoints.wording import counted, human_size, shown
from .errors import FiunError

if TYPE_CHECKING:
    from .checkpoints import Result

COLUMNS = ("model", "requests at", "alpha", "lambda", "elements", "selected", "share", "zeroed", "not finite")


def add_commands(commands: Any) -> None:
    """Add them to the subparsers of `fiun-fast`."""
    tree = _command(commands, "tree", _tree, "who came from whom among the models in a folder; read-only")
    tree.add_argument("folder", type=Path, help="looked through with all folders below it")
    tree.add_argument("--write", type=Path, metavar="TREE.TOML", help="write a file to begin with for `unlearn`")
    tree.add_argument("--sampled", action="store_true", help="compare samples of the tensors only, not every byte")

    unlearn = _command(commands, "unlearn", _unlearn, "dampen a family of models on disk, in little memory")
    unlearn.add_argument("tree", type=Path, metavar="TREE.TOML", help="models, Fishers, requests; docs/checkpoints.md")
    where = unlearn.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="FOLDER", help="new; gets one folder a model")
    where.add_argument("--in-place", action="store_true", help="change the models' own files; needs --journal")
    unlearn.add_argument("--journal", type=Path, metavar="FOLDER", help="new; keeps the old bytes for `rollback`")
    unlearn.add_argument(
        "--dry-run", action="store_true", help="write nothing: count what would be selected, read and written"
    )
    unlearn.add_argument("--memory", default="1GB", metavar="SIZE", help="for buffers: 4GB, 500MB, 2GiB; default 1GB")
    unlearn.add_argument("--threads", type=int, metavar="N", help="that compute; default: as torch has them")
    unlearn.set_defaults(wrong=unlearn.error)

    for name, run, what in (
        ("resume", _resume, "finish an `unlearn --in-place` that was stopped"),
        ("rollback", _rollback, "give the models of an `unlearn --in-place` their old bytes back"),
    ):
        command = _command(commands, name, run, what)
        command.add_argument("journal", type=Path, help="the folder that was given as --journal")
    verify = _command(commands, "verify", _verify, "compare the files of a result with the hashes in its record")
    verify.add_argument("folder", type=Path, help="what `unlearn` was given as --out or --journal")


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    command.add_argument("--json", action="store_true", help="print plain data, for other programs")
    command.add_argument("--quiet", action="store_true", help="show no progress, and the results only")
    command.set_defaults(run=lambda options: _guarded(run, options))
    return command


def _guarded(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; what goes wrong with files is said in one line, names and all safe on a terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names in any language, whatever the terminal can show
    try:
        status = run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough: nothing more, and nothing at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"fiun-fast: stopped{_left_behind(options)}", file=sys.stderr)
        return 130
    except (FiunError, OSError) as error:
        print("\n".join(shown(line, 4000) for line in f"fiun-fast: {error}".split("\n")), file=sys.stderr)
        return 1


def _left_behind(options: argparse.Namespace) -> str:
    """What a command that was stopped leaves."""
    journal = getattr(options, "journal", None)
    if journal is not None:
        return f": `fiun-fast resume {shown(journal)}` goes on, `fiun-fast rollback {shown(journal)}` takes it back"
    return ": nothing was changed, and nothing is left" if getattr(options, "out", None) is not None else ""


def _tree(options: argparse.Namespace) -> int:
    from .checkpoints import tree, write_tree
    from .checkpoints.lineage_text import as_rich, remarks

    with shown_progress("comparing", quiet=options.quiet) as progress:
        found = tree(options.folder, full=not options.sampled, progress=progress)
    if options.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        console = _console()
        console.print(as_rich(found))
        for line in remarks(found):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.write is not None:
        write_tree(found, options.write)
        _say(options, f"{shown(options.write)} is written: look through it, and fill in what is marked `to be made`")
    return 0


def _unlearn(options: argparse.Namespace) -> int:
    from .checkpoints import read_tree, unlearn

    if not (options.out or options.in_place or options.dry_run):
        options.wrong("one of --out FOLDER, --in-place --journal FOLDER, or --dry-run is needed")
    if options.in_place and options.journal is None and not options.dry_run:
        options.wrong("--in-place needs --journal FOLDER, which keeps the old bytes")
    if options.journal is not None and not options.in_place:
        options.wrong("--journal goes with --in-place")
    tree = read_tree(options.tree)
    what = f"{counted(len(tree.models), 'model')}, {counted(len(tree.forget), 'request')}"
    _say(options, f"{shown(options.tree)}: {what}, merged by {tree.merge}; at most {shown(options.memory)} of memory")
    with shown_progress("counting" if options.dry_run else "unlearning", quiet=options.quiet) as progress:
        result = unlearn(
            tree,
            out=options.out,
            in_place=options.in_place,
            journal=options.journal,
            memory=options.memory,
            dry_run=options.dry_run,
            threads=options.threads,
            progress=progress,
        )
    if options.dry_run:
        then = (
            f"nothing was written; a run {_traffic('reads', result.bytes_read, 'writes', result.bytes_written)} at most"
        )
    elif options.out:
        out = shown(options.out)
        then = f"the result is in {out}; `fiun-fast verify {out}` compares it with its record"
    else:
        then = _in_place(options)
    return _show(options, result, then)


def _in_place(options: argparse.Namespace) -> str:
    journal = shown(options.journal)
    return f"the models are changed; `fiun-fast rollback {journal}` gives the old bytes back while {journal} is there"


def _resume(options: argparse.Namespace) -> int:
    from .checkpoints import resume

    with shown_progress("unlearning", quiet=options.quiet) as progress:
        result = resume(options.journal, progress=progress)
    return _show(options, result, _in_place(options))


def _rollback(options: argparse.Namespace) -> int:
    from .checkpoints import rollback

    result = rollback(options.journal)
    if options.json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        print(f"{human_size(result.bytes_written)} of old bytes put back in {result.seconds:.1f} s")
    _say(options, f"the models are as they were; {shown(options.journal)} may be deleted")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .checkpoints import verify

    found = verify(options.folder)
    if options.json:
        print(json.dumps({**vars(found), "same": bool(found)}, indent=1))
    else:
        print("\n".join(shown(line, 4000) for line in str(found).split("\n")))
    return 0 if found else 1


def _show(options: argparse.Namespace, result: Result, then: str) -> int:
    """A table of the models, what was copied or left, how long it took; and what may be done then."""
    if options.json:
        print(json.dumps(result.to_dict(), indent=1))
        return 0
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for k, head in enumerate(COLUMNS):
        table.add_column(head, justify="left" if k < 2 else "right")
    for m in result:
        numbers = ["" if n is None else f"{n:g}" for n in (m.alpha, m.lam)]
        counts = [f"{m.numel:,}", f"{m.selected:,}", f"{m.share:.2%}", f"{m.zeroed:,}", f"{m.nonfinite:,}"]
        cells = [*numbers, *counts] if m.sources else [""] * 7
        table.add_row(Text(shown(m.name)), Text(", ".join(map(shown, m.sources)) or "none: as it was"), *cells)
    console = _console()
    console.print(table)
    for m in result:
        kinds = Counter(m.copied.values())
        if m.sources and kinds:
            names = ", ".join(shown(name) for name in list(m.copied)[:4]) + (", …" if len(m.copied) > 4 else "")
            held = ", ".join(f"{count:,} {shown(kind)}" for kind, count in kinds.most_common())
            _line(console, f"copied in {shown(m.name)}: {held} that no Fisher names: {names}")
        if m.left:
            _line(console, f"not taken along from {shown(m.name)}: {', '.join(map(shown, m.left[:8]))}")
    written = 0 if result.mode == "dry run" else result.bytes_written
    traffic = _traffic("read", result.bytes_read, "written", written)
    speed = f", {human_size((result.bytes_read + written) / result.seconds)}/s" if result.seconds > 1 else ""
    _line(console, f"{result.seconds:.1f} s: {traffic}{speed}; {human_size(result.memory)} of memory for buffers")
    _say(options, then)
    return 0


def _traffic(read: str, count: int, write: str, other: int) -> str:
    return f"{read} {human_size(count)}, {write} {human_size(other)}"


def _line(console: Any, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, width=1000)  # no number is cut: where a line is too long, the terminal breaks it


def _say(options: argparse.Namespace, text: str) -> None:
    """A line for people, beside what is printed."""
    if not options.quiet:
        print(text, file=sys.stderr)
