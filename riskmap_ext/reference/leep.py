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
    regions: Tensor | None = None,
    _check_values: bool = True,
) -> Tensor:
    """J[y, z] = sum of softmax(source)[z] over the valid voxels labelled y; [C, Z] float64."""
    source, target, regions, num_classes, ignore_index = leep_arguments(
        source, target, num_classes, ignore_index, regions
    )
    if wanted(_check_values, target):
        check_labels(target, num_classes, ignore_index)
    labels = target.to(torch.int64)
    valid = labels != ignore_index
    theta = torch.where(valid.unsqueeze(1), _source_probabilities(source, regions), 0.0)
    rows = torch.where(valid, labels, 0).flatten()
    joint = torch.zeros(num_classes, theta.size(1), dtype=torch.float64, device=source.device)
    return joint.index_add(0, rows, theta.movedim(1, -1).flatten(0, -2).to(torch.float64))


def conditional(joint: Tensor, *, _check_values: bool = True) -> Tensor:
    r"""Probability of each target label given a source class.

    .. math:: P(y|z) = J_{yz} \Big/ \sum_{y'} J_{y'z}

    Args:
        joint: J of :func:`leep_statistics`, [C, Z] floating, finite and >= 0.

    Returns:
        P(y|z), [C, Z] float64, on the device of ``joint``. Columns sum to 1; that of a source
        class without mass is zero. No gradient flows to ``joint``.

    Raises:
        TypeError: ``joint`` is not a floating tensor.
        ValueError: it is not two-dimensional, or holds a negative or non-finite value.

    Source: C. V. Nguyen et al., "LEEP: A New Measure to Evaluate Transferability of Learned
    Representations", ICML 2020.
    """
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
    regions: Tensor | None = None,
    _check_values: bool = True,
) -> Tensor:
    """T = log max(sum_z P(y|z) softmax(source)[z], 1e-6) <= 0; [B, *S] float32, 0 if ignored."""
    source, target, conditional, regions, ignore_index = map_arguments(
        source, target, conditional, ignore_index, regions
    )
    if wanted(_check_values, target):
        check_labels(target, conditional.size(0), ignore_index)
        check_weights("conditional", conditional)
    valid = target.to(torch.int64) != ignore_index
    likelihood = voxel_likelihood(source, target, conditional, regions, ignore_index)
    return torch.where(valid, likelihood.log(), 0.0).to(torch.float32)


def voxel_likelihood(
    source: Tensor,
    target: Tensor,
    conditional: Tensor,
    regions: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """p within [1e-6, 1] at each voxel, [B, *S] in the compute dtype of ``source``."""
    theta = _source_probabilities(source, regions)
    labels = target.to(torch.int64)
    rows = torch.where(labels != ignore_index, labels, 0)
    given = conditional.detach().to(theta.dtype)[rows].movedim(-1, 1)
    return (given * theta).sum(dim=1).clamp(MIN_LIKELIHOOD, 1.0)


def _source_probabilities(source: Tensor, regions: Tensor | None) -> Tensor:
    """theta, [B, Z, *S]; a label's logit is the sum of the logits of the regions it is in."""
    source = source.detach().to(compute_dtype(source.dtype))
    if regions is not None:
        inside = regions.view(1, *regions.shape, *(1,) * (source.dim() - 2))  # [1, R, Z, 1, ...]
        source = torch.where(inside, source.unsqueeze(2), 0.0).sum(dim=1)
    return torch.softmax(source, dim=1)
