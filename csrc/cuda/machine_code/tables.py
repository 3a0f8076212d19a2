"""budgets.json: what has grown, and a Markdown table of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
GROWTH = 1.02
BUDGETS = [
    *("instructions", "fixed", "tail", "loads", "loads_sectors", "stores", "stores_sectors"),
    *("shared_loads_passes", "shared_stores_passes", "local"),
]
LEAST = {"fixed": 8.0, "tail": 8.0}  # warp instructions more are no growth yet; else a hundredth


def numbers(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a kernel that have a budget; of loads and stores, all widths together."""
    for name in BUDGETS:
        value = row.get(name, 0.0)
        yield name, float(sum(value.values()) if isinstance(value, dict) else value)


def grown(now: float, before: float, least: float = 0.01) -> bool:
    return now > before * GROWTH and now > before + least


def compare(found: Row, table: Row, partial: bool) -> tuple[list[str], list[str]]:
    """Errors, and differences worth a look."""
    errors, notes = list[str](), list[str]()
    known = set(found) & set(table)
    errors += [f"{name}: not in the table; run with --write" for name in found if name not in table]
    if not partial:
        errors += [f"{name}: in the table alone" for name in table if name not in found]
    for call in (name for name in found if name in known):
        now, before = found[call], table[call]
        for what in ("launches", "allocations"):
            if now[what] != before[what]:
                text = f"{call}: {now[what]} {what}, in the table {before[what]}"
                (errors if now[what] > before[what] else notes).append(text)
        kernels, others = now["kernels"], before["kernels"]
        for name in kernels:
            if name not in others:
                errors.append(f"{call}: {name} is not in the table; run with --write")
                continue
            limits = dict(numbers(others[name]))
            for what, value in numbers(kernels[name]):
                if grown(value, limits[what], LEAST.get(what, 0.01)):
                    errors.append(f"{call}: {name}: {what} {value:g}, {limits[what]:g} before")
            registers = kernels[name]["registers"], others[name]["registers"]
            if registers[0] != registers[1]:
                notes.append(f"{call}: {name}: {registers[0]} registers, {registers[1]} before")
        if now["microseconds"] < before["microseconds"] / GROWTH:
            notes.append(
                f"{call}: predicted {now['microseconds']} us, {before['microseconds']} before"
            )
    return errors, notes


def markdown(found: Row) -> str:
    """A table of kernels, and one of calls."""
    head = ["call", "kernel", "blocks", "registers", "instructions of a voxel", "fixed of a block"]
    head += ["tail", "loads of a voxel", "stores", "passes", "local", "bytes", "us"]
    rows = [head, ["---"] * len(head)]
    for call, row in found.items():
        for k, (name, kernel) in enumerate(row["kernels"].items()):
            passes = [kernel.get(f"shared_{way}_passes") for way in ("loads", "stores")]
            rows.append(
                [
                    call if k == 0 else "",
                    f"`{name}`",
                    str(kernel["blocks"]),
                    str(kernel["registers"]),
                    f"{kernel['instructions']:g}",
                    f"{kernel['fixed']:g} ({kernel['fixed_share']:.0%})",
                    f"{kernel['tail']:g}",
                    requests(kernel, "loads"),
                    requests(kernel, "stores"),
                    "; ".join("" if value is None else f"{value:.2f}" for value in passes),
                    f"{kernel.get('local', '')}",
                    f"{kernel['bytes']:g}",
                    f"{kernel['microseconds']:g}",
                ]
            )
    text = lines(rows)
    head = ["call", "launches", "allocations", "predicted", "of the copy bandwidth"]
    rows = [head, ["---"] * len(head)]
    for call, row in found.items():
        share = f"{row['share_of_copy']:.0%}"
        time = f"{row['microseconds']:g} us"
        rows.append([call, str(row["launches"]), str(row["allocations"]), time, share])
    return f"{text}\n\n{lines(rows)}"


def requests(kernel: Row, way: str) -> str:
    """By width, then how many times the sectors of full warps that read on without gaps."""
    if way not in kernel:
        return ""
    widths = " + ".join(f"{count:g} of {width} B" for width, count in kernel[way].items())
    return f"{widths}: {kernel[way + '_sectors']:.2f} x"


def lines(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
