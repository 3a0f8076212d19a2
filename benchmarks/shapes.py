"""The shapes that every benchmark shares, and inputs that look like segmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

SIZES = ("tiny", "short", "full")


@dataclass(frozen=True)
class Shape:
    """Logits [batch, classes, *spatial]; ``key`` is the letter that reports use."""

    key: str
    classes: int
    batch: int
    spatial: tuple[int, ...]

    @property
    def voxels(self) -> int:
        return self.batch * math.prod(self.spatial)

    @property
    def logits(self) -> int:
        return self.voxels * self.classes

    def __str__(self) -> str:
        sides = set(self.spatial)
        power = {2: "²", 3: "³"}.get(len(self.spatial), "")
        extent = (
            f"{self.spatial[0]}{power}" if len(sides) == 1 else "x".join(map(str, self.spatial))
        )
        return f"C={self.classes}, {extent if self.batch == 1 else f'{self.batch}x{extent}'}"


FULL = {
    shape.key: shape
    for shape in (
        Shape("a", classes=4, batch=2, spatial=(96, 96, 96)),
        Shape("b", classes=87, batch=1, spatial=(64, 64, 64)),
        Shape("c", classes=4, batch=16, spatial=(256, 256)),
        Shape("d", classes=105, batch=1, spatial=(96, 96, 96)),
        Shape("e", classes=5, batch=1, spatial=(128, 128, 128)),
        Shape("r", classes=3, batch=1, spatial=(128, 128, 128)),
    )
}

_SHORT = {"d": (64, 64, 64)}  # else one round of its peers takes 8 s
_TINY = {2: (23, 21), 3: (13, 12, 11)}

# BraTS: whole tumour, tumour core, enhancing tumour of the labels background, necrosis, oedema,
# enhancing.
BRATS_REGIONS = ((0, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1))


def shape(key: str, size: str) -> Shape:
    """The shape of that letter: "full", "short" for quick runs, or "tiny" for smoke tests."""
    full = FULL[key]
    if size == "tiny":
        return replace(full, spatial=_TINY[len(full.spatial)])
    return replace(full, spatial=_SHORT.get(key, full.spatial)) if size == "short" else full


class Inputs(NamedTuple):
    logits: Tensor  # [B, C, *S]
    target: Tensor  # [B, *S] int64
    risk: Tensor  # [B, *S] float32 in [1, 10]


def make_inputs(
    shape: Shape,
    num_labels: int | None = None,
    seed: int = 0,
    *,
    block: int = 8,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Float32 logits that mostly agree with the labels; no label is ignored.

    Labels come in blocks of ``block`` voxels a side, half of them background: neighbours in a real
    label map are alike too. Labels drawn voxel by voxel would overstate the work of the LEEP
    statistics, which add up runs of a label, by a fifth.
    """
    generator = torch.Generator(device).manual_seed(seed)
    labels = shape.classes if num_labels is None else num_labels
    coarse = (shape.batch, *(-(-side // block) for side in shape.spatial))
    target = torch.randint(labels, coarse, generator=generator, device=device)
    target[torch.rand(coarse, generator=generator, device=device) < 0.5] = 0
    for axis, side in enumerate(shape.spatial, start=1):
        target = target.repeat_interleave(block, dim=axis).narrow(axis, 0, side)
    target = target.contiguous()

    scores = (shape.batch, shape.classes, *shape.spatial)
    logits = torch.randn(scores, generator=generator, device=device)
    if num_labels is None:
        at = target.unsqueeze(1)
        logits.scatter_add_(1, at, logits.new_full((), 3.0).expand(at.shape))
    risk = 1 + 9 * torch.rand(target.shape, generator=generator, device=device)
    return Inputs(logits, target, risk)


def make_conditional(classes: int, source_classes: int, seed: int = 0) -> Tensor:
    """P(y|z), [C, Z] float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(classes, source_classes, generator=generator), dim=0)
