"""Slices of a case and the colours on them, as numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba_array
from torch import Tensor

from riskmap_ext.finetune.data.prepare import Case

# Okabe and Ito's palette without black: told apart with every common colour-vision deficiency.
_OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_FILL = 0.6


@dataclass(frozen=True)
class Volumes:
    """A case: arrays [X, Y, Z] in canonical RAS order (x to the right, y to the front, z up).

    image: real. labels, predictions: class indices; class 0 and negative ones (ignored) are not
    drawn. risk: voxel weights >= 0; 0 is not drawn. scores: free text for predictions by name.
    zooms: voxel size along each axis.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray
    risk: np.ndarray | None = None
    predictions: Mapping[str, np.ndarray] = field(default_factory=dict)
    scores: Mapping[str, str] = field(default_factory=dict)
    zooms: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Slice:
    """[rows, columns] across `axis`; a pixel is `aspect` as high as wide.

    grey: in [0, 1]. classes: of the label, then of each prediction.
    """

    axis: int
    aspect: float
    grey: np.ndarray
    classes: dict[str, np.ndarray]
    risk: np.ndarray | None


def volumes_of(case: Case, prediction: Any | None, risk: Any | None) -> Volumes:
    """From a prepared case, without its name; prediction, risk: tensors or arrays on its grid."""
    ras = case.grid.to_ras
    predictions = {} if prediction is None else {"prediction": ras(prediction)}
    weights = None if risk is None else ras(risk)
    volumes = ras(case.image[0]), ras(case.label), weights, predictions
    return Volumes("", *volumes, zooms=case.grid.ras_spacing())


def slice_of(case: Volumes) -> Slice:
    """The axial slice with most labelled area, or the middle one.

    If axial slices are thin strips, the plane with most voxels is used. It is cropped to what is
    labelled or bright enough to be body, plus two pixels.
    """
    sizes = case.image.shape
    axis = 2 if 4 * min(sizes[:2]) >= sizes[2] else int(np.argmin(sizes))
    across, up = (a for a in range(3) if a != axis)
    area = (case.labels > 0).sum(axis=(across, up))
    index = int(area.argmax()) if area.any() else sizes[axis] // 2

    def plane(volume: np.ndarray) -> np.ndarray:
        return np.take(volume, index, axis).T

    grey = plane(_grey(case.image))
    maps = {"label": case.labels, **case.predictions}
    classes = {name: np.maximum(plane(each), 0).astype(int) for name, each in maps.items()}
    seen = np.any([grey > 0.1, *(each > 0 for each in classes.values())], axis=0)
    hits = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    box = tuple(slice(max(h[0] - 2, 0), h[-1] + 3) if h.size else slice(None) for h in hits)
    classes = {name: each[box] for name, each in classes.items()}
    weights = None if case.risk is None else plane(case.risk)[box]
    return Slice(axis, case.zooms[up] / case.zooms[across], grey[box], classes, weights)


def _grey(image: np.ndarray) -> np.ndarray:
    """Black and white are the 1st and 99.5th percentiles of the finite values."""
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (1.0, 99.5)) if finite.size else (0.0, 1.0)
    return np.nan_to_num(np.clip((image - low) / (high - low if high > low else 1.0), 0.0, 1.0))


def coloured(
    grey: np.ndarray, classes: np.ndarray, colours: np.ndarray, *, fine: int = 1
) -> np.ndarray:
    """RGB of the image with its classes half-transparent, each pixel as `fine` x `fine`.

    With `fine` above 1, they have borders of one pixel in full colour.
    """
    grey, classes = (a.repeat(fine, 0).repeat(fine, 1) for a in (grey, classes))
    edge = np.zeros(classes.shape, dtype=bool)
    for step, along in [(1, 0), (-1, 0), (1, 1), (-1, 1)] if fine > 1 else ():
        edge |= np.roll(classes, step, axis=along) != classes
    strength = (np.where(edge, 1.0, _FILL) * (classes > 0))[..., None]
    return grey[..., None] * (1 - strength) + colours[classes] * strength


def class_colours(num_classes: int) -> np.ndarray:
    """RGB colours in [0, 1] of classes 0 .. num_classes - 1, shape [num_classes, 3], float64.

    Class 0 (background) is black. Classes 1 to 7 have the Okabe-Ito colours; further ones repeat
    these hues lighter and darker, since no larger palette stays safe for every reader.
    """
    index = np.arange(max(num_classes - 1, 0))[:, None]
    turn, rounds = index // len(_OKABE_ITO), -(-index.size // len(_OKABE_ITO))
    # Alternately towards white and black, further from the base colour each time.
    reach = 0.75 * ((turn + 1) // 2) / ((rounds + 1) // 2 or 1)
    hues = to_rgba_array(_OKABE_ITO)[index[:, 0] % len(_OKABE_ITO), :3]
    return np.concatenate([np.zeros((1, 3)), hues + reach * (turn % 2 - hues)])


def segmentation_picture(case: Case, prediction: Tensor) -> np.ndarray:
    """Image, labels and prediction side by side, [H, 3 W, 3] uint8."""
    shown = slice_of(volumes_of(case, prediction, None))
    planes = [np.zeros_like(shown.classes["label"]), *shown.classes.values()]
    colours = class_colours(max(int(plane.max()) for plane in planes) + 1)
    pictures = [coloured(shown.grey, plane, colours)[::-1] for plane in planes]
    return (255 * np.concatenate(pictures, axis=1)).astype(np.uint8)
