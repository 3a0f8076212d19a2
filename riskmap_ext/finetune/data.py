"""Reading, checking and preparing image and label volumes, and the way back to their own grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
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
from riskmap_ext.finetune.config import IGNORE_INDEX, Config, DataConfig
from riskmap_ext.finetune.datalist import CaseFiles, Listing, list_cases
from riskmap_ext.finetune.errors import DataError
from riskmap_ext.finetune.resample import check_spacing, resample

# Volumes are stored with the slice axis last; "RAS" is nibabel's canonical order.
_ORIENTATION = {"axial": "RAS", "coronal": "RSA", "sagittal": "ASR"}
# Corners of image and label may lie this far apart, in voxels.
_GRID_TOLERANCE = 0.1
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

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size of the prepared grid in mm."""
        return _voxel_sizes(self.prepared_affine)

    @property
    def axis_names(self) -> tuple[str, str, str]:
        """The plane that each prepared axis is perpendicular to."""
        names = {"R": "sagittal", "A": "coronal", "S": "axial"}
        return tuple(names[letter] for letter in self.orientation)  # type: ignore[return-value]

    @property
    def resampled(self) -> bool:
        return self.prepared_shape != self._reoriented_shape() or not np.allclose(
            self.prepared_affine, self._reoriented_affine(), atol=1e-5
        )

    def to_full(self, volume: Tensor, mode: str = "nearest") -> Tensor:
        """[..., *prepared] at the file's resolution, still in the prepared orientation."""
        if not self.resampled:
            return volume
        lead = volume.shape[:-3]
        meta = MetaTensor(
            volume.reshape(-1, *volume.shape[-3:]).float(),
            affine=torch.as_tensor(self.prepared_affine),
        )
        to_grid = SpatialResample(mode=mode, padding_mode="border", dtype=np.float32)
        out = to_grid(
            meta,
            dst_affine=torch.as_tensor(self._reoriented_affine()),
            spatial_size=self._reoriented_shape(),
        )
        assert isinstance(out, MetaTensor)
        return out.as_tensor().reshape(*lead, *out.shape[-3:]).to(volume.dtype)

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

    def _reoriented_affine(self) -> np.ndarray:
        return self.affine @ inv_ornt_aff(self._transform(), self.shape)

    def _reoriented_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in np.argsort(self._transform()[:, 0]))


