"""The transfer risk map in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from riskmap_ext._arguments import RiskOptions, map_arguments, risk_options
from riskmap_ext.reference._check_values import check_labels, check_weights, wanted
from riskmap_ext.reference.leep import voxel_likelihood

MIN_RANGE = 0.1


def risk_map(
    source: Tensor,
    target: Tensor,
    conditional: Tensor,
    *,
    scheme: str = "linear",
    base: float = 10.0,
    alpha: float = 0.5,
    scale: float = 9.0,
    range: tuple[float, float] | None = None,
    background: int | None = 0,
    ignore_index: int = -100,
    regions: Tensor | None = None,
    _check_values: bool = True,
) -> Tensor:
    """Voxel weights [B, *S] float32 from the hardness h = -T; 0 at ignored voxels."""
    source, target, conditional, regions, ignore_index = map_arguments(
        source, target, conditional, ignore_index, regions
    )
    num_classes = conditional.size(0)
    options = risk_options(scheme, base, alpha, scale, range, background, num_classes)
    if wanted(_check_values, target):
        check_labels(target, num_classes, ignore_index)
        check_weights("conditional", conditional)
    hardness = -voxel_likelihood(source, target, conditional, regions, ignore_index).log()
    return voxel_weight(hardness, target, options, ignore_index)


def voxel_weight(
    hardness: Tensor, target: Tensor, options: RiskOptions, ignore_index: int
) -> Tensor:
    """Voxel weights [B, *S] float32 of the hardness [B, *S]."""
    labels = target.to(torch.int64)
    valid = labels != ignore_index
    if options.scheme == "power":
        weight = torch.exp(options.alpha * hardness)
    elif hardness.numel() == 0:
        weight = hardness
    else:
        position = _position_in_range(hardness, labels, valid, options.range, options.background)
        if options.scheme == "exponential":
            weight = torch.exp(math.log(options.base) * position)
        else:
            weight = 1.0 + options.scale * position
    return torch.where(valid, weight, 0.0).to(torch.float32)


def _position_in_range(
    hardness: Tensor,
    labels: Tensor,
    valid: Tensor,
    range: tuple[float, float] | None,
    background: int | None,
) -> Tensor:
    """clip((h - lo) / (hi - lo), 0, 1), and 0 (hence w = 1) if the range is degenerate."""
    if range is not None:
        span = range[1] - range[0]
        if span < MIN_RANGE:
            return torch.zeros_like(hardness)
        return ((hardness - range[0]) / span).clamp(0.0, 1.0)

    per_image = (-1,) + (1,) * (hardness.dim() - 1)
    known = valid & ~hardness.isnan()  # a NaN marks its own voxel, not the whole image
    lo = torch.where(known, hardness, math.inf).flatten(1).amin(dim=1).view(per_image)
    hi = torch.where(known, hardness, -math.inf).flatten(1).amax(dim=1).view(per_image)
    foreground = valid if background is None else valid & (labels != background)
    usable = foreground.flatten(1).any(dim=1).view(per_image) & ~(hi - lo < MIN_RANGE)
    position = (hardness - lo) / torch.where(usable, hi - lo, 1.0)
    return torch.where(usable, position.clamp(0.0, 1.0), 0.0)
