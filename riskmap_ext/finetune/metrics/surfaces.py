"""Dice, HD95 and surface Dice of one structure in one case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

FOUND, MISSED, EXTRA, ABSENT = "found", "missed", "extra", "absent"


@dataclass(frozen=True)
class Score:
    """One structure in one case.

    outcome: found (in both), missed (in the reference alone), extra (in the prediction alone),
    absent (in neither). dice, surface_dice: 0 where it is missed or extra, NaN where absent.
    hd95: the larger of the two directed 95th percentiles of the distances between the surfaces, in
    mm; NaN unless found. voxels: of the reference and of the prediction.
    """

    case: str
    structure: str
    outcome: str
    dice: float
    surface_dice: float
    hd95: float
    reference_voxels: int
    predicted_voxels: int


def score_masks(
    case: str,
    structure: str,
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    tolerance: float,
) -> Score:
    """The score of two boolean volumes of one grid; spacing and tolerance in mm."""
    counts = int(reference.sum()), int(prediction.sum())
    if not any(counts):
        return Score(case, structure, ABSENT, math.nan, math.nan, math.nan, 0, 0)
    if not all(counts):
        outcome = MISSED if counts[0] else EXTRA
        return Score(case, structure, outcome, 0.0, 0.0, math.nan, *counts)
    dice = 2 * int((prediction & reference).sum()) / sum(counts)
    box = _bounding_box(prediction | reference)
    one, other = (
        torch.from_numpy(mask[box].copy())[None, None] for mask in (prediction, reference)
    )
    options: dict[str, Any] = {"include_background": True, "spacing": list(spacing)}
    hd95 = compute_hausdorff_distance(one, other, percentile=95, **options)
    surface = compute_surface_dice(one, other, class_thresholds=[tolerance], **options)
    return Score(case, structure, FOUND, dice, float(surface), float(hd95), *counts)


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Of the mask, a voxel wider where there is room: distances do not change."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        inside = np.flatnonzero(mask.any(axis=others))
        box.append(slice(max(0, int(inside[0]) - 1), int(inside[-1]) + 2))
    return tuple(box)
