"""Rows of a last layer centred by `unlearn_`: where nothing else meets the bound, where it may be, and the way back."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import fiun_fast as ff
from fiun_fast.centring import of_probabilities, take_mean_off_

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fiun_fast.TuningWarning", "ignore::fiun_fast.ScopeWarning"),
]
CLASSES, GONE, OFFSET = 4, 1, -1.0
HOW = {"estimators": ("batch", "expected"), "points": 12, "left": 0.05, "lost": 0.05}
FEW = {"left": 0.0, "lost": 0.0, "points": 3, "lams": [1.0]}  # which never meets its bound
CENTRED = -0.2  # the mean weight is well below it before, and about 0 after


def clouds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = torch.randn(count, 12, generator=dice)
    x[torch.arange(count), y] += 4
    return x, y


def batched(x: torch.Tensor, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(x.split(20), y.split(20), strict=True))


TRAIN, VALIDATION = clouds(400, 1), clouds(200, 2)
LOADER, CHECK = batched(*TRAIN), batched(*VALIDATION)
FORGET = batched(*(part[TRAIN[1] == GONE] for part in TRAIN))


class Net(nn.Module):
    """Two layers; what is made of the logits may be said."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 24), nn.Linear(24, CLASSES, bias=bias)
        self.last = nn.Identity()

    def forward(self, x):
        return self.last(self.head(self.body(x).relu()))


class Clamped(nn.Module):
    def forward(self, z):
        return z.clamp(-1e4, 1e4)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Cast(nn.Module):
    def forward(self, z):
        return z.clamp(-1e4, 1e4).float()


def trained(bias: bool = True) -> Net:
    torch.manual_seed(0)
    model = Net(bias)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in LOADER * 6:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        optimizer.step()
    return model


