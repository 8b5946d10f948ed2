"""`estimate_fisher`: any of the estimators, over a loader; `estimate_fishers`: several models in one sweep over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ..arguments import Estimator, Per
from ..dtensors import is_dtensor, sharding_modules
from ..errors import ArgumentError, EstimationError, LayoutError
from ..fisher import Fisher
from ..layout import Layout
from ..memory import check_loaded
from ..ranks import Fact, Ranks, ranks_of, together
from ..scope import Params, check_module, for_several, select_parameters
from ..wrappers import check_gathered, silenced, unwrap
from . import claims
from .accumulator import BatchEstimate
from .head import HeadEstimate, NotAHead, SharedForward
from .job import Estimate, Job, Options
from .loaders import NumberedBatches, of_batch, why_not_finite
from .preserving import preserved
from .reading import Forward, Loss, in_transform
from .sample import SampleEstimate
from .totals import Totals, check_parameters


def estimate_fisher(
    model: torch.nn.Module,
    loader: Iterable[Any],
    params: Params = None,
    *,
    estimator: Estimator = "batch",
    loss_fn: Loss | None = None,
    forward_fn: Forward | None = None,
    progress: bool = False,
    backend: str | None = None,
    samples: int = 1,
    seed: int = 0,
    per: Per = "sequence",
    target_index: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Fisher:
    """Estimate the diagonal Fisher information of a model over a loader.

    | estimator | what is averaged | source |
    | --- | --- | --- |
    | `batch` | (1/B) sum_b g_b^2, g_b the gradient of mini-batch b's mean loss | SSD 2308.07707, FIUn 2408.08493 |
    | `softened` | the same, of the cross entropy of logits / 4: samples that a model is sure of count, too | here |
    | `sample` | (1/N) sum_n g_n^2, g_n the gradient of sample n's loss: the empirical Fisher | 1412.1193, sec. 11 |
    | `expected` | (1/N) sum_n E_y g_n(y)^2, y drawn from the model's softmax: the Fisher | 1412.1193, sec. 5 |
    | `label_free` | (1/B) sum_b of the size of the gradient of mean_n ‖f(x_n)‖² | LFSSD 2402.19308 |

    With `batch`, `softened` and `label_free` every batch weighs the same, and the batch size changes the estimate; with
    the others it does not. The model runs in eval mode and is exactly as before afterwards: modes, requires_grad,
    .grad, buffers, random state, also after an error. Several threads may estimate; where their models are one, or
    share a part, one waits for the other. Nothing else may use the model meanwhile.

    `fisher.provenance.how` says how each parameter was computed, `print(fisher.provenance)` shows it; docs/fishers.md
    says which estimator to choose.

    Args:
        model: any module. Wrappers are looked through (DistributedDataParallel, DataParallel, torch.compile, Opacus and
            others): the data of this process alone count unless `group` says otherwise, and the model runs eagerly.
            Of a model that is spread over ranks (FSDP2, tensor parallel) the Fisher is spread alike, and gradients are
            as its backward leaves them: under FSDP2 of the mean over ranks, so that `batch` squares that of the global
            batch. `sample` and `expected` are over all ranks' samples, for a last linear layer that FSDP2 has cut up,
            and refused for all else. All ranks need the same number of batches.
        loader: yields batches: (inputs [B, ...], targets [B]), (inputs, …, targets), or a dict (any Mapping) with
            "labels", "label" or "label_ids", with whose keys as keywords the model is called; for `label_free` and
            `expected`, which need no labels, also inputs alone and dicts without labels. The model may return a tensor,
            a tuple that begins with one, an object with `.logits`, or a dict with "logits" or "out". docs/fishers.md
            has tables of all forms of batches and targets. A batch without a sample, or of which all labels are -100,
            is left out.
        params: which parameters, as in `Layout.from_module`; frozen ones may be named.
        estimator: see above.
        loss_fn: (outputs, targets) -> scalar mean loss; default: for dicts the model's own `.loss`, else cross entropy.
            For `sample` its value for each sample alone is what counts: it is called on slices [1, ...] of outputs and
            targets, or may return [B]. Not for `softened`, `expected` and `label_free`, which have losses of their own.
        forward_fn: (model, batch) -> (outputs, targets), for batches of any other form; it gets the model without
            wrappers. For `sample` and `expected` a
            batch is split into samples along the first dimension of its tensors.
        progress: show a progress bar.
        backend: as in `plan`.
        samples: labels that `expected` draws for each example; 0: every class, weighted by its probability, exact. A
            last linear layer is exact in either case, in batches of three or more.
        seed: seed of these draws.
        per: of models that predict at every position (language models: logits [B, T, C]), what one sample of `sample`
            and `expected` is: a "sequence", whose loss is the mean over its tokens, or a "token". Labels of -100 do
            not count; of a dict with labels the model's own loss says whether they are those of the next token.
        target_index: position of the targets in a tuple; default: last.
        group: torch.distributed process group over which the data are split: each rank passes what it has, also none,
            and gets the Fisher over all of it, the same on every rank: `sample` and `expected` average over all
            samples, the others over all batches as the ranks had them. Labels that `expected` draws are
            other ones than in one process. Of a model that is spread over ranks: groups across its own ranks, such as
            data parallel beside tensor parallel.

    Returns:
        The Fisher, float32, on the parameters' device.

    Raises:
        EstimationError: empty loader, a batch of a form that is not understood, targets that do not fit the outputs, a
            loss that is not a scalar or does not depend on the selected parameters, a batch after which the Fisher
            would not be finite; for `expected`, outputs that are no logits; the model was made under inference_mode,
            streams into a FisherAccumulator, or is being estimated by this thread already. The message begins with
            the number of the batch.
        ArgumentError: one batch or a dataset of samples in the place of a loader, unknown estimator, a loss where the
            estimator has its own, negative `samples`, per="token" for an estimator that goes by batches.
        LayoutError, DeviceError, BackendError: as in `FisherAccumulator`.

    """
    with _told([model], group):
        options = Options(estimator, loss_fn, forward_fn, backend, samples, seed, per, target_index)
    return sweep({"model": Wanted(model, params, [options])}, loader, progress, group)["model"][0]


def estimate_fishers(
    models: Mapping[str, torch.nn.Module],
    loader: Iterable[Any],
    params: Params = None,
    *,
    estimator: Estimator = "batch",
    loss_fn: Loss | None = None,
    forward_fn: Forward | None = None,
    progress: bool = False,
    backend: str | None = None,
    samples: int = 1,
    seed: int = 0,
    per: Per = "sequence",
    target_index: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Fisher]:
    """Fishers of several models, such as all nodes of an inheritance DAG, in one sweep over the loader.

    Each batch is loaded once and goes through every model, and each Fisher is what it would be alone, also where models
    share a part. Arguments and errors as for `estimate_fisher`; `params` is
    applied to each model separately.

    Args:
        models: name -> module.
        loader, params, estimator, loss_fn, forward_fn, progress, backend, samples, seed, per, target_index, group: as
            there.

    Returns:
        Name -> Fisher, in the order of `models`.

    Raises:
        ArgumentError: there is no model; else as in `estimate_fisher`.

    """
    with _told(models.values() if isinstance(models, Mapping) else (), group):
        options = Options(estimator, loss_fn, forward_fn, backend, samples, seed, per, target_index)
        if not isinstance(models, Mapping) or not models:
            raise ArgumentError(f"models is {models!r}, expected a dict of name -> module with at least one entry")
        params = for_several(params)
    found = sweep({name: Wanted(model, params, [options]) for name, model in models.items()}, loader, progress, group)
    return {name: fishers[0] for name, fishers in found.items()}


@dataclass(frozen=True, eq=False)
class Wanted:
    """What one model is to give: the Fisher of some parameters by one estimator or more, in one sweep."""

    model: torch.nn.Module
    params: Params
    options: Sequence[Options]  # at least one


def sweep(
    wanted: Mapping[str, Wanted],
    loader: Iterable[Any],
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> dict[str, list[Fisher]]:
    """Go over the loader once, for all that is wanted: name -> a Fisher for each of its options.

    Each is what it would be alone. Estimates at one head share the forward. `group` and errors as for
    `estimate_fisher`.
    """
    with _told([one.model for one in wanted.values()], group):
        for name, one in wanted.items():
            what = "model" if len(wanted) == 1 else f"model {name!r}"
            check_module(what, one.model)
            check_gathered(what, one.model, for_good=True)
        models = {name: one.model for name, one in wanted.items()}
        inner = {name: unwrap(model) for name, model in models.items()}
        bare = {name: found.module for name, found in inner.items()}
        if len({id(model) for model in bare.values()}) < len(bare):
            raise ArgumentError("one model is given under several names; estimate its Fisher once")
    spread = ranks_of(bare.values())
    ranks = _beside(spread, group)
    with together(ranks) as facts, together(spread) as its, ExitStack() as stack:
        stack.enter_context(claims.estimating(bare))  # first: another estimate has frozen what it does not select
        stack.enter_context(claims.uncompiled())
        for model in models.values():
            stack.enter_context(silenced(model))
        jobs: dict[str, list[Job]] = {}
        for name, model in bare.items():
            selected = select_parameters(model, wanted[name].params)
            jobs[name] = [Job(model, selected, _apart(options, ranks)) for options in wanted[name].options]
            facts[f"the layout of model {name!r}"] = Fact(_laid_out(jobs[name][0]), LayoutError)
        every = [job for those in jobs.values() for job in those]
        for job in every:
            check_parameters(job.selected)
            if job.options.forward_fn is None:
                check_loaded(job.model)
        asked = [options for one in wanted.values() for options in one.options]
        facts["the estimator"] = Fact([(one.estimator, one.samples, one.per, one.seed) for one in asked])
        its |= facts
        check_no_transform()
        scopes = [(those[0].model, those[0].selected.values()) for those in jobs.values()]
        on = stack.enter_context(preserved(scopes))
        shared = {name: SharedForward() for name in jobs}
        estimates = {name: [_Chosen(job, shared[name]) for job in those] for name, those in jobs.items()}
        batches = loader
        if not isinstance(batches, NumberedBatches):
            readings = [job.options.reading for job in every]
            strictest = next((one for one in readings if one.needs_labels), readings[0])
            kept = next((one for one in readings if not one.skips_unlabelled), strictest)
            batches = NumberedBatches(loader, strictest, every[0].model, kept=kept)
        mixed = len({job.options.reading.skips_unlabelled for job in every}) > 1
        numbered = _progress(batches, loader) if progress else batches
        for number, batch in numbered if spread is None else _in_step(numbered, spread):
            for i, (name, several) in enumerate(estimates.items()):
                with on(i), of_batch(number), shared[name]:
                    for job, estimate in zip(jobs[name], several, strict=True):
                        if mixed and job.options.reading.is_empty(batch):
                            continue
                        if len(several) > 1:
                            _thaw(jobs[name][0])
                        estimate.step(batch)
                        if not estimate.totals.is_finite():
                            which = f"model {name!r}: " if len(models) > 1 else ""
                            raise EstimationError(which + why_not_finite(batch, bare[name]))
        if ranks is None:
            batches.check_not_empty()
    with torch.inference_mode(False):  # a Fisher may be written to later, in whatever mode the caller is then
        return {
            name: [_said(_over(estimate, spread, ranks), inner[name].wrappers) for estimate in several]
            for name, several in estimates.items()
        }


def _beside(spread: Ranks | None, group: object) -> Ranks | None:
    """The ranks of a group that data are split over; None where there is none, or where it is the model's own ranks."""
    ranks = None if group is None else Ranks.of_group(group)
    if ranks is not None and spread is not None and set(ranks.members) <= set(spread.members):
        return None  # over which its backward reduces as it needs
    return ranks


