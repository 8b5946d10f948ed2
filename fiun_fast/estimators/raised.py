"""What a user's own code raises inside an estimate: said with what it was given, and what may help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..arguments import short
from ..errors import EstimationError, FiunError
from ..memory import check_loaded
from .predictions import fitted

ADVICE = "forward_fn=lambda model, batch: (outputs, targets)"
_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")
_DTYPES = re.compile(r"dtype|scalar type|type \(")


class RaisedError(EstimationError):
    """A forward, a loss or a backward raised something; `__cause__` is that."""


def passes(error: BaseException) -> bool:
    """Whether an error keeps its type: this package's own, a lack of memory, a warning that is to be an error."""
    return isinstance(error, (FiunError, MemoryError, torch.OutOfMemoryError, Warning)) or bool(
        isinstance(error, RuntimeError) and _MEMORY.search(str(error))
    )


def said(error: BaseException, most: int = 240) -> str:
    """Its type and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    text = text if len(text) <= most else text[: most - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def described(tree: Any) -> str:
    """Dtypes and shapes of the parts of a batch, or of outputs: "float32 [4, 3] and int64 [4]"."""
    if isinstance(tree, Tensor):
        return f"{short(tree.dtype)} {list(tree.shape)}"
    if isinstance(tree, Mapping):
        parts = [f"{key} {'…' if isinstance(part, Mapping) else described(part)}" for key, part in tree.items()]
        return ", ".join(parts[:6] + ["…"] * (len(parts) > 6)) or "nothing"
    if isinstance(tree, (tuple, list)) and not hasattr(tree, "_fields"):
        parts = [described(part) for part in tree[:6]] + ["…"] * (len(tree) > 6)
        return " and ".join(parts) if len(parts) == 2 else ", ".join(parts) or "nothing"
    return "None" if tree is None else f"a {type(tree).__name__}"


@contextmanager
def in_forward(model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """What the model raises when it is called with these becomes a `RaisedError`."""
    try:
        yield
    except Exception as error:
        if passes(error):
            raise
        given = kwargs if kwargs else list(args)
        hint = _hint(error, model, batch, args, kwargs)
        raise RaisedError(f"the model, called with {described(given)}, raises {said(error)}; {hint}") from error


@contextmanager
def in_function(name: str, batch: Any, model: nn.Module | None = None) -> Iterator[None]:
    """What a function of the user's, `forward_fn` or `batch_fn`, raises on a batch becomes a `RaisedError`."""
    try:
        yield
    except Exception as error:
        if passes(error):
            raise
        hint = "" if model is None else _of_memory(model) or _of_dtypes(error, model, batch)
        text = f"{name} raises {said(error)}, on a batch of {described(batch)}" + (f"; {hint}" if hint else "")
        raise RaisedError(text) from error


@contextmanager
def in_loss(outputs: Any, targets: Any, one: bool) -> Iterator[None]:
    """What a loss of the user's raises becomes a `RaisedError`; `one`: the outputs are those of one sample."""
    try:
        yield
    except Exception as error:
        if passes(error):
            raise
        alone = "; it must take one sample: outputs [1, …] and targets [1, …], which a squeeze() would change"
        raise RaisedError(
            f"the loss of outputs and targets of {described((outputs, targets))} cannot be computed: {said(error)}"
            f"{alone if one else ''}; if these are not the targets, pass target_index=… or forward_fn=…"
        ) from error


# ---- what may help ---------------------------------------------------------------------------------------------------


