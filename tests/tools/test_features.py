"""The study of what features still know: its page says what its results say, and its walk is that of `tune`."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fiun_fast as ff
from fiun_fast.demo.data import fresh, load_digits
from fiun_fast.demo.experiment import Network
from fiun_fast.demo.networks import grow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def features():
    sys.path.insert(0, str(ROOT / "bench"))  # it takes networks from quality.py beside it
    try:
        specification = importlib.util.spec_from_file_location("bench_features", ROOT / "bench" / "features.py")
        module = sys.modules["bench_features"] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "bench"))
        for name in ("bench_features", "feature_rules", "quality"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def rules(features):
    return sys.modules[features.Node.__module__]


@pytest.fixture(scope="module")
def pair(features):
    """Two nodes of a chain that learn four digits."""
    digits = load_digits(0)
    whole = features.recipe_of("incremental", digits, 0)
    recipe = replace(whole, steps=whole.steps[:2], origin={c: whole.origin[c] for c in range(4)})
    network = Network(recipe, digits, grow(recipe), "all", "batch", 16)
    return recipe, network, features.Fishers(recipe, network, {})


def node_of(features, pair, name: str, label: int):
    recipe, network, fishers = pair
    train = network.seen(name, recipe.data(name))
    sets = train, network.split(name, "validation"), network.split(name, "test")
    of = fishers.of(name, label)
    return features.Node(network.models[name], *sets, label, of, fishers.gradient(label), fresh(7).eval(), 0)


def test_the_page_has_the_table_of_the_committed_results(features):
    result = json.loads(features.RESULTS.read_text())
    page = features.PAGE.read_text(encoding="utf-8")
    shown = page.partition("<!-- features -->\n")[2].partition("<!-- /features -->")[0]
    assert shown == f"\n{features.tables(result)}\n"
    measured = [(row["seed"], row["scenario"]) for row in result["rows"]]
    assert len(measured) == len(set(measured)), "counted twice"


def test_what_the_page_says_of_its_table_holds(features):
    rows = json.loads(features.RESULTS.read_text())["rows"]
    assert {row["seed"] for row in rows} == set(features.NEW)
    found = {rule: features.summary(rows, rule) for rule in (features.BEFORE, features.RETRAINED, *features.RULES)}
    base, never, term = found[features.BY_LAYER], found[features.RETRAINED], found["feature term"]
    assert base["ridge"] - never["ridge"] > 0.03
    assert base["nearest"] - never["nearest"] > 0.155
    for rule in features.RULES:
        if found[rule]["within 1"] >= base["within 1"]:
            assert abs(found[rule]["ridge"] - base["ridge"]) < 0.005, rule
            assert abs(found[rule]["nearest"] - base["nearest"]) < 0.01, rule
    assert term["within 1"] >= base["within 1"]
    assert base["nearest"] - term["nearest"] == pytest.approx(0.002, abs=0.0005)
    point = found["… a point lost allowed"]
    assert point["within 1"] < 0.545
    assert (found[features.BEFORE]["nearest"] - point["nearest"]) / (
        found[features.BEFORE]["nearest"] - never["nearest"]
    ) == pytest.approx(0.25, abs=0.02)
    assert base["nearest_rest"] - point["nearest_rest"] == pytest.approx(0.016, abs=0.0005)
    until = [found[rule] for rule, way in features.RULES.items() if isinstance(way, features.Until)]
    assert len(until) == 4
    for one in until:
        assert 0.285 < one["lost"] < 0.59
        assert 0.945 < one["ridge_rest"] < 0.97 < never["ridge_rest"]
        assert base["nearest_rest"] - one["nearest_rest"] > 0.6 * (base["nearest"] - one["nearest"])
    each = found["… BatchNorm anew at each step, last layer again"]
    assert each["within 1"] == found["last layer alone"]["within 1"] == 0.975
    assert found["… signed"]["lost"] > base["lost"]
    assert found["… signed"]["nearest"] == pytest.approx(base["nearest"] - 0.008, abs=0.0005)

    def kept(rule, row):
        pairs = zip(row["pairs"][rule]["left"], row["pairs"][rule]["lost"], strict=True)
        return [left <= 0.01 and lost <= 0.01 for left, lost in pairs]

    rule = "… best estimator for each layer"
    changes = [b - a for row in rows for a, b in zip(kept(features.BY_LAYER, row), kept(rule, row), strict=True)]
    assert (changes.count(1), changes.count(-1)) == (5, 2)
    seconds = {rule: sum(row["seconds"][rule] for row in rows) for rule in features.RULES}
    assert seconds[rule] > 2 * seconds[features.BY_LAYER]
    assert 4 < seconds["… BatchNorm anew at each step, last layer again"] / seconds[features.BY_LAYER] < 4.5
    broken = [
        (row["scenario"], k)
        for row in rows
        for k, lost in enumerate(row["pairs"]["… then BatchNorm anew"]["lost"])
        if lost > 0.1
    ]
    assert broken == [("incremental", 0), ("incremental", 0)], "the first node, of two classes"


@pytest.mark.parametrize("signed", [False, True])
def test_the_walk_without_more_is_what_tune_does_by_layer(features, pair, signed):
    _, network, fishers = pair
    for label in (0, 3):
        request = network.request(label)
        if signed:
            fisher = ff.Fisher.from_dict(request.fisher.as_dict())
            gradient = ff.Gradient.from_dict({n: fishers.gradient(label)[n] for n in fisher.layout.names})
            request = ff.ForgetRequest(request.origin, fisher, gradient=gradient)
        chosen = ff.tune(network.dag, [request], network.score([label]), by="layer")
        plan = ff.plan(network.dag, [request])
        plan.set_values_(chosen)
        plan.run_()
        names = [n for n in chosen if isinstance(chosen[n].alpha, dict)]
        assert "v2" in names
        wanted = {name: {k: v.clone() for k, v in network.models[name].state_dict().items()} for name in names}
        network.restore()
        for name in names:
            node = node_of(features, pair, name, label)
            score = features.FeatureScore(node.validation, label)
            features.Way(signed=signed)(node, score)
            assert len(node.done) > 1, "the body was dampened as well"
            found = node.model.state_dict()
            for key, value in wanted[name].items():
                torch.testing.assert_close(found[key], value, rtol=1e-6, atol=0)
            node.restore()


def test_every_rule_chooses_and_is_taken_back(features, rules, pair, monkeypatch):
    monkeypatch.setattr(rules, "UNTIL", (0.4,))
    node = node_of(features, pair, "v2", 1)
    kept = {key: value.clone() for key, value in node.model.state_dict().items()}
    node.fishers = {**node.fishers, **dict.fromkeys(features.ESTIMATORS, node.fishers["batch"])}
    score = features.FeatureScore(node.validation, 1)
    states = {}
    for rule, way in features.RULES.items():
        few = replace(way, shares=(0.01, 0.005)) if isinstance(way, features.Way) else way
        few(node, score)
        states[rule] = {key: value.clone() for key, value in node.model.state_dict().items()}
        assert (states[rule]["head.weight"] != kept["head.weight"]).any(), rule
        node.restore()
        assert all(torch.equal(value, kept[key]) for key, value in node.model.state_dict().items()), rule
    variance = [key for key in kept if key.endswith("running_var")][-1]
    measured = {rule for rule, state in states.items() if not torch.equal(state[variance], kept[variance])}
    assert {rule for rule in states if "then BatchNorm" in rule} <= measured
    assert all("BatchNorm" in rule for rule in measured)
    for key in kept:
        same = torch.equal(states["last layer alone"][key], kept[key])
        assert same == (not key.startswith("head."))


def test_how_a_class_lies_against_an_obvious_loop(rules):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 5, generator=generator).double(), torch.arange(60) % 3
    x[:, 0] += y
    told, apart = [], []
    for k in (y == 1).nonzero()[:, 0].tolist():
        others = torch.arange(60) != k
        distances = {c: float(((x[k] - x[(y == c) & others].mean(0)) ** 2).sum()) for c in (0, 1, 2)}
        nearest = min(distances[0], distances[2])
        told.append(distances[1] < nearest)
        apart.append((nearest - distances[1]) / (nearest + distances[1]))
    assert rules.lies(x, y, 1) == pytest.approx((sum(told) / 20, sum(apart) / 20))


def test_the_head_of_means_answers_with_the_nearest_mean(features, pair):
    _, network, _ = pair
    samples = network.split("v2", "test")
    model = features.with_means(network.models["v2"], samples)
    with torch.no_grad():
        x = model.body(samples.images)
        means = torch.stack([x[samples.labels == c].mean(0) for c in range(4)])
        assert torch.equal(model.head(x).argmax(1), torch.cdist(x, means).argmin(1))
        logits = model.head(x)[:, :4]
    own = logits.gather(1, samples.labels[:, None])[:, 0]
    others = logits.scatter(1, samples.labels[:, None], -torch.inf).amax(1)
    assert (own - others).mean().item() == pytest.approx(4, rel=1e-3)


def test_judging_against_obvious_sums(features, pair):
    node = node_of(features, pair, "v2", 2)
    values = dict(zip(features.COLUMNS, features.judged(node.model, node.train, node.test, 2, 0.5, 0), strict=True))
    left, kept = pair[1].accuracy("v2", [2])
    assert values["left"] == pytest.approx(left)
    assert values["lost"] == pytest.approx(0.5 - kept)
    assert all(0.9 <= values[c] <= 1 for c in features.COLUMNS[2:]), "these digits are easily told"


def test_a_run_that_was_stopped_goes_on(features, monkeypatch, tmp_path):
    asked = []

    def measured(scenario, seed, cache):
        asked.append((seed, scenario))
        if len(asked) == 2:
            raise KeyboardInterrupt
        rules = (features.BEFORE, features.RETRAINED, *features.RULES)
        return {rule: {column: [0.0, 0.5] for column in features.COLUMNS} for rule in rules}, {}

    monkeypatch.setattr(features, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        features.study([1], tmp_path, tmp_path / "found.json")
    result = features.study([1], tmp_path, tmp_path / "found.json")
    assert [row["scenario"] for row in result["rows"]] == list(features.NETWORKS)
    assert len(asked) == len(features.NETWORKS) + 1
    found = features.summary(result["rows"], features.BY_LAYER)
    assert found["pairs"] == 2 * len(features.NETWORKS)
    assert found["within 1"] == 0.5
    assert found["lost"] == 0.25
