"""Single-threaded worker processes that end when their parent does."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch


def start_worker() -> None:
    """For ProcessPoolExecutor's `initializer`."""
    torch.set_num_threads(1)
    # The parent handles Ctrl-C and ends the running workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Otherwise a worker whose parent was killed would wait for work forever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
