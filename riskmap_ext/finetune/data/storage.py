"""Volumes in memory, or in files that the system reads page by page as they are used."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from riskmap_ext._files import read_torch
from riskmap_ext.finetune.base.files import write_checkpoint


def kept(folder: Path | None, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values; with `folder`, as memory-mapped files in it.

    A mapped file takes memory only as long as the system has some to spare, so a cohort may be
    larger than memory. Names say what the content is: a file that is there is taken as it is.
    """
    if folder is None:
        return tensors
    path = folder / f"{name}.pt"
    found = read_torch(path, mapped=True)
    if found is None or set(found) != set(tensors):
        write_checkpoint(path, tensors)
        found = read_torch(path, mapped=True)
    return tensors if found is None else found
