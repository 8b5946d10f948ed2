"""Ranks that work on one thing together: what one says to the others, by torch.distributed.

Two things are sent: sums, and whether all is well. An error that one rank meets is raised on all of them, before any
has written; so is a difference in what all must have alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import errors
from .dtensors import is_dtensor, parameters_of, reshard_, sharding_modules, there_may_be_some
from .errors import ArgumentError, DistributedError, FiunError, LayoutError

T = TypeVar("T")
_SHOWN = 60  # characters of a value that a message shows
_PIECE = 1 << 22  # elements that are sent at once


class Fact(NamedTuple):
    """What all ranks must have alike, and the error where they do not."""

    value: object
    error: type[FiunError] = ArgumentError

    @property
    def text(self) -> str:
        """Short enough to be sent and shown."""
        text = str(self.value)
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


class Ranks:
    """The ranks that share something, and the ways to hear of one another. Every method is called by all of them.

    Attributes:
        rank: of this process, among all.
        members: all ranks that share, ascending.

    """

    def __init__(self, groups: Sequence[dist.ProcessGroup | None], members: Iterable[int]) -> None:
        """Take process groups: what goes round in one after the other has reached all members.

        Args:
            groups: one, or one for each dimension of a mesh; None is the default group.
            members: the ranks.

        """
        self._groups = list(groups)
        self.rank, self.members = dist.get_rank(), tuple(sorted(members))

    @classmethod
    def of_group(cls, group: object) -> Ranks:
        """Those of a process group.

        Raises:
            ArgumentError: it is none, or one that this process is not in.

        """
        if not dist.is_available() or not dist.is_initialized():
            raise ArgumentError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
        if not isinstance(group, dist.ProcessGroup):
            what = "one that this rank is not in" if group is dist.GroupMember.NON_GROUP_MEMBER else f"{group!r:.80}"
            raise ArgumentError(f"group is {what}, expected a torch.distributed process group (dist.group.WORLD: all)")
        return cls([group], dist.get_process_group_ranks(group))

    @property
    def index(self) -> int:
        """Place of this rank among them."""
        return self.members.index(self.rank)

    def send(self, flat: Tensor, to: int, piece: int = _PIECE) -> None:
        """Send a flat tensor to a rank that calls `receive`, `piece` elements after another."""
        with self._answered():
            for one in flat.detach().split(piece):
                dist.send(one.to(self.device), to, group=self._groups[0])

    def receive(self, flat: Tensor, source: int, piece: int = _PIECE) -> None:
        """Receive it, into a flat tensor on `device`."""
        with self._answered():
            for one in flat.split(piece):
                dist.recv(one, source, group=self._groups[0])

    @property
    def device(self) -> torch.device:
        """Where tensors lie that are sent and received."""
        return self._device(self._groups[0])

    def _device(self, group: dist.ProcessGroup | None) -> torch.device:
        """Where tensors must lie to be sent."""
        backend = dist.get_backend(group)
        return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a tensor of one shape and dtype, a new one on the same device: one all-reduce."""
        total = tensor.detach().clone()
        with self._answered():
            for group in self._groups:
                total = total.to(self._device(group))
                dist.all_reduce(total, group=group)
        return total.to(tensor.device)

    def sum_of(self, counts: np.ndarray) -> np.ndarray:
        """The same of an array."""
        return self.sum(torch.from_numpy(np.ascontiguousarray(counts))).numpy()

    def sum_(self, tensor: Tensor, piece: int = _PIECE) -> None:
        """The same in place, `piece` elements after another: flat and contiguous."""
        for one in tensor.split(piece):
            one.copy_(self.sum(one))

    def gather(self, said: T) -> list[T]:
        """What each rank says, in the order of `members`."""
        found: list[tuple[int, T]] = [(self.rank, said)]
        with self._answered():
            for group in self._groups:
                parts: list[Any] = [None] * dist.get_world_size(group)
                dist.all_gather_object(parts, found, group=group)
                found = [one for part in parts for one in part]
        return [one for _, one in sorted(found, key=lambda pair: pair[0])]

    def agree(self, error: Exception | None = None, facts: Mapping[str, Fact] | None = None) -> None:
        """Return when no rank has met an error and all have the same facts; 16 bytes a rank are sent where that is so.

        Args:
            error: what this rank has met.
            facts: what all must have alike, by what a message calls it.

        Raises:
            FiunError: what some rank has met, of the same class, naming the rank; a DistributedError for what is none
                of this package's; the fact's error where a fact differs. The same on all ranks.

        """
        texts = {} if facts is None else {key: (fact.text, fact.error.__name__) for key, fact in facts.items()}
        digest = int.from_bytes(hashlib.sha256(repr(sorted(texts.items())).encode()).digest()[:7], "little")
        mine = torch.tensor([[int(error is not None), digest]], dtype=torch.int64)
        with self._answered():
            for group in self._groups:
                mine = mine.to(self._device(group))
                every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
                dist.all_gather(every, mine, group=group)
                mine = torch.cat(every)
        mine = mine.cpu()
        if not bool(mine[:, 0].any()) and bool((mine[:, 1] == mine[0, 1]).all()):
            return
        met = None if error is None else (_kind(error), _said(error))
        every_said = self.gather((met, texts))
        failed = [(rank, one) for rank, (one, _) in zip(self.members, every_said, strict=True) if one is not None]
        if failed:
            rank, (kind, text) = failed[0]
            who = (
                "every rank"
                if len({one for _, one in failed}) == 1 < len(failed) == len(every_said)
                else f"rank {rank}"
            )
            raise self._known(_class(kind)(f"{who}: {text}")) from error
        raise self._known(_difference(self.members, [texts for _, texts in every_said]))

    def _known(self, error: FiunError) -> FiunError:
        """The error, marked as one that all members raise; so that it is not told once more."""
        error.known_to = frozenset(self.members)  # type: ignore[attr-defined]
        return error

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """What torch.distributed raises where a rank does not answer, as an error of this package."""
        try:
            yield
        except RuntimeError as error:
            first = str(error).strip().partition("\n")[0]
            raise self._known(DistributedError(f"another rank does not answer: {first:.300}")) from error


