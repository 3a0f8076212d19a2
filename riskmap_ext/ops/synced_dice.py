"""The weighted loss with one Dice over the batches of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from riskmap_ext._arguments import compute_dtype
from riskmap_ext._loss_arguments import LossOptions, LossTensors

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
def weighted_loss(tensors: LossTensors, options: LossOptions) -> Tensor:
    return _SyncedDice.apply(*tensors, options)


class _SyncedDice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, options = inputs
        logits, weight, regions, dice_class_weight = (tensors[i] for i in (0, 3, 5, 6))
        ops = torch.ops.riskmap_ext
        ignore_index, background, floor, normalization, ce_voxels, reduction, smoothing, ce = (
            options.of_cross_entropy
        )
        of_gradient = (ignore_index, background, ce_voxels, smoothing, options.squared_pred)
        failed: Exception | None = None
        try:
            sums = ops._weighted_loss_sums(*tensors[:6], *of_gradient)
            total = sums[:, _COLUMNS:].sum(dim=0)
        except Exception as error:  # the others wait: their loss becomes NaN
            failed = error
            total = logits.new_full((3 * logits.size(1),), torch.nan, dtype=torch.float64)
        dist.all_reduce(total)
        if failed is not None:
            raise failed
        # Image by image only their total counts, so the first one gets all of it.
        sums[:, _COLUMNS:] = 0
        sums[:1, _COLUMNS:] = total
        excluded = None if options.include_background or regions is not None else background
        loss, scale, slopes = ops._weighted_loss_finish(
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
            compute_dtype(logits.dtype) == torch.float64,
        )
        ctx.options = of_gradient
        # Each process has this Dice in its loss.
        ctx.save_for_backward(*tensors[:6], scale, slopes * dist.get_world_size())
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_logits, grad_risk = torch.ops.riskmap_ext._weighted_loss_backward(
            grad_loss, *saved, *ctx.options, saved[2] is not None and wanted[2]
        )
        first = grad_logits if wanted[0] else None
        third = grad_risk if wanted[2] else None
        return (first, None, third, *(None,) * 5)


@torch.library.register_fake("riskmap_ext::_weighted_loss_sums")
def _sums_fake(logits: Tensor, *_: Any) -> Tensor:
    columns = _COLUMNS + 3 * logits.size(1)
    return logits.new_empty((logits.size(0), columns), dtype=torch.float64)


@torch.library.register_fake("riskmap_ext::_weighted_loss_finish")
def _finish_fake(sums: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = sums.size(0), (sums.size(1) - _COLUMNS) // 3
    return (
        sums.new_empty((), dtype=torch.float64 if options[-1] else torch.float32),
        sums.new_empty((batch,)),
        sums.new_empty((batch, 2, classes)),
    )