@contextmanager
def _told(models: Iterable[Any], group: object) -> Iterator[None]:
    """What goes wrong inside is raised on all ranks, which wait for the first thing that they agree on; else silent."""
    try:
        yield
    except Exception:
        spread = ranks_of(model for model in models if isinstance(model, torch.nn.Module))
        with together(_beside(spread, group)), together(spread):
            raise


def _thaw(job: Job) -> None:
    """Before another estimate of the same model: one may have left its parameters without gradients."""
    for p in job.selected.values():
        p.requires_grad_()
        p.grad = None


def _apart(options: Options, ranks: Ranks | None) -> Options:
    """The same with draws of this rank's own."""
    return options if ranks is None else replace(options, seed=options.seed + ranks.index)


def _over(estimate: _Chosen, spread: Ranks | None, ranks: Ranks | None) -> Fisher:
    """The Fisher over what all these ranks have added: this rank's part of it, where the model is spread."""
    over = [spread if estimate.is_whole else None, ranks]
    fisher = _added_up(estimate, [one for one in over if one is not None])
    return fisher.part(Layout.from_tensors(estimate.selected)) if estimate.is_whole else fisher


def _added_up(estimate: Estimate, over: Sequence[Ranks]) -> Fisher:
    """The Fisher over what all these ranks have added; its provenance is that of the first of them that had data."""
    had_data = estimate.totals.steps > 0
    for ranks in over:
        estimate.totals.add_up(ranks)
    fisher = estimate.result()
    said = fisher.provenance if had_data else None
    for ranks in over:
        said = next((record for record in ranks.gather(said) if record is not None), None)
    return Fisher(fisher.buffer, fisher.layout, fisher.provenance if said is None else said)


