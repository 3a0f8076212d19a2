"""Risk-weighted cross-entropy plus soft Dice, with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from riskmap_ext._arguments import (
    NORMALIZATIONS,
    REDUCTIONS,
    REGIONS,
    compute_dtype,
    loss_options,
    loss_tensors,
)
from riskmap_ext.ops import in_forward


def weighted_loss(
    logits: Tensor,
    target: Tensor,
    risk: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    background: int | None = 0,
    foreground: Tensor | None = None,
    foreground_floor: float = 0.05,
    normalization: str = "foreground",
    region: str = "valid",
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ce_weight: float = 1.0,
    dice_weight: float = 0.0,
    include_background: bool = False,
    batch_dice: bool = False,
    regions: Tensor | None = None,
) -> Tensor:
    r"""Foreground-normalised, risk-weighted segmentation loss: ``ce_weight * L + dice_weight * D``.

    Cross-entropy part of image b, with voxel weights w (``risk``) and class weights c
    (``weight``):

    .. math:: L_b = \frac{1}{N_b} \sum_{p \in R_b} w_p\, c[y_p]\, \mathrm{CE}_p, \qquad
              \mathrm{CE}_p = -\log \mathrm{softmax}(x_p)[y_p]

    with label smoothing as in :func:`torch.nn.functional.cross_entropy`. Voxels labelled
    ``ignore_index`` are not valid and count nowhere. An image without valid voxels adds 0 and has
    zero gradient. F, the foreground: valid voxels with a label other than ``background``, or
    inside the mask ``foreground``. V: all valid voxels.

    ================== ========================================================================
    ``normalization``  :math:`N_b`
    ================== ========================================================================
    foreground         max(#F_b, foreground_floor * #V_b); #V_b where F_b is empty
    batch_foreground   the same from the sums over the batch, divided by the number of images
    valid              #V_b; equals torch's mean for one image
    none               1
    ================== ========================================================================

    Soft Dice part from the same softmax, over valid voxels, unweighted:

    .. math:: D = 1 - \mathrm{mean}_k \frac{2 \sum_p \pi_p[k]\,1[y_p = k] + \epsilon}
              {\sum_p \pi_p[k] + \sum_p 1[y_p = k] + \epsilon}, \qquad \epsilon = 10^{-5}

    With ``regions`` the C channels are overlapping regions (one sigmoid each, as in BraTS), while
    ``target`` stays a map of labels: :math:`\mathrm{CE}_p = \frac{1}{C} \sum_r c[r]\,
    \mathrm{BCE}(x_p[r], t_p[r])` with :math:`t_p[r]` = ``regions[r, y_p]`` (label smoothing turns
    t into t (1 - s) + s / 2), :math:`\pi` is the sigmoid, and the Dice of every region counts.

    Args:
        logits: [B, C, \*S] with 1 to 3 spatial dimensions; float32, float64, float16 or bfloat16.
            Contiguous and channels-last memory is read in place, other strides are copied first.
            Read as they are under autocast: sums and logarithms run in float32 or better.
        target: labels 0 .. C - 1 or ``ignore_index``, [B, \*S] or [B, 1, \*S]; any integer dtype,
            bool, or integral floats.
        risk: voxel weights, finite and >= 0 at valid voxels, [B, \*S] or [B, 1, \*S], floating;
            None: 1. May require grad.
        weight: class weights [C], floating, finite and >= 0; None: 1. No gradient flows to it.
        ignore_index: label of voxels that count nowhere.
        background: class that is no foreground; None: every valid voxel is foreground.
        foreground: mask of the image's own foreground (brain or body, not air), made on the
            un-augmented image; [B, \*S] or [B, 1, \*S], bool or integer, non-zero is inside.
        foreground_floor: in [0, 1]; 1 / foreground_floor is the most that a small foreground can
            scale the loss up by.
        normalization: see the table.
        region: voxels that are summed, "valid" or "foreground" (F).
        reduction: "mean" or "sum" over images; "none": the map ce_weight * w * c * CE, [B, \*S],
            not normalised, 0 outside the region.
        label_smoothing: in [0, 1].
        ce_weight, dice_weight: finite, >= 0.
        include_background: whether the Dice of the background class counts.
        batch_dice: one Dice over the voxels of the whole batch instead of one per image.
        regions: table [C, L], bool or 0/1, of the labels that make up each region; labels and
            ``background`` are then 0 .. L - 1. None: classes that exclude each other (softmax).

    Returns:
        A scalar, or the map for reduction="none"; float32 (float64 for float64 logits).
        Differentiable once with respect to ``logits`` and ``risk``; bitwise the same from run to
        run and for any number of threads. An empty batch gives 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or options that do not fit, a label outside 0 .. C - 1, a risk or class
            weight that is negative or not finite. On a GPU an error for values would have to wait
            for the device: there the loss is NaN (for reduction="none", that of the voxel), and
            with it the gradient of the image.
        RuntimeError: on a second derivative, a forward-mode derivative, or one of torch.func.

    Source: S. Duan et al., "Transfer Risk Map: Mitigating Pixel-level Negative Transfer in Medical
    Segmentation", ICASSP 2025 (arXiv 2502.02340). Union, floor and fall-back of the foreground are
    this package's reading; docs/method.md says why.
    """
    tensors = loss_tensors(logits, target, risk, weight, foreground, regions)
    options = loss_options(
        tensors.num_labels,
        has_regions=tensors.regions is not None,
        ignore_index=ignore_index,
        background=background,
        foreground_floor=foreground_floor,
        normalization=normalization,
        region=region,
        reduction=reduction,
        label_smoothing=label_smoothing,
        ce_weight=ce_weight,
        dice_weight=dice_weight,
        include_background=include_background,
        batch_dice=batch_dice,
    )
    inputs = (
        tensors.logits,
        tensors.target,
        tensors.risk,
        None if tensors.weight is None else tensors.weight.detach(),
        tensors.foreground,
        tensors.regions,
        options.ignore_index,
        options.background,
        options.foreground_floor,
        NORMALIZATIONS.index(options.normalization),
        REGIONS.index(options.region),
        REDUCTIONS.index(options.reduction),
        options.label_smoothing,
        options.ce_weight,
    )
    dice = (options.dice_weight, options.include_background, options.batch_dice)
    _require_reverse_mode(tensors.logits, tensors.risk)
    if in_forward.applies(tensors.logits, tensors.risk, options):
        return in_forward.weighted_loss(*inputs)
    return torch.ops.riskmap_ext.weighted_loss(*inputs, *dice)[0]


def _require_reverse_mode(*tensors: Tensor | None) -> None:
    """Torch drops the tangents of a custom op in silence, and does not name it in torch.func."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        of_torch_func = torch._C._functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad
        if of_torch_func or unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "riskmap_ext.weighted_loss is differentiated by backward() and "
                "torch.autograd.grad only, not by forward-mode derivatives or torch.func (grad, "
                "vjp, jvp, ...). Use riskmap_ext.reference.weighted_loss for those."
            )


