"""The paper's comparison: its networks, that its methods are what they are named, and that the page has its results."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch

import fiun_fast as ff
from fiun_fast import cli
from fiun_fast.compat.ssd import ParameterPerturber

pytest.importorskip("sklearn", reason="the data comes with scikit-learn")
from fiun_fast.demo.data import Samples, load_digits
from fiun_fast.paper import methods, networks, published, run
from fiun_fast.paper.report import tables

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "bench" / "results" / "paper.json", ROOT / "docs" / "paper.md"


@pytest.fixture(scope="module")
def digits():
    return load_digits(0)


@pytest.fixture(scope="module")
def chain(digits):
    """Four models, three classes from two origins, trained a little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "QUICK_EFFORT", 0.2)
        return methods.Network(networks.incremental(digits, 0, "several classes"), digits, quick=True)


@pytest.mark.parametrize(
    ("name", "request_", "reached"),
    [
        ("federated", "one class", {"r1": 1, "r2": 1, "r3": 1, "r4": 1}),
        ("federated", "several classes", {"r1": 2, "r2": 3, "r3": 3, "r4": 3}),
        ("data-parallel", "one class", {"u0": 1, "u1": 1, "u2": 1, "u3": 1, "u4": 1}),
        ("data-parallel", "several classes", {"u1": 2, "u2": 1, "u4": 3}),
        ("incremental", "one class", {"u0": 1, "u1": 1, "u2": 1, "u3": 1}),
        ("incremental", "several classes", {"u0": 2, "u1": 3, "u2": 3, "u3": 3}),
        ("transfer", "one class", {"u0": 1, "u1": 1, "u2": 1, "u3": 1}),
        ("transfer", "several classes", {"u0": 2, "u1": 3, "u2": 2, "u3": 2}),
    ],
)
def test_requests_reach_what_inherited(digits, name, request_, reached):
    task = networks.NETWORKS[name](digits, 4, request_)
    found = task.recipe.reached(task.classes)
    assert {node: len(classes) for node, classes in found.items()} == reached
    assert len(task.requests) == (1 if request_ == "one class" else 2)
    assert sorted(label for classes in task.requests.values() for label in classes) == sorted(task.classes)
    for at, classes in task.requests.items():
        assert set(classes) <= task.recipe.data(at).classes
        for parent in task.recipe[at].parents:  # it is where the data entered
            assert not set(classes) & task.recipe.data(parent).classes


def test_dealt_samples_are_all_there_once(digits):
    hands = networks.deal(digits.train, [{1, 2}, {2}, ()], seed=3)
    every = set(range(10))
    assert [hand.classes for hand in hands] == [every - {1, 2}, every - {2}, every]
    rows = [tuple(image.flatten().tolist()) for hand in hands for image in hand.images]
    assert sorted(rows) == sorted(tuple(image.flatten().tolist()) for image in digits.train.images)
    sizes = [int((hand.labels == 0).sum()) for hand in hands]
    assert max(sizes) - min(sizes) <= 1


def test_methods_change_only_what_they_return(chain):
    before = {node: copy.deepcopy(model.state_dict()) for node, model in chain.models.items()}
    for name, apply in methods.METHODS.items():
        models, seconds = apply(chain)
        assert models.keys() == chain.reached.keys(), name
        assert all(value >= 0 for value in seconds.values())
        for node, model in models.items():
            changed = any(not torch.equal(v, before[node][k]) for k, v in model.state_dict().items())
            assert changed == (name != "untouched"), (name, node)
            body = [k for k in before[node] if not k.startswith("head.")]
            if name.endswith("last layer"):
                assert all(torch.equal(model.state_dict()[k], before[node][k]) for k in body), (name, node)
        for node, model in chain.models.items():
            assert all(torch.equal(v, before[node][k]) for k, v in model.state_dict().items()), (name, node)


def test_choosing_never_sees_test_data(chain, digits):
    nonsense = Samples(torch.rand_like(digits.test.images), digits.test.labels.flip(0))
    blind = copy.copy(chain)
    blind.digits = digits._replace(test=nonsense)
    for name in ("fiun_fast, last layer", "SSD, last layer"):
        honest, misled = (methods.METHODS[name](one)[0] for one in (chain, blind))
        for node, model in honest.items():
            assert all(map(torch.equal, model.parameters(), misled[node].parameters()))
    shares = [[methods.accuracies(one, node, one.models[node]) for node in one.reached] for one in (chain, blind)]
    assert [of[:2] for of in shares[0]] != [of[:2] for of in shares[1]]
    assert [of[2:] for of in shares[0]] == [of[2:] for of in shares[1]]


