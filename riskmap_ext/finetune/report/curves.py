"""Curves as inline SVG; lines are told apart by dash and mark, too. style.css has the colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from riskmap_ext.finetune.pictures.figures import drawn_alike

Points = Sequence[tuple[float, float]]
COLOURS = 7
_DASHES = ("-", (0, (5, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)), (0, (9, 2)), (0, (3, 1)), (0, (1, 3)))
_MARKS = "os^DxPv"
_MOST_MARKS = 12
# A longer line has no marks unless its style is a number.
_FINE = 60
_MOST_POINTS = 250
# A smaller span stays on a linear axis.
_LOG_SPAN = 30.0
# Such names stand one below the other.
_LONG_NAME = 20
_WIDTH = 420
# Stand-ins for the page's colours, by their names there.
_COLOUR = {
    name: f"#{i + 0xC01045:x}"
    for i, name in enumerate(("ink", "soft", "line", *(f"l{i + 1}" for i in range(COLOURS))))
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "riskmap",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12.5,
    "lines.linewidth": 1.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.autolimit_mode": "round_numbers",
    "axes.ymargin": 0,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "grid.color": _COLOUR["line"],
    "axes.titlesize": "medium",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), _COLOUR["soft"]),
    **dict.fromkeys(("xtick.color", "ytick.color"), _COLOUR["soft"]),
    "text.color": _COLOUR["ink"],
}


class Line(NamedTuple):
    """style: "ink" (strong), "soft" (many fine points, or the rest of many lines), or 1 .. 7, each
    with a colour, a dash and a mark of its own."""

    name: str
    points: Points
    style: str | int = "ink"


class Chart(NamedTuple):
    title: str
    svg: str


def chart(
    lines: Sequence[Line],
    title: str,
    y_label: str,
    y_range: Sequence[float] = (),
    *,
    log: bool = False,
) -> Chart | None:
    """A chart with its legend; None where no line has a finite point, each other one is a gap.

    y_range: what the axis spans at least. log: a logarithmic axis where the values are positive and
    span much.
    """
    known = [(x, y) for line in lines for x, y in line.points if math.isfinite(y)]
    if not known:
        return None
    values = [*(y for _, y in known), *y_range]
    low, high = min(values), max(values)
    log = log and low > 0 and high / low > _LOG_SPAN
    named = [line.name for line in lines if line.name]
    columns = 1 if max(map(len, named), default=0) > _LONG_NAME else 2
    height = 270 + 20 * -(-len(named) // columns)
    with drawn_alike(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            axes.plot(*np.transpose(line.points), label=line.name or None, **_look(line))
        axes.update_datalim([(0, low), (0, high)])
        axes.autoscale_view()
        axes.set_xlim(0, max(1, *(x for x, _ in known)))
        if log:
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            subs = (1, 2, 5) if high < 1000 * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs))
            axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel("step")
        axes.set_title(y_label + (" (log)" if log else ""), loc="left")
        if named:
            figure.legend(loc="outside lower left", ncols=columns)
        return Chart(title, _svg(figure))


def dots(rows: Mapping[str, Sequence[float]], title: str) -> Chart:
    """A row of dots for each name with their mean, on a scale from 0 to 100."""
    with drawn_alike(_STYLE):
        figure = Figure(figsize=(_WIDTH / 72, (40 + 34 * len(rows)) / 72), layout="constrained")
        axes = figure.subplots()
        for place, (name, values) in enumerate(rows.items()):
            mean, line = float(np.mean(values)), Line(name, [(v, place) for v in values], place + 1)
            axes.plot(*np.transpose(line.points), **_look(line) | {"linestyle": "", "markevery": 1})
            axes.vlines(mean, place - 0.4, place + 0.4, _COLOUR["ink"])
            axes.text(103, place, f"{mean:.1f}", va="center")
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.grid(axis="x")
        axes.grid(False, axis="y")
        return Chart(title, _svg(figure))


def _svg(figure: Figure) -> str:
    """Without what a page does not need: a page's colours, tenths of a pixel, no names."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', "", text, count=5)
    text = re.sub(r'(?<=<g) id="[^"]*"| clip-path="[^"]*"|(?<=>)\s+(?=<)', "", text)
    text = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d)\d+| ?\n", r"\1", d[0]), text)
    for name, stand_in in _COLOUR.items():
        text = text.replace(stand_in, f"var(--{name})")
    return text


