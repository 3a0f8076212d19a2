"""Predictions of whole cases and their Dice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from monai.metrics import DiceHelper
from torch import Tensor

from riskmap_ext.finetune.config import IGNORE_INDEX
from riskmap_ext.finetune.data import Case
from riskmap_ext.finetune.network import Predictor


def predict(predictor: Predictor, case: Case, *, full: bool = False) -> Tensor:
    """Class indices int16 on the prepared grid or, with `full`, at the file's resolution."""
    logits = predictor(case.image)
    if full and case.grid.resampled:
        logits = case.grid.to_full(logits.softmax(dim=1).cpu(), mode="bilinear")
    return logits[0].argmax(dim=0).to(torch.int16).cpu()


def dice_per_class(prediction: Tensor, label: Tensor, num_classes: int) -> list[float]:
    """Dice of classes 1 .. C-1 over the labelled voxels; NaN for a class the label lacks."""
    # Ignored voxels agree with everything, so that no class gains or loses by them.
    prediction = torch.where(label == IGNORE_INDEX, 0, prediction)
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


def class_means(table: Mapping[str, Sequence[float]], num_classes: int) -> list[float]:
    """Mean over cases of each column of {case: Dice per class}."""
    return [mean_without_nan([row[i] for row in table.values()]) for i in range(num_classes - 1)]


def class_counts(table: Mapping[str, Sequence[float]], num_classes: int) -> list[int]:
    """How many cases have each class in their label."""
    return [sum(not math.isnan(row[i]) for row in table.values()) for i in range(num_classes - 1)]
