"""Which parameters of a module are meant: those that require grad, names, globs, submodules, or the last layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import THETA_DTYPES, check_function, short
from .dtensors import reshard_, sharding_modules
from .errors import ArgumentError, DTypeError, LayoutError, ScopeWarning, warn
from .memory import flaw_of_kind
from .naming import Names, near
from .wrappers import check_gathered, is_adapted, is_adapted_layer, plain_name, said_of_quantised, unwrap

One = str | nn.Module | Tensor
Params = One | Iterable[One] | Callable[[str, Tensor], bool] | None
LAST = "last"  # as `params`: the last layer
_EXPECTED = "a name, glob, submodule or parameter, or a list of these"
_HEADS = ("get_classifier", "get_output_embeddings")  # timm, transformers


def check_module(what: str, model: object) -> None:
    """Raise an ArgumentError that begins with `what`, unless it is a torch.nn.Module, and not one of TorchScript."""
    if not isinstance(model, nn.Module):
        hint = "; pass the module that it was made from" if type(model).__name__ == "ExportedProgram" else ""
        raise ArgumentError(f"{what} is a {type(model).__name__}, expected a torch.nn.Module{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(f"{what} is a TorchScript module; pass the module that it was made from")


def for_several(params: Params) -> Params:
    """The same, for more models than one: what an iterator yields, which would be used up at the first."""
    return list(params) if isinstance(params, Iterator) else params


def select_parameters(model: nn.Module, params: Params = None) -> dict[str, nn.Parameter]:
    """Choose parameters of a module, in the module's own order, each once: a tied one under its first name.

    Names are those of the model without its wrappers, as `naming.Names` has them.

    Args:
        model: the module.
        params: None for all that require grad; "last" for those of `last_layer`; a name, a glob, a submodule, a
            parameter, or a list of these (an exact name wins over a glob, and over "last"); or callable(name,
            parameter) -> bool. Names reach frozen parameters too; of a submodule those that require grad are taken,
            and all where none does. Names with a wrapper's steps in them (`module.fc.weight`) are understood.

    Raises:
        LayoutError: a pattern matches nothing (the message lists near names), a submodule or parameter is not the
            model's, nothing is selected, a selected parameter has no shape yet or is no dense tensor (sparse,
            nested, …), or the model is cut up by FullyShardedDataParallel (FSDP1).
        DTypeError: a selected parameter is not float32, float64, bfloat16 or float16.
        ArgumentError: `params` or `model` is of another type, or `params` a function that takes other arguments.

    """
    check_module("model", model)
    check_gathered("model", model)
    reshard_(sharding_modules([model]))
    names = Names(model)
    chosen = {id(p) for p in _chosen(model, names, params)}
    selected = {name: p for name, p in names.first.items() if id(p) in chosen}
    if not selected:
        raise LayoutError(_nothing(model, names, none_trained=params is None))
    for name, p in selected.items():
        if (flaw := flaw_of_kind(p)) is not None:
            raise flaw.raised(f"parameter {name!r}")
        if p.dtype not in THETA_DTYPES:
            raise DTypeError(f"parameter {name!r} is {p.dtype}, expected one of {', '.join(map(short, THETA_DTYPES))}")
    return selected


def _chosen(model: nn.Module, names: Names, params: Params) -> Iterable[Tensor]:
    if params is None:
        return [p for p in names.first.values() if p.requires_grad]
    if isinstance(params, (str, nn.Module, Tensor)):
        params = [params]
    elif callable(params):
        check_function("params", params, "name", "parameter")
        return [p for name, p in names.every.items() if params(name, p)]
    if not isinstance(params, Iterable):
        raise ArgumentError(f"params is a {type(params).__name__}, expected None, {_EXPECTED}, or a callable")
    found: list[Tensor] = []
    for one in params:
        if isinstance(one, str):
            found += _named(model, names, one)
        elif isinstance(one, nn.Module):
            found += _inside(names, one)
        elif isinstance(one, Tensor):
            found += _owned(names, [one], f"a tensor of shape {list(one.shape)}")
        else:
            raise ArgumentError(f"params holds a {type(one).__name__}, expected {_EXPECTED}")
    return found


def _named(model: nn.Module, names: Names, pattern: str) -> list[Tensor]:
    if (first := names.find(pattern)) is not None:
        return [names.first[first]]
    if pattern == LAST:
        return [names.first[name] for name in last_layer(model)]
    for glob in (pattern, plain_name(pattern)):
        hits: list[Tensor] = [p for name, p in names.every.items() if fnmatch.fnmatchcase(name, glob)]
        if hits:
            return hits
    raise LayoutError(f"no parameter matches {pattern!r}{near(pattern, names.every)}")


def _inside(names: Names, module: nn.Module) -> list[Tensor]:
    what = f"a {type(module).__name__}"
    own = _owned(names, list(module.parameters()), what)
    if not own:
        raise LayoutError(f"params has {what}, which has no parameters")
    return [p for p in own if p.requires_grad] or own


def _owned(names: Names, parameters: Sequence[Tensor], what: str) -> list[Tensor]:
    known = {id(p) for p in names.first.values()}
    if any(id(p) not in known for p in parameters):
        raise LayoutError(f"params has {what} that is not the model's; it has {', '.join(list(names.first)[:4])}, …")
    return list(parameters)


def _nothing(model: nn.Module, names: Names, none_trained: bool) -> str:
    kind = type(unwrap(model).module).__name__
    if not names.first:
        return f"{kind} has no parameters{said_of_quantised(model)}"
    text = f"no parameter of {kind} is selected ({len(names.first)} exist)"
    if not none_trained:
        return text
    advice = "load the adapter with is_trainable=True, or " if is_adapted(model) else ""
    if advice and any(is_adapted_layer(module) and module.disable_adapters for module in model.modules()):
        advice = "the adapter is disabled, enable it, or "
    return f"{text}: none requires grad; {advice}name them with params="


# ---- the last layer -------------------------------------------------------------------------------------------------


def last_layer(model: nn.Module) -> list[str]:
    """Names of the final parametrised layer: FIUn's default scope. `params="last"` means the same.

    That is the classifier (both of two) or output embedding that a model of timm or transformers names; else the last
    submodule that owns parameters, as `model.named_modules()` lists them, which is the order in which they were
    registered. Of a PEFT model it is the last one that requires grad: the head that is trained along, or an adapter,
    and never a part of the frozen base, which other adapters may share. A tied parameter appears under its first name.

    Warns:
        ScopeWarning: the layer is frozen while others are not, or it is tied to another, which is dampened with it.

    Raises:
        LayoutError: the model has no parameters, a PEFT model has none that requires grad, or the model is cut up by
            FullyShardedDataParallel (FSDP1).

    """
    check_module("model", model)
    check_gathered("model", model)
    names = Names(model)
    first_names = {id(p): name for name, p in names.first.items()}
    layers = [layer for layer in _layers(model) if all(id(p) in first_names for p in layer)]
    if not layers:
        raise LayoutError(_nothing(model, names, none_trained=False))
    adapted, frozen = is_adapted(model), not any(p.requires_grad for p in layers[0])
    if adapted:
        layers = [own for layer in layers if (own := [p for p in layer if p.requires_grad])]
        if not layers:
            raise LayoutError(_nothing(model, names, none_trained=True))
    found = list(dict.fromkeys(first_names[id(p)] for p in layers[0]))
    said = []
    if frozen and not adapted and any(p.requires_grad for p in names.first.values()):
        said.append(f"is frozen ({', '.join(found)}), and other layers are not")
    said += [f"is tied: its {name!r} is also {other!r}" for name in found if (other := _tied_to(names, name))]
    for what in said:
        warn(
            f"the last layer {what}; name parameters with params=, these or others, to say what is meant", ScopeWarning
        )
    return found


def layers_of(model: object, names: Sequence[str]) -> list[list[str]]:
    """These parameters layer by layer, the last layer first; each is in one layer.

    A layer is a module that owns parameters; the last one is what `last_layer` would take, those before it follow in
    the reverse order of registration, and an adapter counts with the layer that it is on. In a dict of tensors a layer
    is what has the same name up to the last dot, in the reverse order of `names`.

    Args:
        model: a module, or a dict of tensors.
        names: some of its parameters.

    """
    found: dict[object, list[str]] = {}
    if not isinstance(model, nn.Module):
        for name in reversed(names):
            found.setdefault(name.rpartition(".")[0] or name, []).insert(0, name)
        return list(found.values())
    known = Names(model)
    waiting = {id(known.first[first]): name for name in names if (first := known.find(name)) is not None}
    for k, layer in enumerate(_layers(model)):
        for p in layer:
            if (own := waiting.pop(id(p), None)) is not None:
                found.setdefault(k, []).append(own)
    return list(found.values())


def _layers(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters of each layer, the last layer first; layers may come twice."""
    for get in _HEADS:
        try:
            heads: Any = getattr(unwrap(model).module, get)()
        except (AttributeError, NotImplementedError, TypeError):  # the model has none, or means something else by it
            continue
        heads = heads if isinstance(heads, tuple) else (heads,)  # timm's distilled models have two
        if own := [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]:
            yield own
    modules = dict(model.named_modules())
    for path, module in reversed(modules.items()):
        if own := list(module.parameters(recurse=False)):
            around = _around(path, modules)
            yield own if around is None else list(around.parameters())


def _around(path: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The layer that a module is a part of: one with an adapter, or one whose weights are computed from others."""
    parts = path.split(".")
    for i, following in enumerate([*parts, ""]):
        module = modules.get(".".join(parts[:i]))
        if module is not None and (is_adapted_layer(module) or following == "parametrizations"):
            return module
    return None


def _tied_to(names: Names, name: str) -> str | None:
    """Another name of a parameter, in another layer than its first; one in a module around that layer is none."""
    layer = name.rpartition(".")[0]
    for other, p in names.every.items():
        if p is names.first[name]:
            its = other.rpartition(".")[0]
            if not f"{its}.".startswith(f"{layer}.") and not f"{layer}.".startswith(f"{its}."):
                return other
    return None
