"""Pictures of segmentations and risk maps; matplotlib's Agg canvas, no global state."""

from __future__ import annotations

import colorsys
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from riskmap_ext._files import written_beside

# Okabe and Ito's palette without black: told apart with every common colour-vision deficiency.
_OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
RISK_COLOURS = "magma"
RISK_COLUMN = "risk map"
_INK = "#222222"
_LEGEND_CLASSES = 14
_FILL = 0.6


# Tried for letters that matplotlib's own font lacks.
_WIDE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "WenQuanYi Zen Hei",
    "Source Han Sans SC",
    "IPAexGothic",
    "Microsoft YaHei",
    "Hiragino Sans",
    "Malgun Gothic",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
)


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


def class_colours(num_classes: int) -> np.ndarray:
    """RGB colours in [0, 1] of classes 0 .. num_classes - 1, shape [num_classes, 3], float64.

    Class 0 (background) is black. Classes 1 to 7 have the Okabe-Ito colours; further ones repeat
    these hues lighter and darker, since no larger palette stays safe for every reader.
    """
    colours = np.zeros((max(num_classes, 1), 3))
    rounds = max(1, -(-(num_classes - 1) // len(_OKABE_ITO)))
    for index in range(1, num_classes):
        turn, which = divmod(index - 1, len(_OKABE_ITO))
        red, green, blue = (int(_OKABE_ITO[which][i : i + 2], 16) / 255 for i in (1, 3, 5))
        hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
        if turn:
            # Lighter and darker by turns, further from the base colour each time.
            reach = 0.75 * ((turn + 1) // 2) / ((rounds + 1) // 2)
            end = 1.0 if turn % 2 else 0.0
            lightness += reach * (end - lightness)
        colours[index] = colorsys.hls_to_rgb(hue, lightness, saturation)
    return colours


def overlay(
    path: str | os.PathLike[str],
    image: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    prediction: np.ndarray | None = None,
    risk: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    zooms: Sequence[float] = (1.0, 1.0, 1.0),
    background: int | None = 0,
) -> Path:
    """Writes one slice of a case as PNG: image, labels, prediction and risk map side by side.

    The slice is the axial one with most labelled area (by labels, else by prediction, else the
    middle one); where axial slices are thin strips, the plane with most voxels is taken.

    Args:
        path: the PNG to write; folders are made. Written beside and then renamed.
        image: [X, Y, Z], real, in canonical RAS order (x to the right, y to the front, z up).
        labels, prediction: [X, Y, Z], class indices 0 .. C - 1; other values are left blank.
        risk: [X, Y, Z], voxel weights >= 0; weight 0 (ignored voxels) is left blank.
        class_names: name of each class, background included; class numbers where None.
        title: line above the panels.
        zooms: voxel size along each axis, in mm.
        background: class that is not drawn; None draws all.

    Returns: the path written.

    Raises:
        ValueError: an array that is not 3-D, is empty, or whose shape differs from the image's.
        TypeError: labels or prediction that are not whole numbers.
    """
    image = _volume("image", image)
    maps = {"labels": labels, "prediction": prediction, "risk": risk}
    volumes = {k: _volume(k, v, image.shape) for k, v in maps.items() if v is not None}
    for name in ("labels", "prediction"):
        if name in volumes:
            volumes[name] = _class_indices(name, volumes[name], background)
    axis, index = _best_slice(image.shape, volumes.get("labels", volumes.get("prediction")))
    aspect = _aspect(axis, zooms)

    columns = ["image", *volumes]
    rows, across = _plane(image, axis, index).shape
    panel = 3.0
    height = float(np.clip(panel * aspect * rows / across, 1.2, 5.0))
    drawn = [volumes[k] for k in ("labels", "prediction") if k in volumes]
    present = classes_present([_plane(v, axis, index) for v in drawn])
    per_row = 2 * len(columns)
    legend_rows = -(-min(len(present), _LEGEND_CLASSES + 1) // per_row)
    head, foot, gap = (0.7 if title else 0.35), 0.12 + 0.24 * legend_rows, 0.08
    layout = Layout(
        width=(panel + gap) * len(columns) + gap + (0.65 if risk is not None else 0.0),
        height=head + height + foot,
    )
    colours = class_colours(max(present, default=0) + 1)
    window = grey_window(image)
    for column, name in enumerate(columns):
        left = gap + column * (panel + gap)
        axes = layout.axes(left, foot, panel, height)
        if name == "risk":
            norm = weight_norm([volumes["risk"]])
            _draw_risk(axes, _plane(volumes["risk"], axis, index), norm, aspect)
            bar = layout.axes(left + panel + 0.1, foot + 0.1, 0.12, height - 0.2)
            _weight_bar(layout.figure, bar, norm)
        else:
            shown = _plane(volumes[name], axis, index) if name in volumes else None
            draw_classes(axes, _plane(image, axis, index), shown, colours, window, aspect)
        axes.set_title({"risk": RISK_COLUMN}.get(name, name), fontsize=11, color=_INK, pad=4)
        if column == 0:
            mark_sides(axes, axis)
    layout.title(title)
    _legend(layout.figure, present, colours, class_names, per_row)
    return save(layout.figure, path)


class Layout:
    """A white figure whose axes are placed in inches from its lower left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.size = (width, height)
        self.figure = Figure(figsize=self.size, facecolor="white")

    def axes(self, left: float, bottom: float, width: float, height: float) -> Any:
        across, up = self.size
        return self.figure.add_axes((left / across, bottom / up, width / across, height / up))

    def title(self, text: str | None) -> None:
        if text:
            top = 1 - 0.1 / self.size[1]
            self.figure.suptitle(text, fontsize=12, color=_INK, y=top, va="top")


@dataclass(frozen=True)
class ComparisonRow:
    """One case of `comparison`: arrays [X, Y, Z] in canonical RAS order and a score per arm."""

    name: str
    image: np.ndarray
    labels: np.ndarray
    risk: np.ndarray | None
    predictions: Mapping[str, np.ndarray]
    scores: Mapping[str, str] = field(default_factory=dict)


def comparison(
    path: str | os.PathLike[str],
    rows: Sequence[ComparisonRow],
    *,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    zooms: Sequence[float] = (1.0, 1.0, 1.0),
    background: int | None = 0,
) -> Path:
    """Writes a PNG of cases (rows) by image, labels, risk map and every arm's prediction (columns).

    Each row shows the slice with most labelled area, cut to the image's foreground, and each
    arm's score (free text) below its prediction. The rows share the scale of the weights.

    Raises: ValueError for no rows, rows with different arms, or arrays whose shapes differ.
    """
    if not rows:
        raise ValueError("rows: expected at least one case, got none")
    arms = list(rows[0].predictions)
    with_risk = rows[0].risk is not None
    for row in rows:
        if list(row.predictions) != arms or (row.risk is not None) != with_risk:
            raise ValueError(
                f"rows: expected the columns of {rows[0].name!r} ({arms}, risk: {with_risk}) in "
                f"every row, got {list(row.predictions)}, risk: {row.risk is not None} in "
                f"{row.name!r}"
            )
    cuts = [cut_slice(row, zooms, background) for row in rows]
    columns = ["image", "labels", *([RISK_COLUMN] if with_risk else []), *arms]
    present = classes_present(
        [cut.labels for cut in cuts] + [p for c in cuts for p in c.predictions]
    )
    colours = class_colours(max(present, default=0) + 1)
    risks = [row.risk for row in rows if row.risk is not None]
    norm = weight_norm(risks) if risks else None

    panel, between = 2.1, 0.06
    heights = [panel * c.aspect * c.image.shape[0] / c.image.shape[1] for c in cuts]
    head, under, left = (0.75 if title else 0.4), 0.3, 0.3
    foot = 0.35 + (0.4 if norm is not None else 0.0)
    layout = Layout(
        width=left + panel * len(columns) + 0.1,
        height=head + sum(heights) + under * len(rows) + foot,
    )
    bottom = layout.size[1] - head
    for row, cut, height in zip(rows, cuts, heights, strict=True):
        bottom -= height
        window = grey_window(row.image)
        shown = {
            "image": None,
            "labels": cut.labels,
            **dict(zip(arms, cut.predictions, strict=True)),
        }
        for column, name in enumerate(columns):
            axes = layout.axes(left + column * panel, bottom, panel - between, height)
            if name == RISK_COLUMN and cut.risk is not None and norm is not None:
                _draw_risk(axes, cut.risk, norm, cut.aspect)
            else:
                draw_classes(axes, cut.image, shown[name], colours, window, cut.aspect)
            if row is rows[0]:
                axes.set_title(name, fontsize=11, color=_INK, pad=5)
            if column == 0:
                axes.set_ylabel(row.name, fontsize=10, color=_INK, labelpad=4)
                mark_sides(axes, cut.axis)
            if name in row.scores:
                axes.set_xlabel(row.scores[name], fontsize=10, color=_INK, labelpad=3)
        bottom -= under
    if norm is not None:
        bar = layout.axes(left + 2 * panel + 0.1, foot + 0.06, panel - 0.26, 0.1)
        _weight_bar(layout.figure, bar, norm, orientation="horizontal")
    layout.title(title)
    _legend(layout.figure, present, colours, class_names, max(4, len(columns)))
    return save(layout.figure, path)


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> Path:
    """Writes the figure as PNG beside `path` and renames it; nothing half-written is left."""
    path = Path(path)
    FigureCanvasAgg(figure)
    with written_beside(path) as partial:
        figure.savefig(partial, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return path


@dataclass(frozen=True)
class _Cut:
    """The slice of a row that is drawn, as [rows, columns] arrays."""

    axis: int
    aspect: float
    image: np.ndarray
    labels: np.ndarray
    risk: np.ndarray | None
    predictions: list[np.ndarray]


def cut_slice(row: ComparisonRow, zooms: Sequence[float], background: int | None) -> _Cut:
    image = _volume(f"image of {row.name!r}", row.image)
    shape = image.shape

    def classes(name: str, array: np.ndarray) -> np.ndarray:
        name = f"{name} of {row.name!r}"
        return _class_indices(name, _volume(name, array, shape), background)

    labels = classes("labels", row.labels)
    predictions = [classes(f"prediction {arm!r}", p) for arm, p in row.predictions.items()]
    risk = None if row.risk is None else _volume(f"risk of {row.name!r}", row.risk, shape)
    axis, index = _best_slice(shape, labels)
    plane = _plane(image, axis, index)
    # Cut to where the image is bright enough to be body, two pixels wider.
    body = plane > grey_window(image)[0] + 0.1 * np.ptp(grey_window(image))
    box = tuple(
        slice(max(int(hit.min()) - 2, 0), int(hit.max()) + 3) if hit.size else slice(None)
        for hit in (np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0)))
    )
    return _Cut(
        axis=axis,
        aspect=_aspect(axis, zooms),
        image=plane[box],
        labels=_plane(labels, axis, index)[box],
        risk=None if risk is None else _plane(risk, axis, index)[box],
        predictions=[_plane(p, axis, index)[box] for p in predictions],
    )


def _volume(name: str, array: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"{name}: expected a non-empty 3-D array, got shape {array.shape}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: expected the image's shape {shape}, got {array.shape}")
    return array


def _class_indices(name: str, array: np.ndarray, background: int | None) -> np.ndarray:
    """int64 classes, -1 where nothing is drawn (background, ignored voxels)."""
    whole = array.astype(np.int64) if array.dtype.kind in "biuf" else None
    if whole is None or (array.dtype.kind == "f" and not np.array_equal(whole, array)):
        raise TypeError(f"{name}: expected class indices (whole numbers), got {array.dtype}")
    hidden = whole < 0 if background is None else (whole < 0) | (whole == background)
    return np.where(hidden, -1, whole)


def _best_slice(shape: tuple[int, ...], classes: np.ndarray | None) -> tuple[int, int]:
    """Axis and index of the slice to draw."""
    axis = 2 if 4 * min(shape[0], shape[1]) >= shape[2] else int(np.argmin(shape))
    if classes is not None and (classes >= 0).any():
        others = tuple(a for a in range(3) if a != axis)
        return axis, int(np.argmax((classes >= 0).sum(axis=others)))
    return axis, shape[axis] // 2


def _plane(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """[rows, columns] with the first remaining axis to the right and the second upwards."""
    return np.take(volume, index, axis=axis).T


def _aspect(axis: int, zooms: Sequence[float]) -> float:
    across, up = (float(zooms[a]) for a in range(3) if a != axis)
    return up / across


def grey_window(image: np.ndarray) -> tuple[float, float]:
    """Grey levels shown as black and white: 1st and 99.5th percentile of the finite values."""
    finite = image[np.isfinite(image)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(finite, (1.0, 99.5)))
    return low, high if high > low else low + 1.0


def classes_present(planes: Sequence[np.ndarray]) -> list[int]:
    """Classes seen in the planes, in order of their number."""
    found: set[int] = set()
    for plane in planes:
        found.update(int(v) for v in np.unique(plane) if v >= 0)
    return sorted(found)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("black")
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_classes(
    axes: Any,
    image: np.ndarray,
    classes: np.ndarray | None,
    colours: np.ndarray,
    window: tuple[float, float],
    aspect: float,
) -> None:
    """The grey image with the classes filled half-transparent and their borders in full colour."""
    grey = np.clip((image - window[0]) / (window[1] - window[0]), 0.0, 1.0)
    rgb = np.repeat(np.nan_to_num(grey)[..., None], 3, axis=-1)
    if classes is not None:
        scale = 4  # borders one quarter of a pixel wide
        rgb = rgb.repeat(scale, 0).repeat(scale, 1)
        classes = classes.repeat(scale, 0).repeat(scale, 1)
        edge = np.zeros(classes.shape, dtype=bool)
        for step in (1, -1):
            for along in (0, 1):
                moved = np.roll(classes, step, axis=along)
                edge |= moved != classes
        drawn = classes >= 0
        strength = np.where(edge, 1.0, _FILL)[..., None] * drawn[..., None]
        rgb = rgb * (1 - strength) + colours[np.maximum(classes, 0)] * strength
    axes.imshow(
        rgb,
        origin="lower",
        aspect=aspect,
        interpolation="nearest",
        extent=(-0.5, image.shape[1] - 0.5, -0.5, image.shape[0] - 0.5),
    )
    _bare(axes)


def weight_norm(risks: Sequence[np.ndarray]) -> Normalize:
    """Logarithmic from about 3-fold weights on (even steps of hardness), linear below."""
    values = np.concatenate([r[np.isfinite(r) & (r > 0)].ravel() for r in risks])
    if values.size == 0:
        return Normalize(0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if high / low < 3.0:
        return Normalize(low, high if high > low * 1.01 else low + 1.0)
    return LogNorm(low, high)


def _draw_risk(axes: Any, risk: np.ndarray, norm: Normalize, aspect: float) -> None:
    shown = np.ma.masked_where(~(np.isfinite(risk) & (risk > 0)), risk)
    axes.imshow(
        shown, origin="lower", aspect=aspect, interpolation="nearest", cmap=RISK_COLOURS, norm=norm
    )
    _bare(axes)


def _weight_bar(figure: Figure, axes: Any, norm: Normalize, orientation: str = "vertical") -> None:
    bar = figure.colorbar(
        ScalarMappable(norm=norm, cmap=RISK_COLOURS), cax=axes, orientation=orientation
    )
    if isinstance(norm, LogNorm):
        low, high = norm.inverse(np.array([0.0, 1.0]))
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
        steps = (1, 2, 5) if high / low >= 10 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        edge = 1e-9 * high  # the ends come back rounded
        ticks = [d * s for d in decades for s in steps if low - edge <= d * s <= high + edge]
        bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
        bar.minorticks_off()
    bar.set_label("voxel weight", fontsize=9, color=_INK, labelpad=2)
    bar.ax.tick_params(labelsize=8, colors=_INK, pad=2)
    bar.outline.set_visible(False)


def mark_sides(axes: Any, axis: int, size: float = 8.0) -> None:
    """Letters of the directions at the left and right edge (RAS: x to the right)."""
    sides = ("P", "A") if axis == 0 else ("L", "R")
    for x, align, letter in ((0.02, "left", sides[0]), (0.98, "right", sides[1])):
        axes.text(
            x, 0.02, letter, transform=axes.transAxes, color="white", fontsize=size, ha=align,
            va="bottom", path_effects=[withStroke(linewidth=0.2 * size, foreground="black")],
        )  # fmt: skip


def _legend(
    figure: Figure,
    present: Sequence[int],
    colours: np.ndarray,
    class_names: Sequence[str] | None,
    columns: int,
) -> None:
    if not present:
        return

    names = [] if class_names is None else list(class_names)

    def name(index: int) -> str:
        return names[index] if index < len(names) else f"class {index}"

    handles = [Patch(color=colours[i], label=name(i)) for i in present[:_LEGEND_CLASSES]]
    rest = len(present) - len(handles)
    if rest > 0:
        handles.append(Patch(color="none", label=f"and {rest} more"))
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(len(handles), columns),
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.4,
        bbox_to_anchor=(0.5, 0.0),
        borderaxespad=0.2,
    )
