"""Watch a forward pass: where each selected parameter is used, with what input, and, in the backward, which gradient.

Functions are watched, not modules: `torch.nn.functional.linear(x, self.weight)` counts like `nn.Linear`, and whatever
touches a selected parameter in a way that is not understood is noticed. The parameters themselves need no gradient, so
none is computed for them; the graph starts at an anchor in the first watched layer.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .claims import Shared
from .made import MADE, VIEWS, Calls, Key, Made, made_by, parameter, tensors
from .picked import Picked

# Functions with a closed form: name of the rule, arguments in order, and which of them may be selected parameters.
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_GROUPED = {f for f in (getattr(torch, "_grouped_mm", None), getattr(functional, "grouped_mm", None)) if f is not None}
WATCHED: dict[Any, tuple[str, tuple[str, ...]]] = {
    functional.linear: ("linear", ("input", "weight", "bias")),
    torch.addmm: ("addmm", ("bias", "input", "weight")),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm), ("matmul", ("input", "weight"))),
    **dict.fromkeys(_GROUPED, ("grouped", ("input", "weight", "offs", "bias", "out_dtype"))),
    Tensor.__getitem__: ("embedding", ("weight", "input")),  # of rows by number
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), ("conv", _CONV)),
    **dict.fromkeys(
        (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
        ("transposed conv", _TRANSPOSED),
    ),
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
    functional.instance_norm: (
        "instance_norm",
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    ),
    **dict.fromkeys((functional.prelu, torch.prelu), ("prelu", ("input", "weight"))),
}
ROLES = ("weight", "bias")
# Functions whose arguments are broadcast, element by element, whatever they are called with underscores.
ELEMENTWISE = {
    *(
        "add",
        "radd",
        "iadd",
        "sub",
        "rsub",
        "isub",
        "subtract",
        "mul",
        "rmul",
        "imul",
        "multiply",
        "addcmul",
        "addcdiv",
    ),
    *("div", "rdiv", "truediv", "rtruediv", "itruediv", "divide", "true_divide", "pow", "rpow", "lerp", "where"),
    *("maximum", "minimum", "scaled_dot_product_attention"),
}
SPREAD = {"expand", "expand_as", "repeat", "broadcast_to", "tile"}  # a parameter is given to every sample
# Reading one of these attributes does not count as using the parameter.
HARMLESS = {
    *("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "is_leaf", "is_nested", "layout", "is_mkldnn"),
    *("size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "element_size", "__len__"),
    *("data_ptr", "storage_offset", "is_meta", "is_quantized", "is_sparse", "nelement", "is_xpu", "is_mps", "is_cpu"),
}
# Functions that look only at the shape, dtype and device of their arguments, or of all but the first.
OF_SHAPE = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
OF_FIRST = {"to", "type_as", "view_as", "reshape_as", "expand_as"}
Signature = tuple[str, tuple[tuple[str, Key], ...]]


@dataclass(eq=False)
class Use:
    """One call of a watched function with selected parameters.

    Attributes:
        rule: which closed form it has.
        roles: weight or bias -> the parameter, or what was made of parameters.
        arguments: all others, without the input.
        axis: where the samples lie in the input.
        owners: for rows that were picked from several samples, as for an expert: the sample of each, [rows].
        given: the input; dropped when the backward begins, as is the output.
        before: the input of the same call with one sample, while a model is learned.

    """

    rule: str
    roles: dict[str, Made]
    arguments: dict[str, Any]
    axis: int
    owners: Tensor | None = None
    given: Tensor | None = None
    before: Tensor | None = None
    output: Tensor | None = None
    meet: Callable[[Use, Tensor | None, Tensor], None] | None = None  # takes input and output gradient as that arrives
    note: str = ""  # for the provenance

    def __post_init__(self) -> None:
        keys = sorted((role, made.key) for role, made in self.roles.items())
        self.signature: Signature = self.rule, tuple(keys)  # what batches have in common

    @property
    def names(self) -> Iterable[str]:
        """The parameters that are in it."""
        return dict.fromkeys(name for made in self.roles.values() for name in made.names)


@dataclass
class Trace:
    """What was seen in one forward pass."""

    uses: list[Use] = field(default_factory=list)
    strange: dict[str, str] = field(default_factory=dict)  # parameter -> the unknown function that used it
    ragged: bool = False  # samples lie one behind the other in a tensor, and another says where they begin


class Watch(TorchFunctionMode):
    """Inside `with`, calls that use a selected parameter are recorded and tapped.

    Args:
        selected: name -> parameter.
        calls: what earlier passes have found out.
        samples: how many the batch has.
        data: the tensors of the batch; needed in the first pass.

    """

    def __init__(self, selected: Mapping[str, Tensor], calls: Calls, samples: int, data: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._calls, self._picked = calls, Picked(samples)
        self._made = {id(p): (parameter(name, p), p) for name, p in selected.items()}  # ids are theirs while they live
        self._tainted = {id(t): t for t in data}
        self._recomputing = False
        device = next(iter(selected.values())).device
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.trace = Trace()

    def backward_begins(self) -> None:
        """From now on calls are recomputations (activation checkpointing): tapped as before, but no longer recorded."""
        self._recomputing = True
        for use in self.trace.uses:
            use.given = use.output = use.before = None

    def __torch_function__(self, func, types_, args=(), kwargs=None):
        """Every torch function that the model calls passes through here."""
        kwargs = kwargs or {}
        if func in _TRANSPARENT:
            with self:
                return _TRANSPARENT[func](*args, **kwargs)
        given = tensors((args, kwargs))
        touched = [t for t in given if id(t) in self._made]
        if touched and func in _RESTATED:
            with self:
                result = _RESTATED[func](*args, **kwargs)
            if result is not None:
                return result
        name = getattr(func, "__name__", str(func))
        if func is functional.embedding_bag and any(t.dim() == 1 and not t.is_floating_point() for t in given):
            self.trace.ragged = True
        content = [] if name in OF_SHAPE else given[:1] if name in OF_FIRST else given
        tainted = self._calls.stage == 1 and any(id(t) in self._tainted for t in content)
        result = self._touched(func, name, args, kwargs, touched, tainted) if touched else func(*args, **kwargs)
        self._picked.note(name, args, given, result)
        if tainted:
            written = given[:1] if name.endswith("_") or name.startswith("__i") else []
            self._tainted.update((id(t), t) for t in (*written, *tensors(result)) if id(t) not in self._made)
        return result

    def _touched(
        self, func: Any, name: str, args: tuple, kwargs: dict[str, Any], touched: list[Tensor], tainted: bool
    ) -> Any:
        """A call with parameters, or with what was made of them, among its arguments."""
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if name in HARMLESS:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self._strange(
                touched, "a call without gradients, as inside an autograd.Function", func, args, kwargs
            )
        plain = name.strip("_")
        writes = name.endswith("_") and (not name.endswith("__") or name == "__setitem__")
        if writes and args[0] is touched[0] and (plain in ELEMENTWISE or name == "__setitem__"):
            return self._strange(touched, name, func, args, kwargs)
        by_number = func is not Tensor.__getitem__ or _is_numbers(args[1])
        if func in WATCHED and by_number:
            return self._watched(func, name, args, kwargs, touched, tainted)
        if plain in ELEMENTWISE:
            return self._elementwise(func, plain, args, kwargs, touched, tainted)
        result = func(*args, **kwargs)
        results = tensors(result)
        if name == "__getitem__" and args[0] is touched[0]:
            tainted = tainted and not (isinstance(args[1], Tensor) and args[1].dim() == 0)  # one of several experts
        key = self._key(name, touched)
        axis, _ = self._calls.axis(key, tuple(t.shape for t in results), tainted)
        if axis == MADE:
            self._note(func, name, args, kwargs, key, results)
        elif axis is not None and name in SPREAD and len(touched) == 1 and args[0] is touched[0]:
            return self._lift(touched[0], result, axis, plain)
        else:
            self._strange(touched, name)
        return result

    def _watched(self, func: Any, name: str, args: tuple, kwargs: dict, touched: list[Tensor], tainted: bool) -> Any:
        rule, order = WATCHED[func]
        if rule == "matmul" and id(args[0]) in self._made:
            rule, order = "matmul from the left", order[::-1]
        bound = dict(zip(order, args, strict=False)) | kwargs
        roles = {r: bound[r] for r in ROLES if isinstance(bound.get(r), Tensor) and id(bound[r]) in self._made}
        given = bound.get("input")
        if not roles or not isinstance(given, Tensor) or len(roles) + (id(given) in self._made) != len(touched):
            return self._strange(touched, name, func, args, kwargs)
        owners = self._picked.owners(given)
        if owners is None:
            key = self._key(name, list(roles.values()))
            axis, before = self._calls.axis(key, (given.shape,), tainted, given, id(given) in self._made)
        else:
            axis, before = 0, given
        if axis == MADE:
            result = func(*args, **kwargs)
            self._note(func, name, args, kwargs, self._key(name, touched), [result])
            return result
        if axis is None or id(given) in self._made:
            return self._strange(touched, name, func, args, kwargs)
        others = {key: value for key, value in bound.items() if key != "input" and key not in roles}
        if isinstance(weight := bound.get("weight"), Tensor):
            others["weight_shape"] = weight.shape
        if rule == "rms_norm":  # its default
            others["least"] = torch.finfo(given.dtype).eps
        made = {role: self._made[id(t)][0] for role, t in roles.items()}
        use = Use(rule, made, others, axis, owners, given, before)
        tapped = _Tap.apply(func(*args, **kwargs), self.anchor, given.detach(), use)
        self._record(use, tapped)
        return tapped

    def _elementwise(
        self, func: Any, plain: str, args: tuple, kwargs: dict, touched: list[Tensor], tainted: bool
    ) -> Any:
        """Parameters are spread over the samples first, so that each sample has a gradient of its own."""
        if plain == "scaled_dot_product_attention":  # only the mask is broadcast
            target = torch.Size((*args[0].shape[:-1], args[1].shape[-2]))
            if self._calls.stage > 1 and any(id(t) in self._made for t in args[:3]):
                return self._strange(touched, plain, func, args, kwargs)
        else:
            target = _broadcast([t.shape for t in tensors((args, kwargs))])
        if self._calls.stage == 1 and len(touched) > 1:  # with two samples some may be spread over these already
            for one in touched:
                self._calls.axis(self._key(plain, [one]), (target,), tainted)
        key = self._key(plain, touched)
        axis, _ = self._calls.axis(key, (target,), tainted)
        if axis == MADE:
            result = func(*args, **kwargs)
            self._note(func, plain, args, kwargs, key, tensors(result))
            return result
        if axis is None:
            return self._strange(touched, plain, func, args, kwargs)
        lifted: dict[int, Tensor] = {}
        for t in touched:
            aligned = t.reshape((1,) * (len(target) - t.dim()) + t.shape)
            if aligned.shape[axis] != 1:
                return self._strange(touched, plain, func, args, kwargs)
            sizes = [*aligned.shape[:axis], target[axis], *aligned.shape[axis + 1 :]]
            lifted[id(t)] = self._lift(t, aligned.expand(sizes), axis, plain)
        swap = lambda leaf: lifted.get(id(leaf), leaf)  # noqa: E731
        args, kwargs = pytree.tree_map(swap, (args, kwargs))
        return func(*args, **kwargs)

    def _lift(self, t: Tensor, spread: Tensor, axis: int, how: str) -> Tensor:
        """The tensor spread over the samples, tapped."""
        use = Use("elementwise", {"weight": self._made[id(t)][0]}, {"by": how}, axis)
        lifted = _Lift.apply(spread, self.anchor, use)
        self._record(use, lifted)
        return lifted

    def _record(self, use: Use, output: Tensor) -> None:
        if not self._recomputing:
            use.output = output
            self.trace.uses.append(use)

    def _key(self, name: str, touched: list[Tensor]) -> Key:
        return self._calls.key(name, [self._made[id(t)][0] for t in touched])

    def _note(self, func: Any, name: str, args: tuple, kwargs: dict, key: Key, results: list[Tensor]) -> None:
        """Remember what was made of parameters alone."""
        known = lambda t: self._made[id(t)][0] if id(t) in self._made else None  # noqa: E731
        for made, t in zip(made_by(func, name, args, kwargs, known, key, results), results, strict=True):
            if id(t) not in self._made or name not in VIEWS:  # `.contiguous()` may return the parameter itself
                self._made[id(t)] = made, t

    def _strange(self, touched: list[Tensor], name: str, func: Any = None, args: tuple = (), kwargs: Any = None) -> Any:
        """Note that parameters are used in a way that is not understood; call the function, if there is one."""
        if not self._recomputing:
            for t in touched:
                for one in self._made[id(t)][0].names:
                    self.trace.strange.setdefault(one, name)
        return func(*args, **kwargs) if func is not None else None


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
            _meet(ctx.use, given, gradient)
        return gradient, None, None, None


class _Lift(torch.autograd.Function):
    """A copy of a tensor that hands its gradient to its use."""

    @staticmethod
    def forward(ctx, spread: Tensor, anchor: Tensor, use: Use) -> Tensor:
        ctx.use = use
        return spread.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.use.meet is not None:
            _meet(ctx.use, None, gradient)
        return gradient, None, None


def _broadcast(shapes: list[torch.Size]) -> torch.Size:
    """The shape that they are broadcast to; torch's own function takes most of a millisecond."""
    most = max(map(len, shapes))
    sizes = zip(*((1,) * (most - len(shape)) + tuple(shape) for shape in shapes), strict=True)
    return torch.Size([next((n for n in of if n != 1), 1) for of in sizes])