@dataclass(frozen=True)
class Case:
    """A prepared case. Volumes are [X, Y, Z] on the prepared grid, slice axis last.

    image: float32, normalised. label: int16, 0 .. C-1 or IGNORE_INDEX. mask: bool, the image's own
    foreground. full_label: label at the file's resolution (the same tensor unless resampled).
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
    """All cases of a run, in memory; runs with the same `data` section may share them."""

    train: list[Case]
    validation: list[Case]
    classes: list[str]
    notes: list[str]


def prepare_cases(config: Config, progress: Callable[[int, str], Any] | None = None) -> Cases:
    """Reads, checks and prepares every case of `config.data`.

    progress: called with the number of cases and the name of each once it is read.

    Raises: DataError with one line per problem, after all files were looked at; ConfigError.
    """
    listing = list_cases(config.data)
    files = [*listing.train, *listing.validation]
    cases: list[Case] = []
    problems: list[str] = []
    for entry in files:
        try:
            cases.append(_read_case(entry, config.data, listing))
        except DataError as error:
            problems.extend(error.problems)
        if progress is not None:
            progress(len(files), entry.name)
    if problems:
        raise DataError(problems)
    train, validation = cases[: len(listing.train)], cases[len(listing.train) :]
    if all((case.label == IGNORE_INDEX).all() for case in train):
        raise DataError([f"{case.files.label}: every voxel is ignored" for case in train])
    return Cases(train, validation, listing.classes, listing.notes)


def read_image(path: Path, name: str, data: DataConfig) -> Case:
    """An image without a label, prepared as `data` says; its label is all background.

    Raises: DataError naming the file.
    """
    volume = _open_volume(path)
    image = _image_values(path, volume)
    label = np.zeros(image.shape, dtype=np.int16)
    return _prepare(CaseFiles(name, path, path), volume, image, label, data)


@dataclass(frozen=True)
class LabelVolume:
    """Whole numbers of a file as they are, and its voxel sizes in mm."""

    values: np.ndarray
    spacing: tuple[float, float, float]


def read_labels(first: Path, second: Path) -> tuple[LabelVolume, LabelVolume]:
    """Two label files of one grid.

    Raises: DataError naming the file: no whole numbers, or another grid than the first's.
    """
    volumes = [_open_volume(path) for path in (first, second)]
    problems = _grid_problems(CaseFiles("", first, second), *volumes)
    for path, volume in zip((first, second), volumes, strict=True):
        problems += _not_whole(path, volume.values)
    if problems:
        raise DataError(problems)
    one, other = (
        LabelVolume(volume.values.astype(np.int64), _voxel_sizes(volume.affine))
        for volume in volumes
    )
    return one, other


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


def check_readable(path: Path) -> None:
    """Opens the header alone. Raises: DataError naming the file."""
    try:
        volume: Any = nib.load(path)
        shape = tuple(volume.shape)
    except Exception as error:  # a damaged file can raise nearly anything in its reader
        raise DataError([f"{path}: cannot be read ({_words(error)})"]) from None
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise DataError([f"{path}: expected a 3-D volume, got {len(shape)}-D, shape {shape}"])


def _read_case(files: CaseFiles, data: DataConfig, listing: Listing) -> Case:
    problems: list[str] = []
    volumes = {}
    for path in (files.image, files.label):
        try:
            volumes[path] = _open_volume(path)
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    image_file, label_file = volumes[files.image], volumes[files.label]
    problems += _grid_problems(files, image_file, label_file)
    image = label = None
    try:
        image = _image_values(files.image, image_file)
    except DataError as error:
        problems.extend(error.problems)
    try:
        label = _label_values(files.label, label_file, data, listing)
    except DataError as error:
        problems.extend(error.problems)
    if problems or image is None or label is None:
        raise DataError(problems)
    return _prepare(files, image_file, image, label, data)


def _open_volume(path: Path) -> _Volume:
    """The voxels and header facts that are used; trailing axes of length 1 dropped."""
    try:
        volume: Any = nib.load(path)
        values = np.asanyarray(volume.dataobj)
        affine = np.asarray(volume.affine, dtype=np.float64)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything in its reader
        raise DataError([f"{path}: cannot be read ({_words(error)})"]) from None
    if values.dtype.kind not in "biuf":
        raise DataError([f"{path}: expected real numbers in each voxel, got {values.dtype}"])
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise DataError(
            [
                f"{path}: expected a 3-D volume, got {values.ndim}-D with shape {_shape(values)}; "
                "split series and channels into one file each"
            ]
        )
    if values.size == 0:
        raise DataError([f"{path}: the volume is empty, shape {_shape(values)}"])
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError([f"{path}: the header's affine cannot be inverted: {affine.tolist()}"])
    return _Volume(values, affine, _codes(volume.header))


@dataclass(frozen=True)
class _Volume:
    values: np.ndarray
    affine: np.ndarray
    codes: tuple[int, int]


def _codes(header: Any) -> tuple[int, int]:
    """qform_code, sform_code; 1 (scanner) for formats that have no codes."""
    try:
        return int(header["qform_code"]), int(header["sform_code"])
    except (KeyError, ValueError, IndexError):
        return 1, 1


def _grid_problems(files: CaseFiles, image: _Volume, label: _Volume) -> list[str]:
    if image.values.shape != label.values.shape:
        return [
            f"{files.label}: expected the grid of its image {files.image}, shape "
            f"{_shape(image.values)}; got {_shape(label.values)}"
        ]
    ends = [(0, size - 1) for size in image.values.shape]
    corners = np.array([[x, y, z, 1.0] for x in ends[0] for y in ends[1] for z in ends[2]]).T
    in_voxels = np.linalg.inv(image.affine) @ label.affine @ corners
    apart = np.abs(in_voxels - corners)[:3].max()
    if apart > _GRID_TOLERANCE:
        return [
            f"{files.label}: expected the grid of its image {files.image}, but the affines put "
            f"the corners up to {apart:.3g} voxels apart; resample one onto the other"
        ]
    return []


def _image_values(path: Path, volume: _Volume) -> np.ndarray:
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
    return image


def _label_values(path: Path, volume: _Volume, data: DataConfig, listing: Listing) -> np.ndarray:
    """Class indices, int16."""
    values = volume.values
    if problems := _not_whole(path, values):
        raise DataError(problems)
    low, high = int(values.min()), int(values.max())
    if high - low > _MAX_LABEL_SPAN:
        raise DataError([f"{path}: label values from {low} to {high}: is it a label image?"])
    offset = (values.astype(np.int64) - low).ravel()
    present = np.flatnonzero(np.bincount(offset)) + low
    others = [int(v) for v in present if int(v) not in listing.label_table]
    if others and data.other_labels == "error":
        shown = ", ".join(map(str, others[:10])) + (", ..." if len(others) > 10 else "")
        known = (
            "in data.label_map"
            if data.label_map is not None
            else f"in 0 .. {len(listing.classes) - 1} (data.classes: {', '.join(listing.classes)})"
        )
        raise DataError(
            [
                f"{path}: label values {shown} are not {known}; add them to data.label_map, or "
                "set data.other_labels to background or ignore"
            ]
        )
    rest = IGNORE_INDEX if data.other_labels == "ignore" else 0
    table = np.full(high - low + 1, rest, dtype=np.int16)
    for value in present:
        table[value - low] = listing.label_table.get(int(value), rest)
    return table[offset].reshape(values.shape)


def _prepare(
    files: CaseFiles, volume: _Volume, image: np.ndarray, label: np.ndarray, data: DataConfig
) -> Case:
    orientation = _ORIENTATION[data.slice_axis]
    transform = ornt_transform(io_orientation(volume.affine), axcodes2ornt(orientation))
    affine = volume.affine @ inv_ornt_aff(transform, volume.values.shape)
    mask = _image_foreground(image, data.image_foreground)
    normalized = _normalize(image, mask, data.normalize)
    moved = [
        torch.from_numpy(np.ascontiguousarray(apply_orientation(a, transform)))
        for a in (normalized, label, mask)
    ]
    full_label = moved[1]
    if data.spacing is not None:
        check_spacing(files.image, moved[0].shape, _voxel_sizes(affine), data.spacing)
        moved, affine = resample(moved, affine, data.spacing)
    grid = Grid(
        orientation=orientation,
        affine=volume.affine,
        shape=_shape(volume.values),
        codes=volume.codes,
        prepared_affine=affine,
        prepared_shape=tuple(moved[0].shape),
    )
    return Case(
        name=files.name,
        files=files,
        image=moved[0],
        label=moved[1],
        mask=moved[2],
        full_label=full_label if grid.resampled else moved[1],
        grid=grid,
        digest=digest(*moved, list(grid.spacing)),
    )


def _image_foreground(image: np.ndarray, kind: str) -> np.ndarray:
    """Brain or body rather than air; everything where nothing would be left."""
    if kind == "nonzero":
        mask = image != 0
    elif kind == "otsu":
        mask = image > _otsu_threshold(image)
    else:
        mask = np.ones(image.shape, dtype=bool)
    return mask if mask.any() else np.ones(image.shape, dtype=bool)


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


def _voxel_sizes(affine: np.ndarray) -> tuple[float, float, float]:
    return tuple(float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))  # type: ignore


def _shape(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(size) for size in values.shape)


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
