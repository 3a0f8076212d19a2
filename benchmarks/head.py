"""``python -m benchmarks.head [--full]``: a segmentation head and its loss, forward and backward.

Ours is linear_weighted_loss. Its peers are what a user has: the network's last 1x1 convolution, or
the same head written as a matrix product, and then a loss of PyTorch, MONAI, nnU-Net, or
weighted_loss. All give the gradients of features, weight and bias, and are compared before
anything is timed. Times are medians of interleaved rounds.

The bound is what the machine takes for the least there is to do: three products of the size of the
head (with Dice four), an exponential of every logit (with Dice two), features read (twice) and
their gradient written, each measured by itself in the same rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import riskmap_ext
from benchmarks import machine, peers, results, shapes, timing
from benchmarks.problem import COMPILE, EAGER, MONAI, NNUNET, OURS, relative_error
from benchmarks.results import Row

CE, CE_DICE = "head + weighted CE", "head + CE + Dice"
CONVOLUTION, PRODUCT = "convolution", "matrix product"
_TILE = 4096  # voxels of the products of the bound: what they read and write stays in a cache
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


class Size(NamedTuple):
    classes: int
    features: int
    side: int

    def __str__(self) -> str:
        return f"C={self.classes}, F={self.features}, {self.side}³"


SHORT = (Size(105, 32, 96), Size(5, 32, 128))
FULL = (
    *SHORT,
    *(Size(classes, 32, 96) for classes in (20, 87, 133)),
    *(Size(105, features, 96) for features in (16, 64)),
)
TINY = (Size(5, 4, 9),)


class Inputs(NamedTuple):
    features: Tensor
    weight: Tensor  # [C, F]
    bias: Tensor
    target: Tensor
    risk: Tensor


def make_inputs(size: Size) -> Inputs:
    shape = shapes.Shape("h", 1, 1, (size.side,) * 3)
    target, risk = shapes.make_inputs(shape, num_labels=size.classes)[1:]
    generator = torch.Generator().manual_seed(1)
    features = torch.randn((1, size.features, *shape.spatial), generator=generator)
    weight = torch.randn((size.classes, size.features), generator=generator) / size.features**0.5
    bias = torch.zeros(size.classes)
    for each in (features, weight, bias):
        each.requires_grad_()
    return Inputs(features, weight, bias, target, risk)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, target and risk


def _convolution(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(features, weight[:, :, None, None, None], bias)


def _product(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    logits = torch.baddbmm(bias[None, :, None], weight[None], features.flatten(2))
    return logits.unflatten(2, features.shape[2:])


def contenders(
    inputs: Inputs, work: str, *, others: bool = True, compiled: bool = False
) -> dict[str, Callable[[], list[Tensor]]]:
    """The loss and the gradients of features, weight and bias, by name. ``others``: losses of
    PyTorch, MONAI and nnU-Net, too."""
    dice = work == CE_DICE
    target, risk = inputs.target, inputs.risk
    options: dict[str, Any] = {"normalization": "valid", "dice_weight": float(dice)}

    def ours(logits: Tensor) -> Tensor:
        return riskmap_ext.weighted_loss(logits, target, None if dice else risk, **options)

    def gradients(loss: Callable[[], Tensor], plus: float = 0.0) -> list[Tensor]:
        value = loss()
        return [value.detach() + plus, *torch.autograd.grad(value, inputs[:3])]

    def with_head(head: Callable[..., Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
        return loss(head(*inputs[:3]))

    def linear() -> Tensor:
        return riskmap_ext.linear_weighted_loss(
            *inputs[:3], target, None if dice else risk, **options
        )

    found: dict[str, Callable[[], list[Tensor]]] = {
        OURS: partial(gradients, linear),
        f"{PRODUCT} + weighted_loss": partial(gradients, partial(with_head, _product, ours)),
        f"{CONVOLUTION} + weighted_loss": partial(
            gradients, partial(with_head, _convolution, ours)
        ),
    }

    def add(name: str, loss: Callable[[Tensor], Tensor], plus: float = 0.0) -> None:
        run = partial(with_head, _convolution, loss)
        found[f"{CONVOLUTION} + {name}"] = partial(gradients, run, plus)

    def add_compiled(name: str, loss: Callable[[Tensor], Tensor], plus: float = 0.0) -> None:
        run = torch.compile(partial(with_head, _convolution, loss), dynamic=False)
        found[f"{CONVOLUTION} + {name}, {COMPILE}"] = partial(gradients, run, plus)

    if not others:
        return found
    if not dice:
        losses: list[tuple[str, Callable[[Tensor], Tensor], float]] = [
            (f"{EAGER} cross_entropy", lambda x: peers.weighted_cross_entropy(x, target, risk), 0.0)
        ]
    else:
        with_channel = target.unsqueeze(1)
        monai, nnunet = peers.monai_dice_ce(), peers.nnunet_dice_ce()
        losses = []
        if monai is not None:
            losses.append((MONAI, lambda x: monai(x, with_channel), 0.0))
        if nnunet is not None:
            losses.append((NNUNET, lambda x: nnunet(x, with_channel), 1.0))
    for name, loss, plus in losses:
        add(name, loss, plus)
        if compiled:
            add_compiled(name, loss, plus)
    return found


def bound(inputs: Inputs, work: str) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What is timed for it, and how often each is to be counted."""
    classes, features = inputs.weight.shape
    voxels = inputs.target.numel()
    tile = min(_TILE, voxels)
    weight, x = inputs.weight.detach(), torch.randn(features, tile)
    logits, of_x = torch.empty(classes, tile), torch.empty(features, tile)
    of_weight = torch.empty(classes, features)
    part = max(1, voxels // tile // 8)

    def products() -> None:
        for _ in range(part):
            torch.mm(weight, x, out=logits)
            torch.mm(weight.t(), logits, out=of_x)
            torch.mm(logits, x.t(), out=of_weight)

    def first_product() -> None:
        for _ in range(part):
            torch.mm(weight, x, out=logits)

    values = torch.zeros(1 << 18)

    def exponentials() -> None:
        for _ in range(8):
            torch.exp(values, out=values).zero_()

    copy = timing.CopyRun(inputs.features.numel())
    passes = 2 if work == CE_DICE else 1
    counted = {
        "products": voxels / (part * tile),
        "first product": (passes - 1) * voxels / (part * tile),
        "exponentials": passes * classes * voxels / (8 * values.numel()),
        "copy": (1 + passes) / 2,
    }
    runs: dict[str, Callable[[], object]] = {
        "products": products,
        "first product": first_product,
        "exponentials": exponentials,
        "copy": copy,
    }
    return runs, counted


def check(runs: dict[str, Callable[[], list[Tensor]]]) -> None:
    expected = runs[OURS]()
    for name, run in runs.items():
        # torch's convolution adds the bias's gradient up in float32, voxel by voxel.
        for found, wanted, limit in zip(run(), expected, (1e-4, 1e-4, 1e-4, 1e-2), strict=True):
            error = relative_error(found, wanted)
            assert error <= limit, f"{name}: off by {error:.1e} (relative)"


def time_size(size: Size, work: str, full: bool, seconds: float, common: Row) -> Iterator[Row]:
    inputs = make_inputs(size)
    decides = size in SHORT  # the other losses take half a minute a round
    runs = contenders(inputs, work, others=decides, compiled=full and decides)
    check(runs)
    of_bound, counted = bound(inputs, work)
    timings = timing.interleaved({**runs, **of_bound}, seconds=seconds, min_rounds=5)
    least = sum(counted[name] * timings[name].median for name in counted)
    for name in runs:
        found = timings[name]
        yield {
            **dict.fromkeys(results.FIELDS, ""),
            **common,
            "op": "linear_weighted_loss",
            "case": str(size),
            "work": work,
            "contender": name,
            "batch": "1",
            "spatial": "x".join([str(size.side)] * 3),
            "classes": str(size.classes),
            "voxels": str(size.side**3),
            "shape": f"F={size.features}",
            "dtype": "float32",
            "rounds": str(found.rounds),
            "median_ms": f"{found.median * 1e3:.4f}",
            "q25_ms": f"{found.low * 1e3:.4f}",
            "q75_ms": f"{found.high * 1e3:.4f}",
            "bound_ms": f"{least * 1e3:.4f}",
            "time_over_bound": f"{found.median / least:.3f}",
        }


def peak(size: Size, work: str, name: str, threads: int) -> int | None:
    """Bytes beyond the inputs and the gradients, in a process of its own."""
    task = json.dumps([*size, work, name, threads])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.head", "--peak", task],
        env={**os.environ, **_MALLOC},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _peak_here(task: str) -> None:
    *numbers, work, name, threads = json.loads(task)
    torch.set_num_threads(threads)
    inputs = make_inputs(Size(*numbers))
    run = contenders(inputs, work, compiled=COMPILE in name)[name]
    found = timing.peak_extra_bytes(run)
    gradients = sum(each.nbytes for each in inputs[:3])
    print(json.dumps(None if found is None else max(0, found - gradients)))


def table(rows: list[Row]) -> str:
    lines = [
        "| head | work | contender | ms | times ours | time / bound | extra MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = {(r["case"], r["work"]): float(r["median_ms"]) for r in rows if r["contender"] == OURS}
    for row in rows:
        ms = float(row["median_ms"])
        extra = f"{int(row['extra_bytes']) / 2**20:.1f}" if row["extra_bytes"] else ""
        lines.append(
            f"| {row['case']} | {row['work'].removeprefix('head + ')} | {row['contender']} | "
            f"{ms:.0f} | {ms / ours[row['case'], row['work']]:.2f} | "
            f"{float(row['time_over_bound']):.2f} | {extra} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more sizes, and torch.compile")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds for each line")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        _peak_here(options.peak)
        return 0
    torch.set_num_threads(options.threads)
    kind = "full" if options.full else "short"
    common = {**machine.facts(), "kind": kind, "threads": str(options.threads)}
    rows: list[Row] = []
    for size in FULL if options.full else SHORT:
        for work in (CE, CE_DICE):
            print(f"{size}: {work}", file=sys.stderr, flush=True)
            torch.compiler.reset()
            rows += time_size(size, work, options.full, options.seconds, common)
            gc.collect()
    for row in rows:
        size = next(each for each in FULL if str(each) == row["case"])
        if size in SHORT:
            found = peak(size, row["work"], row["contender"], options.threads)
            row["extra_bytes"] = "" if found is None else str(found)
    path = options.output / f"{machine.slug()}-head-{kind}.csv"
    results.write(rows, path)
    print(table(rows))
    print(
        f"\n{machine.cpu_model()}, {options.threads} threads, load {common['load']}; rows: {path}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
