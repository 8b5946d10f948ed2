"""Fishers that stay on disk: all that a program needs to know of them, and where their numbers are."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import fisher_file
from ..errors import CheckpointError
from ..fisher import Fisher
from ..layout import Layout
from ..provenance import Provenance
from .disk import Source
from .header import Entry, read_header


class StoredFisher(Fisher):
    """A Fisher whose buffer was not read: layout, dtype and provenance, and the place of each parameter.

    The layout is sorted by name, however the file is: Fishers over the same parameters then have the same one.

    Attributes:
        path: the file or folder.
        files: that hold it, open.
        places: name -> index into files, entry of that file's header.

    Raises:
        FisherFileError, FileNotFoundError: as `fisher_file.opened`.
        CheckpointError: a file is damaged, or cannot be read.

    """

    def __init__(self, path: Path) -> None:
        with fisher_file.opened(path) as opened:
            self.layout = Layout({s.name: s.shape for s in sorted(opened.layout, key=lambda s: s.name)})
            self.provenance = Provenance(**opened.record)
            self._dtype = opened.dtype
            paths = opened.paths
        self.path = path
        self.files: list[Source] = []
        self.places: dict[str, tuple[int, Entry]] = {}
        try:
            for i, one in enumerate(paths):
                self.files.append(Source(one))
                self.places |= {name: (i, entry) for name, entry in read_header(self.files[-1]).tensors.items()}
            if self.places.keys() != set(self.layout.names):
                raise CheckpointError(f"{path}: changed while it was opened")
        except BaseException:
            self.close()
            raise

    @property
    def dtype(self) -> torch.dtype:
        """As the numbers are read: float32 for what is bfloat16 on disk."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where windows of it are put."""
        return torch.device("cpu")

    def close(self) -> None:
        """Close its files."""
        for file in self.files:
            file.close()
