"""Cases prepared for a network, and the way back to the grid of their files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from monai.transforms import SpatialResample
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from torch import Tensor

from riskmap_ext._files import digest
from riskmap_ext.finetune.base.errors import DataError, Problems
from riskmap_ext.finetune.base.log import Log, some
from riskmap_ext.finetune.base.orientation import PREPARED, slice_axis_of
from riskmap_ext.finetune.base.structures import IGNORE_INDEX, Structures
from riskmap_ext.finetune.config.schema import Config, DataConfig
from riskmap_ext.finetune.data.datalist import CaseFiles, Listing, list_cases
from riskmap_ext.finetune.data.resample import check_spacing, resample, transformed
from riskmap_ext.finetune.data.storage import kept
from riskmap_ext.finetune.data.volumes import (
    Volume,
    grid_problems,
    read_image_files,
    read_label,
    voxel_sizes,
)

_MIN_STD = 1e-8
_MAX_LABEL_SPAN = 2**24


@dataclass(frozen=True)
class Grid:
    """From the prepared grid of a case back to the file's own."""

    orientation: str
    affine: np.ndarray
    shape: tuple[int, ...]
    codes: tuple[int, int]
    prepared_affine: np.ndarray
    prepared_shape: tuple[int, ...]

    @classmethod
    def reoriented(cls, volume: Volume, orientation: str) -> Grid:
        """The file's own voxels, with their axes in the prepared order."""
        file = volume.affine, volume.shape
        grid = cls(orientation, *file, volume.codes, *file)
        affine, shape = grid._full()
        return replace(grid, prepared_affine=affine, prepared_shape=shape)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size of the prepared grid in mm."""
        return voxel_sizes(self.prepared_affine)

    @property
    def axis_names(self) -> tuple[str, str, str]:
        """The plane that each prepared axis is perpendicular to."""
        return tuple(map(slice_axis_of, self.orientation))  # type: ignore[return-value]

    @property
    def resampled(self) -> bool:
        affine, shape = self._full()
        same = np.allclose(self.prepared_affine, affine, atol=1e-5)
        return self.prepared_shape != shape or not same

    def to_full(self, volume: Tensor, mode: str = "nearest") -> Tensor:
        """[..., *prepared] at the file's resolution, still in the prepared orientation."""
        if not self.resampled:
            return volume
        affine, shape = self._full()
        transform = SpatialResample(mode=mode, padding_mode="border", dtype=np.float32)
        options = {"dst_affine": torch.as_tensor(affine), "spatial_size": shape}
        return transformed(volume, self.prepared_affine, transform, **options)[0]

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


@dataclass(frozen=True)
class Case:
    """A prepared case. Volumes are [X, Y, Z] on the prepared grid, slice axis last.

    image: [M, X, Y, Z] float32, normalised. label: int16, 0 .. C-1 or IGNORE_INDEX. mask: bool, the
    image's own foreground. full_label: label at the file's resolution (the same tensor unless
    resampled).
    """

    name: str
    files: CaseFiles
    image: Tensor
    label: Tensor
    mask: Tensor
    full_label: Tensor
    grid: Grid
    digest: str


@dataclass(frozen=True)
class Cases:
    """All cases of a run; runs with the same `data` section may share them."""

    train: list[Case]
    validation: list[Case]
    listing: Listing
    data: DataConfig

    @property
    def structures(self) -> Structures:
        return self.listing.structures

    @property
    def classes(self) -> list[str]:
        return self.structures.classes

    @property
    def channels(self) -> list[str]:
        return self.listing.channels

    @property
    def spacings(self) -> list[tuple[float, float, float]]:
        """Voxel sizes of the prepared training cases, in mm."""
        return [case.grid.spacing for case in self.train]

    @cached_property
    def class_voxels(self) -> Tensor:
        """Of the training cases; [C] float64."""
        return class_voxels(self.train, len(self.classes))


def class_voxels(cases: Sequence[Case], num_classes: int) -> Tensor:
    """Voxels of each class, without ignored ones; [C] float64."""
    counts = torch.zeros(num_classes, dtype=torch.float64)
    for case in cases:
        valid = case.label[case.label != IGNORE_INDEX]
        counts += torch.bincount(valid.long(), minlength=num_classes)
    return counts


def prepare_cases(
    config: Config,
    *,
    listing: Listing | None = None,
    store: Path | None = None,
    log: Log | None = None,
) -> Cases:
    """Reads, checks and prepares every case of `config.data`.

    listing: of list_cases, where it is known. store: folder of the volumes; None: in memory.
    log: shows how far it is.

    Raises: DataError with one line per problem, after all files were looked at; ConfigError.
    """
    listing = listing or list_cases(config.data)
    problems = Problems()
    cases = list(each_case(listing, config.data, problems, store, log))
    problems.tell()
    count = len(listing.train)
    if all((case.label == IGNORE_INDEX).all() for case in cases[:count]):
        raise all_ignored(listing)
    return Cases(cases[:count], cases[count:], listing, config.data)


