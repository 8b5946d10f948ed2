"""Building a DAG, its errors, and which requests reach which node."""

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fiun_fast as ff

LAYOUT = ff.Layout({"w": (2,)})
FISHER = ff.Fisher(torch.ones(2), LAYOUT)


def model() -> dict[str, torch.Tensor]:
    return {"w": torch.ones(2)}


def chain() -> ff.InheritanceDAG:
    dag = ff.InheritanceDAG()
    dag.add_model("a", model(), FISHER, time=1)
    dag.add_model("b", model(), FISHER, parents=["a"])
    dag.add_model("c", model(), FISHER, parents="b", time=2.5)
    return dag


def test_building():
    dag = chain()
    assert list(dag) == ["a", "b", "c"]
    assert dag.parents("c") == ["b"]
    assert len(dag) == 3
    assert "b" in dag
    assert repr(dag) == "InheritanceDAG(3 models, 2 edges)"
    assert isinstance(dag.graph, nx.DiGraph)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a", model()), ff.DagError, "node 'a' exists already"),
        (("d", model(), None, {"parents": ["x"]}), ff.DagError, "node 'd': unknown parent 'x'; known nodes: a, b, c"),
        (
            ("d", model(), None, {"parents": ["c"], "time": 2}),
            ff.DagError,
            "node 'd' has time 2, but inherits from a model of time 2.5",
        ),
        (
            ("d", model(), None, {"parents": ["b"], "time": 0}),
            ff.DagError,
            "node 'd' has time 0, but inherits from a model of time 1",
        ),
        (("d", model(), None, {"parents": ["b"], "time": float("nan")}), ff.DagError, "node 'd' has time nan"),
        (("d", 3), ff.ArgumentError, "node 'd': model is a int"),
        (("d", model(), {"w": 1}), ff.ArgumentError, "node 'd': fisher is a dict"),
        ((4, model()), ff.ArgumentError, "node name 4 is a int"),
    ],
)
def test_a_refused_node_is_not_added(arguments, error, message):
    dag = chain()
    *objects, options = arguments if len(arguments) == 4 else (*arguments, {})
    with pytest.raises(error, match=message):
        dag.add_model(*objects, **options)
    assert list(dag) == ["a", "b", "c"]
    assert dag.graph.number_of_edges() == 2


def test_graphs_edited_by_hand_are_checked():
    request = [ff.ForgetRequest("a", FISHER)]
    dag = chain()
    dag.graph.add_edge("c", "a")
    with pytest.raises(ff.DagError, match="has a cycle: a -> b -> c|has a cycle"):
        ff.plan(dag, request)
    dag = chain()
    dag.graph.add_edge("b", "ghost")
    with pytest.raises(ff.DagError, match="node 'ghost' has no model"):
        ff.plan(dag, request)
    dag = chain()
    dag["a"].time = 9
    with pytest.raises(ff.DagError, match="node 'c' has time 2.5, but inherits from a model of time 9"):
        ff.plan(dag, request)


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 12))
    edges = [(i, j) for j in range(size) for i in range(j) if draw(st.booleans())]
    origins = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    return size, edges, origins


def ancestors_by_hand(node: int, edges: list[tuple[int, int]]) -> set[int]:
    """The node and everything above it: follow edges upwards until nothing is new."""
    found = {node}
    while True:
        more = {i for i, j in edges if j in found} - found
        if not more:
            return found
        found |= more


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_reachability_against_brute_force(graph):
    size, edges, origins = graph
    dag = ff.InheritanceDAG()
    for j in range(size):
        dag.add_model(f"n{j}", model(), FISHER, parents=[f"n{i}" for i, k in edges if k == j])
    reached = dag.reached_by([ff.ForgetRequest(f"n{o}", FISHER) for o in origins])
    for j in range(size):
        above = ancestors_by_hand(j, edges)
        expected = tuple(k for k, origin in enumerate(origins) if origin in above)
        assert reached.get(f"n{j}", ()) == expected
