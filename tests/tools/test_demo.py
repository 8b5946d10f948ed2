"""The demo end to end in its quick mode, and what makes its figures honest."""

from __future__ import annotations

import copy
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits as load_digits_of_sklearn

import fiun_fast as ff
from fiun_fast import cli
from fiun_fast.bench.baselines import unlearn_named
from fiun_fast.demo import run as demo
from fiun_fast.demo.data import Digits, Samples, load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.gone import random_gone
from fiun_fast.demo.networks import SCENARIOS, grow, incremental, transfer
from fiun_fast.demo.report import GONE, gone_table

pytestmark = pytest.mark.usefixtures("one_thread", "trained_once")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits(0)


@pytest.fixture(scope="module")
def chain(digits: Digits) -> Network:
    recipe = incremental(digits, 0)
    return Network(recipe, digits, grow(recipe, effort=demo.QUICK_EFFORT), "last-layer")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("demo")
    demo.run_demo(scenarios=["data-parallel", "incremental"], out=out, quick=True)
    return out, json.loads((out / "report.json").read_text())


def test_report_has_a_row_for_every_node(report: tuple[Path, dict]) -> None:
    cases = report[1]["cases"]
    assert [case["scenario"] for case in cases] == ["data-parallel"] * 2 + ["incremental"] * 2
    for case in cases:
        assert len(case["rows"]) == 5
        assert {"retraining every affected node", "one plan.run_()", "textbook chain, node by node"} <= set(
            case["seconds"]
        )
        for row in case["rows"]:
            assert (row["alpha"] is not None) == bool(row["forget"])
            assert 0 <= row["selected"] <= row["numel"]


def test_forgotten_accuracy_falls_and_the_rest_stays(report: tuple[Path, dict]) -> None:
    rows = [row for case in report[1]["cases"] for row in case["rows"] if row["forget"]]
    mean = {k: sum(row[k][0] for row in rows) / len(rows) for k in ("before", "after")}
    assert mean["before"] > 0.5
    assert mean["after"] < 0.2 * mean["before"]
    assert sum(row["before"][1] - row["after"][1] for row in rows) / len(rows) < 0.1


def test_untouched_nodes_stay(report: tuple[Path, dict]) -> None:
    for case in report[1]["cases"]:
        for row in case["rows"]:
            if not row["forget"]:
                assert row["before"] == row["after"]


def test_pictures_and_no_leftovers(report: tuple[Path, dict]) -> None:
    names = {path.name for path in report[0].iterdir()}
    pictures = {
        f"demo-{scenario}{kind}.svg" for scenario in ("data-parallel", "incremental") for kind in ("", "-merged")
    }
    assert names == pictures | {"report.json"}


def test_what_is_gone_is_measured_beside_retraining(report: tuple[Path, dict]) -> None:
    gone = report[1]["gone"]
    assert [(one["scenario"], one["node"], one["request"]) for one in gone] == [
        ("data-parallel", "merged", "“4”"),
        ("incremental", "v5", "“2”"),
    ]
    for one in gone:
        (case,) = [c for c in report[1]["cases"] if c["scenario"] == one["scenario"] and len(c["classes"]) == 1]
        (row,) = [row for row in case["rows"] if row["node"] == one["node"]]
        assert (one["alpha"], one["lam"]) == (row["alpha"], row["lam"])
        assert one["measured"].keys() == set(GONE)
        for name, (own, again) in one["measured"].items():
            assert 0 <= own["low"] <= own["value"] <= own["high"] <= 1, name
            assert (again is None) == (name in ("tow", "rmia"))
        own, again = one["measured"]["forget"]
        assert own["value"] < 0.2
        assert again["value"] < 0.2
        assert one["measured"]["probe"][0]["value"] > 0.5  # the body stays as it was


