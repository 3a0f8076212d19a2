"""The rows of ``benchmarks.gpu``: how they are written and read, and the table of them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from benchmarks.problem import COMPILE, EAGER, OURS

CE, CE_DICE, LEEP, RISK = "weighted CE", "weighted CE + Dice", "LEEP statistics", "risk map"
HEAD_CE, HEAD_CE_DICE = f"head + {CE}", f"head + {CE_DICE}"

FIELDS = (
    *("work", "contender", "shape", "classes", "batch", "spatial", "voxels", "dtype"),
    *("median_ms", "q25_ms", "q75_ms", "rounds", "wall_ms", "times_ours", "least_bytes", "copy_ms"),
    *("share", "extra_bytes", "error", "note", "large_copy_gb_per_s", "date", "device", "driver"),
    *("torch", "cuda", "python", "riskmap_ext"),
)
HEAD: tuple[str, ...] = (
    *("work", "shape", "dtype", "ours ms", "of copy", "compiled", "eager", "extra MB", "compiled"),
)
NOTES = 20  # at most, below the table
Row = dict[str, str]


def begin(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.DictWriter(file, FIELDS, lineterminator="\n").writeheader()


def append(rows: list[Row], path: Path) -> None:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, FIELDS, lineterminator="\n").writerows(rows)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[Row]) -> str:
    """A line for each problem; of several ways to write a formula the fastest counts."""
    keys = dict.fromkeys((row["work"], _shape(row), row["dtype"]) for row in rows)
    order = (CE, CE_DICE, HEAD_CE, HEAD_CE_DICE, LEEP, RISK)
    lines = [HEAD]
    for key in sorted(keys, key=lambda key: order.index(key[0])):
        lines.append(_cells([r for r in rows if (r["work"], _shape(r), r["dtype"]) == key]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    text.append(
        "of copy: least bytes over time, as a share of a copy's; compiled, eager: their time over "
        "ours;\nextra MB: peak beyond inputs and results, of ours and of torch.compile"
    )
    notes = [
        f"{row['work']}, {_shape(row)}, {row['dtype']}, {row['contender']}: {row['note']}"
        for row in rows
        if row["note"]
    ]
    more = [f"{len(notes) - NOTES} more such notes"] if len(notes) > NOTES else []
    return "\n".join(text + notes[:NOTES] + more)


def line(rows: list[Row]) -> str:
    """What is printed as it comes."""
    titles = ("", "", "", "ms", "of copy", "x compiled", "x eager", "MB", "MB compiled")
    cells = _cells(rows)
    return ", ".join(
        f"{cell} {title}".strip() for cell, title in zip(cells, titles, strict=True)
    ) + "".join(f"; {row['contender']}: {row['note']}" for row in rows if row["note"])


def _cells(rows: list[Row]) -> tuple[str, ...]:
    ours = _best(rows, lambda name: name == OURS, "median_ms")
    compiled = _best(rows, lambda name: name.startswith(COMPILE), "times_ours")
    eager = _best(rows, lambda name: name.startswith(EAGER), "times_ours")
    return (
        rows[0]["work"],
        _shape(rows[0]),
        rows[0]["dtype"],
        f"{float(ours['median_ms']):.3f}" if ours else "-",
        f"{float(ours['share']):.0%}" if ours else "-",
        f"{float(compiled['times_ours']):.2f}" if compiled else "-",
        f"{float(eager['times_ours']):.2f}" if eager else "-",
        _megabytes(ours),
        _megabytes(compiled),
    )


def _shape(row: Row) -> str:
    return f"{row['shape']}: {row['batch']}x{row['classes']}x{row['spatial']}"


def _best(rows: list[Row], wanted: Callable[[str], bool], by: str) -> Row | None:
    """Wrong results do not count."""
    timed = [r for r in rows if wanted(r["contender"]) and r[by] and not r["note"]]
    return min(timed, key=lambda row: float(row[by]), default=None)


def _megabytes(row: Row | None) -> str:
    return f"{int(row['extra_bytes']) / 1e6:.1f}" if row and row["extra_bytes"] else "-"
