"""What parameters are called: one name each, whatever the model is wrapped in and however often a tensor is tied."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from .wrappers import plain_name, wrapper_of

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

        What a name says as it stands counts first, then what is left without the steps of wrappers.
        """
        found = self.first_of.get(name)
        return self.first_of.get(plain_name(name)) if found is None else found

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


def near(name: str, known: Iterable[str]) -> str:
    """What an error message adds to an unknown name: the known ones nearest to it."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=4, cutoff=0.4) or names[:4]
    return f"; near names: {', '.join(found)}" if found else ""
