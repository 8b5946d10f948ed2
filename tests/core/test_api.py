"""API v2: what is keyword-only, what had another name in version 0.1, and what old spellings say."""

import inspect
import threading

import pytest
import torch

import fiun_fast as ff
from fiun_fast import kernels

# name -> how many arguments may be given by position: the objects that it works on
POSITIONAL = {
    "adaptive_alpha": 2,
    "dampen_": 3,
    "estimate_fisher": 3,
    "estimate_fishers": 3,
    "flatten_": 2,
    "last_layer": 1,
    "merge_fishers": 1,
    "plan": 2,
    "search_alpha": 3,
    "selection_profile": 3,
    "stack_": 2,
    "top_overlap": 2,
    "tune": 3,
    "unlearn_": 3,
    "unlearn_rounds_": 5,
}


def fisher(value: float = 1.0) -> ff.Fisher:
    return ff.Fisher.from_dict({"w": torch.full((4,), value)})


def family() -> tuple[ff.InheritanceDAG, list[ff.ForgetRequest]]:
    dag = ff.InheritanceDAG()
    dag.add_model("a", {"w": torch.ones(4)}, fisher=fisher())
    return dag, [ff.ForgetRequest("a", fisher(50.0))]


@pytest.mark.parametrize("name", POSITIONAL)
def test_options_are_keywords(name):
    kinds = [p.kind for p in inspect.signature(getattr(ff, name)).parameters.values()]
    count = POSITIONAL[name]
    assert kinds[:count] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * count
    assert set(kinds[count:]) <= {inspect.Parameter.KEYWORD_ONLY}


def test_every_public_function_is_in_the_table():
    functions = {name for name in ff.__all__ if inspect.isfunction(getattr(ff, name))}
    assert functions - {"available_backends"} == POSITIONAL.keys()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ff.plan(*family(), alpha="auto", share=0.1),
        lambda: ff.dampen_({"w": torch.ones(4)}, fisher(), fisher(50.0), alpha="auto", share=0.1),
        lambda: ff.adaptive_alpha(fisher(), fisher(50.0), share=0.1),
    ],
)
def test_an_old_name_says_the_new_one(call):
    with pytest.raises(TypeError, match=r"no argument 'share' any more: it is now 'forget_fraction'"):
        call()


def test_positional_options_of_version_0_1_are_refused():
    dag, requests = family()
    for call in (
        lambda: ff.plan(dag, requests, 10.0),
        lambda: ff.dampen_({"w": torch.ones(4)}, fisher(), fisher(), 10.0),
        lambda: ff.merge_fishers([fisher()], "max"),
        lambda: ff.plan(dag, requests).run_(True),
        lambda: ff.Fisher.load("nowhere", torch.device("cpu")),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            call()
    assert dag["a"].model["w"].eq(1).all()


def test_nodes_are_objects():
    dag, _ = family()
    assert isinstance(dag["a"], ff.Node)
    assert dag["a"].name == "a"
    assert dag["a"].fisher.numel == 4
    assert dict(dag.graph.nodes(data=True)) == {"a": {}}, "networkx keeps names and edges only"
    with pytest.raises(ff.DagError, match="no node 'b' in the DAG; known nodes: a"):
        dag["b"]


def test_a_fisher_says_what_and_where_it_is(tmp_path):
    f = fisher()
    assert (f.dtype, f.device, f.numel) == (torch.float32, torch.device("cpu"), 4)
    f.save(tmp_path / "f")
    assert ff.Fisher.load(tmp_path / "f", device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize("spelling", ["last", ["last"]])
def test_last_means_the_last_layer_wherever_params_are_taken(spelling):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    batches = [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]))]
    expected = ("2.weight", "2.bias")
    assert ff.Layout.from_module(model, spelling).names == expected
    assert ff.estimate_fisher(model, batches, spelling).layout.names == expected
    assert ff.estimate_fishers({"m": model}, batches, spelling)["m"].layout.names == expected
    assert ff.FisherAccumulator(model, spelling).layout.names == expected
    assert ff.flatten_(model, spelling).numel() == 10


def test_an_exact_name_wins_over_a_glob_and_over_last():
    model = torch.nn.ModuleDict({"last": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    assert ff.Layout.from_module(model, "last").names == ("b.weight", "b.bias")
    odd = torch.nn.Module()
    odd.last = torch.nn.Parameter(torch.ones(3))
    odd.head = torch.nn.Linear(2, 2)
    assert ff.Layout.from_module(odd, "last").names == ("last",)
    odd.register_parameter("w[ab]", torch.nn.Parameter(torch.ones(1)))
    odd.register_parameter("wa", torch.nn.Parameter(torch.ones(1)))
    assert ff.Layout.from_module(odd, "w[ab]").names == ("w[ab]",)


def test_nothing_to_train_is_said():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ff.LayoutError, match="no parameter of Linear is selected .2 exist.: none requires grad"):
        ff.Layout.from_module(model)


def test_the_choice_of_a_backend_stays_in_its_thread(monkeypatch):
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    found = []
    with ff.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(kernels.select(None, "cpu").name))
        thread.start()
        thread.join()
        assert kernels.select(None, "cpu").name == "reference"
    assert found == [kernels.select(None, "cpu").name]


