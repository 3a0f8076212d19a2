"""Predictions of whole cases and their Dice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from riskmap_ext.finetune.base.structures import IGNORE_INDEX, Structures


def dice_per_structure(prediction: Tensor, label: Tensor, structures: Structures) -> list[float]:
    """Dice of each class 1 .. C-1, or of each region; NaN if the label has none of it.

    Both are class indices [*S]; ignored voxels are not counted.
    """
    # Ignored voxels are in no structure, so none gains or loses by them.
    prediction = torch.where(label == IGNORE_INDEX, 0, prediction)
    found = []
    for members in structures.scored.values():
        one, other = (
            reduce(torch.logical_or, (v == each for each in members)) for v in (prediction, label)
        )
        there, both = other.count_nonzero(), (one & other).count_nonzero()
        dice = 2.0 * both / (one.count_nonzero() + there) if there else math.nan
        found.append(float(dice))
    return found


def mean_without_nan(values: Sequence[float]) -> float:
    """The mean of the values other than NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def structure_means(table: Mapping[str, Sequence[float]], count: int) -> list[float]:
    """Mean over cases of each of the `count` columns of {case: Dice per structure}."""
    return [mean_without_nan(column) for column in known_dice(table, count)]


def known_dice(table: Mapping[str, Sequence[float]], count: int) -> list[list[float]]:
    """For each column, the Dice of the cases that have its structure in their label."""
    return [[row[i] for row in table.values() if not math.isnan(row[i])] for i in range(count)]
