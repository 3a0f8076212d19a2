"""The folds of a cross-validation: the cases that each trains on and validates on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from annotated_types import Len
from monai.data import partition_dataset
from pydantic import BaseModel

from riskmap_ext.finetune.base.errors import ConfigError, DataError, Problems
from riskmap_ext.finetune.base.files import read_json
from riskmap_ext.finetune.base.log import some
from riskmap_ext.finetune.base.structures import IGNORE_INDEX
from riskmap_ext.finetune.config.schema import Config
from riskmap_ext.finetune.data.prepare import Cases, all_ignored

# nnU-Net's name for it.
SPLITS_FILE = "splits_final.json"


class Split(BaseModel):
    """Case names of one fold."""

    train: Annotated[list[str], Len(1)]
    val: Annotated[list[str], Len(1)]


def read_splits(path: Path) -> list[Split]:
    """Raises: DataError naming the file."""
    try:
        return read_json(path, Annotated[list[Split], Len(1)])
    except DataError as error:
        expected = 'data.folds: expected [{"train": [names], "val": [names]}, ...]'
        raise DataError(f"{error}; {expected}, as nnU-Net writes it") from None


def make_splits(config: Config, names: Sequence[str]) -> list[Split]:
    """The folds of `data.folds` over the cases of these names; the same on every machine.

    Raises: ConfigError for fewer cases than folds; DataError with a line for each fold of a file
    that names unknown cases, or the same case twice.
    """
    folds = config.data.folds
    if isinstance(folds, Path):
        splits = read_splits(folds)
        Problems(f"{folds}: {told}" for told in _problems(splits, names)).tell()
        return splits
    if folds is None or folds > len(names):
        raise ConfigError(f"data.folds: expected 2 to {len(names)} (all cases), got {folds}")
    parts = partition_dataset(sorted(names), num_partitions=folds, shuffle=True, seed=config.seed)
    return [Split(train=[n for n in names if n not in part], val=sorted(part)) for part in parts]


def not_validated(splits: Sequence[Split], names: Sequence[str]) -> list[str]:
    """Warnings about cases that a file's folds leave out."""
    left = sorted(set(names) - {name for split in splits for name in split.val})
    return [f"{len(left)} cases are validated by no fold: {some(left)}"] if left else []


def _problems(splits: Sequence[Split], names: Sequence[str]) -> Iterator[str]:
    for index, split in enumerate(splits):
        both = [*split.train, *split.val]
        if unknown := sorted(set(both) - set(names)):
            told = f"no labelled case is named {', '.join(unknown)}; there are {some(names)}"
            yield f"fold {index}: {told}"
        if twice := _repeated(both):
            yield f"fold {index}: {', '.join(twice)} twice, in train, in val or in both"
    if twice := _repeated([name for split in splits for name in set(split.val)]):
        yield f"more than one fold validates on {', '.join(twice)}"


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def cases_of(split: Split, cases: Cases) -> Cases:
    """The cases of one fold, as its own `data` section selects them. Raises: DataError."""
    by_name = {case.name: case for case in cases.train}
    train, validation = ([by_name[name] for name in names] for names in (split.train, split.val))
    listing = replace(
        cases.listing,
        train=[case.files for case in train],
        validation=[case.files for case in validation],
    )
    chosen = {"folds": None, "train": split.train, "validation": split.val}
    data = cases.data.model_copy(update=chosen)
    if all((case.label == IGNORE_INDEX).all() for case in train):
        raise all_ignored(listing)
    return replace(cases, train=train, validation=validation, listing=listing, data=data)
