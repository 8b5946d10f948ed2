"""What modules keep beside parameters, buffers and submodules: attributes, hooks, plain containers, configs."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from copy import copy
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

_MAPS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = (*_MAPS, list, set, deque)
_TENSORS = ("_parameters", "_buffers", "_modules")  # a snapshot has these by themselves
_SETTINGS = ("config", "configuration", "cfg", "args", "arguments", "hparams", "settings", "options")  # names end so


class Attributes:
    """A snapshot of the attributes of all modules of a model, and of what is in their plain containers and configs.

    A forward may keep what it has computed, and with it the whole graph, or tensors that are dead outside vmap; it may
    settle a choice in a config (transformers' `problem_type`), or install hooks when it first runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._objects: dict[int, tuple[Any, dict[str, Any]]] = {}  # by id: an object, and what its attributes were
        self._containers: dict[int, tuple[Any, Any]] = {}  # by id: a container, and what was in it
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._keep(module, _TENSORS)

    def _keep(self, held: Any, without: Iterable[str] = ()) -> None:
        attributes = vars(held)
        self._objects[id(held)] = held, dict(attributes)
        for key, value in attributes.items():
            if key not in without:
                self._look(key, value)

    def _look(self, key: str, value: Any) -> None:
        """Keep what is in a value, if it is of a kind that has something in it."""
        if type(value) in _CONTAINERS:
            if id(value) not in self._containers:
                self._containers[id(value)] = value, copy(value)
                for name, inside in value.items() if type(value) in _MAPS else ():
                    self._look(str(name), inside)
        elif id(value) not in self._objects and _is_config(key, value):
            self._keep(value)

    def put_back(self) -> None:
        """Every attribute is the object that it was, every container holds what it did."""
        for held, before in self._objects.values():
            now = vars(held)  # never empty meanwhile: a signal may come between
            for key in now.keys() - before.keys():
                del now[key]
            now.update(before)
        for held, before in self._containers.values():
            if isinstance(held, list):
                held[:] = before
            elif not isinstance(held, dict) or not _same(held, before):
                held.clear()
                (held.extend if isinstance(held, deque) else held.update)(before)


def _same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    """Whether two dicts hold the same objects, in the same order."""
    return [(id(key), id(value)) for key, value in a.items()] == [(id(key), id(value)) for key, value in b.items()]


def _is_config(key: str, value: Any) -> bool:
    """Whether an attribute holds a config: by its name or its class's, or as a class of plain attributes."""
    if not hasattr(value, "__dict__") or isinstance(value, (type, nn.Module, torch.Tensor)) or callable(value):
        return False
    named = (key.lower(), type(value).__name__.lower())
    return (
        isinstance(value, (SimpleNamespace, Namespace))
        or is_dataclass(value)
        or any(n.endswith(_SETTINGS) for n in named)
    )
