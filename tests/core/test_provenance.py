"""Fishers that were made in unlike ways, or are of no use, are warned of, at the caller's line."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import fiun_fast as ff
from fiun_fast.compat.ssd import ParameterPerturber

RECORD = {"estimator": "batch", "steps": 4, "samples": 64, "reduction": "mean", "dtype": "float32"}


def made(**changes) -> ff.Fisher:
    values = torch.rand(12) + 0.1
    return ff.Fisher(values, ff.Layout({"weight": (3, 4)}), ff.Provenance(**RECORD | changes))


def together(original: ff.Fisher, forget: ff.Fisher) -> dict:
    model = {"weight": torch.randn(3, 4)}
    dag = ff.InheritanceDAG()
    dag.add_model("u0", model, fisher=original)
    return {
        "dampen_": lambda: ff.dampen_(model, original, forget, dry_run=True),
        "plan": lambda: ff.plan(dag, [ff.ForgetRequest("u0", forget)]),
        "profile": lambda: ff.selection_profile(original, forget),
        "profile of a model": lambda: ff.selection_profile(original, forget, model),
        "alpha": lambda: ff.adaptive_alpha(original, forget, forget_fraction=0.1),
        "merge": lambda: ff.merge_fishers([original, forget]),
        "drop-in": lambda: ParameterPerturber(nn.Linear(4, 3, bias=False)).modify_weight(original, forget),
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"estimator": "label_free"}, "estimator batch and label_free"),
        ({"estimator": "max of 2: sample, expected"}, "estimator batch and expected/sample"),
        ({"samples": 16}, "batches of 16 and 4 samples on average"),
        ({"reduction": "sum"}, "reduction of the loss mean and sum"),
        ({"dtype": "bfloat16"}, "outputs in float32 and bfloat16"),
    ],
)
def test_unlike_fishers_are_warned_of_wherever_they_meet(changes, says):
    for how, call in together(made(), made(**changes)).items():
        with pytest.warns(ff.ProvenanceWarning, match=f"made in unlike ways: {says}") as caught:
            call()
        assert len(caught) == 1, how
        assert caught[0].filename == __file__, how
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ff.ProvenanceWarning)
        for call in together(made(), made(**changes)).values():
            call()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"steps": 3, "samples": 40}),  # a last batch that is smaller
        ({"estimator": "sample"}, {"estimator": "sample", "samples": 4}),
        ({"estimator": "optimizer", "samples": 0, "reduction": "", "dtype": ""}, {}),
        ({"estimator": "unknown", "steps": 0, "samples": 0}, {}),
        ({"estimator": "max of 2: batch"}, {}),
        ({"estimator": "by hand", "samples": 1}, {}),
    ],
)
def test_what_is_alike_or_not_known_is_not_warned_of(one, other):
    for call in together(made(**one), made(**other)).values():
        call()  # warnings are errors in these tests


def test_sequences_and_tokens_are_unlike():
    each = {"estimator": "sample", "per": "sequence"}, {"estimator": "sample", "per": "token"}
    with pytest.warns(ff.ProvenanceWarning, match="samples per sequence and token"):
        ff.selection_profile(*(made(**one) for one in each))


def test_one_warning_for_a_whole_dag_names_a_node_and_counts_the_rest():
    dag = ff.InheritanceDAG()
    for i in range(3):
        dag.add_model(f"u{i}", {"weight": torch.randn(3, 4)}, fisher=made(samples=64 * (i + 1)), parents=["u0"][:i])
    with pytest.warns(
        ff.ProvenanceWarning, match=r"Fisher of 'u1' and the .* of request 0 .*, and 1 other pairs"
    ) as seen:
        ff.plan(dag, [ff.ForgetRequest("u0", made())])
    assert len(seen) == 1


def test_what_estimates_record_is_kept_in_files_and_in_merges(tmp_path):
    model = nn.Linear(4, 3)
    loader = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
    summed = lambda out, y: functional.cross_entropy(out, y, reduction="sum")
    for options, wanted in (
        ({}, ("mean", "float32", "")),
        ({"loss_fn": summed}, ("sum", "float32", "")),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="sum")}, ("sum", "float32", "")),
        ({"loss_fn": lambda out, y: summed(out, y).square()}, ("", "float32", "")),
        ({"estimator": "label_free"}, ("mean", "float32", "")),
        ({"estimator": "sample"}, ("mean", "float32", "sequence")),
        ({"estimator": "expected", "per": "token"}, ("mean", "float32", "token")),
    ):
        for params in (None, "last"):
            fisher = ff.estimate_fisher(model, loader, params, **options)
            fisher.save(tmp_path / "f")
            merged = ff.merge_fishers([fisher, fisher])
            for one in (fisher, ff.Fisher.load(tmp_path / "f"), merged):
                assert (one.provenance.reduction, one.provenance.dtype, one.provenance.per) == wanted
    with torch.autocast("cpu", torch.bfloat16):
        half = ff.estimate_fisher(model, loader)
    assert half.provenance.dtype == "bfloat16"
    assert str(half.provenance).startswith("estimator batch, 2 steps, 12 samples, mean loss, bfloat16 outputs")


@pytest.mark.parametrize("estimator", ["batch", "softened", "sample", "expected", "label_free"])
def test_a_fisher_that_is_zero_everywhere_says_so(estimator):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    nn.init.constant_(model[0].bias, -100.0)  # a dead layer
    loader = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(3)]
    with pytest.warns(ff.EstimationWarning, match="over batches 0 to 2 is zero everywhere") as seen:
        ff.estimate_fisher(model, loader, "0.*", estimator=estimator)
    assert seen[0].filename == __file__


def test_an_accumulator_says_what_it_holds():
    model = nn.Linear(2, 2)
    accumulator = ff.FisherAccumulator(model)
    model(torch.zeros(1, 2)).sum().mul(0).backward()
    accumulator.update()
    with pytest.warns(ff.EstimationWarning, match="zero everywhere"):
        accumulator.result()
    model(torch.tensor([[float("nan"), 1]])).sum().backward()
    accumulator.update()
    with pytest.warns(ff.EstimationWarning, match="2 elements of the Fisher over batches 0 to 1 are not finite"):
        accumulator.result()
