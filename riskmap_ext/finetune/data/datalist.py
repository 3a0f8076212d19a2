"""Which files make up the training and validation cases, and what their classes are called."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from riskmap_ext.finetune.base.errors import ConfigError, DataError, Problems
from riskmap_ext.finetune.base.log import some
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import IGNORE_INDEX, DataConfig
from riskmap_ext.finetune.data.dataset_json import DatasetLabels, dataset_channels, dataset_labels
from riskmap_ext.finetune.data.label_table import label_table, read_label_map

# .img is the other half of .hdr.
EXTENSIONS = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr")


@dataclass(frozen=True)
class CaseFiles:
    """images: a file for each channel, or one that holds them all."""

    name: str
    images: tuple[Path, ...]
    label: Path

    @property
    def image(self) -> Path:
        return self.images[0]


@dataclass(frozen=True)
class Listing:
    """Files of every case, the structures and channels they have, and remarks for the log.

    label_table: original label value -> class index or IGNORE_INDEX. image_suffix: what follows the
    case's name in the files of each channel, where that is known.
    """

    train: list[CaseFiles]
    validation: list[CaseFiles]
    structures: Structures
    channels: list[str]
    label_table: dict[int, int]
    image_suffix: list[str] | None
    notes: list[str]

    @property
    def label_map(self) -> dict[int, int | str] | None:
        """`data.label_map` in numbers; None where every value is its own index."""
        table = self.label_table
        if all(value == index for value, index in table.items()):
            return None
        named = {v: "ignore" if i == IGNORE_INDEX else i for v, i in table.items()}
        return {value: index for value, index in named.items() if (value, index) != (0, 0)}


@dataclass(frozen=True)
class _Found:
    """All cases, before any is chosen, and what the data set itself says of them."""

    cases: list[CaseFiles]
    validation: list[str] = field(default_factory=list)
    labels: DatasetLabels = field(default_factory=DatasetLabels)
    channels: list[str] | None = None
    image_suffix: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def list_cases(data: DataConfig) -> Listing:
    """The cases that `data` selects; no image is opened.

    Raises: ConfigError for a selection that cannot be made, DataError for missing files.
    """
    found = _find(data)
    counts = Counter(case.name for case in found.cases)
    Problems(
        f"data: more than one case is named {name} "
        f"({', '.join(str(c.image) for c in found.cases if c.name == name)}); list each image "
        "once, or give each entry of data.cases a name of its own"
        for name in sorted(counts)
        if counts[name] > 1
    ).tell()
    by_name = {case.name: case for case in found.cases}
    train, validation = ([by_name[name] for name in names] for names in _split(data, found))
    cases = [*train, *validation]
    labels, classes = _labels(data, found.labels)
    listing = Listing(
        train=train,
        validation=validation,
        structures=structures_of(classes, labels.regions, labels.region_classes),
        channels=_channels(data, found, cases),
        label_table=label_table(labels.label_map, classes, labels.ignore),
        image_suffix=found.image_suffix,
        notes=found.notes,
    )
    problems = Problems()
    for path in (path for case in cases for path in (*case.images, case.label)):
        with problems.collected():
            _check_file(path)
    problems.tell()
    return listing


def stem(path: Path) -> str:
    """The file name without the image format's ending."""
    ending = next((e for e in EXTENSIONS if path.name.lower().endswith(e)), "")
    return path.name[: len(path.name) - len(ending)]