def _hint(error: Exception, model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return (
        _of_memory(model)
        or _of_arguments(error, model, batch, args, kwargs)
        or _of_labels(model, kwargs)
        or _of_dtypes(error, model, kwargs or args)
        or _of_numbers(error, model, kwargs or args)
        or _of_devices(error, model)
        or f"where it is to be called otherwise, pass {ADVICE}"
    )


def _of_memory(model: nn.Module) -> str:
    """For a model that is not all there."""
    try:
        check_loaded(model)
    except FiunError as why:
        return str(why)
    return ""


def _of_arguments(
    error: Exception, model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """For a model that wants more than it was given."""
    if not isinstance(error, TypeError):
        return ""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        names = ", ".join(signature.parameters)
    else:
        return ""
    if kwargs:
        return f"its forward takes {names}: name the parts of a batch as these, or pass {ADVICE}"
    parts = len(batch) if isinstance(batch, (tuple, list)) else 1
    wanted = max(
        1, len([p for p in signature.parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL])
    )
    passed = ", ".join(f"batch[{i}]" for i in range(min(wanted, max(parts - 1, 1))))
    return (
        f"of the parts of a batch, {described(batch)}, the first alone is passed, and its forward takes {names}: pass "
        f"forward_fn=lambda model, batch: (model({passed}), batch[-1]), or batches that are dicts of its keywords"
    )


def _of_dtypes(error: Exception, model: nn.Module, given: Any) -> str:
    """For parts of another dtype than the model's."""
    if not _DTYPES.search(str(error)):
        return ""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
    if "indices" in str(error):
        return "an embedding looks up whole numbers: pass them as int64, ids.long()"
    for leaf in leaves:
        if own is not None and leaf.is_floating_point() and leaf.dtype != own:
            return (
                f"the model is {short(own)} and a part of the batch {short(leaf.dtype)}: pass "
                f"x.to(torch.{short(own)}), or model.to(torch.{short(leaf.dtype)})"
            )
    if own is not None and leaves and not any(leaf.is_floating_point() for leaf in leaves):
        to = f"x.to(torch.{short(own)})"
        return f"the model is {short(own)} and the batch whole numbers: if these are features, pass {to}"
    return ""


def _of_labels(model: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """For labels that the model's own loss does not take: what a cross entropy would say of them."""
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or torch._C._functorch.peek_interpreter_stack() is not None:
        return ""
    try:
        with torch.no_grad():
            out = model(**{key: part for key, part in kwargs.items() if key != "labels"})
            outputs = next((one for one in (getattr(out, "logits", None), out) if isinstance(one, Tensor)), None)
    except Exception:
        return ""
    if outputs is None:
        return f"without its labels, {described(labels)}, it runs"
    try:
        fitted(outputs, labels).check()
    except EstimationError as why:
        return f"it is the labels: {why}"
    return (
        f"it is the labels, {described(labels)}: its own loss may want classes as int64 (labels.long(), of one-hot "
        f"ones labels.argmax(-1)); else take its logits, {described(outputs)}, and pass {ADVICE}"
    )


def _of_numbers(error: Exception, model: nn.Module, given: Any) -> str:
    """For tokens beyond a table."""
    tables = sorted({m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}, reverse=True)
    if not isinstance(error, IndexError) or not tables:
        return ""
    named = given.items() if isinstance(given, Mapping) else enumerate(given)
    whole = [
        f"{'its numbers' if isinstance(key, int) else key} {int(part.min())} to {int(part.max())} in {list(part.shape)}"
        for key, part in named
        if isinstance(part, Tensor) and part.numel() and not part.is_floating_point() and not part.is_complex()
    ]
    if not whole:
        return ""
    return (
        f"its embeddings have {', '.join(map(str, tables[:6]))} rows, and the batch has {', '.join(whole[:4])}: a "
        "number is beyond a table, or a sequence is longer than there are positions"
    )


def _of_devices(error: Exception, model: nn.Module) -> str:
    devices = sorted({str(t.device) for t in (*model.parameters(), *model.buffers())})
    if "device" not in str(error):
        return ""
    if len(devices) > 1:
        return f"the model lies on {', '.join(devices)}: move it to one, model.to({devices[-1]!r})"
    return f"the model is on {devices[0]}, where a batch is moved; what is made inside its forward must be there too"
