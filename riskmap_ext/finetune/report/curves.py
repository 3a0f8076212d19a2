"""Curves as inline SVG; lines are told apart by dash and mark, too. style.css has the colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from riskmap_ext.finetune.pictures.figures import drawn_alike

_DASHES = ("-", (0, (5, 2)), (0, (1, 2)), (0, (6, 2, 1, 2)), (0, (9, 2)), (0, (3, 1)), (0, (1, 3)))
_MARKS = "os^DxPv"
_COLOURS = len(_MARKS)
_MOST_MARKS = 12
_MOST_POINTS = 250
# A smaller span stays on a linear axis.
_LOG_SPAN = 30.0
# Longer names stand one below the other.
_LONG_NAME = 20
_MOST_LETTERS = 55
_WIDTH, _HEIGHT = 420, 270
# Stand-ins for the page's colours, by their names there.
_NAMES = ("ink", "soft", "line", *(f"l{i + 1}" for i in range(_COLOURS)))
_COLOUR = {name: f"#{i:x}" for i, name in enumerate(_NAMES, start=0xC01045)}
_SOFT = ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
# Faint: many points, or the rest of many lines. Other lines take the looks of the cycle by turns.
_STRONG: dict[str, Any] = {"color": _COLOUR["ink"], "linestyle": "-", "marker": "o"}
_FAINT: dict[str, Any] = {
    "color": _COLOUR["soft"],
    "linestyle": "-",
    "marker": "",
    "linewidth": 1,
    "alpha": 0.45,
}
_STYLE = {
    "axes.prop_cycle": cycler(
        color=[_COLOUR[f"l{i + 1}"] for i in range(_COLOURS)], linestyle=_DASHES, marker=_MARKS
    ),
    **dict.fromkeys(_SOFT, _COLOUR["soft"]),
    "text.color": _COLOUR["ink"],
    "grid.color": _COLOUR["line"],
    "svg.fonttype": "none",
    "svg.hashsalt": "riskmap",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12.5,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.autolimit_mode": "round_numbers",
    "axes.ymargin": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
}


class Line(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    look: Mapping[str, Any] = {}


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
    names = [line.name for line in lines if line.name]
    columns = 1 if max(map(len, names), default=0) > _LONG_NAME else 2
    legend = 20 * -(-len(names) // columns)
    with drawn_alike(_STYLE):
        figure = Figure((_WIDTH / 72, (_HEIGHT + legend) / 72))
        edges = {"left": 60 / _WIDTH, "right": 1 - 16 / _WIDTH}
        height = _HEIGHT + legend
        edges |= {"bottom": (48 + legend) / height, "top": 1 - 22 / height}
        axes = figure.subplots(gridspec_kw=edges)
        for line in lines:
            look = {"markevery": -(-len(line.points) // _MOST_MARKS), **line.look}
            label = line.name[:_MOST_LETTERS] + "…" * (len(line.name) > _MOST_LETTERS)
            axes.plot(*np.transpose(line.points), label=label or None, **look)
        axes.update_datalim([(0, low), (0, high)])
        axes.autoscale_view()
        axes.set_xlim(0, max(1, *(x for x, _ in known)))
        if log:
            axes.set(yscale="log", ylim=(low, high))
            steps = (1, 2, 5) if high < 1000 * low else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=steps))
            axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel("step")
        axes.set_title(y_label + (" (log)" if log else ""), loc="left")
        if names:
            figure.legend(loc="lower left", ncols=columns, borderpad=0, borderaxespad=0)
        return Chart(title, _svg(figure))


def dots(rows: Mapping[str, Sequence[float]], title: str) -> Chart:
    """A row of dots for each name with their mean, on a scale from 0 to 100."""
    with drawn_alike({**_STYLE, "axes.grid.axis": "x"}):
        figure = Figure((_WIDTH / 72, (40 + 34 * len(rows)) / 72), layout="constrained")
        axes = figure.subplots()
        for place, values in enumerate(rows.values()):
            axes.plot(values, [place] * len(values), linestyle="")
            mean = float(np.mean(values))
            axes.vlines(mean, place - 0.4, place + 0.4, _COLOUR["ink"])
            axes.text(103, place, f"{mean:.1f}", va="center")
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), list(rows))
        return Chart(title, _svg(figure))


def _svg(figure: Figure) -> str:
    """In the page's colours, to a tenth of a pixel, without names and clips, which it needs not."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (xmlns(:xlink)?|width|height|version)="[^"]*"', "", text, count=5)
    text = re.sub(r'(?<=<g) id="[^"]*"| (clip-path|transform)="(url|rotate\(-0 )[^"]*"', "", text)
    text = re.sub(r" font-family: [^;\"]*;|(?<=>)\s+(?=<)", "", text)
    text = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d)\d+| ?\n", r"\1", d[0]), text)
    for name, stand_in in _COLOUR.items():
        text = text.replace(stand_in, f"var(--{name})")
    return text


