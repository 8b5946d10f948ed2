"""Where many tensors live, whether any was replaced or has moved, and their version counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import LayoutError
from .memory import (
    Place,
    cpu_extension,
    dict_numbers,
    dicts_are_numbered,
    place_of,
    places,
    torch_functions,
    version_function,
)

Container = Mapping[str, Any]
_CHUNK = 512  # tensors whose fields stay in the cache from one comparison to the next
_FIELDS: tuple[Callable[[Tensor], Any], ...] = (
    Tensor.data_ptr,
    lambda tensor: tensor.untyped_storage().nbytes(),
    attrgetter("shape"),
    Tensor.stride,
    attrgetter("dtype"),
    attrgetter("device"),
)


class Home(NamedTuple):
    """Where one tensor lives: the mapping that holds it, its key there, and how it lies in memory.

    For a parameter the mapping is its module's `_parameters`, or a dict of tensors; for a Fisher its attributes.
    """

    container: Container
    key: str
    place: Place

    @classmethod
    def of(cls, container: Container, key: str) -> Home:
        """The home of what lives there now."""
        return cls(container, key, place_of(container[key]))

    def now(self) -> object:
        """What lives there now; None where nothing does."""
        return self.container.get(self.key)


class Homes:
    """The homes of many contiguous tensors: a plan of 100,000 nodes has some hundred thousand.

    What is asked before every launch, whether any has moved, is asked in C++ where torch's own C functions can be
    reached (csrc/cpu/homes.h), else in Python. Columns, not rows: that many objects would keep the garbage collector
    busy for longer than compiling takes.
    """

    def __init__(self) -> None:
        self._containers: list[Container | None] = []
        self._keys: list[str] = []
        self._tensors: list[Tensor] = []
        self._places: Any = None  # how they lay when it was first asked; None until then
        self._held = Held()

    def add(self, containers: Sequence[Container | None], keys: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Take down that these tensors live there. How they lie is taken down at `settle`."""
        self._containers += containers
        self._keys += keys
        self._tensors += tensors

    def settle(self) -> None:
        """Take down how all of them lie."""
        self._places = places() if torch_functions() else PlacesInPython()
        self._places.take(self._tensors)

    def moved(self) -> bool:
        """Whether any tensor was replaced or taken away, or lies otherwise than when all were settled."""
        held = self._held.all(self._containers, self._keys, self._tensors)
        return not held or not self._places.unchanged(self._tensors, torch.get_num_threads())


def all_held(containers: list[Any], keys: list[str], objects: list[Any]) -> bool:
    """Whether each object is still what its mapping holds under its key."""
    extension = cpu_extension()
    if extension is not None:
        return extension.all_held(containers, keys, objects)
    return all(map(is_, map(_get, containers, keys), objects))


class Held:
    """`all_held`, asked again and again of the same mappings: where none was changed, nothing is looked up."""

    def __init__(self) -> None:
        self._numbers: Any = None  # of the dicts, when everything was last found in its place

    def __getstate__(self) -> dict[str, Any]:
        """A copy finds out for itself: its mappings may be others."""
        return {"_numbers": None}

    def all(self, containers: list[Any], keys: list[str], objects: list[Any]) -> bool:
        """Whether each object is still what its mapping holds under its key."""
        if not dicts_are_numbered():
            return all_held(containers, keys, objects)
        if self._numbers is None:
            self._numbers = dict_numbers()
        return self._numbers.all(containers, keys, objects, torch.get_num_threads())


class PlacesInPython:
    """How tensors lay: what csrc/cpu/homes.h does, by torch's Python functions."""

    def __init__(self) -> None:
        self._columns: list[list[Any]] = []

    def take(self, tensors: list[Tensor]) -> None:
        """Take down how each lies."""
        self._columns = [list(map(field, tensors)) for field in _FIELDS]

    def unchanged(self, tensors: list[Tensor], threads: int = 1) -> bool:
        """Whether each lies as it did; on one thread, whatever `threads` says."""
        for at in range(0, len(tensors), _CHUNK):
            part = slice(at, at + _CHUNK)
            now = tensors[part]
            if not all(
                list(map(field, now)) == column[part] for field, column in zip(_FIELDS, self._columns, strict=True)
            ):
                return False
        return True


class Counters:
    """The version counters of many tensors: by these autograd notices that something wrote to what it kept.

    Torch counts them up one by one, 50 ns each; where its function can be reached, it is called side by side.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._places: Any = None
        if version_function() and all(map(_has_version, tensors)):
            self._places = places()
            self._places.take(tensors)

    def count_up(self) -> None:
        """Once for each tensor.

        Raises:
            LayoutError: one has no version counter; nothing was written to any.

        """
        if self._places is None:
            try:
                torch.autograd.graph.increment_version(self._tensors)
            except RuntimeError as error:
                raise LayoutError(
                    "a parameter was made under torch.inference_mode and moved outside it (.to(), flatten_, …): it "
                    "has no version counter; make it anew, nn.Parameter(p.detach().clone()), or run in inference_mode"
                ) from error
        else:
            self._places.count_up(self._tensors, version_function(), torch.get_num_threads())


def _has_version(tensor: Tensor) -> bool:
    try:
        return tensor._version >= 0
    except RuntimeError:  # of inference_mode, or made there and moved elsewhere
        return False


def _get(container: Container, key: str) -> object:
    return container.get(key)
