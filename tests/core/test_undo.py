"""Undo: every bit comes back, on every backend and dtype; a log that cannot do that says so and touches nothing."""

import json
from dataclasses import replace

import pytest
import torch
from cases import CASES, SIZES, Case, build
from torch import nn

import fiun_fast as ff
from fiun_fast import tiles

PICKED = (
    "diamond-two-origins",
    "fan-two-requests-at-one-origin",
    "every-size",
    "flat-shifted",
    "tiles",
    "edges-fp32-fp32",
    "edges-fp64-fp64",
    "edges-bf16-fp32",
    "edges-fp16-fp64",
    "alpha-zero",
    "per-node",
    "weights-and-scale",
    "mean-fp32",
    "sum-edges",
    "exponent-2",
    "signed-edges-bf16-fp32",
    "signed-mean",
)
CHOSEN = [case for case in CASES if case.id in PICKED]


def bits(state: dict) -> dict:
    """Integers instead of floats, so that NaNs and signs of zeros are compared too."""
    return {k: t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize]) for k, t in state.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def small_tiles(monkeypatch):
    """So small that parameters are cut into many."""
    monkeypatch.setattr(tiles, "TILE", 100)


def test_the_cases_exist():
    assert {case.id for case in CHOSEN} == set(PICKED)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
def test_every_bit_comes_back(case: Case, backend, small_tiles):
    problem = build(case, backend.device)
    before = bits(problem.state())
    plan = problem.plan(backend.name)
    report = plan.run_(undo=True)
    after = bits(problem.state())
    changed = sum(int((after[k] != before[k]).sum()) for k in before)
    assert changed > 0
    log = report.undo
    assert log.numel >= report.selected >= changed
    if case.merge == "max":
        assert log.numel == report.selected
        assert log.nbytes == report.selected * (4 + case.theta.itemsize)  # what a dry run tells beforehand
    report.undo_()
    assert same(bits(problem.state()), before)
    again = plan.run_()  # and the same run gives the same again
    assert same(bits(problem.state()), after)
    assert again.selected == report.selected


@pytest.mark.parametrize("case", [CHOSEN[0], CHOSEN[7]], ids=lambda case: case.id)
def test_a_saved_log_undoes_later(case: Case, backend, tmp_path, small_tiles):
    problem = build(case, backend.device)
    before = bits(problem.state())
    problem.plan(backend.name).run_(undo=True).undo.save(tmp_path / "log.safetensors")
    del problem.originals, problem.forgets
    log = ff.UndoLog.load(tmp_path / "log.safetensors")
    assert "loaded" in repr(log)
    with pytest.raises(ff.UndoError, match="loaded from a file: say where the models are"):
        log.undo_()
    log.undo_(problem.models)
    assert same(bits(problem.state()), before)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def fisher_of(model: nn.Module, seed: int) -> ff.Fisher:
    layout = ff.Layout.from_module(model)
    return ff.Fisher(torch.rand(layout.numel, generator=torch.Generator().manual_seed(seed)), layout)


def family() -> tuple[ff.Plan, dict[str, nn.Module], ff.InheritanceDAG]:
    """Three nodes, a chain; alpha 0.5 selects most."""
    models = {name: net(i) for i, name in enumerate("abc")}
    dag = ff.InheritanceDAG()
    for i, name in enumerate("abc"):
        dag.add_model(name, models[name], fisher_of(models[name], i), parents=["abc"[i - 1]] if i else [])
    return ff.plan(dag, [ff.ForgetRequest("a", fisher_of(models["a"], 9))], alpha=0.5), models, dag


def state(models: dict[str, nn.Module]) -> dict:
    return bits({f"{n}.{k}": p.detach().clone() for n, m in models.items() for k, p in m.named_parameters()})


