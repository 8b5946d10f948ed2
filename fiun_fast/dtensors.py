"""DTensors, as FSDP2 and tensor parallel make of parameters: which part of one lies on this rank, and who counts it.

A kernel takes the address of the local part, a plain tensor like any other. `torch.distributed.tensor` takes a while to
import and is never imported here: as long as nobody else has, there is no DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter, methodcaller
from typing import Any

from torch import Tensor, nn

from .errors import LayoutError

_sharding = methodcaller("_get_fsdp_state")  # of a module of FSDP2; whether it is gathered is said nowhere else
_held = attrgetter("_local_tensor")  # to_local() of a parameter is another view each time; FSDP2 writes here


@dataclass(frozen=True, eq=False)
class LocalPart:
    """What a rank has of a DTensor.

    Attributes:
        tensor: the local part itself, plain memory; empty where the rank has nothing.
        shape: of the whole.
        start: index of the part's first element in each dimension of the whole.
        cut: whether any mesh dimension cuts the tensor up; otherwise each rank of the mesh has all of it.
        first: whether, of the ranks of the mesh with the same part, this is the first.
        ranks: those of the mesh.

    """

    tensor: Tensor
    shape: tuple[int, ...]
    start: tuple[int, ...]
    cut: bool
    first: bool
    ranks: frozenset[int]


def _class_of(module: str, name: str) -> Any:
    """A class of torch's that somebody has imported; None where nobody has."""
    found = sys.modules.get(module)
    return None if found is None else getattr(found, name, None)


def there_may_be_some() -> bool:
    """Whether anybody has imported DTensors."""
    return _class_of("torch.distributed.tensor", "DTensor") is not None


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor, parameter or not."""
    kind = _class_of("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def local_tensor(tensor: Any) -> Any:
    """The local part of a DTensor, the same object as long as nothing replaces it; anything else as it is."""
    return _held(tensor) if is_dtensor(tensor) else tensor


def part_of(where: str, tensor: Any) -> LocalPart:
    """What this rank has of a DTensor.

    Raises:
        LayoutError: begins with `where`; the parts are not blocks of the whole (partial sums that wait to be reduced,
            or rows dealt out in turns).

    """
    mesh = tensor.device_mesh
    local, shape = _held(tensor), tuple(tensor.shape)
    ranks = frozenset(mesh.mesh.flatten().tolist())
    coordinate = mesh.get_coordinate()
    cut = any(hasattr(one, "dim") for one in tensor.placements)
    if coordinate is None:
        raise LayoutError(f"{where}: a DTensor over ranks {sorted(ranks)}, of which this is none")
    for i, one in enumerate(tensor.placements):
        if one.is_partial():
            raise LayoutError(f"{where}: a DTensor of partial sums ({one}); redistribute it first")
        if (turns := getattr(one, "split_factor", 1)) > 1:
            # FSDP2 over tensor parallel deals out each of the latter's parts: one block again, as that one cuts later
            for later, size in zip(tensor.placements[i + 1 :], mesh.shape[i + 1 :], strict=True):
                turns //= size if getattr(later, "dim", None) == one.dim else 1
            if turns > 1:
                raise LayoutError(f"{where}: a DTensor whose parts are no blocks of it ({tensor.placements})")
    (block,) = tensor.__create_chunk_list__()
    if tuple(block.sizes) != tuple(local.shape):
        raise LayoutError(
            f"{where}: this rank's part has shape {list(local.shape)}, expected {list(block.sizes)} of {list(shape)} "
            f"by its placements {tensor.placements}"
        )
    first = all(at == 0 for at, one in zip(coordinate, tensor.placements, strict=True) if not hasattr(one, "dim"))
    return LocalPart(local, shape, tuple(block.offsets), cut, first, ranks)


class HeldPart(Mapping[str, Any]):
    """The local part of a DTensor as a mapping of one entry: its home, as a module's `_parameters` is of others'."""

    KEY = "local"

    def __init__(self, whole: Tensor, part: LocalPart) -> None:
        self.whole, self.part = whole, part

    def __getitem__(self, key: str) -> Tensor:
        """Return what the DTensor has now, which may be another tensor than when this was made."""
        if key != self.KEY:
            raise KeyError(key)
        return _held(self.whole)

    def get(self, key: str, default: Any = None) -> Any:
        """The same, asked before every launch; the only key is `KEY`."""
        return _held(self.whole)

    def __iter__(self) -> Iterator[str]:
        return iter((self.KEY,))

    def __len__(self) -> int:
        return 1


def parameters_of(models: Iterable[object]) -> Iterator[Any]:
    """All parameters of modules, and all tensors of dicts."""
    for model in models:
        yield from model.parameters() if isinstance(model, nn.Module) else getattr(model, "values", tuple)()


def sharding_modules(models: Iterable[object]) -> list[Any]:
    """The modules that `fully_shard` (FSDP2) gathers and shards; none where nobody has imported it."""
    kind = _class_of("torch.distributed.fsdp", "FSDPModule")
    if kind is None:
        return []
    modules = (part for model in models if isinstance(model, nn.Module) for part in model.modules())
    return [module for module in modules if isinstance(module, kind)]


def reshard_(modules: Iterable[Any]) -> None:
    """Put the sharded parameters back where a forward has left gathered ones; nothing is sent.

    FSDP2 leaves those of the root gathered until a backward, and what is written to gathered parameters is lost. After
    a forward in which something was raised it takes itself to be still inside, and has to be told to begin anew.
    """
    modules = list(modules)
    for module in modules:
        module.reshard()
    if not any(map(_is_gathered, modules)):
        return
    for module in modules:
        if hasattr(module, "reset_iter_state"):  # not in older torch
            with suppress(RuntimeError):  # one that is no root
                module.reset_iter_state()
    for module in filter(_is_gathered, modules):
        module.set_reshard_after_forward(True, recurse=False)  # it did not reshard: this was False
        module.reshard()
        module.set_reshard_after_forward(False, recurse=False)


def _is_gathered(module: Any) -> bool:
    """Whether a module of FSDP2 has its gathered parameters registered."""
    state = vars(_sharding(module))
    groups = state.get("_fsdp_param_groups") or [state.get("_fsdp_param_group")]  # one, in older torch
    return any(getattr(group, "is_unsharded", False) for group in groups)
