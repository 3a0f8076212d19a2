"""Line charts as inline SVG: axes with ticks, and lines told apart by dash and mark, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 7
_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 20, 34, 48
_DASHES = ("", "8 4", "2 4", "10 4 2 4", "14 4", "5 2", "1 5")
_MARKS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "M-3.5,-3.5h7v7h-7z",
    "M0,-4.5L4.5,3.5H-4.5z",
    "M0,-5L5,0L0,5L-5,0z",
    "M-4,-4L4,4M-4,4L4,-4",
    "M-5,0H5M0,-5V5",
    "M0,4.5L4.5,-3.5H-4.5z",
)
_MOST_MARKS = 12
# A line of so many points has no marks unless its style is a number.
_FINE = 60
# A smaller span stays on a linear axis.
_LOG_SPAN = 30.0


@dataclass(frozen=True)
class Line:
    """Points (x, y); NaN and infinite y leave a gap.

    style: "ink" (strong), "faint" (many fine points, or the rest of many lines), or 1 .. COLOURS,
    each with a dash and a mark of its own.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str | int = "ink"


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    """A figure with its legend; empty text where no line has a finite point.

    y_range: what the axis spans at least. log: a logarithmic axis where the values are positive and
    span much.
    """
    known = [p for line in lines for p in line.points if math.isfinite(p[1])]
    if not known:
        return ""
    x_axis = _Axis(0.0, max(max(x for x, _ in known), 1.0), snug=True)
    values = [y for _, y in known] + list(y_range or ())
    low, high = min(values), max(values)
    y_axis = _Axis(low, high, log=log and low > 0 and high / low > _LOG_SPAN)
    parts = [_grid(x_axis, y_axis, x_label, y_label + (" (log)" if y_axis.log else ""))]
    parts += [_drawn(line, x_axis, y_axis) for line in lines]
    legend = "".join(f"<li>{_sample(line)}{escape(line.name)}</li>" for line in lines if line.name)
    caption = f"<ul class='legend'>{legend}</ul>" if legend else ""
    return (
        f"<figure class='chart'><figcaption>{escape(title)}</figcaption>\n"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escape(title)}'>\n"
        + "\n".join(parts)
        + f"\n</svg>\n{caption}</figure>"
    )


class _Axis:
    """From values to 0 .. 1, with ticks at round values; it ends at one unless it is snug."""

    def __init__(self, low: float, high: float, *, log: bool = False, snug: bool = False) -> None:
        self.log = log
        if log:
            self.ticks = _log_ticks(low, high)
            self._low, self._high = math.log10(low), math.log10(high)
            return
        if high <= low:
            pad = abs(low) * 0.1 or 1.0
            low, high = low - pad, high + pad
        step = _round_step((high - low) / 5)
        last = math.floor(high / step + 1e-9) if snug else math.ceil(high / step - 1e-9)
        self.ticks = [i * step for i in range(math.floor(low / step + 1e-9), last + 1)]
        self._low, self._high = self.ticks[0], high if snug else self.ticks[-1]

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        share = (value - self._low) / (self._high - self._low)
        return min(max(share, 0.0), 1.0)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, last + 1, max(1, (last - first) // 5))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    return [t for d in decades for s in steps if low <= (t := s * 10.0**d) <= high]


def _x(share: float) -> float:
    return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)


def _y(share: float) -> float:
    return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    left, right, top, bottom = _x(0), _x(1), _y(1), _y(0)
    parts = []
    for tick in y_axis.ticks:
        y = _y(y_axis(tick))
        parts.append(f"<path class='grid' d='M{left},{y}H{right}'/>")
        parts.append(f"<text x='{left - 7}' y='{y}' dy='.35em' class='end'>{tick:g}</text>")
    for tick in x_axis.ticks:
        x = _x(x_axis(tick))
        parts.append(f"<path class='axis' d='M{x},{bottom}v5'/>")
        parts.append(f"<text x='{x}' y='{bottom + 8}' dy='.8em' class='mid'>{tick:g}</text>")
    parts += [
        f"<path class='axis' d='M{left},{top}V{bottom}H{right}'/>",
        f"<text x='{(left + right) / 2}' y='{_HEIGHT - 5}' class='mid'>{escape(x_label)}</text>",
        f"<text x='4' y='16'>{escape(y_label)}</text>",
    ]
    return "".join(parts)


