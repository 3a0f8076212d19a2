"""The files of the training and validation cases, and the names of their classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len
from pydantic import AliasChoices, AliasGenerator, ConfigDict, TypeAdapter, ValidationError

from riskmap_ext.finetune.base.errors import (
    ConfigError,
    DataError,
    InputError,
    Problems,
    shortened,
)
from riskmap_ext.finetune.base.files import absent, is_image, stem
from riskmap_ext.finetune.base.log import some
from riskmap_ext.finetune.base.structures import IGNORE_INDEX, Structures
from riskmap_ext.finetune.config.load import problems_of
from riskmap_ext.finetune.config.schema import CaseConfig, DataConfig
from riskmap_ext.finetune.config.yaml_text import read_mapping
from riskmap_ext.finetune.data.bids import bids_pairs
from riskmap_ext.finetune.data.labels import dataset_labels, labels_of

# File systems take 255, of which the names of results need some.
_LONGEST_NAME = 190


@dataclass(frozen=True)
class CaseFiles:
    """images: one file per channel, or one file with all of them."""

    name: str
    images: tuple[Path, ...]
    label: Path

    @property
    def image(self) -> Path:
        return self.images[0]


@dataclass(frozen=True)
class Listing:
    """The files of each case, its structures and channels, and notes for the log.

    label_table: original label value -> class index or IGNORE_INDEX. image_suffix: what follows the
    case's name in the files of each channel, if known.
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
        """`data.label_map` in numbers; None if every value is its own index."""
        table = {v: i for v, i in self.label_table.items() if (v, i) != (0, 0)}
        if all(value == index for value, index in table.items()):
            return None
        return {v: "ignore" if i == IGNORE_INDEX else i for v, i in table.items()}


@dataclass(frozen=True)
class Found:
    """All cases before selection, and what the data set itself specifies, as keys of `data`.

    left_out: name -> what the case lacks.
    """

    cases: list[CaseFiles]
    validation: list[str] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)
    image_suffix: list[str] | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def list_cases(data: DataConfig) -> Listing:
    """The cases that `data` selects; opens no image.

    Raises: ConfigError for an impossible selection, DataError for missing folders.
    """
    found, errors = find_cases(data), Problems()
    counts = Counter(case.name for case in found.cases)
    Problems(
        f"data: more than one case is named {name} "
        f"({', '.join(str(c.image) for c in found.cases if c.name == name)}); list each image "
        "once, or give each entry of data.cases a name of its own"
        for name in sorted(counts)
        if counts[name] > 1
    ).tell()
    Problems(told for case in found.cases for told in _name_problems(case)).tell()
    by_name = {case.name: case for case in found.cases}
    split, channels = ([*by_name], list[str]()), list[str]()
    with errors.collected(InputError):
        split = _split(data, found)
    train, validation = ([by_name[name] for name in names] for names in split)
    with errors.collected(InputError):
        channels = _channels(data, found, [*train, *validation])
    with errors.collected(InputError):
        structures, table = labels_of(data, found.told)
    errors.tell()
    notes = _notes(found.left_out)
    return Listing(train, validation, structures, channels, table, found.image_suffix, notes)


def _name_problems(case: CaseFiles) -> Iterator[str]:
    """Why results cannot have the name of the case: it must stay within the output folder."""
    name = case.name.encode(errors="backslashreplace")
    told = f"{case.image}: the case's name {shortened(case.name)}"
    if {*"/\\\0"} & {*case.name}:
        yield f"{told}: expected a name for files, without / and \\"
    elif len(name) > _LONGEST_NAME:
        yield f"{told}: expected at most {_LONGEST_NAME} bytes, got {len(name)}"
    elif name != case.name.encode("utf-8", "replace"):
        yield f"{told}: expected a name in UTF-8; rename the file"


