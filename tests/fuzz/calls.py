"""Steps of the machine that call the package: each says whether it may succeed, and what must be there afterwards."""

from __future__ import annotations

import copy
import pickle
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from machine import Machine
from torch import Tensor
from world import (
    ALPHAS,
    ANY,
    LAMS,
    LAYOUT,
    NODE,
    PARAMETER,
    PARENTS,
    SHAPES,
    Kept,
    Key,
    Log,
    Net,
    Outcome,
    Planned,
    bits,
    fisher_fits,
    fits,
    is_whole,
    mapping_of,
    on_the_way,
    overlap,
    parameter_of,
    place,
    step,
)

import fiun_fast as ff


class Calls(Machine):
    """Plans, runs, undos, trials, looks."""

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
