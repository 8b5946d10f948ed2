"""SSD's `ParameterPerturber` (arXiv 2308.07707, and FIUn's copy of it, 2408.08493) on the kernels of this package.

    from fiun_fast.compat.ssd import ParameterPerturber  # instead of: from ssd import ParameterPerturber

The rest of a script stays as it is. docs/migrate.md lists the variants in circulation and the one line that each needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fiun_fast as ff
from fiun_fast.arguments import FISHER_DTYPES, THETA_DTYPES, check_one_of
from fiun_fast.estimators.claims import estimating
from fiun_fast.estimators.loaders import of_batch
from fiun_fast.estimators.reading import Forward, Loss
from fiun_fast.estimators.totals import check_no_inference
from fiun_fast.guards import alone
from fiun_fast.memory import check_addressable, check_writable
from fiun_fast.provenance import warn_if_unlike
from fiun_fast.scope import check_module
from fiun_fast.wrappers import check_gathered, said_of_quantised

from .dampening import Kept, Numbers, dampen, dampen_in_half_precision
from .differences import differences
from .helpers import Helpers
from .importances import Importances, check_averaged, flat_zeros, mfim, named_as, published, streamed, values_of
from .parameters import ADAPTIVE, DEFAULTS, NUMBERS, check_finite, check_whole, given, is_device
from .passes import NORMALIZE, Batches, Pass

__all__ = ["ParameterPerturber", "differences", "mfim"]
MODES = ("strict", "corrected")


class ParameterPerturber(Helpers):
    """Drop-in for the class of that name in SSD's and FIUn's code: same methods, same bits, one pass over the weights.

    Args:
        model: any module; dampened in place by `modify_weight`.
        opt: optimiser whose `zero_grad` is called before each batch; None: the model's own.
        device: where batches go; None: the model's device. `opt` and `device` may come in either order.
        parameters: dict or object: `selection_weighting` (alpha, 10), `dampening_constant` (lambda, 1),
            `exponent` (1), `lower_bound` (the cap, 1), `train_layer` (names or globs to restrict to, "last" for the
            last layer, None or "all" for everything), `adaptive_percentile` (alpha is then this percentile of all
            finite ratios F / I, 0..100); defaults in brackets. Other keys are ignored, as in the published class.
        mode: "strict" gives the published class's bits, its side effects included; "corrected" estimates in eval mode,
            in float32 for half-precision models, and leaves the model as it was. `differences()` lists it all.
        normalize: what sums of squared batch gradients are divided by: "batches" (as published), "samples", or
            "weighted" (each batch counts by its samples, divided by all samples).
        truncate: how many samples of each batch are used (32 in FIUn's code); None: all.
        target_index: position of the targets in a tuple; None: last, as in (x, y) and SSD's (x, _, y).
        batch_fn: batch -> (x, y), or another form that `calc_importance` understands.
        forward_fn: (model, batch) -> (outputs, targets), for everything else.
        loss_fn: (outputs, targets) -> scalar mean loss; default cross entropy.
        label_free: importance without labels, mean |gradient of mean ‖f(x)‖²| (LFSSD, arXiv 2402.19308).
        backend: as in `ff.plan`.

    Raises:
        ArgumentError: a number that is negative or not finite, a key that looks like a misspelt one, an unknown option.
        LayoutError: `train_layer` names a parameter that the model does not have.

    """

    def __init__(
        self,
        model: nn.Module,
        opt: Any = None,
        device: Any = None,
        parameters: Any = None,
        *,
        mode: str = "strict",
        normalize: str = "batches",
        truncate: int | None = None,
        target_index: int | None = None,
        batch_fn: Any = None,
        forward_fn: Forward | None = None,
        loss_fn: Loss | None = None,
        label_free: bool = False,
        backend: str | None = None,
    ) -> None:
        check_module("model", model)
        if isinstance(device, torch.optim.Optimizer) or is_device(opt):
            opt, device = device, opt
        if opt is not None and not hasattr(opt, "zero_grad"):
            raise ff.ArgumentError(f"opt is a {type(opt).__name__}, expected an optimiser or None")
        if device is not None and not is_device(device):
            raise ff.ArgumentError(f"device is a {type(device).__name__}, expected a torch.device, its name, or None")
        self.model, self.opt = model, opt
        first = next(model.parameters(), None)
        if first is None:
            raise ff.LayoutError(f"{type(model).__name__} has no parameters{said_of_quantised(model)}")
        self.device = first.device if device is None else torch.device(device)
        self.parameters = DEFAULTS | given(parameters)
        for key in DEFAULTS:
            setattr(self, key, self.parameters[key])  # attributes, because scripts set them
        self._numbers()
        self.train_layer = self._scope(self.train_layer)
        self.mode, self.normalize, self.truncate = mode, normalize, truncate
        self.label_free, self.backend = label_free, backend
        self._form = Batches(target_index, None, batch_fn, forward_fn, loss_fn)
        self._kept = Kept()
        self._options()

    lower_bound: float
    exponent: float
    dampening_constant: float
    selection_weighting: float | str
    adaptive_percentile: float | None
    train_layer: list[str] | None

    def calc_importance(
        self,
        dataloader: Iterable[Any],
        criterion: Loss | None = None,
        *,
        normalize: str | None = None,
        truncate: int | None = None,
    ) -> dict[str, Tensor]:
        """Importance of every parameter: mean over the batches of the squared gradient of the batch's mean loss.

        Batches: (x, y); (x, …, y); (x, y, idx) with target_index=1; a dict with labels, which the model gets as keyword
        arguments and whose `.loss` is used; anything else through `batch_fn` or `forward_fn`. docs/fishers.md has
        tables of all forms of batches and targets. A batch without a sample is left out.

        Args:
            dataloader: yields batches; its length is not needed.
            criterion: (outputs, targets) -> scalar mean loss, instead of `loss_fn`.
            normalize, truncate: override the constructor's.

        Returns:
            Name -> tensor in the parameter's shape, names and order those of `model.named_parameters()`; views of one
            flat buffer, which is what lets `modify_weight` take one pass (and makes `torch.save` of one entry write
            them all: save `value.clone()`, or `ff.Fisher.from_dict(importances)`). In strict mode every parameter is
            there, zeros where no gradient came, in the parameter's dtype, except frozen integers; in corrected mode
            those that require grad, or those of `train_layer`, in float32.

        Raises:
            EstimationError: an empty loader, a batch, targets or output of an unknown form, a loss that is not a
                scalar, not finite, or depends on no parameter.
            ArgumentError: one batch, or a dataset of samples, in the place of a loader.

        """
        self._options()
        how = self.normalize if normalize is None else normalize
        check_one_of("normalize", how, NORMALIZE)
        form = replace(self._form, truncate=self.truncate if truncate is None else truncate, label_free=self.label_free)
        if criterion is not None:
            form = replace(form, loss_fn=criterion)
        if self.label_free and form.loss_fn is not None:
            raise ff.ArgumentError("label_free has a loss of its own, mean ‖f(x)‖²: leave criterion and loss_fn out")
        pass_over = Pass(form, self.device, how)
        return (self._strict if self.mode == "strict" else self._corrected)(dataloader, pass_over)

    def modify_weight(
        self,
        original_importance: Importances,
        forget_importance: Importances | Sequence[Importances],
        *,
        divisor: float = 1.0,
        dry_run: bool = False,
        undo: bool = False,
        audit: bool = False,
    ) -> ff.Report | None:
        """Dampen the model: where F > alpha I, theta *= min((lambda I / F)^exponent, lower_bound).

        Args:
            original_importance: over the training data; a dict by name, or an `ff.Fisher`.
            forget_importance: over the data to be forgotten; several, in a list, are merged by `mfim`.
            divisor: as in `mfim`, if there are several.
            dry_run, undo, audit: as in `ff.Plan.run_`.

        Returns:
            Counts; None where strict mode works in half precision, tensor by tensor.

        Raises:
            LayoutError: names or shapes that do not match, or a tensor without plain memory of its own (a DTensor,
                sparse, freed, …). As after the errors below, nothing has been changed.
            ArgumentError: a negative importance, a number outside its range.
            DTypeError, DeviceError: as in `ff.plan`.

        """
        self._options()
        self._numbers()
        one = isinstance(forget_importance, (Mapping, ff.Fisher))
        forgets: list[Any] = [forget_importance] if one else list(_several(forget_importance))
        if not forgets:
            raise ff.ArgumentError("forget_importance is an empty list: nothing to forget")
        options = {"dry_run": dry_run, "undo": undo, "audit": audit}
        given = [original_importance, *forgets]
        if (report := self._again(given, divisor, options)) is not None:
            return report
        if isinstance(original_importance, ff.Fisher):
            warn_if_unlike(
                ("original_importance", original_importance.provenance, "forget_importance", one.provenance)
                for one in forgets
                if isinstance(one, ff.Fisher)
            )
        parameters = dict(self.model.named_parameters())
        original = self._fitting("original_importance", original_importance, parameters)
        chosen = [
            self._fitting(
                f"forget_importance[{k}]" if len(forgets) > 1 else "forget_importance", one, parameters, original
            )
            for k, one in enumerate(forgets)
        ]
        if len(chosen) > 1 and (divisor != 1 or self._in_half(chosen[0])):
            chosen = [mfim(chosen, divisor)]
        return self._dampen(original, chosen, self._alpha(original, chosen), options, given)

    def reverse_modify_weight(
        self,
        original_importance: Importances,
        forget_importance: Importances,
        *,
        dry_run: bool = False,
        undo: bool = False,
        audit: bool = False,
    ) -> ff.Report | None:
        """FIUn's counterpart: where F < alpha I, theta *= min((lambda F / I)^exponent, lower_bound).

        Keeps what the forget data needs and dampens the rest. Arguments and errors as in `modify_weight`.
        """
        self._options()
        self._numbers()
        parameters = dict(self.model.named_parameters())
        original = self._fitting("original_importance", original_importance, parameters)
        forget = self._fitting("forget_importance", forget_importance, parameters, original)
        alpha = self._alpha(original, [forget])
        # With the roles exchanged, an element is selected iff alpha I > F: keep I there and 0 elsewhere, and ask for
        # more than 0.
        merged = flat_zeros(original)
        for name, i in original.items():
            torch.where(forget[name].to(i.device) < i.mul(alpha), i, merged[name], out=merged[name])
        options = {"dry_run": dry_run, "undo": undo, "audit": audit}
        return self._dampen(forget, [merged], 0.0, options)

    # ---- importance --------------------------------------------------------------------------------------------------

    def _strict(self, dataloader: Iterable[Any], pass_over: Pass) -> dict[str, Tensor]:
        """The published loop: the model is neither prepared before nor restored afterwards."""
        check_gathered("model", self.model, for_good=True)
        parameters = dict(self.model.named_parameters())
        for name, p in parameters.items():
            check_averaged(f"parameter {name!r}", p)
        check_no_inference(parameters.items())
        if not any(p.requires_grad for p in parameters.values()):
            raise ff.LayoutError(f"no parameter of {type(self.model).__name__} requires grad: no gradient will arrive")
        # frozen integers, as quantised layers have them, can neither be averaged nor dampened
        parameters = {name: p for name, p in parameters.items() if p.requires_grad or p.dtype in THETA_DTYPES}
        dtypes, devices = {p.dtype for p in parameters.values()}, {p.device for p in parameters.values()}
        flat = len(dtypes) == len(devices) == 1 and dtypes <= set(FISHER_DTYPES)
        power = 1 if self.label_free else 2
        sums = {} if flat else flat_zeros(parameters)
        if flat:
            accumulator = ff.FisherAccumulator(
                self.model,
                params=list(parameters),
                dtype=dtypes.pop(),
                backend=self.backend,
                estimator="label_free" if self.label_free else "batch",
                allow_frozen=True,
            )
        with estimating({"model": self.model}), self._only_scope():
            batches = pass_over.over(dataloader, self.model)
            for number, batch in batches:
                self.opt.zero_grad() if self.opt is not None else self.model.zero_grad()
                with of_batch(number):
                    outputs, targets = pass_over.forward(self.model, batch)
                    pass_over.strict_loss(outputs, targets, parameters).backward()
                if flat:
                    accumulator.update()
                    continue
                for name, total in sums.items():
                    if (gradient := parameters[name].grad) is not None:
                        total += gradient.abs() if power == 1 else gradient.pow(2)
        batches.check_not_empty()
        if not flat:
            for total in sums.values():
                total /= float(pass_over.divisor())
            return sums
        fisher = accumulator.result(in_place=True)
        if pass_over.how != "batches":
            fisher.buffer.mul_(pass_over.batches / pass_over.divisor())
        return self._named(fisher.as_dict())

    def _corrected(self, dataloader: Iterable[Any], pass_over: Pass) -> dict[str, Tensor]:
        """`ff.estimate_fisher`, which leaves the model as it was."""
        check_whole(self.model)
        fisher = ff.estimate_fisher(
            self.model,
            pass_over.over(dataloader, self.model),
            params=self.train_layer,
            estimator="label_free" if self.label_free else "batch",
            loss_fn=None if self.label_free else pass_over.loss,
            forward_fn=pass_over.forward,
            backend=self.backend,
        )
        if pass_over.how != "batches":
            fisher.buffer.mul_(pass_over.batches / pass_over.divisor())
        return self._named(fisher.as_dict())

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What layouts name, by the names of `model.named_parameters()`."""
        parameters = (name for name, _ in self.model.named_parameters())
        return dict(named_as(self.model, parameters, "the importances", values))

    @contextmanager
    def _only_scope(self) -> Iterator[None]:
        """With `train_layer`, gradients for nothing else: the rest of the backward pass is skipped."""
        frozen = []
        if self.train_layer is not None:
            names = set(self.train_layer)
            frozen = [p for name, p in self.model.named_parameters() if p.requires_grad and name not in names]
        try:
            for p in frozen:
                p.requires_grad_(False)
            yield
        finally:
            for p in frozen:
                p.requires_grad_(True)

    # ---- dampening ---------------------------------------------------------------------------------------------------

    def _fitting(
        self,
        what: str,
        importances: Importances,
        parameters: Mapping[str, nn.Parameter],
        like: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The entries in scope, checked against the model's parameters, and against the other importances' names."""
        values = named_as(self.model, parameters, what, values_of(what, importances))
        for name, value in values.items():
            if like is None or name not in like:
                check_addressable(f"parameter {name!r}", parameters[name])
            if value.shape != parameters[name].shape:
                check_gathered("model", self.model)
                shapes = f"{list(value.shape)}, {list(parameters[name].shape)} in the model"
                raise ff.LayoutError(f"{what}: {name!r} is {shapes}")
        if self.train_layer is not None:
            missing = [name for name in self.train_layer if name not in values]
        else:
            missing = [name for name in like or () if name not in values]
        if missing:
            raise ff.LayoutError(f"{what} has no {', '.join(map(repr, missing[:4]))}{' …' if len(missing) > 4 else ''}")
        if like is not None and self.train_layer is None and (more := [name for name in values if name not in like]):
            raise ff.LayoutError(
                f"{what} has {', '.join(map(repr, more[:4]))}, which original_importance does not have"
            )
        scope = values if self.train_layer is None else set(self.train_layer)
        return {name: values[name] for name in parameters if name in values and name in scope}

    def _in_half(self, values: Mapping[str, Tensor]) -> bool:
        """Whether strict mode computes in half precision here."""
        return self.mode == "strict" and any(value.itemsize == 2 for value in values.values())

    def _alpha(self, original: Mapping[str, Tensor], forgets: Sequence[Mapping[str, Tensor]]) -> float:
        adaptive = isinstance(self.selection_weighting, str)
        if self.adaptive_percentile is None and not adaptive:
            return float(self.selection_weighting)
        if self.adaptive_percentile is None:
            raise ff.ArgumentError("selection_weighting is adaptive: set parameters['adaptive_percentile'] as well")
        forget = forgets[0] if len(forgets) == 1 else mfim(forgets)
        if self.mode == "strict":
            return published(original, forget, self.adaptive_percentile)
        return streamed(original, forget, self.adaptive_percentile, self.backend)

    def _dampen(
        self,
        original: Mapping[str, Tensor],
        forgets: Sequence[Mapping[str, Tensor]],
        alpha: float,
        options: Mapping[str, bool],
        given: Sequence[Importances] = (),
    ) -> ff.Report | None:
        """Dampen, and keep the plan for the next call with the importances given, if it is of them as they are."""
        if not options["dry_run"]:
            parameters = dict(self.model.named_parameters())
            check_writable((f"parameter {name!r}" for name in original), (parameters[name] for name in original))
        numbers = Numbers(alpha, float(self.dampening_constant), float(self.exponent), float(self.lower_bound))
        if not self._in_half(original):
            report, made = dampen(self.model, original, forgets, numbers, self._backend(), options)
            if len(given) == 1 + len(forgets):
                self._kept.keep(self.model, made, given, self._plans_options())  # type: ignore[arg-type]  # a Fisher is not kept
            return report
        if any(options.values()):
            asked = ", ".join(key for key, on in options.items() if on)
            raise ff.ArgumentError(
                f'{asked}: not available for half-precision importances in strict mode; use mode="corrected"'
            )
        dampen_in_half_precision(self.model, original, forgets[0], numbers)
        return None

    def _again(self, given: Sequence[Any], divisor: float, options: Mapping[str, bool]) -> ff.Report | None:
        """The run of the kept plan, if these are its importances; None where the long way is to be gone."""
        if isinstance(self.selection_weighting, str) or self.adaptive_percentile is not None:
            return None
        if len(given) > 2 and divisor != 1:
            return None
        with alone, suppress(ff.FiunError):  # nothing was changed then; the long way copes, or says it in its words
            if (plan := self._kept.fitting(self.model, given, self._plans_options())) is not None:
                self._kept.set_values_(float(self.selection_weighting), float(self.dampening_constant))
                return plan.run_(**options)
        return None

    def _backend(self) -> str | None:
        return "reference" if self.mode == "strict" and float(self.exponent) != 1 else self.backend

    def _plans_options(self) -> tuple[Any, ...]:
        """What a plan is made with, beside model and importances: the backend's name first."""
        scope = None if self.train_layer is None else tuple(self.train_layer)
        return self._backend(), float(self.exponent), float(self.lower_bound), self.mode, scope

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _scope(self, train_layer: Any) -> list[str] | None:
        if train_layer is None or train_layer == "all":
            return None
        layout = ff.Layout.from_module(self.model, train_layer)
        return list(self._named(dict.fromkeys(layout.names)))

    def _numbers(self) -> None:
        for key in NUMBERS:
            value = getattr(self, key)
            if key == "selection_weighting" and isinstance(value, str) and value.lower() in ADAPTIVE:
                continue
            check_finite(key, value)
        if self.adaptive_percentile is not None:
            check_finite("adaptive_percentile", self.adaptive_percentile, 100)

    def _options(self) -> None:
        check_one_of("mode", self.mode, MODES)
        check_one_of("normalize", self.normalize, NORMALIZE)
        if self.truncate is not None and not (isinstance(self.truncate, int) and self.truncate > 0):
            raise ff.ArgumentError(f"truncate is {self.truncate!r}, expected a positive number of samples, or None")


def _several(importances: Any) -> Sequence[Importances]:
    if isinstance(importances, (list, tuple)):
        return importances
    raise ff.ArgumentError(
        f"forget_importance is a {type(importances).__name__}, expected a dict of name -> tensor, or a list of these"
    )