def _is_numbers(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dim() > 0 and not index.is_floating_point() and index.dtype != torch.bool


def _meet(use: Use, given: Tensor | None, gradient: Tensor) -> None:
    assert use.meet is not None
    with torch.no_grad(), torch._C.DisableTorchFunction():  # not the model's own calls: not watched
        use.meet(use, given, gradient)


def _show_all() -> tuple[bool, Any]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # where nothing has imported the compiler, nothing is compiled
    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else None
    return fast, stance


def _as_before(state: tuple[bool, Any]) -> None:
    fast, stance = state
    torch.backends.mha.set_fastpath_enabled(fast)
    if stance is not None:
        stance.__exit__(None, None, None)


_steps = Shared(_show_all, _as_before)


def step_by_step() -> AbstractContextManager[None]:
    """Torch's fused attention hides its projections, and compiled code all that it does: settings of the process."""
    return _steps


def _transparent(function: Any) -> Any:
    """The same function, but the watch sees the calls inside it.

    As torch defines them, attention and backward show up as one call as soon as anything watches; this one name is how
    they ask whether anything does.
    """
    seen = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, seen, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _embedding_bag(input: Tensor, weight: Tensor, offsets: Any = None, max_norm: Any = None, norm_type: Any = 2,  # noqa: A002
                   scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
                   per_sample_weights: Any = None, include_last_offset: bool = False,
                   padding_idx: int | None = None) -> Tensor | None:  # fmt: skip
    """Bags of one size, [B, T] numbers of rows, summed or averaged: rows looked up, then added up."""
    if input.dim() != 2 or input.is_floating_point() or mode == "max" or max_norm or scale_grad_by_freq:
        return None
    rows = functional.embedding(input, weight, padding_idx)
    factors = torch.ones_like(rows[..., 0]) if per_sample_weights is None else per_sample_weights
    if padding_idx is not None:
        factors = factors * (input != padding_idx % len(weight))
    if mode == "mean":
        factors = factors / factors.sum(1, keepdim=True).clamp(min=1)
    return (rows * factors.unsqueeze(-1)).sum(1)


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of all products of an element of the one and one of the other input."""
    pairs = input1.unsqueeze(-1) * input2.unsqueeze(-2)
    return functional.linear(pairs.flatten(-2), weight.flatten(1), bias)


# Functions in terms of watched ones; None where that cannot be done.
_RESTATED: dict[Any, Callable[..., Tensor | None]] = {
    functional.embedding_bag: _embedding_bag,
    torch.bilinear: _bilinear,
}
_TRANSPARENT = {f: _transparent(f) for f in (functional.multi_head_attention_forward, torch.autograd.backward)}
