"""The processes of one run, as torchrun starts them, or a single process."""

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
    """rank and size; messages between the processes go over gloo, on the CPU.

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
        """Every `size`-th item from `rank` on: each item belongs to one process."""
        return list(items[self.rank :: self.size])

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` on this process, if it failed on none.

        Raises: InputError of the first process that failed; ToldElsewhere on the others.
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
        """The result of `work`, which only the first process runs."""
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
        """The result of `work` for each item, computed by one process and sent to all."""
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
    """The processes that torchrun started, or those of an existing process group."""
    there = dist.is_available() and dist.is_initialized()
    own = not there and started().size > 1
    if own:
        dist.init_process_group("gloo")
    try:
        yield _joined(device) if there or own else Processes()
    finally:
        if own:
            # References to the group (DistributedDataParallel has one in a cycle) keep its threads
            # alive, and these must not outlive the interpreter.
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
    """The processes that torchrun started, without communication between them."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def local_rank() -> int:
    """Rank of this process on its machine, as set by torchrun; 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
