"""Pictures of one case: its slices for overlays/, and a slice for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from riskmap_ext.finetune.data.prepare import Case


def write_overlay(
    folder: Path,
    case: Case,
    classes: Sequence[str],
    prediction: Tensor | None,
    risk: Tensor | None,
) -> None:
    """overlays/<case>.png; all volumes on the prepared grid."""
    # matplotlib is slow to import, and not wanted by every run.
    from riskmap_ext.finetune.pictures.figures import drawn_alike, overlay

    def ras(volume: Tensor | None) -> Any:
        return None if volume is None else case.grid.to_ras(volume)

    with drawn_alike():
        overlay(
            folder / f"{case.name}.png",
            ras(case.image[0]),
            labels=ras(case.label),
            prediction=ras(prediction),
            risk=ras(risk),
            class_names=classes,
            title=case.name,
            zooms=case.grid.ras_spacing(),
        )


def segmentation_picture(case: Case, prediction: Tensor) -> np.ndarray:
    """Image, labels and prediction side by side, [H, 3 W, 3] uint8: the slice with most label."""
    # matplotlib is slow to import, and not wanted by every run.
    from riskmap_ext.finetune.pictures.figures import class_colours, grey_window

    label = case.grid.to_ras(case.label)
    z = int((label > 0).sum(axis=(0, 1)).argmax())
    image = case.grid.to_ras(case.image[0])[..., z]
    low, high = grey_window(image)
    grey = np.clip((image - low) / (high - low), 0, 1)[..., None]
    panels = [np.broadcast_to(grey, (*grey.shape[:2], 3))]
    shown = [label[..., z], case.grid.to_ras(prediction)[..., z]]
    colours = class_colours(max(int(classes.max()) for classes in shown) + 1)
    for classes in shown:
        colour = colours[np.maximum(classes, 0)]
        panels.append(np.where(classes[..., None] > 0, 0.5 * grey + 0.5 * colour, grey))
    rotated = [np.rot90(panel) for panel in panels]
    return (255 * np.concatenate(rotated, axis=1)).astype(np.uint8)