def test_ssd_is_the_published_class(chain):
    """Model by model, by the drop-in in its strict mode, which has the published bits."""
    found, _ = methods.ssd(chain, "whole model", (2.0, 0.5))
    for node in ("u0", "u3"):
        model = copy.deepcopy(chain.models[node])
        perturber = ParameterPerturber(model, parameters={"selection_weighting": 2.0, "dampening_constant": 0.5})
        original = perturber.calc_importance(chain.original_data(node))
        forget = perturber.calc_importance(chain.forget_data(chain.origins(node)))
        report = perturber.modify_weight(original, forget)
        assert report.selected > 0
        assert all(map(torch.equal, model.parameters(), found[node].parameters())), node


def test_nodes_are_retrained_without_what_reaches_them_alone(digits, monkeypatch):
    network = methods.Network(networks.transfer(digits, 0, "several classes"), digits, quick=True)
    without, grow = {}, methods.grow

    def seen(recipe, *, without, keep, effort):
        (node,) = network.models.keys() - keep.keys()
        asked[node] = without
        return grow(recipe, without=without, keep=keep, effort=effort)

    asked = without
    monkeypatch.setattr(methods, "grow", seen)
    models, _ = methods.retrained(network)
    assert asked == {"u0": (0, 1), "u1": (0, 1, 9), "u2": (0, 1), "u3": (0, 1)}
    assert models.keys() == asked.keys()


