"""Fishers that are spread over ranks, on disk: each rank writes and reads its part, by torch.distributed.checkpoint."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import FISHER_DTYPES, short
from ..errors import ArgumentError, FileWriteError, FisherFileError, FiunError, LayoutError
from ..fisher import Fisher, check_non_negative
from ..fisher_file import RECORD, unfit_record
from ..layout import Layout
from ..provenance import Provenance
from ..ranks import Fact, Ranks, together

FORMAT = "fiun_fast.distributed.fisher/1"
RECORD_KEY = "fiun_fast.record"  # what the folder is, how the Fisher was obtained, its dtype and shapes: JSON, as bytes
LARGEST_RECORD = 1 << 28  # bytes


class Block(Tensor):
    """A part of a parameter's Fisher, as torch.distributed.checkpoint takes tensors that are cut up."""

    whole: tuple[int, ...]  # shape of the whole
    start: tuple[int, ...]

    @classmethod
    def of(cls, part: Tensor, whole: tuple[int, ...], start: tuple[int, ...]) -> Block:
        """The same memory as `part`."""
        block = part.as_subclass(cls)
        block.whole, block.start = whole, start
        return block

    def size(self) -> torch.Size:  # type: ignore[override]
        """Shape of the whole, which is what is stored."""
        return torch.Size(self.whole)

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        part = self.__get_tensor_shard__(None)
        return [ChunkStorageMetadata(torch.Size(self.start), part.shape)] if part.numel() else []

    def __create_write_items__(self, name: str, _: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.__get_tensor_shard__(None))
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, _: object) -> Tensor:
        return self.as_subclass(Tensor)


def save(fisher: Fisher, path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None) -> None:
    """Write a Fisher that is spread over ranks to a folder; every rank calls it and writes its own part.

    The folder is one of torch.distributed.checkpoint, with a tensor for each parameter; `load` reads it on any number
    of ranks. What several ranks have is written once.

    Args:
        fisher: this rank's part, or a whole Fisher that all ranks have.
        path: a folder that every rank reaches, new or empty.
        group: the ranks; None: all.

    Raises:
        ArgumentError: the folder holds something, or is none.
        FileWriteError: it cannot be written; a folder without `.metadata` is not whole.
        FiunError: another rank has met one of these, or has a Fisher of other parameters.

    """
    from torch.distributed import checkpoint

    ranks = Ranks.of_group(group if group is not None else dist.group.WORLD)
    with together(ranks) as facts:
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArgumentError(f"{folder} is not a new or empty folder")
        fisher.check_memory("the Fisher to be saved")
        record = {key: getattr(fisher.provenance, key) for key in RECORD}
        if (unfit := unfit_record(record | {"how": dict(record["how"])})) is not None:
            raise ArgumentError(f"the provenance of a Fisher to be saved: {unfit}")
        record |= {"how": dict(record["how"]), "format": FORMAT, "numbers": short(fisher.dtype)}
        record["layout"] = {s.name: list(s.whole) for s in fisher.layout}
        facts["the layout of the Fisher"] = Fact((record["layout"], record["numbers"]), LayoutError)
    text = torch.frombuffer(bytearray(json.dumps(ranks.gather(record)[0]).encode()), dtype=torch.uint8)
    with _damage(f"{folder}: not written", FileWriteError):
        _quietly(checkpoint.save, {**_blocks(fisher), RECORD_KEY: text}, folder, group)


def load(
    path: str | os.PathLike[str], layout: Layout | torch.nn.Module, *, group: dist.ProcessGroup | None = None
) -> Fisher:
    """Read a folder that `save` wrote: of each parameter what this rank's layout has. Every rank calls it.

    Args:
        path: the folder.
        layout: this rank's, or the model, on however many ranks it is spread now; of a whole model the Fisher is whole.
        group: the ranks; None: all.

    Returns:
        The Fisher, in main memory.

    Raises:
        FisherFileError: it is no such folder, or damaged.
        LayoutError: the layout has a parameter that is not there, or has another shape.
        ArgumentError: a negative entry.
        FiunError: another rank has met one of these.

    """
    from torch.distributed import checkpoint

    ranks = Ranks.of_group(group if group is not None else dist.group.WORLD)
    with together(ranks):
        folder = Path(path)
        own = layout if isinstance(layout, Layout) else Layout.from_module(layout)
        with _damage(f"{folder}: not a Fisher that ranks have saved", FisherFileError):
            about: Any = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata[RECORD_KEY]
            size = about.size.numel()
            if size > LARGEST_RECORD:
                raise ValueError(f"its record has {size:,} bytes")
            text = torch.empty(size, dtype=torch.uint8)
    with _damage(f"{folder}: not read", FisherFileError):
        _quietly(checkpoint.load, {RECORD_KEY: text}, folder, group)
    with together(ranks):
        with _damage(f"{folder}: not a Fisher that ranks have saved", FisherFileError):
            record = json.loads(bytes(text.tolist()))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']!r:.60}, expected {FORMAT}")
            there, dtype = Layout(record["layout"]), getattr(torch, record["numbers"])
            if dtype not in FISHER_DTYPES or (unfit := unfit_record(record)) is not None:
                raise ValueError(f"its record: {record['numbers'] if dtype not in FISHER_DTYPES else unfit}")
        if (difference := own.unsharded().difference(there, "the layout", f"{folder}", {})) is not None:
            raise LayoutError(f"{folder}: another layout than expected: {difference}")
        found = Fisher(torch.zeros(own.numel, dtype=dtype), own, Provenance(**{key: record[key] for key in RECORD}))
    with _damage(f"{folder}: not read", FisherFileError):
        _quietly(checkpoint.load, _blocks(found), folder, group)
    with together(ranks):
        check_non_negative(found.buffer, own)
    return found


def _blocks(fisher: Fisher) -> dict[str, Any]:
    found = {}
    for s in fisher.layout:
        start = (0,) * len(s.shape) if s.shard is None else s.shard.start
        found[s.name] = Block.of(fisher[s.name], s.whole, start)
    return found


def _quietly(act: Callable[..., Any], state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    """torch.distributed.checkpoint, without its warnings about its own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        act(state, checkpoint_id=folder, process_group=group)


@contextmanager
def _damage(text: str, kind: type[FiunError]) -> Iterator[None]:
    """What is raised inside is an error of this kind that begins so; of a torch.distributed.checkpoint on all ranks."""
    try:
        yield
    except FiunError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "CheckpointException":  # no Exception itself
            lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
            raise kind(f"{text}: {type(error).__name__}: {lines[-1]:.300}") from error
        raise