def volumes_in(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted by name. Raises: DataError if there are none."""
    if not (os.path.isdir(folder) and os.access(folder, os.R_OK)):
        raise DataError(absent(folder, "folder"))
    if found := sorted(path for path in folder.iterdir() if is_image(path)):
        return found
    told = contents(folder)
    raise DataError(f"{folder}: no NIfTI in it ({told}): convert with dcm2niix or SimpleITK")


def contents(folder: Path) -> str:
    """The kinds of files in a folder and its subfolders' names, for messages."""
    shown = {
        f"{path.name}/"
        if path.is_dir()
        else path.name[len(stem(path)) :] or path.suffix or path.name
        for path in folder.iterdir()
        if not path.name.startswith(".")
    }
    return f"found {some(sorted(shown))}" if shown else "it is empty"


def find_cases(data: DataConfig) -> Found:
    if data.cases is not None:
        return Found(_named(data.cases))
    if data.datalist is not None:
        return _read_datalist(data.datalist, data)
    if data.images is not None and data.labels is not None:
        return _pair_folders(data.images, data.labels, data)
    root = data.root
    assert root is not None  # DataConfig requires one of the four
    if not os.path.isdir(root):
        raise DataError(f"{absent(root, 'folder')} (data.root)")
    if os.path.lexists(root / "dataset.json"):
        return _read_datalist(root / "dataset.json", data)
    for images, labels in (("images", "labels"), ("imagesTr", "labelsTr")):
        if (root / images).is_dir() and (root / labels).is_dir():
            return _pair_folders(root / images, root / labels, data)
    if any(root.glob("sub-*/**/anat")):
        return _paired(*bids_pairs(root, data.image_suffixes, data.label_suffix))
    raise DataError(
        f"{root}: expected dataset.json, images/ and labels/, imagesTr/ and labelsTr/, or sub-*/ "
        f"of BIDS in it; {contents(root)}"
    )


def _read_datalist(path: Path, data: DataConfig) -> Found:
    """A datalist of the Medical Segmentation Decathlon or MONAI, or nnU-Net's dataset.json."""
    content, _ = read_mapping(path, DataError)
    told = {**dataset_labels(path, content), "channels": dataset_channels(path, content)}
    if "training" in content or "file_ending" not in content:
        training, validation = (
            _named(_entries(path, key, list[_Entry], content.get(key) or []))
            for key in ("training", "validation")
        )
        if not training:
            raise DataError(f"{path}: expected a list 'training' of image and label pairs")
        found = Found(training + validation, [case.name for case in validation])
    elif content.get("dataset") is None:
        found = _pair_folders(path.parent / "imagesTr", path.parent / "labelsTr", data)
    else:
        listed = _entries(path, "dataset", Annotated[dict[str, _Entry], Len(1)], content["dataset"])
        found = Found(_named([e.model_copy(update={"name": n}) for n, e in listed.items()]))
    return replace(found, told=told)


class _Entry(CaseConfig):
    """As in `data.cases`. Other tools add their own keys; nnU-Net's list is `images`."""

    model_config = ConfigDict(
        extra="ignore",
        alias_generator=AliasGenerator(validation_alias=lambda key: AliasChoices(key, f"{key}s")),
    )


def _entries(path: Path, key: str, kind: Any, content: Any) -> Any:
    """`content` as a list or dict (`kind`) of entries; paths are relative to the file's folder.

    Raises: DataError with a line for each problem.
    """
    try:
        return TypeAdapter(kind).validate_python(content, context={"base": path.parent})
    except ValidationError as error:
        raise DataError(
            [
                f"{path}: {'.'.join(filter(None, (key, place)))}: {told}"
                for place, told in problems_of(error, _Entry)
            ]
        ) from None


def dataset_channels(path: Path, content: dict[str, Any]) -> list[str] | None:
    """The Decathlon's `modality`, nnU-Net's `channel_names`: {"0": "FLAIR", ...}."""
    given = content.get("channel_names", content.get("modality"))
    if given is None:
        return None
    names = {str(key): str(name) for key, name in given.items()} if isinstance(given, dict) else {}
    numbers = [str(index) for index in range(len(names))]
    if not isinstance(given, dict) or set(names) != set(numbers):
        raise DataError(
            f"{path}: channel names: expected 0: name, 1: name, ..., got {shortened(given)}"
        )
    return [names[number] for number in numbers] or None


def _named(cases: Sequence[CaseConfig]) -> list[CaseFiles]:
    """Named by image file; if several share its name, with the folders above it.

    sub-1/mri/T1.mgz and sub-2/mri/T1.mgz become sub-1_mri_T1 and sub-2_mri_T1.
    """
    places = [(*case.images[0].parts[1:-1], stem(case.images[0])) for case in cases]
    # A file that is listed twice keeps its name: a longer one would add nothing.
    counts = Counter(place[i:] for place in set(places) for i in range(len(place)))
    names = (
        "_".join(next((p[i:] for i in range(len(p) - 1, 0, -1) if counts[p[i:]] == 1), p))
        for p in places
    )
    return [
        CaseFiles(case.name or name, case.images, case.label)
        for case, name in zip(cases, names, strict=True)
    ]


def _pair_folders(images: Path, labels: Path, data: DataConfig) -> Found:
    problems, suffixes = Problems(), data.image_suffixes
    by_channel, by_label = [dict[str, Path]()], dict[str, Path]()
    with problems.collected():
        by_channel = [files_by_name(images, suffix) for suffix in suffixes]
    with problems.collected():
        by_label = files_by_name(labels, data.label_suffix)
    problems.tell()
    if suffixes == [""] and not by_channel[0].keys() & by_label:
        numbers = sorted({name[-5:] for name in by_channel[0]})
        if all(re.fullmatch(r"_\d{4}", number) for number in numbers):  # as nnU-Net names channels
            suffixes, by_channel = numbers, [files_by_name(images, number) for number in numbers]
    return _paired(by_channel, by_label, suffixes)


def _paired(
    by_channel: list[dict[str, Path]], by_label: dict[str, Path], suffixes: list[str]
) -> Found:
    """Cases whose files share a name; for the others, what each lacks."""
    cases, left_out = [], {}
    for name in sorted(set().union(*by_channel, by_label)):
        pairs = zip(suffixes, by_channel, strict=True)
        lacks = [f"image {suffix}".strip() for suffix, files in pairs if name not in files]
        lacks += ["label"] if name not in by_label else []
        if lacks:
            left_out[name] = f"no {' and '.join(lacks)}"
        else:
            images = tuple(files[name] for files in by_channel)
            cases.append(CaseFiles(name, images, by_label[name]))
    if not cases:
        image, label = (next(iter(files.values()), "none") for files in (by_channel[0], by_label))
        raise DataError(
            f"{image} and {label}: no image and label of the same name; set data.image_suffix and "
            "data.label_suffix to what follows the case's name, such as _T1w and _seg"
        )
    return Found(cases, image_suffix=suffixes, left_out=left_out)


def _notes(left_out: dict[str, str]) -> list[str]:
    """One note for each thing that cases lack."""
    by_reason: dict[str, list[str]] = {}
    for name, why in left_out.items():
        by_reason.setdefault(why, []).append(name)
    return [f"{len(n)} left out, {why}: {some(n)}" for why, n in by_reason.items()]


def files_by_name(folder: Path, suffix: str = "") -> dict[str, Path]:
    """Case name -> file, for the files whose name without extension ends in `suffix`.

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


def _split(data: DataConfig, found: Found) -> tuple[list[str], list[str]]:
    """Names of the training and validation cases; numbers count in the order of the list.

    With folds, all of them are for training: each fold validates on its own part.
    """
    names = [case.name for case in found.cases]
    wanted = {"data.train": data.train, "data.validation": data.validation}
    if data.validation is None:
        trained = data.train if isinstance(data.train, list) else []
        wanted["data.validation"] = [name for name in found.validation if name not in trained]
    named = {key: value for key, value in wanted.items() if isinstance(value, list)}
    asked = {name for value in named.values() for name in value}
    lacking = sorted(found.left_out.items(), key=lambda item: item[0] not in asked)
    told = "; left out: " + some([f"{name}: {why}" for name, why in lacking]) if lacking else ""
    for key, value in named.items():
        if unknown := ", ".join(name for name in value if name not in names):
            raise ConfigError(f"{key}: no case is named {unknown}; there are {some(names)}{told}")
        if twice := ", ".join(sorted({name for name in value if value.count(name) > 1})):
            raise ConfigError(f"{key}: names {twice} more than once")
    free = [name for name in names if not any(name in value for value in named.values())]
    for key, count in wanted.items():
        if isinstance(count, int):
            if count > len(free):
                raise ConfigError(f"{key}: asks for {count} cases, but {len(free)} are left{told}")
            # The last ones for validation if the others are for training.
            first = 0 if data.train is not None else len(free) - count
            named[key] = free[first : first + count]
            free = free[:first] + free[first + count :]
    train, validation = named.get("data.train", free), named["data.validation"]
    if both := sorted(set(train) & set(validation)):
        raise ConfigError(f"data.train and data.validation: both name {', '.join(both)}")
    if not train:
        raise ConfigError(f"data.train: no case is left for training{told}")
    return (train, validation) if data.folds is None else (train + validation, [])


def _channels(data: DataConfig, found: Found, cases: Sequence[CaseFiles]) -> list[str]:
    """Names of the channels; each case has one file per channel, or one file with all of them."""
    most = max(len(case.images) for case in cases)
    suffixes = [suffix.strip("_-. ") or suffix for suffix in found.image_suffix or []]
    given = data.channels or found.told.get("channels") or (suffixes if suffixes[1:] else most)
    names = given if isinstance(given, list) else [f"channel {index}" for index in range(given)]
    Problems(
        f"{case.image}: expected {len(names)} files of case {case.name}, one for each channel "
        f"({', '.join(names)}), got {len(case.images)}"
        for case in cases
        if most > 1 and not len(case.images) == most == len(names)
    ).tell()
    return names
