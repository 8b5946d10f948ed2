"""Random sequences of operations on live objects, against a model of what must hold, as a hypothesis state machine.

Before each call of the package the machine takes down every byte of every storage it knows, and works out in plain
torch what the call must do: whether it may succeed, what each parameter holds afterwards, what is counted. A call that
raises a FiunError must have changed nothing; no other exception may come out; bytes beside the parameters that were
meant (other models, layers that are dead, elements around a view, Fishers) never change.

Arguments of all steps are plain numbers, so that a sequence is a list of names and numbers: `replay` takes one from
tests/fuzz/corpus. Each step is written to `Machine.journal` before it is done, so that a crash can be traced.
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TextIO

import torch
from cases import merge_textbook, reaches, ssd_modify_weight
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor, nn

import fiun_fast as ff

PARENTS = {"a": (), "b": ("a",), "c": ("a", "b"), "d": ()}
SHAPES = {"scale": (), "first.weight": (4, 4), "first.bias": (4,), "rest.0.weight": (4, 4), "rest.1.weight": (3, 4)}
LAYOUT = ff.Layout(SHAPES)
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ALPHAS, LAMS = [1.0, 0.0, 0.5, 2.0, 1000.0], [0.5, 0.0, 1.0, 3.0, 1e-40]
EDGES = [0.0, 1e-45, 1e-38, 1.0, 3e38, float("inf"), float("nan")]
Key = tuple[str, str]  # node, parameter


class Net(nn.Module):
    """Parameters at three depths."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rest = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
        self.scale = nn.Parameter(torch.empty(()))
        self.load_state_dict(dict(values), assign=True)


Model = Net | dict[str, Tensor]


