"""Where a run works: its device, torch's global state, and its output folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from riskmap_ext import _library
from riskmap_ext.finetune.config import Config
from riskmap_ext.finetune.errors import ConfigError
from riskmap_ext.finetune.files import write_text
from riskmap_ext.finetune.report import Log

_OUTPUT_FILES = (
    "config.yaml",
    "keys.json",
    "last.pt",
    "best.pt",
    "metrics.csv",
    "dice.csv",
    "log.txt",
)
# More is slower, and some thousands end the process.
_THREADS_PER_CPU = 4
_OUTPUT_FOLDERS = ("maps", "overlays", "predictions", "tb")


@contextmanager
def torch_state(config: Config, device: torch.device) -> Iterator[None]:
    """Seed and thread count of the run; the caller's come back afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def check_threads(config: Config) -> None:
    """Refuses a number of threads that can only be a slip."""
    cpus = os.cpu_count() or 1
    limit = _THREADS_PER_CPU * cpus
    if config.threads is not None and config.threads > limit:
        raise ConfigError(
            f"threads: expected at most {limit} ({_THREADS_PER_CPU} for each of the {cpus} CPUs "
            f"found), got {config.threads}"
        )


@contextmanager
def told_when_stopped(config: Config, log: Log) -> Iterator[None]:
    """Gives a KeyboardInterrupt the message what was stopped and what is left."""
    try:
        yield
    except KeyboardInterrupt as stop:
        message = "stopped before anything was written"
        if log.is_open:
            message = f"stopped {log.stage}; {config.output} holds an unfinished run"
            log.note(message)
        stop.args = (message,)
        raise


def run_device(config: Config) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kernels = _library.loaded_path("libriskmap_cuda") is not None
    if config.device == "auto":
        return torch.device("cuda" if count and kernels else "cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"device: {config.device} asked for, but torch {torch.__version__} sees "
            f"{count} CUDA devices; set device=cpu"
        )
    if device.type == "cuda" and not kernels:
        raise ConfigError(
            f"device: {config.device} asked for, but riskmap_ext has no CUDA kernels here "
            "(`riskmap info` says why); set device=cpu"
        )
    return device


def claim_output(config: Config, log: Log) -> None:
    """Makes the output folder, or clears the earlier run in it where that is allowed."""
    output = config.output
    for name in check_output(config):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "config.yaml", config.to_yaml())
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written ({error})") from None
    log.open(output / "log.txt")


def check_output(config: Config) -> list[str]:
    """What an earlier run has left in the output folder; refused unless `overwrite` is set.

    Raises: ConfigError naming output or cache where no folder can be made there.
    """
    output = config.output
    _check_folder("output", output)
    _check_folder("cache", config.cache or output / "cache")
    held = [n for n in (*_OUTPUT_FILES, *_OUTPUT_FOLDERS) if (output / n).exists()]
    if held and not config.overwrite:
        state = "already holds a run" if _finished(output) else "holds an unfinished run"
        raise ConfigError(
            f"output: {output} {state} ({', '.join(held)}); choose another folder, or set "
            "overwrite=true to replace it"
        )
    if config.source is not None and output in config.source.checkpoint.parents and held:
        raise ConfigError(
            f"output: the source checkpoint {config.source.checkpoint} lies in it and would be "
            "replaced; choose another folder"
        )
    return held


def _finished(output: Path) -> bool:
    """Whether the run in `output` came to its end: its scores, or the last line of its log."""
    if (output / "dice.csv").exists():
        return True
    try:
        lines = (output / "log.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return bool(lines) and " Done" in lines[-1]


def _check_folder(key: str, path: Path) -> None:
    """Refuses a path where no folder is and none can be made."""
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir():
        where = "" if existing == path else f"{path}: "
        raise ConfigError(f"{key}: {where}{existing} is a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {existing} cannot be written; choose another folder")
