"""A run's device and memory, and torch's global state."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from riskmap_ext import _library
from riskmap_ext.finetune.base.errors import ConfigError
from riskmap_ext.finetune.base.processes import local_rank, local_size

DEVICE = re.compile(r"^(auto|cpu|cuda(:[0-9]+)?)$")
# More are slower, and some thousands crash the process.
_THREADS_PER_CPU = 4


@contextmanager
def torch_state(seed: int, threads: int | None, device: torch.device) -> Iterator[None]:
    """Sets a run's seed and number of threads; restores the caller's afterwards.

    Raises: ConfigError for a number of threads that can only be a mistake.
    """
    before, cpus = torch.get_num_threads(), os.cpu_count() or 1
    if threads is not None and threads > _THREADS_PER_CPU * cpus:
        raise ConfigError(
            f"threads: expected at most {_THREADS_PER_CPU * cpus} ({_THREADS_PER_CPU} for each of "
            f"the {cpus} CPUs found), got {threads}"
        )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def device_of(wanted: str) -> torch.device:
    """auto, cpu, cuda or cuda:N. Raises: ConfigError if there is no such device."""
    if not DEVICE.fullmatch(wanted):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {wanted!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kernels = _library.no_cuda_reason() is None
    if wanted == "cpu" or (wanted == "auto" and not (count and kernels)):
        return torch.device("cpu")
    index = int(wanted[5:]) if wanted.startswith("cuda:") else None
    why = None
    if index is not None and local_size() > 1:
        why = f"for each of {local_size()} processes; expected cuda, which gives each its own GPU"
    elif max(index or 0, local_size() - 1) >= count:
        why = f"asked for, but torch {torch.__version__} sees {count} CUDA devices for "
        why += f"{local_size()} of the run's processes; start at most that many, or set device=cpu"
    elif not kernels:
        why = "asked for, but riskmap_ext has no CUDA kernels here (`riskmap info` says why); "
        why += "set device=cpu"
    if why is not None:
        raise ConfigError(f"device: {wanted} {why}")
    index = local_rank() if local_size() > 1 else index
    return torch.device("cuda" if index is None else f"cuda:{index}")


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    return psutil.virtual_memory().available
