"""The weighted loss with one Dice over the batches of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from riskmap_ext._arguments import compute_dtype
from riskmap_ext._loss_arguments import LossOptions
from riskmap_ext.ops.loss_ops import LossOps

_COLUMNS = 5  # of an image's sums, before those of the classes: see _weighted_loss_sums


def applies(options: LossOptions) -> bool:
    return (
        options.sync_dice
        and options.dice_weight > 0
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    )


@torch.compiler.disable  # processes meet within
def loss(ops: LossOps, tensors: Sequence[Tensor | None], options: LossOptions) -> Tensor:
    """``tensors``: as the op takes them."""
    return _SyncedDice.apply(ops, options, *tensors)


class _SyncedDice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: LossOps, options: LossOptions, *inputs: Any) -> Tensor:
        *tensors, dice_class_weight = inputs
        volume, weight, regions = tensors[0], tensors[ops.risk + 1], tensors[-1]
        ignore_index, background, floor, normalization, ce_voxels, reduction, smoothing, ce = (
            options.of_cross_entropy
        )
        of_gradient = (ignore_index, background, ce_voxels, smoothing, options.squared_pred)
        failed: Exception | None = None
        try:
            sums = ops.call("_sums", *tensors, *of_gradient)
            total = sums[:, _COLUMNS:].sum(dim=0)
        except Exception as error:  # the others wait: their loss becomes NaN
            failed = error
            total = volume.new_full((3 * ops.classes(tensors),), torch.nan, dtype=torch.float64)
        dist.all_reduce(total)
        if failed is not None:
            raise failed
        # Image by image only their total counts, so the first one gets all of it.
        sums[:, _COLUMNS:] = 0
        sums[:1, _COLUMNS:] = total
        excluded = None if options.include_background or regions is not None else background
        loss, scale, slopes = torch.ops.riskmap_ext._weighted_loss_finish(
            sums,
            weight,
            dice_class_weight,
            excluded,
            floor,
            normalization,
            reduction,
            ce,
            options.dice_weight,
            options.smooth_nr,
            options.smooth_dr,
            options.alpha,
            options.beta,
            True,
            compute_dtype(volume.dtype) == torch.float64,
        )
        ctx.ops = ops
        ctx.options = of_gradient
        # Each process has this Dice in its loss.
        ctx.save_for_backward(*tensors, scale, slopes * dist.get_world_size())
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor | None]:
        saved = ctx.saved_tensors
        _, _, *wanted = ctx.needs_input_grad
        gradients = ctx.ops.call(
            "_backward", grad_loss, *saved, *ctx.options, *ctx.ops.flags(wanted)
        )
        return (None, None, *ctx.ops.of_inputs(gradients, wanted))


@torch.library.register_fake("riskmap_ext::_weighted_loss_sums")
def _sums_fake(logits: Tensor, *_: Any) -> Tensor:
    return _fake_sums(logits, logits.size(1))


@torch.library.register_fake("riskmap_ext::_linear_weighted_loss_sums")
def _head_sums_fake(features: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return _fake_sums(features, weight.size(0))


def _fake_sums(volume: Tensor, classes: int) -> Tensor:
    return volume.new_empty((volume.size(0), _COLUMNS + 3 * classes), dtype=torch.float64)


@torch.library.register_fake("riskmap_ext::_weighted_loss_finish")
def _finish_fake(sums: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = sums.size(0), (sums.size(1) - _COLUMNS) // 3
    return (
        sums.new_empty((), dtype=torch.float64 if options[-1] else torch.float32),
        sums.new_empty((batch,)),
        sums.new_empty((batch, 2, classes)),
    )