def volumes_in(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name."""
    _check_folder(folder)
    try:
        found = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    return sorted(
        path
        for path in found
        if path.name.lower().endswith(EXTENSIONS) and not path.name.startswith(".")
    )


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():
            why = "is a folder; expected a file" if path.is_dir() else "no such file"
            raise DataError(f"{path}: {why}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _check_folder(path: Path, key: str = "") -> None:
    if not path.is_dir():
        why = "is a file; expected a folder" if path.exists() else "no such folder"
        raise DataError(f"{path}: {why}{key}")


def _case_names(images: Sequence[Path]) -> list[str]:
    """File names without ending; where several images share one, with the folders above them.

    sub-1/mri/T1.mgz and sub-2/mri/T1.mgz become sub-1_mri_T1 and sub-2_mri_T1.
    """
    names = [stem(path) for path in images]
    above = [[folder.name for folder in path.parents if folder.name] for path in images]
    for depth in range(1, max(map(len, above), default=0) + 1):
        counts = Counter(names)
        for index, path in enumerate(images):
            if counts[names[index]] > 1:
                names[index] = "_".join([*reversed(above[index][:depth]), stem(path)])
    # The same file twice: the long name would tell nothing more.
    counts = Counter(names)
    return [
        stem(path) if counts[name] > 1 else name for name, path in zip(names, images, strict=True)
    ]


def _find(data: DataConfig) -> _Found:
    if data.cases is not None:
        names = _case_names([case.images[0] for case in data.cases])
        return _Found(
            [
                CaseFiles(case.name or name, case.images, case.label)
                for case, name in zip(data.cases, names, strict=True)
            ]
        )
    if data.datalist is not None:
        return _read_datalist(data.datalist, data)
    if data.images is not None and data.labels is not None:
        return _pair_folders(data.images, data.labels, data, data.image_suffixes)
    root = data.root
    assert root is not None  # DataConfig asks for one of the four
    _check_folder(root, " (data.root)")
    if (root / "dataset.json").is_file():
        return _read_datalist(root / "dataset.json", data)
    for images, labels in (("images", "labels"), ("imagesTr", "labelsTr")):
        if (root / images).is_dir() and (root / labels).is_dir():
            return _pair_folders(root / images, root / labels, data, data.image_suffixes)
    raise DataError(
        f"{root}: expected dataset.json, images/ and labels/, or imagesTr/ and labelsTr/ in it"
    )


def _read_datalist(path: Path, data: DataConfig) -> _Found:
    """A Medical Segmentation Decathlon or MONAI datalist, or an nnU-Net dataset.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; expected a JSON file (data.datalist)") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object with 'training', got {type(content)}")
    labels, channels = dataset_labels(path, content), dataset_channels(path, content)
    if "training" not in content and "file_ending" in content:
        found = _nnunet_cases(path, content, data, len(channels or [""]))
    else:
        training = _datalist_cases(path, content, "training")
        validation = _datalist_cases(path, content, "validation")
        if not training:
            raise DataError(f"{path}: expected a list 'training' of image and label pairs")
        found = _Found(training + validation, [case.name for case in validation])
    return replace(found, labels=labels, channels=channels)


def _nnunet_cases(path: Path, content: dict[str, Any], data: DataConfig, channels: int) -> _Found:
    """A raw data set of nnU-Net v2: imagesTr/CASE_0000.nii.gz, or the files its `dataset` names."""
    ending = str(content["file_ending"])
    if ending.lower() not in EXTENSIONS:
        raise DataError(
            f"{path}: file_ending: expected one of {', '.join(EXTENSIONS)}, got {ending!r}"
        )
    listed = content.get("dataset")
    if listed is None:
        suffixes = data.image_suffixes
        if suffixes == [""]:
            suffixes = [f"_{index:04d}" for index in range(channels)]
        folder = path.parent
        return _pair_folders(folder / "imagesTr", folder / "labelsTr", data, suffixes)
    cases = []
    for name, files in listed.items() if isinstance(listed, dict) else ():
        if not (isinstance(files, dict) and isinstance(files.get("images"), list)):
            raise DataError(f"{path}: dataset: {name}: expected images and label, got {files!r}")
        images = tuple(path.parent / str(image) for image in files["images"])
        cases.append(CaseFiles(str(name), images, path.parent / str(files.get("label"))))
    if not cases:
        raise DataError(f"{path}: dataset: expected cases with images and label, got {listed!r}")
    return _Found(cases)


def _datalist_cases(path: Path, content: dict[str, Any], key: str) -> list[CaseFiles]:
    pairs: list[tuple[tuple[Path, ...], Path]] = []
    entries = content.get(key) or []
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list {key!r}, got {entries!r}")
    for entry in entries:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise DataError(f"{path}: expected image and label in each {key!r}, got {entry!r}")
        given = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
        if not given or not all(isinstance(name, str) for name in (*given, entry["label"])):
            raise DataError(f"{path}: expected file names in each {key!r}, got {entry!r}")
        pairs.append((tuple(path.parent / name for name in given), path.parent / entry["label"]))
    names = _case_names([images[0] for images, _ in pairs])
    return [CaseFiles(name, *pair) for name, pair in zip(names, pairs, strict=True)]


def _pair_folders(images: Path, labels: Path, data: DataConfig, suffixes: list[str]) -> _Found:
    """suffixes: of the image files, one for each channel."""
    by_channel = [files_by_name(images, suffix) for suffix in suffixes]
    by_label = files_by_name(labels, data.label_suffix)
    everywhere = set.intersection(*map(set, by_channel))
    common = sorted(everywhere & by_label.keys())
    if not common and suffixes == [""] and by_channel[0]:
        numbers = sorted({name[-5:] for name in by_channel[0]})
        if all(re.fullmatch(r"_\d{4}", number) for number in numbers):  # as nnU-Net names channels
            return _pair_folders(images, labels, data, numbers)
    if not common:
        image, label = (
            next((path.name for path in files.values()), "none")
            for files in (by_channel[0], by_label)
        )
        raise DataError(
            f"{images} and {labels}: no image and label of the same name (such as {image} and "
            f"{label}); set data.image_suffix and data.label_suffix to what follows the case's "
            "name, such as _T1w and _seg"
        )
    notes = []
    anywhere = set.union(*map(set, by_channel))
    for folder, alone, why in (
        (images, anywhere - everywhere, "without all of their channels"),
        (images, everywhere - by_label.keys(), "without a partner"),
        (labels, by_label.keys() - anywhere, "without a partner"),
    ):
        if alone:
            notes.append(f"{folder}: {len(alone)} left out, {why}: {some(sorted(alone))}")
    cases = [
        CaseFiles(name, tuple(files[name] for files in by_channel), by_label[name])
        for name in common
    ]
    return _Found(cases, image_suffix=suffixes, notes=notes)


