"""Pictures of the evidence: paired differences with their intervals, and learning curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.transfer.arms import ARMS, MAP, PLACED, REFERENCE, SETTINGS, WEIGHTS
from benchmarks.transfer.evidence import POINTS, Group
from benchmarks.transfer.stats import Interval

_COLOURS = ("#3f51b5", "#e07b00", "#2e7d32", "#8e24aa")
# Of curves: what is looked at stands out.
_STRONG = {MAP: "#3f51b5", REFERENCE: "#444444", WEIGHTS: "#e07b00"}


def overview(groups: Sequence[Group], path: Path) -> Path:
    """The map against CE + Dice and against class weights + Dice, a line for each group."""
    figure = _figure(11, 1.2 + 0.34 * len(groups))
    names = [f"{group.scenario}, {group.length}" for group in groups]
    for axes, other in zip(figure.subplots(1, 2, sharey=True), (REFERENCE, WEIGHTS), strict=True):
        _intervals(axes, names, {"": [group.against(MAP, other) for group in groups]})
        axes.set_title(f"{ARMS[MAP].name} minus {ARMS[other].name}", fontsize=10)
    return _save(figure, path)


def differences(groups: Sequence[Group], path: Path, base: str = REFERENCE) -> Path:
    """All arms of a scenario against one of them, a colour for each length."""
    arms = [key for key in ARMS if key != base and any(key in g.runs for g in groups)]
    figure = _figure(8, 1.2 + 0.34 * len(arms))
    found = {
        f"{group.length}, {group.steps} steps": [group.against(arm, base) for arm in arms]
        for group in groups
    }
    axes = figure.subplots()
    _intervals(axes, [ARMS[arm].name for arm in arms], found)
    axes.set_title(f"{groups[0].scenario}: minus {ARMS[base].name}", fontsize=10)
    return _save(figure, path)


def curves(groups: Sequence[Group], path: Path) -> Path | None:
    """Mean Dice over the steps; None where no run has more than one validation."""
    shown = [g for g in groups if any(len(curve) > 1 for curve in g.curves.values())]
    if not shown:
        return None
    figure = _figure(5 * len(shown) + 1.8, 4)
    arms = [arm for arm in ARMS if any(arm in group.curves for group in shown)]
    arms = [arm for arm in arms if arm not in SETTINGS + PLACED]
    colours = {arm: f"C{index}" for index, arm in enumerate(arms)} | _STRONG
    lines = {}
    for axes, group in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for arm in arms:
            if not (curve := group.curves.get(arm)):
                continue
            steps, dice = zip(*curve, strict=True)
            strong = arm in _STRONG
            (lines[arm],) = axes.plot(
                steps,
                [POINTS * value for value in dice],
                marker=".",
                color=colours[arm],
                linewidth=2.2 if strong else 0.9,
                alpha=1 if strong else 0.6,
                label=ARMS[arm].name,
            )
        axes.set_title(f"{group.scenario}, {group.length}", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("mean Dice, points")
        axes.grid(alpha=0.3)
    handles = [lines[arm] for arm in arms if arm in lines]
    figure.legend(handles=handles, fontsize=7, loc="outside right upper")
    return _save(figure, path)


def _intervals(axes: Axes, names: Sequence[str], found: dict[str, list[Interval | None]]) -> None:
    for index, (label, intervals) in enumerate(found.items()):
        shift = 0.22 * (index - (len(found) - 1) / 2)
        for row, each in enumerate(intervals):
            if each is None:
                continue
            colour = _COLOURS[index % len(_COLOURS)]
            if each.low <= each.high:  # neither is NaN
                span = [POINTS * each.low, POINTS * each.high]
                axes.plot(span, [row + shift] * 2, color=colour, linewidth=1.6)
            axes.plot(POINTS * each.mean, row + shift, "o", color=colour, markersize=4.5)
        axes.plot([], [], "o-", color=_COLOURS[index % len(_COLOURS)], label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("paired difference in Dice points, 95 % interval", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    if any(found):
        axes.legend(fontsize=7)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".png.part")
    # Without the date and version that would make each file another.
    figure.savefig(beside, format="png", dpi=110, metadata={"Software": None})
    os.replace(beside, path)
    return path
