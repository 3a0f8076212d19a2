"""Files written beside and then renamed, so that none is ever half-written."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder (same ending), renamed to `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays: nibabel and torch choose the format by it.
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with written_beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with written_beside(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_torch(path: Path, content: dict[str, Any]) -> None:
    with written_beside(path) as partial:
        torch.save(content, partial)


def write_nifti(
    path: Path, volume: np.ndarray, affine: np.ndarray, codes: tuple[int, int] = (0, 2)
) -> None:
    """A NIfTI-1 file with `affine` in sform and qform; `codes` are (qform_code, sform_code)."""
    image = nib.Nifti1Image(volume, affine)
    qform_code, sform_code = codes
    image.set_qform(affine, code=qform_code)
    image.set_sform(affine, code=sform_code)
    image.header.set_xyzt_units("mm")
    with written_beside(path) as partial:
        nib.save(image, partial)


def digest(*parts: Any) -> str:
    """Hex digest of arrays, bytes and plain values, in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().numpy()
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype.str}{part.shape}".encode())
            total.update(np.ascontiguousarray(part).data)
        elif isinstance(part, bytes):
            total.update(part)
        else:
            total.update(json.dumps(part, sort_keys=True, default=str).encode())
        total.update(b"\0")
    return total.hexdigest()