def _in_step(batches: Iterable[Any], ranks: Ranks) -> Iterator[Any]:
    """Batches for a model whose forward is a joint one: all ranks have the next one, or all raise an error."""
    upcoming, done = iter(batches), object()
    while True:
        error, batch = None, done
        try:
            batch = next(upcoming, done)
        except Exception as met:
            error = met
        has = "there" if batch is not done else "none"
        ranks.agree(error, {"the next batch": Fact(has, EstimationError)})
        if batch is done:
            return
        yield batch


def _no_spread(job: Job, why: str) -> EstimationError:
    """The error for an estimator that a model spread over ranks cannot have."""
    return EstimationError(
        f"estimator {job.estimator!r} takes each sample's gradient, and those of a model that is spread over ranks are "
        f'of all ranks\' samples together: take params="last" ({why}) or estimator="batch", or estimate before the '
        "model is spread; a whole Fisher fits it too"
    )


def _laid_out(job: Job) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in job.selected.items()]


def _said(fisher: Fisher, wrappers: tuple[str, ...]) -> Fisher:
    """The Fisher, whose provenance says which wrappers of the model were looked through."""
    if not wrappers:
        return fisher
    how = {name: f"{way}; looked through {', '.join(wrappers)}" for name, way in fisher.provenance.how.items()}
    return Fisher(fisher.buffer, fisher.layout, replace(fisher.provenance, how=how))


