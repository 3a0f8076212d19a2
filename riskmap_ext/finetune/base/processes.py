"""The processes of one run, as torchrun starts them; a single one without it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from riskmap_ext.finetune.base.errors import ConfigError, InputError, ToldElsewhere

S = TypeVar("S")
T = TypeVar("T")


class Processes:
    """rank and size; what the processes tell each other goes over gloo, on the CPU.

    gradients: the group of DistributedDataParallel (NCCL between GPUs); None for one process.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, gradients: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self.gradients = gradients

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every so-many-th item: all of them are some process's."""
        return list(items[self.rank :: self.size])

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives here, if no process has failed at it.

        Raises: InputError of the first process that has; ToldElsewhere on the others.
        """
        result, failed = None, None
        try:
            result = work()
        except InputError as error:
            failed = error
        failures = self.gather(None if failed is None else str(failed))
        first = next((rank for rank, text in enumerate(failures) if text is not None), None)
        if failed is not None and first == self.rank:
            raise failed
        if first is not None:
            raise ToldElsewhere(failures[first])
        return result  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T:
        """The result of `work`, which the first process alone does."""
        result = self.together(lambda: work() if self.is_main else None)
        return self.gather(result)[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, on each of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def spread(self, items: Mapping[str, S], work: Callable[[S], T]) -> dict[str, T]:
        """The result of `work` for each item, done by one process and known to all."""
        tables = self.gather({name: work(items[name]) for name in self.share([*items])})
        return {name: each[name] for name in items for each in tables if name in each}

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return value
        total = value.detach().cpu().clone()
        dist.all_reduce(total)
        return (total / self.size).to(value.device)


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Those that torchrun has started, or those of a process group that is there already."""
    there = dist.is_available() and dist.is_initialized()
    own = not there and started().size > 1
    if own:
        dist.init_process_group("gloo")
    try:
        yield _joined(device) if there or own else Processes()
    finally:
        if own:
            # What still holds the group, as DistributedDataParallel does in a cycle, keeps its
            # threads, and these must not outlive the interpreter.
            gc.collect()
            dist.destroy_process_group()


def _joined(device: torch.device) -> Processes:
    if dist.get_world_size() == 1:
        return Processes()
    if dist.get_backend() != "gloo":
        raise ConfigError(
            "torch.distributed: expected a gloo process group, or none, so that the run makes its "
            f"own; got {dist.get_backend()}"
        )
    gradients = dist.group.WORLD
    if device.type == "cuda":
        torch.cuda.set_device(device)
        gradients = dist.new_group(backend="nccl")
    return Processes(dist.get_rank(), dist.get_world_size(), gradients)


def started() -> Processes:
    """Those that torchrun has started, without any talk between them."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def local_rank() -> int:
    """Of this process on its machine, as torchrun says it; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """How many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
