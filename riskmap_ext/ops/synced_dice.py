"""The sums of the weighted loss with one Dice over the batches of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from riskmap_ext._arguments import compute_dtype
from riskmap_ext._loss_arguments import LossOptions
from riskmap_ext.ops.loss_ops import IMAGE_COLUMNS, LossOps


def applies(options: LossOptions) -> bool:
    return (
        options.sync_dice
        and options.dice_weight > 0
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


def sums(
    ops: LossOps, tensors: Sequence[Any], options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, scale and slopes, as the op has them; ``tensors``: as it takes them."""
    *tensors, dice_class_weight = tensors
    volume, weight, regions = tensors[0], tensors[ops.risk + 1], tensors[-1]
    failed: Exception | None = None
    try:
        sums = ops.call("_sums", *tensors, *options.of_gradient)
        total = sums[:, IMAGE_COLUMNS:].sum(dim=0)
    except Exception as error:  # the other processes wait: their loss becomes NaN
        failed = error
        total = volume.new_full((3 * ops.classes(tensors),), torch.nan, dtype=torch.float64)
    dist.all_reduce(total)
    if failed is not None:
        raise failed
    # Only the total over images matters, so the first image gets all of it.
    sums[:, IMAGE_COLUMNS:] = 0
    sums[:1, IMAGE_COLUMNS:] = total
    _, background, floor, normalization, _, reduction, _, ce_weight = options.of_cross_entropy
    loss, scale, slopes = torch.ops.riskmap_ext._weighted_loss_finish(
        sums,
        weight,
        dice_class_weight,
        None if options.include_background or regions is not None else background,
        floor,
        normalization,
        reduction,
        ce_weight,
        options.dice_weight,
        options.smooth_nr,
        options.smooth_dr,
        options.alpha,
        options.beta,
        True,
        compute_dtype(volume.dtype) == torch.float64,
    )
    # Each process includes this Dice in its loss.
    return loss, scale, slopes * dist.get_world_size()


@torch.library.register_fake("riskmap_ext::_weighted_loss_sums")
def _sums_fake(logits: Tensor, *_: Any) -> Tensor:
    return _fake_sums(logits, logits.size(1))


@torch.library.register_fake("riskmap_ext::_linear_weighted_loss_sums")
def _head_sums_fake(features: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return _fake_sums(features, weight.size(0))


def _fake_sums(volume: Tensor, classes: int) -> Tensor:
    return volume.new_empty((volume.size(0), IMAGE_COLUMNS + 3 * classes), dtype=torch.float64)


@torch.library.register_fake("riskmap_ext::_weighted_loss_finish")
def _finish_fake(sums: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = sums.size(0), (sums.size(1) - IMAGE_COLUMNS) // 3
    return (
        sums.new_empty((), dtype=torch.float64 if options[-1] else torch.float32),
        sums.new_empty((batch,)),
        sums.new_empty((batch, 2, classes)),
    )
