"""What a dataset.json (Decathlon, MONAI, nnU-Net) says of its labels and channels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from riskmap_ext.finetune.base.errors import DataError
from riskmap_ext.finetune.base.structures import check_names

# Of int16.
_MAX_CLASS = 32767


@dataclass(frozen=True)
class DatasetLabels:
    """What is known of the label values.

    classes are None where not every class has a name. label_map: for numbers with gaps.
    """

    classes: list[str] | None = None
    label_map: Mapping[int, int | str] | None = None
    ignore: tuple[int, ...] = ()
    regions: Mapping[str, Sequence[int | str]] | None = None
    region_classes: Sequence[int | str] | None = None


def dataset_channels(path: Path, content: dict[str, Any]) -> list[str] | None:
    """The Decathlon's `modality`, nnU-Net's `channel_names`: {"0": "FLAIR", ...}."""
    given = content.get("channel_names", content.get("modality"))
    if given is None:
        return None
    numbers = [str(index) for index in range(len(given))] if isinstance(given, dict) else None
    if numbers is None or {str(key) for key in given} != set(numbers):
        raise DataError(f"{path}: channel names: expected 0: name, 1: name, ..., got {given}")
    by_number = {str(key): str(name) for key, name in given.items()}
    return [by_number[number] for number in numbers] or None


def dataset_labels(path: Path, content: dict[str, Any]) -> DatasetLabels:
    """`labels` of a dataset.json: number: name, name: number, or nnU-Net's name: [numbers]."""
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        return DatasetLabels()
    by_number = all(re.fullmatch(r"[0-9]+", str(key)) for key in labels)
    try:
        check_names([str(name) for name in (labels.values() if by_number else labels)])
    except ValueError as error:
        raise DataError(f"{path}: labels: {error}") from None
    if by_number:
        labels = {str(name): int(key) for key, name in labels.items()}
    numbers = [n for value in labels.values() for n in (value if _is_list(value) else [value])]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise DataError(f"{path}: labels: expected number: name, got {labels}")
    ignored = tuple(v for n, v in labels.items() if n == "ignore" and isinstance(v, int))
    named = {name: value for name, value in labels.items() if name != "ignore"}
    if any(_is_list(value) for value in named.values()):
        return _region_labels(path, content, named, ignored)
    names = {value: name for name, value in sorted(named.items(), key=lambda item: item[1])}
    if len(names) != len(named):
        raise DataError(f"{path}: labels: expected distinct numbers, got {labels}")
    if 0 not in names:
        return DatasetLabels(ignore=ignored)
    classes = list(names.values())
    if list(names) == list(range(len(names))):
        return DatasetLabels(classes, ignore=ignored)
    return DatasetLabels(classes, {v: name for v, name in names.items() if v > 0}, ignored)


def _region_labels(
    path: Path, content: dict[str, Any], named: dict[str, Any], ignored: tuple[int, ...]
) -> DatasetLabels:
    """nnU-Net's regions; a class takes the name of the region that is it alone."""
    regions = {name: value if _is_list(value) else [value] for name, value in named.items()}
    regions = {name: values for name, values in regions.items() if values != [0]}
    highest = max((number for values in regions.values() for number in values), default=0)
    if not 0 < highest <= _MAX_CLASS or not all(regions.values()):
        raise DataError(
            f"{path}: labels: expected numbers up to {_MAX_CLASS} for each region, got {named}"
        )
    alone = {values[0]: name for name, values in regions.items() if len(values) == 1}
    background = next((n for n, v in named.items() if v in (0, [0])), "background")
    names = [alone.get(number, f"label {number}") for number in range(1, highest + 1)]
    order = content.get("regions_class_order")
    if order is not None and not (_is_list(order) and len(order) == len(regions)):
        raise DataError(
            f"{path}: regions_class_order: expected {len(regions)} labels, got {order!r}"
        )
    return DatasetLabels([background, *names], None, ignored, regions, order)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
