"""What label values mean: classes and regions, from the configuration, a table or dataset.json."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from riskmap_ext.finetune.base.errors import ConfigError, DataError, shortened
from riskmap_ext.finetune.base.files import read_text
from riskmap_ext.finetune.base.structures import (
    IGNORE_INDEX,
    Structures,
    check_names,
    class_index,
    structures_of,
)
from riskmap_ext.finetune.config.schema import DataConfig

# The largest of int16.
_MAX_CLASS = 32767


def labels_of(data: DataConfig, told: Mapping[str, Any]) -> tuple[Structures, dict[int, int]]:
    """The structures, and label value -> class index or IGNORE_INDEX.

    told: what the data set itself specifies, as keys of `data`; keys set in `data` override it.

    Raises: ConfigError naming the key, DataError naming the file of data.label_map.
    """
    keys = ("classes", "label_map", "regions", "region_classes")
    given = {key: value for key in keys if (value := getattr(data, key)) is not None}
    if isinstance(data.label_map, Path):
        given["label_map"] = read_label_map(data.label_map)
    if "label_map" in given:
        names = [name for name in given["label_map"].values() if name != "ignore"]
        if names and all(isinstance(name, str) for name in names):
            given.setdefault("classes", list(dict.fromkeys(["background", *names])))
    # The data set's regions are of its own labels: they do not apply to other classes.
    own = {"classes", "label_map"} & set(given)
    dropped = keys if own else ["region_classes"] if "regions" in given else []
    labels = {key: value for key, value in told.items() if key not in dropped} | given
    classes = labels.get("classes")
    if classes is None:
        raise ConfigError(
            "data.classes: missing; list the names of the classes, background first, "
            "such as [background, lesion]"
        )
    structures = structures_of(classes, labels.get("regions"), labels.get("region_classes"))
    wanted = labels.get("label_map")
    table = {index: index for index in range(len(classes))} if wanted is None else {0: 0}
    for value, target in (wanted or {}).items():
        table[value] = IGNORE_INDEX
        if target != "ignore":
            key = f"data.label_map: {value}"
            table[value] = class_index(target, classes, key, also=", or ignore")
    return structures, table | dict.fromkeys(labels.get("ignore", []), IGNORE_INDEX)


def read_label_map(path: Path) -> dict[int, int | str]:
    """A table of label values and class names: CSV or TSV with the columns `value` and `name`.

    The first may be called `index`, as in BIDS. Several values may share a class; values of the
    class `ignore` are ignored.

    Raises: DataError naming the file and the line.
    """
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        return _label_table(
            path, csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
        )
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read as a table ({error})") from None


def _label_table(path: Path, rows: csv.DictReader[str]) -> dict[int, int | str]:
    rows.fieldnames = header = [name.strip().lower() for name in rows.fieldnames or []]
    column = "index" if "index" in header else "value"
    if not {column, "name"} <= set(header):
        raise DataError(
            f"{path}: line 1: expected a header with a column value and one name, got "
            f"{shortened(header)}"
        )
    table: dict[int, int | str] = {}
    for row in rows:
        value, name = row[column].strip(), row["name"].strip()
        place = f"{path}: line {rows.line_num}"
        if not re.fullmatch(r"-?\d{1,18}", value):
            raise DataError(f"{place}: expected a whole number, got {shortened(value)}")
        if not name:
            raise DataError(f"{place}: expected a class name, got none")
        if table.setdefault(int(value), name) != name:
            raise DataError(f"{place}: {value} is {table[int(value)]} already")
    if not table.keys() - {0}:
        raise DataError(f"{path}: no label value beside 0 in it (data.label_map)")
    table.pop(0, None)
    return table


def dataset_labels(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """`labels` of a dataset.json: number: name, name: number, or nnU-Net's name: [numbers].

    Returns: keys of `data`, as far as it has them (label_map: for numbers with gaps), and under
    `ignore` the numbers to ignore.
    """
    given = content.get("labels") or {}
    if not isinstance(given, dict):
        raise DataError(f"{path}: labels: expected number: name, got {shortened(given)}")
    if not given:
        return {}
    if all(re.fullmatch(r"[0-9]{1,9}", str(key)) for key in given):
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
        raise DataError(f"{path}: labels: expected number: name, got {shortened(given)}")
    ignored = {"ignore": named.pop("ignore", [])}
    # As in nnU-Net, lists of one number each are not regions.
    if any(len(values) != 1 for values in named.values()):
        return ignored | _region_labels(path, named, content.get("regions_class_order"))
    by_value = {value: name for name, (value,) in sorted(named.items(), key=lambda item: item[1])}
    if len(by_value) != len(named):
        raise DataError(f"{path}: labels: expected distinct numbers, got {shortened(given)}")
    if 0 not in by_value:
        return ignored
    gaps = list(by_value) != list(range(len(by_value)))
    table = {value: name for value, name in by_value.items() if value > 0} if gaps else None
    return ignored | {"classes": list(by_value.values()), "label_map": table}


def _region_labels(path: Path, named: dict[str, list[int]], order: Any) -> dict[str, Any]:
    """nnU-Net's regions; a class is named after the region that consists of it alone."""
    regions = {name: values for name, values in named.items() if values != [0]}
    highest = max((number for values in regions.values() for number in values), default=0)
    if not 0 < highest <= _MAX_CLASS or not all(regions.values()):
        raise DataError(
            f"{path}: labels: expected numbers up to {_MAX_CLASS} for each region, got "
            f"{shortened(named)}"
        )
    if order is not None and not (isinstance(order, (list, tuple)) and len(order) == len(regions)):
        raise DataError(
            f"{path}: regions_class_order: expected {len(regions)} labels, got {order!r}"
        )
    alone = {0: "background"} | {values[0]: n for n, values in named.items() if len(values) == 1}
    names = [alone.get(number, f"label {number}") for number in range(highest + 1)]
    return {"classes": names, "regions": regions, "region_classes": order}
