"""Content digests, and files written under a temporary name, then renamed: none is half-written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


class TooMuch(ValueError):
    """A file that stands for far more than it has, as one made to fill memory does."""


# Of a checkpoint beside its tensors: optimizers and logs have thousands.
_MOST_VALUES, _DEEPEST = 1_000_000, 100


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder (same ending), renamed to `path` on success.

    Those that killed processes have left of the same file are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in half_written(path.parent, path.name):
        _remove_abandoned(left)
    # The ending stays: nibabel and torch choose the format by it.
    partial = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        with partial.open("wb") as held:
            _lock(held, shared=True)  # while this process is alive
            yield partial
            _to_disk(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def half_written(folder: Path, name: str = "") -> list[Path]:
    """Temporary files in the folder, of processes that were killed or are still running.

    name: only those that were to become this file.
    """
    pattern = rf"\.\d+-\d+-{re.escape(name)}" + ("$" if name else "")
    return [path for path in folder.glob(".*") if re.match(pattern, path.name)]


def _remove_abandoned(partial: Path) -> None:
    with suppress(OSError), partial.open("rb+") as file:
        if _lock(file, shared=False):
            partial.unlink()


def _lock(file: IO[bytes], *, shared: bool) -> bool:
    """False if another process has it, or if the file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _to_disk(path: Path) -> None:
    """Without it, a power cut may leave an empty file under the new name."""
    if path.exists():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def write_torch(path: Path, content: Any) -> None:
    with written_beside(path) as partial:
        torch.save(content, partial)


def read_torch(path: Path, *, mapped: bool = False) -> Any:
    """What `write_torch` wrote, or None if it is missing or cannot be read.

    mapped: tensors stay in the file and are read page by page as they are used.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        check_archive(path)
        if _is_damaged(path):
            return None
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        check_content(content)
        return content
    except Exception:  # a damaged zip raises errors of many types
        return None


def _is_damaged(path: Path) -> bool:
    """By the checksums in the file, which torch.load does not check."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is not None


def check_archive(path: Path) -> None:
    """torch does not compress: more content than file is an archive made to fill memory.

    Raises: TooMuch, or what zipfile raises for a damaged one.
    """
    with zipfile.ZipFile(path) as archive:
        content = sum(member.file_size for member in archive.infolist())
    if content > path.stat().st_size:
        raise TooMuch(f"expected an archive as torch.save writes it, got {content} bytes in it")


def check_content(content: Any) -> None:
    """Lists that repeat each other, or themselves, can be far more than the file.

    Raises: TooMuch.
    """
    waiting, count = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise TooMuch(f"expected at most {_MOST_VALUES:,} values, {_DEEPEST} deep")
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        if isinstance(value, (list, tuple, set)):
            waiting += ((each, depth + 1) for each in value)


def digest(*parts: Any) -> str:
    """Hex digest of arrays, bytes and plain values, in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            values = part.detach().cpu().contiguous().reshape(-1)
            total.update(values.view(torch.uint8).numpy().data)
        elif isinstance(part, np.ndarray):
            total.update(f"{part.dtype.str}{part.shape}".encode())
            total.update(np.ascontiguousarray(part).data)
        elif isinstance(part, bytes):
            total.update(part)
        else:
            total.update(json.dumps(part, sort_keys=True, default=str).encode())
        total.update(b"\0")
    return total.hexdigest()
