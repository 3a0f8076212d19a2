"""Which files make up the training and validation cases, and what their classes are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from riskmap_ext.finetune.config import IGNORE_INDEX, DataConfig, check_names
from riskmap_ext.finetune.errors import ConfigError, DataError

# .img is the other half of .hdr.
EXTENSIONS = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr")


@dataclass(frozen=True)
class CaseFiles:
    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Listing:
    """Files of every case, class names (background first) and remarks for the log."""

    train: list[CaseFiles]
    validation: list[CaseFiles]
    classes: list[str]
    label_table: dict[int, int]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    cases: list[CaseFiles]
    validation: list[str] | None = None
    classes: list[str] | None = None
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
    classes = _class_names(data, found)
    listing = Listing(
        [by_name[name] for name in train],
        [by_name[name] for name in validation],
        classes,
        label_table(data, classes),
        found.notes,
    )
    files = [f for c in (*listing.train, *listing.validation) for f in (c.image, c.label)]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise DataError([_why_no_file(path) for path in missing])
    return listing


def label_table(data: DataConfig, classes: Sequence[str]) -> dict[int, int]:
    """Original label value -> class index (or IGNORE_INDEX)."""
    if data.label_map is None:
        return {index: index for index in range(len(classes))}
    table = {0: 0}
    for value, wanted in data.label_map.items():
        if wanted == "ignore":
            table[value] = IGNORE_INDEX
        elif isinstance(wanted, str) and wanted in classes:
            table[value] = list(classes).index(wanted)
        elif isinstance(wanted, int) and 0 <= wanted < len(classes):
            table[value] = wanted
        else:
            raise ConfigError(
                f"data.label_map: {value}: {wanted!r} is no class; expected a name or index of "
                f"{list(classes)}, or ignore"
            )
    return table


def stem(path: Path) -> str:
    """The file name without the image format's ending."""
    for ending in EXTENSIONS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.name


def volumes_in(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name."""
    _check_folder(folder)
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(EXTENSIONS) and not path.name.startswith(".")
    )


def _why_no_file(path: Path) -> str:
    return f"{path}: is a folder; expected a file" if path.is_dir() else f"{path}: no such file"


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
        derived = _case_names([c.image for c in data.cases])
        return _Found(
            [
                CaseFiles(case.name or name, case.image, case.label)
                for case, name in zip(data.cases, derived, strict=True)
            ]
        )
    if data.datalist is not None:
        return _read_datalist(data.datalist, data)
    if data.images is not None and data.labels is not None:
        return _pair_folders(data.images, data.labels, data.image_suffix, data.label_suffix)
    root = data.root
    assert root is not None  # DataConfig asks for one of the four
    _check_folder(root, " (data.root)")
    if (root / "dataset.json").is_file():
        return _read_datalist(root / "dataset.json", data)
    for images, labels in (("images", "labels"), ("imagesTr", "labelsTr")):
        if (root / images).is_dir() and (root / labels).is_dir():
            return _pair_folders(root / images, root / labels, data.image_suffix, data.label_suffix)
    raise DataError(
        [f"{root}: expected dataset.json, images/ and labels/, or imagesTr/ and labelsTr/ in it"]
    )


def _read_datalist(path: Path, data: DataConfig) -> _Found:
    """A Medical Segmentation Decathlon or MONAI datalist, or an nnU-Net dataset.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError([f"{path}: no such file"]) from None
    except IsADirectoryError:
        raise DataError([f"{path}: is a folder; expected a JSON file (data.datalist)"]) from None
    except (OSError, ValueError) as error:
        raise DataError([f"{path}: cannot be read as JSON ({error})"]) from None
    if not isinstance(content, dict):
        raise DataError([f"{path}: expected an object with 'training', got {type(content)}"])
    classes = _datalist_classes(path, content.get("labels"))
    if "training" not in content and "file_ending" in content:
        paired = _pair_folders(
            path.parent / "imagesTr",
            path.parent / "labelsTr",
            data.image_suffix or "_0000",
            data.label_suffix,
        )
        return _Found(paired.cases, None, classes, paired.notes)
    training = _datalist_cases(path, content, "training")
    if not training:
        raise DataError([f"{path}: expected a list 'training' of image and label pairs"])
    validation = _datalist_cases(path, content, "validation")
    names = [case.name for case in validation] or None
    return _Found(training + validation, names, classes)


def _datalist_cases(path: Path, content: dict[str, Any], key: str) -> list[CaseFiles]:
    pairs = []
    for entry in content.get(key) or []:
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise DataError([f"{path}: expected image and label in each {key!r}, got {entry!r}"])
        if isinstance(entry["image"], list):
            raise DataError([f"{path}: {entry['image']}: one image per case is read, got a list"])
        pairs.append([path.parent / entry[k] for k in ("image", "label")])
    names = _case_names([image for image, _ in pairs])
    return [CaseFiles(name, *pair) for name, pair in zip(names, pairs, strict=True)]


def _datalist_classes(path: Path, labels: Any) -> list[str] | None:
    if not isinstance(labels, dict) or not labels:
        return None
    if all(str(key).isdigit() for key in labels):
        names = {int(key): str(name) for key, name in labels.items()}
    elif all(isinstance(value, int) for value in labels.values()):
        names = {value: str(key) for key, value in labels.items()}
    else:
        raise DataError([f"{path}: labels: expected number: name, got {labels}"])
    try:
        check_names(list(names.values()))
    except ValueError as error:
        raise DataError([f"{path}: labels: {error}"]) from None
    # Gaps in the numbering are left to data.classes and data.label_map.
    gapless = sorted(names) == list(range(len(names)))
    return [names[i] for i in range(len(names))] if gapless else None


def _pair_folders(images: Path, labels: Path, image_suffix: str, label_suffix: str) -> _Found:
    by_image = _names(images, image_suffix)
    by_label = _names(labels, label_suffix)
    common = sorted(by_image.keys() & by_label.keys())
    if not common and not image_suffix and by_image and all(n.endswith("_0000") for n in by_image):
        # nnU-Net names the first channel so.
        return _pair_folders(images, labels, "_0000", label_suffix)
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
    for folder, found, other in ((images, by_image, by_label), (labels, by_label, by_image)):
        alone = sorted(found.keys() - other.keys())
        if alone:
            shown = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
            notes.append(f"{folder}: {len(alone)} left out, without a partner: {shown}")
    cases = [CaseFiles(name, by_image[name], by_label[name]) for name in common]
    return _Found(cases, None, None, notes)


def _names(folder: Path, suffix: str) -> dict[str, Path]:
    named = {stem(path): path for path in volumes_in(folder)}
    ends = {name: path for name, path in named.items() if name.endswith(suffix)}
    return {name.removesuffix(suffix): path for name, path in ends.items()}


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


def _class_names(data: DataConfig, found: _Found) -> list[str]:
    if data.classes is not None:
        return data.classes
    if data.label_map is not None:
        wanted = [w for w in data.label_map.values() if w != "ignore"]
        if wanted and all(isinstance(w, str) for w in wanted):
            return list(dict.fromkeys(["background", *map(str, wanted)]))
    elif found.classes is not None:
        return found.classes
    raise ConfigError(
        "data.classes: missing; list the names of the classes, background first, "
        "such as [background, lesion]"
    )
