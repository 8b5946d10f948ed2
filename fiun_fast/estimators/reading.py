"""From a batch of any form to outputs, targets and a scalar loss: how the whole package reads a loader."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import EstimationError
from ..wrappers import wrapper_of
from .predictions import IGNORED, Elementwise, Predictions, apart
from .raised import ADVICE, described, in_forward, in_function
from .single import check_batched, check_keywords

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]
Wanted = Literal["loss", "targets", "counted", "outputs"]

LABELS = ("labels", "label", "label_ids")  # keys of a dict; the first one found counts
LABELLED = "(inputs, targets), (inputs, …, targets), or a dict with labels"
_SHORT = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32)
_MAKES_A_LOSS = re.compile("label|_positions$|^return_loss$")  # arguments of models
UNLABELLED = "(inputs, targets), inputs alone, or a dict of the model's keywords"


@dataclass(eq=False)
class OwnLoss:
    """In place of targets: the scalar loss that the model returned when it was called with labels."""

    loss: Tensor
    outputs: Tensor | None = None
    labels: Tensor | None = None
    found: str = "its loss alone"  # what the model returned, and what to pass, where there are no outputs
    advice: str = f"pass {ADVICE}"

    @cached_property
    def apart(self) -> Predictions | Elementwise | None:
        """The loss in terms of the outputs and labels, if it is one of those known; see `predictions.apart`."""
        return apart(self.loss, self.outputs, self.labels)


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """In place of targets: there are none. `mask` [B, T] is 0 at the positions of a sequence that are padding."""

    mask: Tensor | None


@dataclass(frozen=True)
class Reading:
    """How batches are read.

    Attributes:
        wanted: what is needed from a batch: "loss", either targets or the model's own loss; "targets", for the caller's
            loss function; "counted", outputs and what says which of them count; "outputs" alone. Labels may be missing
            for the last two.
        forward_fn: (model, batch) -> (outputs, targets), instead of everything below.
        target_index: position of the targets in a tuple; None: last.
        forms, advice: for error messages: the forms that are understood (None: those that `wanted` allows), and what to
            pass for other ones.

    """

    wanted: Wanted = "loss"
    forward_fn: Forward | None = None
    target_index: int | None = None
    forms: str | None = None
    advice: str = ADVICE

    @property
    def needs_labels(self) -> bool:
        """Whether a batch without labels is of no use."""
        return self.wanted in ("loss", "targets")

    @property
    def skips_unlabelled(self) -> bool:
        """Whether a batch is left out in which no label counts."""
        return self.forward_fn is None and self.wanted != "outputs"

    def forward(self, model: nn.Module, batch: Any, device: torch.device | None = None) -> tuple[Any, Any]:
        """Outputs and targets of a batch, by the table of docs/fishers.md.

        Args:
            model: the module to call.
            batch: what the loader yielded, as `loaders.plain` makes it.
            device: where tensors are moved; None: the device of the model's first parameter.

        Returns:
            Outputs and targets. In place of targets: None where only outputs are wanted; an `OwnLoss`, with outputs
            that may be None, where the model returned its loss; an `Unlabelled` where there may be none and are none.

        Raises:
            EstimationError: a form of batch, or of outputs, that is not understood.

        """
        if self.forward_fn is not None:
            with in_function("forward_fn", batch, model):
                returned = self.forward_fn(model, batch)
            return self._by_caller(returned)
        device = next(model.parameters()).device if device is None else device
        batch = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), batch)
        if isinstance(batch, Mapping):
            outputs, targets = self._by_keywords(model, batch)
            inputs = batch.get("input_ids")
        else:
            inputs, targets = self._parts(batch)
            outputs = outputs_of(call(model, inputs, batch), batch)
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else _mask_of(batch)
        if self.wanted == "outputs":
            check_batched(model, inputs if inputs is not None else batch, outputs, batch)
            return _without_padding(outputs, mask), None
        if self.wanted == "counted" and targets is None:
            positions = mask if mask is not None else _positions(inputs)
            return outputs, Unlabelled(positions)
        if isinstance(targets, Tensor) and self.wanted != "targets":  # a loss of the caller's may shift them itself
            _check_not_inputs(outputs, targets, inputs)
        return outputs, targets

    def check_samples(self, model: nn.Module, batch: Any) -> None:
        """Raise an EstimationError, before it is cut, for a batch of an unknown form, or a dict that is one sample."""
        if self.forward_fn is not None:
            return
        if isinstance(batch, Mapping):
            check_keywords(model, batch, batch.get(_label_key(batch)))
        else:
            self._parts(batch)

    def is_empty(self, batch: Any) -> bool:
        """Whether a batch holds no sample, or labels of which none counts."""
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
        if leaves and all(leaf.shape[0] == 0 for leaf in leaves):
            return True
        if not self.skips_unlabelled:
            return False
        if isinstance(batch, Mapping):
            labels = batch.get(_label_key(batch))
        else:
            labels = batch[-1 if self.target_index is None else self.target_index] if self._has_targets(batch) else None
        if not isinstance(labels, Tensor) or not labels.dim() or labels.is_floating_point() or labels.is_complex():
            return False
        return bool((labels == IGNORED).all())

    def _has_targets(self, batch: Any) -> bool:
        length = len(batch) if isinstance(batch, (tuple, list)) else 0
        at = -1 if self.target_index is None else self.target_index
        return length > 1 and -length <= at < length

    def _by_caller(self, returned: Any) -> tuple[Any, Any]:
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            raise EstimationError(f"forward_fn returns a {type(returned).__name__}, expected (outputs, targets)")
        outputs, targets = returned
        if targets is None and self.wanted == "loss" and isinstance(outputs, Tensor) and outputs.numel() == 1:
            return None, OwnLoss(outputs.reshape(()))  # it has returned the loss
        if targets is None and self.wanted == "counted":
            return _found(outputs), Unlabelled(None)
        if self.wanted != "targets" and (found := _found(outputs)) is not None:  # cross entropy takes a tensor
            return found, targets
        return outputs, targets

    def _parts(self, batch: Any) -> tuple[Any, Tensor | None]:
        parts = list(batch) if isinstance(batch, (tuple, list)) else []
        if not self.needs_labels:
            x = parts[0] if parts else batch
            if not isinstance(x, (Tensor, Mapping)):
                raise self._unknown(batch)
            if any(_looks_like_a_mask(part, x) for part in parts[1:]):
                raise _companion(parts)
            y = parts[-1 if self.target_index is None else self.target_index] if self._has_targets(parts) else None
            return x, y if self.wanted == "counted" and isinstance(y, Tensor) else None
        if not _holds_tensor(parts) or (len(parts) < 2 and self.target_index is None):
            raise self._unknown(batch)
        at = -1 if self.target_index is None else self.target_index
        if not -len(parts) <= at < len(parts):
            raise EstimationError(f"target_index is {at}, but a batch has {len(parts)} parts")
        x, y = parts[0], parts[at]
        if not isinstance(x, (Tensor, Mapping)):
            raise EstimationError(
                f"the inputs of a batch are a {type(x).__name__}, expected a tensor; pass {self.advice}"
            )
        if not isinstance(y, Tensor):
            raise EstimationError(
                f"the targets of a batch are a {type(y).__name__}, expected a tensor; pass {self.advice}"
            )
        if any(_goes_with(part, x) or _is_mask(part, x) for part in parts[1:] if part is not y):
            raise _companion(parts)
        return x, y

    def _by_keywords(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        if not _holds_tensor(pytree.tree_leaves(dict(batch))):
            raise self._unknown(batch)
        key = _label_key(batch)
        if key is None and self.wanted == "targets":
            raise self._without_labels(model, batch)
        given = None if key is None else batch[key]
        keywords, held_out = _keywords(model, batch, key)
        out = call(model, keywords, batch)
        first = out[0] if isinstance(out, (tuple, list)) and out else None
        behind = out[1:] if isinstance(first, Tensor) and first.dim() == 0 and len(out) > 1 else out
        if self.wanted == "outputs":
            return outputs_of(behind), None
        if self.wanted == "targets" or held_out:
            return outputs_of(behind), given
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        if loss is None and key is not None:
            loss = first  # models configured to return tuples put the loss first
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return (found := _found(behind)), OwnLoss(loss, found, given, returned(out), which(out))
        if self.wanted == "counted":
            return outputs_of(behind), given
        if key is None:
            raise self._without_labels(model, batch)
        raise EstimationError(
            f"the model was called with the keywords {', '.join(map(str, keywords))} and returned {returned(out)} "
            f"without a scalar .loss; pass {ADVICE}"
        )

    def _without_labels(self, model: nn.Module, batch: Mapping[str, Any]) -> EstimationError:
        wanted = [name for name in _names(model) if _MAKES_A_LOSS.search(name) and name not in batch]
        what = (
            f"the model makes its loss of {', '.join(wanted)}"
            if wanted and LABELS[0] not in wanted
            else f"for a language model they are a copy of input_ids, {IGNORED} at padding, as transformers' collators "
            "make it"
        )
        return EstimationError(
            f"a batch is a dict with {', '.join(map(str, batch))}, without labels; {what}; or pass {self.advice}"
        )

    def _unknown(self, batch: Any) -> EstimationError:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) and len(batch) else ""
        forms, hint = self.forms or (LABELLED if self.needs_labels else UNLABELLED), ""
        if isinstance(batch, Mapping):
            hint = '; a tokenizer makes tensors with return_tensors="pt"'
        elif isinstance(batch, Tensor):
            hint = "; is the loader one batch? Then pass [batch]"
        return EstimationError(
            f"a batch is a {type(batch).__name__}{size}, expected {forms}{hint}; for batches of another form pass "
            f"{self.advice}"
        )


def call(model: nn.Module, inputs: Any, batch: Any) -> Any:
    """What the model returns for inputs, or for keywords; what it raises is an EstimationError."""
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else ((inputs,), {})
    with in_forward(model, batch, args, kwargs):
        return model(*args, **kwargs)


def outputs_of(out: Any, batch: Any = None) -> Tensor:
    """The logits in what a model returned: a tensor, `.logits`, the first item of a tuple, "logits" or "out" in a dict.

    Raises:
        EstimationError: none of these.

    """
    if (found := _found(out)) is None:
        raise EstimationError(
            f"the model returns {returned(out)}, expected a tensor, a tuple that begins with one, or .logits; "
            f"{which(out, batch)}"
        )
    return found


def returned(out: Any) -> str:
    """What a model returned, for messages."""
    what = f"a {type(out).__name__}"
    return f"{what} of {described(out)}" if isinstance(out, (Mapping, tuple, list)) and len(out) else what


def which(out: Any, batch: Any = None) -> str:
    """What to pass where a model returned something without logits; batch: None where it is a dict of keywords."""
    heads = out.items() if isinstance(out, Mapping) else ()
    names = [key for key, part in heads if isinstance(part, Tensor) and part.dim() > 1]
    if not names:
        return f"pass {ADVICE}"
    given = "**batch" if batch is None else "batch[0]" if isinstance(batch, (tuple, list)) else "batch"
    one = f".{names[0]}" if hasattr(out, names[0]) else f'["{names[0]}"]'
    return f"say which is meant, such as forward_fn=lambda model, batch: (model({given}){one}, targets)"


def _found(out: Any) -> Tensor | None:
    for candidate in (
        out,
        getattr(out, "logits", None),
        out[0] if isinstance(out, (tuple, list)) and out else None,
        next((out[key] for key in ("logits", "out") if key in out), None) if isinstance(out, Mapping) else None,
    ):
        if isinstance(candidate, Tensor):
            return candidate
    return None


def check_scalar(loss: Any, expected: str = "a scalar tensor") -> Tensor:
    """The loss of a batch; an EstimationError if it is not a tensor with one element."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise EstimationError(f"the loss is {found}, expected {expected}")
    return loss


