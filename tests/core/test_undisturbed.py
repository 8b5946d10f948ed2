"""Runs and their undoing are whole: whatever signal, failure or other thread comes between."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from torch import nn

import fiun_fast as ff
from fiun_fast import undo as undo_module
from fiun_fast.guards import alone, signals_deferred
from fiun_fast.kernels.reference import _Dampening


def family(n: int = 3, numel: int = 2000) -> tuple[ff.InheritanceDAG, dict, list]:
    """Nodes of two dtypes, so that a plan has two launches."""
    dag, models = ff.InheritanceDAG(), {}
    for i in range(n):
        dtype = torch.float32 if i % 2 == 0 else torch.bfloat16
        models[f"n{i}"] = {"w": torch.rand(numel).add(0.5).to(dtype)}
        dag.add_model(f"n{i}", models[f"n{i}"], ff.Fisher.from_dict({"w": torch.rand(numel)}), parents=["n0"] * (i > 0))
    return dag, models, [ff.ForgetRequest("n0", ff.Fisher.from_dict({"w": torch.rand(numel)}))]


def state(models: dict) -> dict:
    return {name: model["w"].clone() for name, model in models.items()}


def same(models: dict, values: dict) -> bool:
    return all(torch.equal(model["w"], values[name]) for name, model in models.items())


class StopError(Exception):
    """What a handler or a failing step raises."""


@pytest.fixture
def interrupting(monkeypatch):
    """The reference backend, in whose launches a signal arrives after the first write of a run; Ctrl-C or a timer's."""

    def install(number: int, at: int) -> None:
        original, calls = _Dampening.run, [0]

        def run(self, counts, dry_run=False):
            original(self, counts, dry_run)
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(_Dampening, "run", run)

    return install


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM])
def test_a_signal_in_a_run_leaves_all_or_nothing(interrupting, number, undo):
    def handler(number, frame):
        raise StopError

    dag, models, requests = family()
    plan = ff.plan(dag, requests, alpha=0.5, backend="reference")
    assert len(plan.parts) == 2
    before = state(models)
    plan.run_()
    after = state(models)
    for name, model in models.items():
        model["w"].copy_(before[name])
    interrupting(number, at=1)
    versions = [model["w"]._version for model in models.values()]
    old = signal.signal(number, handler)
    try:
        with pytest.raises(StopError):
            plan.run_(undo=undo)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, old)
    assert same(models, before if undo else after)
    assert not same(models, after if undo else before)
    assert all(model["w"]._version > version for model, version in zip(models.values(), versions, strict=True))


def test_a_run_that_fails_is_taken_back_by_its_log(monkeypatch):
    dag, models, requests = family()
    plan = ff.plan(dag, requests, alpha=0.5)
    before = state(models)

    def no_memory(*_):
        raise MemoryError("sealing")

    with monkeypatch.context() as patch:
        patch.setattr(undo_module, "_fingerprint", no_memory)
        with pytest.raises(MemoryError, match="sealing"):
            plan.run_(undo=True)
    assert same(models, before)
    with monkeypatch.context() as patch:
        patch.setattr(undo_module, "_fingerprint", no_memory)
        patch.setattr(undo_module.UndoLog, "restore_", no_memory)
        with pytest.raises(ff.UndoError, match=r"could not be taken back .* error\.log\.undo_\(force=True\)") as caught:
            plan.run_(undo=True)
    assert not same(models, before)
    caught.value.log.undo_(force=True)
    assert same(models, before)


def test_an_undo_that_was_cut_off_goes_on(monkeypatch):
    dag, models, requests = family()
    before = state(models)
    report = ff.plan(dag, requests, alpha=0.5).run_(undo=True)
    original, calls = torch.Tensor.index_copy_, [0]

    def copy(self, *arguments):
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "index_copy_", copy)
        with pytest.raises(MemoryError):
            report.undo_()
    assert not same(models, before)
    report.undo_()
    assert same(models, before)
    with pytest.raises(ff.UndoError, match="undone already"):
        report.undo_()


def test_an_undo_is_not_interrupted(monkeypatch):
    dag, models, requests = family()
    before = state(models)
    report = ff.plan(dag, requests, alpha=0.5).run_(undo=True)
    original = torch.Tensor.index_copy_

    def copy(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "index_copy_", copy)
    with pytest.raises(KeyboardInterrupt):
        report.undo_()
    assert same(models, before)


def test_handlers_are_put_back_whatever_they_do():
    called = []

    def first(number, frame):
        called.append(number)
        raise StopError

    def both() -> None:
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGINT)

    old = signal.signal(signal.SIGUSR1, first)
    try:
        with pytest.raises(KeyboardInterrupt):  # called too, though the first has raised
            both()
        assert called == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is first
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, old)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_many_threads_one_model(backend):
    """As often as there are runs, each element is dampened once a run, and each report counts one whole run."""
    if backend not in ff.available_backends():
        pytest.skip(f"backend {backend} cannot be used here")
    numel, threads, runs = 4096, 6, 5
    model = {"w": torch.ones(numel)}
    original, forget = (
        ff.Fisher.from_dict({"w": torch.ones(numel)}),
        ff.Fisher.from_dict({"w": torch.full((numel,), 2.0)}),
    )
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, original)
    plans = [ff.plan(dag, [ff.ForgetRequest("m", forget)], alpha=1.0, backend=backend) for _ in range(2)]
    selected: list[int] = []
    errors: list[BaseException] = []
    gate = threading.Barrier(threads)

    def work(k: int) -> None:
        try:
            gate.wait()
            for _ in range(runs):
                selected.append(plans[k % 2].run_()["m"].selected)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert selected == [numel] * (threads * runs)
    assert torch.equal(model["w"], torch.full((numel,), 0.5 ** (threads * runs)))


