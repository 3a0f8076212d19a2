"""Curves as inline SVG for a page; marks distinguish lines, too."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.style import context as style_context
from matplotlib.ticker import StrMethodFormatter

# Okabe and Ito's hues, in a lightness that shows on a white page and on a dark one.
_COLOURS = ("#b87700", "#2b86bd", "#00936b", "#8f8500", "#5b7fe0", "#d95b0b", "#b86098")
# Keys are matplotlib's names; the first mark is for the mean.
_MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "X": "✖", "P": "✚", "v": "▼", "*": "★"}
_MOST_MARKS = 12
_MOST_POINTS = 250
# Smaller spans keep a linear axis.
_LOG_SPAN = 30.0
# Stand-ins for the page's colours, by their names on the page.
_PAGE = {"ink": "#c01045", "soft": "#c01046", "line": "#c01047"}
_STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=_COLOURS, marker=list(_MARKS)[1:]),
    "axes.edgecolor": _PAGE["soft"],
    "axes.labelcolor": _PAGE["soft"],
    "xtick.color": _PAGE["soft"],
    "ytick.color": _PAGE["soft"],
    "grid.color": _PAGE["line"],
    "svg.fonttype": "none",
    "svg.hashsalt": "riskmap",
    "font.family": "DejaVu Sans",
    "font.size": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "lines.linewidth": 1.8,
}
# Faint: many points, or the rest of many lines. Other lines cycle through the colours and marks.
_STRONG: dict[str, Any] = {"color": _PAGE["ink"], "marker": "o"}
_FAINT: dict[str, Any] = {"color": _PAGE["soft"], "marker": "", "linewidth": 1, "alpha": 0.45}


class Line(NamedTuple):
    """A line without a name is not in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    look: Mapping[str, Any] = {}


class Chart(NamedTuple):
    """legend: name, colour and mark of lines."""

    title: str
    svg: str
    legend: list[tuple[str, str, str]]


def chart(
    lines: Sequence[Line],
    title: str,
    y_range: tuple[float | None, float | None] = (None, None),
    *,
    x_label: str = "step",
    x_range: tuple[float, float] | None = None,
    log: bool = False,
) -> Chart | None:
    """None if no line has a finite point; any other point is a gap.

    x_range: by default from 0 to the last step. log: a logarithmic axis if the values are positive
    and span a wide range.
    """
    known = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not known:
        return None
    steps, values = zip(*known, strict=True)
    log = log and min(values) > 0 and max(values) / min(values) > _LOG_SPAN
    with style_context(["default", _STYLE]):
        figure = Figure((5.8, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log" if log else "linear")
        drawn = []
        for line in lines:
            every = -(-len(line.points) // _MOST_MARKS)
            drawn += axes.plot(*np.transpose(line.points), markevery=every, **line.look)
        axes.set(xlabel=x_label, xlim=x_range or (0, max(1, *steps)), ylim=y_range)
        axes.locator_params(axis="x", integer=True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
        svg = _svg(figure)
    legend = [
        (line.name, _in_page(str(each.get_color())), _MARKS.get(str(each.get_marker()), "-"))
        for line, each in zip(lines, drawn, strict=True)
        if line.name
    ]
    return Chart(title + (" (log)" if log else ""), svg, legend)


def _svg(figure: Figure) -> str:
    """Without names that refer elsewhere or repeat on a page; paths to a tenth of a pixel."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (xmlns(:xlink)?|clip-path)="[^"]*"|(?<=<g) id="[^"]*"', "", text)
    text = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d)\d+", r"\1", d[0]), text)
    return _in_page(text)


def _in_page(text: str) -> str:
    for name, stand_in in _PAGE.items():
        text = text.replace(stand_in, f"var(--{name})")
    return text


def run_charts(
    losses: Sequence[Sequence[float]], metrics: Sequence[dict[str, float]]
) -> list[Chart]:
    """Loss, Dice and learning rate over the steps, as far as they are known.

    Without `losses` (step, loss, lr), those of the validations are used.
    """
    rows = losses or [(row["step"], row["train_loss"], row["lr"]) for row in metrics]
    points, rates = [(row[0], row[1]) for row in rows], [(row[0], row[2]) for row in rows]
    name = f"mean of {rows[0][0]:g} steps" if rows and rows[0][0] > 1 else "each step"
    lines = [Line(name, points, _STRONG)]
    if (width := len(points) // 50) > 1:
        smooth = Line(f"mean of {width} of these", _smooth(points, width), _STRONG)
        lines = [Line(name, points, _FAINT), smooth]
    charts = (
        chart(lines, "Training loss", log=True),
        chart(_dice_lines(metrics), "Dice of the validation cases", (0, 1)),
        chart([Line("", rates, _STRONG)], "Learning rate", (0, None)),
    )
    return [each for each in charts if each]


def _smooth(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Means of `width` neighbours; at both ends, of those that exist."""
    steps, values = np.transpose(points)
    sums, counts = (np.convolve(v, np.ones(width), "same") for v in (values, np.ones(len(values))))
    return list(zip(steps, sums / counts, strict=True))


def _dice_lines(metrics: Sequence[dict[str, float]]) -> list[Line]:
    """The mean and each class; with many classes, only the lowest have names."""
    last = metrics[-1] if metrics else {}
    columns = [name for name in last if name.startswith("dice_")]
    lowest = sorted(columns, key=lambda c: (math.isnan(last[c]), last[c]))[: len(_COLOURS)]
    others = [name for name in columns if name not in lowest]
    label = f"{len(others)} other classes (the lowest at the end have names)"
    looks = [(c, label if c == others[0] else "", _FAINT) for c in others]
    looks += [(c, c.removeprefix("dice_"), {}) for c in columns if c in lowest]
    looks += [("mean_dice", "mean", _STRONG)] if len(columns) > 1 else []
    shown = thinned(metrics, _MOST_POINTS)
    return [Line(name, [(r["step"], r[c]) for r in shown], look) for c, name, look in looks]


def thinned(rows: Sequence[dict[str, float]], most: int) -> Sequence[dict[str, float]]:
    """At most this many rows, evenly spaced, including the last one."""
    every = max(1, -(-len(rows) // most))
    return rows[(len(rows) - 1) % every :: every]
