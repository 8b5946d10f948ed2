"""Measures that need models which never saw the data: KLoM, forget quality, PrivLeak; tables of docs/evaluation.md.

    python bench/oracles.py            bench/results/oracles.json and the tables; some minutes of one core
    python bench/oracles.py --quick    one seed, little training: whether it runs
    python bench/oracles.py --tables   only the tables, from the committed results

KLoM: heads on the features of a network that learned all digits. An ensemble learns all of them and forgets a class, or
a random tenth; another one, the oracles, never learns these. Heads of an ensemble differ in how they began. Language
models: small transformers that have facts by heart, of bench/language_models.py, which forget some and stand beside
one that was trained without these.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import language_models as study
import torch
from small_transformers import Language
from torch import Tensor, nn
from torch.nn import functional

import fiun_fast as ff
from fiun_fast import evaluation
from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.demo.data import CLASSES, Samples, load_digits
from fiun_fast.demo.networks import grow, transfer
from fiun_fast.evaluation.shadow_heads import Heads
from fiun_fast.tuning import tune_plan

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "oracles.json", ROOT / "docs" / "evaluation.md"
SEEDS = (0, 1, 2)
MEMBERS, STEPS, LR, BATCH, SMOOTHING = 200, 200, 1e-2, 64, 0.1  # heads an ensemble; of their training
SHARE = 0.1  # of the training data, in the random subset
POINTS = 16  # alphas tried for each lambda
SETS = ("forgotten", "retained", "test")


# ------------------------------------------------------------------------------------------------------------- KLoM
def ensemble(x: Tensor, y: Tensor, count: int, knows: bool, seed: int, quick: bool) -> Heads:
    """Trained heads; the first `count` samples are known to all of them, or to none."""
    members = 8 if quick else MEMBERS
    heads = Heads(x, y, CLASSES, torch.full((members, count), knows), seed)
    heads.train(20 if quick else STEPS, LR, BATCH, SMOOTHING)
    return heads


def score(random: bool, forget: Samples, validation: Samples, gone: Tensor, heads: Heads) -> Callable[..., float]:
    """For `ff.tune`: a class is to go and the rest to stay; random samples are to look like ones never seen."""

    def look(head: nn.Module, data: Samples, rows: Tensor) -> tuple[float, float]:
        logits = head(data.images[rows])
        sure = logits.softmax(1).gather(1, data.labels[rows, None])
        return (logits.argmax(1) == data.labels[rows]).float().mean().item(), sure.mean().item()

    @torch.no_grad()
    def evaluate(name: str, head: Any) -> float:
        kept, sure_kept = look(head, validation, ~gone)
        fall = max(0.0, before[name] - kept)
        if random:
            return -abs(look(head, forget, torch.ones_like(forget.labels, dtype=torch.bool))[1] - sure_kept) - fall
        left, sure_left = look(head, validation, gone)
        return -(left + fall + 0.1 * sure_left - 0.02 * sure_kept)

    with torch.no_grad():
        before = {name: look(head, validation, ~gone)[0] for name, head in heads.modules.items()}
    return evaluate


def unlearn(heads: Heads, evaluate: Callable[..., float], count: int) -> None:
    """One plan of all heads, each with its own Fishers, alpha and lambda."""
    originals, forget = heads.fishers("batch", min(16, max(1, count // 4)))
    dag = ff.InheritanceDAG()
    for name, head in heads.modules.items():
        dag.add_model(name, head, fisher=originals[name])
    plan = ff.plan(dag, [ff.ForgetRequest(name, fisher) for name, fisher in forget.items()])
    plan.set_values_(tune_plan(plan, evaluate, points=POINTS, lams=(0.1, 0.01)))
    plan.run_()


@torch.no_grad()
def answers(heads: Heads, data: Samples) -> list[evaluation.Answers]:
    """Of each head."""
    found = [functional.linear(data.images, head.weight, head.bias) for head in heads.modules.values()]
    return [evaluation.Answers(logits, data.labels) for logits in found]


def klom(seed: int, quick: bool) -> list[dict[str, Any]]:
    """Of each request the distances before and after unlearning, and of one half of the oracles from the other."""
    digits = load_digits(seed)
    recipe = transfer(digits, seed)
    source = grow(replace(recipe, steps=recipe.steps[:1]), effort=0.1 if quick else 1.0)["source"]

    def features(samples: Samples) -> Samples:
        with torch.no_grad():
            return Samples(source.body(samples.images), samples.labels)

    train, validation, test = map(features, digits)
    rows = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    tenth = torch.zeros(len(rows), dtype=torch.bool)
    tenth[rows[: round(SHARE * len(rows))]] = True
    found = []
    for request, mask in ((f"“{seed}”", train.labels == seed), ("random tenth", tenth)):
        random = request == "random tenth"
        forget, retain = train.take(mask), train.take(~mask)
        x, y = (torch.cat(pair) for pair in zip(forget, retain, strict=True))
        count = len(forget.labels)
        knew, oracles = (ensemble(x, y, count, knows, seed + 10 * knows, quick) for knows in (True, False))
        again = ensemble(x, y, count, False, seed + 20, quick)
        gone = torch.zeros_like(validation.labels, dtype=torch.bool) if random else validation.labels == seed
        sets = dict(zip(SETS, (forget, retain, test if random else test.without([seed])), strict=True))
        reference = {name: answers(oracles, data) for name, data in sets.items()}

        def distances(heads: Heads, sets: Any = sets, reference: Any = reference) -> dict[str, float]:
            return {n: evaluation.klom(answers(heads, data), reference[n]).mean.value for n, data in sets.items()}

        before = distances(knew)
        unlearn(knew, score(random, forget, validation, gone, knew), count)
        of = {"trained": before, "unlearned": distances(knew), "other oracles": distances(again)}
        found += [{"part": "klom", "seed": seed, "request": request, "ensemble": k, **v} for k, v in of.items()]
    return found


# --------------------------------------------------------------------------------------------------- language models
METHODS = {
    name: study.METHODS[name] for name in ("untouched", "one shot", "one shot, repair", "NPO, retain", "ascent, retain")
} | {"another retrained": lambda task, model: study.retrained(replace(task, seed=task.seed + 500), model)}


def unseen(task: study.Task) -> list[study.Item]:
    """The questions that are to be forgotten with answers drawn anew from the same words, which nobody was shown."""
    dice = torch.Generator().manual_seed(task.seed + 1)
    pool = torch.cat([answer for _, answer in task.forget])
    return [(q, pool[torch.randint(len(pool), (len(a),), generator=dice)]) for q, a in task.forget]


def asked(pairs: Sequence[study.Item]) -> list[tuple[Tensor, Tensor]]:
    """Batches of inputs and targets in which only the answers count."""
    found = []
    for question, answer in pairs:
        ids = torch.cat([question, answer])[None]
        targets = ids[:, 1:].clone()
        targets[:, : len(question) - 1] = -100
        found.append((ids[:, :-1], targets))
    return found


def language(seed: int, quick: bool) -> list[dict[str, Any]]:
    """Truth ratios and Min-K% against a model that was trained without."""
    found, trained = [], None
    for name in ("domain", "facts"):
        fresh = lambda: Language(study.VOCABULARY)  # noqa: E731
        task = study.language_task("GPT-2-shaped", name, fresh, seed, 20 if quick else 320)
        if trained is None:
            torch.manual_seed(seed)
            trained = fresh()
            study.learn(task, trained, [*task.forget, *task.retain])
        oracle = fresh()
        study.retrained(task, oracle)
        dice, holdout = torch.Generator().manual_seed(seed), asked(unseen(task))
        wrong = []
        for _, answer in task.forget:
            others = [a for _, a in task.forget if not a.equal(answer)]
            wrong.append([others[i] for i in torch.randperm(len(others), generator=dice)[:5].tolist()])
        for method, apply in METHODS.items():
            model = deepcopy(trained)
            torch.manual_seed(seed)
            apply(task, model)
            quality = evaluation.forget_quality(model, oracle, task.forget, wrong)
            leak = evaluation.privleak(model, oracle, forget=asked(task.forget), holdout=holdout)
            with torch.no_grad():
                left = float(task.recalled(model, task.forget).double().mean())
                kept = float(task.recalled(model, task.retain).double().mean())
            row = {"p_value": quality.p_value, "statistic": quality.statistic, "privleak": leak.value}
            found.append({"part": "language", "seed": seed, "task": name, "method": method} | row)
            found[-1] |= {"left": left, "kept": kept, "questions": len(task.forget)}
            print(json.dumps(found[-1]), flush=True)
    return found


# ------------------------------------------------------------------------------------------------------------ tables
def klom_table(result: dict[str, Any]) -> str:
    """Means over the seeds, with the standard deviation."""
    rows = [row for row in result["rows"] if row["part"] == "klom"]
    lines = []
    for random in (False, True):
        for kind in dict.fromkeys(row["ensemble"] for row in rows):
            of = [row for row in rows if row["ensemble"] == kind and (row["request"] == "random tenth") == random]
            request = "random tenth" if random else "one class"
            lines.append([f"{request}: {kind}", *(_spread([row[name] for row in of], 2) for name in SETS)])
    return markdown(["KLoM from the oracles, nats", *SETS], lines)


def language_table(result: dict[str, Any]) -> str:
    """Of p-values the range over the seeds, of the rest means."""
    rows = [row for row in result["rows"] if row["part"] == "language"]
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            of = [row for row in rows if row["task"] == task and row["method"] == method]
            p = sorted(row["p_value"] for row in of)
            cells = [f"{p[0]:.2g} … {p[-1]:.2g}", _spread([row["statistic"] for row in of], 2)]
            cells.append(_spread([row["privleak"] for row in of], 0))
            cells += [_spread([100 * row[key] for row in of], 0) for key in ("left", "kept")]
            lines.append([f"{task}: {method}", *cells])
    return markdown(["", "forget quality, p", "KS distance", "PrivLeak, %", "left, %", "kept, %"], lines)


def _spread(values: Sequence[float], digits: int) -> str:
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


TABLES = {"klom": klom_table, "language": language_table}


def run(quick: bool) -> dict[str, Any]:
    """All seeds."""
    torch.set_num_threads(1)  # these models are too small to share
    began, rows = time.process_time(), list[dict[str, Any]]()
    for seed in SEEDS[:1] if quick else SEEDS:
        rows += klom(seed, quick)
        print(f"seed {seed}, KLoM: {time.process_time() - began:.0f} CPU s", flush=True)
        rows += language(seed, quick)
        print(f"seed {seed}: {time.process_time() - began:.0f} CPU s", flush=True)
    settings = {"seeds": SEEDS, "members": MEMBERS, "share": SHARE}
    return {
        "settings": settings,
        "environment": environment(),
        "seconds": time.process_time() - began,
        "rows": rows,
    }


def main() -> None:
    """Run the study, or only write its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tables", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        result = run(quick=True)
    else:
        if not arguments.tables:
            write_json(RESULTS, run(quick=False))
        result = json.loads(RESULTS.read_text(encoding="utf-8"))
    for mark, table in TABLES.items():
        text = table(result)
        print(text)
        if not arguments.quick:
            fill(PAGE, mark, f"\n{text}\n")


if __name__ == "__main__":
    main()
