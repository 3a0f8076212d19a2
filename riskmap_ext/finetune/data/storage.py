"""Volumes in memory, or in files that the system reads page by page as they are used."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from riskmap_ext._files import read_torch
from riskmap_ext.finetune.base.files import write_checkpoint


class TensorStore:
    """Keeps tensors where they are, or as memory-mapped files below `folder`.

    A mapped file takes memory only as long as the system has some to spare, so a cohort may be
    larger than memory. Names say what the content is: a file that is there is taken as it is.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def keep(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same values, from the file where there is a folder."""
        if self.folder is None:
            return tensors
        path = self.folder / f"{name}.pt"
        found = read_torch(path, mapped=True)
        if found is None or set(found) != set(tensors):
            write_checkpoint(path, tensors)
            found = read_torch(path, mapped=True)
        return tensors if found is None else found
