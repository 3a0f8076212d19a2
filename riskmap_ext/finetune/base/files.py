"""Reads text; writes files under a temporary name, then renames them: none is half-written."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from riskmap_ext._files import written_beside
from riskmap_ext.finetune.base.errors import DataError, InputError, unwritten

# .img is the other half of .hdr.
IMAGE_ENDINGS = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path`; a link there is replaced, not followed.

    Raises: InputError naming the file, which then stays as it was.
    """
    check_replaceable(path)
    try:
        with written_beside(path) as partial:
            yield partial
    except (OSError, RuntimeError) as error:  # torch's writer raises the second
        raise unwritten(path, error) from None


def is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_ENDINGS) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """The file name without the image format's extension."""
    ending = next((e for e in IMAGE_ENDINGS if path.name.lower().endswith(e)), "")
    return path.name[: len(path.name) - len(ending)]


def read_text(path: Path, kind: type[InputError] = DataError) -> str:
    """Reads UTF-8, with or without a BOM. Raises: `kind` naming the file and why."""
    try:
        if not (path.is_file() or path.is_dir()) and path.exists():  # it would be waited for
            raise kind(absent(path))
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        why = "no such file"
    except IsADirectoryError:
        why = "is a folder; expected a file"
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
    except UnicodeDecodeError:
        why = "is damaged (no text in UTF-8)"
    raise kind(f"{path}: {why}")


def read_json(path: Path, kind: Any) -> Any:
    """The content, parsed by pydantic as the type `kind`. Raises: DataError naming the file."""
    try:
        return TypeAdapter(kind).validate_json(read_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        why = f"{place}: {said}" if place else said
        raise DataError(f"{path}: is damaged ({why})") from None


def write_text(path: Path, text: str) -> None:
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    options: Any = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with written(path) as partial, partial.open("w", **options) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Writes one or more dataclasses of one type as CSV."""
    write_csv(path, [each.name for each in fields(rows[0])], map(astuple, rows))


def write_nifti(path: Path, volume: np.ndarray, affine: np.ndarray, codes: tuple[int, int]) -> None:
    """A NIfTI-1 file with `affine` in sform and qform; `codes` are (qform_code, sform_code)."""
    image = nib.Nifti1Image(volume, affine)
    image.set_qform(affine, code=codes[0])
    image.set_sform(affine, code=codes[1])
    image.header.set_xyzt_units("mm")
    with written(path) as partial:
        nib.save(image, partial)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    with written(path) as partial:
        torch.save(content, partial)


def check_there(*given: tuple[str, Sequence[Path]]) -> None:
    """given: options with their paths. Raises: InputError naming all that do not exist."""
    pairs = [(key, path) for key, paths in given for path in paths if not os.path.exists(path)]
    if pairs:
        raise InputError("\n".join(f"{k}: {p}: no such file or folder" for k, p in pairs))


def named_output(path: Path) -> Path:
    """The file that the user names with --output: links are followed, as by a shell's >.

    Raises: InputError if there is a folder, a pipe or a device.
    """
    check_replaceable(path, "--output")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_replaceable(path: Path, key: str = "") -> None:
    """Raises: InputError if there is a folder, a pipe or a device."""
    if path.exists() and not path.is_file():
        raise InputError(f"{key}: {absent(path)}".removeprefix(": "))


def absent(path: Path, kind: str = "file") -> str:
    """Why no `kind` (file or folder) can be read at `path`."""
    other, there = ("folder", os.path.isdir) if kind == "file" else ("file", os.path.isfile)
    why = f"is a {other}; expected a {kind}" if there(path) else f"no such {kind}, or no access"
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        why = f"is a pipe or a device; expected a {kind}"
    return f"{path}: {why}"
