"""The table of a DAG: columns by what was given, the figures of the measures, a row a node."""

from __future__ import annotations

import copy
import io
import json

import clouds
import pytest
import torch
from rich.console import Console

import fiun_fast as ff
from fiun_fast import evaluation

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")

DATA = clouds.cloud(90, 0)
SETS = {
    "forget": clouds.batches(clouds.only(DATA, 0)),
    "retain": clouds.batches(clouds.only(DATA, 0, without=True)),
    "test": clouds.batches(clouds.cloud(60, 1)),
}


@pytest.fixture(scope="module")
def models() -> dict:
    torch.manual_seed(0)
    first = clouds.fit(clouds.Net(), clouds.batches(DATA), epochs=8)
    return {"u0": first, "u1": clouds.fit(copy.deepcopy(first), clouds.batches(DATA), epochs=2)}


@pytest.fixture(scope="module")
def retrained() -> dict:
    torch.manual_seed(0)
    return {name: clouds.fit(clouds.Net(k), SETS["retain"], epochs=8) for k, name in enumerate(("u0", "u1"))}


def dag_of(models: dict) -> ff.InheritanceDAG:
    dag = ff.InheritanceDAG()
    dag.add_model("u0", models["u0"])
    dag.add_model("u1", models["u1"], parents=["u0"])
    return dag


def test_every_cell_is_its_measure(models, retrained):
    before = {name: copy.deepcopy(m.state_dict()) for name, m in models.items()}
    references = [clouds.Net(5)]
    found = evaluation.table(
        dag_of(models), **SETS, retrained=retrained, references=references, steps=3, few=4, lr=0.01
    )
    assert list(found.rows) == ["u0", "u1"]
    assert found.columns == list(evaluation.columns.MEASURES)
    name = "u1"
    model, row, again = models[name], found[name], retrained[name]
    teacher = evaluation.untrained(model)
    for column, of in (
        *((what, lambda m, what=what: getattr(evaluation.accuracies(m, **SETS), what)) for what in SETS),
        ("entropy", lambda m: evaluation.entropy_attack(m, **SETS)),
        ("confidence", lambda m: evaluation.confidence_attack(m, **SETS)),
        ("probe", lambda m: evaluation.probe(m, forget=SETS["forget"], retain=SETS["retain"]).linear),
        ("nearest_mean", lambda m: evaluation.probe(m, forget=SETS["forget"], retain=SETS["retain"]).nearest_mean),
        ("zrf", lambda m: evaluation.zrf(m, forget=SETS["forget"], teacher=teacher)),
        ("int8", lambda m: evaluation.requantised(m, forget=SETS["forget"])[8].forget),
        ("int4", lambda m: evaluation.requantised(m, forget=SETS["forget"])[4].forget),
        ("rmia", lambda m: evaluation.rmia(m, forget=SETS["forget"], test=SETS["test"], references=references).auc),
    ):
        assert row[column] == evaluation.Measured(of(model), of(again)), column
    assert row["tow"] == evaluation.Measured(evaluation.tow(model, again, **SETS))
    back = evaluation.relearn(
        model, forget=SETS["forget"], retain=SETS["retain"], retrained=again, steps=(3,), few=4, lr=0.01
    )
    assert row["relearned"] == evaluation.Measured(back.on_retain[3], back.retrained_on_retain[3])
    assert row["relearned_few"] == evaluation.Measured(back.on_few[3], back.retrained_on_few[3])
    for name, model in models.items():
        assert all(torch.equal(t, before[name][key]) for key, t in model.state_dict().items())
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["u1"]["tow"]["retrained"] is None
    assert plain["u1"]["forget"]["model"] == [
        getattr(found["u1"]["forget"].model, of) for of in ("value", "low", "high")
    ]


def test_columns_follow_from_what_is_given(models):
    assert evaluation.table(models["u0"], test=SETS["test"]).columns == ["test"]
    found = evaluation.table(models, forget=SETS["forget"], test=SETS["test"])
    assert found.columns == ["forget", "test", "zrf", "int8", "int4"]
    some = evaluation.table(models, **SETS, measures=["probe", "forget"])
    assert some.columns == ["forget", "probe"]
    assert some["u0"]["forget"].retrained is None
    one = evaluation.table(dag_of(models), forget={"u1": SETS["forget"]}, retain=SETS["retain"], measures=["forget"])
    assert list(one.rows) == ["u1"]


def test_it_prints_a_row_a_node(models, retrained):
    found = evaluation.table(models, **SETS, retrained=retrained, measures=["forget", "tow"])
    text, console = str(found), Console(file=io.StringIO(), width=100)
    console.print(found)
    for shown in (text, console.file.getvalue()):
        lines = shown.splitlines()
        assert "forget" in lines[0]
        assert "ToW" in lines[0]
        for name in models:
            row = found[name]
            (line,) = [line for line in lines if line.startswith(name)]
            assert f"{row['forget'].model.value:.2f} / {row['forget'].retrained.value:.2f}" in line
            assert f"{row['tow'].model.value:.2f}" in line
        assert "value / that of the retrained model" in shown


def test_what_is_wrong_is_named(models, retrained):
    some = {"forget": SETS["forget"]}
    dicts = ff.InheritanceDAG()
    dicts.add_model("u0", {"w": torch.zeros(2)})
    for given, change, text in (
        (models, {}, "no data: pass forget="),
        ({}, some, "there is no model"),
        (3, some, "models is a int"),
        (dicts, some, "node 'u0' is a dict"),
        (models, some | {"measures": ["gone"]}, "measure is 'gone', expected one of forget, retain"),
        (models, some | {"measures": ["tow"]}, "measure 'tow' needs retain, test, retrained"),
        (models, some | {"retrained": retrained["u0"]}, "one model for 2 nodes"),
        (models, some | {"retrained": {"u7": retrained["u0"]}}, r"retrained names \['u7'\]"),
        (models, {"forget": []}, "node 'u0': forget: it is empty"),
        (models, {"forget": iter(SETS["forget"])}, "node 'u0': forget: a list_iterator can be gone over once"),
    ):
        with pytest.raises(ff.FiunError, match=text):
            evaluation.table(given, **change)
    with pytest.raises(ff.ArgumentError, match="no row 'u9'; there are 'u0', 'u1'"):
        evaluation.table(models, **some)["u9"]