def _drawn(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    places: list[tuple[float, float] | None] = [
        (_x(x_axis(x)), _y(y_axis(y))) if math.isfinite(y) and not (y_axis.log and y <= 0) else None
        for x, y in line.points
    ]
    path, pen_up = [], True
    for place in places:
        if place is not None:
            path.append(f"{'M' if pen_up else 'L'}{place[0]:g},{place[1]:g}")
        pen_up = place is None
    drawn = f"<path {_look(line)} d='{''.join(path)}'/>"
    if not _has_marks(line):
        return drawn
    every = -(-len(places) // _MOST_MARKS)
    marked = [
        (place, point)
        for i, (place, point) in enumerate(zip(places, line.points, strict=True))
        if place is not None and (i == len(places) - 1 or i % every == 0)
    ]
    marks = [
        f"<path class='mark l{line.style}' d='{_mark(line)}' transform='translate({x:g},{y:g})'>"
        f"<title>{escape(line.name)}: {point[1]:.4g} at {point[0]:g}</title></path>"
        for (x, y), point in marked
    ]
    return drawn + "".join(marks)


def _look(line: Line) -> str:
    dash = _DASHES[(line.style - 1) % len(_DASHES)] if isinstance(line.style, int) else ""
    return f"class='line l{line.style}'" + (f" stroke-dasharray='{dash}'" if dash else "")


def _mark(line: Line) -> str:
    return _MARKS[(line.style - 1) % len(_MARKS)] if isinstance(line.style, int) else _MARKS[0]


def _has_marks(line: Line) -> bool:
    return isinstance(line.style, int) or (line.style == "ink" and len(line.points) < _FINE)


def _sample(line: Line) -> str:
    mark = f"<path class='mark l{line.style}' d='{_mark(line)}' transform='translate(17,7)'/>"
    mark = mark if _has_marks(line) else ""
    return (
        "<svg class='sample' viewBox='0 0 34 14' aria-hidden='true'>"
        f"<path {_look(line)} d='M0,7H34'/>{mark}</svg>"
    )


# The hues of figures.class_colours, dark enough for lines on white.
STYLE = """
:root { --l1: #b87700; --l2: #2b86bd; --l3: #00805d; --l4: #8f8500; --l5: #004f9e; --l6: #c94f00;
  --l7: #b0578c; }
@media (prefers-color-scheme: dark) {
  :root { --l1: #e69f00; --l2: #56b4e9; --l3: #1fbf93; --l4: #f0e442; --l5: #7d9df0; --l6: #ff8a3d;
    --l7: #dd93bb; }
}
.chart figcaption { font-weight: 600; margin-bottom: .2rem; }
.chart > svg { display: block; width: 100%; height: auto; }
.chart text { font-size: 13px; fill: var(--soft); }
.chart .end { text-anchor: end; }
.chart .mid { text-anchor: middle; }
.grid { stroke: var(--line); }
.axis { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.mark { stroke-width: 1.6; }
.lfaint { stroke: var(--soft); stroke-width: 1; opacity: .45; }
.link { stroke: var(--ink); stroke-width: 2.4; }
.mark.link { fill: var(--ink); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; padding: 0;
  margin: .3rem 0 0; font-size: .9rem; }
.legend li { display: flex; align-items: center; gap: .4rem; margin: 0; overflow-wrap: anywhere; }
.sample { width: 34px; height: 14px; flex: none; overflow: visible; }
@media (max-width: 40rem) { .chart text { font-size: 16px; } }
""" + "\n".join(
    f".l{i} {{ stroke: var(--l{i}); }} .mark.l{i} {{ fill: var(--l{i}); }}"
    for i in range(1, COLOURS + 1)
)