_NUM_INPUTS = 17
_NONE = REDUCTIONS.index("none")


@torch.library.register_fake("riskmap_ext::weighted_loss")
def _fake(
    logits: Tensor,
    target: Tensor,
    risk: Tensor | None,
    weight: Tensor | None,
    foreground: Tensor | None,
    regions: Tensor | None,
    ignore_index: int,
    background: int | None,
    foreground_floor: float,
    normalization: int,
    region: int,
    reduction: int,
    label_smoothing: float,
    ce_weight: float,
    dice_weight: float,
    include_background: bool,
    batch_dice: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = logits.shape[:2]
    shape = (batch, *logits.shape[2:]) if reduction == _NONE else ()
    slopes = (batch, 2, classes) if dice_weight != 0 else (0,)
    return (
        logits.new_empty(shape, dtype=compute_dtype(logits.dtype)),
        logits.new_empty((batch,), dtype=torch.float64),
        logits.new_empty(slopes, dtype=torch.float64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.ignore_index, ctx.background = inputs[6:8]
    ctx.region, ctx.label_smoothing = inputs[10], inputs[12]
    _, scale, dice_slopes = output
    ctx.mark_non_differentiable(scale, dice_slopes)
    ctx.set_materialize_grads(False)  # zeros for the outputs nobody differentiates cost memory
    ctx.save_for_backward(*inputs[:6], scale, dice_slopes)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * _NUM_INPUTS
    saved = ctx.saved_tensors  # asked for once: checkpointing recomputes at every call
    grad_logits, grad_risk = torch.ops.riskmap_ext._weighted_loss_backward(
        grad_loss,
        *saved,
        ctx.ignore_index,
        ctx.background,
        ctx.region,
        ctx.label_smoothing,
        saved[2] is not None and ctx.needs_input_grad[2],
    )
    first = grad_logits if ctx.needs_input_grad[0] else None
    third = grad_risk if ctx.needs_input_grad[2] else None
    return (first, None, third) + (None,) * (_NUM_INPUTS - 3)


torch.library.register_autograd(
    "riskmap_ext::weighted_loss", _backward, setup_context=_setup_context
)


@torch.library.register_fake("riskmap_ext::_weighted_loss_backward")
def _backward_fake(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    risk: Tensor | None,
    weight: Tensor | None,
    foreground: Tensor | None,
    regions: Tensor | None,
    scale: Tensor,
    dice_slopes: Tensor,
    ignore_index: int,
    background: int | None,
    region: int,
    label_smoothing: float,
    grad_risk: bool,
) -> tuple[Tensor, Tensor]:
    grad_logits = torch.empty_like(logits)
    if not grad_risk:
        return grad_logits, logits.new_empty((0,), dtype=torch.float32)
    assert risk is not None
    shape = (logits.size(0), *logits.shape[2:])
    return grad_logits, logits.new_empty(shape, dtype=risk.dtype)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "riskmap_ext.weighted_loss has no second derivative: its backward pass cannot be "
        "differentiated (create_graph=True with a later backward, gradient penalties). Use "
        "riskmap_ext.reference.weighted_loss for that."
    )


torch.library.register_autograd("riskmap_ext::_weighted_loss_backward", _no_second_derivative)


@torch.library.register_fake("riskmap_ext::_weighted_loss_with_gradient")
def _with_gradient_fake(
    logits: Tensor,
    target: Tensor,
    risk: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty((), dtype=compute_dtype(logits.dtype))
    grad_risk = options[-1]
    shape = (logits.size(0), *logits.shape[2:]) if grad_risk else (0,)
    dtype = risk.dtype if risk is not None and grad_risk else torch.float32
    return loss, torch.empty_like(logits), logits.new_empty(shape, dtype=dtype)
