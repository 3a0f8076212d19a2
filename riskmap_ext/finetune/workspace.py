"""Where a run works: its device, torch's global state, and its output folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

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
    """What an earlier run has left in the output folder; refused unless `overwrite` is set."""
    output = config.output
    held = [n for n in (*_OUTPUT_FILES, *_OUTPUT_FOLDERS) if (output / n).exists()]
    if held and not config.overwrite:
        raise ConfigError(
            f"output: {output} already holds a run ({', '.join(held)}); choose another folder, or "
            "set overwrite=true to replace it"
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file; expected a folder")
    if config.source is not None and output in config.source.checkpoint.parents and held:
        raise ConfigError(
            f"output: the source checkpoint {config.source.checkpoint} lies in it and would be "
            "replaced; choose another folder"
        )
    return held
