"""Trials on a plan: runs that are taken back, values that are put back, and what one log can hold."""

import pytest
import torch
from cases import FAN, SIZES, Case, build

import fiun_fast as ff


@pytest.fixture
def problem():
    return build(Case("trials", FAN, ("root", "child3"), shapes=SIZES))


def same(before, after) -> bool:
    return all(torch.equal(after[key].view(torch.int32), value.view(torch.int32)) for key, value in before.items())


def test_every_trial_starts_from_the_same_state(problem):
    plan = problem.plan(None)
    before = problem.state()
    expected = {}
    for alpha in (4.0, 1.0, 2.0):
        fresh = build(problem.case)
        other = fresh.plan(None)
        other.set_values_(alpha=alpha, lam=0.25)
        expected[alpha] = other.run_().selected, fresh.state()
    with plan.trials(alpha=1.0) as trials:
        for alpha, (selected, state) in expected.items():
            report = trials.run(alpha=alpha, lam=0.25)
            assert report.selected == selected
            assert same(state, problem.state())
        trials.restore()
        assert same(before, problem.state())
        trials.run(alpha=1.0)
    assert same(before, problem.state()), "the last trial was not taken back"
    assert plan.run_(dry_run=True)["root"].alpha == 1.5, "the values of the trials stayed"
    assert plan.run_(dry_run=True)["root"].lam == 0.7


def test_everything_is_put_back_when_the_caller_raises(problem):
    plan, before = problem.plan(None), problem.state()

    def interrupted() -> None:
        with plan.trials(alpha=0.1) as trials:
            trials.run(alpha=0.5, lam=0.0)
            assert not same(before, problem.state())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert same(before, problem.state())
    assert plan.run_(dry_run=True)["root"].alpha == 1.5


def test_an_alpha_below_the_announced_one_is_refused_before_it_runs(problem):
    plan, before = problem.plan(None), problem.state()
    with plan.trials(alpha={"root": 2.0, "child3": 0.5}) as trials:
        with pytest.raises(ff.ArgumentError, match="node 'root': alpha 1 is below 2, the lowest that trials"):
            trials.run(alpha={"root": 1.0})
        assert same(before, problem.state())
        assert trials.run(alpha=1.0, dry_run=True).selected > 0  # a dry run has nothing to take back
    assert same(before, problem.state())


def test_a_plan_takes_what_tune_returns(problem):
    plan = problem.plan(None)
    plan.set_values_({"root": ff.Choice(3.0, 0.5, 1.0), "child0": ff.Choice(7.0, 0.1, 0.0)}, lam={"child0": 0.9})
    report = plan.run_(dry_run=True)
    assert (report["root"].alpha, report["root"].lam) == (3.0, 0.7)  # lam= was given, and wins
    assert (report["child0"].alpha, report["child0"].lam) == (7.0, 0.9)
    with pytest.raises(ff.ArgumentError, match="expected {node: Choice}"):
        plan.set_values_({"root": 3.0})


def test_trials_that_ended_and_runs_beside_them(problem):
    plan, before = problem.plan(None), problem.state()
    with plan.trials(alpha=1.0) as trials:
        with pytest.raises(ff.ArgumentError, match="trials are under way on this plan, and take back only"):
            plan.run_()
        with pytest.raises(ff.ArgumentError, match="under way on this plan already"):
            plan.trials().__enter__()
        assert plan.run_(dry_run=True).selected > 0
    with pytest.raises(ff.UndoError, match="these trials have ended"):
        trials.run(alpha=2.0)
    assert same(before, problem.state())
    plan.run_()


def test_a_refused_trial_leaves_the_values_as_they_were(problem):
    plan = problem.plan(None)
    with plan.trials(alpha=10.0) as trials:
        with pytest.raises(ff.ArgumentError, match="below 10"):
            trials.run(alpha=1.0)
        assert trials.run(lam=1.0)["root"].alpha == 10.0


def test_a_fisher_replaced_during_trials_is_noticed(problem):
    plan, before = problem.plan(None), problem.state()
    forget = problem.forgets[0]
    with plan.trials(alpha=1.0) as trials:
        trials.run(alpha=1.5)
        forget.buffer = torch.full_like(forget.buffer, 5000.0)
        with pytest.raises(ff.UndoError, match="moved or replaced since these trials began"):
            trials.run(alpha=2.0)
    assert same(before, problem.state())


def test_a_fisher_filled_in_place_during_trials_is_noticed(problem):
    plan, before = problem.plan(None), problem.state()
    with plan.trials(alpha=1.0) as trials:
        trials.run(alpha=1.5)
        problem.forgets[0].buffer.mul_(1000)
        with pytest.raises(ff.UndoError, match="a Fisher was changed since these trials began"):
            trials.run(alpha=1.5)
        trials.run(alpha=1.5, dry_run=True)
    assert same(before, problem.state())


def test_a_model_moved_during_trials_is_an_error_at_the_end(problem):
    plan = problem.plan(None)

    def moved() -> None:
        with plan.trials(alpha=1.0) as trials:
            trials.run(alpha=1.5)
            problem.models["root"]["line"] = problem.models["root"]["line"].clone()

    with pytest.raises(ff.UndoError, match="node 'root', parameter 'line': moved since the run"):
        moved()
    assert plan.run_(dry_run=True)["root"].alpha == 1.5, "the values are put back all the same"
