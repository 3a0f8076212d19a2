"""Pictures of segmentations and risk maps by matplotlib; changes no global state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.style import context as style_context

from riskmap_ext.finetune.base.files import written
from riskmap_ext.finetune.pictures.slices import Slice, Volumes, class_colours, coloured, slice_of

# RGB of voxels that only the label has, only the prediction has, or both in different classes.
ERROR_COLOURS = {
    "missed": (0.34, 0.71, 0.91),
    "extra": (0.84, 0.37, 0.0),
    "other class": (1.0, 1.0, 0.4),
}
RISK_COLUMN = "risk map"
_LEGEND_CLASSES = 14
_FINE = 4
_DPI = 120
_INCHES = 3.0
# The smallest weight lets the image through.
_SHARE = np.linspace(0, 1, 256)
_SHADES = colormaps["magma"](0.25 + 0.75 * _SHARE)
_SHADES[:, 3] = 0.85 * np.minimum(1, 3 * _SHARE)
RISK = ListedColormap(_SHADES)
# Fallbacks for letters that matplotlib's own font lacks.
_WIDE_FONTS = (
    *(f"Noto Sans {script}" for script in ("CJK SC", "CJK JP", "CJK KR", "Arabic", "Devanagari")),
    *("WenQuanYi Zen Hei", "Source Han Sans SC", "IPAexGothic", "Microsoft YaHei"),
    *("Hiragino Sans", "Malgun Gothic"),
)


@dataclass(frozen=True)
class Panels:
    """One slice of a case, a picture for each panel.

    pictures: PNG files by name (image, label, risk map, prediction, errors). present: visible
    classes. errors: voxels of the slice by kind. weights: smallest and largest of the case; None
    without a risk map.
    """

    pictures: dict[str, bytes]
    present: list[int]
    errors: dict[str, int]
    weights: tuple[float, float] | None


def comparison(path: Path, rows: Sequence[Volumes], class_names: Sequence[str], title: str) -> Path:
    """Writes a PNG of cases (rows) by image, label, risk map and predictions (columns).

    Each row shows the slice with most labelled area, and the scores below the predictions. The rows
    have the same columns and share the scale of the weights. Names are in any script for which
    there is a font, else boxes.
    """
    slices = [slice_of(row) for row in rows]
    present, colours = _classes(slices)
    weights = _weights(rows)
    drawn = [_pictures(shown, colours, weights) for shown in slices]
    columns = list(drawn[0])
    panel = min(_INCHES, 14 / len(columns))
    heights = [_height(s, panel) for s in slices]
    size = panel * len(columns), sum(heights) + 0.3 * len(rows) + 1.1
    fonts = set(font_manager.get_font_names())
    style: dict[Any, Any] = {
        "font.family": [*rcParams["font.family"], *(n for n in _WIDE_FONTS if n in fonts)],
        "font.size": 9,
        "axes.titlesize": 11,
        "text.parse_math": False,  # $ in a name is no formula
    }
    with warnings.catch_warnings(), style_context(["default", style]):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights)
        for line, row, shown, pictures in zip(grid, rows, slices, drawn, strict=True):
            for axes, name in zip(line, columns, strict=True):
                _draw(axes, shown, pictures[name])
                axes.set_xlabel(row.scores.get(name, ""))
            line[0].set_ylabel(row.name)
            _mark_sides(line[0], shown.axis, 9)
        for axes, name in zip(grid[0], columns, strict=True):
            axes.set_title(name)
        figure.suptitle(title)
        if RISK_COLUMN in columns:
            _weight_bar(figure, grid[:, columns.index(RISK_COLUMN)], weights)
        handles = [Patch(color=colours[i], label=class_names[i]) for i in present[:_LEGEND_CLASSES]]
        if rest := len(present) - len(handles):
            handles.append(Patch(color="none", label=f"and {rest} more"))
        if handles:
            figure.legend(
                handles=handles, loc="outside lower center", ncols=2 * len(columns),
                handlelength=1.0, handleheight=1.0, frameon=False,
            )  # fmt: skip
        with written(path) as partial:
            figure.savefig(partial, format="png", dpi=_DPI)
    return path


def panels(case: Volumes) -> Panels:
    """The panels of one case with one prediction, drawn as `comparison` does."""
    shown, weights = slice_of(case), _weights([case])
    label, prediction = shown.classes.values()
    wrong = label != prediction
    kinds = (wrong & (prediction == 0), wrong & (label == 0), wrong)
    errors = np.select(kinds, range(1, len(kinds) + 1), 0)
    counts = {name: int((errors == i).sum()) for i, name in enumerate(ERROR_COLOURS, start=1)}
    present, colours = _classes([shown])
    drawn = _pictures(shown, colours, weights)
    error_colours = np.array([(0, 0, 0), *ERROR_COLOURS.values()])
    drawn["errors"] = coloured(shown.grey, errors, error_colours, fine=_FINE)
    pictures = {name: _png(shown, picture) for name, picture in drawn.items()}
    return Panels(pictures, present, counts, None if case.risk is None else weights)


def _classes(slices: Sequence[Slice]) -> tuple[list[int], np.ndarray]:
    """The visible classes, and the colours of all classes up to them."""
    planes = [plane for shown in slices for plane in shown.classes.values()]
    present = sorted({int(value) for plane in planes for value in np.unique(plane)} - {0})
    return present, class_colours(max(present, default=0) + 1)


def _weights(rows: Sequence[Volumes]) -> tuple[float, float]:
    """Smallest and largest of the drawn weights."""
    drawn = [row.risk[row.risk > 0] for row in rows if row.risk is not None]
    values = np.concatenate([*drawn, np.ones(0)])
    return (float(values.min()), float(values.max())) if values.size else (1.0, 1.0)


def _pictures(
    shown: Slice, colours: np.ndarray, weights: tuple[float, float]
) -> dict[str, np.ndarray]:
    """RGB of the image alone, and with each overlay."""
    classes = {n: coloured(shown.grey, c, colours, fine=_FINE) for n, c in shown.classes.items()}
    grey = shown.grey[..., None].repeat(3, axis=-1)
    pictures = {"image": grey, "label": classes["label"]}
    if shown.risk is not None:
        # Even steps of hardness; voxels without a weight stay clear.
        shades = RISK(LogNorm(*weights)(shown.risk))
        pictures[RISK_COLUMN] = grey + shades[..., 3:] * (shades[..., :3] - grey)
    return pictures | classes


def _height(shown: Slice, width: float = _INCHES) -> float:
    rows, across = shown.grey.shape
    return float(np.clip(width * shown.aspect * rows / across, 1.0, 6.0))


def _draw(axes: Any, shown: Slice, picture: np.ndarray) -> None:
    rows, across = shown.grey.shape
    axes.imshow(
        picture, origin="lower", aspect=shown.aspect, extent=(0, across, 0, rows),
        interpolation="nearest",
    )  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _png(shown: Slice, picture: np.ndarray) -> bytes:
    figure = Figure((_INCHES, _height(shown)), facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1), facecolor="black")
    _draw(axes, shown, picture)
    _mark_sides(axes, shown.axis, 14)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _mark_sides(axes: Any, axis: int, size: float) -> None:
    """Letters of the directions at the left and right edge (RAS: x to the right)."""
    outline = [withStroke(linewidth=0.2 * size, foreground="black")]
    left, right = "PA" if axis == 0 else "LR"
    for x, side, letter in ((0.02, "left", left), (0.98, "right", right)):
        axes.text(
            *(x, 0.02, letter), transform=axes.transAxes, color="white", fontsize=size, ha=side,
            path_effects=outline,
        )  # fmt: skip


def _weight_bar(figure: Figure, above: Any, weights: tuple[float, float]) -> None:
    bar = figure.colorbar(
        ScalarMappable(LogNorm(*weights), RISK), ax=above, location="bottom", aspect=30,
        panchor=False, ticks=np.geomspace(*weights, 3), format="%.3g", label="voxel weight",
    )  # fmt: skip
    bar.minorticks_off()
    bar.ax.set_facecolor("#888888")
    bar.outline.set_visible(False)  # type: ignore[operator]
