"""Pictures of segmentations and risk maps by matplotlib; no global state is left."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, rc_context, rcParams
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator
from torch import Tensor

from riskmap_ext._files import written_beside
from riskmap_ext.finetune.data.prepare import Case
from riskmap_ext.finetune.pictures.slices import (
    Slice,
    Volumes,
    class_colours,
    coloured,
    slice_of,
    volumes_of,
)

# RGB of the voxels that the label has alone, the prediction has alone, or both in other classes.
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
# The least weight lets the image through.
_SHARE = np.linspace(0, 1, 256)
_SHADES = colormaps["magma"](0.25 + 0.75 * _SHARE)
_SHADES[:, 3] = 0.85 * np.minimum(1, 3 * _SHARE)
RISK = ListedColormap(_SHADES)
# Tried for letters that matplotlib's own font lacks.
_WIDE_FONTS = (
    *(f"Noto Sans {script}" for script in ("CJK SC", "CJK JP", "CJK KR", "Arabic", "Devanagari")),
    *("WenQuanYi Zen Hei", "Source Han Sans SC", "IPAexGothic", "Microsoft YaHei"),
    *("Hiragino Sans", "Malgun Gothic"),
)
# What is drawn on a slice: nothing, classes and their colours, or weights.
Layer = tuple[np.ndarray, np.ndarray] | Normalize | None


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


@contextmanager
def drawn_alike(style: Mapping[str, Any] | None = None) -> Iterator[None]:
    """With `style` of rcParams, and names in any script and with any signs: $ is no formula.

    By a font that has their letters, else as boxes, without a word.
    """
    present = set(font_manager.get_font_names())
    family = [*rcParams["font.family"], *(n for n in _WIDE_FONTS if n in present)]
    settings: dict[Any, Any] = {"font.family": family, "text.parse_math": False, **(style or {})}
    with warnings.catch_warnings(), rc_context(settings):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def write_overlay(
    folder: Path, case: Case, classes: Sequence[str], prediction: Tensor | None, risk: Tensor | None
) -> None:
    """overlays/<case>.png; all volumes on the prepared grid."""
    row = replace(volumes_of(case, prediction, risk), name="")  # it is in the title
    path, zooms = folder / f"{case.name}.png", case.grid.ras_spacing()
    comparison(path, [row], classes, case.name, zooms=zooms, cut=False)


def comparison(
    path: Path,
    rows: Sequence[Volumes],
    class_names: Sequence[str],
    title: str,
    *,
    zooms: Sequence[float] = (1.0, 1.0, 1.0),
    cut: bool = True,
) -> Path:
    """Writes a PNG of cases (rows) by image, labels, risk map and predictions (columns).

    Each row shows the slice with most labelled area, and the scores below the predictions. The rows
    share the scale of the weights. The file is written beside and then renamed.

    Raises: ValueError for no rows, rows with different columns, or arrays whose shapes differ.
    """
    if not rows:
        raise ValueError("rows: expected at least one case, got none")
    columns = _columns(rows[0])
    for row in rows:
        if _columns(row) != columns:
            raise ValueError(
                f"rows: expected the columns of {rows[0].name!r} ({', '.join(columns)}) in every "
                f"row, got {', '.join(_columns(row))} in {row.name!r}"
            )
    slices = [slice_of(row, zooms, cut=cut) for row in rows]
    present = _present([p for s in slices for p in (s.labels, *s.predictions.values())])
    colours = class_colours(max(present, default=0) + 1)
    norm = _norm([row.risk for row in rows if row.risk is not None])
    panel = min(_INCHES, 14 / len(columns))
    heights = [_height(s, panel) for s in slices]
    size = panel * len(columns), sum(heights) + 0.3 * len(rows) + 1.1
    with drawn_alike({"font.size": 9, "axes.titlesize": 11}):
        figure = Figure(size, layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights)
        for line, row, shown in zip(grid, rows, slices, strict=True):
            for axes, name in zip(line, columns, strict=True):
                classes = {"labels": shown.labels, **shown.predictions}.get(name)
                weights = norm if name == RISK_COLUMN else None
                _draw(axes, shown, weights if classes is None else (classes, colours))
                axes.set_xlabel(row.scores.get(name, ""))
            line[0].set_ylabel(row.name)
            _mark_sides(line[0], shown.axis, 9)
        for axes, name in zip(grid[0], columns, strict=True):
            axes.set_title(name)
        figure.suptitle(title)
        if RISK_COLUMN in columns:
            _weight_bar(figure, grid[:, columns.index(RISK_COLUMN)], norm)
        _legend(figure, [(class_names[i], colours[i]) for i in present], 2 * len(columns))
        with written_beside(path) as partial:
            figure.savefig(partial, format="png", dpi=_DPI)
    return path


def panels(case: Volumes, zooms: Sequence[float] = (1.0, 1.0, 1.0)) -> Panels:
    """The panels of one case with one prediction, drawn as `comparison` does."""
    shown = slice_of(case, zooms)
    (prediction,) = shown.predictions.values()
    wrong = shown.labels != prediction
    kinds = (wrong & (prediction == 0), wrong & (shown.labels == 0), wrong)
    errors = np.select(kinds, range(1, len(kinds) + 1), 0)
    present = _present([shown.labels, prediction])
    colours = class_colours(max(present, default=0) + 1)
    error_colours = np.array([(0, 0, 0), *ERROR_COLOURS.values()])
    layers: dict[str, Layer] = {
        "image": None,
        "label": (shown.labels, colours),
        "prediction": (prediction, colours),
        "errors": (errors, error_colours),
    }
    weights = None
    if case.risk is not None:
        layers[RISK_COLUMN] = norm = _norm([case.risk])
        weights = float(norm.vmin or 0), float(norm.vmax or 0), isinstance(norm, LogNorm)
    counts = {name: int((errors == i).sum()) for i, name in enumerate(ERROR_COLOURS, start=1)}
    pictures = {name: _png(shown, layer) for name, layer in layers.items()}
    return Panels(pictures, present, counts, weights)


def _columns(row: Volumes) -> list[str]:
    risk = [] if row.risk is None else [RISK_COLUMN]
    return ["image", "labels", *risk, *row.predictions]


def _present(planes: Sequence[np.ndarray]) -> list[int]:
    return sorted({int(value) for plane in planes for value in np.unique(plane)} - {0})


def _height(shown: Slice, width: float = _INCHES) -> float:
    rows, across = shown.grey.shape
    return float(np.clip(width * shown.aspect * rows / across, 1.0, 6.0))


def _norm(risks: Sequence[np.ndarray]) -> Normalize:
    """Logarithmic from about 3-fold weights on (even steps of hardness), linear below."""
    values = np.concatenate([np.ones(0), *(r[np.isfinite(r) & (r > 0)] for r in risks)])
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if high >= 3.0 * low > 0:
        return LogNorm(low, high)
    return Normalize(low, high if high > low * 1.01 else low + 1.0)


def _draw(axes: Any, shown: Slice, layer: Layer) -> None:
    how: dict[str, Any] = {"origin": "lower", "aspect": shown.aspect, "interpolation": "nearest"}
    how["extent"] = (0, shown.grey.shape[1], 0, shown.grey.shape[0])
    classes, colours = np.zeros_like(shown.labels), np.zeros((1, 3))
    if isinstance(layer, tuple):
        classes, colours = layer
    axes.imshow(coloured(shown.grey, classes, colours, fine=_FINE), **how)
    if isinstance(layer, Normalize) and shown.risk is not None:
        hidden = ~(np.isfinite(shown.risk) & (shown.risk > 0))
        axes.imshow(np.ma.masked_where(hidden, shown.risk), cmap=RISK, norm=layer, **how)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _png(shown: Slice, layer: Layer) -> bytes:
    figure = Figure((_INCHES, _height(shown)), facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1), facecolor="black")
    _draw(axes, shown, layer)
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


def _weight_bar(figure: Figure, above: Any, norm: Normalize) -> None:
    ticks = None
    if isinstance(norm, LogNorm) and norm.vmin and norm.vmax:
        ticks = LogLocator(subs=(1, 2, 5) if norm.vmax > 10.1 * norm.vmin else (1, 1.5, 2, 3, 5, 7))
    bar = figure.colorbar(
        ScalarMappable(norm, RISK), ax=above, location="bottom", aspect=30, panchor=False,
        ticks=ticks, format="%g", label="voxel weight",
    )  # fmt: skip
    bar.minorticks_off()
    bar.ax.set_facecolor("#888888")
    bar.outline.set_visible(False)  # type: ignore[operator]


def _legend(figure: Figure, classes: Sequence[tuple[str, Any]], columns: int) -> None:
    handles = [Patch(color=colour, label=name) for name, colour in classes[:_LEGEND_CLASSES]]
    if rest := len(classes) - len(handles):
        handles.append(Patch(color="none", label=f"and {rest} more"))
    if handles:
        square: dict[str, Any] = {"handlelength": 1.0, "handleheight": 1.0, "frameon": False}
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, **square)
