"""What parameters are called: one name each, whatever the model is wrapped in and however often a tensor is tied."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from .wrappers import loose_name, plain_name, said_of_quantised, wrapper_of

_NONE: Mapping[str, str] = {}


class Names:
    """The names of a module's parameters.

    A parameter is called by the path to it, without the steps that wrappers add (`module.`, `_orig_mod.`,
    `_fsdp_wrapped_module.`, PEFT's `base_model.model.` and `base_layer.`, …); a tied one by the first of its paths.

    Attributes:
        first: name -> parameter, each once, in the module's order.
        every: the same, tied ones under each of their names.
        first_of: every name, and every path as it stands -> the first name.

    """

    def __init__(self, model: nn.Module) -> None:
        self.first: dict[str, nn.Parameter] = {}
        self.every: dict[str, nn.Parameter] = {}
        self.first_of: dict[str, str] = {}
        self._paths: dict[str, str] = {}  # of first names
        self._loose: dict[str, dict[str, tuple[str, ...]]] | None = None  # loose name -> first names, their adapters
        by_path: dict[str, str] = {}
        known: dict[int, str] = {}
        for name, path, p in _walk(model, "", "", ()):
            if self.every.setdefault(name, p) is not p:  # a wrapper's own, called like one of what it wraps
                name = path
                self.every[name] = p
            first = known.setdefault(id(p), name)
            if first == name:
                self.first[name] = p
                self._paths.setdefault(name, path)
            self.first_of[name] = first
            by_path.setdefault(path, first)
        self.first_of = by_path | self.first_of

    def find(self, name: str) -> str | None:
        """The first name of the parameter that some name means, also with a wrapper's steps in it; None: there is none.

        What a name says as it stands counts first, then what is left without the steps of wrappers, then the one
        parameter that a file may call so.
        """
        found = self.first_of.get(name) or self.first_of.get(plain_name(name))
        if found is not None:
            return found
        if self._loose is None:
            self._loose = {}
            for known, first in self.first_of.items():
                loose, adapters = loose_name(known)
                self._loose.setdefault(loose, {})[first] = adapters
        loose, adapters = loose_name(name)
        fitting = self._loose.get(loose, {})
        return next((one for one, its in fitting.items() if len(fitting) == 1 and _together(its, adapters)), None)

    def path(self, first: str) -> str:
        """The path by which the model itself reaches a parameter."""
        return self._paths[first]


def _walk(model: nn.Module, name: str, path: str, above: tuple) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name, path and parameter; a module inside itself is not entered again."""
    for key, p in model._parameters.items():
        if p is not None:
            yield name + key, path + key, p
    wrapper = wrapper_of(model)
    for key, child in model._modules.items():
        if child is not None and not any(child is one for one in (*above, model)):
            inside = name if wrapper is not None and key == wrapper.key else f"{name}{key}."
            yield from _walk(child, inside, f"{path}{key}.", (*above, model))


def matched(names: Sequence[str], known: Iterable[str], first_of: Mapping[str, str] = _NONE) -> dict[str, str]:
    """For names that are not known as they stand: the known one of the same parameter, where there is just one.

    Args:
        names: of parameters, by whoever wrote them.
        known: by whoever reads them.
        first_of: `Names.first_of` of their model, which tells tied names; without it they are different ones.

    """
    there = set(known)
    strange = [name for name in names if name not in there]
    if not strange:
        return {}

    def meant(name: str) -> str:
        plain = plain_name(name)
        return first_of.get(name) or first_of.get(plain) or plain

    found = _alike(strange, names, there, meant)
    strange = [name for name in strange if name not in found]
    taken = there.intersection(names).union(found.values())
    if strange and len(taken) < len(there):
        loosely = _alike(strange, names, there, lambda name: loose_name(meant(name))[0])
        for name, other in loosely.items():
            if other not in taken and _together(loose_name(name)[1], loose_name(other)[1]):
                found[name] = other
    return found


def _alike(
    strange: Iterable[str], names: Iterable[str], there: Iterable[str], meant: Callable[[str], str]
) -> dict[str, str]:
    """For strange names the one that means the same, where just one on either side does."""
    targets: dict[str, list[str]] = {}
    for name in there:
        targets.setdefault(meant(name), []).append(name)
    sources: dict[str, list[str]] = {}
    for name in names:
        sources.setdefault(meant(name), []).append(name)
    return {
        name: targets[meant(name)][0]
        for name in strange
        if len(targets.get(meant(name), ())) == 1 == len(sources[meant(name)])
    }


def _together(adapters: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether names with these adapters in them may mean one parameter: a file does not say which adapter it is."""
    return not adapters or not others or adapters == others


def lacking(model: nn.Module | Mapping[str, object], name: str) -> str:
    """What an error message adds to a name that a model does not have: its nearest names, or where its tensors are."""
    if isinstance(model, nn.Module):
        return said_of_quantised(model) or near(name, Names(model).every)
    inner = next((key for key, value in model.items() if isinstance(value, Mapping) and _holds_tensors(value)), None)
    if inner is not None:
        return f"; it is a checkpoint: pass what it has under {inner!r}"
    return near(name, model)


def _holds_tensors(mapping: Mapping[object, object]) -> bool:
    return any(isinstance(value, Tensor) for value in mapping.values())


def near(name: str, known: Iterable[str]) -> str:
    """What an error message adds to an unknown name: the known ones nearest to it."""
    names = list(map(str, known))
    found = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
    return f"; near names: {', '.join(found)}" if found else ""
