"""The cases of a MONAI data set, read one by one; errors name the case."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from monai.utils import optional_import
from torch.utils.data import DataLoader


def two_keys(keys: Iterable[Hashable]) -> tuple[Hashable, Hashable]:
    """The keys of image and label."""
    found = (keys,) if isinstance(keys, str) else tuple(keys)
    if len(found) != 2:
        raise ValueError(f"keys: expected those of image and label, got {found!r}")
    return found


def image_and_label(case: Any, keys: Iterable[Hashable], name: str = "the case") -> tuple[Any, Any]:
    """The arrays or tensors of a case; messages call it ``name``."""
    if not isinstance(case, Mapping):
        raise TypeError(f"data: expected {name} to be a dictionary, got {type(case).__name__}")
    for key in keys:
        if key not in case:
            raise ValueError(f"keys: expected {key!r} among the keys of {name}, got {list(case)}")
        if not hasattr(case[key], "shape"):
            raise TypeError(
                f"{key}: expected an array or a tensor in {name}, got {type(case[key]).__name__}"
            )
    image, label = (case[key] for key in keys)
    return image, label


def file_of(*values: Any) -> str:
    """`` (FILE)`` of the first of MONAI's tensors whose meta data name one."""
    for value in values:
        meta = getattr(value, "meta", None)
        if isinstance(meta, Mapping) and meta.get("filename_or_obj"):
            return f" ({meta['filename_or_obj']})"
    return ""


def read_cases(data: Any, title: str, progress: bool) -> Iterator[Any]:
    """Reads by index, as a DataLoader does: a data set may not signal its end."""
    if isinstance(data, DataLoader):
        raise TypeError(
            "data: expected a data set, whose cases have no batch dimension, got a "
            f"{type(data).__name__}; pass its .dataset"
        )
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    total = len(data) if indexed else None
    cases = iter(data) if total is None else (data[index] for index in range(total))
    if not progress:
        return cases
    tqdm, has_tqdm = optional_import("tqdm", name="tqdm")
    if has_tqdm and sys.stderr.isatty():
        return iter(tqdm(cases, desc=title, total=total, unit="case"))
    return _with_lines(cases, title, total)


def _with_lines(cases: Iterator[Any], title: str, total: int | None) -> Iterator[Any]:
    """A line for each tenth of the cases, or for every ten if their number is not known."""
    step = 10 if total is None else -(-total // 10)
    whole = "" if total is None else f" of {total}"
    for number, case in enumerate(cases, start=1):
        yield case
        if number % step == 0 or number == total:
            print(f"{title}: {number}{whole} cases", file=sys.stderr, flush=True)