def test_trials_and_runs_in_two_threads():
    dag, models, requests = family()
    plan = ff.plan(dag, requests, alpha=0.5)
    before = state(models)
    errors: list[BaseException] = []

    def others() -> None:
        try:
            for _ in range(20):
                with pytest.raises(ff.ArgumentError, match="trials are under way"):
                    plan.run_()
        except BaseException as error:
            errors.append(error)

    with plan.trials(alpha=0.1) as trials:
        worker = threading.Thread(target=others)
        worker.start()
        for alpha in (0.1, 0.5, 0.9):
            trials.run(alpha=alpha)
        worker.join()
    assert not errors
    assert same(models, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_child_of_fork_is_not_locked_out():
    """Forked while another thread is in a run, as a DataLoader may."""
    held, done = threading.Event(), []

    def hold() -> None:
        with alone:
            held.set()
            time.sleep(0.1)
            done.append(True)

    worker = threading.Thread(target=hold)
    worker.start()
    held.wait(10)
    child = os.fork()
    if child == 0:  # in another thread: this one may hold the lock
        free: list[bool] = []
        other = threading.Thread(target=lambda: free.append(alone.acquire(timeout=5)))
        other.start()
        other.join()
        os._exit(0 if free == [True] and done else 1)
    worker.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def flushing():
    """The mode in which denormal numbers read as 0, on this thread and torch's."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such mode")
    torch.set_flush_denormal(False)
    yield lambda: torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("numel", [60, 100_000])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_denormal_numbers_count_in_every_mode(flushing, backend, numel):
    if backend not in ff.available_backends():
        pytest.skip(f"backend {backend} cannot be used here")
    generator = torch.Generator().manual_seed(torch.seed())

    def denormal() -> torch.Tensor:
        return torch.randint(0, 1 << 20, (numel,), generator=generator, dtype=torch.int32).view(torch.float32).clone()

    values, original = denormal(), ff.Fisher.from_dict({"w": denormal()})
    forgets = [ff.Fisher.from_dict({"w": denormal()}) for _ in range(2)]
    results = []
    for flush in (False, True):
        model = {"w": nn.Parameter(values.clone())}
        if flush:
            flushing()
        merged = ff.merge_fishers(forgets, backend=backend).buffer
        report = ff.dampen_(model, original, forgets, alpha=1.5, lam=0.7, backend=backend, undo=True, audit=True)
        profile = ff.selection_profile(original, forgets, model, backend=backend)
        found = profile.selected(1.5)
        torch.set_flush_denormal(False)
        results.append((merged.clone(), model["w"].detach().clone(), report.selected, report.zeroed, found))
        if flush:
            flushing()
        report.undo_()
        torch.set_flush_denormal(False)
        assert torch.equal(model["w"].detach().view(torch.int32), values.view(torch.int32))
    (merged, theta, *counts), (its_merged, its_theta, *its_counts) = results
    assert torch.equal(merged, its_merged)
    assert torch.equal(theta, its_theta)
    assert not torch.equal(theta, values)
    assert counts == its_counts


def test_an_error_in_the_block_does_not_swallow_a_signal():
    def fails() -> None:
        with signals_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            raise StopError

    with pytest.raises(KeyboardInterrupt):
        fails()


def test_a_handler_that_could_not_be_put_back_still_works():
    """As when a timer's handler raises while the others are put back."""
    raised = []
    with signals_deferred():
        left = signal.getsignal(signal.SIGINT)
    assert left is not signal.default_int_handler
    try:
        left(signal.SIGINT, None)
    except KeyboardInterrupt:
        raised.append(True)
    assert raised


@pytest.mark.parametrize("move", [ff.flatten_, lambda model: ff.stack_([model])])
def test_memory_is_not_moved_under_a_run(move):
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    layout = ff.Layout.from_module(model)
    original, forget = (ff.Fisher(torch.rand(layout.numel), layout) for _ in range(2))
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, original)
    plan = ff.plan(dag, [ff.ForgetRequest("m", forget)], alpha=1.0, lam=1.0)
    end = time.monotonic() + 0.5
    errors: list[BaseException] = []

    def moving() -> None:
        try:
            while time.monotonic() < end:
                move(model)
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=moving)
    worker.start()
    while time.monotonic() < end:
        plan.run_()
    worker.join()
    assert not errors


def test_another_plan_is_refused_where_trials_are_under_way():
    dag, models, requests = family()
    before = state(models)
    plan, other = (ff.plan(dag, requests, alpha=0.5) for _ in range(2))
    apart, _, its_requests = family()
    with plan.trials(alpha=0.1) as trials:
        trials.run()
        with pytest.raises(ff.ArgumentError, match="under way on parameters of this plan"):
            other.run_()
        other.run_(dry_run=True)
        ff.plan(apart, its_requests, alpha=0.5).run_()
    assert same(models, before)
    other.run_()
    assert not same(models, before)
