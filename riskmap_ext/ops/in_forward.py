"""The weighted loss with its gradient made in the forward pass: one read of the logits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._arguments import validate_flag
from riskmap_ext._loss_arguments import LossOptions
from riskmap_ext.ops.loss_ops import LossOps

_NO_DICE = (0.0, 0.0, 0.0, 0.5, 0.5, False, False, False)  # as LossOptions.of_dice

_state = threading.local()  # as torch keeps its grad mode


def _enabled() -> bool:
    return getattr(_state, "enabled", True)


@contextmanager
def gradient_in_forward(enabled: bool) -> Iterator[None]:
    """Within the context, and in this thread, allow or forbid the gradient of the loss to be made
    in the forward pass.

    Allowed by default, and then used in eager mode where it is quicker and exact: cross-entropy
    only (``dice_weight=0``), reduced, float32, float64 or bfloat16 logits that require grad. The
    forward pass then reads the logits once and writes their gradient, which the backward pass
    hands over as it is, or scaled in place where the incoming gradient is not 1. Elsewhere
    (torch.compile and other tracing, Dice, ``reduction="none"``, ``normalization="weighted"`` with
    class weights, and float16 logits or risk, whose
    small gradients need the scale of a GradScaler before they are rounded) the backward pass makes
    the gradient from the logits.

    Both give the same numbers up to rounding. Forbid it where a forward pass that needs grad is
    often run without a backward pass.
    """
    enabled = validate_flag("enabled", enabled)
    before, _state.enabled = _enabled(), enabled
    try:
        yield
    finally:
        _state.enabled = before


def applies(ops: LossOps, tensors: Sequence[Tensor | None], options: LossOptions) -> bool:
    """``tensors``: as the op takes them, but for the class weights of the Dice."""
    volume, risk, weight = tensors[0], tensors[ops.risk], tensors[ops.risk + 1]
    assert volume is not None
    # The sum of the class weights is not known before the voxels of each class are.
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
        and not _is_traced(volume)
    )


def _is_traced(logits: Tensor) -> bool:
    """Whether the backward pass may not ask for the value of the incoming gradient."""
    return (
        logits.is_meta
        or not (type(logits) is Tensor or isinstance(logits, torch.nn.Parameter))  # FakeTensor
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0  # make_fx, FakeTensorMode
        or torch._C._are_functorch_transforms_active()
    )


def _is_batched(grad_loss: Tensor) -> bool:
    """Whether there are many incoming gradients: is_grads_batched=True, or vmap around backward."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad_loss) or functorch.is_batchedtensor(grad_loss)


def loss(ops: LossOps, tensors: Sequence[Tensor | None], options: LossOptions) -> Tensor:
    return _GradientInForward.apply(ops, *tensors, *options.of_cross_entropy)[0]


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ops: LossOps, *inputs: Any) -> tuple[Tensor, ...]:
        wanted = [each is not None and each.requires_grad for each in inputs[: ops.tensors]]
        return ops.call("_with_gradient", *inputs, *ops.flags(wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ops, *inputs_of_op = inputs
        gradients = output[1:]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.ops = ops
        ctx.options = inputs_of_op[ops.tensors :]
        ctx.save_for_backward(*inputs_of_op[: ops.tensors])
        ctx.gradients = gradients  # given away once, so not among the saved tensors

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Sequence[Tensor | None]:
        _, *wanted = ctx.needs_input_grad
        if grad_loss is None:
            return (None,) * (1 + len(wanted))
        # With retain_graph the first gradient belongs to whoever got it; with create_graph the op's
        # backward pass is there to refuse a second derivative.
        if ctx.gradients is None or torch.is_grad_enabled() or _is_batched(grad_loss):
            gradients = _again(ctx, grad_loss, wanted)
        else:
            gradients, ctx.gradients = ctx.gradients, None
            for gradient in gradients:
                torch.ops.riskmap_ext._scale_gradient_(gradient, grad_loss)
        return (None, *ctx.ops.of_inputs(gradients, wanted))


def _again(ctx: Any, grad_loss: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor]:
    """The gradients from the op that makes them in its backward pass."""
    inputs = ctx.saved_tensors
    ignore_index, background, _, _, ce_voxels, _, label_smoothing, _ = ctx.options
    with torch.no_grad():
        _, scale, dice_slopes = ctx.ops.call("", *inputs, None, *ctx.options, *_NO_DICE)
    return ctx.ops.call(
        "_backward",
        grad_loss,
        *inputs,
        scale,
        dice_slopes,
        ignore_index,
        background,
        ce_voxels,
        label_smoothing,
        False,
        *ctx.ops.flags(wanted),
    )


@torch.library.register_fake("riskmap_ext::_scale_gradient_")
def _scale_gradient_fake(gradient: Tensor, factor: Tensor) -> None:
    return None
