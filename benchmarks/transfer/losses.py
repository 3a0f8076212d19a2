"""Losses of the arms that the driver has no key for."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from riskmap_ext import weighted_loss
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.data.prepare import Case
from riskmap_ext.nn import RiskWeightedLoss

GAMMA = 2.0
TOP_SHARE = 0.1


def focal(logits: Tensor, label: Tensor, risk: Tensor | None, foreground: Tensor) -> Tensor:
    """Mean over the valid voxels of (1 - p)^2 * CE, p the probability of the label."""
    ce, valid = _cross_entropy(logits, label)
    return ((1 - (-ce).exp()) ** GAMMA * ce).sum() / valid.sum().clamp(min=1)


def top_k(logits: Tensor, label: Tensor, risk: Tensor | None, foreground: Tensor) -> Tensor:
    """Mean of the largest tenth of the batch's cross-entropies."""
    ce, valid = _cross_entropy(logits, label)
    count = max(1, int(TOP_SHARE * int(valid.sum())))
    return ce.flatten().topk(count, sorted=False).values.mean()


def focal_dice(logits: Tensor, label: Tensor, risk: Tensor | None, foreground: Tensor) -> Tensor:
    return focal(logits, label, risk, foreground) + _dice(logits, label, foreground)


def top_k_dice(logits: Tensor, label: Tensor, risk: Tensor | None, foreground: Tensor) -> Tensor:
    return top_k(logits, label, risk, foreground) + _dice(logits, label, foreground)


def labels_alone(logits: Tensor, label: Tensor, risk: Tensor | None, foreground: Tensor) -> Tensor:
    """Risk-weighted CE + Dice normalised by the labelled foreground, without the image's mask."""
    return _labelled(logits, label, risk, 0.05)


def labels_floored(
    logits: Tensor, label: Tensor, risk: Tensor | None, foreground: Tensor
) -> Tensor:
    """The same with a floor that bounds the scale to 2.5, about what a brain mask gives."""
    return _labelled(logits, label, risk, 0.4)


class Fading:
    """Risk-weighted CE + Dice with the weights to the power 1 - t, t the share of steps done."""

    def __init__(self, cases: Sequence[Case], num_classes: int, steps: int) -> None:
        self._loss = RiskWeightedLoss(ignore_index=IGNORE_INDEX, dice_weight=1.0)
        self._done, self._steps = 0, steps

    def __call__(
        self, logits: Tensor, label: Tensor, risk: Tensor | None, foreground: Tensor
    ) -> Tensor:
        assert risk is not None
        left = max(0.0, 1 - self._done / self._steps)
        self._done += 1
        return self._loss(logits, label, risk**left, foreground=foreground)


def _labelled(logits: Tensor, label: Tensor, risk: Tensor | None, floor: float) -> Tensor:
    return weighted_loss(
        logits,
        label,
        risk,
        ignore_index=IGNORE_INDEX,
        normalization="foreground",
        foreground_floor=floor,
        dice_weight=1.0,
    )


def _cross_entropy(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Of each voxel, 0 where it is ignored; and which are valid."""
    ce = F.cross_entropy(logits, label.long(), ignore_index=IGNORE_INDEX, reduction="none")
    return ce, label != IGNORE_INDEX


def _dice(logits: Tensor, label: Tensor, foreground: Tensor) -> Tensor:
    return weighted_loss(
        logits,
        label,
        foreground=foreground,
        ignore_index=IGNORE_INDEX,
        ce_weight=0.0,
        dice_weight=1.0,
    )
