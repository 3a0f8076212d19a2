"""Label values to class indices: from a mapping, or from a table in a file."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from riskmap_ext.finetune.base.errors import DataError
from riskmap_ext.finetune.base.files import read_text
from riskmap_ext.finetune.base.structures import IGNORE_INDEX, class_index

_VALUE_COLUMNS = ("value", "index", "id", "label", "labelid", "roi_index", "no.")
_NAME_COLUMNS = ("class", "name", "labelname", "structure", "roi_name", "region")


def label_table(
    wanted: Mapping[int, int | str] | None, classes: Sequence[str], ignore: Sequence[int] = ()
) -> dict[int, int]:
    """Original label value -> class index (or IGNORE_INDEX).

    wanted: original value -> class name, class index, or "ignore"; None: values are the indices.
    ignore: values that the data set itself says to leave out.

    Raises: ConfigError naming the value.
    """
    ignored = dict.fromkeys(ignore, IGNORE_INDEX)
    if wanted is None:
        return {index: index for index in range(len(classes))} | ignored
    table = {0: 0}
    for value, target in wanted.items():
        table[value] = IGNORE_INDEX
        if target != "ignore":
            key = f"data.label_map: {value}"
            table[value] = class_index(target, classes, key, also=", or ignore")
    return table | ignored


def read_label_map(path: Path) -> dict[int, int | str]:
    """A table of label values and class names: CSV or TSV with a header, or a FreeSurfer LUT.

    The value's column is one of value, index, id, label; the name's is one of class, name,
    structure. Several values may share a class; the class `ignore` leaves its values out. A line
    of a look-up table is `NUMBER NAME R G B A`; `#` begins a comment.

    Raises: DataError naming the file and the line.
    """
    lines = read_text(path).splitlines()
    rows = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    rows = [(number, line) for number, line in rows if line and not line.startswith("#")]
    if not rows:
        raise DataError(f"{path}: no rows in it (data.label_map)")
    if re.match(r"-?\d+\s+\S+(\s+\d+){3,4}\s*$", rows[0][1]):
        value, name = 0, 1
        cells = [line.split() for _, line in rows]
    else:
        separator = max(",;\t", key=rows[0][1].count)
        header, *cells = csv.reader([line for _, line in rows], delimiter=separator)
        value, name = _columns(f"{path}: line {rows.pop(0)[0]}", header)
    table: dict[int, int | str] = {}
    for (number, line), row in zip(rows, cells, strict=True):
        place = f"{path}: line {number}"
        if len(row) <= max(value, name):
            raise DataError(f"{place}: expected {max(value, name) + 1} columns, got {line!r}")
        original, label = row[value].strip(), row[name].strip()
        if not re.fullmatch(r"-?\d+", original):
            raise DataError(f"{place}: expected a whole number, got {original!r}")
        if not label:
            raise DataError(f"{place}: expected a class name, got none")
        if table.get(int(original), label) != label:
            raise DataError(f"{place}: {original} is {table[int(original)]} already")
        if int(original) != 0:
            table[int(original)] = label
    if not table:
        raise DataError(f"{path}: no label value beside 0 in it (data.label_map)")
    return table


def _columns(place: str, header: list[str]) -> tuple[int, int]:
    """Of the label value and of the class name."""
    head = [name.strip().lower() for name in header]
    # A name column goes by its own name before "label" could be taken for it.
    name = next((head.index(n) for n in _NAME_COLUMNS if n in head), None)
    value = next((head.index(n) for n in _VALUE_COLUMNS if n in head), None)
    if name is None or value is None:
        raise DataError(
            f"{place}: expected a header with a column {' or '.join(_VALUE_COLUMNS[:4])} and one "
            f"{' or '.join(_NAME_COLUMNS[:2])}, got {header}"
        )
    return value, name
