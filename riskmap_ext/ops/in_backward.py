"""The weighted loss with its gradient computed in the backward pass, for what the op's own autograd
cannot do: sums over several processes, and a gradient in the memory of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._loss_arguments import LossOptions
from riskmap_ext.ops import overwriting, synced_dice
from riskmap_ext.ops.loss_ops import LossOps


@torch.compiler.disable  # processes may synchronize within
def loss(
    ops: LossOps, tensors: Sequence[Tensor | None], options: LossOptions, overwrites: bool = False
) -> Tensor:
    """``tensors``: as the op takes them."""
    return _GradientInBackward.apply(ops, options, overwrites, *tensors)


class _GradientInBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ops: LossOps, options: LossOptions, overwrites: bool, *tensors: Any
    ) -> Tensor:
        if synced_dice.applies(options):
            loss, *factors = synced_dice.sums(ops, tensors, options)
        else:
            loss, *factors = ops.call("", *tensors, *options.of_cross_entropy, *options.of_dice)
        ctx.ops, ctx.options = ops, options.of_gradient
        ctx.overwrites, ctx.done = overwrites, False
        ctx.save_for_backward(*tensors[: ops.tensors], *factors)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor | None]:
        ops = ctx.ops
        _, _, _, *wanted = ctx.needs_input_grad
        if ctx.overwrites:
            overwriting.require_only_backward(ctx.done, grad_loss)
            ctx.done = True
        saved = ctx.saved_tensors
        arguments = (grad_loss, *saved, *ctx.options, *ops.flags(wanted))
        if ctx.overwrites:
            gradients = saved[0].detach(), ops.call("_backward_", *arguments)
            with torch.enable_grad():
                overwriting.mark_lost(saved[0])
        else:
            gradients = ops.call("_backward", *arguments)
        return (None, None, None, *ops.of_inputs(gradients, wanted))
