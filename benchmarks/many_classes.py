"""``python -m benchmarks.many_classes``: a training step of nnU-Net's network with many classes.

PlainConvUNet as nnU-Net plans it for a patch of 96³, deep supervision, SGD; everyone has the same
network, image and labels, and only the end differs: nnU-Net's own loss on the logits,
RiskWeightedLoss on the logits, RiskWeightedLoss on fused heads. Prints a Markdown table: peak of
the resident memory beyond the network, its optimizer and the data, each in a process of its own,
and the time of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import peers, timing
from riskmap_ext.nn import RiskWeightedLoss, fuse_head

NNUNET, LOGITS, FUSED = "nnU-Net DC_and_CE_loss", "RiskWeightedLoss", "RiskWeightedLoss, fused"
CONTENDERS = (NNUNET, LOGITS, FUSED)
_CHANNELS = (32, 64, 128, 256, 320)
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def network(classes: int) -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    stages = len(_CHANNELS)
    return PlainConvUNet(
        1,
        stages,
        _CHANNELS,
        nn.Conv3d,
        3,
        [1] + [2] * (stages - 1),
        2,
        classes,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def step(name: str, classes: int, side: int, autocast: bool) -> Callable[[], float]:
    """One training step; gives the loss, nnU-Net's plus 1 for each scale's -Dice."""
    torch.manual_seed(0)
    net = network(classes).train()
    scales = len(_CHANNELS) - 1
    weights = [0.5**i for i in range(scales - 1)] + [0.0]
    weights = [each / sum(weights) for each in weights]
    image = torch.randn(1, 1, side, side, side)
    coarse = torch.randint(classes, (1, 1, *[-(-side // 8)] * 3))
    label = nn.functional.interpolate(coarse.float(), [side] * 3, mode="nearest").long()
    labels = [label[..., :: 2**i, :: 2**i, :: 2**i].contiguous() for i in range(scales)]

    loss: Callable[[list], Tensor]
    if name == NNUNET:
        single = peers.nnunet_dice_ce()
        assert single is not None, "nnunetv2 is not installed"

        def loss(outputs: list) -> Tensor:
            found = zip(weights, outputs, labels, strict=True)
            return torch.stack([w * (single(x, y) + 1) for w, x, y in found if w > 0]).sum()
    else:
        ours = RiskWeightedLoss(dice_weight=1.0, normalization="valid", scale_weights=weights)
        if name == FUSED:
            fuse_head(net)

        def loss(outputs: list) -> Tensor:
            return ours(outputs, labels)

    optimizer = torch.optim.SGD(net.parameters(), 1e-2, momentum=0.99, nesterov=True)

    def run() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(net(image))
        value.backward()
        optimizer.step()
        return value.item()

    return run


def measure(options: argparse.Namespace) -> dict[str, float]:
    run = step(options.only, options.classes, options.side, options.autocast)
    first = run()
    times = []
    for _ in range(options.rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    peak = timing.peak_extra_bytes(run, repeats=1)
    return {"loss": first, "seconds": statistics.median(times), "bytes": float(peak or 0)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_classes", description=__doc__)
    parser.add_argument("--classes", type=int, default=105)
    parser.add_argument("--side", type=int, default=96, help="voxels on a side of the patch")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--autocast", action="store_true", help="bfloat16, as on a GPU float16")
    parser.add_argument("--only", choices=CONTENDERS, help="prints JSON, for the others")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.only:
        print(json.dumps(measure(options)))
        return 0
    kind = "bfloat16 autocast" if options.autocast else "float32"
    print(
        f"PlainConvUNet, {options.side}³, C={options.classes}, {kind}, {options.threads} threads\n"
    )
    print(
        "| head and loss | peak MiB | of nnU-Net's | step s | of nnU-Net's |\n|---|---|---|---|---|"
    )
    theirs: dict[str, float] = {}
    for name in CONTENDERS:
        given = [f"--{key}={getattr(options, key)}" for key in ("classes", "side", "threads")]
        command = [sys.executable, "-m", "benchmarks.many_classes", *given]
        done = subprocess.run(
            [
                *(*command, f"--rounds={options.rounds}", "--only", name),
                *(["--autocast"] if options.autocast else []),
            ],
            env={**os.environ, **_MALLOC},
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        theirs = theirs or found
        assert abs(found["loss"] - theirs["loss"]) < 1e-2, (name, found, theirs)
        print(
            f"| {name} | {found['bytes'] / 2**20:.0f} | {found['bytes'] / theirs['bytes']:.2f} | "
            f"{found['seconds']:.1f} | {found['seconds'] / theirs['seconds']:.2f} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
