"""Time per logit over the number of classes, the number of voxels and the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import riskmap_ext
from benchmarks import shapes, timing
from benchmarks.shapes import Shape
from benchmarks.timing import Timing

LOGITS = 1 << 23  # of every point over the classes: 32 MiB

CLASSES = (
    *(2, 3, 4, 5, 7, 8, 9, 11, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 87, 105, 128),
    *(129, 150, 175, 199, 200),
)
VOXELS = (1, 10, 100, 1000, 4097, 8000, 16383, 35937, 65536, 100003, 262144, 912673, 2097152)

WORKS = (
    "weighted CE",
    "weighted CE, recompute",
    "weighted CE + Dice",
    "LEEP statistics",
    "transferability map",
)
ALWAYS = ("weighted CE", "LEEP statistics")  # over the voxels in short runs too


class Point(NamedTuple):
    sweep: str  # "classes", "voxels" or "threads"
    work: str
    shape: Shape
    threads: int
    timing: Timing


def run(size: str, threads: int, report: Callable[[str], None]) -> Iterator[Point]:
    """All points; those of a sweep are interleaved with each other."""
    rounds = 5 if size == "short" else 11
    for name, points in (
        ("classes", [Shape("", classes, 1, (LOGITS // classes | 1,)) for classes in CLASSES]),
        (
            "voxels",
            [Shape("", classes, 1, (voxels,)) for classes in (4, 87) for voxels in VOXELS],
        ),
    ):
        report(f"sweep over {name}")
        runs = {
            (work, shape): function for shape in points for work, function in works(shape).items()
        }
        for work in WORKS if name == "classes" or size == "full" else ALWAYS:
            chosen = {key: each for key, each in runs.items() if key[0] == work}
            timings = _time(chosen, rounds)
            for (_, shape), each in timings.items():
                yield Point(name, work, shape, threads, each)

    report("sweep over threads")
    counts = [1]
    while counts[-1] * 2 <= threads:
        counts.append(counts[-1] * 2)
    for key in "ab":
        shape = shapes.shape(key, size)
        by_count = {
            (work, count): _with_threads(function, count)
            for work, function in works(shape).items()
            for count in counts
        }
        try:
            by_threads = _time(by_count, rounds)
        finally:
            torch.set_num_threads(threads)
        for (work, count), each in by_threads.items():
            yield Point("threads", work, shape, count, each)


def works(shape: Shape) -> dict[str, Callable[[], object]]:
    """Ours on one set of inputs; the map takes a table of as many source classes."""
    logits = _values(shape).view(shape.batch, shape.classes, *shape.spatial)
    source = logits.detach()
    size = (shape.batch, *shape.spatial)
    target = torch.randint(shape.classes, size, generator=torch.Generator().manual_seed(0))
    risk = torch.ones(size)
    table = shapes.make_conditional(shape.classes, shape.classes)

    def loss(dice_weight: float = 0.0, in_forward: bool = True) -> object:
        with riskmap_ext.gradient_in_forward(in_forward):
            value = riskmap_ext.weighted_loss(logits, target, risk, dice_weight=dice_weight)
            return torch.autograd.grad(value, logits)

    return {
        "weighted CE": loss,
        "weighted CE, recompute": lambda: loss(in_forward=False),
        "weighted CE + Dice": lambda: loss(dice_weight=1.0),
        "LEEP statistics": lambda: riskmap_ext.leep_statistics(source, target, shape.classes),
        "transferability map": lambda: riskmap_ext.transferability_map(source, target, table),
    }


_memory = torch.empty(0)


def _values(shape: Shape) -> torch.Tensor:
    """The first values of one random block that all shapes read from, as a leaf."""
    global _memory
    if _memory.numel() < shape.logits:
        _memory = torch.randn(shape.logits, generator=torch.Generator().manual_seed(1))
    return _memory[: shape.logits].detach().requires_grad_()


def _with_threads(function: Callable[[], object], count: int) -> Callable[[], object]:
    def run() -> object:
        torch.set_num_threads(count)
        return function()

    return run


def _time(runs: dict, rounds: int) -> dict:
    return timing.interleaved(runs, seconds=0.0, min_rounds=rounds, max_rounds=rounds)