def each_case(
    listing: Listing,
    data: DataConfig,
    problems: Problems,
    store: Path | None = None,
    log: Log | None = None,
    until: float = math.inf,
) -> Iterator[Case]:
    """Cases as they are read; of others the problems are collected.

    until: of time.monotonic(), when no further one is begun.
    """
    files = [*listing.train, *listing.validation]
    with (log or Log(quiet=True)).counting("Reading", len(files)) as advance:
        for entry in files:
            if time.monotonic() > until:
                return
            with problems.collected():
                yield read_case(entry, data, listing, store)
            advance(entry.name)


def all_ignored(listing: Listing) -> DataError:
    return DataError([f"{case.label}: every voxel is ignored" for case in listing.train])


def read_image(paths: Sequence[Path], name: str, data: DataConfig, channels: int = 1) -> Case:
    """An image without a label, prepared as `data` says; its label is all background.

    Raises: DataError naming the file.
    """
    volume = read_image_files(paths, channels)
    label = np.zeros(volume.shape, dtype=np.int16)
    return _prepare(CaseFiles(name, tuple(paths), paths[0]), volume, label, data, None)


def read_case(files: CaseFiles, data: DataConfig, listing: Listing, store: Path | None) -> Case:
    """Raises: DataError with a line for each problem of the files."""
    problems = Problems()
    image = label = values = None
    with problems.collected():
        image = read_image_files(files.images, len(listing.channels))
    with problems.collected():
        label = read_label(files.label)
        values = _label_values(label, data, listing)
    if image is not None and label is not None:
        problems += grid_problems(image, label)
    problems.tell()
    assert image is not None
    assert values is not None
    return _prepare(files, image, values, data, store)


def _label_values(volume: Volume, data: DataConfig, listing: Listing) -> np.ndarray:
    """Class indices, int16."""
    path, values, classes = volume.path, volume.values, listing.structures.classes
    low, high = int(values.min()), int(values.max())
    if high - low > _MAX_LABEL_SPAN:
        raise DataError(f"{path}: label values from {low} to {high}: is it a label image?")
    offset = (values - low).ravel()
    present = (np.flatnonzero(np.bincount(offset)) + low).tolist()
    others = [value for value in present if value not in listing.label_table]
    if others and data.other_labels == "error":
        shown = some(others, 10)
        known = "data.label_map"
        if data.label_map is None:
            known = f"0 .. {len(classes) - 1} (data.classes: {', '.join(classes)})"
        raise DataError(
            f"{path}: label values {shown} are not in {known}; add them to data.label_map, or "
            "set data.other_labels to background or ignore"
        )
    rest = IGNORE_INDEX if data.other_labels == "ignore" else 0
    table = np.full(high - low + 1, rest, dtype=np.int16)
    for value in present:
        table[value - low] = listing.label_table.get(value, rest)
    return table[offset].reshape(values.shape)


def _prepare(
    files: CaseFiles, volume: Volume, label: np.ndarray, data: DataConfig, store: Path | None
) -> Case:
    mask = _image_foreground(volume.values, data.image_foreground)
    normalized = [_normalize(channel, mask, data.normalize) for channel in volume.values]
    grid = Grid.reoriented(volume, PREPARED[data.slice_axis])
    *channels, full_label, full_mask = (
        torch.from_numpy(np.ascontiguousarray(grid.from_file(values)))
        for values in (*normalized, label, mask)
    )
    prepared = [torch.stack(channels), full_label, full_mask]
    if data.spacing is not None:
        check_spacing(files.image, grid.prepared_shape, grid.spacing, data.spacing)
        prepared, affine = resample(prepared, grid.prepared_affine, data.spacing)
        shape = tuple(prepared[1].shape)
        grid = replace(grid, prepared_affine=affine, prepared_shape=shape)
    content = digest(*prepared, list(grid.spacing))
    tensors = dict(zip(("image", "label", "mask"), prepared, strict=True))
    if grid.resampled:
        tensors["full_label"] = full_label
    tensors = kept(store, f"case-{content[:32]}", tensors)
    tensors.setdefault("full_label", tensors["label"])
    return Case(name=files.name, files=files, grid=grid, digest=content, **tensors)


def _image_foreground(image: np.ndarray, kind: str) -> np.ndarray:
    """Brain or body rather than air, in any channel; everything where nothing would be left."""
    if kind == "nonzero":
        mask = (image != 0).any(axis=0)
    elif kind == "otsu":
        mask = np.any([channel > _otsu_threshold(channel) for channel in image], axis=0)
    else:
        mask = np.ones(image.shape[1:], dtype=bool)
    return mask if mask.any() else np.ones(image.shape[1:], dtype=bool)


def _otsu_threshold(image: np.ndarray) -> float:
    """The grey level that splits the histogram with the largest variance between both parts."""
    counts, edges = np.histogram(image, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = counts.sum() - below
    total = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = total / below - (total[-1] - total) / above
        between = np.nan_to_num(below * above * difference**2)
    return float(edges[int(between.argmax()) + 1])


def _normalize(image: np.ndarray, mask: np.ndarray, kind: str) -> np.ndarray:
    if kind == "none":
        return image
    inside = image[mask].astype(np.float64)
    mean, std = float(inside.mean()), float(inside.std())
    # A constant image has nothing to scale by.
    return (image - mean) / (std if std > _MIN_STD else 1.0)
