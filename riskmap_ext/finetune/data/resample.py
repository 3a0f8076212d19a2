"""Resampling of volumes to another voxel size, refused where the outcome is absurd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacing
from torch import Tensor

from riskmap_ext.finetune.base.device import available_memory
from riskmap_ext.finetune.base.errors import DataError

_MAX_VOXELS = 2**31 - 1
_MIN_SIZE = 4
# Image, label and mask, and the float64 copies and sampling grid while they are made.
_BYTES_PER_VOXEL = 64


def resample(
    volumes: Sequence[Tensor], affine: np.ndarray, spacing: Sequence[float]
) -> tuple[list[Tensor], np.ndarray]:
    """[image, label, mask] at `spacing` mm: image linearly, label and mask to the nearest voxel.

    The image is [M, X, Y, Z], label and mask are [X, Y, Z].
    """
    out = []
    for volume, mode in zip(volumes, ("bilinear", "nearest", "nearest"), strict=True):
        transform = Spacing(pixdim=spacing, mode=mode, padding_mode="border")
        values, moved = transformed(volume, affine, transform)
        out.append(values)
    return out, moved


def transformed(
    volume: Tensor, affine: np.ndarray, transform: Callable[..., Any], **options: Any
) -> tuple[Tensor, np.ndarray]:
    """A volume [..., X, Y, Z] and its affine after a transform of MONAI; its type stays."""
    lead = volume.shape[:-3]
    channels = volume.reshape(-1, *volume.shape[-3:]).float()
    out = transform(MetaTensor(channels, affine=torch.as_tensor(affine)), **options)
    values = out.as_tensor().reshape(*lead, *out.shape[-3:])
    return values.to(volume.dtype).contiguous(), np.asarray(out.affine, dtype=np.float64)


def resampled_shape(
    shape: Sequence[int], sizes: Sequence[float], spacing: Sequence[float]
) -> list[int]:
    """Voxels along each axis once voxels of `sizes` mm have become such of `spacing` mm."""
    # From the first voxel's centre to the last one's, as the transform counts.
    return [
        round((n - 1) * size / wanted + 1)
        for n, size, wanted in zip(shape, sizes, spacing, strict=True)
    ]


def check_spacing(
    path: Path, shape: Sequence[int], sizes: Sequence[float], spacing: Sequence[float]
) -> None:
    """Refuses a spacing that leaves next to nothing of `path`, or more than memory holds.

    Raises: DataError with the resulting shape, before anything of that size is made.
    """
    result = resampled_shape(shape, sizes, spacing)
    made = (
        f"{path}: data.spacing {[float(v) for v in spacing]} mm makes {_by(result)} of its "
        f"{_by(shape)} voxels of {_by(f'{size:.3g}' for size in sizes)} mm"
    )
    if any(after < min(_MIN_SIZE, before) for after, before in zip(result, shape, strict=True)):
        raise DataError(f"{made}; expected {_MIN_SIZE} or more along each axis: use finer voxels")
    voxels = int(np.prod([float(n) for n in result]))
    needed, available = voxels * _BYTES_PER_VOXEL, available_memory()
    if voxels > _MAX_VOXELS or needed > available / 2:
        raise DataError(
            f"{made}, which takes about {needed / 2**30:.3g} GiB; expected no more than half of "
            f"the {available / 2**30:.3g} GiB of memory available, and less than 2^31 voxels: use "
            "coarser voxels"
        )


def _by(sizes: Iterable[object]) -> str:
    return " x ".join(map(str, sizes))
