"""What tuning says of its choices: leaving alone, edges of the grid, searches that failed; and how it is shown."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch

import fiun_fast as ff

NUMEL = 400


def one_node(seed: int, i_zero: int = 0) -> tuple[ff.InheritanceDAG, list[ff.ForgetRequest], dict[str, torch.Tensor]]:
    """A node `a` of random numbers; in the first `i_zero` elements I is 0 and F is not."""
    generator = torch.Generator().manual_seed(seed)
    original, forget, theta = (torch.rand(NUMEL, generator=generator) + 0.01 for _ in range(3))
    original[:i_zero] = 0
    dag = ff.InheritanceDAG()
    dag.add_model("a", {"w": theta}, ff.Fisher.from_dict({"w": original}))
    return dag, [ff.ForgetRequest("a", ff.Fisher.from_dict({"w": forget}))], {"w": theta}


def share_changed(theta: torch.Tensor):
    """The score's ingredient: how much of the model is not as it was."""
    start = theta.clone()
    return lambda model: float((model["w"] != start).double().mean())


@pytest.mark.parametrize("i_zero", [0, 5])
@pytest.mark.parametrize("alphas", [None, [2.0, 1.0], {"a": [0.5]}])
def test_a_node_best_left_alone_is_left_alone(backend, i_zero, alphas):
    """A class that is at 0 % already: whatever is changed can only harm, by however large an alpha."""
    dag, requests, model = one_node(1, i_zero)
    model["w"] = model["w"].to(backend.device)
    dag, requests = _moved(dag, requests, model, backend.device)
    before, changed = model["w"].clone(), share_changed(model["w"])
    with pytest.warns(ff.TuningWarning, match="tune: node 'a': no point beats leaving it alone"):
        chosen = ff.tune(
            dag, requests, lambda name, model: -changed(model), alphas=alphas, points=3, backend=backend.name
        )
    assert chosen["a"].score == 0
    assert math.isinf(chosen["a"].alpha) == (i_zero > 0), "a finite alpha where one leaves it alone"
    plan = ff.plan(dag, requests, alpha=0.1, backend=backend.name)
    plan.set_values_(chosen)
    for options in ({}, {"undo": True}, {"audit": True}, {"dry_run": True}):
        report = plan.run_(**options)
        assert torch.equal(model["w"], before)
        assert (report.selected, report.zeroed, report.nonfinite) == (0, 0, 0)
    json.loads(json.dumps(report.to_dict(), allow_nan=False))
    plan.set_values_(alpha=0.1)
    assert plan.run_().selected > 0
    if not i_zero:  # numbers alone do it, too
        model["w"].copy_(before)
        ff.dampen_(model, dag["a"].fisher, requests[0].fisher, alpha=chosen["a"].alpha, lam=0.0, backend=backend.name)
        assert torch.equal(model["w"], before)


def _moved(dag, requests, model, device):
    moved = ff.InheritanceDAG()
    moved.add_model("a", model, dag["a"].fisher.to(device))
    return moved, [ff.ForgetRequest("a", requests[0].fisher.to(device))]


def test_an_infinite_alpha_of_ones_own_is_refused():
    dag, requests, _ = one_node(2)
    plan = ff.plan(dag, requests)
    for change in ({"alpha": math.inf}, {"alpha": {"a": math.inf}}):
        with pytest.raises(ff.ArgumentError, match="alpha.* is inf"):
            plan.set_values_(**change)
    for bad in (ff.Choice(1.0, math.inf, 0.0), ff.Choice(-math.inf, 1.0, 0.0), ff.Choice(math.nan, 1.0, 0.0)):
        with pytest.raises(ff.ArgumentError, match="expected a finite number"):
            plan.set_values_({"a": bad})
    with pytest.raises(ff.ArgumentError, match="no node of the DAG"):
        plan.set_values_({"zebra": ff.Choice(math.inf, 1.0, 0.0)})