def test_random_samples_are_forgotten_too_and_the_models_put_back(digits: Digits) -> None:
    recipe = transfer(digits, 0)
    recipe = replace(recipe, steps=recipe.steps[:2])
    network = Network(recipe, digits, grow(recipe, effort=0.1), "last-layer")
    before = {node: copy.deepcopy(model.state_dict()) for node, model in network.models.items()}
    found = random_gone(network, 0.1, ("forget", "retain", "tow", "rmia"))
    assert (found.node, found.request) == ("negative", "random tenth")
    assert found.measured.keys() == {"forget", "retain", "tow", "rmia"}
    assert all(cell[0].low <= cell[0].value <= cell[0].high for cell in found.measured.values())
    for node, model in network.models.items():
        assert all(torch.equal(value, before[node][name]) for name, value in model.state_dict().items()), node
    shown = Console(file=io.StringIO(), width=80)
    shown.print(gone_table([found], "last-layer"))
    assert "random tenth" in shown.file.getvalue()
    assert "the body's features are those of before" in " ".join(shown.file.getvalue().split())


def test_report_names_no_machine(report: tuple[Path, dict]) -> None:
    import platform

    text = json.dumps(report[1])
    assert str(Path.home()) not in text
    assert str(report[0]) not in text
    assert platform.node() not in text.split('"')


def test_every_class_in_turn(tmp_path: Path) -> None:
    result = demo.run_demo(scenarios=["incremental"], out=tmp_path, all_classes=True, seeds=(0,), quick=True)
    written = json.loads((tmp_path / "demo-last-layer.json").read_text())
    assert {tuple(row[2]) for row in written["rows"] if len(row[2]) == 1} == {(label,) for label in range(10)}
    assert [summary["pairs"] for summary in written["summary"]] == [30, 80]
    assert len(result["summary"]) == 2


def test_splits_are_disjoint_and_stratified(digits: Digits) -> None:
    known = load_digits_of_sklearn()
    rows = Counter((*row, label) for row, label in zip(known.data.tolist(), known.target.tolist()))
    found = Counter(
        (*(16 * image).flatten().tolist(), label)
        for part in (digits.train, digits.validation, digits.test)
        for image, label in zip(part.images, part.labels.tolist())
    )
    assert found == rows
    assert found.total() == 1797
    for part in (digits.train, digits.validation, digits.test):
        counts = torch.bincount(part.labels, minlength=10)
        assert counts.min() > 0.9 * counts.max()


def test_choosing_never_sees_the_test_split(chain: Network, digits: Digits) -> None:
    nonsense = Samples(torch.rand_like(digits.test.images), digits.test.labels.flip(0))
    blind = Network(chain.recipe, digits._replace(test=nonsense), chain.models, chain.scope)
    honest, misled = (network.forget([1], points=8) for network in (chain, blind))
    assert [(row.alpha, row.lam, row.selected) for row in honest.rows] == [
        (row.alpha, row.lam, row.selected) for row in misled.rows
    ]
    assert honest.rows[-1].before != misled.rows[-1].before


def test_forget_puts_the_models_back(chain: Network) -> None:
    before = {node: copy.deepcopy(model.state_dict()) for node, model in chain.models.items()}
    chain.forget([0, 5], points=4)
    for node, model in chain.models.items():
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[node][name]), (node, name)


def test_recipe_and_dag_agree_on_who_is_reached(digits: Digits) -> None:
    for build in SCENARIOS.values():
        recipe = build(digits, 0)
        dag = ff.InheritanceDAG()
        for step in recipe.steps:
            dag.add_model(step.name, {"w": torch.zeros(1)}, parents=step.parents)
        fisher = ff.Fisher.from_dict({"w": torch.zeros(1)})
        labels = sorted(recipe.origin)
        requests = [ff.ForgetRequest(recipe.origin[label], fisher) for label in labels]
        reached = {node: tuple(labels[k] for k in found) for node, found in dag.reached_by(requests).items()}
        assert reached == recipe.reached(labels)