class _Chosen(Estimate):
    """The cheapest way that fits; found on the first batch, by trying."""

    def __init__(self, job: Job, shared: SharedForward) -> None:
        self._estimate: Estimate
        self._job, self._steps = job, 0
        self._spread = any(map(is_dtensor, job.selected.values()))
        if self._spread and not job.by_sample:  # of gradients that are reduced over ranks
            self._estimate = _general(job, "averaged over ranks by fully_shard" * bool(sharding_modules([job.model])))
            return
        try:
            self._estimate = HeadEstimate(job, shared)
        except NotAHead as refusal:  # more than a head was asked for: nothing to explain
            if self._spread:
                raise _no_spread(job, f"here: {refusal}") from None
            self._estimate = _general(job, "")

    def step(self, batch: Any) -> None:
        try:
            self._estimate.step(batch)
        except NotAHead as refusal:
            if self._steps:
                raise EstimationError(f"{refusal}, unlike in earlier batches") from None
            if self._spread:
                raise _no_spread(self._job, f"here: {refusal}") from None
            self._estimate = _general(self._job, f"not at the head: {refusal}")
            self._estimate.step(batch)
        self._steps += 1

    @property
    def selected(self) -> Mapping[str, torch.nn.Parameter]:
        """The parameters that were asked for, as they are here."""
        return self._job.selected

    @property
    def is_whole(self) -> bool:
        """Whether it adds up all of what this rank has a part of, over this rank's samples."""
        return self._spread and self._job.by_sample

    @property
    def totals(self) -> Totals:
        return self._estimate.totals

    def result(self) -> Fisher:
        return self._estimate.result()


def _general(job: Job, why: str) -> Estimate:
    return (SampleEstimate if job.estimator in ("sample", "expected") else BatchEstimate)(job, why)


def check_no_transform() -> None:
    """Raise a LayoutError inside vmap, grad or jvp of torch.func: no backward may run there."""
    if in_transform():
        raise LayoutError("a transform of torch.func (vmap, grad or jvp) is active; call this package outside it")


def _progress(batches: Iterable[Any], loader: Iterable[Any]) -> Iterable[Any]:
    from rich.progress import track

    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a DataLoader of an IterableDataset
        total = None
    return track(batches, description="Fisher", total=total)
