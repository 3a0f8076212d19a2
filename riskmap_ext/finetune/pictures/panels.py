"""The panels of one case as pictures of their own, for pages that place them as they like."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, to_hex
from matplotlib.figure import Figure

from riskmap_ext.finetune.pictures.figures import (
    RISK_COLOURS,
    RISK_COLUMN,
    ComparisonRow,
    Layout,
    class_colours,
    classes_present,
    cut_slice,
    draw_classes,
    grey_window,
    mark_sides,
    weight_norm,
)

# RGB of the voxels that the label has alone, the prediction has alone, or both in other classes.
ERROR_COLOURS = {
    "missed": (0.34, 0.71, 0.91),
    "extra": (0.84, 0.37, 0.0),
    "other class": (1.0, 1.0, 0.4),
}
_WIDTH = 3.0
_DPI = 120
_LETTERS = 14
_OPACITY = 0.85


@dataclass(frozen=True)
class Panels:
    """One slice of a case, a picture for each panel.

    pictures: PNG files by name (image, label, prediction, errors, risk map). present: classes that
    are seen. errors: voxels of the slice by kind. weights: smallest and largest of the case, and
    whether they are drawn on a logarithmic scale; None without a risk map.
    """

    pictures: dict[str, bytes]
    present: list[int]
    errors: dict[str, int]
    weights: tuple[float, float, bool] | None


def panels(
    row: ComparisonRow, *, zooms: Sequence[float] = (1.0, 1.0, 1.0), background: int | None = 0
) -> Panels:
    """The panels of one case with one prediction, drawn as `figures.comparison` does."""
    cut = cut_slice(row, zooms, background)
    (prediction,) = cut.predictions
    wrong = cut.labels != prediction
    kinds = (wrong & (prediction < 0), wrong & (cut.labels < 0), wrong)
    errors = np.select(kinds, range(len(kinds)), -1)
    present = classes_present([cut.labels, prediction])
    colours = class_colours(max(present, default=0) + 1)
    drawn = {
        "image": (None, colours),
        "label": (cut.labels, colours),
        "prediction": (prediction, colours),
        "errors": (errors, np.array(list(ERROR_COLOURS.values()))),
    }
    window = grey_window(row.image)
    rows, across = cut.image.shape
    size = _WIDTH, float(np.clip(_WIDTH * cut.aspect * rows / across, 1.0, 6.0))
    pictures = {}
    for name, (classes, palette) in drawn.items():
        layout = Layout(*size)
        axes = layout.axes(0, 0, *size)
        draw_classes(axes, cut.image, classes, palette, window, cut.aspect)
        mark_sides(axes, cut.axis, size=_LETTERS)
        pictures[name] = _png(layout.figure)
    weights = None
    if row.risk is not None and cut.risk is not None:
        norm = weight_norm([row.risk])
        layout = Layout(*size)
        axes = layout.axes(0, 0, *size)
        draw_classes(axes, cut.image, None, colours, window, cut.aspect)
        share = norm(np.ma.masked_less_equal(cut.risk, 0))
        axes.imshow(_shades(share), origin="lower", aspect=cut.aspect, interpolation="nearest")
        mark_sides(axes, cut.axis, size=_LETTERS)
        pictures[RISK_COLUMN] = _png(layout.figure)
        low, high = (float(value) for value in norm.inverse(np.array([0.0, 1.0])))
        weights = low, high, isinstance(norm, LogNorm)
    counts = {name: int((errors == i).sum()) for i, name in enumerate(ERROR_COLOURS)}
    return Panels(pictures, present, counts, weights)


def risk_colours(count: int) -> list[str]:
    """Hex colours with opacity of the weights' scale, evenly from the smallest to the largest."""
    return [to_hex(shade, keep_alpha=True) for shade in _shades(np.linspace(0, 1, count))]


def _shades(share: np.ndarray) -> np.ndarray:
    """RGBA [..., 4] of 0 .. 1: the least weight lets the image through."""
    share = np.clip(np.ma.filled(share, 0.0), 0.0, 1.0)
    shades = ScalarMappable(Normalize(0, 1), RISK_COLOURS).to_rgba(0.25 + 0.75 * share)
    shades[..., 3] = np.minimum(1.0, 3 * share) * _OPACITY
    return shades


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, format="png", dpi=_DPI, facecolor="black")
    return file.getvalue()
