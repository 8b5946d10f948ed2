"""Tensors without plain memory of their own never reach a kernel: every kind, at every way into the core.

The estimators' ways in are in tests/estimators/test_addressable.py; memory that moves later, in test_moved_memory.py.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from memory_kinds import KINDS, SHAPE, dtensor, fake, fisher, freed, shortened
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fiun_fast as ff
from fiun_fast.memory import check_addressable

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@kinds
def test_each_kind_is_told_apart(kind, one_rank):
    make, message = KINDS[kind]
    with pytest.raises(ff.FiunError, match=f"^here: .*({message})"):
        check_addressable("here", make())


def test_plain_tensors_pass(one_rank):
    class Mine(torch.Tensor):
        pass

    for tensor in (
        torch.ones(SHAPE),
        nn.Parameter(torch.ones(SHAPE).bfloat16()),
        torch.ones(SHAPE).t(),
        torch.ones(8)[3:],
        torch.ones(0),
        torch.ones(SHAPE).as_subclass(Mine),
        torch.from_numpy(np.ones(SHAPE)),
        dtensor().full_tensor(),
    ):
        check_addressable("here", tensor)
    with torch.inference_mode():
        check_addressable("here", torch.ones(3))


def test_inside_a_transform():
    def inside(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ff.LayoutError, match="node 'model', parameter 'w': it is inside torch.func"):
            ff.dampen_({"w": x}, fisher(), fisher())
        with pytest.raises(ff.LayoutError, match="inside torch.func"):
            ff.Fisher(x.reshape(-1), ff.Layout({"w": SHAPE}))
        return x

    torch.func.vmap(inside)(torch.ones(2, *SHAPE))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "DTensor"])  # tests/distributed has these
@pytest.mark.parametrize("way", ["dampen_", "plan", "profile", "tune", "undo"])
def test_a_model_with_such_a_parameter_is_refused(kind, way, one_rank):
    make, message = KINDS[kind]
    good = torch.full(SHAPE, 2.0)
    layout = ff.Layout({"good": SHAPE, "w": SHAPE})
    original, forget = ff.Fisher(torch.ones(24), layout), ff.Fisher(torch.full((24,), 50.0), layout)
    model = {"good": good, "w": make()}
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, original)
    requests = [ff.ForgetRequest("m", forget)]

    def undo() -> None:
        plain = {"good": good, "w": torch.ones(SHAPE)}
        log = ff.dampen_(plain, original, forget, undo=True).undo
        good.fill_(2.0)
        log.undo_(model, force=True)

    ways = {
        "dampen_": lambda: ff.dampen_(model, original, forget),
        "plan": lambda: ff.plan(dag, requests).run_(),
        "profile": lambda: ff.selection_profile(original, forget, model),
        "tune": lambda: ff.tune(dag, requests, lambda name, model: 0.0),
        "undo": undo,
    }
    with pytest.raises(ff.FiunError, match=message) as caught:
        ways[way]()
    assert "parameter 'w'" in str(caught.value)
    assert good.eq(2.0).all(), "something was written before the refusal"


@kinds
def test_flatten_refuses_such_a_parameter(kind, one_rank):
    make, message = KINDS[kind]
    tensor = make()
    if not tensor.is_floating_point() or kind in ("nested", "jagged"):
        message = f"{message}|qint8|floating"
    model = nn.Module()
    model.first = nn.Parameter(torch.ones(5))
    model.w = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    address = model.first.data_ptr()
    with pytest.raises(ff.FiunError, match=message):
        ff.flatten_(model, ["first", "w"])
    assert model.first.data_ptr() == address


@kinds
def test_such_a_tensor_is_no_fisher(kind, one_rank):
    make, message = KINDS[kind]
    builds = [lambda: ff.Fisher(make(), ff.Layout({"w": SHAPE}))]
    if kind != "DTensor":  # whose local part is taken
        builds.append(lambda: ff.Fisher.from_dict({"w": make()}))
    for build in builds:
        with pytest.raises(ff.FiunError, match=f"{message}|expected"):
            build()


@pytest.mark.parametrize("spoil", [freed, shortened, fake, dtensor])
def test_a_fisher_whose_buffer_went_away(spoil, one_rank):
    """It was whole when it was made; merging, profiles, plans and runs look again."""
    good, bad = fisher(), fisher(2.0)
    model = {"w": torch.ones(SHAPE)}
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, good)
    plan = ff.plan(dag, [ff.ForgetRequest("m", bad)])
    plan.run_(dry_run=True)
    if spoil in (freed, shortened):
        bad.buffer.untyped_storage().resize_(0 if spoil is freed else 40)
    else:
        bad.buffer = spoil().reshape(-1)
    for use in (
        plan.run_,
        plan.profile,
        lambda: ff.plan(dag, [ff.ForgetRequest("m", bad)]),
        lambda: ff.dampen_(model, good, bad),
        lambda: ff.merge_fishers([good, bad]),
        lambda: ff.selection_profile(good, bad),
        lambda: ff.adaptive_alpha(good, bad, forget_fraction=0.1),
    ):
        with pytest.raises(ff.FiunError, match="its buffer"):
            use()
    assert model["w"].eq(1).all()


def test_a_buffer_of_another_size_is_noticed():
    good, bad = fisher(), fisher(2.0)
    bad.buffer = torch.ones(5)
    with pytest.raises(ff.LayoutError, match=r"the forget Fisher of request 0: its buffer has shape \[5\], expected"):
        ff.dampen_({"w": torch.ones(SHAPE)}, good, bad)
    bad = fisher(2.0)
    bad.buffer.resize_(7)
    with pytest.raises(ff.LayoutError, match=r"its buffer has shape \[7\]"):
        ff.merge_fishers([good, bad])


# ---- memory that may not be written to -------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs POSIX memory maps")
def test_memory_mapped_read_only_is_refused_before_it_is_written(tmp_path):
    path = tmp_path / "weights"
    np.ones(SHAPE, dtype=np.float32).tofile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it cannot be written to
        model = {"w": torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r", shape=SHAPE))}
        private = {"w": torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c", shape=SHAPE))}
    assert ff.dampen_(model, fisher(), fisher(50.0), dry_run=True).selected == 12
    log = ff.dampen_(private, fisher(), fisher(50.0), lam=5.0, undo=True).undo
    assert private["w"].eq(torch.tensor(0.1)).all()
    for write in (
        lambda: ff.dampen_(model, fisher(), fisher(50.0)),
        lambda: log.undo_(model, force=True),
    ):
        with pytest.raises(ff.LayoutError, match="node 'model', parameter 'w': its memory is mapped read-only"):
            write()
    assert np.fromfile(path, dtype=np.float32).tolist() == [1.0] * 12


# ---- modes and transforms --------------------------------------------------------------------------------------------


def planned() -> tuple[ff.Plan, dict[str, torch.Tensor]]:
    model = {"w": torch.ones(SHAPE)}
    dag = ff.InheritanceDAG()
    dag.add_model("m", model, fisher())
    return ff.plan(dag, [ff.ForgetRequest("m", fisher(50.0))], lam=5.0), model


PLAIN = fisher()
USES = {
    "run": lambda plan: plan.run_(),
    "undo": lambda plan: plan.run_(undo=True),
    "audit": lambda plan: plan.run_(audit=True),
    "profile": lambda plan: plan.profile(),
    "trials": lambda plan: plan.trials(alpha=1.0).__enter__(),
    "dampen_": lambda plan: ff.dampen_(plan.models["m"], PLAIN, PLAIN),
    "merge": lambda plan: ff.merge_fishers([PLAIN, PLAIN]),
    "alpha": lambda plan: ff.adaptive_alpha(PLAIN, PLAIN, forget_fraction=0.1),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_runs_where_tensors_are_made_without_memory(use):
    plan, model = planned()
    with FakeTensorMode(), pytest.raises(ff.LayoutError, match="call this package outside it"):
        USES[use](plan)

    def inside(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(ff.LayoutError, match="call this package outside"):
            USES[use](plan)
        return x.sum()

    torch.func.functionalize(inside)(torch.ones(2))
    assert model["w"].eq(1).all()


def test_functional_tensors_are_told_apart():
    functional = torch._to_functional_tensor(torch.ones(SHAPE))
    for _ in range(2):  # nothing is learned from the first time
        with pytest.raises(ff.LayoutError, match="functionalize"):
            check_addressable("here", functional)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_changes_nothing(device, tmp_path):
    plan, model = planned()
    torch.set_default_device(device)
    try:
        report = plan.run_(undo=True, audit=True)
        assert report.selected == 12
        assert "12" in str(report)
        report.undo.save(tmp_path / "log")
        ff.UndoLog.load(tmp_path / "log").undo_(model)
        PLAIN.save(tmp_path / "f")
        assert ff.Fisher.load(tmp_path / "f").device == torch.device("cpu")
    finally:
        torch.set_default_device(None)
    assert model["w"].eq(1).all()
