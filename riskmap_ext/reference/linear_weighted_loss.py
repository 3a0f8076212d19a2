"""The weighted loss from features in plain PyTorch: first the logits, then the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from riskmap_ext._arguments import compute_dtype
from riskmap_ext._loss_arguments import head_tensors
from riskmap_ext.reference.weighted_loss import weighted_loss


def linear_weighted_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    risk: Tensor | None = None,
    *,
    class_weight: Tensor | Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """weighted_loss of logits W z + b, [B, C, *S], with the options of weighted_loss."""
    head = head_tensors(features, weight, bias)
    dtype = compute_dtype(head.features.dtype)
    logits = torch.einsum("cf,bf...->bc...", head.weight.to(dtype), head.features.to(dtype))
    if head.bias is not None:
        logits = logits + head.bias.to(dtype).view(-1, *(1,) * (features.dim() - 2))
    return weighted_loss(logits, target, risk, weight=class_weight, **options)
