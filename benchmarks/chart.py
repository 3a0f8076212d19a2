"""One picture of a run: ratios, and the sweeps over classes, voxels and threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import report, sweep
from benchmarks.results import Row


def draw(rows: list[Row], path: Path) -> Path:
    """Writes the picture as PNG, beside and then renamed."""
    bars = [
        each
        for each in report.ratios(rows)
        if each.row["dtype"] == "float32" and (each.best or each.monai or each.nnunet)
    ]
    figure = Figure(figsize=(13, 6 + 0.24 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1 + 0.24 * len(bars), 5])
    top, bottom = parts
    _ratios(top.subplots(), bars)
    left, middle, right = bottom.subplots(1, 3)
    _over_classes(left, rows)
    _over_voxels(middle, rows)
    _over_threads(right, rows)
    if rows:
        figure.suptitle(report.heading(rows[0]), fontsize=9)
    beside = path.with_suffix(".png.part")
    figure.savefig(beside, format="png", dpi=100)
    os.replace(beside, path)
    return path


def _ratios(axes: Axes, bars: list[report.Ratios]) -> None:
    axes.set_title("time of the peer / time of riskmap_ext, float32 (more is better)")
    names = ("best of eager and torch.compile", "MONAI DiceCELoss", "nnU-Net DC_and_CE_loss")
    drawn: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for row, each in enumerate(bars):
        values = [
            (name, value)
            for name, value in zip(names, (each.best, each.monai, each.nnunet), strict=True)
            if value
        ]
        height = 0.8 / len(values)
        for index, (name, value) in enumerate(values):
            drawn[name].append((row + (index - (len(values) - 1) / 2) * height, value, height))
    for name, rectangles in drawn.items():
        if rectangles:
            at, lengths, heights = zip(*rectangles, strict=True)
            container = axes.barh(at, lengths, height=heights, label=name)
            axes.bar_label(container, fmt="%.1f", fontsize=7, padding=2)
    axes.set_yticks(range(len(bars)), [each.label for each in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    if bars:
        axes.set_xscale("log")
        axes.legend(fontsize=8, loc="lower right")


def _over_classes(axes: Axes, rows: list[Row]) -> None:
    axes.set_title("no cliff over the number of classes", fontsize=10)
    _lines(axes, [row for row in rows if row["sweep"] == "classes"], "classes", ("work",))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("classes (8 million logits)")
    axes.set_ylabel("ns a logit")


def _over_voxels(axes: Axes, rows: list[Row]) -> None:
    chosen = [row for row in rows if row["sweep"] == "voxels" and row["work"] in sweep.ALWAYS]
    axes.set_title("over the number of voxels", fontsize=10)
    _lines(axes, chosen, "voxels", ("work", "classes"))
    if chosen:
        axes.set_yscale("log")
    axes.set_xlabel("voxels")
    axes.set_ylabel("ns a logit")


def _over_threads(axes: Axes, rows: list[Row]) -> None:
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["sweep"] == "threads":
            name = f"{row['work']}, C={row['classes']}"
            times.setdefault(name, {})[int(row["threads"])] = float(row["median_ms"])
    for name, each in times.items():
        counts = sorted(each)
        axes.plot(counts, [each[counts[0]] / each[n] for n in counts], marker="o", label=name)
    counts = sorted({count for each in times.values() for count in each})
    axes.plot(counts, counts, color="grey", linestyle="--", label="ideal")
    axes.set_title("over threads", fontsize=10)
    axes.set_xlabel("threads")
    axes.set_ylabel("speed-up")
    axes.set_xticks(counts)
    axes.legend(fontsize=6)


def _lines(axes: Axes, rows: list[Row], over: str, by: tuple[str, ...]) -> None:
    """Time per logit over a column, one line for each value of the columns ``by``."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = ", C=".join(row[column] for column in by)
        lines.setdefault(name, []).append((int(row[over]), report.ns_per_logit(row)))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker=".", linewidth=1, label=name)
    if lines:
        axes.set_xscale("log")
        axes.legend(fontsize=7)
