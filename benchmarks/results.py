"""Rows of results: what they hold, and how they are read and written."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.problem import Contender, Problem
from benchmarks.sweep import Point
from benchmarks.timing import Measured, Timing

Row = dict[str, str]

FIELDS = (
    *("kind", "sweep", "case", "op", "work", "contender", "shape", "batch", "spatial", "classes"),
    *("voxels", "dtype", "threads", "rounds", "median_ms", "q25_ms", "q75_ms", "moved_bytes"),
    *("gb_per_s", "copy_gb_per_s", "bound_ms", "time_over_bound", "extra_bytes"),
    *("extra_bytes_per_voxel", "instruction_set", "date", "cpu", "cores", "load", "python"),
    *("torch", "monai", "nnunetv2", "riskmap_ext"),
)

CAPABILITY_SWEEP = "instruction set"


def problem_rows(case: str, problem: Problem, measured: Measured, common: Row) -> list[Row]:
    rows = []
    for each in problem.contenders:
        row = timing_row(case, problem, each, measured.contenders[each.key], common)
        median = measured.contenders[each.key].median
        bound = each.moved_bytes / measured.copy_bytes_per_second
        row["copy_gb_per_s"] = f"{measured.copy_bytes_per_second / 1e9:.2f}"
        row["bound_ms"] = f"{bound * 1e3:.4f}"
        row["time_over_bound"] = f"{median / bound:.3f}"
        rows.append(row)
    return rows


def add_memory(rows: list[Row], extra: dict[str, dict[str, int | None]]) -> None:
    """Fills in the bytes by case and "work | contender"."""
    for row in rows:
        peak = extra[row["case"]].get(f"{row['work']} | {row['contender']}")
        if peak is not None:
            row["extra_bytes"] = str(peak)
            row["extra_bytes_per_voxel"] = f"{peak / int(row['voxels']):.2f}"


def timing_row(
    case: str, problem: Problem, contender: Contender, timing: Timing, common: Row
) -> Row:
    shape = problem.shape
    return {
        **dict.fromkeys(FIELDS, ""),
        **common,
        "case": case,
        "op": problem.op,
        "work": contender.work,
        "contender": contender.name,
        "shape": shape.key,
        "batch": str(shape.batch),
        "spatial": "x".join(map(str, shape.spatial)),
        "classes": str(shape.classes),
        "voxels": str(shape.voxels),
        "dtype": str(contender.dtype).removeprefix("torch."),
        "moved_bytes": str(contender.moved_bytes),
        "gb_per_s": f"{contender.moved_bytes / timing.median / 1e9:.2f}",
        **_times(timing),
    }


def point_row(point: Point, common: Row) -> Row:
    return {
        **dict.fromkeys(FIELDS, ""),
        **common,
        "sweep": point.sweep,
        "work": point.work,
        "contender": "riskmap_ext",
        "shape": point.shape.key,
        "batch": str(point.shape.batch),
        "spatial": "x".join(map(str, point.shape.spatial)),
        "classes": str(point.shape.classes),
        "voxels": str(point.shape.voxels),
        "dtype": "float32",
        **_times(point.timing),
        "threads": str(point.threads),
    }


def _times(timing: Timing) -> Row:
    return {
        "rounds": str(timing.rounds),
        "median_ms": f"{timing.median * 1e3:.4f}",
        "q25_ms": f"{timing.low * 1e3:.4f}",
        "q75_ms": f"{timing.high * 1e3:.4f}",
    }


def write(rows: Iterable[Row], path: Path, fields: Sequence[str] = FIELDS) -> None:
    """Written beside and then renamed: an interrupted run leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or set(FIELDS) - set(rows[0]):
        raise ValueError(f"{path}: expected rows with the columns of benchmarks.results.FIELDS")
    return rows