def test_registered_backends_can_be_asked_for():
    class Mine(type(kernels.load("reference"))):
        name = "mine"

    with pytest.raises(ff.BackendError, match="unknown backend 'mine'; known are reference, cpu, triton, cuda"):
        kernels.load("mine")
    kernels.register(Mine())
    try:
        model = {"w": torch.ones(4)}
        report = ff.dampen_(model, fisher(), fisher(50.0), lam=5.0, backend="mine")
        assert report.selected == 4
        assert "mine" in ff.available_backends("cpu")
    finally:
        kernels.unregister("mine")


def spoiled_node(key: str, value: object) -> ff.InheritanceDAG:
    dag, _ = family()
    setattr(dag["a"], key, value)
    return dag


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: ff.plan(spoiled_node("fisher", 5), family()[1]), ff.ArgumentError),
        (lambda: ff.plan(spoiled_node("model", 5), family()[1]), ff.ArgumentError),
        (lambda: ff.plan(spoiled_node("time", "x"), family()[1]), ff.ArgumentError),
        (lambda: family()[0].add_model("b", {}, time=10**400), ff.ArgumentError),
        (lambda: family()[0].add_model("b", {}, parents=5), ff.ArgumentError),
        (lambda: family()[0][[]], ff.DagError),
        (lambda: ff.plan(family()[0], 5), ff.ArgumentError),
        (lambda: ff.plan(*family(), alpha=10**400), ff.ArgumentError),
        (lambda: ff.plan(family()[0], [ff.ForgetRequest("a", fisher(), weight=1e300)]), ff.ArgumentError),
        (lambda: ff.dampen_({"w": torch.ones(4)}, fisher(), 5), ff.ArgumentError),
        (lambda: ff.merge_fishers(5), ff.ArgumentError),
        (lambda: ff.merge_fishers([5]), ff.ArgumentError),
        (lambda: ff.merge_fishers([fisher()], weights=5), ff.ArgumentError),
        (lambda: ff.merge_fishers([fisher()], weights=[1e300]), ff.ArgumentError),
        (lambda: ff.merge_fishers([fisher()], scale=1e300), ff.ArgumentError),
        (lambda: ff.Layout([1]), ff.ArgumentError),
        (lambda: ff.Layout({"w": 5}), ff.LayoutError),
        (lambda: ff.Layout({"w": (-4,)}), ff.LayoutError),
        (lambda: ff.Layout({"w": (2.5,)}), ff.LayoutError),
        (lambda: ff.Layout({"w": "32"}), ff.LayoutError),
        (lambda: ff.Fisher(torch.ones(4), 5), ff.ArgumentError),
        (lambda: fisher().to("nonsense"), ff.DeviceError),
        (lambda: ff.last_layer(5), ff.ArgumentError),
        (lambda: ff.tune(*family(), lambda name, model: 10**400), ff.ArgumentError),
        (lambda: ff.search_alpha(*family(), lambda name, model: 1.0, lam={"a": 1.0}), ff.ArgumentError),
        (lambda: ff.use_backend([]), ff.BackendError),
    ],
)
def test_bad_input_is_an_error_of_the_package(call, error):
    with pytest.raises(error):
        call()


def test_where_a_log_is_to_be_undone():
    log = ff.dampen_({"w": torch.ones(4)}, fisher(), fisher(50.0), undo=True).undo
    for models in (5, [], {"model": 5}):
        with pytest.raises(ff.FiunError):
            log.undo_(models)


def test_a_backend_may_be_used_for_several_blocks(monkeypatch):
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    usual, once = kernels.select(None, "cpu").name, ff.use_backend("reference")
    for _ in range(2):
        with once:
            assert kernels.select(None, "cpu").name == "reference"
        assert kernels.select(None, "cpu").name == usual


@pytest.mark.parametrize("layout", ["[1]", "5", '"w"', '{"w": [Infinity]}', '{"w": [2.5]}', '{"w": [-4]}', "{"])
def test_files_with_nonsense_inside(layout, tmp_path):
    from safetensors.torch import save_file

    provenance = '{"estimator": "batch", "steps": 1, "samples": 1}'
    metadata = {"format": "fiun_fast.fisher/1", "layout": layout, "provenance": provenance}
    save_file({"w": torch.ones(4)}, tmp_path / "f", metadata=metadata)
    with pytest.raises(ff.FisherFileError):
        ff.Fisher.load(tmp_path / "f")
    good = metadata | {"layout": '{"w": [4]}'}
    save_file({"w": torch.ones(4, dtype=torch.complex64)}, tmp_path / "f", metadata=good)
    with pytest.raises(ff.FisherFileError, match="complex64"):
        ff.Fisher.load(tmp_path / "f")
    save_file({"w": torch.ones(4)}, tmp_path / "f", metadata=good | {"provenance": provenance[:-1] + ', "how": 3}'})
    with pytest.raises(ff.FisherFileError, match="provenance"):
        ff.Fisher.load(tmp_path / "f")
