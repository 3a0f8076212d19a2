"""What a dataset.json (Decathlon, MONAI, nnU-Net) says of its cases, labels and channels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, AliasGenerator, ConfigDict, TypeAdapter, ValidationError

from riskmap_ext.finetune.base.errors import DataError
from riskmap_ext.finetune.base.structures import check_names
from riskmap_ext.finetune.config.load import problems_of
from riskmap_ext.finetune.config.schema import CaseConfig

# Of int16.
_MAX_CLASS = 32767


class Entry(CaseConfig):
    """As in `data.cases`. Other tools add keys of their own; nnU-Net's list is `images`."""

    model_config = ConfigDict(
        extra="ignore",
        alias_generator=AliasGenerator(validation_alias=lambda key: AliasChoices(key, f"{key}s")),
    )


def entries(path: Path, key: str, kind: Any, content: Any) -> Any:
    """`content` as a list or dict (`kind`) of entries; their paths start from the file's folder.

    Raises: DataError with a line for each problem.
    """
    try:
        return TypeAdapter(kind).validate_python(content, context={"base": path.parent})
    except ValidationError as error:
        raise DataError(
            [
                f"{path}: {'.'.join(filter(None, (key, place)))}: {told}"
                for place, told in problems_of(error, Entry)
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
        raise DataError(f"{path}: channel names: expected 0: name, 1: name, ..., got {given}")
    return [names[number] for number in numbers] or None


def dataset_labels(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """`labels` of a dataset.json: number: name, name: number, or nnU-Net's name: [numbers].

    Returns: keys of `data`, as far as it says them (label_map: for numbers with gaps), and under
    `ignore` the numbers that it says to leave out.
    """
    given = content.get("labels")
    if not isinstance(given, dict) or not given:
        return {}
    if all(re.fullmatch(r"[0-9]+", str(key)) for key in given):
        pairs = [(str(name), int(number)) for number, name in given.items()]
    else:
        pairs = [(str(name), value) for name, value in given.items()]
    try:
        check_names([name for name, _ in pairs])
    except ValueError as error:
        raise DataError(f"{path}: labels: {error}") from None
    named = {n: list(v) if isinstance(v, (list, tuple)) else [v] for n, v in pairs}
    numbers = [number for values in named.values() for number in values]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise DataError(f"{path}: labels: expected number: name, got {given}")
    ignored = {"ignore": named.pop("ignore", [])}
    # As in nnU-Net, lists of one number each are no regions.
    if any(len(values) != 1 for values in named.values()):
        return ignored | _region_labels(path, named, content.get("regions_class_order"))
    by_value = {value: name for name, (value,) in sorted(named.items(), key=lambda item: item[1])}
    if len(by_value) != len(named):
        raise DataError(f"{path}: labels: expected distinct numbers, got {given}")
    if 0 not in by_value:
        return ignored
    gaps = list(by_value) != list(range(len(by_value)))
    table = {value: name for value, name in by_value.items() if value > 0} if gaps else None
    return ignored | {"classes": list(by_value.values()), "label_map": table}


def _region_labels(path: Path, named: dict[str, list[int]], order: Any) -> dict[str, Any]:
    """nnU-Net's regions; a class takes the name of the region that is it alone."""
    regions = {name: values for name, values in named.items() if values != [0]}
    highest = max((number for values in regions.values() for number in values), default=0)
    if not 0 < highest <= _MAX_CLASS or not all(regions.values()):
        raise DataError(
            f"{path}: labels: expected numbers up to {_MAX_CLASS} for each region, got {named}"
        )
    if order is not None and not (isinstance(order, (list, tuple)) and len(order) == len(regions)):
        raise DataError(
            f"{path}: regions_class_order: expected {len(regions)} labels, got {order!r}"
        )
    alone = {0: "background"} | {values[0]: n for n, values in named.items() if len(values) == 1}
    names = [alone.get(number, f"label {number}") for number in range(highest + 1)]
    return {"classes": names, "regions": regions, "region_classes": order}
