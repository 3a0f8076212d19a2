"""The risk-weighted cross-entropy plus soft Dice in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._arguments import compute_dtype
from riskmap_ext._loss_arguments import LossOptions, LossTensors, dice_classes, loss_tensors
from riskmap_ext.reference._check_values import check_labels, check_weights, wanted

DICE_MIN_DENOMINATOR = 1e-8


def weighted_loss(
    logits: Tensor,
    target: Tensor,
    risk: Tensor | None = None,
    *,
    weight: Tensor | Sequence[float] | None = None,
    dice_class_weight: Tensor | Sequence[float] | None = None,
    foreground: Tensor | None = None,
    regions: Tensor | None = None,
    _check_values: bool = True,
    **options: Any,
) -> Tensor:
    """ce_weight * L + dice_weight * L_dice, a scalar, or the voxel map for reduction="none".

    The options are those of :func:`riskmap_ext.weighted_loss`; ``overwrite_logits`` has no effect
    here: a formula of PyTorch needs its logits.
    """
    tensors = loss_tensors(logits, target, risk, weight, foreground, regions, dice_class_weight)
    return _loss(tensors, tensors.options(**options), _check_values)


def _loss(tensors: LossTensors, options: LossOptions, check_values: bool) -> Tensor:
    logits, target, risk, weight, foreground, regions, dice_class_weight = tensors
    if options.sync_dice:
        raise ValueError("sync_dice: expected False in the reference, which runs in one process")
    labels = target.to(torch.int64)
    valid = labels != options.ignore_index
    if wanted(check_values, target):
        check_labels(target, tensors.num_labels, options.ignore_index)
        if risk is not None:
            check_weights("risk", risk, valid)
        for name, each in (("weight", weight), ("dice_class_weight", dice_class_weight)):
            if each is not None:
                check_weights(name, each)

    labels = torch.where(valid, labels, 0)
    inside = _foreground_voxels(labels, valid, foreground, options.background)
    summed = inside if options.ce_voxels == "foreground" else valid
    if options.ce_weight == 0:  # switched off: even an infinite cross-entropy is ignored
        summed = torch.zeros_like(summed)

    # Unused voxels are blanked, so that not even their NaN reaches the gradient.
    used = valid if options.dice_weight > 0 else summed
    logits = torch.where(used.unsqueeze(1), logits.to(compute_dtype(logits.dtype)), 0.0)
    if regions is None:
        log_probabilities = torch.log_softmax(logits, dim=1)
        probabilities = log_probabilities.exp()
        truth = _one_hot(labels, logits.size(1), valid)
        averaged = dice_classes(logits.size(1), options.background, options.include_background)
        voxel_loss = _cross_entropy(log_probabilities, labels, weight, options.label_smoothing)
    else:
        probabilities = torch.sigmoid(logits)
        inside_region = regions.t()[labels].movedim(-1, 1)  # [B, R, *S]
        truth = inside_region & valid.unsqueeze(1)
        averaged = tuple(range(logits.size(1)))
        voxel_loss = _binary_cross_entropy(logits, inside_region, weight, options.label_smoothing)

    if risk is not None:
        voxel_loss = torch.where(summed, risk, 0.0).to(voxel_loss.dtype) * voxel_loss
    voxel_loss = options.ce_weight * torch.where(summed, voxel_loss, 0.0)
    if options.reduction == "none":
        return voxel_loss

    class_weight_of = None if weight is None or regions is not None else weight[labels]
    image_loss = voxel_loss.flatten(1).sum(dim=1) / _normalizer(
        valid, inside, class_weight_of, options, voxel_loss.dtype
    )
    total = _reduce_images(image_loss, options.reduction)
    if options.dice_weight > 0 and logits.size(0) > 0:
        total = total + options.dice_weight * _dice_loss(
            probabilities, truth, valid, averaged, dice_class_weight, options
        )
    return total


def _foreground_voxels(
    labels: Tensor, valid: Tensor, mask: Tensor | None, background: int | None
) -> Tensor:
    if background is None:
        return valid
    inside = labels != background
    if mask is not None:
        inside = inside | mask.to(torch.bool)
    return inside & valid


def _cross_entropy(
    log_probabilities: Tensor, labels: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """[B, *S], as torch.nn.functional.cross_entropy with reduction="none"."""
    loss = -log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    if weight is not None:
        weight = weight.detach().to(loss.dtype)
        loss = weight[labels] * loss
    if label_smoothing > 0:
        num_classes = log_probabilities.size(1)
        smooth = -log_probabilities
        if weight is not None:
            smooth = weight.view(-1, *(1,) * (smooth.dim() - 2)) * smooth
        loss = (1 - label_smoothing) * loss + label_smoothing / num_classes * smooth.sum(dim=1)
    return loss


def _binary_cross_entropy(
    logits: Tensor, inside: Tensor, weight: Tensor | None, label_smoothing: float
) -> Tensor:
    """[B, *S], the mean over regions."""
    target = inside.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    # As binary_cross_entropy_with_logits, but an infinite logit of the right sign costs nothing.
    logsigmoid = torch.nn.functional.logsigmoid
    loss = torch.where(target > 0, -target * logsigmoid(logits), 0.0)
    loss = loss + torch.where(target < 1, (target - 1) * logsigmoid(-logits), 0.0)
    if weight is not None:
        weight = weight.detach().to(loss.dtype)
        loss = weight.view(-1, *(1,) * (loss.dim() - 2)) * loss
    return loss.mean(dim=1)


def _one_hot(labels: Tensor, num_classes: int, valid: Tensor) -> Tensor:
    classes = torch.arange(num_classes, device=labels.device)
    classes = classes.view(-1, *(1,) * (labels.dim() - 1))
    return (labels.unsqueeze(1) == classes) & valid.unsqueeze(1)


def _normalizer(
    valid: Tensor,
    inside: Tensor,
    class_weight_of: Tensor | None,
    options: LossOptions,
    dtype: torch.dtype,
) -> Tensor:
    """N_b, [B]; infinite where it would be 0, as without valid voxels: then L_b is 0."""
    num_valid = valid.flatten(1).sum(dim=1).to(dtype)
    if options.normalization == "none":
        return torch.ones_like(num_valid)
    if options.normalization == "valid":
        size = num_valid
    elif options.normalization in ("batch_valid", "weighted"):
        weights = valid.to(dtype)
        if options.normalization == "weighted" and class_weight_of is not None:
            weights = weights * class_weight_of.to(dtype)
        size = (weights.sum() / max(valid.size(0), 1)).expand_as(num_valid)
    else:
        num_inside = inside.flatten(1).sum(dim=1).to(dtype)
        if options.normalization == "batch_foreground":
            images = max(valid.size(0), 1)
            num_inside = (num_inside.sum() / images).expand_as(num_inside)
            num_valid = (num_valid.sum() / images).expand_as(num_valid)
        floored = torch.maximum(num_inside, options.foreground_floor * num_valid)
        size = torch.where(num_inside > 0, floored, num_valid)
    return torch.where(size > 0, size, torch.inf)


def _dice_loss(
    probabilities: Tensor,
    truth: Tensor,
    valid: Tensor,
    averaged: tuple[int, ...],
    class_weight: Tensor | None,
    options: LossOptions,
) -> Tensor:
    probabilities = torch.where(valid.unsqueeze(1), probabilities, 0.0)
    truth = truth.to(probabilities.dtype)

    overlap = (probabilities * truth).flatten(2).sum(dim=2)  # [B, C]
    predicted = probabilities.square() if options.squared_pred else probabilities
    sums = overlap, predicted.flatten(2).sum(dim=2), truth.flatten(2).sum(dim=2)
    overlap, size, labelled = (each.sum(dim=0) for each in sums) if options.batch_dice else sums
    union = overlap + options.alpha * (size - overlap) + options.beta * (labelled - overlap)
    denominator = (2 * union + options.smooth_dr).clamp(min=DICE_MIN_DENOMINATOR)
    loss = 1 - (2 * overlap + options.smooth_nr) / denominator
    if class_weight is not None:
        loss = class_weight.to(loss.dtype) * loss
    loss = loss[..., list(averaged)].mean(dim=-1)
    return loss if options.batch_dice else _reduce_images(loss, options.reduction)


def _reduce_images(loss: Tensor, reduction: str) -> Tensor:
    return loss.sum() / max(loss.size(0), 1) if reduction == "mean" else loss.sum()
