"""The plan: the compiled work table of one DAG and its requests, run as often as wanted."""

from __future__ import annotations

import datetime
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from .audit import examine
from .dag import ForgetRequest, InheritanceDAG, Model, check_requests
from .errors import ArgumentError, BackendError
from .fisher import Fisher, check_number
from .kernels import select
from .kernels.table import MERGES, DampenTable, pack_rows
from .profile import Profiles, profiles_of, with_squares
from .ratios import Ratios, adaptive_percentile, check_share
from .report import Audit, Facts, Report
from .resolve import Batch, Target, make_group, resolve
from .tiles import tiles
from .undo import Recorder

PerNode = float | Mapping[str, float]


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Compiling makes many objects that all stay; looking for garbage among them takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Traffic:
    """Bytes that one run moves where everything is selected; with nothing selected, `theta` falls away."""

    forget: int  # each forget Fisher once a group
    original: int  # each original Fisher once
    theta: int  # read and written

    @property
    def total(self) -> int:
        """Dense bytes of one run."""
        return self.forget + self.original + self.theta


class Plan:
    """What `plan` returns. It refers to the models and Fishers it was made from and keeps them alive.

    `print(plan)` says how many nodes, groups, launches and bytes. Parameters whose storage moved since the last run
    (`.to()`, `flatten_`, `load_state_dict(assign=True)`) are noticed, and the table is built anew before anything runs.
    """

    def __init__(
        self,
        targets: list[Target],
        requests: list[ForgetRequest],
        known: frozenset[str],
        options: Mapping[str, float | str],
        on_mismatch: str,
        backend: str | None,
    ) -> None:
        self._targets, self._requests, self._known = targets, requests, known
        self._options, self._on_mismatch, self._backend = options, on_mismatch, backend
        self._last: weakref.ref[Report] | None = None
        self._build()

    @_nothing_collected()
    def _build(self) -> None:
        targets = self._targets
        resolved = resolve(targets, self._requests, self._on_mismatch)
        launches: dict[tuple, list[Batch]] = {}
        for batch in resolved.batches:
            launches.setdefault((batch.device, batch.theta_dtype, batch.fisher_dtype), []).append(batch)
        backends = [select(self._backend, batches[0].device.type) for batches in launches.values()]
        tables = [self._table(batches) for batches in launches.values()]
        self._launches = [backend.dampen(table) for backend, (table, _) in zip(backends, tables, strict=True)]
        self.tables = [table for table, _ in tables]
        self._slots = [slots for _, slots in tables]  # per table: the target of each slot
        self._batches = list(launches.values())  # per table: what its groups were made from
        self.backends = backends
        self._resolved = resolved
        self._watched = [t.fisher for t in targets] + [r.fisher for r in self._requests]
        self._watched_addresses = [fisher.buffer.data_ptr() for fisher in self._watched]
        self._nodes = self._node_rows()
        self._facts = Facts(
            self._options,
            tuple(dict.fromkeys(backend.name for backend in backends)),
            tuple((r.origin, float(r.weight), weakref.ref(r.fisher)) for r in self._requests),
            {t.name: weakref.ref(t.fisher) for t in targets},
        )

    def _node_rows(self) -> list[tuple]:
        """What a report says of each node before the counts."""
        origins = {
            sources: tuple(self._requests[k].origin for k in sources) for sources in {t.sources for t in self._targets}
        }
        return [
            (t.name, origins[t.sources], skipped, t.alpha, t.lam, numel)
            for t, numel, skipped in zip(self._targets, self._resolved.numels, self._resolved.skipped, strict=True)
        ]

    def _table(self, batches: list[Batch]) -> tuple[DampenTable, list[int]]:
        device = batches[0].device
        nodes = sorted({index for batch in batches for index in batch.nodes})
        slots = {index: slot for slot, index in enumerate(nodes)}
        # A forget Fisher that was taken on another device is copied there once, here.
        forgets = {k: self._requests[k].fisher.to(device) for batch in batches for k in batch.sources}
        weights = {k: float(self._requests[k].weight) for k in forgets}
        groups = [make_group(batch, self._targets, forgets, weights, slots) for batch in batches]
        rows, sources, row_weights, targets = pack_rows(groups)
        table = DampenTable(
            device=device,
            theta_dtype=batches[0].theta_dtype,
            fisher_dtype=batches[0].fisher_dtype,
            merge=str(self._options["merge"]),
            scale=float(self._options["scale"]),
            exponent=float(self._options["exponent"]),
            cap=float(self._options["cap"]),
            groups=groups,
            rows=rows,
            sources=sources,
            weights=row_weights,
            targets=targets,
            alpha=np.array([self._targets[i].alpha for i in nodes]),
            lam=np.array([self._targets[i].lam for i in nodes]),
            counts=torch.zeros(len(nodes), 3, dtype=torch.int64, device=device),
        )
        return table, nodes

    def run_(self, dry_run: bool = False, undo: bool = False, audit: bool = False) -> Report:
        """Dampen every node a request reaches, in place, all from the state before the call.

        Without `undo` and `audit` this does not wait for the device and allocates nothing there, unless the report of
        the run before is still held and was not looked at: that gets a copy of its counts. Each of the two adds a pass
        in plain torch that does wait, before the run (docs/audit.md has the cost).

        Args:
            dry_run: count only; nothing is written.
            undo: keep what is needed to restore every bit with `report.undo_()`: 4 bytes and one parameter's element
                for each element selected.
            audit: count each parameter, measure ‖Δθ‖ and hash every Fisher; `report.to_dict()` has it all.

        Returns:
            Counts per node, read from the device when first looked at.

        Raises:
            ArgumentError: undo of a dry run.
            LayoutError, DTypeError, DeviceError: storage moved to something that does not fit any more; nothing ran.
            BackendError: a CUDA graph is being captured while the report of the run before still has to be copied.

        """
        if dry_run and undo:
            raise ArgumentError("a dry run changes nothing, so there is nothing to undo: leave out dry_run or undo")
        if self._moved():
            self._build()
        if self._last is not None and (before := self._last()) is not None:
            if before.pending and any(t.device.type == "cuda" for t in self.tables) and _capturing():
                raise BackendError(
                    "the report of the run before is still held and was not looked at; a CUDA graph would copy its "
                    "counts at every replay: print that report, or let go of it, before capturing"
                )
            before.keep()  # somebody still holds the last report, and this run overwrites its counts
        audited = self._audit() if audit else None
        recorder = Recorder(self.tables, self._batches, self.nodes, self._resolved) if undo else None
        for launch in self._launches:
            launch(dry_run)
        if not dry_run:  # kernels write through addresses; autograd must hear of it
            torch.autograd.graph.increment_version(self._resolved.parameters)
        counts = [(table.counts, slots) for table, slots in zip(self.tables, self._slots, strict=True)]
        log = recorder.seal() if recorder else None
        report = Report(self._nodes, self._known, counts, dry_run, self._facts, audited, log)
        self._last = weakref.ref(report)
        return report

    def set_values_(self, alpha: PerNode | None = None, lam: PerNode | None = None) -> None:
        """Change alpha or lambda of the runs to come; nothing is compiled anew.

        Args:
            alpha, lam: a number for all nodes, or {node: number} for those to be changed; None: as they are.

        Raises:
            ArgumentError: a value that is negative or not finite, or of a node that the DAG did not have.

        """
        narrowest = min((t.fisher.buffer.dtype for t in self._targets), key=lambda dtype: dtype.itemsize)
        names = dict.fromkeys(self._known)
        alphas = {} if alpha is None else _per_node("alpha", alpha, names, narrowest)
        lams = {} if lam is None else _per_node("lam", lam, names, narrowest)
        self._targets = [
            replace(t, alpha=alphas.get(t.name, t.alpha), lam=lams.get(t.name, t.lam)) for t in self._targets
        ]
        for table, slots, launch in zip(self.tables, self._slots, self._launches, strict=True):
            table.alpha[:] = [self._targets[node].alpha for node in slots]
            table.lam[:] = [self._targets[node].lam for node in slots]
            refresh = getattr(launch, "refresh", None)
            if refresh is not None:
                refresh()
        self._nodes = self._node_rows()

    def profile(self, norms: bool = False) -> Profiles:
        """How many elements any alpha would select at each node: {node: SelectionProfile}, in one pass over the plan.

        Args:
            norms: also what norm of the parameters would go (`SelectionProfile.removed`): a second pass in plain torch.

        """
        ratios = self._ratios()
        found = profiles_of(ratios, self._resolved.numels)
        if norms:
            pairs = list(zip(self.tables, self._batches, strict=True))
            found = with_squares(found, lambda: chain.from_iterable(tiles(*pair) for pair in pairs))
        return Profiles(dict(zip(self.nodes, found, strict=True)))

    def _recorded(self) -> Callable[[], None]:
        """What takes back all runs from now on, again and again, if their alphas are those of now or higher."""
        if self._moved():
            self._build()
        return Recorder(self.tables, self._batches, self.nodes, self._resolved).seal().restore_

    def _ratios(self) -> Ratios:
        if self._moved():
            self._build()
        return Ratios(list(zip(self.tables, self.backends, self._slots, strict=True)), self.nodes)

    def _audit(self) -> Audit:
        """Everything that must be known before the run: its time, hashes of Fishers, figures of each parameter."""
        time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        references = [fisher for _, _, fisher in self._facts.requests] + list(self._facts.originals.values())
        fishers = {id(reference): fisher for reference in references if (fisher := reference()) is not None}
        digests = {id(fisher): fisher.sha256() for fisher in fishers.values()}
        figures = examine(self.tables, self._batches)
        parameters = {name: tuple(figures.get(i, ())) for i, name in enumerate(self.nodes)}
        return Audit(time, parameters, {reference: digests[id(fisher)] for reference, fisher in fishers.items()})

    def warmup(self) -> None:
        """Compile ahead what a run needs, where the backend compiles at run time (Triton); otherwise nothing to do."""
        for launch in self._launches:
            compile_ahead = getattr(launch, "warmup", None)
            if compile_ahead is not None:
                compile_ahead()

    def _moved(self) -> bool:
        if any(container.get(key) is not module for container, key, module in self._resolved.links):
            return True
        try:
            addresses = [container[key].data_ptr() for container, key in self._resolved.homes]
        except (KeyError, AttributeError):
            return True  # a parameter was taken away: building again says which
        if addresses != self._resolved.addresses:
            return True
        return [fisher.buffer.data_ptr() for fisher in self._watched] != self._watched_addresses

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that a run dampens, in the order of the DAG."""
        return [t.name for t in self._targets]

    @property
    def traffic(self) -> Traffic:
        """Dense bytes of one run, over all launches (docs/architecture.md, cost model)."""
        forget = original = theta = 0
        for table in self.tables:
            length, k, n = (table.rows[:, column].astype(object) for column in (0, 2, 4))  # Python ints: no overflow
            forget += int((length * k).sum()) * table.fisher_dtype.itemsize
            original += int((length * n).sum()) * table.fisher_dtype.itemsize
            theta += 2 * int((length * n).sum()) * table.theta_dtype.itemsize
        return Traffic(forget, original, theta)

    def __str__(self) -> str:
        traffic, elements = self.traffic, sum(self._resolved.numels)
        groups, rows = (sum(len(getattr(t, part)) for t in self.tables) for part in ("groups", "rows"))
        lines = [
            f"{_count(len(self._targets), 'node')} of {len(self._known):,}, {_count(elements, 'element')}, "
            f"{_count(len(self._requests), 'request')}, merged by {self._options['merge']}",
            f"{_count(groups, 'group')}, {_count(rows, 'contiguous run')}, {_count(len(self.tables), 'launch')}: "
            + ", ".join(
                f"{b.name} on {t.device} ({_short(t.theta_dtype)}, Fishers {_short(t.fisher_dtype)})"
                for b, t in zip(self.backends, self.tables, strict=True)
            ),
            f"moves at most {_bytes(traffic.total)} a run: {_bytes(traffic.forget)} forget Fishers, "
            f"{_bytes(traffic.original)} original Fishers, {_bytes(traffic.theta)} parameters read and written",
        ]
        left_out = {name: None for skipped in self._resolved.skipped for name in skipped}
        if left_out:
            lines.append(f"left out for another shape or no counterpart: {', '.join(left_out)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Plan({len(self._targets)} nodes, {len(self.tables)} launches)"


@_nothing_collected()
def plan(
    dag: InheritanceDAG,
    requests: Iterable[ForgetRequest],
    alpha: PerNode | str = 10.0,
    lam: PerNode = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    merge: str = "max",
    scale: float = 1.0,
    on_mismatch: str = "error",
    backend: str | None = None,
    share: PerNode | None = None,
) -> Plan:
    """Compile the unlearning of all requests in all models they reach (FIUn with MFIM, arXiv 2408.08493).

    In every node n with a request at itself or an ancestor: m = scale * reduce_k (w_k F_k) over those requests; where
    m > alpha I, theta <- theta * min((lam I / m)^exponent, cap). docs/semantics.md has the edges.

    Args:
        dag: models, their original Fishers and who inherited from whom.
        requests: origin and forget Fisher of what is to be forgotten.
        alpha: selection threshold; one number, or {node: number} that covers every node reached; "auto" chooses each
            node's as `adaptive_alpha` does, from its own ratios m / I.
        lam: dampening constant; likewise.
        exponent, cap: shape and upper bound of the factor.
        merge: "max" (MFIM), "mean" or "sum".
        scale: applied to the merged Fisher, last.
        on_mismatch: "error", or "skip" to leave out parameters that a forget Fisher does not have in that shape.
        backend: name of one; None for use_backend, FIUN_FAST_BACKEND, or the default, in this order.
        share: for alpha="auto": |D_f| / |D| in (0, 1], one number or {node: number}.

    Raises:
        FiunError: a subclass for each kind of bad input, naming node, parameter, expected and found. Nothing has been
            changed by then.

    """
    if not isinstance(dag, InheritanceDAG):
        raise ArgumentError(f"dag is a {type(dag).__name__}, expected an InheritanceDAG")
    listed = check_requests(requests)
    if merge not in MERGES:
        raise ArgumentError(f"merge is {merge!r}, expected one of {', '.join(MERGES)}")
    if on_mismatch not in ("error", "skip"):
        raise ArgumentError(f'on_mismatch is {on_mismatch!r}, expected "error" or "skip"')
    narrowest = min((r.fisher.buffer.dtype for r in listed), key=lambda dtype: dtype.itemsize)
    numbers = {"exponent": exponent, "cap": cap, "scale": scale}
    options: dict[str, float | str] = {key: check_number(key, value, narrowest) for key, value in numbers.items()}
    options["merge"] = merge
    shares = _shares(alpha, share, dag)
    alphas = _per_node("alpha", 0.0 if isinstance(alpha, str) else alpha, dag, narrowest)
    lams = _per_node("lam", lam, dag, narrowest)
    targets = []
    for name, sources in dag.reached_by(listed).items():
        node = dag.graph.nodes[name]
        if node.get("fisher") is None:
            raise ArgumentError(
                f"node {name!r}: a request reaches it, but it has no original Fisher: add_model(…, fisher=…)"
            )
        for what, values in (("alpha", alphas), ("lam", lams), *([] if shares is None else [("share", shares)])):
            if name not in values:
                raise ArgumentError(f"{what} has no value for node {name!r}, which a request reaches")
        targets.append(Target(name, node["model"], node["fisher"], sources, alphas[name], lams[name]))
    compiled = Plan(targets, listed, frozenset(dag), options, on_mismatch, backend)
    if shares is not None:
        q = np.array([adaptive_percentile(shares[name]) for name in compiled.nodes])
        compiled.set_values_(alpha=dict(zip(compiled.nodes, compiled._ratios().percentiles(q).tolist(), strict=True)))
    return compiled


def dampen_(
    model: Model,
    original: Fisher,
    forget: Fisher | Sequence[Fisher],
    alpha: float | str = 10.0,
    lam: float = 1.0,
    exponent: float = 1.0,
    cap: float = 1.0,
    merge: str = "max",
    scale: float = 1.0,
    on_mismatch: str = "error",
    backend: str | None = None,
    dry_run: bool = False,
    undo: bool = False,
    audit: bool = False,
    share: float | None = None,
) -> Report:
    """Dampen one model in place: Selective Synaptic Dampening (arXiv 2308.07707), the one-node case of `plan`.

    Args:
        model: module, or dict of tensors.
        original: Fisher over the data the model was trained on.
        forget: Fisher over the data to be forgotten; several are merged on the fly.
        dry_run, undo, audit: as in `Plan.run_`.

    The other arguments are those of `plan`; alpha, lam and share are numbers here, alpha may be "auto".

    Returns:
        A report whose totals (`.selected`, `.zeroed`, …) are those of the model; its node is called "model".

    Raises:
        FiunError: as `plan`.

    """
    if not isinstance(original, Fisher):
        raise ArgumentError(f"original is a {type(original).__name__}, expected a fiun_fast.Fisher")
    dag = InheritanceDAG()
    dag.add_model("model", model, fisher=original)
    forgets = [forget] if isinstance(forget, Fisher) else list(forget)
    requests = [ForgetRequest("model", f) for f in forgets]
    compiled = plan(dag, requests, alpha, lam, exponent, cap, merge, scale, on_mismatch, backend, share)
    dag.graph.clear()  # networkx graphs are cycles: without this, Fishers would wait for the garbage collector
    return compiled.run_(dry_run=dry_run, undo=undo, audit=audit)


def _shares(alpha: PerNode | str, share: PerNode | None, dag: InheritanceDAG) -> dict[str, float] | None:
    """Of each node, where alpha is "auto"."""
    if not isinstance(alpha, str):
        if share is not None:
            raise ArgumentError('share is for alpha="auto" only')
        return None
    if alpha != "auto":
        raise ArgumentError(f'alpha is a str, {alpha!r}, expected a number, {{node: number}} or "auto"')
    if not isinstance(share, Mapping):
        return dict.fromkeys(dag, check_share("share", share))
    _per_node("share", share, dag, torch.float64)
    return {name: check_share(f"share[{name!r}]", number) for name, number in share.items()}


def _per_node(
    what: str, value: PerNode, dag: InheritanceDAG | Mapping[str, None], dtype: torch.dtype
) -> Mapping[str, float]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(dag, check_number(what, value, dtype))
    for name in value:
        if name not in dag:
            raise ArgumentError(f"{what} has a value for {name!r}, which is no node of the DAG")
    return {name: check_number(f"{what}[{name!r}]", number, dtype) for name, number in value.items()}


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("ch") else "s")


def _bytes(n: int) -> str:
    size, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{n} B" if unit == "B" else f"{size:.3g} {unit}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
