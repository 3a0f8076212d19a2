"""Dice, HD95 and NSD (surface Dice) of one structure in one case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from monai.transforms.utils import generate_spatial_bounding_box

FOUND, MISSED, EXTRA, ABSENT = "found", "missed", "extra", "absent"


@dataclass(frozen=True)
class Score:
    """One structure in one case.

    outcome: found (in both), missed (only in the reference), extra (only in the prediction),
    absent (in neither). dice, surface_dice: 0 if missed or extra, NaN if absent.
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
    """The score of two boolean volumes on one grid; spacing and tolerance in mm."""
    there, found = int(reference.sum()), int(prediction.sum())
    score = partial(Score, case, structure, reference_voxels=there, predicted_voxels=found)
    if not (there or found):
        return score(outcome=ABSENT, dice=math.nan, surface_dice=math.nan, hd95=math.nan)
    if not (there and found):
        outcome = MISSED if there else EXTRA
        return score(outcome=outcome, dice=0.0, surface_dice=0.0, hd95=math.nan)
    dice = 2 * int((prediction & reference).sum()) / (there + found)
    # Voxels further out than one voxel around both do not change distances.
    start, end = generate_spatial_bounding_box(
        (prediction | reference)[None], margin=1, allow_smaller=True
    )
    box = tuple(map(slice, start, end))
    one, other = (
        torch.from_numpy(mask[box].copy())[None, None] for mask in (prediction, reference)
    )
    options: dict[str, Any] = {"include_background": True, "spacing": list(spacing)}
    hd95 = compute_hausdorff_distance(one, other, percentile=95, **options)
    surface = compute_surface_dice(one, other, class_thresholds=[tolerance], **options)
    return score(outcome=FOUND, dice=dice, surface_dice=float(surface), hd95=float(hd95))
