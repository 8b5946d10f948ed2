"""What the machine of live.py knows of models, Fishers, plans and logs, in plain torch; and how its steps are made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import reaches
from hypothesis import strategies as st
from torch import Tensor, nn

import fiun_fast as ff

PARENTS = {"a": (), "b": ("a",), "c": ("a", "b"), "d": ()}
SHAPES = {"scale": (), "first.weight": (4, 4), "first.bias": (4,), "rest.0.weight": (4, 4), "rest.1.weight": (3, 4)}
LAYOUT = ff.Layout(SHAPES)
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ALPHAS, LAMS = [1.0, 0.0, 0.5, 2.0, 1000.0], [0.5, 0.0, 1.0, 3.0, 1e-40]
EDGES = [0.0, 1e-45, 1e-38, 1.0, 3e38, float("inf"), float("nan")]
Key = tuple[str, str]  # node, parameter


class Net(nn.Module):
    """Parameters at three depths."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rest = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
        self.scale = nn.Parameter(torch.empty(()))
        self.load_state_dict(dict(values), assign=True)


Model = Net | dict[str, Tensor]


def mapping_of(model: Model, name: str) -> tuple[dict[str, Any] | None, str]:
    """The mapping that holds a parameter, and its key there; None where a submodule on the way is missing."""
    if isinstance(model, dict):
        return model, name
    *path, key = name.split(".")
    module: nn.Module | None = model
    for part in path:
        module = None if module is None else module._modules.get(part)
    return (None if module is None else module._parameters), key


def parameter_of(model: Model, name: str) -> Tensor | None:
    held, key = mapping_of(model, name)
    return None if held is None else held.get(key)


def on_the_way(model: Model) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Submodules on the way to parameters: what holds each, under which key."""
    found = []
    if isinstance(model, Net):
        for path in ("first", "rest", "rest.0", "rest.1"):
            above, _, key = path.rpartition(".")
            parent: Any = model._modules.get(above) if above else model
            child = None if parent is None else parent._modules.get(key)
            if child is not None:
                found.append((parent._modules, key, child))
    return found


def needed(tensor: Tensor) -> int:
    """Bytes from the beginning of the storage to the last element."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + last + 1) * tensor.itemsize


def is_whole(tensor: object) -> bool:
    """Whether it is a tensor in main memory that has all of it: torch itself may crash where it has not."""
    return isinstance(tensor, Tensor) and tensor.is_cpu and tensor.untyped_storage().nbytes() >= needed(tensor)


def span(tensor: Tensor) -> tuple[int, int]:
    first = tensor.data_ptr()
    return first, first + needed(tensor) - tensor.storage_offset() * tensor.itemsize


def overlap(tensors: Iterable[Tensor]) -> bool:
    spans = sorted(span(t) for t in tensors if t.numel())
    return any(start < end for (_, end), (start, _) in zip(spans, spans[1:]))


def place(tensor: Tensor) -> tuple:
    held = tensor.untyped_storage().nbytes()
    return tensor.data_ptr(), held, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(INTEGER[tensor.itemsize])


def random_fisher(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(LAYOUT.numel, dtype=torch.float64, generator=generator).square()
    edges = torch.tensor(EDGES, dtype=torch.float64)[torch.randint(len(EDGES), values.shape, generator=generator)]
    return torch.where(torch.rand(values.shape, generator=generator) < 0.3, edges, values).to(dtype)


@dataclass
class Planned:
    """A plan, and what it was made of."""

    plan: ff.Plan
    origins: tuple[str, ...]
    forgets: tuple[ff.Fisher, ...]
    weights: tuple[float, ...]
    alpha: dict[str, float]
    lam: dict[str, float]

    def requests(self, node: str) -> list[int]:
        return [k for k, origin in enumerate(self.origins) if reaches(PARENTS, origin, node)]

    @property
    def nodes(self) -> list[str]:
        return [node for node in PARENTS if self.requests(node)]


@dataclass
class Outcome:
    """What a run must do: new values and counts, and which elements it selects."""

    values: dict[Key, Tensor]
    counts: dict[str, list[int]]
    chosen: dict[Key, Tensor]


@dataclass
class Kept:
    """One parameter in an undo log, as the machine remembers it."""

    index: Tensor
    old: Tensor
    left: Tensor
    like: Tensor  # shape and dtype
    home: tuple[dict[str, Any], str, tuple]


@dataclass
class Log:
    """An undo log, and when it may be used."""

    log: ff.UndoLog
    kept: dict[Key, Kept]
    links: list[tuple[dict[str, Any], str, nn.Module]]
    loaded: bool = False  # from a file: it does not know where the models are
    copied: bool = False  # its own copy of the models is elsewhere
    done: bool = field(default=False)


def fits(parameter: object, like: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is one that a run may write to."""
    return (
        is_whole(parameter)
        and tuple(parameter.shape) == shape
        and parameter.is_contiguous()
        and parameter.dtype in DTYPES
        and (like is None or parameter.dtype == like.dtype)
    )


def fisher_fits(fisher: ff.Fisher) -> bool:
    buffer = vars(fisher).get("buffer")
    return (
        is_whole(buffer)
        and buffer.shape == (LAYOUT.numel,)
        and buffer.is_contiguous()
        and buffer.dtype in (torch.float32, torch.float64)
    )


STEPS: dict[str, st.SearchStrategy[dict[str, Any]]] = {}


def step(**arguments: st.SearchStrategy) -> Callable:
    """Something that may happen, and its arguments; it is written down before it is done."""

    def decorate(function: Callable[..., None]) -> Callable:
        STEPS[function.__name__] = st.fixed_dictionaries(arguments)

        @functools.wraps(function)
        def recorded(self: Any, **values: Any) -> None:
            self.note(function.__name__, values)
            function(self, **values)

        return recorded

    return decorate


def one_of(**weights: int) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A step and its arguments; how often each."""
    names = [name for name, weight in weights.items() for _ in range(weight)]
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), STEPS[name]))


SEED, NODE, PARAMETER = st.integers(0, 99), st.sampled_from(sorted(PARENTS)), st.sampled_from(sorted(SHAPES))
ANY = st.integers(0, 9)  # which of those there are, modulo their number
