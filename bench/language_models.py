"""What unlearning does to small transformers, beside other methods: tables for docs/language-models.md.

    python bench/language_models.py            all models, six minutes of one core; bench/results/language-models.json
    python bench/language_models.py --quick    one model, one task, few steps: whether it runs
    python bench/language_models.py --tables   only the tables, from the committed results

Each model is trained on the spot until it has its facts by heart, forgets some of them by every method from the same
state, and is looked at in five ways. What each method needs (when to stop, how much to scale) is decided on the data to
be forgotten and the retained training data.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from small_transformers import Classifier, Language, adapt
from torch import Tensor, nn
from torch.nn import functional

import fiun_fast as ff
from fiun_fast.bench.files import environment, fill, markdown, write_json
from fiun_fast.sequences import answer_losses, multiple_choice, reproduced

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "bench" / "results" / "language-models.json", ROOT / "docs" / "language-models.md"
WORDS, NAMES, RELATIONS, ANSWERS, OWN = 100, 40, 4, 60, 60  # tokens of text; of facts; of a domain that has its own
VOCABULARY = WORDS + NAMES + RELATIONS + ANSWERS + OWN
CLASSES, LENGTH = 8, 16
SHARES = (0.01, 0.03, 0.1)  # of all elements, a round
UNKNOWN = math.log(64)  # an answer with a larger loss a token is no longer known

Item = tuple[Tensor, Tensor]  # prompt and answer, or text and label


# ---------------------------------------------------------------------------------------------------------------- data
def chain(dice: torch.Generator, words: int = WORDS) -> Tensor:
    """A Markov chain: [words, words] probabilities, a few likely successors each."""
    return (2.5 * torch.randn(words, words, generator=dice)).softmax(1)


def texts(transitions: Tensor, count: int, dice: torch.Generator) -> Tensor:
    """[count, LENGTH] words drawn from a chain."""
    found = [torch.randint(len(transitions), (count,), generator=dice)]
    for _ in range(LENGTH - 1):
        found.append(torch.multinomial(transitions[found[-1]], 1, generator=dice)[:, 0])
    return torch.stack(found, 1)


def facts(dice: torch.Generator) -> list[Item]:
    """Name and relation -> three tokens, all shared among the facts."""
    first = WORDS + NAMES + RELATIONS
    prompts = [(WORDS + n, WORDS + NAMES + r) for n in range(NAMES) for r in range(RELATIONS)]
    return [(torch.tensor(p), first + torch.randint(ANSWERS, (3,), generator=dice)) for p in prompts]


def domain(dice: torch.Generator) -> list[Item]:
    """Forty facts whose tokens occur nowhere else."""
    first = VOCABULARY - OWN
    prompts = [(first + n, first + 20 + r) for n in range(20) for r in range(2)]
    return [(torch.tensor(p), first + 22 + torch.randint(OWN - 22, (3,), generator=dice)) for p in prompts]


def canaries(transitions: Tensor, dice: torch.Generator) -> list[Item]:
    """Twenty lines of ordinary words that go on with six words that no chain would give."""
    return [(line[:4], torch.randint(WORDS, (6,), generator=dice)) for line in texts(transitions, 20, dice)]


# --------------------------------------------------------------------------------------------------------------- tasks
@dataclass(frozen=True)
class Task:
    """A model that knows some items, of which some are to go.

    `fresh`: an untrained one; `text` [n, T]: retained text, of which a language model's loss is part of every training;
    `unseen`: more of it, for perplexity; `asked`: held-out items to forget and to keep, which a classifier is asked.
    """

    model: str
    name: str
    fresh: Callable[[], nn.Module]
    forget: Sequence[Item]
    retain: Sequence[Item]
    losses: Callable[[nn.Module, Sequence[Item]], Tensor]
    recalled: Callable[[nn.Module, Sequence[Item]], Tensor]
    batches: Callable[[Sequence[Item]], list[tuple[Tensor, Tensor]]]  # for Fishers
    text: Tensor | None = None
    unseen: Tensor | None = None
    asked: tuple[Sequence[Item], Sequence[Item]] | None = None
    steps: int = 0
    lr: float = 2e-3
    seed: int = 0

    def still(self, model: nn.Module, items: Sequence[Item]) -> Tensor:
        """Which items must still be worked on."""
        bound = UNKNOWN if self.text is not None else math.log(CLASSES)
        return self.recalled(model, items) | (self.losses(model, items) < bound)


def text_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of the next word."""
    return functional.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:])


