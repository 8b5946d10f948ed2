"""The plan: a compiled program bound to live models, run as often as wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from .arguments import OnMismatch
from .binding import bind
from .compiling import ReachedNode, compile_program
from .dag import ForgetRequest, Model
from .errors import ArgumentError, UndoError
from .guards import alone, denormals_kept, signals_deferred
from .kernels.table import Merging
from .live import LiveMemory
from .memory import check_no_mode
from .profile import Profiles, profiles_of, with_squares
from .ranks import Fact, Ranks, together
from .ratios import Ratios
from .report import Audit, Facts, ParameterReport, Report, audit_of
from .sharing import check_unshared, warn_of_copies
from .spread import Spread
from .summary import Traffic, facts_of, summary, traffic_of
from .tiles import examine, tiles
from .undo import Recorder, UndoLog
from .values import Choice, PerGroup, Values, narrowest

_under_way: set[Trials] = set()  # of all plans of the process


class Plan:
    """What `plan` returns. It refers to the models and Fishers it was made from and keeps them alive.

    `print(plan)` says how many nodes, groups, launches and bytes. Parameters whose memory moved or changed since the
    last run (`.to()`, `flatten_`, `load_state_dict(assign=True)`) are noticed, and the plan is built anew before
    anything runs.

    Attributes:
        parts: the launches, a `binding.Part` for each device, parameter dtype and Fisher dtype.

    """

    def __init__(
        self,
        nodes: list[ReachedNode],
        requests: list[ForgetRequest],
        bystanders: Mapping[str, Model],
        merging: Merging,
        values: Values,
        *,
        exponent: float = 1.0,
        cap: float = 1.0,
        on_mismatch: OnMismatch = "error",
        backend: str | None = None,
        spread: Spread | None = None,
    ) -> None:
        """Compile and bind. `plan` and `dampen_` make these from what a user has.

        Args:
            nodes: what the requests reach.
            requests: at least one.
            bystanders: name -> model of all other nodes of the DAG; their memory must not be that of what is dampened.
            merging, values, exponent, cap: the numbers, checked.
            on_mismatch, backend: as in `plan`.
            spread: of models that lie on several ranks; None: they are all here.

        Raises:
            FiunError: as `plan`.

        """
        self.spread = spread
        self._nodes, self._requests, self._bystanders = nodes, requests, bystanders
        self._known = frozenset(node.name for node in nodes) | frozenset(bystanders)
        self._merging, self._shape = merging, (exponent, cap)
        self._on_mismatch, self._backend = on_mismatch, backend
        self._build(values)

    def _build(self, values: Values) -> None:
        check_no_mode()
        nodes, requests, spread, slots = self._nodes, self._requests, self.spread, values.slots(self._nodes)
        if spread is not None:
            nodes, requests = spread.localised()
        memory = LiveMemory(nodes, requests, () if spread is None else spread.modules)
        counted = None if spread is None else partial(memory.counted, spread.counts)
        program = compile_program(nodes, requests, self._on_mismatch, memory.describe, slots, counted)
        dampening = values.dampening(slots, *self._shape)
        parts = bind(program, memory, self._merging, dampening, self._backend)
        check_unshared(memory, self._nodes, self._bystanders)
        warn_of_copies(memory, self._nodes)
        memory.settle()
        self.parts, self._memory = parts, memory
        self._values, self._slots, self._dampening = values, slots, dampening
        self._counts = tuple(dict.fromkeys((part.table.device, part.counted) for part in parts))
        facts = facts_of(program, parts, self._known, self._merging, dampening)
        self._facts = facts if spread is None else spread.facts(facts)

    def run_(self, *, dry_run: bool = False, undo: bool = False, audit: bool = False) -> Report:
        """Dampen every node a request reaches, in place, all from the state before the call.

        Without `undo` and `audit` this does not wait for the device, and all it takes there are 24 bytes a node for the
        counts, which belong to the report. Each of the two adds a pass in plain torch that does wait, before the run
        (docs/audit.md has the cost).

        Args:
            dry_run: count only; nothing is written.
            undo: keep what is needed to restore every bit with `report.undo_()`: 4 bytes and one parameter's element
                for each element selected.
            audit: count each parameter, measure ‖Δθ‖ and hash every Fisher and gradient; `report.to_dict()` has it all.

        Returns:
            Counts per node, read from the device when first looked at.

        Raises:
            ArgumentError: undo of a dry run, or trials are under way on this plan.
            LayoutError, DTypeError, DeviceError: memory changed so that it does not fit any more; nothing ran.

        """
        if dry_run and undo:
            raise ArgumentError("a dry run changes nothing, so there is nothing to undo: leave out dry_run or undo")
        with alone:
            if _under_way and not dry_run:
                self._check_no_trials()
            return self._run(bool(dry_run), undo, audit, None if self.spread is None else self.spread.ranks)

    def run_among(self, ranks: Ranks, *, dry_run: bool, undo: bool, audit: bool) -> Report:
        """`run_`, where ranks with plans of their own run at once: with undo or audit none writes before all can."""
        with alone:
            return self._run(dry_run, undo, audit, ranks)

    def _check_no_trials(self) -> None:
        """Trials take back what they changed, and with it what another run did there meanwhile."""
        for trials in list(_under_way):
            owners = trials.memory.owners
            if trials.plan is self or not owners.keys().isdisjoint(self._memory.owners):
                raise ArgumentError(
                    f"trials are under way on {'this plan' if trials.plan is self else 'parameters of this plan'}, and "
                    "take back only what their own run() did"
                )

    def _run(self, dry_run: bool, undo: bool = False, audit: bool = False, among: Ranks | None = None) -> Report:
        ranks = None if self.spread is None else self.spread.ranks
        with alone:
            audited = recorder = None
            if undo or audit:
                with together(among):  # these wait anyway, and take memory
                    self._refresh(writes=not dry_run)
                    figures = examine(part for part in self.parts if part.counted) if audit else None
                    recorder = Recorder(self.parts, self.nodes, self._memory) if undo else None
                audited = None if figures is None else self._audit(figures)
            else:
                self._refresh(writes=not dry_run)
            counts = [torch.zeros(len(self._slots), 3, dtype=torch.int64, device=device) for device, _ in self._counts]
            log = self._write(counts, dry_run, recorder)
            found = counts
            if self.spread is not None:  # other ranks count the rest
                found = [one for one, (_, counted) in zip(counts, self._counts, strict=True) if counted]
            of = self._facts, found, self._values, self._slots
            return Report(*of, dry_run=dry_run, audit=audited, undo=log, ranks=ranks)

    def _write(self, counts: Sequence[torch.Tensor], dry_run: bool, recorder: Recorder | None) -> UndoLog | None:
        """Launch everything. Nothing is allocated from here on but by the log, and nothing interrupts."""
        if not dry_run:  # kernels write through addresses; autograd must hear of it
            self._memory.count_up()
        if recorder is None and len(self.parts) == 1 and self.parts[0].launch.in_one_call:
            self.parts[0].launch.run(counts[self.parts[0].tally], dry_run)
            return None
        try:
            with signals_deferred():  # their handlers run, and may raise, when the block has ended
                for part in self.parts:
                    part.launch.run(counts[part.tally], dry_run)
                return None if recorder is None else recorder.seal()
        except BaseException as error:
            if recorder is not None:
                recorder.take_back(error)
            raise

    def _refresh(self, writes: bool = False) -> None:
        check_no_mode()
        if self._memory.moved() or (self.spread is not None and self.spread.stale()):
            self._build(self._values)
        if writes:
            self._memory.check_writable()

    def set_values_(
        self,
        chosen: Mapping[str, Choice] | None = None,
        *,
        alpha: PerGroup | None = None,
        lam: PerGroup | None = None,
    ) -> None:
        """Change alpha or lambda of the runs to come.

        Nothing is compiled anew, unless patterns tell parameters apart that had one number so far. Where models are
        spread over ranks, all of them call it, with the same.

        Args:
            chosen: {node: Choice}, as `tune` and `search_alpha` return it.
            alpha, lam: a number for all nodes, or for those to be changed {node: number}, {node: {pattern: number}};
                None: as they are, or as `chosen` says.

        Raises:
            ArgumentError: a value that is negative or not finite, or of a node that the DAG does not have; a parameter
                that no pattern matches; or new patterns while trials are under way on this plan.
            LayoutError: a pattern that matches no parameter.
            FiunError: as `plan`, where it is compiled anew.

        """
        endless = False
        with alone:
            with together(None if self.spread is None else self.spread.ranks) as facts:
                if chosen is not None:
                    if not isinstance(chosen, Mapping) or not all(isinstance(one, Choice) for one in chosen.values()):
                        expected = "expected {node: Choice}; numbers go into alpha= and lam="
                        raise ArgumentError(f"chosen is {chosen!r:.80}, {expected}")
                    if alpha is None:  # infinite selects nothing: where I is 0, inf I is NaN
                        alpha, endless = {name: one.alpha for name, one in chosen.items()}, True
                    lam = {name: one.lam for name, one in chosen.items()} if lam is None else lam
                values = self._changed(alpha, lam, endless)
                facts |= {"alpha": Fact(values.alpha.all()), "lam": Fact(values.lam.all())}
            self.take_values_(values)

    def _changed(self, alpha: PerGroup | None, lam: PerGroup | None, endless: bool = False) -> Values:
        """Alpha and lambda of each node as they would be; all is checked. `endless`: alpha may be infinite."""
        dtype = narrowest(request.fisher for request in self._requests)
        return self._values.changed(self._nodes, self._known, dtype, alpha, lam, infinite=endless)

    def take_values_(self, values: Values) -> None:
        """Values that fit this plan, such as `values` were; no other rank is asked."""
        if not values.fit(self._slots):
            if any(trials.plan is self for trials in _under_way):
                raise ArgumentError(
                    "these patterns tell parameters apart that had one number when the trials on this plan began; "
                    "name all patterns in trials(alpha=…)"
                )
            self._build(values)
            return
        self._values = values
        self._dampening.alpha[:] = values.alpha.by_slot(self._slots)
        self._dampening.lam[:] = values.lam.by_slot(self._slots)
        for part in self.parts:
            part.launch.refresh()

    @contextmanager
    def trials(self, *, alpha: PerGroup | None = None) -> Iterator[Trials]:
        """Try values out: inside `with`, runs that are taken back; afterwards parameters and values are as before.

            with plan.trials(alpha=1.0) as trials:
                report = trials.run(alpha=3.0, lam=0.1)
                score = evaluate(model)
                trials.restore()

        One undo log serves all runs: what the lowest alpha selects holds what every higher one does. Fishers must stay
        as they are meanwhile, and parameters where they are. The plan's own `run_` is refused inside, unless dry.

        Args:
            alpha: the lowest that will be tried, as in `set_values_`, with all patterns that will be; None: the present
                ones.

        Raises:
            ArgumentError: trials are under way on this plan already; or as `set_values_`.
            UndoError: at the end, parameters were moved or replaced meanwhile: the last trial could not be taken back.
            FiunError: as `run_`.

        """
        with alone:
            if any(trials.plan is self for trials in _under_way):
                raise ArgumentError("trials are under way on this plan already")
            self._check_no_trials()
            before, lowest = self._values, self._changed(alpha, None, True)
            self._refresh()
            try:
                self.take_values_(lowest)
                self._memory.check_writable()
                trials = Trials(self, Recorder(self.parts, self.nodes, self._memory).seal())
            except BaseException:
                self.take_values_(before)
                raise
        try:
            _under_way.add(trials)
            yield trials
        finally:
            with signals_deferred(), alone:
                try:
                    trials.end()
                finally:
                    _under_way.discard(trials)
                    self.take_values_(before)

    def profile(self, *, norms: bool = False) -> Profiles:
        """How many elements any alpha would select at each node: {node: SelectionProfile}, in one pass over the plan.

        With gradients, only elements that their sign admits have a ratio; all others are among `never`.

        Args:
            norms: also what norm of the parameters would go (`SelectionProfile.removed`): a second pass in plain torch.

        """
        with alone, denormals_kept():
            found = profiles_of(self.ratios(), [numel for *_, numel in self._facts.nodes])
            if norms:
                parts, spread = [part for part in self.parts if part.counted], self.spread
                found = with_squares(found, tiles(parts), None if spread is None else spread.ranks)
        return Profiles(dict(zip(self.nodes, found, strict=True)))

    def ratios(self, layers: Sequence[tuple[str, Sequence[str]]] | None = None) -> Ratios:
        """The ratios m / I of every node: histograms and exact percentiles; with gradients, those the sign admits.

        Args:
            layers: (node, parameters) of what is to have ratios of its own instead. Each parameter of the plan is in
                one of them, and the plan's values tell all of a node's layers apart.

        """
        with alone:
            self._refresh()
            names = self.nodes if layers is None else [f"{node}, {', '.join(own)}" for node, own in layers]
            rows = self._slots.node if layers is None else self._slots.rows(self.nodes, layers)
            found = [(part.table, part.histogram()) for part in self.parts if part.counted]
            if self.spread is None:
                return Ratios(found, names, rows)
            own_dtype = {node.name: node.fisher.dtype for node in self._nodes}
            dtypes = [own_dtype[name] for name in (self.nodes if layers is None else [node for node, _ in layers])]
            return Ratios(found, names, rows, dtypes, self.spread.ranks)

    def _audit(self, figures: Mapping[int, list[ParameterReport]]) -> Audit:
        """Everything that must be known before the run."""
        if self.spread is not None and self.spread.ranks is not None:
            return audit_of(self._facts, self.spread.audited(figures, self._facts))
        return audit_of(self._facts, {name: tuple(figures.get(i, ())) for i, name in enumerate(self.nodes)})

    def warmup(self) -> None:
        """Compile ahead what a run needs, where the backend compiles at run time (Triton); otherwise nothing to do."""
        for part in self.parts:
            part.launch.warmup()

    @property
    def facts(self) -> Facts:
        """What a report says of the plan beside counts."""
        return self._facts

    @property
    def values(self) -> Values:
        """Alpha and lambda of each node, as they are now."""
        return self._values

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that a run dampens, in the order of the DAG."""
        return [node.name for node in self._nodes]

    @property
    def models(self) -> dict[str, Model]:
        """Name -> model of each node that a run dampens."""
        return {node.name: node.model for node in self._nodes}

    @property
    def parameters(self) -> dict[str, dict[str, int]]:
        """Node -> all parameters of its Fisher, name -> elements that a run may dampen: on all ranks; 0 if skipped."""
        return {
            node.name: {s.name: 0 if s.name in skipped else s.numel for s in node.fisher.layout.unsharded()}
            for node, (_, _, skipped, _) in zip(self._nodes, self._facts.nodes, strict=True)
        }

    @property
    def traffic(self) -> Traffic:
        """Dense bytes of one run, over all launches (docs/architecture.md, cost model)."""
        return traffic_of(self.parts)

    def __str__(self) -> str:
        return summary(self.parts, self._facts, self._merging.how)

    def __repr__(self) -> str:
        return f"Plan({len(self._nodes)} nodes, {len(self.parts)} launches)"


