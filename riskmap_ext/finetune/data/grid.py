"""Converts from the grid of a case's file to that of its prepared volumes, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from scipy.ndimage import find_objects
from torch import Tensor

from riskmap_ext.finetune.base.orientation import arranged
from riskmap_ext.finetune.data.resample import resized, resized_as_nnunet
from riskmap_ext.finetune.data.volumes import Volume, voxel_sizes


@dataclass(frozen=True)
class Grid:
    """Converts from the prepared grid of a case back to the file's own.

    affine, shape, codes: of the file. full_shape: the same voxels in the prepared order of axes.
    box: slices of the part that is kept, box_affine: its affine. nnunet: resampled from the box as
    nnU-Net does, edge to edge.
    """

    orientation: str
    affine: np.ndarray
    shape: tuple[int, ...]
    codes: tuple[int, int]
    full_shape: tuple[int, ...]
    box: tuple[Any, ...]
    box_affine: np.ndarray
    prepared_affine: np.ndarray
    prepared_shape: tuple[int, ...]
    nnunet: bool = False

    @classmethod
    def reoriented(cls, volume: Volume, orientation: str) -> Grid:
        """The file's own voxels, with their axes in the prepared order."""
        transform = ornt_transform(io_orientation(volume.affine), axcodes2ornt(orientation))
        affine = volume.affine @ inv_ornt_aff(transform, volume.shape)
        shape = tuple(volume.shape[axis] for axis in np.argsort(transform[:, 0]))
        file = orientation, volume.affine, volume.shape, volume.codes
        return cls(*file, shape, tuple(slice(0, size) for size in shape), affine, affine, shape)

    def cropped(self, mask: np.ndarray) -> Grid:
        """To the box around the voxels of a mask in the prepared order of axes."""
        box = find_objects(mask.astype(np.uint8))[0]
        affine = self.box_affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [side.start for side in box]
        grid = replace(self, box=box, box_affine=affine, prepared_affine=affine)
        return replace(grid, prepared_shape=grid.box_shape)

    def crop(self, volume: Tensor) -> Tensor:
        """The box of a volume [..., X, Y, Z] in the prepared order of axes."""
        return volume[(..., *self.box)].contiguous()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size of the prepared grid in mm."""
        return voxel_sizes(self.prepared_affine)

    @property
    def box_shape(self) -> tuple[int, ...]:
        return tuple(side.stop - side.start for side in self.box)

    @property
    def resampled(self) -> bool:
        """Whether the voxels differ from the file's."""
        same = np.allclose(self.prepared_affine, self.box_affine, atol=1e-5)
        return self.prepared_shape != self.box_shape or not same

    def to_box(self, volume: Tensor, mode: str = "nearest") -> Tensor:
        """[..., *prepared] at the file's resolution, still in the prepared orientation."""
        if not self.resampled:
            return volume
        if self.nnunet:
            spacings, order = (self.spacing, voxel_sizes(self.box_affine)), int(mode == "bilinear")
            return resized_as_nnunet(volume, self.box_shape, *spacings, order=order)
        return resized(volume, self.prepared_affine, self.box_affine, self.box_shape, mode)

    def uncropped(self, volume: Tensor) -> Tensor:
        """A volume of the box at the file's full extent, 0 outside the box."""
        full = volume.new_zeros((*volume.shape[:-3], *self.full_shape))
        full[(..., *self.box)] = volume
        return full

    def to_full(self, volume: Tensor, mode: str = "nearest") -> Tensor:
        """[..., *prepared] at the file's resolution and extent, in the prepared orientation."""
        return self.uncropped(self.to_box(volume, mode))

    def to_file(self, volume: Tensor | np.ndarray) -> np.ndarray:
        """A volume at the file's resolution in the file's own orientation."""
        prepared, file = axcodes2ornt(self.orientation), io_orientation(self.affine)
        return apply_orientation(np.asarray(volume), ornt_transform(prepared, file))

    def from_file(self, volume: np.ndarray) -> np.ndarray:
        """A volume in the file's orientation, reoriented to the prepared one; same resolution."""
        prepared, file = axcodes2ornt(self.orientation), io_orientation(self.affine)
        return apply_orientation(volume, ornt_transform(file, prepared))

    def to_ras(self, volume: Tensor | np.ndarray) -> np.ndarray:
        """A prepared volume in canonical RAS order."""
        return np.transpose(np.asarray(volume), arranged(range(3), self.orientation, "RAS"))

    def ras_spacing(self) -> tuple[float, float, float]:
        return tuple(arranged(self.spacing, self.orientation, "RAS"))  # type: ignore[return-value]
