"""Interleaved timing, copy bandwidth and peak memory."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from benchmarks.problem import Problem

COPY = "copy"


class Timing(NamedTuple):
    """Seconds: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 50,
    warmup: int = 1,
) -> dict[str, Timing]:
    """Every round times each contender once, in an order that rotates from round to round.

    What other work on the machine does to a round it does to all of them. The warm-up (with it
    torch.compile) and the freeing of results are not timed. Rounds go on for ``seconds``.

    Right before its timed run each contender runs once untimed, so that it finds the memory it
    needs as its own last step left it. Else the time depends on who ran before it: a virtual
    machine may have given freed pages back to its host, and then their first touch costs a
    millisecond and more for each 2 MiB.
    """
    names = list(runs)
    for _ in range(warmup):
        for name in names:
            runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(max_rounds):
            if turn >= min_rounds and time.perf_counter() - start > seconds:
                break
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                runs[name]()
                begin = time.perf_counter()
                result = runs[name]()
                times[name].append(time.perf_counter() - begin)
                del result
    finally:
        gc.enable()
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


class CopyRun:
    """``copy_`` between two float32 tensors as large as the logits; counts read and written."""

    def __init__(self, elements: int) -> None:
        self.source = torch.ones(elements)
        self.into = torch.zeros(elements)
        self.moved_bytes = 2 * 4 * elements

    def __call__(self) -> None:
        self.into.copy_(self.source)


class Measured(NamedTuple):
    contenders: dict[str, Timing]  # by Contender.key
    copy_bytes_per_second: float


def time_problem(problem: Problem, *, seconds: float, min_rounds: int = 5) -> Measured:
    """The medians of all contenders and the copy bandwidth of the same rounds."""
    copy = CopyRun(problem.shape.logits)
    runs = {each.key: each.run for each in problem.contenders}
    timings = interleaved({**runs, COPY: copy}, seconds=seconds, min_rounds=min_rounds)
    bandwidth = copy.moved_bytes / timings.pop(COPY).median
    return Measured(timings, bandwidth)


def peak_extra_bytes(run: Callable[[], object], repeats: int = 2) -> int | None:
    """The most that the resident memory of the process rises above what it was before ``run``.

    The high-water mark of the resident set (VmHWM), reset through /proc/self/clear_refs: it sees
    scratch and stacks as well as tensors, to about 0.3 MiB. None where the system has no such
    thing. Meant for a process of its own in which freed memory goes back to the system at once
    (see worker.py).
    """
    run()
    risen = []
    for _ in range(repeats):
        gc.collect()
        _give_back()
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = _high_water_mark()
            result = run()
            risen.append(_high_water_mark() - before)
        except OSError:
            return None
        del result
    return max(risen)


def _give_back() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _high_water_mark() -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")
