"""Resamples volumes to another voxel size; rejects absurd results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacing, SpatialResample
from scipy.ndimage import zoom
from torch import Tensor

from riskmap_ext.finetune.base.device import available_memory
from riskmap_ext.finetune.base.errors import DataError
from riskmap_ext.finetune.data.volumes import voxel_sizes

_MIN_SIZE = 4
# Image, label and mask, and the float64 copies and sampling grid needed to make them.
_BYTES_PER_VOXEL = 64


def resample(
    volumes: Sequence[Tensor], affine: np.ndarray, spacing: Sequence[float]
) -> tuple[list[Tensor], np.ndarray]:
    """[image, label, mask] at `spacing` mm: linear for the image, nearest voxel for the others.

    The image is [M, X, Y, Z], label and mask are [X, Y, Z].
    """
    out = []
    for volume, mode in zip(volumes, ("bilinear", "nearest", "nearest"), strict=True):
        transform = Spacing(pixdim=spacing, mode=mode, padding_mode="border")
        values, moved = _transformed(volume, affine, transform)
        out.append(values)
    return out, moved


def resized(
    volume: Tensor, affine: np.ndarray, wanted: np.ndarray, shape: Sequence[int], mode: str
) -> Tensor:
    """[..., X, Y, Z] on the grid of another affine."""
    transform = SpatialResample(mode=mode, padding_mode="border", dtype=np.float32)
    options = {"dst_affine": torch.as_tensor(wanted), "spatial_size": shape}
    return _transformed(volume, affine, transform, **options)[0]


def resample_as_nnunet(
    volumes: Sequence[Tensor], affine: np.ndarray, spacing: Sequence[float]
) -> tuple[list[Tensor], np.ndarray]:
    """Like `resample`, but edge to edge: the image by cubic splines, kept in its range."""
    shape, sizes = volumes[1].shape, voxel_sizes(affine)
    new = [round(n * size / to) for n, size, to in zip(shape, sizes, spacing, strict=True)]
    out = [
        resized_as_nnunet(volume, new, sizes, spacing, order=order)
        for volume, order in zip(volumes, (3, 0, 0), strict=True)
    ]
    factors = np.divide(shape, new)
    moved = affine.copy()
    # The outer corner of the first voxel stays in place.
    moved[:3, 3] += affine[:3, :3] @ ((factors - 1) / 2)
    moved[:3, :3] *= factors
    return out, moved


def resized_as_nnunet(
    volume: Tensor,
    shape: Sequence[int],
    spacing: Sequence[float],
    wanted: Sequence[float],
    *,
    order: int,
) -> Tensor:
    """[..., X, Y, Z] with `shape` voxels between the same edges; keeps the type.

    order: of the splines. If voxels of either spacing are more than 3 times as long along one
    axis, planes across it are resampled, then the nearest of these planes taken.
    """
    flat = volume.reshape(-1, *volume.shape[-3:])
    coarse = _coarse_axis(spacing, wanted)
    out = np.stack([_zoomed(each, shape, order, coarse) for each in flat.double().numpy()])
    return torch.from_numpy(out).reshape(*volume.shape[:-3], *shape).to(volume.dtype)


def _coarse_axis(*spacings: Sequence[float]) -> int | None:
    for spacing in spacings:
        if max(spacing) > 3 * min(spacing):
            return spacing.index(max(spacing)) if spacing.count(max(spacing)) == 1 else None
    return None


def _zoomed(
    values: np.ndarray, shape: Sequence[int], order: int, coarse: int | None = None
) -> np.ndarray:
    if values.shape == tuple(shape):
        return values
    if coarse is None:
        factors = np.divide(shape, values.shape)
        out: np.ndarray = zoom(values, factors, order=order, mode="nearest", grid_mode=True)
        return out.clip(values.min(), values.max())  # splines overshoot
    planes = np.moveaxis(values, coarse, 0)
    rest = [size for axis, size in enumerate(shape) if axis != coarse]
    have, wanted = len(planes), shape[coarse]
    nearest = ((np.arange(wanted) + 0.5) * have / wanted).astype(int)
    return np.moveaxis(
        np.stack([_zoomed(each, rest, order) for each in planes])[nearest], 0, coarse
    )


def _transformed(
    volume: Tensor, affine: np.ndarray, transform: Callable[..., Any], **options: Any
) -> tuple[Tensor, np.ndarray]:
    """A volume [..., X, Y, Z] and its affine after a transform of MONAI; keeps the type."""
    lead = volume.shape[:-3]
    channels = volume.reshape(-1, *volume.shape[-3:]).float()
    out = transform(MetaTensor(channels, affine=torch.as_tensor(affine)), **options)
    values = out.as_tensor().reshape(*lead, *out.shape[-3:])
    return values.to(volume.dtype).contiguous(), np.asarray(out.affine, dtype=np.float64)


def resampled_shape(
    shape: Sequence[int], sizes: Sequence[float], spacing: Sequence[float | None]
) -> list[int]:
    """Voxels along each axis after resampling from `sizes` mm to `spacing` mm, if it is given."""
    # From the centre of the first voxel to that of the last, as the transform counts.
    return [
        round((n - 1) * size / (wanted or size) + 1)
        for n, size, wanted in zip(shape, sizes, spacing, strict=True)
    ]


def check_spacing(
    path: Path, shape: Sequence[int], sizes: Sequence[float], spacing: Sequence[float]
) -> None:
    """Rejects a spacing that leaves next to nothing of `path`, or more than memory holds.

    Raises: DataError with the resulting shape, before anything of that size is allocated.
    """
    result = resampled_shape(shape, sizes, spacing)
    made = (
        f"{path}: data.spacing {list(spacing)} mm makes {_by(result)} of its "
        f"{_by(shape)} voxels of {_by(f'{size:.3g}' for size in sizes)} mm"
    )
    if any(after < min(_MIN_SIZE, before) for after, before in zip(result, shape, strict=True)):
        raise DataError(f"{made}; expected {_MIN_SIZE} or more along each axis: use finer voxels")
    needed, available = math.prod(result) * _BYTES_PER_VOXEL, available_memory()
    if needed > available / 2:
        raise DataError(
            f"{made}, which takes about {needed / 2**30:.3g} GiB; expected no more than half of "
            f"the {available / 2**30:.3g} GiB of memory available: use coarser voxels"
        )


def _by(sizes: Iterable[object]) -> str:
    return " x ".join(map(str, sizes))
