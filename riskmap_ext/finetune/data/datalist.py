"""Which files make up the training and validation cases, and what their classes are called."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from riskmap_ext.finetune.base.errors import ConfigError, DataError
from riskmap_ext.finetune.base.structures import Structures, structures_of
from riskmap_ext.finetune.config.schema import DataConfig, check_names
from riskmap_ext.finetune.data.label_table import label_table, read_label_map

# Of int16.
_MAX_CLASS = 32767
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
    image_suffix: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DatasetLabels:
    """What a dataset.json says of the label values.

    classes are None where it does not name every class. label_map: for numbers with gaps.
    """

    classes: list[str] | None = None
    label_map: dict[int, int | str] | None = None
    ignore: tuple[int, ...] = ()
    regions: dict[str, list[int]] | None = None
    region_classes: list[int] | None = None


@dataclass(frozen=True)
class _Found:
    cases: list[CaseFiles]
    validation: list[str] | None = None
    labels: DatasetLabels = field(default_factory=DatasetLabels)
    channels: list[str] | None = None
    image_suffix: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def list_cases(data: DataConfig) -> Listing:
    """The cases that `data` selects; no image is opened.

    Raises: ConfigError for a selection that cannot be made, DataError for missing files.
    """
    found = _find(data)
    names = [case.name for case in found.cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            [
                f"data: more than one case is named {name} "
                f"({', '.join(str(c.image) for c in found.cases if c.name == name)}); list each "
                "image once, or give each entry of data.cases a name of its own"
                for name in twice
            ]
        )
    train, validation = _split(data, found)
    by_name = {case.name: case for case in found.cases}
    wanted = _label_map(data, found)
    classes = _class_names(data, found, wanted)
    chosen = [by_name[name] for name in (*train, *validation)]
    listing = Listing(
        chosen[: len(train)],
        chosen[len(train) :],
        _structures(data, found, classes),
        _channels(data, found, chosen),
        label_table(wanted, classes, found.labels.ignore),
        found.image_suffix,
        found.notes,
    )
    problems = [_why_no_file(p) for c in chosen for p in (*c.images, c.label)]
    if any(problems):
        raise DataError([problem for problem in problems if problem is not None])
    return listing


def stem(path: Path) -> str:
    """The file name without the image format's ending."""
    for ending in EXTENSIONS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.name


