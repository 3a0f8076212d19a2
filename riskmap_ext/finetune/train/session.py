"""The objects that every command works with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from riskmap_ext.finetune.base.device import device_of, torch_state
from riskmap_ext.finetune.base.log import Log
from riskmap_ext.finetune.base.processes import Processes
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.folder.workspace import told_when_stopped


@dataclass(frozen=True, kw_only=True)
class Session:
    """held: what is released at the end, such as the output folder."""

    config: Config
    log: Log
    device: torch.device
    processes: Processes
    held: ExitStack


@contextmanager
def session(
    config: Config, *, progress: bool = True, processes: Processes | None = None
) -> Iterator[Session]:
    """With the seed and the threads of `config`; restores the caller's afterwards.

    progress: print the log and progress bars. Raises: ConfigError for the device or the threads.
    """
    group = processes or Processes()
    log, device = Log(quiet=not (progress and group.is_main)), device_of(config.device)
    with (
        ExitStack() as held,
        told_when_stopped(config, log),
        torch_state(config.seed, config.threads, device),
    ):
        yield Session(config=config, log=log, device=device, processes=group, held=held)
