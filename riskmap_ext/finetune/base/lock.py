"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from riskmap_ext.finetune.base.errors import ConfigError

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; the system releases it however the process ends.

    Does nothing if the file system has no such locks.

    Raises: ConfigError naming the process that holds it, or why it cannot be locked.
    """
    path = folder / LOCK_FILE
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        holder = "another process"
        with suppress(OSError):
            holder = path.read_text(errors="replace") or holder
        raise ConfigError(
            f"output: {folder} is in use by a run ({holder}); wait for it to end, or choose "
            "another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ConfigError(f"output: {path} cannot be written ({error.strerror})") from None
    try:
        with suppress(OSError):  # Windows denies all access to a locked file
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def check_free(folder: Path) -> None:
    """Raises: ConfigError naming the process that holds `folder`."""
    if (folder / LOCK_FILE).exists():
        with locked(folder):
            pass