def files_by_name(folder: Path, suffix: str = "") -> dict[str, Path]:
    """Case name -> file, of the files whose name without format ends in `suffix`.

    Raises: DataError for a.nii beside a.nii.gz.
    """
    named: dict[str, Path] = {}
    problems = Problems()
    for path in volumes_in(folder):
        if not stem(path).endswith(suffix):
            continue
        name = stem(path).removesuffix(suffix)
        if name in named:
            problems.append(f"{path}: has the same name as {named[name]}; keep one of them there")
        named[name] = path
    problems.tell()
    return named


def _split(data: DataConfig, found: _Found) -> tuple[list[str], list[str]]:
    """Names of the training and validation cases; numbers count in the order of the list."""
    names = [case.name for case in found.cases]
    train, validation = data.train, data.validation
    for key, value in (("data.train", train), ("data.validation", validation)):
        unknown = [n for n in value if n not in names] if isinstance(value, list) else []
        if unknown:
            shown = some(names)
            raise ConfigError(f"{key}: no case is named {', '.join(unknown)}; there are {shown}")
    named = set(train) if isinstance(train, list) else set()
    if validation is None:
        validation = [name for name in found.validation if name not in named]
    named |= set(validation) if isinstance(validation, list) else set()
    free = [name for name in names if name not in named]
    if isinstance(train, int):
        train, free = _taken(free, train, "data.train")
    if isinstance(validation, int):
        # The last ones where the others are for training.
        first = 0 if train is not None else max(0, len(free) - validation)
        free, held_out = free[:first], free[first:]
        validation, _ = _taken(held_out, validation, "data.validation")
    train = free if train is None else train
    both = sorted(set(train) & set(validation))
    if both:
        raise ConfigError(f"data.train and data.validation: both name {', '.join(both)}")
    if not train:
        raise ConfigError("data.train: no case is left for training")
    return train, validation


def _taken(names: list[str], count: int, key: str) -> tuple[list[str], list[str]]:
    """The first `count` of the names, and the others."""
    if count > len(names):
        raise ConfigError(f"{key}: asks for {count} cases, but {len(names)} are left")
    return names[:count], names[count:]


def _labels(data: DataConfig, own: DatasetLabels) -> tuple[DatasetLabels, list[str]]:
    """What `data` says of the labels, or else the data set itself; the classes with it."""
    labels = own
    # Regions of the data set are of its own labels: no use where others are made of them.
    if data.classes is not None or data.label_map is not None:
        table = data.label_map
        table = read_label_map(table) if isinstance(table, Path) else table
        labels = DatasetLabels(data.classes or _named_in(table), table, own.ignore)
    classes = labels.classes
    if classes is None:
        raise ConfigError(
            "data.classes: missing; list the names of the classes, background first, "
            "such as [background, lesion]"
        )
    if data.regions is not None:
        labels = replace(labels, regions=data.regions, region_classes=None)
    if data.region_classes is not None:
        labels = replace(labels, region_classes=data.region_classes)
    return labels, classes


def _named_in(table: dict[int, int | str] | None) -> list[str] | None:
    """The classes of a label map, if it names them all."""
    names = [name for name in (table or {}).values() if name != "ignore"]
    if not names or not all(isinstance(name, str) for name in names):
        return None
    return list(dict.fromkeys(["background", *map(str, names)]))


def _channels(data: DataConfig, found: _Found, cases: Sequence[CaseFiles]) -> list[str]:
    """Names of the channels; each case has a file for each, or one file with all of them."""
    most = max(len(case.images) for case in cases)
    suffixes = [suffix.strip("_-. ") or suffix for suffix in found.image_suffix or []]
    if isinstance(data.channels, list):
        names = data.channels
    elif data.channels is None and found.channels is not None:
        names = found.channels
    elif data.channels is None and len(suffixes) > 1:
        names = suffixes
    else:
        names = [f"channel {index}" for index in range(data.channels or most)]
    Problems(
        f"{case.image}: expected {len(names)} files of case {case.name}, one for each channel "
        f"({', '.join(names)}), got {len(case.images)}"
        for case in cases
        if most > 1 and not len(case.images) == most == len(names)
    ).tell()
    return names