def ranks_of(models: Iterable[object]) -> Ranks | None:
    """The ranks over which models are spread by DTensors; None where there is no DTensor, as in one process.

    Where parameters lie on several meshes, those of the largest.

    Raises:
        LayoutError: parameters lie on meshes of which none holds all others.

    """
    if not dist.is_available() or not dist.is_initialized() or not there_may_be_some():
        return None
    models = list(models)
    reshard_(sharding_modules(models))
    meshes: dict[frozenset[int], Any] = {}
    seen: set[int] = set()
    for p in parameters_of(models):
        if is_dtensor(p) and id(p.device_mesh) not in seen:
            seen.add(id(p.device_mesh))
            meshes.setdefault(frozenset(p.device_mesh.mesh.flatten().tolist()), p.device_mesh)
    if not meshes:
        return None
    largest = max(meshes, key=lambda ranks: (len(ranks), sorted(ranks)))
    for ranks in meshes:
        if not ranks <= largest:
            raise LayoutError(
                f"parameters lie on ranks {sorted(ranks)} and on ranks {sorted(largest)}, and no mesh holds both: plan "
                "these models with ff.distributed.plan"
            )
    mesh = meshes[largest]
    if len(largest) == dist.get_world_size():
        return Ranks([None], largest)
    return Ranks([mesh.get_group(i) for i in range(mesh.ndim)], largest)


@contextmanager
def together(ranks: Ranks | None) -> Iterator[dict[str, Fact]]:
    """What happens inside succeeds on all ranks or on none; nothing inside may wait for another rank.

    Yields:
        A dict for what all ranks must have alike; it is compared at the end.

    Raises:
        FiunError: as `Ranks.agree`.

    """
    facts: dict[str, Fact] = {}
    if ranks is None:
        yield facts
        return
    try:
        yield facts
    except Exception as error:
        if not getattr(error, "known_to", frozenset()).issuperset(ranks.members):
            ranks.agree(error)
        raise
    ranks.agree(None, facts)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, FiunError) else f"{type(error).__name__}: {error}"


def _kind(error: Exception) -> str:
    """The nearest of its classes that every rank knows."""
    known = (kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return next(known, DistributedError.__name__)


def _class(name: str) -> type[FiunError]:
    return getattr(errors, name)


def _difference(members: Sequence[int], said: Sequence[Mapping[str, tuple[str, str]]]) -> FiunError:
    """The error about the first thing that two ranks have unlike."""
    for key in dict.fromkeys(key for one in said for key in one):
        first = said[0].get(key)
        for rank, one in zip(members, said, strict=True):
            if one.get(key) != first:
                values = [text if text is None else text[0] for text in (first, one.get(key))]
                kind = (first or one[key])[1]
                return _class(kind)(
                    f"{key} is {values[0]} on rank {members[0]} and {values[1]} on rank {rank}; all ranks need the same"
                )
    return DistributedError("ranks disagree in what they have, and say the same of it")
