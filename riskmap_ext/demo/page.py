"""The demo's table and page. Every sentence about results is derived from the numbers."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import monai
import torch
from rich.table import Table

import riskmap_ext
from riskmap_ext.finetune.base.files import write_text
from riskmap_ext.finetune.base.log import MISSING
from riskmap_ext.finetune.report.curves import Line, chart
from riskmap_ext.finetune.report.page import render

if TYPE_CHECKING:
    from riskmap_ext.demo.run import Arm, ArmResult, Settings, SourceResult

BASELINE = "ce_dice"


def terminal_table(
    sources: Sequence[SourceResult], arms: Sequence[ArmResult], kinds: Sequence[Arm]
) -> Table:
    """Structures by arms, as mean and spread over seeds."""
    header, rows = _cells(arms, kinds)
    table = Table(title=_caption(arms), caption=_leep_line(sources))
    for name in header:
        table.add_column(name, justify="left" if name == header[0] else "right")
    for row in rows:
        if row[0] == "mean":
            table.add_section()
        table.add_row(*row, style="bold" if row[0] == "mean" else None)
    return table


def write_page(
    path: Path,
    picture: Path,
    sources: Sequence[SourceResult],
    arms: Sequence[ArmResult],
    kinds: Sequence[Arm],
    settings: Settings,
    seconds: float,
) -> None:
    """Writes a self-contained page, with pictures and style."""
    header, rows = _cells(arms, kinds)
    seeds = len(_points(arms, BASELINE))
    lines = [Line(k.name, [*enumerate(_points(arms, k.key))], {"linestyle": ":"}) for k in kinds]
    content = render(
        "demo/page.html.j2",
        title="riskmap demo",
        findings=findings(sources, arms),
        chart=chart(
            lines, "Mean Dice of each seed", (0, 100), x_label="seed", x_range=(-0.5, seeds - 0.5)
        ),
        header=header,
        rows=rows,
        caption=_caption(arms),
        leep=_leep_line(sources),
        subjects=picture.read_bytes(),
        seeds=_seeds(seeds),
        chance=2 ** (seeds - 1),
        s=settings,
        versions=f"riskmap_ext {riskmap_ext.__version__}, torch {torch.__version__}, "
        f"MONAI {monai.__version__}, Python {platform.python_version()}",
        time=f"{seconds:.0f} s on a CPU with {os.cpu_count()} cores",
    )
    write_text(path, content)


def findings(sources: Sequence[SourceResult], arms: Sequence[ArmResult]) -> list[str]:
    """The results in sentences, built from this run's numbers alone."""
    prior = _gaps(arms, BASELINE, "random_ce_dice")
    risk, weights = _gaps(arms, "risk_dice"), _gaps(arms, "class_dice")
    control = _gaps(arms, "risk_dice", "class_dice")
    leep, entropy = fmean(s.leep for s in sources), fmean(s.label_entropy for s in sources)
    return [
        f"The class prior against a random head, both with CE + Dice: {_told(prior)}.",
        f"On top of the prior, risk + Dice against CE + Dice: {_told(risk)}.",
        f"On top of the prior, class weights + Dice against CE + Dice: {_told(weights)}. "
        f"{_added(risk, weights)}".rstrip(),
        f"Risk + Dice against class weights + Dice, which need no source's map: {_told(control)}. "
        f"{_reading(risk, control)}".rstrip(),
        f"The source network's LEEP score on the structures is {leep:.3f}; one that tells nothing "
        f"would score {-entropy:.3f}, a perfect one 0.",
        *(f"seed {s.seed}: {s.remark}" for s in sources if s.remark),
    ]


def _added(risk: Sequence[float], weights: Sequence[float]) -> str:
    """What the weighted arms add to the prior, if there is more than one seed."""
    if len(risk) == 1:
        return ""
    named = (("the map", risk), ("class weights", weights))
    adding = [name for name, gaps in named if _direction(gaps) > 0]
    if len(adding) == 2:
        return "In this run the map and class weights each add to what the prior gives."
    if adding:
        return f"In this run only {adding[0]} added to what the prior gives in every seed."
    return "In this run neither weighting is shown to add to what the prior gives."


def _reading(risk: Sequence[float], control: Sequence[float]) -> str:
    if len(control) == 1:
        return ""
    direction, gain = _direction(control), _direction(risk) > 0
    if direction == 0:
        return "In this run the map is not told apart from plain class weights."
    if direction > 0:
        but = "" if gain else ", but it is not shown to add to the prior"
        return f"In this run the map gave more than class weights do{but}."
    so = ", so the gain needs no map here" if gain else ""
    return f"In this run plain class weights gave more{so}."


def _told(gaps: Sequence[float]) -> str:
    """The gap and what the seeds support: a direction only if all of them agree."""
    verdict = {
        1: "higher in every seed",
        0: "neither is ahead in every seed, so neither is shown to be better",
        -1: "lower in every seed",
    }[_direction(gaps)]
    if len(gaps) == 1:
        verdict = "one seed alone shows no spread, so nothing follows from it"
    spread = _spread(gaps, "+.1f")
    return f"{spread} Dice points, ahead in {_ahead(gaps)} of {_seeds(len(gaps))} ({verdict})"


def _gaps(arms: Sequence[ArmResult], key: str, other: str = BASELINE) -> list[float]:
    """One arm minus another, seed by seed, in Dice points (0 to 100)."""
    return [a - b for a, b in zip(_points(arms, key), _points(arms, other), strict=True)]


def _direction(gaps: Sequence[float]) -> int:
    """1 or -1 if all seeds agree, else 0."""
    return (min(gaps) > 0) - (max(gaps) < 0)


def _ahead(gaps: Sequence[float]) -> int:
    return sum(gap > 0 for gap in gaps)


def _cells(arms: Sequence[ArmResult], kinds: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; Dice in percent, mean ± sample standard deviation."""
    rows = [
        [name, *(_spread([100 * a.dice[name] for a in arms if a.arm == k.key]) for k in kinds)]
        for name in arms[0].dice
    ]
    rows.append(["mean", *(_spread(_points(arms, k.key)) for k in kinds)])
    gaps = [None if k.key == BASELINE else _gaps(arms, k.key) for k in kinds]
    rows.append(["minus CE + Dice", *(_spread(g, "+.1f") if g else MISSING for g in gaps)])
    rows.append(["ahead in seeds", *(f"{_ahead(g)} of {len(g)}" if g else MISSING for g in gaps)])
    return ["structure", *(k.name for k in kinds)], rows


def _points(arms: Sequence[ArmResult], key: str) -> list[float]:
    """Mean Dice of each seed."""
    return [100 * a.mean_dice for a in sorted(arms, key=lambda a: a.seed) if a.arm == key]


def _spread(values: Sequence[float], digits: str = ".1f") -> str:
    spread = f" ± {stdev(values):{digits.lstrip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{digits}}{spread}"


def _seeds(count: int) -> str:
    return f"{count} {'seed' if count == 1 else 'seeds'}"


def _caption(arms: Sequence[ArmResult]) -> str:
    seeds = len(_points(arms, BASELINE))
    spread = f"mean ± sd over {seeds} seeds" if seeds > 1 else "one seed"
    return f"Dice in percent, {spread}; {len(arms[0].subjects)} test subjects each"


def _leep_line(sources: Sequence[SourceResult]) -> str:
    return f"LEEP score of the source network: {_spread([s.leep for s in sources], '.3f')}"
