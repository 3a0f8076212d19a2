"""Label values to class indices: from a mapping, or from a table in a file."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from riskmap_ext.finetune.base.errors import DataError
from riskmap_ext.finetune.base.files import read_text
from riskmap_ext.finetune.base.structures import IGNORE_INDEX, class_index


def label_table(
    wanted: Mapping[int, int | str] | None, classes: Sequence[str], ignore: Sequence[int] = ()
) -> dict[int, int]:
    """Original label value -> class index (or IGNORE_INDEX).

    wanted: original value -> class name, class index, or "ignore"; None: values are the indices.
    ignore: values that the data set itself says to leave out.

    Raises: ConfigError naming the value.
    """
    table = {index: index for index in range(len(classes))} if wanted is None else {0: 0}
    for value, target in (wanted or {}).items():
        table[value] = IGNORE_INDEX
        if target != "ignore":
            key = f"data.label_map: {value}"
            table[value] = class_index(target, classes, key, also=", or ignore")
    return table | dict.fromkeys(ignore, IGNORE_INDEX)


def read_label_map(path: Path) -> dict[int, int | str]:
    """A table of label values and class names: CSV or TSV with the columns `value` and `name`.

    The first may be called `index`, as in BIDS. Several values may share a class; the class
    `ignore` leaves its values out.

    Raises: DataError naming the file and the line.
    """
    text = read_text(path)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.DictReader(text.splitlines(), delimiter=delimiter, restval="")
    rows.fieldnames = header = [name.strip().lower() for name in rows.fieldnames or []]
    column = "index" if "index" in header else "value"
    if not {column, "name"} <= set(header):
        raise DataError(
            f"{path}: line 1: expected a header with a column value and one name, got {header}"
        )
    table: dict[int, int | str] = {}
    for row in rows:
        value, name = row[column].strip(), row["name"].strip()
        place = f"{path}: line {rows.line_num}"
        if not re.fullmatch(r"-?\d+", value):
            raise DataError(f"{place}: expected a whole number, got {value!r}")
        if not name:
            raise DataError(f"{place}: expected a class name, got none")
        if table.setdefault(int(value), name) != name:
            raise DataError(f"{place}: {value} is {table[int(value)]} already")
    if not table.keys() - {0}:
        raise DataError(f"{path}: no label value beside 0 in it (data.label_map)")
    table.pop(0, None)
    return table
