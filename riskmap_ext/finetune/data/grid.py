"""From the grid of a case's file to that of its prepared volumes, and back."""

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
from torch import Tensor

from riskmap_ext.finetune.data.resample import resized, resized_as_nnunet
from riskmap_ext.finetune.data.volumes import Volume, voxel_sizes


@dataclass(frozen=True)
class Grid:
    """From the prepared grid of a case back to the file's own.

    box: first voxels and sizes of what is kept of the file's volume, in the prepared order of axes;
    None: all of it. nnunet: resampled as nnU-Net does, edge to edge.
    """

    orientation: str
    affine: np.ndarray
    shape: tuple[int, ...]
    codes: tuple[int, int]
    prepared_affine: np.ndarray
    prepared_shape: tuple[int, ...]
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    nnunet: bool = False

    @classmethod
    def reoriented(cls, volume: Volume, orientation: str) -> Grid:
        """The file's own voxels, with their axes in the prepared order."""
        file = volume.affine, volume.shape
        grid = cls(orientation, *file, volume.codes, *file)
        affine, shape = grid._full()
        return replace(grid, prepared_affine=affine, prepared_shape=shape)

    def cropped(self, mask: np.ndarray) -> Grid:
        """To the box around the voxels of a mask in the prepared order of axes."""
        places = [np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
        starts = tuple(int(each[0]) for each in places)
        sizes = tuple(int(each[-1] - each[0]) + 1 for each in places)
        if sizes == mask.shape:
            return self
        affine = self.prepared_affine.copy()
        affine[:3, 3] += affine[:3, :3] @ starts
        return replace(self, prepared_affine=affine, prepared_shape=sizes, box=(starts, sizes))

    def crop(self, volume: Tensor) -> Tensor:
        """The box of a volume [..., X, Y, Z] in the prepared order of axes."""
        return volume if self.box is None else volume[self._inside].contiguous()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size of the prepared grid in mm."""
        return voxel_sizes(self.prepared_affine)

    @property
    def resampled(self) -> bool:
        """Whether the voxels are others than the file's."""
        affine, shape = self._boxed()
        same = np.allclose(self.prepared_affine, affine, atol=1e-5)
        return self.prepared_shape != shape or not same

    @property
    def is_full(self) -> bool:
        """Whether the voxels are all of the file's."""
        return self.box is None and not self.resampled

    def to_box(self, volume: Tensor, mode: str = "nearest") -> Tensor:
        """[..., *prepared] at the file's resolution, still in the prepared orientation."""
        if not self.resampled:
            return volume
        affine, shape = self._boxed()
        if self.nnunet:
            spacings = self.spacing, voxel_sizes(affine)
            order = 1 if mode == "bilinear" else 0
            return resized_as_nnunet(volume, shape, *spacings, order=order)
        return resized(volume, self.prepared_affine, affine, shape, mode)

    def uncropped(self, volume: Tensor) -> Tensor:
        """A volume of the box in the file's whole extent, 0 outside the box."""
        if self.box is None:
            return volume
        full = volume.new_zeros((*volume.shape[:-3], *self._full()[1]))
        full[self._inside] = volume
        return full

    def to_full(self, volume: Tensor, mode: str = "nearest") -> Tensor:
        """[..., *prepared] at the file's resolution and extent, in the prepared orientation."""
        return self.uncropped(self.to_box(volume, mode))

    def to_file(self, volume: Tensor | np.ndarray) -> np.ndarray:
        """A volume at the file's resolution in the file's own orientation."""
        return apply_orientation(np.asarray(volume), self._transform(back=True))

    def from_file(self, volume: np.ndarray) -> np.ndarray:
        """A volume of the file's orientation in the prepared one; resolution as it is."""
        return apply_orientation(volume, self._transform())

    def to_ras(self, volume: Tensor | np.ndarray) -> np.ndarray:
        """A prepared volume in canonical RAS order."""
        return np.transpose(np.asarray(volume), [self.orientation.index(c) for c in "RAS"])

    def ras_spacing(self) -> tuple[float, float, float]:
        sizes = [self.spacing[self.orientation.index(letter)] for letter in "RAS"]
        return tuple(sizes)  # type: ignore[return-value]

    def _transform(self, back: bool = False) -> np.ndarray:
        file, prepared = io_orientation(self.affine), axcodes2ornt(self.orientation)
        return ornt_transform(prepared, file) if back else ornt_transform(file, prepared)

    def _full(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """Affine and shape of the file's voxels in the prepared order of axes."""
        transform = self._transform()
        shape = tuple(self.shape[i] for i in np.argsort(transform[:, 0]))
        return self.affine @ inv_ornt_aff(transform, self.shape), shape

    def _boxed(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """The same of the box."""
        affine, shape = self._full()
        if self.box is None:
            return affine, shape
        starts, sizes = self.box
        affine = affine.copy()
        affine[:3, 3] += affine[:3, :3] @ starts
        return affine, sizes

    @property
    def _inside(self) -> tuple[Any, ...]:
        assert self.box is not None
        pairs = zip(*self.box, strict=True)
        return (..., *(slice(start, start + size) for start, size in pairs))
