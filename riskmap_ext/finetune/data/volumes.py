"""Image and label files: opened, checked, and their values as arrays on the file's own grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from riskmap_ext.finetune.base.device import available_memory
from riskmap_ext.finetune.base.errors import DataError

# Corners of two files of one grid may lie this far apart, in voxels.
_GRID_TOLERANCE = 0.1


@dataclass(frozen=True)
class Volume:
    """values: [X, Y, Z], or [M, X, Y, Z] of an image with M channels; the header facts in use."""

    values: np.ndarray
    affine: np.ndarray
    codes: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the grid."""
        return tuple(int(size) for size in self.values.shape[-3:])


@dataclass(frozen=True)
class LabelVolume:
    """Whole numbers of a file as they are, and its voxel sizes in mm."""

    values: np.ndarray
    spacing: tuple[float, float, float]


def read_image_files(paths: Sequence[Path], channels: int) -> Volume:
    """An image of `channels` channels as float32 [M, X, Y, Z]: a file each, or one 4-D file.

    Raises: DataError naming the file: unreadable, another number of channels, another grid than
    the first channel's, values that float32 cannot hold.
    """
    if len(paths) == 1:
        volume = _open(paths[0], channels)
        return Volume(_image_values(paths[0], volume), volume.affine, volume.codes)
    if len(paths) != channels:
        raise DataError([f"{paths[0]}: expected {channels} files, one a channel, got {len(paths)}"])
    volumes, problems = [], []
    for path in paths:
        try:
            volumes.append(_open(path))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    first, values = volumes[0], []
    for path, volume in zip(paths, volumes, strict=True):
        problems += grid_problems(paths[0], first, path, volume)
        try:
            values.append(_image_values(path, volume))
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return Volume(np.concatenate(values), first.affine, first.codes)


def read_label_file(path: Path) -> Volume:
    """Whole numbers [X, Y, Z]. Raises: DataError naming the file."""
    volume = _open(path)
    if problems := _not_whole(path, volume.values):
        raise DataError(problems)
    return volume


def read_labels(first: Path, second: Path) -> tuple[LabelVolume, LabelVolume]:
    """Two label files of one grid.

    Raises: DataError naming the file: no whole numbers, or another grid than the first's.
    """
    volumes = [_open(path) for path in (first, second)]
    problems = grid_problems(first, volumes[0], second, volumes[1])
    for path, volume in zip((first, second), volumes, strict=True):
        problems += _not_whole(path, volume.values)
    if problems:
        raise DataError(problems)
    one, other = (
        LabelVolume(volume.values.astype(np.int64), voxel_sizes(volume.affine))
        for volume in volumes
    )
    return one, other


def read_header(path: Path, channels: int = 1) -> Volume:
    """The file's grid; its values, which are not read, are 0.

    Raises: DataError naming the file: unreadable, or no 3-D volume (4-D of `channels` channels).
    """
    try:
        volume: Any = nib.load(path)
        shape = tuple(int(size) for size in volume.shape)
        affine = np.asarray(volume.affine, dtype=np.float64)
    except Exception as error:  # a damaged file can raise nearly anything in its reader
        raise DataError([f"{path}: cannot be read ({_words(error)})"]) from None
    if problem := _bad_affine(path, affine):
        raise DataError([problem])
    flat = channels == 1 and all(size == 1 for size in shape[3:])
    stacked = channels > 1 and len(shape) == 4 and shape[3] == channels
    if len(shape) < 3 or not (flat or stacked):
        raise DataError(
            [f"{path}: expected {_wanted(channels)}, got {len(shape)}-D, shape {shape}"]
        )
    return Volume(np.broadcast_to(np.uint8(0), shape[:3]), affine, _codes(volume.header))


def grid_problems(image_path: Path, image: Volume, path: Path, volume: Volume) -> list[str]:
    """What keeps `volume` from lying on the grid of `image`."""
    if image.shape != volume.shape:
        return [
            f"{path}: expected the grid of its image {image_path}, shape {image.shape}; got "
            f"{volume.shape}"
        ]
    ends = [(0, size - 1) for size in image.shape]
    corners = np.array([[x, y, z, 1.0] for x in ends[0] for y in ends[1] for z in ends[2]]).T
    in_voxels = np.linalg.inv(image.affine) @ volume.affine @ corners
    apart = np.abs(in_voxels - corners)[:3].max()
    if apart > _GRID_TOLERANCE:
        return [
            f"{path}: expected the grid of its image {image_path}, but the affines put the corners "
            f"up to {apart:.3g} voxels apart; resample one onto the other"
        ]
    return []


