"""LEEP statistics and the transferability map in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from riskmap_ext._arguments import (
    compute_dtype,
    leep_arguments,
    map_arguments,
    validate_joint,
)
from riskmap_ext.reference._check_values import check_labels, check_weights, wanted

MIN_LIKELIHOOD = 1e-6


def leep_statistics(
    source: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int = -100,
    _check_values: bool = True,
) -> Tensor:
    """J[y, z] = sum of softmax(source)[z] over the valid voxels labelled y; [C, Z] float64."""
    source, target, num_classes, ignore_index = leep_arguments(
        source, target, num_classes, ignore_index
    )
    if wanted(_check_values, target):
        check_labels(target, num_classes, ignore_index)
    labels = target.to(torch.int64)
    valid = labels != ignore_index
    theta = torch.where(valid.unsqueeze(1), _source_probabilities(source), 0.0)
    rows = torch.where(valid, labels, 0).flatten()
    joint = torch.zeros(num_classes, source.size(1), dtype=torch.float64, device=source.device)
    return joint.index_add(0, rows, theta.movedim(1, -1).flatten(0, -2).to(torch.float64))


def conditional(joint: Tensor, *, _check_values: bool = True) -> Tensor:
    """P(y|z) = J[y, z] / sum over y of J[y, z]; [C, Z] float64, columns without mass are zero."""
    joint = validate_joint(joint).detach()
    if wanted(_check_values, joint):
        check_weights("joint", joint)
    joint = joint.to(torch.float64)
    mass = joint.sum(dim=0)
    return torch.where(mass > 0, joint / torch.where(mass > 0, mass, 1.0), 0.0)


def transferability_map(
    source: Tensor,
    target: Tensor,
    conditional: Tensor,
    *,
    ignore_index: int = -100,
    _check_values: bool = True,
) -> Tensor:
    """T = log max(sum_z P(y|z) softmax(source)[z], 1e-6) <= 0; [B, *S] float32, 0 if ignored."""
    source, target, conditional, ignore_index = map_arguments(
        source, target, conditional, ignore_index
    )
    if wanted(_check_values, target):
        check_labels(target, conditional.size(0), ignore_index)
        check_weights("conditional", conditional)
    valid = target.to(torch.int64) != ignore_index
    likelihood = voxel_likelihood(source, target, conditional, ignore_index)
    return torch.where(valid, likelihood.log(), 0.0).to(torch.float32)


def voxel_likelihood(
    source: Tensor, target: Tensor, conditional: Tensor, ignore_index: int
) -> Tensor:
    """p within [1e-6, 1] at each voxel, [B, *S] in the compute dtype of ``source``."""
    theta = _source_probabilities(source)
    labels = target.to(torch.int64)
    rows = torch.where(labels != ignore_index, labels, 0)
    given = conditional.detach().to(theta.dtype)[rows].movedim(-1, 1)
    return (given * theta).sum(dim=1).clamp(MIN_LIKELIHOOD, 1.0)


def _source_probabilities(source: Tensor) -> Tensor:
    return torch.softmax(source.detach().to(compute_dtype(source.dtype)), dim=1)
