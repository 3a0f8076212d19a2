"""Predictions of whole cases and their Dice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from monai.metrics import DiceHelper
from torch import Tensor

from riskmap_ext.finetune.base.structures import IGNORE_INDEX, Structures


def dice_per_structure(prediction: Tensor, label: Tensor, structures: Structures) -> list[float]:
    """Dice of each class 1 .. C-1, or of each region; NaN where the label has none of it.

    Both are class indices [*S]; ignored voxels count nowhere.
    """
    # Ignored voxels agree with everything, so that no structure gains or loses by them.
    prediction = torch.where(label == IGNORE_INDEX, 0, prediction)
    if structures.table is None:
        return _dice(prediction, label, len(structures.classes))
    found = []
    for members in structures.table:
        inside = torch.where(label == IGNORE_INDEX, IGNORE_INDEX, members[label.clamp(min=0).int()])
        found += _dice(members[prediction.int()], inside, 2)
    return found


def _dice(prediction: Tensor, label: Tensor, num_classes: int) -> list[float]:
    helper = DiceHelper(
        include_background=False,
        num_classes=num_classes,
        reduction="none",
        get_not_nans=False,
        ignore_index=IGNORE_INDEX,
    )
    return [float(value) for value in helper(prediction[None, None], label[None, None])[0]]


def mean_without_nan(values: Sequence[float]) -> float:
    """The mean of the values that are numbers; NaN where there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def structure_means(table: Mapping[str, Sequence[float]], count: int) -> list[float]:
    """Mean over cases of each of the `count` columns of {case: Dice per structure}."""
    return [mean_without_nan(column) for column in known_dice(table, count)]


def known_dice(table: Mapping[str, Sequence[float]], count: int) -> list[list[float]]:
    """For each column, the Dice of the cases that have its structure in their label."""
    return [[row[i] for row in table.values() if not math.isnan(row[i])] for i in range(count)]