def volumes_in(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name."""
    _check_folder(folder)
    try:
        found = list(folder.iterdir())
    except OSError as error:
        raise DataError([f"{folder}: cannot be read ({error.strerror})"]) from None
    return sorted(
        path
        for path in found
        if path.name.lower().endswith(EXTENSIONS) and not path.name.startswith(".")
    )


def _why_no_file(path: Path) -> str | None:
    try:
        if path.is_file():
            return None
        why = "is a folder; expected a file" if path.is_dir() else "no such file"
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
    return f"{path}: {why}"


def _check_folder(path: Path, key: str = "") -> None:
    if not path.is_dir():
        why = "is a file; expected a folder" if path.exists() else "no such folder"
        raise DataError([f"{path}: {why}{key}"])


def _case_names(images: Sequence[Path]) -> list[str]:
    """File names without ending; where several images share one, with the folders above them.

    sub-1/mri/T1.mgz and sub-2/mri/T1.mgz become sub-1_mri_T1 and sub-2_mri_T1.
    """
    names = [stem(path) for path in images]
    depth = 0
    # Folders are added until the names differ or there are no more.
    while depth < max((len(path.parents) for path in images), default=0):
        twice = {name for name in names if names.count(name) > 1}
        if not twice:
            break
        depth += 1
        for index, path in enumerate(images):
            if names[index] in twice:
                above = [folder.name for folder in path.parents[:depth] if folder.name]
                names[index] = "_".join([*reversed(above), stem(path)])
    # The same file twice: the long name would tell nothing more.
    return [
        stem(path) if names.count(name) > 1 else name
        for name, path in zip(names, images, strict=True)
    ]


def _find(data: DataConfig) -> _Found:
    if data.cases is not None:
        derived = _case_names([c.images[0] for c in data.cases])
        return _Found(
            [
                CaseFiles(case.name or name, case.images, case.label)
                for case, name in zip(data.cases, derived, strict=True)
            ]
        )
    if data.datalist is not None:
        return _read_datalist(data.datalist, data)
    if data.images is not None and data.labels is not None:
        return _pair_folders(data.images, data.labels, data.image_suffixes, data.label_suffix)
    root = data.root
    assert root is not None  # DataConfig asks for one of the four
    _check_folder(root, " (data.root)")
    if (root / "dataset.json").is_file():
        return _read_datalist(root / "dataset.json", data)
    for images, labels in (("images", "labels"), ("imagesTr", "labelsTr")):
        if (root / images).is_dir() and (root / labels).is_dir():
            folders = root / images, root / labels
            return _pair_folders(*folders, data.image_suffixes, data.label_suffix)
    raise DataError(
        [f"{root}: expected dataset.json, images/ and labels/, or imagesTr/ and labelsTr/ in it"]
    )


def _read_datalist(path: Path, data: DataConfig) -> _Found:
    """A Medical Segmentation Decathlon or MONAI datalist, or an nnU-Net dataset.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError([f"{path}: no such file"]) from None
    except IsADirectoryError:
        raise DataError([f"{path}: is a folder; expected a JSON file (data.datalist)"]) from None
    except (OSError, ValueError) as error:
        raise DataError([f"{path}: cannot be read as JSON ({error})"]) from None
    if not isinstance(content, dict):
        raise DataError([f"{path}: expected an object with 'training', got {type(content)}"])
    labels = dataset_labels(path, content)
    channels = dataset_channels(path, content)
    if "training" not in content and "file_ending" in content:
        return _nnunet_cases(path, content, data, labels, channels)
    training = _datalist_cases(path, content, "training")
    validation = _datalist_cases(path, content, "validation")
    if not training:
        raise DataError([f"{path}: expected a list 'training' of image and label pairs"])
    names = [case.name for case in validation] or None
    return _Found(training + validation, names, labels, channels)


def _nnunet_cases(
    path: Path,
    content: dict[str, Any],
    data: DataConfig,
    labels: DatasetLabels,
    channels: list[str] | None,
) -> _Found:
    """A raw data set of nnU-Net v2: imagesTr/CASE_0000.nii.gz, or the files its `dataset` names."""
    ending = str(content["file_ending"])
    if ending.lower() not in EXTENSIONS:
        raise DataError(
            [f"{path}: file_ending: expected one of {', '.join(EXTENSIONS)}, got {ending!r}"]
        )
    listed = content.get("dataset")
    if listed is None:
        suffixes = data.image_suffixes
        if suffixes == [""]:
            suffixes = [f"_{index:04d}" for index in range(len(channels or [""]))]
        folders = path.parent / "imagesTr", path.parent / "labelsTr"
        paired = _pair_folders(*folders, suffixes, data.label_suffix)
        return _Found(paired.cases, None, labels, channels, suffixes, paired.notes)
    cases = []
    for name, files in listed.items() if isinstance(listed, dict) else ():
        if not (isinstance(files, dict) and isinstance(files.get("images"), list)):
            raise DataError([f"{path}: dataset: {name}: expected images and label, got {files!r}"])
        images = tuple(path.parent / str(image) for image in files["images"])
        cases.append(CaseFiles(str(name), images, path.parent / str(files.get("label"))))
    if not cases:
        raise DataError([f"{path}: dataset: expected cases with images and label, got {listed!r}"])
    return _Found(cases, None, labels, channels)


def _datalist_cases(path: Path, content: dict[str, Any], key: str) -> list[CaseFiles]:
    pairs: list[tuple[tuple[Path, ...], Path]] = []
    entries = content.get(key) or []
    if not isinstance(entries, list):
        raise DataError([f"{path}: expected a list {key!r}, got {entries!r}"])
    for entry in entries:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise DataError([f"{path}: expected image and label in each {key!r}, got {entry!r}"])
        given = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
        if not given or not all(isinstance(name, str) for name in (*given, entry["label"])):
            raise DataError([f"{path}: expected file names in each {key!r}, got {entry!r}"])
        pairs.append((tuple(path.parent / name for name in given), path.parent / entry["label"]))
    names = _case_names([images[0] for images, _ in pairs])
    return [CaseFiles(name, *pair) for name, pair in zip(names, pairs, strict=True)]


def dataset_channels(path: Path, content: dict[str, Any]) -> list[str] | None:
    """The Decathlon's `modality`, nnU-Net's `channel_names`: {"0": "FLAIR", ...}."""
    given = content.get("channel_names", content.get("modality"))
    if given is None:
        return None
    if not isinstance(given, dict) or sorted(map(str, given)) != sorted(
        str(index) for index in range(len(given))
    ):
        raise DataError([f"{path}: channel names: expected 0: name, 1: name, ..., got {given}"])
    by_number = {int(key): str(name) for key, name in given.items()}
    return [by_number[index] for index in range(len(given))] or None


def dataset_labels(path: Path, content: dict[str, Any]) -> DatasetLabels:
    """`labels` of a dataset.json: number: name, name: number, or nnU-Net's name: [numbers]."""
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        return DatasetLabels()
    by_number = all(re.fullmatch(r"[0-9]+", str(key)) for key in labels)
    try:
        check_names([str(name) for name in (labels.values() if by_number else labels)])
    except ValueError as error:
        raise DataError([f"{path}: labels: {error}"]) from None
    if by_number:
        labels = {str(name): int(key) for key, name in labels.items()}
    numbers = [n for value in labels.values() for n in (value if _is_list(value) else [value])]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise DataError([f"{path}: labels: expected number: name, got {labels}"])
    ignored = tuple(v for n, v in labels.items() if n == "ignore" and isinstance(v, int))
    named = {name: value for name, value in labels.items() if name != "ignore"}
    if any(_is_list(value) for value in named.values()):
        return _region_labels(path, content, named, ignored)
    names = {value: name for name, value in named.items()}
    if len(names) != len(named):
        raise DataError([f"{path}: labels: expected distinct numbers, got {labels}"])
    if sorted(names) == list(range(len(names))):
        return DatasetLabels([names[index] for index in range(len(names))], ignore=ignored)
    if 0 not in names:
        return DatasetLabels(ignore=ignored)
    order = sorted(names)
    table: dict[int, int | str] = {value: names[value] for value in order if value > 0}
    return DatasetLabels([names[value] for value in order], table, ignored)


def _region_labels(
    path: Path, content: dict[str, Any], named: dict[str, Any], ignored: tuple[int, ...]
) -> DatasetLabels:
    """nnU-Net's regions; a class takes the name of the region that is it alone."""
    regions = {name: value if _is_list(value) else [value] for name, value in named.items()}
    regions = {name: values for name, values in regions.items() if values != [0]}
    highest = max((number for values in regions.values() for number in values), default=0)
    if not 0 < highest <= _MAX_CLASS or not all(regions.values()):
        raise DataError(
            [f"{path}: labels: expected numbers up to {_MAX_CLASS} for each region, got {named}"]
        )
    alone = {values[0]: name for name, values in regions.items() if len(values) == 1}
    background = next((n for n, v in named.items() if v in (0, [0])), "background")
    names = {number: alone.get(number, f"label {number}") for number in range(1, highest + 1)}
    order = content.get("regions_class_order")
    if order is not None and not (_is_list(order) and len(order) == len(regions)):
        raise DataError(
            [f"{path}: regions_class_order: expected {len(regions)} labels, got {order!r}"]
        )
    return DatasetLabels([background, *names.values()], None, ignored, regions, order)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _pair_folders(
    images: Path, labels: Path, image_suffixes: Sequence[str], label_suffix: str
) -> _Found:
    by_suffix = [_names(images, suffix) for suffix in image_suffixes]
    by_label = _names(labels, label_suffix)
    everywhere = set.intersection(*(set(found) for found in by_suffix))
    common = sorted(everywhere & by_label.keys())
    by_image = by_suffix[0]
    if not common and list(image_suffixes) == [""] and by_image:
        numbers = sorted({name[-5:] for name in by_image})
        if all(re.fullmatch(r"_\d{4}", number) for number in numbers):  # as nnU-Net names channels
            return _pair_folders(images, labels, numbers, label_suffix)
    if not common:
        examples = [next(iter(v.values())).name if v else "none" for v in (by_image, by_label)]
        raise DataError(
            [
                f"{images} and {labels}: no image and label of the same name (such as "
                f"{examples[0]} and {examples[1]}); set data.image_suffix and data.label_suffix "
                "to what follows the case's name, such as _T1w and _seg"
            ]
        )
    notes = []
    some = set.union(*(set(found) for found in by_suffix))
    for folder, alone, why in (
        (images, some - everywhere, "without all of their channels"),
        (images, everywhere - by_label.keys(), "without a partner"),
        (labels, by_label.keys() - some, "without a partner"),
    ):
        if alone:
            shown = ", ".join(sorted(alone)[:5]) + (", ..." if len(alone) > 5 else "")
            notes.append(f"{folder}: {len(alone)} left out, {why}: {shown}")
    cases = [
        CaseFiles(name, tuple(found[name] for found in by_suffix), by_label[name])
        for name in common
    ]
    return _Found(cases, image_suffix=list(image_suffixes), notes=notes)


def _names(folder: Path, suffix: str) -> dict[str, Path]:
    """Case name -> file, of the files whose name without format ends in `suffix`.

    Raises: DataError for a.nii beside a.nii.gz.
    """
    named: dict[str, Path] = {}
    problems = []
    for path in volumes_in(folder):
        name = stem(path)
        if not name.endswith(suffix):
            continue
        if name in named:
            problems.append(f"{path}: has the same name as {named[name]}; keep one of them there")
        named[name] = path
    if problems:
        raise DataError(problems)
    return {name.removesuffix(suffix): path for name, path in named.items()}


def _split(data: DataConfig, found: _Found) -> tuple[list[str], list[str]]:
    """Names of the training and validation cases; numbers count in the order of the list."""
    names = [case.name for case in found.cases]
    listed = {"data.train": data.train, "data.validation": data.validation}
    for key, value in listed.items():
        unknown = [n for n in value if n not in names] if isinstance(value, list) else []
        if unknown:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ConfigError(f"{key}: no case is named {', '.join(unknown)}; there are {shown}")
    fixed_train = data.train if isinstance(data.train, list) else []
    validation = data.validation if isinstance(data.validation, list) else None
    if data.validation is None:
        validation = [n for n in found.validation or [] if n not in fixed_train]
    free = [n for n in names if n not in (validation or []) and n not in fixed_train]

    train = data.train
    if isinstance(train, int):
        count = train
        train, free = _take(free, count, "data.train"), free[count:]
    if validation is None:
        count = int(data.validation)  # type: ignore[arg-type]  # neither None nor a list here
        held_out = free[len(free) - count :] if train is None else free
        validation = _take(held_out, count, "data.validation")
    if train is None:
        train = [n for n in free if n not in validation]
    both = sorted(set(train) & set(validation))
    if both:
        raise ConfigError(f"data.train and data.validation: both name {', '.join(both)}")
    if not train:
        raise ConfigError("data.train: no case is left for training")
    return list(train), list(validation)


def _take(names: list[str], count: int, key: str) -> list[str]:
    if count > len(names):
        raise ConfigError(f"{key}: asks for {count} cases, but {len(names)} are left")
    return names[:count]


def _label_map(data: DataConfig, found: _Found) -> dict[int, int | str] | None:
    if isinstance(data.label_map, Path):
        return read_label_map(data.label_map)
    if data.label_map is not None or data.classes is not None:
        return data.label_map
    return found.labels.label_map


def _class_names(data: DataConfig, found: _Found, wanted: dict[int, int | str] | None) -> list[str]:
    if data.classes is not None:
        return data.classes
    if data.label_map is not None and wanted is not None:
        names = [name for name in wanted.values() if name != "ignore"]
        if names and all(isinstance(name, str) for name in names):
            return list(dict.fromkeys(["background", *map(str, names)]))
    elif found.labels.classes is not None:
        return found.labels.classes
    raise ConfigError(
        "data.classes: missing; list the names of the classes, background first, "
        "such as [background, lesion]"
    )


def _structures(data: DataConfig, found: _Found, classes: list[str]) -> Structures:
    if data.regions is not None:
        return structures_of(classes, data.regions, data.region_classes)
    own = found.labels
    # Regions of the data set are of its own labels: no use where others are made of them.
    if own.regions is None or data.label_map is not None or data.classes is not None:
        return structures_of(classes, None, data.region_classes)
    return structures_of(classes, own.regions, data.region_classes or own.region_classes)


def _channels(data: DataConfig, found: _Found, cases: Sequence[CaseFiles]) -> list[str]:
    """Names of the channels; each case has a file for each, or one file with all of them."""
    most = max((len(case.images) for case in cases), default=1)
    if isinstance(data.channels, list):
        names = data.channels
    elif data.channels is not None:
        names = [f"channel {index}" for index in range(data.channels)]
    elif found.channels is not None:
        names = found.channels
    else:
        suffixes = found.image_suffix
        known = suffixes is not None and len(suffixes) > 1
        names = [s.strip("_-. ") or s for s in suffixes or []] if known else []
        names = names or [f"channel {index}" for index in range(most)]
    odd = [case for case in cases if len(case.images) not in (1, len(names))]
    if most > 1:
        odd += [case for case in cases if len(case.images) != most]
    if odd:
        raise DataError(
            [
                f"{case.image}: expected {len(names)} files of case {case.name}, one for each "
                f"channel ({', '.join(names)}), got {len(case.images)}"
                for case in dict.fromkeys(odd)
            ]
        )
    return names
