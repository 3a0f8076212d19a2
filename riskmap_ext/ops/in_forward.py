"""The weighted loss with its gradient computed in the forward pass: one read of the logits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._arguments import validate_flag
from riskmap_ext._loss_arguments import LossOptions
from riskmap_ext.ops import overwriting
from riskmap_ext.ops.loss_ops import LossOps
from riskmap_ext.ops.tracing import is_batched, is_traced

_state = threading.local()  # as torch keeps its grad mode


def _enabled() -> bool:
    return getattr(_state, "enabled", True)


@contextmanager
def gradient_in_forward(enabled: bool) -> Iterator[None]:
    """Allow or forbid computing the loss's gradient in the forward pass, within the context and
    in this thread.

    Allowed by default. It is used in eager mode where it is faster and exact: cross-entropy
    only (``dice_weight=0``), reduced, float32, float64 or bfloat16 logits that require grad. The
    forward pass then reads the logits once and writes their gradient. The backward pass returns
    this gradient, scaled in place if the incoming gradient is not 1.

    In all other cases the backward pass computes the gradient from the logits: torch.compile and
    other tracing, Dice, ``reduction="none"``, ``normalization="weighted"`` with class weights, and
    float16 logits or risk, whose small gradients must be scaled by a GradScaler before rounding.

    Both give the same numbers up to rounding. Forbid it if you often run a forward pass that needs
    grad without a backward pass.
    """
    enabled = validate_flag("enabled", enabled)
    before, _state.enabled = _enabled(), enabled
    try:
        yield
    finally:
        _state.enabled = before


def applies(ops: LossOps, tensors: Sequence[Tensor | None], options: LossOptions) -> bool:
    """``tensors``: as the op takes them, except for the class weights of the Dice."""
    volume, risk, weight = tensors[0], tensors[ops.risk], tensors[ops.risk + 1]
    assert volume is not None
    # The sum of the class weights is known only once the voxels of each class are counted.
    by_class_weight = options.normalization == "weighted" and weight is not None
    return (
        not torch.compiler.is_compiling()
        and _enabled()
        and options.dice_weight == 0
        and options.reduction != "none"
        and not by_class_weight
        and volume.dtype != torch.float16
        and not (risk is not None and risk.dtype == torch.float16 and risk.requires_grad)
        and any(each is not None and each.requires_grad for each in tensors[: ops.risk - 1])
        and torch.is_grad_enabled()
        and not is_traced(volume)
    )


def loss(
    ops: LossOps, tensors: Sequence[Tensor | None], options: LossOptions, overwrites: bool = False
) -> Tensor:
    try:
        return _GradientInForward.apply(ops, options, overwrites, *tensors)
    finally:
        if overwrites:
            overwriting.mark_lost(tensors[0])  # type: ignore[arg-type]


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ops: LossOps, options: LossOptions, overwrites: bool, *tensors: Any
    ) -> Tensor:
        _, _, _, *wanted = ctx.needs_input_grad
        ctx.ops, ctx.options, ctx.overwrites = ops, options, overwrites
        arguments = (*tensors, *options.of_cross_entropy, *ops.flags(wanted))
        # Gradients are handed over once, so they are not among the saved tensors.
        if overwrites:
            loss, grad_risk = ops.call("_with_gradient_", *arguments)
            ctx.gradients = tensors[0].detach(), grad_risk
            ctx.version = tensors[0]._version + 1  # once they are marked as lost
        else:
            loss, *ctx.gradients = ops.call("_with_gradient", *arguments)
            ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Sequence[Tensor | None]:
        _, _, _, *wanted = ctx.needs_input_grad
        # With retain_graph the first gradient already belongs to its receiver; with create_graph
        # the op's backward pass raises the error for a second derivative.
        again = ctx.gradients is None or torch.is_grad_enabled() or is_batched(grad_loss)
        if ctx.overwrites:
            overwriting.require_only_backward(ctx.gradients is None, grad_loss)
            overwriting.require_unchanged(ctx.gradients[0], ctx.version)
        if again:
            gradients = _again(ctx, grad_loss, wanted)
        else:
            gradients, ctx.gradients = ctx.gradients, None
            for gradient in gradients:
                torch.ops.riskmap_ext._scale_gradient_(gradient, grad_loss)
        return (None, None, None, *ctx.ops.of_inputs(gradients, wanted))


def _again(ctx: Any, grad_loss: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor]:
    """The gradients from the op that computes them in its backward pass."""
    ops, options, inputs = ctx.ops, ctx.options, ctx.saved_tensors
    with torch.no_grad():
        _, *factors = ops.call("", *inputs, None, *options.of_cross_entropy, *options.of_dice)
    return ops.call(
        "_backward", grad_loss, *inputs, *factors, *options.of_gradient, *ops.flags(wanted)
    )


@torch.library.register_fake("riskmap_ext::_scale_gradient_")
def _scale_gradient_fake(gradient: Tensor, factor: Tensor) -> None:
    return None
