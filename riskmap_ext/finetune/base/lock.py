"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from riskmap_ext.finetune.base.errors import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; the system lets go of it however the process ends.

    Does nothing where the system or the file system has no such locks.

    Raises: ConfigError naming the process that holds it.
    """
    path = folder / _NAME
    file = None if fcntl is None else _taken(path)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            os.close(file)


def check_free(folder: Path) -> None:
    """Raises: ConfigError naming the process that holds `folder`."""
    path = folder / _NAME
    if fcntl is not None and path.exists() and (file := _taken(path)) is not None:
        os.close(file)


def _taken(path: Path) -> int | None:
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
        os.close(file)
        if error.errno not in _BUSY:
            return None
        raise ConfigError(
            f"output: {path.parent} is in use by a run ({holder}); wait for its end, or choose "
            "another folder"
        ) from None
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file