def mapping_of(model: Model, name: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that holds a parameter, and its key there; None where a submodule on the way is missing."""
    if isinstance(model, dict):
        return model, name
    *path, key = name.split(".")
    module: nn.Module | None = model
    for part in path:
        module = None if module is None else module._modules.get(part)
    return (None if module is None else module._parameters), key


def parameter_of(model: Model, name: str) -> Tensor | None:
    held, key = mapping_of(model, name)
    return None if held is None else held.get(key)


def on_the_way(model: Model) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Submodules on the way to parameters: what holds each, under which key."""
    found = []
    if isinstance(model, Net):
        for path in ("first", "rest", "rest.0", "rest.1"):
            above, _, key = path.rpartition(".")
            parent: Any = model._modules.get(above) if above else model
            child = None if parent is None else parent._modules.get(key)
            if child is not None:
                found.append((parent._modules, key, child))
    return found


def needed(tensor: Tensor) -> int:
    """Bytes from the beginning of the storage to the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.itemsize


def is_whole(tensor: object) -> bool:
    """Whether it is a tensor in main memory that has all of it: torch itself may crash where it has not."""
    return isinstance(tensor, Tensor) and tensor.is_cpu and tensor.untyped_storage().nbytes() >= needed(tensor)


def span(tensor: Tensor) -> tuple[int, int]:
    first = tensor.data_ptr()
    return first, first + needed(tensor) - tensor.storage_offset() * tensor.itemsize


def overlap(tensors: Iterable[Tensor]) -> bool:
    spans = sorted(span(t) for t in tensors if t.numel())
    return any(start < end for (_, end), (start, _) in zip(spans, spans[1:]))


def place(tensor: Tensor) -> tuple:
    held = tensor.untyped_storage().nbytes()
    return tensor.data_ptr(), held, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(INTEGER[tensor.itemsize])


def random_fisher(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(LAYOUT.numel, dtype=torch.float64, generator=generator).square()
    edges = torch.tensor(EDGES, dtype=torch.float64)[torch.randint(len(EDGES), values.shape, generator=generator)]
    return torch.where(torch.rand(values.shape, generator=generator) < 0.3, edges, values).to(dtype)


@dataclass
class Planned:
    """A plan, and what it was made of."""

    plan: ff.Plan
    origins: tuple[str, ...]
    forgets: tuple[ff.Fisher, ...]
    weights: tuple[float, ...]
    alpha: dict[str, float]
    lam: dict[str, float]

    def requests(self, node: str) -> list[int]:
        return [k for k, origin in enumerate(self.origins) if reaches(PARENTS, origin, node)]

    @property
    def nodes(self) -> list[str]:
        return [node for node in PARENTS if self.requests(node)]


@dataclass
class Outcome:
    """What a run must do: new values and counts, and which elements it selects."""

    values: dict[Key, Tensor]
    counts: dict[str, list[int]]
    chosen: dict[Key, Tensor]


@dataclass
class Kept:
    """One parameter in an undo log, as the machine remembers it."""

    index: Tensor
    old: Tensor
    left: Tensor
    like: Tensor  # shape and dtype
    home: tuple[dict[str, Any], str, tuple]


@dataclass
class Log:
    """An undo log, and when it may be used."""

    log: ff.UndoLog
    kept: dict[Key, Kept]
    links: list[tuple[dict[str, Any], str, nn.Module]]
    loaded: bool = False  # from a file: it does not know where the models are
    copied: bool = False  # its own copy of the models is elsewhere
    done: bool = field(default=False)


def fits(parameter: object, like: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is one that a run may write to."""
    return (
        is_whole(parameter)
        and tuple(parameter.shape) == shape
        and parameter.is_contiguous()
        and parameter.dtype in DTYPES
        and (like is None or parameter.dtype == like.dtype)
    )


def fisher_fits(fisher: ff.Fisher) -> bool:
    buffer = vars(fisher).get("buffer")
    return (
        is_whole(buffer)
        and buffer.shape == (LAYOUT.numel,)
        and buffer.is_contiguous()
        and buffer.dtype in (torch.float32, torch.float64)
    )


STEPS: dict[str, st.SearchStrategy[dict[str, Any]]] = {}


def step(**arguments: st.SearchStrategy) -> Callable:
    """Something that may happen, and its arguments; it is written down before it is done."""

    def decorate(function: Callable[..., None]) -> Callable:
        STEPS[function.__name__] = st.fixed_dictionaries(arguments)

        @functools.wraps(function)
        def recorded(self: Machine, **values: Any) -> None:
            self.note(function.__name__, values)
            function(self, **values)

        return recorded

    return decorate


def one_of(**weights: int) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A step and its arguments; how often each."""
    names = [name for name, weight in weights.items() for _ in range(weight)]
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), STEPS[name]))


SEED, NODE, PARAMETER = st.integers(0, 99), st.sampled_from(sorted(PARENTS)), st.sampled_from(sorted(SHAPES))
ANY = st.integers(0, 9)  # which of those there are, modulo their number


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

    # ---- calls of the package ---------------------------------------------------------------------------------------

    @step(
        origins=st.lists(NODE, min_size=1, max_size=3),
        alpha=st.sampled_from(ALPHAS),
        lam=st.sampled_from(LAMS),
        weight=st.sampled_from([1.0, 0.5, 0.0]),
        backend=st.sampled_from([None, "cpu", "reference"]),
    )
    def make_plan(self, origins: list[str], alpha: float, lam: float, weight: float, backend: str | None) -> None:
        forgets = tuple(self.forgets[k % 2] for k in range(len(origins)))
        weights = (weight, *[1.0] * (len(origins) - 1))
        requests = [ff.ForgetRequest(o, f, w) for o, f, w in zip(origins, forgets, weights, strict=True)]
        values = dict.fromkeys(PARENTS, alpha), dict.fromkeys(PARENTS, lam)
        trial = Planned(None, tuple(origins), forgets, weights, *values)  # type: ignore[arg-type]
        may = self.may_run(trial)
        may = False if may is None else may  # what is shared with others is noticed when a plan is made
        made = self.call(lambda: ff.plan(self.dag, requests, alpha=alpha, lam=lam, backend=backend), may)
        if made is not None:
            self.plans = [*self.plans[-2:], replace(trial, plan=made)]

    @step(which=ANY, how=st.sampled_from(["run", "undo", "dry", "audit", "undo and audit"]))
    def run(self, which: int, how: str) -> None:
        planned = self.plans[which % len(self.plans)]
        may = self.may_run(planned)
        outcome = None if may is False else self.textbook(planned)
        versions, kept, links = {}, {}, []
        if outcome is not None:
            for node, name in outcome.values:
                parameter = parameter_of(self.models[node], name)
                versions[node, name] = 0 if parameter.is_inference() else parameter._version
                index = outcome.chosen[node, name].nonzero().view(-1)
                home = (*mapping_of(self.models[node], name), place(parameter))
                flat = bits(parameter)
                old, left = flat[index].clone(), bits(outcome.values[node, name])[index]
                if len(index):
                    kept[node, name] = Kept(index, old, left, parameter.detach().clone(), home)
            links = [link for node in planned.nodes for link in on_the_way(self.models[node])]
        options = {"dry_run": how == "dry", "undo": "undo" in how, "audit": "audit" in how}
        report = self.call(
            lambda: planned.plan.run_(**options),
            may,
            lambda _: {} if how == "dry" else outcome.values,  # type: ignore[union-attr]
        )
        if report is None or outcome is None:
            return
        self.check_counts(report, outcome.counts)
        if how != "dry":
            for (node, name), version in versions.items():
                assert parameter_of(self.models[node], name)._version > version, "autograd was not told"
        if "undo" in how:
            self.logs = [*self.logs[-3:], Log(report.undo, kept, links)]

    @step(which=ANY, number=st.integers(2, 4), undo=st.booleans())
    def run_in_threads(self, which: int, number: int, undo: bool) -> None:
        """Each run is one after another for whoever looks, or refused."""
        planned = self.plans[which % len(self.plans)]
        may = self.may_run(planned)
        if may is not True:
            return
        reports: list[Any] = [None] * number
        start = threading.Barrier(number)

        def one(i: int) -> None:
            start.wait()
            try:
                reports[i] = planned.plan.run_(undo=undo)
            except BaseException as error:
                reports[i] = error

        def work() -> list[ff.Report]:
            threads = [threading.Thread(target=one, args=(i,)) for i in range(number)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for report in reports:
                if isinstance(report, BaseException) and not isinstance(report, ff.FiunError):
                    raise report
            return [report for report in reports if not isinstance(report, BaseException)]

        counts: list[dict[str, list[int]]] = []

        def one_after_another(done: list[ff.Report]) -> dict[Key, Tensor]:
            assert done, "all were refused"
            values = None
            for _ in done:
                outcome = self.textbook(planned, values)
                values = outcome.values
                counts.append(outcome.counts)
            return values  # type: ignore[return-value]

        before = {
            key: parameter_of(self.models[key[0]], key[1]).detach().reshape(-1).clone()
            for key in ((node, name) for node in planned.nodes for name in SHAPES)
        }
        base = self.textbook

        def from_before(p: Planned, values: Mapping[Key, Tensor] | None = None) -> Outcome:
            return base(p, before if values is None else values)

        self.textbook = from_before  # type: ignore[method-assign]
        try:
            done = self.call(work, None, one_after_another)
        finally:
            del self.textbook
        found = [{n.name: [n.selected, n.zeroed, n.nonfinite] for n in report} for report in done]
        assert sorted(map(repr, found)) == sorted(map(repr, counts)), f"counted {found}, expected {counts}"

    @step(
        which=ANY,
        force=st.sampled_from([False, False, True]),
        where=st.sampled_from(["home", "home", "dag", "models", "copy"]),
    )
    def undo(self, which: int, force: bool, where: str) -> None:
        log = self.logs[which % len(self.logs)]
        if where == "copy":
            if not self.whole():
                return
            models = copy.deepcopy(self.models)
            self.others += models.values()
        else:
            models = self.models
        values: dict[Key, Tensor] = {}
        may = not log.done
        if where == "home":
            may &= not log.loaded and all(held.get(key) is module for held, key, module in log.links)
            may &= not (log.copied and bool(log.kept))
        targets = []
        for (node, name), kept in log.kept.items():
            parameter = parameter_of(models[node], name)
            if where == "home":
                held, key, there = kept.home
                parameter = held.get(key)
                may &= isinstance(parameter, Tensor) and place(parameter) == there
            may &= fits(parameter, kept.like, tuple(kept.like.shape))
            if not may:
                break
            targets.append(parameter)
            now = bits(parameter).clone()
            may &= force or torch.equal(now[kept.index], kept.left)
            now[kept.index] = kept.old
            values[node, name] = now.view(kept.like.dtype)
        if overlap(targets):
            return
        if log.copied and where == "home" and log.kept:
            may = False
        argument = {"home": None, "dag": self.dag}.get(where, models)
        everything = self.models
        self.models = models
        try:
            done = self.call(lambda: log.log.undo_(argument, force=force), may, lambda _: values)
        finally:
            self.models = everything
        log.done |= done is not None

    @step(which=ANY, how=st.sampled_from(["file", "deepcopy", "pickle"]))
    def copy_log(self, which: int, how: str) -> None:
        log = self.logs[which % len(self.logs)]
        if how == "file":
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "log"
                made = self.call(lambda: (log.log.save(path), ff.UndoLog.load(path))[1], True)
            self.logs = [*self.logs[-3:], replace(log, log=made, loaded=True, copied=False, done=False)]
        elif self.whole():
            through = {"deepcopy": copy.deepcopy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}[how]
            made = self.call(lambda: through(log.log), True)
            self.logs = [*self.logs[-3:], replace(log, log=made, copied=True)]

    @step(
        which=ANY,
        node=NODE,
        alpha=st.sampled_from([*ALPHAS, -1.0, float("nan")]),
        lam=st.sampled_from(LAMS),
        one=st.booleans(),
    )
    def set_values(self, which: int, node: str, alpha: float, lam: float, one: bool) -> None:
        planned = self.plans[which % len(self.plans)]
        values = {"alpha": {node: alpha}, "lam": {node: lam}} if one else {"alpha": alpha, "lam": lam}
        fishers = [f for f in planned.forgets if not isinstance(vars(f).get("buffer"), Tensor)]
        if fishers or any(not fisher_fits(f) for f in planned.forgets):
            return
        if self.call(lambda: planned.plan.set_values_(**values), alpha >= 0) is not None:
            for name in [node] if one else PARENTS:
                planned.alpha[name], planned.lam[name] = alpha, lam

    @step(
        which=ANY,
        lowest=st.sampled_from(ALPHAS),
        tried=st.lists(st.tuples(st.sampled_from(ALPHAS), st.sampled_from(LAMS)), max_size=3),
        end=st.sampled_from(["as usual", "as usual", "raise", "replace", "run"]),
        node=NODE,
        name=PARAMETER,
    )
    def trials(self, which: int, lowest: float, tried: list, end: str, node: str, name: str) -> None:
        planned = self.plans[which % len(self.plans)]
        if any(not fisher_fits(f) for f in planned.forgets):
            return
        may = self.may_run(planned)
        if may is None:
            return
        context = planned.plan.trials(alpha=lowest)
        trials = self.call(context.__enter__, may)
        if trials is None:
            return
        before = {(n, key): bits(parameter_of(self.models[n], key)).clone() for n in planned.nodes for key in SHAPES}
        start = {key: b.view(parameter_of(self.models[key[0]], key[1]).dtype) for key, b in before.items()}
        can_change = self.textbook(replace(planned, alpha=dict.fromkeys(PARENTS, lowest))).chosen
        lam_now = dict(planned.lam)
        changed = False
        for alpha, lam in tried:
            lam_now = dict.fromkeys(PARENTS, lam) if alpha >= lowest else lam_now
            trial = replace(planned, alpha=dict.fromkeys(PARENTS, alpha), lam=lam_now)
            outcome = self.textbook(trial, start)
            live = self.everything()
            others = {key: view.clone() for key, (_, view) in live.items()}
            try:
                report = trials.run(alpha=alpha, lam=lam)
            except ff.ArgumentError:
                assert alpha < lowest, "refused"
                expected, changed = start, False
            else:
                assert alpha >= lowest, "a trial below the lowest ran"
                self.check_counts(report, outcome.counts)
                expected, changed = outcome.values, True
            for key, value in expected.items():
                self.set_bytes(others, parameter_of(self.models[key[0]], key[1]), value)
            for key, (_, view) in live.items():
                if not torch.equal(view, others[key]):
                    self.explain(others, key, view)
        may = True
        if end == "replace" and node in planned.nodes:
            may = not (changed and bool(can_change[node, name].any()))
            self.put(node, name, parameter_of(self.models[node], name).detach().clone())
            start.pop((node, name), None)
        if end == "run":
            self.call(lambda: planned.plan.run_(), False)

        def leave() -> None:
            if end != "raise":
                context.__exit__(None, None, None)
                return
            try:
                if context.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is True:
                    raise AssertionError("an interrupt was swallowed")
            except KeyboardInterrupt:
                pass

        self.call(leave, may, lambda _: start if changed else {})

    @step(which=ANY, what=st.sampled_from(["profile", "norms", "print", "merge", "dampen", "digest", "file", "pickle"]))
    def look(self, which: int, what: str) -> None:
        """Whatever only reads: done or refused, nothing changes."""
        planned = self.plans[which % len(self.plans)]
        fisher = planned.forgets[0]

        def through_a_file() -> None:
            with tempfile.TemporaryDirectory() as folder:
                fisher.save(Path(folder) / "f")
                loaded = ff.Fisher.load(Path(folder) / "f")
            assert loaded.layout == fisher.layout
            assert torch.equal(bits(loaded.buffer), bits(fisher.buffer))

        def pickled() -> None:
            again = pickle.loads(pickle.dumps(fisher))
            assert again.layout == LAYOUT
            assert hash(again.layout) == hash(LAYOUT)
            assert torch.equal(bits(again.buffer), bits(fisher.buffer))

        good = fisher_fits(fisher)
        may: dict[str, bool | None] = {"print": None, "profile": self.may_run(planned), "norms": self.may_run(planned)}
        work: dict[str, Callable[[], Any]] = {
            "profile": planned.plan.profile,
            "norms": lambda: planned.plan.profile(norms=True),
            "print": lambda: (str(planned.plan), planned.plan.traffic),
            "merge": lambda: ff.merge_fishers([fisher, fisher]),
            "dampen": lambda: ff.dampen_(self.models["d"], fisher, fisher, alpha=2.0, dry_run=True),
            "digest": fisher.sha256,
            "file": through_a_file,
            "pickle": pickled,
        }
        if what == "pickle" and not good:
            return
        its = self.of("d")
        dampens = good and all(fits(p, None, SHAPES[n]) for n, p in its.items()) and not overlap(its.values())
        self.call(work[what], may.get(what, dampens if what == "dampen" else good))

    @step(node=NODE)
    def flatten(self, node: str) -> None:
        model = self.models[node]
        if not isinstance(model, Net) or not all(map(is_whole, model.parameters())):
            return
        self.others += [p.detach() for p in model.parameters()]
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.call(lambda: ff.flatten_(model), None)
        for name, p in model.named_parameters():
            assert torch.equal(bits(p), bits(values[name])), "flatten_ changed a value"

    # ---- what users do to their objects, in plain torch --------------------------------------------------------------

    def whole(self) -> bool:
        """Whether torch may read all tensors: it crashes itself where storages were freed."""
        known = [
            p
            for model in self.models.values()
            for p in (model.parameters() if isinstance(model, nn.Module) else model.values())
        ]
        return all(map(is_whole, [*known, *self.tensors()]))

    def put(self, node: str, name: str, tensor: Tensor) -> None:
        held, key = mapping_of(self.models[node], name)
        if held is not None:
            if isinstance(held.get(key), Tensor):
                self.others.append(held[key].detach())
            held[key] = (
                tensor
                if isinstance(self.models[node], dict)
                else nn.Parameter(tensor.detach(), tensor.is_floating_point())
            )

    @step(node=NODE, kind=st.integers(0, 3), again=st.integers(0, 3))
    def cast(self, node: str, kind: int, again: int) -> None:
        """To one dtype and on to another: memory of the first is free again, and may be handed out."""
        model = self.models[node]
        known = model.parameters() if isinstance(model, Net) else model.values()
        if not all(map(is_whole, known)):
            return
        for dtype in (DTYPES[kind], DTYPES[again]):
            if isinstance(model, Net):
                model.to(dtype)
            else:
                model.update({name: tensor.to(dtype) for name, tensor in model.items()})

    @step(
        node=NODE,
        name=PARAMETER,
        how=st.sampled_from(
            ["clone", "half", "turn", "shrink", "same memory", "offset", "reshape", "meta", "integers", "repair"]
        ),
    )
    def replace_data(self, node: str, name: str, how: str) -> None:
        parameter = parameter_of(self.models[node], name)
        if not isinstance(parameter, Tensor):
            return
        if how == "repair" or not is_whole(parameter):
            self.put(node, name, torch.ones(SHAPES[name]))
            return
        data = parameter.detach()
        base = torch.zeros(data.numel() + 9, dtype=data.dtype)
        new: dict[str, Callable[[], Tensor]] = {
            "clone": data.clone,
            "half": data.half,
            "turn": lambda: data.t() if data.dim() == 2 else data,
            "shrink": lambda: data.reshape(-1)[:2],
            "same memory": lambda: data.view(data.shape),
            "offset": lambda: base[3 : 3 + data.numel()].view(data.shape).copy_(data),
            "reshape": lambda: data.reshape(-1),
            "meta": lambda: data.to("meta"),
            "integers": lambda: bits(data).view(data.shape) if data.is_contiguous() else data,
        }
        made = new[how]()
        if isinstance(self.models[node], dict):
            self.put(node, name, made)
        elif made.device == parameter.device:
            self.others.append(data)
            parameter.requires_grad_(parameter.requires_grad and made.is_floating_point())
            parameter.data = made
        elif how == "meta":
            self.put(node, name, made)

    @step(node=NODE, name=PARAMETER, back=st.booleans())
    def free(self, node: str, name: str, back: bool) -> None:
        parameter = parameter_of(self.models[node], name)
        if not isinstance(parameter, Tensor) or not parameter.is_cpu:
            return
        storage = parameter.untyped_storage()
        if not storage.resizable():
            return
        if not back:
            storage.resize_(0)
        elif storage.nbytes() < needed(parameter):
            storage.resize_(needed(parameter))
            torch.empty(0, dtype=torch.uint8).set_(storage).zero_()

    @step(node=NODE, assign=st.booleans(), seed=SEED)
    def load_state(self, node: str, assign: bool, seed: int) -> None:
        model = self.models[node]
        if not isinstance(model, Net) or not all(map(is_whole, model.parameters())):
            return
        generator = torch.Generator().manual_seed(seed)
        state = {k: torch.randn(v.shape, generator=generator).to(v.dtype) for k, v in model.state_dict().items()}
        if any(v.is_floating_point() != p.is_floating_point() for v, p in zip(state.values(), model.parameters())):
            return
        self.others += [p.detach() for p in model.parameters()]
        model.load_state_dict(state, assign=assign)

    @step(node=NODE, what=st.sampled_from(["first", "rest", "rest.0", "rest.1"]), gone=st.booleans(), seed=SEED)
    def exchange_module(self, node: str, what: str, gone: bool, seed: int) -> None:
        model = self.models[node]
        if not isinstance(model, Net):
            return
        above, _, key = what.rpartition(".")
        parent: Any = model._modules.get(above) if above else model
        if parent is None:
            return
        if key in parent._modules:
            self.others.append(parent._modules[key])
        if gone:
            parent._modules.pop(key, None)
            return
        generator = torch.Generator().manual_seed(seed)
        fresh = Net({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})
        parent._modules[key] = fresh.get_submodule(what)

    @step(node=NODE, name=PARAMETER, seed=SEED, gone=st.booleans())
    def exchange_parameter(self, node: str, name: str, seed: int, gone: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.put(node, name, torch.randn(SHAPES[name], generator=generator))
        held, key = mapping_of(self.models[node], name)
        if gone and held is not None:
            self.others.append(held.pop(key).detach())

    @step(node=NODE, other=NODE, name=PARAMETER, another=PARAMETER)
    def share(self, node: str, other: str, name: str, another: str) -> None:
        tensor = parameter_of(self.models[other], another)
        if isinstance(tensor, Tensor) and tuple(tensor.shape) == SHAPES[name] and tensor.is_floating_point():
            self.put(node, name, tensor.detach())

    @step(node=NODE, name=PARAMETER, seed=SEED)
    def train(self, node: str, name: str, seed: int) -> None:
        parameter = parameter_of(self.models[node], name)
        if is_whole(parameter) and parameter.is_floating_point():
            generator = torch.Generator().manual_seed(seed)
            change = torch.randint(-1, 2, tuple(parameter.shape), generator=generator).to(parameter.dtype)
            with torch.no_grad():
                parameter.add_(change)

    @step(node=NODE, how=st.sampled_from(["deepcopy", "pickle"]))
    def copy_model(self, node: str, how: str) -> None:
        """The copy has the same bits, and nothing that happens to the model happens to the copy."""
        if self.whole():
            model = self.models[node]
            made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
            self.others.append(made)

    @step(
        which=st.integers(0, 5),
        seed=SEED,
        how=st.sampled_from(
            [
                "fresh",
                "in place",
                "repair",
                "double",
                "shorter",
                "none",
                "number",
                "free",
                "half",
                "strided",
                "pickle",
                "data",
            ]
        ),
    )
    def change_fisher(self, which: int, seed: int, how: str) -> None:
        fisher = [*self.fishers.values(), *self.forgets][which]
        buffer = vars(fisher).get("buffer")
        kind = buffer.dtype if isinstance(buffer, Tensor) and buffer.dtype == torch.float64 else torch.float32
        good = random_fisher(seed, kind)
        if not fisher_fits(fisher) or how in ("fresh", "repair"):
            others = [f.buffer.dtype for f in (*self.fishers.values(), *self.forgets) if fisher_fits(f)]
            fisher.buffer = random_fisher(seed, others[0] if others and how == "repair" else kind)
            return
        self.others.append(buffer)
        if how == "in place":
            buffer.copy_(good)
        elif how == "free":
            if buffer.untyped_storage().resizable():  # not after .numpy(), by which an audited run hashes it
                buffer.untyped_storage().resize_(0)
        elif how == "pickle":
            fisher.buffer = pickle.loads(pickle.dumps(fisher)).buffer
        elif how == "data":
            buffer.data = good[:5]
        elif how == "double":
            fisher.buffer = buffer.double()
        else:
            bad = {"shorter": good[:-1], "none": None, "number": 5, "half": good.half(), "strided": good.repeat(2)[::2]}
            fisher.buffer = bad[how]

    @step(node=NODE, fishers=st.booleans())
    def repair(self, node: str, fishers: bool) -> None:
        """Whatever is missing or has another shape or memory is made anew; dtypes stay."""
        model = self.models[node]
        fresh = Net({name: torch.ones(shape) for name, shape in SHAPES.items()})
        if isinstance(model, Net):
            for key in ("first", "rest"):
                model._modules.setdefault(key, fresh.get_submodule(key))
            for key in ("0", "1"):
                model.rest._modules.setdefault(key, fresh.rest.get_submodule(key))
        for name, shape in SHAPES.items():
            if not fits(parameter_of(model, name), None, shape):
                self.put(node, name, torch.ones(shape))
        for fisher in [*self.fishers.values(), *self.forgets] if fishers else []:
            if not fisher_fits(fisher) or fisher.buffer.dtype != torch.float32:
                fisher.buffer = random_fisher(7, torch.float32)

    @step(on=st.booleans())
    def flush_denormal(self, on: bool) -> None:
        """Kernels and plain torch give the same bits whatever this is."""
        torch.set_flush_denormal(on)

    @step(number=st.integers(1, 3))
    def use_threads(self, number: int) -> None:
        torch.set_num_threads(number)


MAKING = {"make_plan": 3, "repair": 4}
CALLS = {"run": 6, "undo": 5, "trials": 2, "run_in_threads": 2, "copy_log": 1, "set_values": 1, "look": 1, "flatten": 1}
CHANGES = {"cast": 3, "replace_data": 3, "free": 1, "load_state": 2, "exchange_module": 2, "exchange_parameter": 2}
CHANGES |= {"share": 1, "train": 3, "copy_model": 1, "change_fisher": 3, "use_threads": 1, "flush_denormal": 3}


class Random(Machine):
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
