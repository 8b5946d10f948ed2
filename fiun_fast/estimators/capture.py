"""Watch a forward pass: where each selected parameter is used, with what input, and, in the backward, which gradient.

Functions are watched, not modules: `torch.nn.functional.linear(x, self.weight)` counts like `nn.Linear`, and whatever
touches a selected parameter in a way that is not understood is noticed. The parameters themselves need no gradient, so
none is computed for them; the graph starts at an anchor in the first watched layer.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .claims import Shared

# Functions with a closed form: name of the rule, arguments in order, and which of them may be selected parameters.
WATCHED: dict[Any, tuple[str, tuple[str, ...]]] = {
    functional.linear: ("linear", ("input", "weight", "bias")),
    torch.addmm: ("addmm", ("bias", "input", "weight")),
    functional.conv1d: ("conv", ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    functional.conv2d: ("conv", ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    functional.conv3d: ("conv", ("input", "weight", "bias", "stride", "padding", "dilation", "groups")),
    functional.embedding: (
        "embedding",
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    ),
    functional.layer_norm: ("layer_norm", ("input", "normalized_shape", "weight", "bias", "eps")),
    functional.rms_norm: ("rms_norm", ("input", "normalized_shape", "weight", "eps")),
    functional.group_norm: ("group_norm", ("input", "num_groups", "weight", "bias", "eps")),
    functional.batch_norm: (
        "batch_norm",
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    ),
}
ROLES = ("weight", "bias")
# Reading one of these attributes does not count as using the parameter.
HARMLESS = {
    *("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "is_leaf", "is_nested", "layout", "is_mkldnn"),
    *("size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "element_size", "__len__"),
    *("data_ptr", "storage_offset", "is_meta", "is_quantized", "is_sparse", "nelement", "is_xpu", "is_mps", "is_cpu"),
}
SPLITS = {Tensor.split, Tensor.chunk, torch.split, torch.chunk}  # along dimension 0 they give slices of rows


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a parameter; all of them where stop is None."""

    name: str
    start: int = 0
    stop: int | None = None


Signature = tuple[str, tuple[tuple[str, Rows], ...]]


@dataclass(eq=False)
class Use:
    """One call of a watched function with selected parameters."""

    rule: str
    roles: dict[str, Rows]  # weight or bias -> rows of which parameter
    arguments: dict[str, Any]  # all others, without the input
    given: Tensor | None  # the input; dropped when the backward begins, as is the output
    output: Tensor | None = None
    meet: Callable[[Use, Tensor, Tensor], None] | None = None  # takes input and output gradient when that arrives
    note: str = ""  # for the provenance

    def __post_init__(self) -> None:
        self.signature: Signature = self.rule, tuple(sorted(self.roles.items()))  # what batches have in common


@dataclass
class Trace:
    """What was seen in one forward pass."""

    uses: list[Use] = field(default_factory=list)
    strange: dict[str, str] = field(default_factory=dict)  # parameter -> the unknown function that used it


class Watch(TorchFunctionMode):
    """Inside `with`, calls that use a selected parameter are recorded and tapped."""

    def __init__(self, selected: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in selected.items()}
        self._selected = selected
        self._rows: dict[int, tuple[Rows, Tensor]] = {}  # slices of parameters, kept alive so that ids stay theirs
        self._recomputing = False
        device = next(iter(selected.values())).device
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.trace = Trace()

    def backward_begins(self) -> None:
        """From now on calls are recomputations (activation checkpointing): tapped as before, but no longer recorded."""
        self._recomputing = True
        for use in self.trace.uses:
            use.given = use.output = None

    def __torch_function__(self, func, types_, args=(), kwargs=None):
        """Every torch function that the model calls passes through here."""
        kwargs = kwargs or {}
        if func in _TRANSPARENT:
            with self:
                return _TRANSPARENT[func](*args, **kwargs)
        touched = [leaf for leaf in _tensors((args, kwargs)) if self._rows_of(leaf) is not None]
        if not touched:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if name in HARMLESS:
            return func(*args, **kwargs)
        if func in SPLITS and (kwargs.get("dim", args[2] if len(args) > 2 else 0) == 0):
            return self._note_rows(args[0], func(*args, **kwargs))
        if func in WATCHED:
            use = self._use(func, args, kwargs, len(touched))
            if use is not None:
                return self._tap(use, self._bound(func, args, kwargs)["input"], func(*args, **kwargs))
        for leaf in touched:
            rows = self._rows_of(leaf)
            if rows is not None and not self._recomputing:
                self.trace.strange.setdefault(rows.name, name)
        return func(*args, **kwargs)

    def _rows_of(self, tensor: Tensor) -> Rows | None:
        name = self._names.get(id(tensor))
        if name is not None:
            return Rows(name)
        found = self._rows.get(id(tensor))
        return found[0] if found is not None else None

    def _note_rows(self, parent: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Remember which rows of which parameter the parts are."""
        rows = self._rows_of(parent)
        assert rows is not None
        at = rows.start
        for part in parts:
            self._rows[id(part)] = Rows(rows.name, at, at + part.shape[0]), part
            at += part.shape[0]
        return parts

    @staticmethod
    def _bound(func: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(WATCHED[func][1], args, strict=False)) | kwargs

    def _use(self, func: Any, args: tuple, kwargs: dict[str, Any], touched: int) -> Use | None:
        """The call as a use, or None if a parameter is passed as an argument where the rule does not expect one."""
        bound = self._bound(func, args, kwargs)
        roles = {
            role: rows for role in ROLES if isinstance(bound.get(role), Tensor) and (rows := self._rows_of(bound[role]))
        }
        if len(roles) != touched or not isinstance(bound.get("input"), Tensor):
            return None
        others = {key: value for key, value in bound.items() if key != "input" and key not in roles}
        weight = bound.get("weight")
        if isinstance(weight, Tensor):
            others["weight_shape"] = weight.shape
        return Use(WATCHED[func][0], roles, others, bound["input"])

    def _tap(self, use: Use, given: Tensor, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            for rows in use.roles.values():
                self.trace.strange.setdefault(rows.name, "a call without gradients")
            return output
        tapped = _Tap.apply(output, self.anchor, given.detach(), use)
        if not self._recomputing:
            use.output = tapped
            self.trace.uses.append(use)
        return tapped


class _Tap(torch.autograd.Function):
    """Passes a tensor on, itself and not a view, and hands the gradient that comes back to its use."""

    @staticmethod
    def forward(ctx, output: Tensor, anchor: Tensor, given: Tensor, use: Use) -> Tensor:
        ctx.save_for_backward(given)  # autograd notices if it is written to before the backward
        ctx.use = use
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.use.meet is not None:
            (given,) = ctx.saved_tensors
            with torch.no_grad(), torch._C.DisableTorchFunction():  # not the model's own calls: not watched
                ctx.use.meet(ctx.use, given, gradient)
        return gradient, None, None, None


def _step_by_step() -> bool:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return before


_attention = Shared(_step_by_step, torch.backends.mha.set_fastpath_enabled)


def step_by_step_attention() -> AbstractContextManager[None]:
    """Torch's fused inference path for attention hides the projections; it is a setting of the process."""
    return _attention


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _transparent(function: Any) -> Any:
    """The same function, but the watch sees the calls inside it.

    As torch defines them, attention and backward show up as one call as soon as anything watches; this one name is how
    they ask whether anything does.
    """
    seen = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, seen, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_TRANSPARENT = {f: _transparent(f) for f in (functional.multi_head_attention_forward, torch.autograd.backward)}
