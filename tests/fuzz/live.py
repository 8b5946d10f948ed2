"""Random sequences of operations on live objects, against a model of what must hold, as a hypothesis state machine.

Before each call of the package the machine takes down every byte of every storage it knows, and works out in plain
torch what the call must do: whether it may succeed, what each parameter holds afterwards, what is counted. A call that
raises a FiunError must have changed nothing; no other exception may come out; bytes beside the parameters that were
meant (other models, layers that are dead, elements around a view, Fishers) never change.

Arguments of all steps are plain numbers, so that a sequence is a list of names and numbers: `replay` takes one from
tests/fuzz/corpus. Each step is written to `Machine.journal` before it is done, so that a crash can be traced.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from calls import Calls
from changes import Changes
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from machine import Machine
from world import STEPS, one_of

MAKING = {"make_plan": 3, "repair": 4}
CALLS = {"run": 6, "undo": 5, "trials": 2, "run_in_threads": 2, "copy_log": 1, "set_values": 1, "look": 1, "flatten": 1}
CHANGES = {"cast": 3, "replace_data": 3, "free": 1, "load_state": 2, "exchange_module": 2, "exchange_parameter": 2}
CHANGES |= {"share": 1, "train": 3, "copy_model": 1, "change_fisher": 3, "use_threads": 1, "flush_denormal": 3}


class Random(Calls, Changes):
    """What hypothesis draws: calls and changes take turns."""

    @initialize(start=st.tuples(STEPS["begin"], STEPS["make_plan"]))
    def start(self, start: tuple[dict[str, Any], dict[str, Any]]) -> None:
        self.do("begin", start[0])
        self.do("make_plan", start[1])

    @rule(which=one_of(**MAKING, **CALLS))
    def calls(self, which: tuple[str, dict[str, Any]]) -> None:
        self.do(*which)

    @rule(which=one_of(**CALLS))
    def calls_again(self, which: tuple[str, dict[str, Any]]) -> None:
        self.do(*which)

    @rule(which=one_of(**CHANGES))
    def changes(self, which: tuple[str, dict[str, Any]]) -> None:
        self.do(*which)


def replay(steps: Iterable[tuple[str, dict[str, Any]]]) -> Machine:
    """Do a recorded sequence; raises what was found, if it is still there."""
    machine = Random()
    try:
        for name, values in steps:
            machine.do(name, values)
    finally:
        machine.teardown()
    return machine


def shrunk(steps: list[tuple[str, dict[str, Any]]], seconds: float = 60.0) -> list[tuple[str, dict[str, Any]]]:
    """The fewest steps that raise the same error; the sequence itself if it does not do so again."""

    def outcome(of: list[tuple[str, dict[str, Any]]]) -> str | None:
        try:
            replay(of)
        except Exception as error:
            return f"{type(error).__name__} {str(error)[:12]}"
        return None

    found, end, size = outcome(steps), time.monotonic() + seconds, len(steps) // 2
    while found is not None and size:
        at = 1  # the first one makes all objects
        while at < len(steps) and time.monotonic() < end:
            fewer = steps[:at] + steps[at + size :]
            if outcome(fewer) == found:
                steps = fewer
            else:
                at += size
        size //= 2
    return steps