def test_divergence_is_that_of_softened_answers():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, dtype=torch.float64)
    p, q = ((logits / 2).exp() for logits in (teacher, student))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    expected = sum(float(p[n, c] * (p[n, c] / q[n, c]).log()) for n in range(5) for c in range(4)) / 5 * 4
    assert float(methods.divergence(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-12)
    assert float(methods.divergence(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-12)


def test_a_divisor_is_another_alpha_and_another_lambda(chain):
    """The page says so; exact for a power of two."""
    found = []
    for scale, factor in ((1.0, 4.0), (0.25, 1.0)):
        models = chain.copies()
        plan = methods.planned(chain, models, *methods.estimated(chain, models, "last layer"), scale=scale)
        plan.set_values_(alpha=factor, lam=factor)
        assert plan.run_()["u3"].selected > 0
        found.append(models)
    for node in chain.reached:
        assert all(map(torch.equal, found[0][node].parameters(), found[1][node].parameters())), node
    rows = published.at_divisors(chain)
    assert [row["value"] for row in rows] == list(published.DIVISORS)


def test_runs_resumes_and_fills_its_page(tmp_path, monkeypatch, capsys):
    few = ("untouched", "fiun_fast, last layer", "retraining")
    monkeypatch.setattr(methods, "METHODS", {name: methods.METHODS[name] for name in few})
    out, page = tmp_path / "paper.json", tmp_path / "paper.md"
    page.write_text("<!-- measured -->\nold\n<!-- /measured -->\n")
    arguments = ["paper", "--quick", *("--network", "incremental") * 2, "--out", str(out)]
    assert cli.main(arguments) == 0
    result = json.loads(out.read_text())
    assert {row["part"] for row in result["rows"]} == {"method", "alpha", "divisor", "launch", "timers"}
    nodes = [row["nodes"] for row in result["rows"] if row["part"] == "method"]
    assert len(nodes) == 2 * len(few)
    assert all(0 <= share <= 1 for of in nodes for shares in of.values() for share in shares)

    def again(*arguments):
        raise AssertionError("this was there already")

    monkeypatch.setattr(run, "unit", again)
    assert cli.main([*arguments, "--page", str(page)]) == 0
    assert tables(result) in page.read_text()
    assert "old" not in page.read_text()
    with pytest.raises(AssertionError, match="there already"):
        run.run_paper(out=out, networks=["incremental"], seeds=(1,), quick=True)
    with pytest.raises(ff.ArgumentError, match="network is 'ring', expected one of federated"):
        run.run_paper(out=out, networks=["ring"])


def written(at: Path, seconds: float, environment: object, **settings: object) -> None:
    """Results of a run that differed in these, and was like one of today in all else."""
    if isinstance(environment, dict):
        environment = run.environment() | {"threads": 1} | environment
    settings = json.loads(json.dumps(run.settings_of(quick=True))) | settings
    result = {"settings": settings, "environment": environment, "seconds": seconds, "rows": []}
    (at / "r.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("make", "options", "error", "match"),
    [
        (lambda at: (at / "r.json").write_text('{"a":'), {}, ff.ArgumentError, "holds no results of this"),
        (lambda at: (at / "r.json").write_text('{"a": 1}'), {}, ff.ArgumentError, "holds no results of this"),
        (lambda at: (at / "r.json").write_bytes(b"\xff"), {}, ff.ArgumentError, "holds no results of this"),
        (lambda at: (at / "r.json").mkdir(), {}, ff.FileWriteError, "r.json cannot be used"),
        (lambda at: (at / "f").write_text(""), {"out": "f/r.json"}, ff.FileWriteError, "r.json cannot be used"),
        (lambda at: None, {"page": "p.md"}, ff.ArgumentError, "p.md cannot be read"),
        (lambda at: (at / "p.md").write_text("text"), {"page": "p.md"}, ff.ArgumentError, "p.md has no lines <!-- "),
        (lambda at: None, {"seeds": ()}, ff.ArgumentError, "seeds is empty"),
        (lambda at: written(at, 5.0, []), {}, ff.ArgumentError, "holds no results of this"),
        (lambda at: written(at, 5.0, {}, quick=False), {}, ff.ArgumentError, "quick was False and is True. Name"),
        (
            lambda at: written(at, 5.0, {"commit": "0ld", "cpu": "another"}, scrub={}),
            {},
            ff.ArgumentError,
            "scrub was {} and is .*'epochs': 10.*; cpu was 'another' and is .*; commit was '0ld' and is ",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_said_before_anything_is_trained(tmp_path, monkeypatch, make, options, error, match):
    def early(*arguments):
        raise AssertionError("files are looked at first")

    monkeypatch.setattr(run, "unit", early)
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    before = {at: at.read_bytes() for at in tmp_path.iterdir() if at.is_file()}
    with pytest.raises(error, match=match):
        run.run_paper(**{"out": "r.json", "quick": True, **options})
    assert all(at.read_bytes() == content for at, content in before.items())


def test_without_its_extras_it_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiun_fast.paper.run", None)
    assert cli.main(["paper"]) == 1
    assert "pip install 'fiun_fast[demo]'" in capsys.readouterr().err


def test_the_page_has_the_committed_results():
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert f"<!-- measured -->\n\n{tables(result)}\n<!-- /measured -->" in text
    assert not result["settings"]["quick"]
    rows = [row for row in result["rows"] if row["part"] == "method"]
    assert {row["method"] for row in rows} == set(methods.METHODS)
    units = {(row["network"], row["request"], row["seed"]) for row in rows}
    seeds = {seed for _, _, seed in units}
    assert units == {(n, r, s) for n in networks.NETWORKS for r in networks.REQUESTS for s in seeds}
    assert seeds == set(run.SEEDS)


def test_what_the_page_says_of_them_holds():
    rows = [row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if row["part"] == "method"]

    def share(method: str, request: str, index: int) -> float:
        of = [row["nodes"].values() for row in rows if (row["method"], row["request"]) == (method, request)]
        return mean(mean(node[index] for node in nodes) for nodes in of)

    def seconds(method: str) -> float:
        return mean(sum(row["seconds"].values()) for row in rows if row["method"] == method)

    last, whole, layers = (f"fiun_fast, {of}" for of in ("last layer", "whole model", "whole model, by layer"))
    for request in networks.REQUESTS:
        for method in (last, layers):
            assert share(method, request, 0) < 0.002, method
            assert share(method, request, 1) > share("untouched", request, 1) - 0.002, method
        assert share("SSD, last layer", request, 1) < share(last, request, 1) + 0.002
        assert share("fine-tuning", request, 0) < 0.03
        assert share("SCRUB", request, 0) < 0.002
        for method in ("fine-tuning", "SCRUB"):
            assert share(method, request, 1) > share("retraining", request, 1) - 0.002
    several = networks.REQUESTS[1]
    for method in (whole, "SSD, whole model"):
        assert share(method, several, 0) > 0.03
        assert share(method, several, 1) < 0.95
    published = "SSD, whole model, as published"
    assert share(published, several, 0) > 0.5 > 0.05 > share(published, networks.REQUESTS[0], 0)
    assert seconds(last) < seconds("retraining") < seconds(whole) < seconds(layers)
