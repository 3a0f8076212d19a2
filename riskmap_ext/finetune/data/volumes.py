"""Image and label files, opened and checked, as arrays on the file's own grid."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import affines, imageglobals

from riskmap_ext.finetune.base.device import available_memory
from riskmap_ext.finetune.base.errors import DataError, Problems, one_line
from riskmap_ext.finetune.base.files import absent

# Largest distance between the corners of two files on one grid, in voxels.
_GRID_TOLERANCE = 0.1


@dataclass(frozen=True)
class Volume:
    """values: [X, Y, Z], or [M, X, Y, Z] of an image with M channels; the header facts in use."""

    path: Path
    values: np.ndarray
    affine: np.ndarray
    codes: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the grid."""
        return self.values.shape[-3:]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel sizes in mm."""
        return voxel_sizes(self.affine)


def read_image_files(paths: Sequence[Path], channels: int) -> Volume:
    """An image of `channels` channels as float32 [M, X, Y, Z]: a file each, or one 4-D file.

    Raises: DataError naming the file: unreadable, wrong number of channels, a grid other than the
    first channel's, values too large for float32.
    """
    if len(paths) not in (1, channels):
        raise DataError(f"{paths[0]}: expected {channels} files, one a channel, got {len(paths)}")
    volumes, problems = list[Volume](), Problems()
    for path in paths:
        with problems.collected():
            volume = _open(path, channels if len(paths) == 1 else 1)
            volumes.append(replace(volume, values=_image_values(volume)))
            problems += grid_problems(volumes[0], volume)
    problems.tell()
    return replace(volumes[0], values=np.concatenate([volume.values for volume in volumes]))


def read_label(path: Path) -> Volume:
    """Whole numbers [X, Y, Z], int64. Raises: DataError naming the file."""
    volume = _open(path)
    with np.errstate(invalid="ignore"):  # from values that are not finite or beyond int64
        odd = volume.values[volume.values % 1 != 0]
        whole = volume.values.astype(np.int64)
    if odd.size:
        raise DataError(
            f"{path}: {odd.size} label values are not whole numbers, such as {odd.flat[0]:g}; "
            "resample labels with nearest neighbours"
        )
    return replace(volume, values=whole)


def read_labels(first: Path, second: Path) -> list[Volume]:
    """Two label files on one grid. Raises: DataError naming the file, or both if grids differ."""
    volumes, problems = [], Problems()
    for path in (first, second):
        with problems.collected():
            volumes.append(read_label(path))
    problems.tell()
    Problems(grid_problems(*volumes)).tell()
    return volumes


def read_header(path: Path, channels: int = 1) -> Volume:
    """The file's grid; its values are not read and are 0.

    Raises: DataError naming the file: unreadable, or not a 3-D volume (4-D with `channels`).
    """
    return _open(path, channels, header_alone=True)


def grid_problems(image: Volume, volume: Volume) -> list[str]:
    """Why `volume` is not on the grid of `image`."""
    expected = f"{volume.path}: expected the grid of its image {image.path}"
    if image.shape != volume.shape:
        return [f"{expected}, shape {image.shape}; got {volume.shape}"]
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(image.shape) - 1)
    moved = affines.apply_affine(np.linalg.inv(image.affine) @ volume.affine, corners)
    apart = np.abs(moved - corners).max()
    if apart > _GRID_TOLERANCE:
        return [
            f"{expected}, but the affines put the corners up to {apart:.3g} voxels apart; resample "
            "one onto the other"
        ]
    return []


def voxel_sizes(affine: np.ndarray) -> tuple[float, float, float]:
    return tuple(affines.voxel_sizes(affine).tolist())


def _open(path: Path, channels: int = 1, *, header_alone: bool = False) -> Volume:
    """Voxels [X, Y, Z], or [M, X, Y, Z] of a 4-D file with M > 1 channels."""
    if not os.path.isfile(path):
        raise DataError(absent(path))
    try:
        # nibabel tells of small faults in a header that it mends, without the file's name.
        with imageglobals.LoggingOutputSuppressor():
            # Not mapped: a file that is cut meanwhile would end the process.
            file: Any = nib.load(path, mmap=False)
        shape = tuple(int(size) for size in file.shape)
        _check_memory(path, shape)
        _check_size(path, file)
        values = np.broadcast_to(np.uint8(0), shape)
        if not header_alone:
            values = np.asanyarray(file.dataobj)
        affine = np.asarray(file.affine, dtype=np.float64)
        # 1 (scanner) for formats that have no codes.
        code: Any = getattr(file.header, "get", {}.get)
        codes = int(code("qform_code", 1)), int(code("sform_code", 1))
    except DataError:
        raise
    except Exception as error:  # the reader of a damaged file can raise nearly anything
        why = one_line(f"{type(error).__name__}: {error}")
        raise DataError(f"{path}: cannot be read ({why})") from None
    if values.dtype.kind not in "biuf":
        raise DataError(f"{path}: expected real numbers in each voxel, got {values.dtype}")
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if channels > 1 and values.ndim == 4 and values.shape[-1] == channels:
        values = np.moveaxis(values, -1, 0)
    elif values.ndim != 3 or channels > 1:
        wanted = "a 3-D volume" if channels == 1 else f"a 4-D volume of {channels} channels"
        told = f"{path}: expected {wanted}, got {values.ndim}-D with shape {values.shape}"
        if channels == 1 and values.ndim == 4:
            told += "; if the last axis is channels, set data.channels"
        raise DataError(told)
    if values.size == 0:
        raise DataError(f"{path}: the volume is empty, shape {values.shape}")
    if not _is_invertible(affine):
        raise DataError(f"{path}: the header's affine cannot be inverted: {affine.tolist()}")
    return Volume(path, values, affine, codes)


def _is_invertible(affine: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        return bool(
            np.isfinite(affine).all()
            and 1e-12 <= abs(np.linalg.det(affine[:3, :3])) < 1e30
            and np.isfinite(nib.io_orientation(affine)).all()  # NaN for axes that nearly coincide
        )


def _check_memory(path: Path, shape: Sequence[int]) -> None:
    """A damaged header may declare any size."""
    needed, available = math.prod(shape) * 4, available_memory()
    if needed > available:
        raise DataError(
            f"{path}: its shape {shape} takes {needed / 2**30:.3g} GiB or more, and "
            f"{available / 2**30:.3g} GiB of memory is available; is its header damaged?"
        )


def _check_size(path: Path, file: Any) -> None:
    """Nor can a small file have large contents: gzip packs at most 1032 bytes into one."""
    held = Path(file.file_map["image"].filename)
    factor = 1032 if held.name.lower().endswith(("gz", "bz2")) else 1
    declared = math.prod(file.shape) * file.get_data_dtype().itemsize
    if declared > held.stat().st_size * factor:
        raise DataError(
            f"{path}: its shape {file.shape} takes {declared / 2**20:.3g} MiB, more than the file "
            "can have; it is truncated, or its header is damaged"
        )


def _image_values(volume: Volume) -> np.ndarray:
    """float32, [M, X, Y, Z]."""
    with np.errstate(over="ignore"):
        image = volume.values.astype(np.float32)
    bad = image.size - int(np.isfinite(volume.values).sum())
    if bad:
        raise DataError(f"{volume.path}: {bad} of {image.size} voxels are NaN or infinite")
    # A quarter of the range leaves room for differences.
    large = int((np.abs(image) > np.finfo(np.float32).max / 4).sum())
    if large:
        raise DataError(
            f"{volume.path}: {large} of {image.size} voxels are too large for float32 (up to "
            f"{np.abs(volume.values.astype(np.float64)).max():.3g}); rescale the image"
        )
    return image.reshape(-1, *volume.shape)