def voxel_sizes(affine: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))  # type: ignore


def _open(path: Path, channels: int = 1) -> Volume:
    """Voxels [X, Y, Z], or [M, X, Y, Z] of a 4-D file of M > 1 channels."""
    try:
        volume: Any = nib.load(path)
        _check_memory(path, volume.shape)
        values = np.asanyarray(volume.dataobj)
        affine = np.asarray(volume.affine, dtype=np.float64)
    except DataError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything in its reader
        raise DataError([f"{path}: cannot be read ({_words(error)})"]) from None
    if values.dtype.kind not in "biuf":
        raise DataError([f"{path}: expected real numbers in each voxel, got {values.dtype}"])
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if channels > 1 and values.ndim == 4 and values.shape[-1] == channels:
        values = np.moveaxis(values, -1, 0)
    elif values.ndim != 3 or channels > 1:
        shape = tuple(int(size) for size in values.shape)
        advice = (
            "; data.channels says that the last axis is channels"
            if channels == 1 and len(shape) == 4
            else ""
        )
        raise DataError(
            [
                f"{path}: expected {_wanted(channels)}, got {values.ndim}-D with shape {shape}"
                + advice
            ]
        )
    if values.size == 0:
        raise DataError([f"{path}: the volume is empty, shape {values.shape}"])
    if problem := _bad_affine(path, affine):
        raise DataError([problem])
    return Volume(values, affine, _codes(volume.header))


def _wanted(channels: int) -> str:
    return "a 3-D volume" if channels == 1 else f"a 4-D volume of {channels} channels"


def _check_memory(path: Path, shape: Sequence[int]) -> None:
    """A damaged header may ask for any size."""
    needed, available = math.prod(map(int, shape)) * 4, available_memory()
    if needed > available:
        raise DataError(
            [
                f"{path}: its shape {tuple(map(int, shape))} takes {needed / 2**30:.3g} GiB or "
                f"more, and {available / 2**30:.3g} GiB of memory is available; is its header "
                "damaged?"
            ]
        )


def _bad_affine(path: Path, affine: np.ndarray) -> str | None:
    if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) >= 1e-12:
        return None
    return f"{path}: the header's affine cannot be inverted: {affine.tolist()}"


def _codes(header: Any) -> tuple[int, int]:
    """qform_code, sform_code; 1 (scanner) for formats that have no codes."""
    try:
        return int(header["qform_code"]), int(header["sform_code"])
    except (KeyError, ValueError, IndexError):
        return 1, 1


def _image_values(path: Path, volume: Volume) -> np.ndarray:
    """float32, [M, X, Y, Z]."""
    with np.errstate(over="ignore"):
        image = volume.values.astype(np.float32)
    bad = image.size - int(np.isfinite(volume.values).sum())
    if bad:
        raise DataError([f"{path}: {bad} of {image.size} voxels are NaN or infinite"])
    # A quarter of the range leaves room for differences.
    large = int((np.abs(image) > np.finfo(np.float32).max / 4).sum())
    if large:
        raise DataError(
            [
                f"{path}: {large} of {image.size} voxels are too large for float32 (up to "
                f"{np.abs(volume.values.astype(np.float64)).max():.3g}); rescale the image"
            ]
        )
    return image.reshape(-1, *volume.shape)


def _not_whole(path: Path, values: np.ndarray) -> list[str]:
    """What is wrong with values that should be labels."""
    if values.dtype.kind != "f":
        return []
    if not np.isfinite(values).all():
        return [f"{path}: NaN or infinite label values"]
    odd = values[values != np.rint(values)]
    if not odd.size:
        return []
    return [
        f"{path}: {odd.size} label values are not whole numbers, such as {odd.flat[0]:g}; resample "
        "labels with nearest neighbours"
    ]


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