def drifted(model: Net) -> Net:
    """The same probabilities, and logits that are all negative: dampened to nothing, a class wins."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.head.parameters():
            p += OFFSET
    return model


GROWN = {bias: trained(bias) for bias in (True, False)}


@pytest.fixture
def model() -> Net:
    return drifted(GROWN[True])


def unlearned(model, score=None, **more):
    given = {"data": LOADER, "forget": FORGET, **HOW, **more}
    return ff.unlearn_(model, score=ff.ClassScore(CHECK, forget=GONE) if score is None else score, **given)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("rows", [2, 7, 1500])  # the last in more than one piece
def test_no_probability_changes(rows):
    dice = torch.Generator().manual_seed(rows)
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        layer = nn.Linear(9, rows).to(dtype)
        with torch.no_grad():
            layer.weight += 3 * torch.randn(9, generator=dice).to(dtype)
            layer.bias -= 5
        old, x = copy.deepcopy(layer).double(), torch.randn(50, 9, generator=dice).double()
        places, versions = zip(*((p.data_ptr(), p._version) for p in layer.parameters()), strict=True)
        for p in layer.parameters():
            assert take_mean_off_(p)
        found = zip(*((p.data_ptr(), p._version) for p in layer.parameters()), strict=True)
        assert next(found) == places
        assert all(now > then for now, then in zip(next(found), versions, strict=True))
        wanted = (old.weight - old.weight.sum(0) / rows).to(dtype)
        assert (layer.weight - wanted).abs().max() <= torch.finfo(dtype).eps  # sums in another order, at most
        now = layer.double()(x)
        assert (now.softmax(1) - old(x).softmax(1)).abs().max() < close
        assert now.mean(1).abs().max() < 1e3 * close


def test_a_centred_layer_does_not_change():
    assert not take_mean_off_(torch.tensor([[1.0, -2.0], [-1.0, 2.0]]))


def test_it_meets_the_bound_where_dampening_alone_does_not(model):
    before, other = copy.deepcopy(model), copy.deepcopy(model)
    plain = unlearned(other, center=False)["model"]
    assert not plain.met
    assert not plain.centered
    outcome = unlearned(model, strict=True)
    node = outcome["model"]
    assert node.met
    assert node.centered
    assert node.after.left <= 0.05 < plain.after.left
    with torch.no_grad():  # what the score saw, by hand; and that it is dampening of centred rows
        right = model(VALIDATION[0]).argmax(1) == VALIDATION[1]
        assert node.after.left == pytest.approx(right[VALIDATION[1] == GONE].double().mean().item())
        centred = before.head.weight.double() - before.head.weight.double().mean(0)
        touched = (model.head.weight - centred).abs() > 1e-6
    assert 0 < touched.sum() <= node.selected < touched.numel()
    assert "rows centred" in str(outcome)
    assert json.loads(json.dumps(outcome.to_dict()))["nodes"][0]["centered"]
    assert list(outcome.tuned) == ["batch", "expected", "batch, rows centred", "expected, rows centred"]
    outcome.undo_()
    assert same(model, before)
    with pytest.raises(ff.UndoError, match="undone already"):
        outcome.undo_()


def test_nodes_within_the_bound_are_as_without(model):
    """Two nodes of one plan; what the first comes to has the bits of a run that never centres."""
    models, others = ({"u0": copy.deepcopy(GROWN[True]), "u1": copy.deepcopy(model)} for _ in range(2))
    before, found = copy.deepcopy(models), []
    for its, center in ((models, True), (others, False)):
        dag = ff.InheritanceDAG()
        dag.add_model("u0", its["u0"], data=LOADER)
        dag.add_model("u1", its["u1"], data=LOADER, parents=["u0"])
        request, score = ff.ForgetRequest("u0", data=FORGET), ff.ClassScore(CHECK, forget=GONE)
        found.append(ff.unlearn_(dag, [request], score, center=center, **HOW))
    assert [node.centered for node in found[0]] == [False, True]
    assert [node.met for node in found[1]] == [True, False]
    assert same(models["u0"], others["u0"])
    weight, old = models["u0"].head.weight, before["u0"].head.weight
    bias = (models["u0"].head.bias != before["u0"].head.bias).sum()
    assert 0 < (weight != old).sum() + bias <= found[0]["u0"].selected
    assert "rows centred" not in str(found[1])
    found[0].undo_()
    assert all(same(models[name], before[name]) for name in models)


def test_the_log_of_the_run_is_of_both(model, tmp_path):
    before = copy.deepcopy(model)
    outcome = unlearned(model)
    outcome.report.undo.save(tmp_path / "log")
    log = ff.UndoLog.load(tmp_path / "log")
    assert log.numel == sum(p.numel() for p in model.head.parameters())
    log.undo_(model)
    assert same(model, before)


@pytest.mark.parametrize("what", ["written", "replaced", "moved"])
def test_undo_refuses_and_writes_nothing_where_the_layer_is_no_more_what_it_was(model, what):
    outcome = unlearned(model)
    weight = model.head.weight
    with torch.no_grad():
        if what == "written":  # where nothing was selected, too
            weight[(GONE + 1) % CLASSES] += 1e-3
        elif what == "replaced":
            model.head.weight = nn.Parameter(weight.clone())
        else:
            weight.data = weight.data.clone()
    now = copy.deepcopy(model)
    with pytest.raises(ff.UndoError, match=r"parameter 'head.weight': (changed|moved) since the run"):
        outcome.undo_()
    assert same(model, now)


class Watching(ff.ClassScore):
    """A score that does something where rows are centred."""

    def look(self, name, model):
        seen = super().look(name, model)
        return self.there(seen) if model.head.weight.mean() > CENTRED else seen


class Worse(Watching):
    def there(self, seen):
        return replace(seen, left=1.0, kept=0.0)


class Short(Watching):
    def there(self, seen):
        return replace(seen, left=max(seen.left, 0.06))


def test_rows_come_back_where_it_helps_nothing(model):
    other = copy.deepcopy(model)
    wanted = unlearned(other, center=False)["model"]
    node = unlearned(model, Worse(CHECK, forget=GONE))["model"]
    assert same(model, other)
    assert not node.centered
    assert (node.alpha, node.estimator, node.after) == (wanted.alpha, wanted.estimator, wanted.after)


def test_what_scores_higher_stays_though_the_bound_is_not_met_and_strict_changes_nothing(model):
    before = copy.deepcopy(model)
    with pytest.raises(ff.NotForgottenError, match=r"0.06 left of .* No model has changed"):
        unlearned(model, Short(CHECK, forget=GONE), strict=True)
    assert same(model, before)
    outcome = unlearned(model, Short(CHECK, forget=GONE))
    assert outcome["model"].centered
    assert not outcome["model"].met
    assert "rows centred, bound not met" in str(outcome)
    outcome.undo_()
    assert same(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("calls", [1, 3, None])  # of the score, with centred rows; None: the last, after the run
def test_an_error_brings_all_bits_back(model, error, calls, monkeypatch):
    before, met, over = copy.deepcopy(model), [], []

    class Falls(Watching):
        def there(self, seen):
            met.append(seen)
            if len(met) == calls or (calls is None and over):
                raise error
            return seen

    run_ = ff.Plan.run_

    def run(self, **options):
        report = run_(self, **options)
        over.append(options.get("undo"))
        return report

    monkeypatch.setattr(ff.Plan, "run_", run)
    with pytest.raises(error):
        unlearned(model, Falls(CHECK, forget=GONE))
    assert over == ([True] if calls is None else [])
    assert met
    assert same(model, before)


def test_an_error_while_a_layer_is_written_to_brings_its_bits_back(model, monkeypatch):
    before, written = copy.deepcopy(model), []

    def stops(parameter):
        written.append(take_mean_off_(parameter))
        if len(written) == 2:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr("fiun_fast.centring.take_mean_off_", stops)
    with pytest.raises(KeyboardInterrupt):
        unlearned(model)
    assert written == [True, True]
    assert same(model, before)


def tied(model):
    model.other = nn.Linear(24, CLASSES)
    model.other.weight = model.head.weight


def twice(model):
    model.other = model.head


def hooked(model):
    model.head.register_forward_hook(lambda *_: None)


def watched(model):
    model.head.weight.register_hook(lambda gradient: gradient)
    return {"estimators": "batch"}


def made_of_others(model):
    parametrizations.weight_norm(model.head)


def another_kind(model):
    head, model.head = model.head, Own(24, CLASSES)
    model.head.load_state_dict(head.state_dict())


def with_a_spare(model):
    model.spare = nn.Parameter(torch.ones(3))
    return {"params": ["spare", "head.weight", "head.bias"], "by": "node", "estimators": "batch"}


def clamped(model):
    model.last = Clamped()


def squashed(model):
    model.last = nn.Sigmoid()


def within(dtype):
    """Arguments in another dtype."""
    data, forget, check = ([(x.to(dtype), y) for x, y in batches] for batches in (LOADER, FORGET, CHECK))
    return {"data": data, "forget": forget, "score": ff.ClassScore(check, forget=GONE)}


def cast(model):
    """What is made of the output before the dtype changes does not show."""
    model.bfloat16().last = Cast()
    return within(torch.bfloat16)


def by_number(model):
    score = ff.ClassScore(CHECK, forget=GONE)
    return {"score": lambda name, its: score(name, its)}


def with_sigmoids(logits, labels):
    return functional.binary_cross_entropy_with_logits(logits, functional.one_hot(labels, CLASSES).float())


def softened(logits, labels):
    return functional.cross_entropy(logits / 4, labels)


@pytest.mark.parametrize(
    "change",
    [
        tied,
        twice,
        hooked,
        watched,
        made_of_others,
        another_kind,
        with_a_spare,
        clamped,
        squashed,
        cast,
        by_number,
        lambda model: {"params": None},
        lambda model: {"params": ["head.weight"]},
        lambda model: {"params": ["body.bias", "head.weight", "head.bias"], "by": "node"},
        lambda model: {"estimators": "label_free"},
        lambda model: {"estimate": {"loss_fn": with_sigmoids}},
        lambda model: {"center": False},
    ],
)
def test_left_alone(model, change):
    """Nothing meets the bound, as nothing can: and the layer is that of a run that never centres."""
    how = {**FEW, **(change(model) or {})}
    other = copy.deepcopy(model)
    outcome = unlearned(model, **how)
    assert not outcome["model"].met or "score" in how
    assert not outcome["model"].centered
    assert not any("centred" in kind for kind in outcome.tuned), "it is not tried"
    unlearned(other, **{**how, "center": False})
    assert same(model, other)


def as_dicts(batches):
    return [{"x": x, "labels": y} for x, y in batches]


def named(model, batch):
    return model(batch["x"]), batch["labels"]


@pytest.mark.parametrize(
    "form",
    ["plain", "default", "few", "dicts", "softened", "by layer", "wrapped", "float64", "bfloat16", "named", "given"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_centred_in_every_form(form, bias):
    model = drifted(GROWN[bias])
    how, given = {}, model
    if form == "default":
        how = {"estimators": ff.forgetting.BEST}
    elif form == "few":
        how = FEW
    elif form == "dicts":
        data, forget, check = map(as_dicts, (LOADER, FORGET, CHECK))
        score = ff.ClassScore(check, forget=GONE, forward_fn=named)
        how = {"data": data, "forget": forget, "score": score, "estimate": {"forward_fn": named}}
    elif form == "softened":
        how = {"estimators": "batch", "estimate": {"loss_fn": softened}, **FEW}
    elif form == "by layer":
        how = {"by": "layer"}
    elif form == "wrapped":
        given = nn.DataParallel(model)
    elif form in ("float64", "bfloat16"):
        dtype = getattr(torch, form)
        model.to(dtype)
        how = within(dtype)
    elif form == "named":
        how = {"params": list(reversed([f"head.{name}" for name, _ in model.head.named_parameters()]))}
    elif form == "given":
        data, forget = (ff.estimate_fisher(model, part, "last", estimator="sample") for part in (LOADER, FORGET))
        how = {"data": data, "forget": forget}
    before = copy.deepcopy(model)
    outcome = unlearned(given, **how)
    assert outcome["model"].centered
    assert outcome["model"].met or form in ("few", "softened", "given", "bfloat16")
    outcome.undo_()
    assert same(model, before)


def test_a_model_that_is_one_layer():
    body = drifted(GROWN[True]).body
    made = [[(body(x).relu().detach(), y) for x, y in part] for part in (LOADER, FORGET, CHECK)]
    head = drifted(GROWN[True]).head
    before = copy.deepcopy(head)
    outcome = unlearned(head, ff.ClassScore(made[2], forget=GONE), data=made[0], forget=made[1])
    assert outcome["model"].centered
    assert outcome["model"].met
    outcome.undo_()
    assert same(head, before)


def test_fishers_stay_what_they_were(model):
    """What `unlearn_` takes for granted: no Fisher of a softmax's loss changes by it, and that of `label_free` does."""
    centred = copy.deepcopy(model)
    for p in centred.head.parameters():
        take_mean_off_(p)
    for kind, how, alike in (
        ("batch", {}, True),
        ("softened", {}, True),
        ("sample", {}, True),
        ("expected", {}, True),
        ("batch", {"loss_fn": softened}, True),
        ("label_free", {}, False),
        ("batch", {"loss_fn": with_sigmoids}, False),
    ):
        one, other = (ff.estimate_fisher(net, LOADER, "last", estimator=kind, **how).buffer for net in (model, centred))
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-5 * float(one.max())) == alike, (kind, how)


@pytest.mark.parametrize(
    ("loss_fn", "wanted"),
    [
        (None, True),
        (functional.cross_entropy, True),
        (nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.ones(CLASSES), reduction="none"), True),
        (softened, True),
        (nn.MultiMarginLoss(), True),
        (with_sigmoids, False),
        (lambda logits, labels: logits.square().mean(), False),
        (functional.binary_cross_entropy_with_logits, False),  # does not take such labels
        (lambda logits, labels: {}, False),
    ],
)
def test_which_losses_are_of_probabilities(loss_fn, wanted):
    assert of_probabilities(loss_fn, CLASSES, torch.zeros(1)) is wanted


def test_losses_in_double_precision_are_tried_so_and_leave_the_random_state():
    weighed = nn.CrossEntropyLoss(weight=torch.rand(CLASSES).double())
    assert of_probabilities(weighed, CLASSES, torch.zeros(1).double())
    state = torch.get_rng_state()
    of_probabilities(lambda z, y: functional.cross_entropy(z + 0 * torch.rand_like(z), y), CLASSES, torch.zeros(1))
    assert torch.equal(torch.get_rng_state(), state)
