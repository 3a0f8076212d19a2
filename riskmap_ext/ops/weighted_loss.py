"""Risk-weighted cross-entropy plus soft Dice, with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._arguments import compute_dtype
from riskmap_ext._loss_arguments import loss_tensors
from riskmap_ext.ops import in_backward, in_forward, overwriting, synced_dice
from riskmap_ext.ops.loss_ops import (
    OF_LOGITS,
    fake_grad_risk,
    fake_loss,
    register_autograd,
    require_reverse_mode,
)


def weighted_loss(
    logits: Tensor,
    target: Tensor,
    risk: Tensor | None = None,
    *,
    weight: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    background: int | None = 0,
    foreground: Tensor | None = None,
    foreground_floor: float = 0.05,
    normalization: str | None = None,
    ce_voxels: str = "valid",
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    ce_weight: float = 1.0,
    dice_weight: float = 0.0,
    dice_class_weight: Tensor | Sequence[float] | None = None,
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    alpha: float = 0.5,
    beta: float = 0.5,
    squared_pred: bool = False,
    include_background: bool = False,
    batch_dice: bool = False,
    sync_dice: bool = False,
    regions: Tensor | None = None,
    overwrite_logits: bool = False,
) -> Tensor:
    r"""Foreground-normalised, risk-weighted segmentation loss: ``ce_weight * L + dice_weight * D``.

    ``risk`` may be any map of non-negative voxel weights: a transfer risk map, weights near
    boundaries, an uncertainty; None is the plain loss, with or without class weights (``weight``).

    Cross-entropy part of image b, with voxel weights w (``risk``) and class weights c
    (``weight``):

    .. math:: L_b = \frac{1}{N_b} \sum_{p \in R_b} w_p\, c[y_p]\, \mathrm{CE}_p, \qquad
              \mathrm{CE}_p = -\log \mathrm{softmax}(x_p)[y_p]

    with label smoothing as in :func:`torch.nn.functional.cross_entropy`. Voxels labelled
    ``ignore_index`` are not valid and are excluded from everything. An image without valid voxels
    has L_b = 0 and zero gradient. F, the foreground: valid voxels with a label other than
    ``background``, or inside the mask ``foreground``. V: all valid voxels.

    ================== ========================================================================
    ``normalization``  :math:`N_b`
    ================== ========================================================================
    foreground         max(#F_b, foreground_floor * #V_b); #V_b if F_b is empty
    batch_foreground   the same from the sums over the batch, divided by the number of images
    valid              #V_b; equals torch's mean for one image
    batch_valid        the same from the sum over the batch, divided by the number of images:
                       torch's mean
    weighted           the same with the sum of c[y] over the valid voxels of the batch: torch's
                       mean with class weights; L is 0 where the sum is
    none               1
    ================== ========================================================================

    Soft Dice part from the same softmax, over valid voxels, not weighted by the risk, with class
    weights d (``dice_class_weight``), :math:`I_k = \sum_p \pi_p[k]\,1[y_p = k]`,
    :math:`P_k = \sum_p \pi_p[k]` (:math:`\pi^2` with ``squared_pred``),
    :math:`G_k = \sum_p 1[y_p = k]`:

    .. math:: D = \mathrm{mean}_k\; d_k \left(1 - \frac{2 I_k + \mathrm{smooth\_nr}}
              {\max(2 U_k + \mathrm{smooth\_dr},\ 10^{-8})}\right), \qquad
              U_k = I_k + \alpha (P_k - I_k) + \beta (G_k - I_k)

    :math:`\alpha = \beta = 1/2` is Dice (2 U = P + G), :math:`\alpha = \beta = 1` is
    Jaccard, other values are Tversky. A class that is neither labelled nor predicted scores
    smooth_nr / smooth_dr, or 0 if both are 0.

    With ``regions`` the C channels are overlapping regions (one sigmoid each, as in BraTS), while
    ``target`` stays a map of labels: :math:`\mathrm{CE}_p = \frac{1}{C} \sum_r c[r]\,
    \mathrm{BCE}(x_p[r], t_p[r])` with :math:`t_p[r]` = ``regions[r, y_p]`` (label smoothing turns
    t into t (1 - s) + s / 2), :math:`\pi` is the sigmoid, and the Dice averages over every region.

    Args:
        logits: [B, C, \*S] with 1 to 3 spatial dimensions; float32, float64, float16 or bfloat16.
            Contiguous and channels-last memory is read in place, other strides are copied first.
            Autocast does not change their dtype: sums and logarithms run in float32 or better.
        target: labels 0 .. C - 1 or ``ignore_index``, [B, \*S] or [B, 1, \*S]; any integer dtype,
            bool, or integral floats.
        risk: voxel weights, finite and >= 0 at valid voxels, [B, \*S] or [B, 1, \*S], floating;
            None: 1. May require grad.
        weight: class weights [C] of the cross-entropy, c; a floating tensor or a sequence of
            numbers, finite and >= 0; None: 1. No gradient flows to it.
        ignore_index: label of voxels to ignore.
        background: class that is not foreground; None: every valid voxel is foreground.
        foreground: mask of the image's own foreground (brain or body, not air), computed on the
            un-augmented image; [B, \*S] or [B, 1, \*S], bool or integer, non-zero is inside.
        foreground_floor: in [0, 1]; 1 / foreground_floor is the largest factor by which a small
            foreground can scale up the loss.
        normalization: see the table. None: "foreground" with a mask ``foreground``, else "valid",
            where every valid voxel counts as the image's foreground.
        ce_voxels: the voxels R of the cross-entropy: "valid" (V) or "foreground" (F).
        reduction: "mean" or "sum" over images; "none": the map ce_weight * w * c * CE, [B, \*S],
            not normalised, 0 at voxels outside R.
        label_smoothing: in [0, 1].
        ce_weight, dice_weight: finite, >= 0.
        dice_class_weight: class weights [C] of the Dice, d, as ``weight``; None: 1.
        smooth_nr, smooth_dr: finite, >= 0.
        alpha, beta: weights of false positives and false negatives, see above; finite, >= 0.
        squared_pred: squared probabilities in the denominator of the Dice.
        include_background: whether to include the Dice of the background class.
        batch_dice: one Dice over the voxels of the whole batch instead of one per image.
        sync_dice: with ``batch_dice``, one Dice over the batches of all processes of
            ``torch.distributed`` (if it is initialised). The gradient is that of the sum of the
            processes' losses; DistributedDataParallel averages gradients, which gives that of one
            process with the whole batch. Every process must call it, even with an empty batch,
            which gets 0; if one raises an error, the others get NaN. It breaks the graph of
            torch.compile.
        regions: table [C, L], bool or 0/1, of the labels that make up each region; labels and
            ``background`` are then 0 .. L - 1. None: mutually exclusive classes (softmax).
        overwrite_logits: whether to store the gradient in the memory of ``logits``, which
            overwrites them: in the forward pass if it computes the gradient
            (:func:`riskmap_ext.gradient_in_forward`), else in the backward pass. Anything else that
            reads them, such as a metric, must run before. Only one backward pass is possible. Use
            it for a network's output: not for a leaf, a part of a larger tensor, or memory with
            gaps. If another operation needs the logits for its own backward pass, torch raises its
            error about an inplace operation; ``logits.retain_grad()`` keeps nothing. Nothing is
            overwritten if the logits need no gradient, or within torch.compile, which plans memory
            itself.

    Returns:
        A scalar, or the map for reduction="none"; float32 (float64 for float64 logits).
        Differentiable once with respect to ``logits`` and ``risk``; bitwise the same from run to
        run and for any number of threads. An empty batch gives 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: incompatible shapes or options, a label outside 0 .. C - 1, a risk or class
            weight that is negative or not finite. On a GPU, raising an error for values would have
            to wait for the device: there the loss is NaN (for reduction="none", that of the voxel),
            and so is the gradient of the image.
        RuntimeError: on a second derivative, a forward-mode derivative, or one of torch.func; on
            a second backward pass with ``overwrite_logits``.

    Source: S. Duan et al., "Transfer Risk Map: Mitigating Pixel-level Negative Transfer in Medical
    Segmentation", ICASSP 2025 (arXiv 2502.02340). Union, floor and fallback of the foreground are
    this package's interpretation; docs/method.md says why.
    """
    tensors = loss_tensors(logits, target, risk, weight, foreground, regions, dice_class_weight)
    options = tensors.options(
        ignore_index=ignore_index,
        background=background,
        foreground_floor=foreground_floor,
        normalization=normalization,
        ce_voxels=ce_voxels,
        reduction=reduction,
        label_smoothing=label_smoothing,
        ce_weight=ce_weight,
        dice_weight=dice_weight,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        alpha=alpha,
        beta=beta,
        squared_pred=squared_pred,
        include_background=include_background,
        batch_dice=batch_dice,
        sync_dice=sync_dice,
        overwrite_logits=overwrite_logits,
    )
    require_reverse_mode(OF_LOGITS, tensors.logits, tensors.risk)
    overwrites = overwriting.applies(tensors.logits, options)
    if in_forward.applies(OF_LOGITS, tensors[:-1], options):
        return in_forward.loss(OF_LOGITS, tensors[:-1], options, overwrites)
    if overwrites or synced_dice.applies(options):
        return in_backward.loss(OF_LOGITS, tensors, options, overwrites)
    return OF_LOGITS.call("", *tensors, *options.of_cross_entropy, *options.of_dice)[0]


@torch.library.register_fake("riskmap_ext::weighted_loss")
def _fake(
    logits: Tensor,
    target: Tensor,
    risk: Tensor | None,
    class_weight: Tensor | None,
    foreground: Tensor | None,
    regions: Tensor | None,
    dice_class_weight: Tensor | None,
    ignore_index: int,
    background: int | None,
    foreground_floor: float,
    normalization: int,
    ce_voxels: int,
    reduction: int,
    label_smoothing: float,
    ce_weight: float,
    dice_weight: float,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_loss(logits, logits.size(1), reduction, dice_weight)


register_autograd(OF_LOGITS)


@torch.library.register_fake("riskmap_ext::_weighted_loss_backward")
def _backward_fake(
    grad_loss: Tensor, logits: Tensor, target: Tensor, risk: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), fake_grad_risk(logits, risk, options[-1])


@torch.library.register_fake("riskmap_ext::_weighted_loss_backward_")
def _backward_in_place_fake(*inputs: Any) -> Tensor:
    return _backward_fake(*inputs)[1]


@torch.library.register_fake("riskmap_ext::_weighted_loss_with_gradient")
def _with_gradient_fake(
    logits: Tensor, target: Tensor, risk: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss = logits.new_empty((), dtype=compute_dtype(logits.dtype))
    return loss, torch.empty_like(logits), fake_grad_risk(logits, risk, options[-1])


@torch.library.register_fake("riskmap_ext::_weighted_loss_with_gradient_")
def _with_gradient_in_place_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    loss, _, grad_risk = _with_gradient_fake(*inputs)
    return loss, grad_risk
