"""The process of a step: its items one after another. What one leaves is a line of JSON, written at once.

    python -m fiun_fast.gpu.child STEP --lines FILE --seconds 60 [--dry] [--skip NAME …]

A failure ends an item, not the step. Where it leaves the device unusable, the process ends with status 3, and whoever
started it starts another one for what is left.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .machine import SkippedError, machine
from .steps import STEPS

UNUSABLE = 3  # exit status


def work_through(
    items: Iterable[tuple[str, Callable[[], dict[str, Any]]]],
    note: Callable[[dict[str, Any]], None],
    skip: Iterable[str],
    deadline: float,
    wait: Callable[[], None],
) -> bool:
    """Run the items that are not to be skipped; False where the device no longer answers.

    Args:
        items: names, and what is to be done.
        note: takes what came of each: first {"item", "status": "begun"}, then its status, seconds, figures or reason.
        skip: names of items that were dealt with before.
        deadline: on time.monotonic(); what has not begun by then is left out, by name.
        wait: until the device is done; raises where it no longer answers.

    """
    before = set(skip)
    for name, work in items:
        if name in before:
            continue
        if time.monotonic() > deadline:
            note({"item": name, "status": "skipped", "why": "no time was left"})
            continue
        note({"item": name, "status": "begun"})
        began = time.monotonic()
        found: dict[str, Any] = {"item": name}
        try:
            found["figures"] = work()
            wait()
            found["status"] = "passed"
        except SkippedError as error:
            found |= {"status": "skipped", "why": str(error)}
        except ModuleNotFoundError as error:  # a demo's data, say
            found |= {"status": "skipped", "why": f"{error.name} is not installed"}
        except Exception as error:  # whatever it is, the next item has its turn
            why = f"{type(error).__name__}: {error}".strip()
            found |= {"status": "failed", "why": why[:2000], "trace": traceback.format_exc(limit=-4)[-2000:]}
        note(found | {"seconds": time.monotonic() - began})
        if found["status"] == "failed":
            try:
                wait()
            except Exception:  # such an error stays with the process
                return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when all items had their turn, whatever came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=[step.name for step in STEPS if step.items])
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--skip", nargs="*", default=[])
    options = parser.parse_args(arguments)
    gpu = machine(options.dry)
    if options.dry:  # tiny work on several threads of a busy machine waits for the scheduler
        torch.set_num_threads(1)
    step = next(step for step in STEPS if step.name == options.step)
    assert step.items is not None
    with options.lines.open("a", encoding="utf-8") as file:

        def note(found: dict[str, Any]) -> None:
            file.write(json.dumps(found) + "\n")
            file.flush()
            if found["status"] != "begun":
                print(f"{found['item']}: {found['status']} {found.get('why', '')}".rstrip(), flush=True)

        deadline = time.monotonic() + options.seconds
        try:
            usable = work_through(step.items(gpu), note, options.skip, deadline, gpu.wait)
        except SkippedError as error:  # the step as a whole
            note({"item": "all", "status": "skipped", "why": str(error)})
            return 0
    return 0 if usable else UNUSABLE


if __name__ == "__main__":
    sys.exit(main())