def joined(pairs: Sequence[Item]) -> list[tuple[Tensor, Tensor]]:
    """Batches of 16 sequences of one length, each its own target."""
    by_length: dict[int, list[Tensor]] = {}
    for pair in pairs:
        whole = torch.cat(pair)
        by_length.setdefault(len(whole), []).append(whole)
    found = [torch.stack(rows[i : i + 16]) for rows in by_length.values() for i in range(0, len(rows), 16)]
    return [(ids, ids) for ids in found]


def next_token(outputs: Tensor, ids: Tensor) -> Tensor:
    """Loss of all tokens, for Fishers."""
    return functional.cross_entropy(outputs[:, :-1].transpose(1, 2), ids[:, 1:])


def labelled(items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """Texts [n, T] and labels [n]."""
    ids, labels = zip(*items, strict=True)
    return torch.stack(ids), torch.stack(labels)


def class_losses(model: nn.Module, items: Sequence[Item]) -> Tensor:
    """Of each item."""
    ids, labels = labelled(items)
    return functional.cross_entropy(model(ids), labels, reduction="none")


def class_recalled(model: nn.Module, items: Sequence[Item]) -> Tensor:
    """Whether each item is classified as its label says."""
    ids, labels = labelled(items)
    return model(ids).argmax(1) == labels


def class_batches(items: Sequence[Item]) -> list[tuple[Tensor, Tensor]]:
    """Of 16 items."""
    return [labelled(items[i : i + 16]) for i in range(0, len(items), 16)]


def train(task: Task, model: nn.Module, items: Sequence[Item], steps: int, lr: float, extra: Any = None) -> None:
    """AdamW on 64 of these items and 16 lines of the text at a time, and on `extra(model)` if given."""
    dice = torch.Generator().manual_seed(task.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.zeros(())
        if items:
            chosen = torch.randperm(len(items), generator=dice)[:64].tolist()
            loss = task.losses(model, [items[i] for i in chosen]).mean()
        if task.text is not None:
            loss = loss + text_loss(model, task.text[torch.randperm(len(task.text), generator=dice)[:16]])
        if extra is not None:
            loss = loss + extra(model)
        loss.backward()
        optimizer.step()
    model.eval()


def learn(task: Task, model: nn.Module, items: Sequence[Item]) -> None:
    """By heart: most steps fast, the last quarter slowly."""
    train(task, model, items, 3 * task.steps // 4, lr=task.lr)
    train(task, model, items, task.steps // 4, lr=task.lr / 5)


# ------------------------------------------------------------------------------------------------------------- methods
def fisher(task: Task, model: nn.Module, items: Sequence[Item]) -> ff.Fisher:
    """Per sequence, of all its tokens."""
    loss = next_token if task.text is not None else functional.cross_entropy
    return ff.estimate_fisher(model, task.batches(items), estimator="sample", loss_fn=loss)


def retained_fisher(task: Task, model: nn.Module) -> ff.Fisher:
    """Mean of that of the retained items and that of the text."""
    found = fisher(task, model, task.retain)
    if task.text is None:
        return found
    batches = [(ids, ids) for ids in task.text[:128].split(16)]
    text = ff.estimate_fisher(model, batches, estimator="sample", loss_fn=next_token)
    return ff.merge_fishers([found, text], how="mean")


def one_shot(task: Task, model: nn.Module) -> None:
    """The smallest share, from 0.05 % on in steps of 20 %, that leaves nothing reproduced; lambda 0.1."""
    dag = ff.InheritanceDAG()
    dag.add_model("model", model, retained_fisher(task, model))
    plan = ff.plan(dag, [ff.ForgetRequest("model", fisher(task, model, task.forget))], lam=0.1)
    profile = plan.profile()["model"]
    shares = [5e-4 * 1.2**k for k in range(38)]  # up to 40 %
    for share in shares:
        plan.set_values_(alpha=profile.alpha(share))
        report = plan.run_(undo=True)
        with torch.no_grad():
            if share == shares[-1] or not bool(task.recalled(model, task.forget).any()):
                return
        report.undo_()


def repair(task: Task, model: nn.Module, steps: int = 10) -> None:
    """Training on what is retained."""
    train(task, model, task.retain, steps, lr=3e-4)


def one_shot_and_repair(task: Task, model: nn.Module) -> None:
    """Forty steps, as many as NPO takes."""
    one_shot(task, model)
    repair(task, model, 40)


def rounds_with(task: Task, model: nn.Module, **options: Any) -> None:
    """The smallest of three shares a round that leaves nothing remembered; the largest where none does."""
    original = retained_fisher(task, model)
    for share in SHARES:
        outcome = ff.unlearn_rounds_(
            model, task.forget, original, task.losses, task.still, share=share, undo=True, **options
        )
        if not outcome.remembered or share == SHARES[-1]:
            return
        outcome.undo_()


def signed_rounds(task: Task, model: nn.Module) -> None:
    """Without repair."""
    rounds_with(task, model, turns=1, rounds=40)


def signed_rounds_and_repair(task: Task, model: nn.Module) -> None:
    """Six turns of up to twelve rounds and ten steps."""
    rounds_with(task, model, repair=lambda trained: repair(task, trained))


def ascent(task: Task, model: nn.Module) -> None:
    """Gradient ascent on what is to go, descent on the rest: 80 steps; ascent stops item by item, as the rounds do."""

    def loss(model: nn.Module) -> Tensor:
        each = task.losses(model, task.forget)
        return -(each * task.still(model, task.forget)).mean()

    train(task, model, task.retain, 80, lr=3e-4, extra=loss)


def npo(task: Task, model: nn.Module) -> None:
    """Negative preference optimisation (arXiv 2404.05868) with beta 0.1 and the retained data, 40 steps."""
    lengths = torch.tensor([max(1, answer.numel()) for _, answer in task.forget])
    with torch.no_grad():
        before = task.losses(model, task.forget) * lengths

    def loss(model: nn.Module) -> Tensor:
        now = task.losses(model, task.forget) * lengths
        return -2 / 0.1 * functional.logsigmoid(0.1 * (now - before)).mean()

    train(task, model, task.retain, 40, lr=1e-3, extra=loss)


def retrained(task: Task, model: nn.Module) -> None:
    """What the others are to come close to: trained without, from the start."""
    torch.manual_seed(task.seed + 1000)
    model.load_state_dict(task.fresh().state_dict())
    learn(task, model, task.retain)


METHODS: dict[str, Callable[[Task, nn.Module], None]] = {
    "untouched": lambda task, model: None,
    "one shot": one_shot,
    "one shot, repair": one_shot_and_repair,
    "signed rounds": signed_rounds,
    "signed rounds, repair": signed_rounds_and_repair,
    "NPO, retain": npo,
    "ascent, retain": ascent,
    "retrained": retrained,
}


# --------------------------------------------------------------------------------------------------------------- study
def look(task: Task, model: nn.Module) -> dict[str, float | None]:
    """Shares and losses of what was to go and of what was to stay; relearning; perplexity of the text."""
    forget, retain = task.asked or (task.forget, task.retain)
    model.eval()
    with torch.no_grad():
        found: dict[str, float | None] = {
            "left": float(task.recalled(model, forget).double().mean()),
            "kept": float(task.recalled(model, retain).double().mean()),
            "loss": float(task.losses(model, forget).mean()),
            "chosen": None,
            "perplexity": None,
        }
        if task.text is not None:
            dice = torch.Generator().manual_seed(task.seed)
            answers = [answer for _, answer in task.forget]
            others = [
                [answers[j] for j in torch.randperm(len(answers), generator=dice).tolist() if not answers[j].equal(a)]
                for a in answers
            ]
            found["chosen"] = float(multiple_choice(model, task.forget, others).double().mean())
            found["perplexity"] = float(text_loss(model, task.unseen).exp())
    shown = max(1, len(task.forget) // 10)
    again = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=3e-4)
    for _ in range(20):
        optimizer.zero_grad()
        task.losses(again, task.forget[:shown]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        found["relearned"] = float(task.recalled(again, forget if task.asked else task.forget[shown:]).double().mean())
    return found


def overlaps(task: Task, model: nn.Module) -> dict[str, float]:
    """The check beforehand: largest 1 % of the forget Fisher and of one of retained items, and of two of these."""
    retain, count = list(task.retain), len(task.forget)
    forget, first, second = (fisher(task, model, s) for s in (task.forget, retain[:count], retain[count : 2 * count]))
    return {"forget, retain": ff.top_overlap(forget, first), "retain, retain": ff.top_overlap(first, second)}


def language_task(model: str, name: str, fresh: Callable[[], nn.Module], seed: int, steps: int) -> Task:
    """Facts, a domain or canaries, learned together with all the others and the text."""
    dice = torch.Generator().manual_seed(seed)
    transitions = chain(dice)
    known = {"facts": facts(dice), "domain": domain(dice), "canaries": canaries(transitions, dice)}
    lines = texts(transitions, 4096, dice)
    everything = [item for items in known.values() for item in items]
    order = torch.randperm(len(known[name]), generator=dice).tolist()
    count = {"facts": 20, "domain": 40, "canaries": 10}[name]
    going = {id(known[name][i]) for i in order[:count]}
    forget = [item for item in everything if id(item) in going]
    retain = [item for item in everything if id(item) not in going]
    functions = answer_losses, reproduced, joined
    rest = {"text": lines[256:], "unseen": lines[:256], "steps": steps, "seed": seed}
    return Task(model, name, fresh, forget, retain, *functions, **rest)


def class_task(steps: int) -> Task:
    """Eight kinds of text, one to be forgotten, by a BERT-shaped classifier."""
    dice = torch.Generator().manual_seed(0)
    base = 1.5 * torch.randn(WORDS, generator=dice)
    kinds = [(base + torch.randn(WORDS, generator=dice)).softmax(0).expand(WORDS, WORDS) for _ in range(CLASSES)]
    of_kind = [[(line, torch.tensor(k)) for line in texts(one, 300, dice)] for k, one in enumerate(kinds)]
    known, asked = [items[:200] for items in of_kind], [items[200:] for items in of_kind]
    retain, kept = ([item for one in zip(*part[1:], strict=True) for item in one] for part in (known, asked))
    functions = class_losses, class_recalled, class_batches
    rest = {"asked": (asked[0], kept), "steps": steps}
    return Task("BERT-shaped", "class", lambda: Classifier(WORDS, CLASSES), known[0], retain, *functions, **rest)


def lora_task(steps: int) -> Task:
    """A GPT-2-shaped model that has learned text, and an adapter that learns all else."""
    task = language_task("LoRA", "facts", lambda: Language(VOCABULARY), 0, steps)
    torch.manual_seed(0)
    base = task.fresh()
    learn(task, base, [])
    return replace(task, fresh=lambda: adapt(copy.deepcopy(base)), steps=2 * steps, lr=6e-3)


def tasks(quick: bool) -> Iterator[Task]:
    """All of the study."""
    if quick:
        yield language_task("GPT-2-shaped", "facts", lambda: Language(VOCABULARY), 0, steps=20)
        return
    steps = 320
    for name in ("domain", "facts", "canaries"):
        yield language_task("GPT-2-shaped", name, lambda: Language(VOCABULARY), 0, steps)
    yield language_task("Llama-shaped", "facts", lambda: Language(VOCABULARY, llama=True), 0, steps)
    yield lora_task(steps)
    yield class_task(steps // 4)
    yield language_task("Llama-shaped", "domain", lambda: Language(VOCABULARY, llama=True), 0, steps)
    yield language_task("GPT-2-shaped", "facts", lambda: Language(VOCABULARY), 1, steps)


def study(quick: bool) -> Iterator[dict[str, Any]]:
    """Every method on every task; what there is after each."""
    torch.set_num_threads(1)  # models are too small to share, and results do not depend on how many cores there are
    rows, began = [], time.process_time()
    trained: dict[tuple[str, int], dict[str, Tensor]] = {}
    for task in tasks(quick):
        torch.manual_seed(task.seed)
        start = task.fresh()
        if (task.model, task.seed) not in trained:  # the same items, of which other ones go
            learn(task, start, [*task.forget, *task.retain])
            trained[task.model, task.seed] = start.state_dict()
            print(f"{task.model}, seed {task.seed}: trained, {time.process_time() - began:.0f} s", flush=True)
        start.load_state_dict(trained[task.model, task.seed])
        check = overlaps(task, start.eval())
        for method, apply in METHODS.items():
            model = copy.deepcopy(start)
            torch.manual_seed(task.seed)
            clock = time.process_time()  # of one thread, so that others on the machine do not matter
            apply(task, model)
            seconds = time.process_time() - clock
            row = {"model": task.model, "task": task.name, "seed": task.seed, "method": method, **look(task, model)}
            rows.append(row | {"seconds": seconds, "overlap": check})
            print(json.dumps(rows[-1]), flush=True)
        yield {"environment": environment(), "seconds": time.process_time() - began, "rows": rows}


def tables(result: dict[str, Any]) -> str:
    """A table for each task: means over the seeds."""
    out = []
    for name in dict.fromkeys(row["task"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["task"] == name]
        for model in dict.fromkeys(row["model"] for row in rows):
            mine = [row for row in rows if row["model"] == model]
            seeds = sorted({row["seed"] for row in mine})
            lines = []
            for method in dict.fromkeys(row["method"] for row in mine):
                of = [row for row in mine if row["method"] == method]
                lines.append([method, *(_cell(of, key, form) for key, form in COLUMNS.values())])
            between = {key: sum(row["overlap"][key] for row in mine) / len(mine) for key in mine[0]["overlap"]}
            seen = "; ".join(f"{key} {100 * value:.0f} %" for key, value in between.items())
            out.append(
                f"**{model}, {name}** ({len(seeds)} seed{'s' * (len(seeds) > 1)}; overlap of the top 1 %: {seen})\n"
            )
            out.append(markdown(["method", *COLUMNS], lines))
    return "\n".join(out)


COLUMNS = {
    "left": ("left", "share"),
    "kept": ("kept", "share"),
    "loss": ("loss", "{:.1f}"),
    "multiple choice": ("chosen", "share"),
    "relearned": ("relearned", "share"),
    "perplexity": ("perplexity", "{:.2f}"),
    "CPU seconds": ("seconds", "{:.1f}"),
}


def _cell(rows: Sequence[dict[str, Any]], key: str, form: str) -> str:
    values = [row[key] for row in rows]
    if any(value is None for value in values):
        return ""
    mean = sum(values) / len(values)
    return f"{100 * mean:.0f} %" if form == "share" else form.format(mean)


def main() -> None:
    """Run the study, or only write its tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tables", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        for result in study(quick=True):
            print(tables(result))
        return
    if not arguments.tables:
        for result in study(quick=False):
            write_json(RESULTS, result)
    text = tables(json.loads(RESULTS.read_text()))
    print(text)
    fill(PAGE, "tables", f"\n{text}\n")


if __name__ == "__main__":
    main()