def test_modules_and_autograd():
    plan, models, _ = family()
    before = state(models)
    report = plan.run_(undo=True)
    x = torch.randn(4, 6)
    loss = models["a"](x).sum()
    report.undo_()
    assert same(state(models), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_dampen_takes_undo_and_a_log_of_one_node_takes_its_model(tmp_path):
    model = net(0)
    original, forget, before = fisher_of(model, 1), fisher_of(model, 2), state({"": model})
    report = ff.dampen_(model, original, forget, alpha=0.5, undo=True)
    report.undo.save(tmp_path / "log")
    ff.UndoLog.load(tmp_path / "log").undo_(model)
    assert same(state({"": model}), before)
    with pytest.raises(ff.UndoError, match="node 'model', parameter '0.weight': changed since the run"):
        report.undo_()  # the other log has done it


def test_twice_and_without_a_log():
    plan, models, _ = family()
    report = plan.run_(undo=True)
    report.undo_()
    before = state(models)
    with pytest.raises(ff.UndoError, match="undone already"):
        report.undo_()
    assert same(state(models), before)
    assert plan.run_().undo is None
    with pytest.raises(ff.UndoError, match=r"kept no undo log: run_\(undo=True\)"):
        plan.run_().undo_()
    with pytest.raises(ff.UndoError, match="this run changed nothing"):
        plan.run_(dry_run=True).undo_()
    with pytest.raises(ff.ArgumentError, match="a dry run changes nothing"):
        plan.run_(dry_run=True, undo=True)


def test_runs_are_undone_last_first():
    plan, models, _ = family()
    before = state(models)
    first = plan.run_(undo=True)
    middle = state(models)
    second = plan.run_(undo=True)
    after = state(models)
    with pytest.raises(ff.UndoError, match="node 'a', parameter '0.weight': changed since the run .* undo later runs"):
        first.undo_()
    assert same(state(models), after)
    second.undo_()
    assert same(state(models), middle)
    first.undo_()
    assert same(state(models), before)


def test_training_in_between_is_noticed_and_can_be_overruled():
    plan, models, _ = family()
    before = state(models)
    report = plan.run_(undo=True)
    with torch.no_grad():
        for p in models["c"].parameters():
            p.add_(1)
    with pytest.raises(ff.UndoError, match="node 'c'"):
        report.undo_()
    report.undo_(force=True)
    assert all(torch.equal(v, before[k]) for k, v in state(models).items() if not k.startswith("c."))
    assert any(torch.equal(v, before[k]) is False for k, v in state(models).items() if k.startswith("c."))


def flattened(models):
    ff.flatten_(models["b"])


def assigned(models):
    models["b"].load_state_dict({k: v.clone() for k, v in models["b"].state_dict().items()}, assign=True)


def replaced(models):
    models["b"][2] = nn.Linear(5, 3)


def taken(models):
    models["b"][2].weight = None


def widened(models):
    models["b"][2].weight = nn.Parameter(torch.zeros(4, 5))


def halved(models):
    models["b"].bfloat16()


def turned(models):
    models["b"][0].weight.data = torch.randn(6, 5).t()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (flattened, ff.UndoError, "node 'b', parameter '0.weight': moved since the run, to cpu; nothing was restored"),
        (assigned, ff.UndoError, "node 'b', parameter '0.weight': moved since the run"),
        (replaced, ff.UndoError, "submodule '2' was replaced since the run; nothing was restored"),
        (taken, ff.UndoError, "node 'b', parameter '2.weight': removed since the run"),
        (widened, ff.LayoutError, r"node 'b', parameter '2.weight': shape \[4, 5\] now, \[3, 5\] during the run"),
        (halved, ff.DTypeError, "node 'b', parameter '0.weight': torch.bfloat16 now, torch.float32 during the run"),
        (turned, ff.LayoutError, r"node 'b', parameter '0.weight': stride \[1, 5\] now, contiguous"),
    ],
)
def test_parameters_that_moved(spoil, error, message):
    plan, models, dag = family()
    before = state(models)
    report = plan.run_(undo=True)
    spoil(models)
    held = {k: v for k, v in state(models).items() if not k.startswith("b.")}
    with pytest.raises(error, match=message):
        report.undo_()
    assert all(torch.equal(v, state(models)[k]) for k, v in held.items())
    if spoil in (flattened, assigned):  # the values are still there, elsewhere
        report.undo.undo_(dag)
        assert same(state(models), before)


def test_models_by_name():
    plan, models, dag = family()
    before = state(models)
    log = plan.run_(undo=True).undo
    assert log.nodes == ["a", "b", "c"]
    with pytest.raises(ff.UndoError, match=r"the log has 3 nodes \(a, b, c\), expected {node: model} or the DAG"):
        log.undo_(models["a"])
    with pytest.raises(ff.UndoError, match="node 'c' is in the log, but not among the models: a, b"):
        log.undo_({"a": models["a"], "b": models["b"]})
    with pytest.raises(ff.UndoError, match="node 'a' is in the log, but not in the DAG"):
        log.undo_(ff.InheritanceDAG())
    with pytest.raises(ff.LayoutError, match="node 'b', parameter '0.weight': in the log, but not in the model"):
        log.undo_({**models, "b": nn.Linear(2, 2)})
    other = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    log.undo_(other)  # state dicts of the same models
    assert all(torch.equal(bits(other["b"])[k], before[f"b.{k}"]) for k in other["b"] if f"b.{k}" in before)


