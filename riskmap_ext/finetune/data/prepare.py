"""Cases prepared for a network."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from riskmap_ext._files import digest, read_torch
from riskmap_ext.finetune.base.errors import DataError, Problems
from riskmap_ext.finetune.base.files import write_checkpoint
from riskmap_ext.finetune.base.log import Log, some
from riskmap_ext.finetune.base.orientation import PREPARED
from riskmap_ext.finetune.base.structures import IGNORE_INDEX, Structures
from riskmap_ext.finetune.config.schema import Config, DataConfig
from riskmap_ext.finetune.data.datalist import CaseFiles, Listing, list_cases
from riskmap_ext.finetune.data.grid import Grid
from riskmap_ext.finetune.data.intensity import crop_mask, image_foreground, normalized
from riskmap_ext.finetune.data.resample import check_spacing, resample, resample_as_nnunet
from riskmap_ext.finetune.data.volumes import Volume, grid_problems, read_image_files, read_label

_MAX_LABEL_SPAN = 2**24


@dataclass(frozen=True)
class Case:
    """A prepared case. Volumes are [X, Y, Z] on the prepared grid, slice axis last.

    image: [M, X, Y, Z] float32, normalised. label: int16, 0 .. C-1 or IGNORE_INDEX. mask: bool, the
    image's own foreground. full_label: label at the file's resolution and extent, in the same
    memory if these are the prepared ones.
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
    """All cases of a run; runs with the same `data` section may share them.

    store: folder of the volumes; None: in memory.
    """

    train: list[Case]
    validation: list[Case]
    listing: Listing
    data: DataConfig
    store: Path | None = None

    @property
    def structures(self) -> Structures:
        return self.listing.structures

    @property
    def classes(self) -> list[str]:
        return self.structures.classes

    @property
    def channels(self) -> list[str]:
        return self.listing.channels

    @cached_property
    def class_voxels(self) -> Tensor:
        """Voxels of each class in the training cases; [C] float64."""
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

    listing: from list_cases, if known. store: folder of the volumes; None: in memory. log: shows
    the progress.

    Raises: DataError with one line per problem, after all files were checked; ConfigError.
    """
    listing = listing or list_cases(config.data)
    problems = Problems()
    cases = list(each_case(listing, config.data, problems, store, log))
    problems.tell()
    count = len(listing.train)
    if all((case.label == IGNORE_INDEX).all() for case in cases[:count]):
        raise all_ignored(listing)
    return Cases(cases[:count], cases[count:], listing, config.data, store)


def each_case(
    listing: Listing,
    data: DataConfig,
    problems: Problems,
    store: Path | None = None,
    log: Log | None = None,
    until: float = math.inf,
) -> Iterator[Case]:
    """Cases as they are read; the problems of the others are collected.

    until: by time.monotonic(), after which no further case is started.
    """
    files = [*listing.train, *listing.validation]
    with (log or Log(quiet=True)).counting("Reading", len(files)) as advance:
        for entry in files:
            if time.monotonic() > until:
                return
            with problems.collected():
                case = read_case(entry, data, listing, store)
                if log is not None:
                    warn_of_blank(case, log)
                yield case
            advance(entry.name)


def warn_of_blank(case: Case, log: Log) -> None:
    if case.image.amin() == case.image.amax():
        log.warn(f"{case.files.image}: blank: every voxel has the same intensity")


def kept(folder: Path | None, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values; with `folder`, as memory-mapped files in it.

    A mapped file takes memory only while the system has some to spare, so a cohort may be larger
    than memory. Names identify the content: an existing file is used as it is.
    """
    if folder is None:
        return tensors
    path = folder / f"{name}.pt"
    found = read_torch(path, mapped=True)
    if not fits(found, {name: (each.shape, each.dtype) for name, each in tensors.items()}):
        write_checkpoint(path, tensors)
        found = read_torch(path, mapped=True)
    return tensors if found is None else found


def fits(found: Any, wanted: Mapping[str, tuple[torch.Size, torch.dtype]]) -> bool:
    """Whether a file of the cache has tensors of these names, shapes and types, and no others."""
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        return False
    return all(
        isinstance(each, Tensor) and (each.shape, each.dtype) == wanted[name]
        for name, each in found.items()
    )


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
    problems, volumes = Problems(), list[Volume]()
    with problems.collected():
        volumes.append(read_image_files(files.images, len(listing.channels)))
    with problems.collected():
        volumes.append(read_label(files.label))
        problems += grid_problems(volumes[0], volumes[-1])
        values = _label_values(volumes[-1], data, listing)
    problems.tell()
    return _prepare(files, volumes[0], values, data, store)


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
    grid = Grid.reoriented(volume, PREPARED[data.slice_axis])
    image = np.stack([grid.from_file(channel) for channel in volume.values])
    if data.crop == "nonzero" and image.any():
        grid = grid.cropped(crop_mask(image))
    full_label = torch.from_numpy(np.ascontiguousarray(grid.from_file(label)))
    image = grid.crop(torch.from_numpy(image)).numpy()
    mask = image_foreground(image, data)
    image = normalized(image, mask, data)
    prepared = [torch.from_numpy(image), grid.crop(full_label), torch.from_numpy(mask)]
    if data.spacing is not None:
        sizes = zip(data.spacing, grid.spacing, strict=True)
        spacing = [own if wanted is None else wanted for wanted, own in sizes]
        check_spacing(files.image, grid.prepared_shape, grid.spacing, spacing)
        nnunet = data.geometry == "nnunet"
        prepared, affine = (resample_as_nnunet if nnunet else resample)(
            prepared, grid.prepared_affine, spacing
        )
        shape = tuple(prepared[1].shape)
        grid = replace(grid, prepared_affine=affine, prepared_shape=shape, nnunet=nnunet)
    content = digest(*prepared, list(grid.spacing))
    names = ("image", "label", "mask", "full_label")
    tensors = dict(zip(names, [*prepared, full_label], strict=True))
    tensors = kept(store, f"case-{content[:32]}", tensors)
    return Case(name=files.name, files=files, grid=grid, digest=content, **tensors)