def run_charts(
    losses: Sequence[Sequence[float]], metrics: Sequence[dict[str, float]]
) -> list[Chart]:
    """Loss, Dice and learning rate over the steps, as far as they are known."""
    if losses:
        steps = [(step, loss) for step, loss, _ in losses]
        width = max(1, len(steps) // 50)
        every = round(steps[1][0] - steps[0][0] if len(steps) > 1 else steps[0][0])
        name = "each step" if every == 1 else f"mean of {every} steps"
        lines = [Line(name, steps, _STRONG)]
        if width > 1:
            smooth = Line(
                f"mean of {width} of these", _smooth(steps, width), _STRONG | {"marker": ""}
            )
            lines = [Line(name, steps, _FAINT), smooth]
        rates = [(step, lr) for step, _, lr in losses]
    else:
        losses_there = [(r["step"], r["train_loss"]) for r in metrics]
        lines = [Line("mean up to a validation", losses_there, _STRONG)]
        rates = [(r["step"], r["lr"]) for r in metrics]
    charts = (
        chart(lines, "Training loss", "loss", log=True),
        chart(_dice_lines(metrics), "Dice of the validation cases", "Dice", (0, 1)),
        chart([Line("", rates, _STRONG | {"marker": ""})], "Learning rate", "learning rate", (0,)),
    )
    return [each for each in charts if each]


def _smooth(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """Means of `width` neighbours; at both ends of those that are there."""
    firsts = [place - width // 2 for place in range(len(points))]
    near = [[y for _, y in points[max(0, first) : first + width]] for first in firsts]
    return [(step, sum(ys) / len(ys)) for (step, _), ys in zip(points, near, strict=True)]


def _dice_lines(metrics: Sequence[dict[str, float]]) -> list[Line]:
    """The mean, and each class; of many classes the lowest have names."""
    last = metrics[-1] if metrics else {}
    columns = [name for name in last if name.startswith("dice_")]
    known = [name for name in columns if not math.isnan(last[name])]
    lowest = sorted(known, key=lambda c: last[c])[:_COLOURS]
    named = columns if len(columns) <= _COLOURS else lowest
    others = [name for name in columns if name not in named]
    label = f"{len(others)} other classes (the lowest at the end have names)"
    looks = [(c, label if c == others[0] else "", _FAINT) for c in others]
    looks += [(c, c.removeprefix("dice_"), {}) for c in named]
    looks += [("mean_dice", "mean", _STRONG)] if len(columns) > 1 else []
    shown = thinned(metrics, _MOST_POINTS)
    return [Line(name, [(r["step"], r[c]) for r in shown], look) for c, name, look in looks]


def thinned(rows: Sequence[dict[str, float]], most: int) -> Sequence[dict[str, float]]:
    """At most so many, evenly, with the last one."""
    every = max(1, -(-len(rows) // most))
    return rows[(len(rows) - 1) % every :: every]
