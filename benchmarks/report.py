"""Rows of results as a table of ratios, and ``python -m benchmarks.report CSV``: into README.md."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.problem import COMPILE, EAGER, MONAI, NNUNET, OURS, RECOMPUTE
from benchmarks.results import CAPABILITY_SWEEP, Row

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


class Ratios(NamedTuple):
    """One contender of ours against its peers; ratios are theirs / ours, None without a peer."""

    row: Row
    best: float | None
    best_name: str
    monai: float | None
    nnunet: float | None

    @property
    def label(self) -> str:
        shape = f"{self.row['shape']} C={self.row['classes']} {spatial(self.row)}"
        _, _, path = self.row["contender"].partition(", ")
        return f"{self.row['work']}{f' ({path})' if path else ''}, {shape}"


class Limit(NamedTuple):
    """What is to be reached: ratios at least, bytes at most."""

    op: str
    work: str
    shape: str
    best: float
    monai: float | None = None
    nnunet: float | None = None
    bytes_per_voxel: float | None = None
    bytes: int | None = None


LIMITS = (
    Limit("weighted_loss", "weighted CE", "a", 4, bytes_per_voxel=4),
    Limit("weighted_loss", "weighted CE", "b", 4, 8, 8, bytes_per_voxel=4),
    Limit("weighted_loss", "weighted CE", "d", 4, 8, 8, bytes_per_voxel=4),
    Limit("weighted_loss", "weighted CE + Dice", "e", 3, 6, 6, bytes_per_voxel=8),
    Limit("leep_statistics", "LEEP statistics", "a", 5, bytes=1 << 20),
    Limit("leep_statistics", "LEEP statistics", "b", 5, bytes=1 << 20),
    Limit("risk_map", "risk map", "a", 5, bytes_per_voxel=4),
    Limit("risk_map", "risk map", "b", 5, bytes_per_voxel=4),
    Limit("risk_map", "risk map", "c", 5, bytes_per_voxel=4),
)
BOUND = 1.5  # aim for the time over the bound
MEMORY_NOISE = 0.3 * 2**20  # of the high-water mark


def spatial(row: Row) -> str:
    sides = row["spatial"].split("x")
    power = {2: "²", 3: "³"}.get(len(sides), "")
    extent = f"{sides[0]}{power}" if len(set(sides)) == 1 else "x".join(sides)
    return extent if row["batch"] == "1" else f"{row['batch']}x{extent}"


def ratios(rows: list[Row]) -> list[Ratios]:
    """One for every row of ours that is no part of a sweep, in the order of the rows."""
    rows = [row for row in rows if not row["sweep"]]
    found = []
    for row in rows:
        if not row["contender"].startswith(OURS):
            continue
        same = [r for r in rows if _key(r) == _key(row) and r is not row]
        plain = [r for r in same if r["contender"].startswith((EAGER, COMPILE))]
        best = min(plain, key=_ms, default=None)
        found.append(
            Ratios(
                row,
                _ms(best) / _ms(row) if best else None,
                best["contender"] if best else "",
                _ratio(same, MONAI, row),
                _ratio(same, NNUNET, row),
            )
        )
    return found


def heading(common: Row) -> str:
    versions = ", ".join(
        f"{name} {common[name] or 'missing'}"
        for name in ("riskmap_ext", "torch", "monai", "nnunetv2")
    )
    return (
        f"{common['date']}: {common['cpu']}, {common['cores']} cores, "
        f"{common['instruction_set']}, {common['threads']} threads, load {common['load']}\n"
        f"{versions}; {common['kind']} run; times without the warm-up of torch.compile"
    )


def table(rows: list[Row]) -> str:
    """Ratios, and what the sweeps say, for a terminal."""
    lines = [
        (
            *("work", "ms", "vs best of eager, compile", "(which)", "vs MONAI", "vs nnU-Net"),
            *("time/bound", "GB/s", "extra B/voxel"),
        )
    ]
    for each in ratios(rows):
        row = each.row
        lines.append(
            (
                each.label,
                f"{_ms(row):.2f}",
                _times(each.best),
                each.best_name,
                _times(each.monai),
                _times(each.nnunet),
                f"{float(row['time_over_bound']):.2f}",
                f"{float(row['gb_per_s']):.1f}",
                row["extra_bytes_per_voxel"],
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if index in (0, 3) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join(["", *text, "", *remarks(rows)])


def remarks(rows: list[Row]) -> Iterator[str]:
    """One line for each further limit: bf16, sweeps, instruction sets."""
    ours = {(_key(each.row), each.row["contender"]): _ms(each.row) for each in ratios(rows)}
    for (key, name), ms in ours.items():
        fp32 = ours.get(((key[0], key[1].removesuffix(", bf16"), key[2]), name))
        if key[1].endswith(", bf16") and fp32 is not None:
            work = key[1].removesuffix(", bf16")
            yield f"bf16 / fp32 time, {work} {key[2]} ({name}): {ms / fp32:.2f}"
    yield from _sweep_remarks(rows)
    timed = {
        (_key(r), r["contender"], r["instruction_set"]): _ms(r)
        for r in rows
        if r["sweep"] == CAPABILITY_SWEEP
    }
    for (key, name, capability), ms in timed.items():
        best = timed.get((key, name, "avx512"))
        if capability == "avx2" and best is not None:
            yield f"avx2 / avx512 time, {key[1]} {key[2]} ({name}): {ms / best:.2f}"


def _sweep_remarks(rows: list[Row]) -> Iterator[str]:
    classes: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["sweep"] == "classes":
            classes.setdefault(row["work"], []).append((int(row["classes"]), ns_per_logit(row)))
    for work, points in classes.items():
        points.sort()
        low, high = min(p[1] for p in points), max(p[1] for p in points)
        step, at = max(
            ((b[1] / a[1], b[0]) for a, b in itertools.pairwise(points)),
            default=(1.0, 0),
        )
        yield (
            f"{work}, {points[0][0]} to {points[-1][0]} classes: {low:.2f} to {high:.2f} ns a "
            f"logit; largest rise between neighbours {step:.2f}x (at {at} classes)"
        )
    threads: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["sweep"] == "threads":
            threads.setdefault((row["work"], row["shape"]), {})[int(row["threads"])] = _ms(row)
    for (work, shape), times in threads.items():
        for count, ms in times.items():
            if count > 1 and 1 in times:
                yield f"{work} {shape}: {count} threads are {times[1] / ms:.2f}x as fast as one"


def markdown(rows: list[Row], csv: Path) -> str:
    """The table of limits, the remarks and the chart."""
    lines = [
        heading(rows[0]).replace("\n", "; ") + ".",
        "",
        "| work | vs best of eager and torch.compile | vs MONAI DiceCELoss | vs nnU-Net "
        "DC_and_CE_loss | extra memory | time / bound (aim < 1.5) | recompute path vs best |",
        "|---|---|---|---|---|---|---|",
    ]
    every = ratios(rows)
    for limit in LIMITS:
        lines.append(_limit_line(limit, every))
    lines += ["", "All rows:", "", "```text", table(rows).strip(), "```", ""]
    picture = os.path.relpath(csv.with_suffix(".png"), README.parent)
    lines.append(f"![ratios and sweeps]({picture})")
    return "\n".join(lines)


def _limit_line(limit: Limit, every: list[Ratios]) -> str:
    def pick(work: str, contender: str = OURS) -> Ratios | None:
        wanted = (limit.op, work, limit.shape)
        return next(
            (e for e in every if _key(e.row) == wanted and e.row["contender"] == contender), None
        )

    ours = pick(limit.work)
    if ours is None:
        return f"| {limit.work}, {limit.shape} | not measured | | | | | |"
    row = ours.row
    dice, recompute = pick("CE + Dice"), pick(limit.work, RECOMPUTE)
    over = float(row["time_over_bound"])
    cells = [
        f"{limit.work}, C={row['classes']}, {spatial(row)}",
        _judged(ours.best, limit.best),
        _judged(dice.monai, limit.monai) if limit.monai and dice else "",
        _judged(dice.nnunet, limit.nnunet) if limit.nnunet and dice else "",
        _judged_memory(row, limit),
        f"{over:.2f}{'' if over < BOUND else ' ✗'}",
        _times(recompute.best) if recompute else "",
    ]
    return f"| {' | '.join(cells)} |"


def _judged(found: float | None, least: float) -> str:
    if found is None:
        return "no peer"
    return f"{found:.1f}x (≥ {least:g}) {'✓' if found >= least else '✗'}"


def _judged_memory(row: Row, limit: Limit) -> str:
    if not row["extra_bytes"]:
        return "not measured"
    extra, voxels = int(row["extra_bytes"]), int(row["voxels"])
    if limit.bytes is not None:
        kept = extra <= limit.bytes
        return f"{extra / 2**20:.2f} MiB (≤ {limit.bytes / 2**20:g} MiB) {'✓' if kept else '✗'}"
    assert limit.bytes_per_voxel is not None
    kept = extra <= limit.bytes_per_voxel * voxels + MEMORY_NOISE
    return f"{extra / voxels:.2f} B/voxel (≤ {limit.bytes_per_voxel:g}) {'✓' if kept else '✗'}"


def ns_per_logit(row: Row) -> float:
    return _ms(row) * 1e6 / (int(row["voxels"]) * int(row["classes"]))


def _key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["work"], row["shape"]


def _ms(row: Row) -> float:
    return float(row["median_ms"])


def _ratio(rows: list[Row], contender: str, ours: Row) -> float | None:
    return next((_ms(r) / _ms(ours) for r in rows if r["contender"] == contender), None)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m benchmarks.report benchmarks/results/<machine>-<kind>.csv")
        return 2
    csv = Path(arguments[0])
    text = README.read_text()
    before, marked, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (marked and closed):
        raise ValueError(f"{README}: expected the markers {BEGIN} and {END}")
    new = f"{before}{BEGIN}\n{markdown(results.read(csv), csv.resolve())}\n{END}{after}"
    beside = README.with_suffix(".md.part")
    beside.write_text(new)
    os.replace(beside, README)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
