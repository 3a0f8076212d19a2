"""``python -m benchmarks.training_step``: what one training step costs with us and without.

The same MONAI UNet, Adam and 96³ patch for everyone; only the loss differs (and, in the last line,
the source model's forward pass and the risk map, made in the step instead of being loaded). Prints
a Markdown table of ratios to MONAI's DiceCELoss: medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn

import riskmap_ext
from benchmarks import peers
from riskmap_ext.integrations.monai import RiskMapDiceCELoss

CLASSES = 4
BASE = "MONAI DiceCELoss"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--size", type=int, default=96, help="voxels on a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = (options.batch, 1, *(options.size,) * 3)
    image = torch.randn(shape)
    blocks = torch.randint(0, CLASSES, (options.batch, 1, *((options.size + 7) // 8,) * 3))
    label = nn.functional.interpolate(blocks.float(), shape[2:], mode="nearest").long()
    ratios = _ratios(_steps(image, label), options.rounds)
    shown = f"{options.batch}x{options.size}³"
    print(f"UNet, {shown}, {CLASSES} classes, {options.threads} threads, {options.rounds} rounds\n")
    print("| loss | step / step with DiceCELoss | quartiles |\n|---|---|---|")
    for name, values in ratios.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        print(f"| {name} | {median:.3f} | {low:.3f} to {high:.3f} |")
    return 0


def _ratios(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Of every round on its own: what else the machine does, it does to all of a round."""
    names = list(runs)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):  # the first is a warm-up
        times = {}
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            begin = time.perf_counter()
            runs[name]()
            times[name] = time.perf_counter() - begin
        for name in names if turn >= 0 else ():
            ratios[name].append(times[name] / times[BASE])
    return ratios


def _steps(image: Tensor, label: Tensor) -> dict[str, Callable[[], object]]:
    first = UNet(3, 1, CLASSES, channels=(16, 32, 64, 128, 256), strides=(2,) * 4, num_res_units=2)
    source = copy.deepcopy(first).eval().requires_grad_(False)
    seen = riskmap_ext.TransferStatistics(CLASSES)
    with torch.no_grad():
        seen.update(source(image), label)
        seen.update_range(source(image), label)
    given: dict[str, Any] = {"conditional": seen.conditional, "range": seen.hardness_range}

    def make_map() -> Tensor:
        with torch.no_grad():
            return riskmap_ext.risk_map(source(image), label, **given)

    cached = make_map()
    options: dict[str, Any] = {"to_onehot_y": True, "softmax": True, "include_background": False}
    ours, theirs = RiskMapDiceCELoss(**options), DiceCELoss(**options)

    def step(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        network = copy.deepcopy(first)
        optimizer = torch.optim.Adam(network.parameters(), 1e-4)

        def run() -> None:
            optimizer.zero_grad()
            loss(network(image)).backward()
            optimizer.step()

        return run

    runs = {
        BASE: step(lambda logits: theirs(logits, label)),
        "RiskMapDiceCELoss, map cached": step(lambda logits: ours(logits, label, cached)),
        "RiskMapDiceCELoss, no map": step(lambda logits: ours(logits, label)),
        "RiskMapDiceCELoss, map made in the step": step(
            lambda logits: ours(logits, label, make_map())
        ),
    }
    peer = peers.nnunet_dice_ce()
    if peer is not None:
        runs["nnU-Net DC_and_CE_loss"] = step(lambda logits: peer(logits, label))
    return runs


if __name__ == "__main__":
    raise SystemExit(main())