def test_one_model_for_two_nodes_is_refused():
    dag = ff.InheritanceDAG()
    models = {name: nn.Linear(3, 2) for name in "ab"}
    layout = ff.Layout.from_module(models["a"])
    for name, model in models.items():
        dag.add_model(name, model, ff.Fisher(torch.ones(layout.numel), layout), parents=["a"] * (name == "b"))
    report = ff.plan(dag, [ff.ForgetRequest("a", ff.Fisher(torch.full((layout.numel,), 50.0), layout))]).run_(undo=True)
    with pytest.raises(ff.LayoutError, match=r"node 'a', parameter '\w+' and node 'b', parameter '\w+' share memory"):
        report.undo.undo_({"a": models["a"], "b": models["a"]}, force=True)
    report.undo_()


def test_a_run_that_selects_nothing_can_be_saved_and_undone(tmp_path):
    model = net(0)
    report = ff.dampen_(model, fisher_of(model, 1), fisher_of(model, 2), alpha=1e30, undo=True)
    assert (report.selected, report.undo.numel, report.undo.nbytes) == (0, 0, 0)
    report.undo.save(tmp_path / "empty")
    ff.UndoLog.load(tmp_path / "empty").undo_(model)
    report.undo_()


def test_files_that_are_no_logs(tmp_path):
    from safetensors.torch import save_file

    plan, models, dag = family()
    path = tmp_path / "log"
    plan.run_(undo=True).undo.save(path)
    with pytest.raises(FileNotFoundError, match="no undo log"):
        ff.UndoLog.load(tmp_path / "none")
    whole = path.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ff.UndoFileError, match="truncated or not an undo log"):
        ff.UndoLog.load(tmp_path / "cut")
    fisher_of(models["a"], 1).save(tmp_path / "fisher")
    with pytest.raises(ff.UndoFileError, match=r"not an undo log of this package \(format fiun_fast.fisher/2"):
        ff.UndoLog.load(tmp_path / "fisher")
    record = {"node": "a", "name": "w", "shape": [3], "dtype": "float32", "after": 0}
    for index, old in ([3], [1.0]), ([-1], [1.0]), ([0], [1.0, 2.0]):
        tensors = {"0.index": torch.tensor(index, dtype=torch.int32), "0.old": torch.tensor(old)}
        metadata = {"format": "fiun_fast.undo/1", "entries": json.dumps([record])}
        save_file(tensors, tmp_path / "bad", metadata=metadata)
        with pytest.raises(ff.UndoFileError, match=r"node 'a', parameter 'w': indices or values do not fit"):
            ff.UndoLog.load(tmp_path / "bad")


def test_the_superset_of_merged_sums_covers_every_rounding():
    """Selections that hang on the last bit of a sum are kept too, so that any order of adding is undone."""
    n = 20_000
    generator = torch.Generator().manual_seed(3)
    f, g = (torch.rand(n, generator=generator) for _ in range(2))
    layout = ff.Layout({"w": (n,)})
    exact = (f.double() + g.double()) / 2
    original = (exact / 1.5).float()  # m meets alpha I up to rounding everywhere
    model = {"w": torch.randn(n, generator=generator)}
    fishers = ff.Fisher(original, layout), [ff.Fisher(f, layout), ff.Fisher(g, layout)]
    report = ff.dampen_(model, *fishers, alpha=1.5, merge="mean", undo=True)
    assert 0 < report.selected < n
    assert report.undo.numel == n


def test_memory_stays_within_the_log_and_a_few_tiles(small_tiles):
    """Torch's own account of the largest temporary: nothing of the size of the model, whatever is selected."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view and not func._schema.is_mutable:
                Largest.size = max(Largest.size, out.numel())
            return out

    problem = build(replace(CASES[0], shapes={"weight": (500, 100)} | SIZES))
    plan = problem.plan("cpu" if "cpu" in ff.available_backends() else "reference")
    with Largest():
        report = plan.run_(undo=True, audit=True)
        report.undo_()
    assert Largest.size <= tiles.TILE


def test_tied_parameters_are_found_under_either_name(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    before = model["a"].weight.detach().clone()
    original, forget = (ff.Fisher.from_dict({"b.weight": torch.rand(3, 3)}) for _ in range(2))
    report = ff.dampen_(model, original, forget, alpha=0.0, undo=True)
    report.undo.save(tmp_path / "log.safetensors")
    assert not torch.equal(model["a"].weight, before)
    ff.UndoLog.load(tmp_path / "log.safetensors").undo_(model)
    assert torch.equal(model["a"].weight, before)