def _look(line: Line) -> dict[str, Any]:
    look: dict[str, Any] = {
        "color": _COLOUR.get(f"l{line.style}", _COLOUR["ink"]),
        "clip_on": False,
    }
    if line.style == "soft":
        return look | {"color": _COLOUR["soft"], "linewidth": 1, "alpha": 0.45}
    if isinstance(line.style, int):
        which = line.style - 1
        look |= {"linestyle": _DASHES[which], "marker": _MARKS[which]}
    elif len(line.points) < _FINE:
        look["marker"] = "o"
    return look | {"markevery": -(-len(line.points) // _MOST_MARKS)}


def run_charts(
    losses: Sequence[tuple[float, float, float]], metrics: Sequence[dict[str, float]]
) -> list[Chart]:
    """Loss, Dice and learning rate over the steps, as far as they are known."""
    if losses:
        steps = [(step, loss) for step, loss, _ in losses]
        width = max(1, len(steps) // 50)
        every = round(steps[1][0] - steps[0][0] if len(steps) > 1 else steps[0][0])
        name = "each step" if every == 1 else f"mean of {every} steps"
        lines = [Line(name, steps)]
        if width > 1:
            smooth = Line(f"mean of {width} of these", _smooth(steps, width))
            lines = [Line(name, steps, "soft"), smooth]
        rates = [(step, lr) for step, _, lr in losses]
    else:
        lines = [Line("mean up to a validation", [(r["step"], r["train_loss"]) for r in metrics])]
        rates = [(r["step"], r["lr"]) for r in metrics]
    charts = (
        chart(lines, "Training loss", "loss", log=True),
        chart(_dice_lines(metrics), "Dice of the validation cases", "Dice", (0, 1)),
        chart([Line("", rates)], "Learning rate", "learning rate", (0,)),
    )
    return [each for each in charts if each]


def _smooth(points: Points, width: int) -> list[tuple[float, float]]:
    """Means of `width` neighbours; at both ends of those that are there."""
    smooth = []
    for place, (step, _) in enumerate(points):
        first = place - width // 2
        values = [y for _, y in points[max(0, first) : first + width]]
        smooth.append((step, sum(values) / len(values)))
    return smooth


def _dice_lines(metrics: Sequence[dict[str, float]]) -> list[Line]:
    """The mean, and each class; of many classes the lowest have names."""
    if not metrics:
        return []
    shown = thinned(metrics, _MOST_POINTS)

    def line(column: str, name: str, style: str | int) -> Line:
        return Line(name, [(row["step"], row[column]) for row in shown], style)

    columns = named = [name for name in metrics[-1] if name.startswith("dice_")]
    if len(columns) > COLOURS:
        last = {c: v for c in columns if not math.isnan(v := metrics[-1][c])}
        named = sorted(last, key=lambda c: last[c])[:COLOURS]
    others = [c for c in columns if c not in named]
    label = f"{len(others)} other classes (the lowest at the end have names)"
    lines = [line(c, label if c == others[0] else "", "soft") for c in others]
    lines += [line(c, c.removeprefix("dice_"), i) for i, c in enumerate(named, start=1)]
    return [*lines, line("mean_dice", "mean", "ink")] if len(columns) > 1 else lines


def thinned(rows: Sequence[dict[str, float]], most: int) -> Sequence[dict[str, float]]:
    """At most so many, evenly, with the last one."""
    every = -(-len(rows) // most)
    return rows[(len(rows) - 1) % every :: every]
