"""The machine's memory: all bytes of all storages, what a call must do to them, and whether it did."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TextIO

import torch
from cases import merge_textbook, ssd_modify_weight
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from torch import Tensor, nn
from world import (
    LAYOUT,
    PARENTS,
    SEED,
    SHAPES,
    Key,
    Log,
    Model,
    Net,
    Outcome,
    Planned,
    bits,
    fisher_fits,
    fits,
    is_whole,
    overlap,
    parameter_of,
    random_fisher,
    step,
)

import fiun_fast as ff


class Machine(RuleBasedStateMachine):
    """Models, Fishers, plans and undo logs, and everything that may happen to them."""

    journal: TextIO | None = None
    left_out: frozenset[str] = frozenset()  # steps that are not taken
    failed: ClassVar[list[tuple[str, dict[str, Any]]] | None] = None  # steps of the first that found something
    taken = 0  # steps of all machines
    calls: ClassVar[Counter[str]] = Counter()  # of the package: done or refused

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, dict[str, Any]]] = []
        self.models: dict[str, Model] = {}
        self.plans: list[Planned] = []
        self.logs: list[Log] = []
        self.others: list[Any] = []  # tensors and modules that are not, or no more, in a model: none may change
        self.threads = torch.get_num_threads()
        if self.journal is not None:
            self.journal.seek(0)
            self.journal.truncate()

    def teardown(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(False)

    def note(self, name: str, values: dict[str, Any]) -> None:
        Machine.taken += 1
        self.steps.append((name, values))
        if self.journal is not None:
            self.journal.write(json.dumps([name, values]) + "\n")
            self.journal.flush()

    def tally(self, how: str) -> None:
        Machine.calls[f"{self.steps[-1][0]} {how}"] += 1

    def do(self, name: str, values: dict[str, Any]) -> None:
        """Do a step, unless there is nothing to do it to."""
        needs = {"undo": self.logs, "copy_log": self.logs}
        needs |= dict.fromkeys(["run", "run_in_threads", "set_values", "trials", "look"], self.plans)
        if needs.get(name, True) and name not in self.left_out:
            try:
                getattr(self, name)(**values)
            except Exception:
                Machine.failed = Machine.failed or list(self.steps)
                raise

    # ---- what there is, and what must hold --------------------------------------------------------------------------

    @step(seed=SEED, modules=st.integers(0, 15), wide=st.booleans())
    def begin(self, seed: int, modules: int, wide: bool) -> None:
        """Four models in a DAG; bit i of `modules`: whether the i-th is a module, else a dict of tensors."""
        generator = torch.Generator().manual_seed(seed)
        kind = torch.float64 if wide else torch.float32
        self.dag = ff.InheritanceDAG()
        self.fishers: dict[str, ff.Fisher] = {}
        for i, (node, parents) in enumerate(PARENTS.items()):
            values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
            self.models[node] = Net(values) if modules >> i & 1 else values
            self.fishers[node] = ff.Fisher(random_fisher(seed + i, kind), LAYOUT)
            self.dag.add_model(node, self.models[node], self.fishers[node], parents=list(parents))
        self.forgets = [ff.Fisher(random_fisher(seed + 50 + k, kind), LAYOUT) for k in range(2)]

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor that the machine knows and that has memory."""
        held = [*self.models.values(), *self.others]
        for one in held:
            inside = (
                one.parameters() if isinstance(one, nn.Module) else one.values() if isinstance(one, dict) else [one]
            )
            yield from (t for t in inside if isinstance(t, Tensor) and t.is_cpu)
        for fisher in (*self.fishers.values(), *self.forgets):
            if isinstance(buffer := vars(fisher).get("buffer"), Tensor):
                yield buffer

    def everything(self) -> dict[int, tuple[Any, Tensor]]:
        """Every storage, and a view of its bytes."""
        storages = {(s := t.untyped_storage())._cdata: s for t in self.tensors()}
        return {key: (s, torch.empty(0, dtype=torch.uint8).set_(s)) for key, s in storages.items() if s.nbytes()}

    def call(
        self, work: Callable[[], Any], may: bool | None, writes: Callable[[Any], dict[Key, Tensor]] | None = None
    ) -> Any:
        """Make a call; all bytes must be as before it, but for parameters that are to hold new values.

        Args:
            work: the call. A FiunError makes the result None; any other error is a finding.
            may: whether it must succeed; None where both is right.
            writes: its result -> what parameters hold afterwards.

        """
        live = self.everything()
        before = {key: view.clone() for key, (_, view) in live.items()}
        try:
            result = work()
        except ff.FiunError as error:
            if may is True:
                raise AssertionError(f"refused: {type(error).__name__}: {error}") from error
            result, writes = None, None
            self.tally("refused")
        else:
            assert may is not False, "done, and had to be refused"
            result = True if result is None else result
            self.tally("done")
        changed = writes(result) if writes is not None else {}
        for (node, name), value in changed.items():
            parameter = parameter_of(self.models[node], name)
            assert parameter is not None
            self.set_bytes(before, parameter, value)
        for key, (storage, view) in live.items():
            assert storage.nbytes() == len(view) == len(before[key]), "a storage was resized"
            if not torch.equal(view, before[key]):
                self.explain(before, key, view)
        return result

    def set_bytes(self, before: dict[int, Tensor], parameter: Tensor, value: Tensor) -> None:
        """Write what is expected where the parameter lies; a NaN that came out as another NaN is as good."""
        if parameter.numel() == 0:
            return
        first = parameter.storage_offset() * parameter.itemsize
        expected = before[parameter.untyped_storage()._cdata][first : first + value.nbytes].view(value.dtype)
        found = parameter.detach().reshape(-1)
        expected.copy_(torch.where(value.isnan() & found.isnan(), found, value))
        bits(expected).copy_(torch.where(value.isnan() & found.isnan(), bits(found), bits(value)))

    def explain(self, expected: dict[int, Tensor], key: int, found: Tensor) -> None:
        at = (found != expected[key]).nonzero().view(-1)
        names = []
        for node, model in self.models.items():
            for name in SHAPES:
                parameter = parameter_of(model, name)
                if isinstance(parameter, Tensor) and parameter.is_cpu and parameter.untyped_storage()._cdata == key:
                    names.append(f"{node}.{name} ({parameter.dtype})")
        raise AssertionError(f"bytes {at.tolist()[:20]} of a storage of {len(found)} differ: {names or 'of no model'}")

    def shared_outside(self, planned: Planned) -> bool:
        """Whether a parameter that is reached shares memory with one of the DAG that is not."""
        reached = [p for node in planned.nodes for p in self.of(node).values()]
        apart = [p for node in PARENTS if node not in planned.nodes for p in self.of(node).values()]
        return any(overlap([p, q]) for p in reached if is_whole(p) for q in apart if is_whole(q))

    def of(self, node: str) -> dict[str, Any]:
        return {name: parameter_of(self.models[node], name) for name in SHAPES}

    def may_run(self, planned: Planned) -> bool | None:
        """Whether a run of this plan has to succeed; None where it may."""
        reached = {(node, name): p for node in planned.nodes for name, p in self.of(node).items()}
        if not all(fits(p, None, SHAPES[name]) for (_, name), p in reached.items()):
            return False
        for node in planned.nodes:
            its = [self.fishers[node], *(planned.forgets[k] for k in planned.requests(node))]
            if not all(map(fisher_fits, its)) or len({f.buffer.dtype for f in its}) > 1:
                return False
        if overlap(reached.values()):
            return False
        return None if self.shared_outside(planned) else True

    def textbook(self, planned: Planned, values: Mapping[Key, Tensor] | None = None) -> Outcome:
        """What SSD/FIUn code does, node by node and parameter by parameter, to the present values or to those."""
        outcome = Outcome({}, {}, {})
        flushes = torch.tensor([1e-40]).mul(1.0).item() == 0
        torch.set_flush_denormal(False)
        try:
            self.textbook_of(planned, values, outcome)
        finally:
            torch.set_flush_denormal(flushes)
        return outcome

    def textbook_of(self, planned: Planned, values: Mapping[Key, Tensor] | None, outcome: Outcome) -> None:
        for node in planned.nodes:
            counts = outcome.counts[node] = [0, 0, 0]
            for segment in LAYOUT:
                key, at = (node, segment.name), slice(segment.offset, segment.offset + segment.numel)
                parameter = parameter_of(self.models[node], segment.name)
                value = (parameter.detach().reshape(-1) if values is None else values[key]).clone()
                original = self.fishers[node].buffer[at]
                its = planned.requests(node)
                sources = [planned.forgets[k].buffer[at] for k in its]
                merged = merge_textbook(sources, [planned.weights[k] for k in its], "max", 1.0)
                wide = torch.float32 if value.itemsize == 2 else torch.promote_types(value.dtype, original.dtype)
                computed = value.to(wide)
                chosen = ssd_modify_weight(computed, original, merged, planned.alpha[node], planned.lam[node], 1.0, 1.0)
                after = torch.where(chosen, computed.to(value.dtype), value)
                bits(after).copy_(torch.where(chosen, bits(computed.to(value.dtype)), bits(value)))
                counts[0] += int(chosen.sum())
                counts[1] += int((after[chosen] == 0).sum())
                counts[2] += int((~(merged.isfinite() & original.isfinite())).sum())
                outcome.values[key], outcome.chosen[key] = after, chosen

    def check_counts(self, report: ff.Report, wanted: Mapping[str, list[int]]) -> None:
        found = {node.name: [node.selected, node.zeroed, node.nonfinite] for node in report}
        assert found == wanted, f"counted {found}, expected {dict(wanted)}"