def test_retraining_reuses_what_is_not_reached(chain: Network) -> None:
    keep = {"v1": chain.models["v1"]}
    models = grow(chain.recipe, without=[2], keep=keep, effort=0.02)
    assert models["v1"] is chain.models["v1"]
    assert models["v2"] is not chain.models["v2"]
    again = grow(chain.recipe, effort=demo.QUICK_EFFORT)
    for name, value in again["v5"].state_dict().items():
        assert torch.equal(value, chain.models["v5"].state_dict()[name]), name


@pytest.mark.parametrize("classes", [(2,), (1, 4)])
def test_textbook_chain_gives_the_bits_of_the_plan(chain: Network, classes: tuple[int, ...]) -> None:
    reached = chain.recipe.reached(classes)
    asked = {label: chain.request(label) for label in classes}
    forget = {label: request.fisher for label, request in asked.items()}
    slow = {node: copy.deepcopy(chain.models[node]) for node in reached}
    fast = {node: copy.deepcopy(model) for node, model in chain.models.items()}
    alphas = dict.fromkeys(reached, 0.7)
    lams = dict.fromkeys(reached, 0.3)
    unlearn_named(
        slow,
        {node: chain.originals[node].as_dict() for node in reached},
        {node: [forget[label].as_dict() for label in labels] for node, labels in reached.items()},
        alphas,
        lams,
    )
    dag = ff.InheritanceDAG()
    for step in chain.recipe.steps:
        dag.add_model(step.name, fast[step.name], fisher=chain.originals[step.name], parents=step.parents)
    report = ff.plan(dag, asked.values(), alpha=alphas, lam=lams).run_()
    for node in reached:
        assert report[node].selected > 0
        for name, value in slow[node].state_dict().items():
            assert torch.equal(value, fast[node].state_dict()[name]), (node, name)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ff.ArgumentError, match="federated"):
        demo.run_demo(scenarios=["federate"], out=tmp_path)
    with pytest.raises(ff.ArgumentError, match="last-layer"):
        demo.run_demo(scope="head", out=tmp_path)
    with pytest.raises(ff.ArgumentError, match="estimator is 'exact', expected one of batch, softened, sample"):
        demo.run_demo(estimator="exact", out=tmp_path)


def test_seeds_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: asked.append((options["seed"], list(options["seeds"]))))
    for arguments in ([], ["--seed", "4"], ["--all-classes"], ["--all-classes", "--seed", "4", "--seed", "5"]):
        assert cli.main(["demo", *arguments]) == 0
    assert asked == [(0, [0]), (4, [4]), (0, [0, 1, 2]), (4, [4, 5])]
    assert cli.main(["demo", "--seed", "4", "--seed", "5"]) == 1
    assert "--seed is there more than once" in capsys.readouterr().err


def test_every_estimator_is_reported(tmp_path: Path) -> None:
    for estimator in ("sample", "expected", "label_free"):
        result = demo.run_demo(scenarios=["incremental"], out=tmp_path / estimator, estimator=estimator, quick=True)
        assert result["settings"]["estimator"] == estimator
        assert all(row["selected"] > 0 for case in result["cases"] for row in case["rows"] if row["forget"])


@pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning")
def test_the_whole_model_goes_by_layer(tmp_path: Path, chain: Network, digits: Digits) -> None:
    result = demo.run_demo(scenarios=["transfer"], out=tmp_path, scope="all", quick=True)
    (case,) = result["cases"]
    rows = [row for row in case["rows"] if row["forget"]]
    assert all(len(row["alpha"]) == len(row["lam"]) > 3 for row in rows)
    assert "textbook chain, node by node" not in case["seconds"]
    assert [one["request"] for one in result["gone"]] == ["“7”", "random tenth"]
    (after,) = (one["measured"]["forget"][0] for one in result["gone"][:1])
    assert after["value"] < 0.2
    whole = Network(chain.recipe, digits, chain.models, "all")
    outcome = ff.unlearn_(whole.dag, [whole.request(1)], whole.score([1]), points=8)
    wanted = {node.name: (node.alpha, node.lam) for node in outcome}
    outcome.undo_()
    assert {row.node: (row.alpha, row.lam) for row in whole.forget([1], points=8).touched} == wanted
