"""Checks of the reference that read voxels (and so synchronise a device)."""

from __future__ import annotations

import torch
from torch import Tensor


def check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise unless every label [B, *S] is integral and in 0..num_classes-1 or ignore_index."""
    labels = target.to(torch.int64)
    inside = ((labels >= 0) & (labels < num_classes)) | (labels == ignore_index)
    if target.is_floating_point():
        inside &= target == labels
    bad = ~inside
    count = int(bad.sum())
    if count:
        position = bad.nonzero()[0].tolist()
        value = target[tuple(position)].item()
        raise ValueError(
            f"target: expected integral labels 0..{num_classes - 1} or ignore_index "
            f"{ignore_index}, found {count} other voxel(s), the first {value} at {position}"
        )


def check_weights(name: str, values: Tensor, where: Tensor | None = None) -> None:
    """Raise unless the values (only those selected by the mask ``where``) are finite and >= 0."""
    good = torch.isfinite(values) & (values >= 0)
    bad = ~good if where is None else ~good & where
    count = int(bad.sum())
    if count:
        position = bad.nonzero()[0].tolist()
        value = values[tuple(position)].item()
        raise ValueError(
            f"{name}: expected finite values >= 0, found {count} other value(s), "
            f"the first {value} at {position}"
        )


def wanted(flag: bool, tensor: Tensor) -> bool:
    """Whether values can and should be read: not while compiling, not on tensors without data."""
    return flag and not torch.compiler.is_compiling() and not tensor.is_meta
