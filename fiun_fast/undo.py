"""The way back: which elements a run selected, and the bits that were there before."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import undo_file
from .binding import Part
from .dag import InheritanceDAG, Model, check_model
from .dtensors import local_tensor, reshard_, sharding_modules
from .errors import ArgumentError, DTypeError, LayoutError, UndoError
from .guards import alone, denormals_kept, signals_deferred
from .homes import Home
from .live import Links, LiveMemory
from .memory import check_addressable, check_disjoint, check_writable, place_of, span
from .naming import Names, matched
from .tiles import possible_selection, tiles
from .undo_file import BITS, Entry

_WHOLE = 1 << 30  # elements of a piece of a whole parameter, whose indices are int32


class UndoLog:
    """Indices and old values of every element that a run selected: `plan.run_(undo=True).undo`.

    The log takes 4 bytes of index and one parameter's element for each selected element, so a dry run's counts tell its
    size beforehand (`selected * (4 + itemsize)`); it lies on the parameters' devices and refers to the models. Where
    several Fishers were merged by sum or mean it may hold a few elements more, whose threshold was met within rounding.

    `undo_()` restores every bit. It refuses where that would not bring back the state before the run: after a second
    call, when parameters were moved, replaced, or changed at those places (by training, or by a later run: undo the
    later one first). A saved log is applied with `undo_(dag)` to models that hold the state the run left.
    """

    def __init__(self, entries: list[Entry], links: Links | None = None) -> None:
        self._entries, self._links = entries, links  # links: submodules on the way to the parameters; None when loaded
        self._done = False
        self._begun = 0  # entries that an undo has begun to write: it goes on there if it did not come to its end

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UndoLog:
        """Read a file that `save` wrote; it lies in main memory then, and `undo_` must be told the models.

        Raises:
            UndoFileError: the file is truncated, damaged (its checksum is another; files of version 0.1 have none) or
                foreign.
            FileNotFoundError: there is none.

        """
        return cls(undo_file.read(path))

    @classmethod
    @torch.no_grad()
    def of_all(cls, node: str, homes: Mapping[str, Home]) -> UndoLog:
        """Every bit of these parameters of one node as they are now: to `restore_`, or for a run to be `following`."""
        entries = []
        for name, home in homes.items():
            parameter = home.now()
            assert isinstance(parameter, Tensor)
            entry = Entry(node, name, tuple(parameter.shape), parameter.dtype, home)
            for at, part in enumerate(_bits(parameter).split(_WHOLE)):
                index = torch.arange(len(part), dtype=torch.int32, device=part.device)
                entry.pieces.append((at * _WHOLE, index, part.clone()))
            entries.append(entry)
        return cls(entries, Links())

    @torch.no_grad()
    def following(self, earlier: Iterable[UndoLog]) -> UndoLog:
        """One log for this run, which was the last, and for what changed all of some of its parameters before it.

        Args:
            earlier: of `of_all`, as these parameters were before that.

        """
        whole = [entry for log in earlier for entry in log._entries]
        for entry in whole:
            assert entry.home is not None
            entry.after = _fingerprint(entry, _bits(entry.home.now()))  # type: ignore[arg-type]
        known = {(entry.node, entry.name) for entry in whole}
        return UndoLog([one for one in self._entries if (one.node, one.name) not in known] + whole, self._links)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: indices and old values of each parameter that has any, and a checksum.

        All or nothing. A symbolic link is followed and stays; a file that is replaced hands on its mode.

        Tensors `0.index` (int32, int64 for parameters of 2^31 elements and more) and `0.old` (the parameter's dtype),
        `1.index`, …; the metadata entry `entries` is a JSON list with node, name, shape, dtype and fingerprint of each,
        and `crc32` the checksum of all that (`fiun_fast.files.checksum`).

        Raises:
            FileWriteError: the folder does not exist or cannot be written, or the disk is full; an OSError too. What
                was there before is still there, and no partial file is left.

        """
        undo_file.write(path, self._entries)

    @torch.no_grad()
    def undo_(self, models: InheritanceDAG | Mapping[str, Model] | Model | None = None, *, force: bool = False) -> None:
        """Put the old bits back, in every node of the run; all is checked before anything is written.

        Args:
            models: where the parameters are: the DAG, {node: model}, or the model of a log with one node. None: where
                they were during the run; a log that was loaded does not know that.
            force: also where the parameters have changed since the run; selected elements get their old bits, others
                stay as they are now.

        Raises:
            UndoError: called twice, or the parameters were moved, replaced or changed since the run.
            LayoutError, DTypeError, DeviceError: they have another shape, memory layout or dtype now, no memory of
                their own, or are not in the models.

        """
        with alone:
            if self._done:
                raise UndoError("this run was undone already")
            parameters = self._at_home() if models is None else self._look_up(models)
            check_writable((entry.where for entry in self._entries), parameters)
            flats = [_bits(parameter) for parameter in parameters]
            if not force:
                self._check_unchanged(flats)
            with signals_deferred():
                self._write(flats)
                self._done = True

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the old bits back where the parameters were, whatever they are now; any number of times (`Trials`)."""
        with alone, signals_deferred():
            self._write([_bits(parameter) for parameter in self._at_home()])
            self._begun = 0

    def _write(self, flats: list[Tensor]) -> None:
        for i, (entry, flat) in enumerate(zip(self._entries, flats, strict=True)):
            self._begun = max(self._begun, i + 1)
            for start, index, old in entry.pieces:
                flat.index_copy_(0, index.to(flat.device, torch.int64) + start, old.to(flat.device))

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes with a selection."""
        return list(dict.fromkeys(entry.node for entry in self._entries))

    @property
    def numel(self) -> int:
        """Elements kept."""
        return sum(entry.numel for entry in self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes that the log takes."""
        return sum(index.nbytes + old.nbytes for entry in self._entries for _, index, old in entry.pieces)

    def __repr__(self) -> str:
        state = ", undone" if self._done else ", loaded" if self._links is None else ""
        return f"UndoLog({self.numel:,} elements of {len(self.nodes)} nodes, {self.nbytes:,} bytes{state})"

    def _at_home(self) -> list[Tensor]:
        """The parameters where the run found them."""
        if self._links is None:
            raise UndoError("this log was loaded from a file: say where the models are, log.undo_(dag)")
        if (key := self._links.replaced()) is not None:
            raise UndoError(f"submodule {key!r} was replaced since the run; {_BY_NAME}")
        parameters: list[Tensor] = []
        for entry in self._entries:
            assert entry.home is not None
            parameter = entry.home.now()
            if not isinstance(parameter, Tensor):
                raise UndoError(f"{entry.where}: removed since the run; {_BY_NAME}")
            _check(entry, parameter)
            if place_of(parameter) != entry.home.place:
                raise UndoError(f"{entry.where}: moved since the run, to {parameter.device}; {_BY_NAME}")
            parameters.append(parameter)
        return parameters

    def _look_up(self, models: InheritanceDAG | Mapping[str, Model] | Model) -> list[Tensor]:
        """The parameters by name, in models that the caller names."""
        logged: dict[str, list[str]] = {}
        for entry in self._entries:
            logged.setdefault(entry.node, []).append(entry.name)
        named = {node: _tensors(_model(models, node, self.nodes), names) for node, names in logged.items()}
        parameters = []
        for entry in self._entries:
            parameter = named[entry.node].get(entry.name)
            if not isinstance(parameter, Tensor):
                raise LayoutError(f"{entry.where}: in the log, but not in the model")
            _check(entry, parameter)
            parameters.append(parameter)
        spans = np.array([span(parameter) for parameter in parameters], dtype=np.int64).reshape(-1, 2)
        check_disjoint(spans[:, 0], spans[:, 1], lambda i: self._entries[i].where)
        return parameters

    def _check_unchanged(self, flats: list[Tensor]) -> None:
        """Do the parameters hold what the run left? Compares fingerprints, one wait a device."""
        entries, flats = self._entries[self._begun :], flats[self._begun :]
        now = _values([_fingerprint(entry, flat) for entry, flat in zip(entries, flats, strict=True)])
        then = _values([entry.after for entry in entries])
        for entry, left, found in zip(entries, then, now, strict=True):
            if left != found:
                raise UndoError(
                    f"{entry.where}: changed since the run (trained, or dampened again: undo later runs first); "
                    "force=True puts the old values back at the selected places all the same"
                )


_BY_NAME = "nothing was restored. log.undo_(dag) looks parameters up by name"


class Recorder:
    """Takes down what a run is about to select, then seals it with a fingerprint of what the run left."""

    @torch.no_grad()
    @denormals_kept()
    def __init__(self, parts: Iterable[Part], names: Sequence[str], memory: LiveMemory) -> None:
        """Copy what may change: `names` are those of the program's nodes, `memory` is what the parts were bound to."""
        self._entries: dict[tuple[int, str], Entry] = {}
        self._flats: list[Tensor] = []  # beside the entries
        self._links = memory.links
        for tile in tiles(parts):
            index = possible_selection(tile).nonzero().view(-1)
            if len(index) == 0:
                continue
            key, whole = (tile.node, tile.name), tile.parameter
            if key not in self._entries:
                home = memory.home(*key)
                self._entries[key] = Entry(names[tile.node], tile.name, tuple(whole.shape), whole.dtype, home)
                self._flats.append(_bits(whole))
            old = tile.theta.view(BITS[tile.theta.itemsize]).index_select(0, index)
            self._entries[key].pieces.append((tile.start, index.to(torch.int32), old))

    @torch.no_grad()
    def seal(self) -> UndoLog:
        """After the run: the log."""
        entries = list(self._entries.values())
        for entry, flat in zip(entries, self._flats, strict=True):
            entry.after = _fingerprint(entry, flat)
        return UndoLog(entries, self._links)

    def take_back(self, error: BaseException) -> None:
        """After a run that did not come to its end, or could not be sealed: restore what it selected.

        Raises:
            UndoError: that failed as well. Its attribute `log` is the log; `error.log.undo_(force=True)` tries again.

        """
        log = UndoLog(list(self._entries.values()), self._links)
        try:
            log.restore_()
        except BaseException as second:
            failed = UndoError(
                f"the run failed ({error!r}) and could not be taken back ({second!r}): some parameters have changed; "
                "error.log.undo_(force=True) tries again"
            )
            failed.log = log  # type: ignore[attr-defined]
            raise failed from error


def _model(models: InheritanceDAG | Mapping[str, Model] | Model, node: str, nodes: Sequence[str]) -> Model:
    """The model of a node, in whatever the caller named models by."""
    if isinstance(models, InheritanceDAG):
        if node in models:
            return models[node].model
        raise UndoError(f"node {node!r} is in the log, but not in the DAG")
    if not isinstance(models, (torch.nn.Module, Mapping)):
        raise ArgumentError(f"models is a {type(models).__name__}, expected the DAG, {{node: model}} or one model")
    if isinstance(models, torch.nn.Module) or any(isinstance(value, Tensor) for value in models.values()):
        if len(nodes) == 1:
            check_model(node, models)
            return models  # type: ignore[return-value]
        raise UndoError(f"the log has {len(nodes)} nodes ({', '.join(nodes[:8])}), expected {{node: model}} or the DAG")
    if node not in models:
        raise UndoError(
            f"node {node!r} is in the log, but not among the models: {', '.join(map(str, list(models)[:8]))}"
        )
    model = models[node]
    check_model(node, model)
    return model  # type: ignore[return-value]


def _tensors(model: Model, names: Sequence[str]) -> dict[str, Tensor | None]:
    """What the model has under these names, whatever wrappers it had during the run and has now."""
    reshard_(sharding_modules([model]))
    if isinstance(model, torch.nn.Module):
        own = Names(model)
        found: dict[str, Any] = {name: own.first.get(own.find(name) or "") for name in names}
    else:
        called = matched(names, model)
        found = {name: model.get(called.get(name, name)) for name in names}
    return {name: local_tensor(one) for name, one in found.items()}


def _check(entry: Entry, parameter: Tensor) -> None:
    check_addressable(entry.where, parameter)
    if tuple(parameter.shape) != entry.shape:
        raise LayoutError(f"{entry.where}: shape {list(parameter.shape)} now, {list(entry.shape)} during the run")
    if parameter.dtype != entry.dtype:
        raise DTypeError(f"{entry.where}: {parameter.dtype} now, {entry.dtype} during the run")
    if not parameter.is_contiguous():
        raise LayoutError(f"{entry.where}: stride {list(parameter.stride())} now, contiguous during the run")


def _bits(parameter: Tensor) -> Tensor:
    """The parameter as flat integers of its width; writing there writes to the parameter and autograd hears of it."""
    return parameter.detach().view(-1).view(BITS[parameter.itemsize])


def _fingerprint(entry: Entry, flat: Tensor) -> Tensor:
    """An int64 that changes when a bit at one of the places does, or two change places; wraps around."""
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start, index, _ in entry.pieces:
        at = index.to(flat.device, torch.int64) + start
        mixed = (flat.index_select(0, at).long() ^ (at * 0x2545F4914F6CDD1D)) * 0x5851F42D4C957F2D
        total += (mixed ^ (mixed >> 29)).sum()
    return total


def _values(scalars: Sequence[Tensor]) -> list[int]:
    """Values of int64 scalars on several devices, in order; one wait a device."""
    values: dict[int, int] = {}
    for device in dict.fromkeys(scalar.device for scalar in scalars):
        here = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        values.update(zip(here, torch.stack([scalars[i] for i in here]).tolist(), strict=True))
    return [values[i] for i in range(len(scalars))]