def check_measurable(outputs: Any) -> None:
    """Raise an EstimationError unless the outputs have a length for each sample, which `label_free` measures."""
    if not isinstance(outputs, Tensor) or outputs.dim() == 0 or not outputs.is_floating_point():
        found = described(outputs) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        found = "a scalar" if isinstance(outputs, Tensor) and outputs.dim() == 0 else found
        raise EstimationError(
            f"the outputs are {found}, expected a tensor [B, ...] of floating point, whose length label_free measures"
        )


def check_loss(loss: Any, names: Iterable[str]) -> Tensor:
    """The loss; an EstimationError if it is not a scalar, or depends on none of the named parameters."""
    if not check_scalar(loss).requires_grad:
        raise EstimationError(f"the loss does not depend on {', '.join(list(names)[:4])}")
    return loss


def count(tree: Any) -> int:
    """Samples of a batch or of outputs: the first dimension of the first tensor that has one, 0 where none has."""
    return next((leaf.shape[0] for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def in_transform() -> bool:
    """Whether vmap, grad or jvp of torch.func is active: values of tensors cannot be looked at there."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _label_key(batch: Mapping[str, Any]) -> str | None:
    return next((key for key in LABELS if batch.get(key) is not None), None)


def _reading(model: nn.Module) -> nn.Module:
    """The module that names the arguments: wrappers, as PEFT's without a task, may hand on whatever they are given."""
    while (wrapper := wrapper_of(model)) is not None:
        kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
        if not kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            break
        model = model._modules[wrapper.key]  # type: ignore[assignment]
    return model


def _keywords(model: nn.Module, batch: Mapping[str, Any], key: str | None) -> tuple[dict[str, Any], bool]:
    """What the model is called with, and whether the labels are left out, since it takes none.

    Raises:
        EstimationError: the model does not take one of the tensors.

    """
    try:
        given = inspect.signature(_reading(model).forward).parameters.values()
    except (TypeError, ValueError):  # TorchScript
        return dict(batch), False
    names = {p.name for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in given)
    keywords, held_out = dict(batch), False
    if key is not None and (labels := batch[key]).dtype in _SHORT:  # classes of any integer dtype, as elsewhere
        keywords[key] = labels.long()
    if key is not None and key not in names:
        if LABELS[0] in names:  # a dataset's "label", which transformers' collators rename
            keywords[LABELS[0]] = keywords.pop(key)
        elif not takes_any:
            held_out = keywords.pop(key) is not None
    if not takes_any:
        strange = [name for name, part in keywords.items() if name not in names and isinstance(part, Tensor)]
        if strange:
            raise EstimationError(
                f"a batch holds {', '.join(map(repr, strange))}, which the model does not take: its forward has "
                f"{', '.join(sorted(names)) or 'no arguments'}; leave it out or rename it, or pass {ADVICE}"
            )
        keywords = {name: part for name, part in keywords.items() if name in names}  # texts, paths
    return keywords, held_out


def _names(model: nn.Module) -> list[str]:
    """What the model's forward takes."""
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return []


def _holds_tensor(parts: Iterable[Any]) -> bool:
    return any(isinstance(part, Tensor) for part in parts)


def _mask_of(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def _positions(inputs: Any) -> Tensor | None:
    """All ones [B, T], where the inputs are tokens."""
    inputs = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    return torch.ones_like(inputs) if _is_tokens(inputs) else None


def _is_tokens(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 1 and not x.is_floating_point() and not x.is_complex()


def _goes_with(part: Any, x: Any) -> bool:
    """Whether a part of a batch has one entry for each token, as a mask and token types do."""
    return _is_tokens(x) and _is_tokens(part) and part.shape == x.shape


def _is_mask(part: Any, x: Any) -> bool:
    """Whether a part of a batch says yes or no to each token of [B, T], or each step of [B, T, D]."""
    if not isinstance(part, Tensor) or not (_is_tokens(x) or (isinstance(x, Tensor) and x.dim() == 3)):
        return False
    if part.dim() < 2 or len(part) != len(x) or part.numel() != x.shape[0] * x.shape[1]:
        return False
    return part.dtype == torch.bool or (not in_transform() and bool(((part == 0) | (part == 1)).all()))


def _looks_like_a_mask(part: Any, x: Any) -> bool:
    return not in_transform() and _is_mask(part, x) and not bool((x <= 1).all())


def _companion(parts: Iterable[Any]) -> EstimationError:
    shapes = ", ".join(str(list(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
    return EstimationError(
        f"a batch has the parts {shapes}, of which one besides the inputs and the targets has an entry for each token; "
        "say what it is by a dict, such as {'input_ids': …, 'attention_mask': …, 'labels': …}, or pass "
        "forward_fn=lambda model, batch: (outputs, targets), such as (model(batch[0], batch[1]), batch[2])"
    )


def _without_padding(outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Outputs [B, T, ...] with zeros at the positions that a mask [B, T] leaves out."""
    if not isinstance(mask, Tensor) or outputs.dim() < 3 or mask.shape != outputs.shape[:2]:
        return outputs
    return outputs.masked_fill((mask == 0).view(*mask.shape, *[1] * (outputs.dim() - 2)), 0)


def _check_not_inputs(outputs: Tensor, targets: Tensor, inputs: Any) -> None:
    """Raise an EstimationError where every token is to be predicted from itself: labels that are yet to be shifted."""
    inputs = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if in_transform() or not _goes_with(targets, inputs) or outputs.dim() != 3:
        return
    if bool(((targets == inputs) | (targets == IGNORED)).all()):
        raise EstimationError(
            "the targets are the inputs themselves; a causal language model predicts the next token: pass (inputs[:, "
            ":-1], inputs[:, 1:]), or a dict with labels, for the model's own loss"
        )