class Trials:
    """What `with plan.trials()` gives: run with values, look at the models, restore; as often as wanted."""

    def __init__(self, plan: Plan, log: UndoLog) -> None:
        self.plan, self._log = plan, log
        self.memory, self._lowest = plan._memory, plan._dampening.alpha.copy()
        self._changed = self._ended = False
        self._fishers = self._versions()

    def _versions(self) -> list[int]:
        """Which state of their Fishers and gradients the trials began with; the log holds what these select."""
        fishers = [node.fisher for node in self.plan._nodes] + [one.fisher for one in self.plan._requests]
        gradients = [one.gradient for one in self.plan._requests if one.gradient is not None]
        buffers = [vector.buffer for vector in (*fishers, *gradients)]
        return [-1 if buffer.is_inference() else buffer._version for buffer in buffers]

    def run(self, *, alpha: PerGroup | None = None, lam: PerGroup | None = None, dry_run: bool = False) -> Report:
        """Restore what an earlier trial changed, then run the plan with these values.

        Args:
            alpha, lam: as in `Plan.set_values_`; they stay for later trials.
            dry_run: count only.

        Raises:
            ArgumentError: an alpha below the lowest that was announced, which the log could not take back; patterns
                that were not announced.
            UndoError: the `with` block has ended; or memory was moved or replaced since it began.
            FiunError: as `Plan.run_` and `Plan.set_values_`.

        """
        with alone:
            return self._run(alpha, lam, bool(dry_run))

    def _run(self, alpha: PerGroup | None, lam: PerGroup | None, dry_run: bool) -> Report:
        if self._ended:
            raise UndoError("these trials have ended: a run after the `with` block would not be taken back")
        self.restore()
        plan = self.plan
        values, slots = plan._changed(alpha, lam, True), plan._slots
        if not dry_run and values.fit(slots):
            now = values.alpha.by_slot(slots)
            for slot in np.flatnonzero(now < self._lowest).tolist():
                part = f", parameter {slots.names[slot][0]!r}" if slot in slots.names else ""
                raise ArgumentError(
                    f"node {plan.nodes[slots.node[slot]]!r}{part}: alpha {now[slot]:g} is below "
                    f"{self._lowest[slot]:g}, the lowest that trials(alpha=…) announced"
                )
            if plan._memory is not self.memory or self.memory.moved():
                raise UndoError("parameters or Fishers were moved or replaced since these trials began")
            if self._versions() != self._fishers:
                what = "a Fisher or gradient" if any(one.gradient for one in plan._requests) else "a Fisher"
                raise UndoError(f"{what} was changed since these trials began, and their log was made with the old one")
        plan.take_values_(values)
        self._changed = not dry_run
        return plan._run(dry_run)

    def restore(self) -> None:
        """Put back every bit that the last trial changed.

        Raises:
            UndoError: the parameters were moved or replaced meanwhile.

        """
        with alone:
            if self._changed:
                self._log.restore_()
                self._changed = False

    def end(self) -> None:
        """Restore, and refuse further runs."""
        self._ended = True
        self.restore()
