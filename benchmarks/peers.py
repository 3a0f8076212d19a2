"""What a user would write or take instead: the same formulas in lean PyTorch, MONAI, nnU-Net.

The formulas do no more than the benchmark needs (no ignored voxels, no checks), and are written
two ways where it depends on the shape which is quicker. All take logits of any dtype and compute in
float32, as autocast has it.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5  # the epsilon of riskmap_ext's Dice
FLOOR = 0.05  # its foreground_floor


def weighted_cross_entropy(logits: Tensor, target: Tensor, risk: Tensor) -> Tensor:
    """normalization="valid": the mean of w CE."""
    return (F.cross_entropy(logits.float(), target, reduction="none") * risk).mean()


def foreground_cross_entropy(logits: Tensor, target: Tensor, risk: Tensor) -> Tensor:
    """normalization="foreground", of the labels alone."""
    weighted = F.cross_entropy(logits.float(), target, reduction="none") * risk
    voxels = weighted[0].numel()
    inside = (target != 0).flatten(1).sum(1)
    size = torch.where(inside > 0, inside.clamp(min=FLOOR * voxels), voxels)
    return (weighted.flatten(1).sum(1) / size).mean()


def weighted_ce_dice_gather(logits: Tensor, target: Tensor, risk: Tensor) -> Tensor:
    """Cross-entropy + Dice without a one-hot tensor."""
    logits = logits.float()
    cross_entropy = (F.cross_entropy(logits, target, reduction="none") * risk).mean()
    probabilities = torch.softmax(logits, dim=1)
    labels = target.flatten(1)
    hit = probabilities.gather(1, target.unsqueeze(1)).flatten(1)
    empty = logits.new_zeros(logits.shape[:2])
    overlap = empty.scatter_add(1, labels, hit)
    count = empty.scatter_add(1, labels, torch.ones_like(hit))
    return cross_entropy + _dice_loss(overlap, probabilities.flatten(2).sum(2) + count)


def weighted_ce_dice_one_hot(logits: Tensor, target: Tensor, risk: Tensor) -> Tensor:
    """Cross-entropy + Dice from one log-softmax and a one-hot tensor."""
    log_probabilities = torch.log_softmax(logits.float(), dim=1)
    probabilities = log_probabilities.exp()
    truth = _one_hot(target, logits.size(1))
    cross_entropy = (-(log_probabilities * truth).sum(1) * risk).mean()
    overlap = (probabilities * truth).flatten(2).sum(2)
    size = probabilities.flatten(2).sum(2) + truth.flatten(2).sum(2)
    return cross_entropy + _dice_loss(overlap, size)


def region_bce_dice(logits: Tensor, target: Tensor, risk: Tensor, regions: Tensor) -> Tensor:
    """Overlapping regions: weighted binary cross-entropy + Dice; ``regions`` is [R, L] float."""
    logits = logits.float()
    truth = regions.t()[target].movedim(-1, 1)
    voxel = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    probabilities = torch.sigmoid(logits)
    overlap = (probabilities * truth).flatten(2).sum(2)
    size = probabilities.flatten(2).sum(2) + truth.flatten(2).sum(2)
    return (voxel * risk).mean() + _dice_loss(overlap, size, first=0)


def leep_statistics_index_add(source: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """J [C, Z] float32: rows of probabilities added up by label."""
    theta = torch.softmax(source.float(), dim=1)
    joint = theta.new_zeros(num_classes, theta.size(1))
    rows = theta.movedim(1, -1).reshape(-1, theta.size(1))
    return joint.index_add(0, target.flatten(), rows)


def leep_statistics_matmul(source: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """J [C, Z] float32: one-hot labels times probabilities."""
    theta = torch.softmax(source.float(), dim=1)
    truth = theta.new_zeros(theta.size(0), num_classes, *theta.shape[2:])
    truth = truth.scatter(1, target.unsqueeze(1), 1.0)
    return torch.einsum("byn,bzn->yz", truth.flatten(2), theta.flatten(2))


def transferability_map(source: Tensor, target: Tensor, conditional: Tensor) -> Tensor:
    """T [B, *S]: the row of P(y|z) of every voxel times its probabilities."""
    theta = torch.softmax(source.float(), dim=1)
    likelihood = (conditional[target].movedim(-1, 1) * theta).sum(1)
    return likelihood.clamp(1e-6, 1.0).log()


def transferability_map_matmul(source: Tensor, target: Tensor, conditional: Tensor) -> Tensor:
    """T [B, *S]: the likelihood of every label, of which one is taken."""
    theta = torch.softmax(source.float(), dim=1)
    every = torch.einsum("yz,bzn->byn", conditional, theta.flatten(2))
    likelihood = every.gather(1, target.flatten(1).unsqueeze(1)).view(target.shape)
    return likelihood.clamp(1e-6, 1.0).log()


def risk_map(
    source: Tensor, target: Tensor, conditional: Tensor, low: float, high: float
) -> Tensor:
    """scheme="exponential", base 10, with a given range."""
    return _exponential(transferability_map(source, target, conditional), low, high)


def risk_map_matmul(
    source: Tensor, target: Tensor, conditional: Tensor, low: float, high: float
) -> Tensor:
    return _exponential(transferability_map_matmul(source, target, conditional), low, high)


def monai_dice_ce(squared_pred: bool = False) -> Callable[[Tensor, Tensor], Tensor] | None:
    """MONAI's DiceCELoss with the constants of riskmap_ext's; None where MONAI is missing."""
    try:
        from monai.losses import DiceCELoss
    except ImportError:
        return None
    return DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        squared_pred=squared_pred,
        smooth_nr=SMOOTH,
        smooth_dr=SMOOTH,
    )


def nnunet_dice_ce() -> Callable[[Tensor, Tensor], Tensor] | None:
    """nnU-Net's DC_and_CE_loss as its trainer sets it up, per image; None where it is missing.

    Its value is 1 below ours: it has -Dice where we have 1 - Dice. Its loss modules need torch
    alone, so ``pip install --no-deps nnunetv2`` will do.
    """
    try:
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    except ImportError:
        return None
    options = {"batch_dice": False, "smooth": SMOOTH, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)


def version(package: str) -> str:
    """Of an installed package, or "" where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _exponential(transferability: Tensor, low: float, high: float) -> Tensor:
    position = ((-transferability - low) / (high - low)).clamp(0.0, 1.0)
    return torch.exp(math.log(10.0) * position)


def _one_hot(target: Tensor, num_classes: int) -> Tensor:
    classes = torch.arange(num_classes, device=target.device)
    return (target.unsqueeze(1) == classes.view(-1, *(1,) * (target.dim() - 1))).float()


def _dice_loss(overlap: Tensor, size: Tensor, first: int = 1) -> Tensor:
    """1 - mean Dice of the classes from ``first`` on; both [B, C]."""
    return 1 - ((2 * overlap + SMOOTH) / (size + SMOOTH))[:, first:].mean()