def test_an_alpha_that_selects_nothing_is_above_every_ratio():
    """Whatever the Fishers' numbers, subnormal ones included; on the kernel and on the specification."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        original = torch.rand(NUMEL, generator=generator).double() * 10.0 ** (-45 + 4 * seed)
        forget = torch.rand(NUMEL, generator=generator).double() * 10.0 ** (-45 + 3 * seed)
        for dtype in (torch.float32, torch.float64):
            i, f = (one.to(dtype).clamp(max=1e38) for one in (original, forget))
            theta = torch.ones(NUMEL)
            dag = ff.InheritanceDAG()
            dag.add_model("a", {"w": theta}, ff.Fisher.from_dict({"w": i}))
            requests = [ff.ForgetRequest("a", ff.Fisher.from_dict({"w": f}))]
            with pytest.warns(ff.TuningWarning):
                chosen = ff.tune(dag, requests, lambda name, model: -float((model["w"] != 1).sum()), points=3)
            alpha = chosen["a"].alpha
            with_ratio = (f / i).isfinite()
            assert alpha >= 1
            assert not (f > alpha * i)[with_ratio].any()
            if math.isfinite(alpha):
                assert not (f > alpha * i).any()
            plan = ff.plan(dag, requests)
            plan.set_values_(chosen)
            assert plan.run_().selected == 0


@pytest.mark.parametrize(
    ("alphas", "lams", "best", "doubt"),
    [
        (None, None, (0.5, 0.01), None),  # inside
        (None, None, (0.99, 0.01), "the lowest alpha tried"),
        ([2.0, 1.0, 0.5], [0.0], (0.99, 0.0), "the lowest alpha tried, 0.5"),
        ([2.0, 1.0, 0.5], [0.0], (0.0001, 0.0), "the highest alpha tried, 2"),
        ([0.0, 1.0], [0.0], (1.0, 0.0), None),  # nothing beyond: all is selected
        ([1e-9, 1.0], [0.0], (1.0, 0.0), None),
        ([1.0], [0.5], (0.0, 0.5), None),  # no grid, no edge
        ([4.0, 2.0, 1.0], [1.0, 0.5, 0.25], (0.25, 0.25), "the smallest lambda tried, 0.25"),
        ([50.0, 20.0, 1.0], [0.5, 0.1], (0.02, 0.1), None),  # 1 % of what is selected is left at most: small enough
        ([4.0, 2.0, 1.0], [0.5, 0.25], (0.25, 0.5), "the largest lambda tried, 0.5"),
        ([4.0, 2.0, 1.0], [1.0, 0.25], (0.25, 1.0), None),
        ([1.0, 0.5], [0.5, 0.25], (0.99, 0.25), "the lowest alpha tried, 0.5 and the smallest lambda tried, 0.25"),
    ],
)
def test_edges_of_the_grid(alphas, lams, best, doubt, recwarn):
    """Best at the share and lambda given, by a score that knows which point it looks at."""
    dag, requests, model = one_node(3)
    i, f = dag["a"].fisher.buffer, requests[0].fisher.buffer
    start = model["w"].clone()
    ratio = f.double() / i.double()

    def score(name: str, model: dict[str, torch.Tensor]) -> float:
        factor = (model["w"] / start).double()
        changed = factor != 1
        if not changed.any():
            return -10.0
        lam = float((factor * ratio)[changed].median())  # theta fell to lam I / F
        return -abs(float(changed.double().mean()) - best[0]) - abs(lam - best[1])

    chosen = ff.tune(dag, requests, score, alphas=alphas, lams=lams)
    said = [str(one.message) for one in recwarn if one.category is ff.TuningWarning]
    if doubt is None:
        assert said == []
        assert chosen.doubts == {}
    else:
        assert len(said) == 1
        assert "node 'a': best at the edge of the grid: " + doubt in said[0]
        assert doubt in str(chosen)


def test_every_point_tried_is_kept_and_shown():
    dag, requests, model = one_node(4)
    changed = share_changed(model["w"])
    seen = []

    def score(name: str, model: dict[str, torch.Tensor]) -> float:
        seen.append(changed(model))
        return -abs(seen[-1] - 0.2)

    chosen = ff.tune(dag, requests, score, points=9, lams=[0.0, 0.1])
    points = chosen.points["a"]
    assert [point.score for point in points] == [-abs(share - 0.2) for share in seen]
    assert [point.share for point in points] == pytest.approx(seen)
    ratio = requests[0].fisher.buffer / dag["a"].fisher.buffer
    for point in points:
        assert abs(point.selected - int((ratio > point.alpha).sum())) <= 1, "m / I is rounded once, alpha I once"
    best = max(points, key=lambda point: point.score)
    assert chosen["a"] == ff.Choice(best.alpha, best.lam, best.score)
    printed = str(chosen).splitlines()
    assert len(printed) == 3
    assert printed[2].split()[:7] == [
        *("a", f"{best.alpha:g}", f"{best.lam:g}", f"{best.share:.2%}", f"{best.score:g}"),
        *(f"{points[0].score:g}", str(len(points))),
    ]
    rows = chosen.table("a").splitlines()[2:]
    assert len(rows) == len(points)
    assert [row.endswith("*") for row in rows] == [point is best for point in points]
    assert chosen.table() == chosen.table("a")
    for again in (pickle.loads(pickle.dumps(chosen)), copy.deepcopy(chosen)):
        assert (again, again.points, again.doubts) == (chosen, chosen.points, chosen.doubts)
    with pytest.raises(ff.DagError, match="no node 'zebra' among those tuned; nodes reached: a"):
        chosen.table("zebra")


def test_the_picture_has_what_was_tried():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    dag, requests, model = one_node(5)
    changed = share_changed(model["w"])
    chosen = ff.tune(dag, requests, lambda name, model: -abs(changed(model) - 0.2), points=6, lams=[0.0, 0.5])
    axes = chosen.plot("a")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    for lam in (0.0, 0.5):
        wanted = sorted([100 * p.share, p.score] for p in chosen.points["a"][1:] if p.lam == lam)
        assert drawn[f"λ = {lam:g}"] == wanted
    with pytest.warns(ff.TuningWarning):
        alone = ff.tune(dag, requests, lambda name, model: -changed(model), points=1, lams=[0.5])
    assert alone.plot(axes=pyplot.figure().subplots()) is not axes
    pyplot.close("all")


def test_a_search_that_failed_says_so():
    dag, requests, model = one_node(6)
    with pytest.warns(
        ff.TuningWarning, match="search_alpha: node 'a': the search failed: 0.9 is left .*less than 0.18"
    ):
        found = ff.search_alpha(dag, requests, lambda name, model: 0.9, start=20.0, step=5.0)
    assert len(found.points["a"]) == 1 + 5
    assert "the search failed" in found.doubts["a"]
    changed = share_changed(model["w"])
    found = ff.search_alpha(dag, requests, lambda name, model: 1 - changed(model), rho=0.5, step=3.0)
    assert found.doubts == {}
    assert found["a"] == ff.Choice(found.points["a"][-1].alpha, 1.0, found.points["a"][-1].score)
    assert found["a"].score < 0.5 <= found.points["a"][-2].score


def test_progress_is_shown_where_it_is_asked_for(capsys):
    dag, requests, model = one_node(7)
    changed = share_changed(model["w"])

    def score(name: str, model: dict[str, torch.Tensor]) -> float:
        return -abs(changed(model) - 0.2)

    ff.tune(dag, requests, score, points=4)
    assert capsys.readouterr().out == ""
    ff.tune(dag, requests, score, points=4, progress=True)
    ff.search_alpha(dag, requests, lambda name, model: 1 - changed(model), rho=0.6, step=20.0, progress=True)
    assert capsys.readouterr().out.count("Tuning") >= 2
