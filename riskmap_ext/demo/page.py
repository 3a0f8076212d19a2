"""What the demo tells: the table and the page. Every sentence on results follows the numbers."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import monai
import numpy as np
import torch
from rich.table import Table

import riskmap_ext
from riskmap_ext.finetune.base.files import write_text
from riskmap_ext.finetune.base.log import MISSING
from riskmap_ext.finetune.pictures.figures import class_colours
from riskmap_ext.finetune.report import page

if TYPE_CHECKING:
    from riskmap_ext.demo.run import Arm, ArmResult, Settings, SourceResult

BASELINE = "ce_dice"


@dataclass(frozen=True)
class Difference:
    """One arm minus another, paired by seed, in Dice points (0 to 100)."""

    mean: float
    sd: float
    ahead: int
    seeds: int

    @property
    def verdict(self) -> str:
        """What the seeds allow to say: a direction only where all of them agree."""
        if self.seeds == 1:
            return "one seed alone shows no spread, so nothing follows from it"
        if self.ahead == self.seeds:
            return "higher in every seed"
        if self.ahead == 0:
            return "lower or equal in every seed"
        return "the seeds disagree, so neither is shown to be better"


def difference(arms: Sequence[ArmResult], key: str, other: str) -> Difference:
    """Mean and sample standard deviation over seeds of mean Dice, `key` minus `other`."""
    means = {(a.seed, a.arm): 100 * a.mean_dice for a in arms}
    seeds = sorted({a.seed for a in arms})
    gaps = np.array([means[seed, key] - means[seed, other] for seed in seeds])
    return Difference(float(gaps.mean()), _sd(gaps), int((gaps > 0).sum()), len(seeds))


def terminal_table(
    sources: Sequence[SourceResult], arms: Sequence[ArmResult], kinds: Sequence[Arm]
) -> Table:
    """Structures by arms, as mean and spread over seeds."""
    header, rows = _cells(arms, kinds)
    table = Table(title=_caption(arms), caption=_leep_line(sources))
    table.add_column(header[0], justify="left")
    for name in header[1:]:
        table.add_column(name, justify="right")
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
    """Writes a page that needs no other file: picture and style are in it."""
    header, rows = _cells(arms, kinds)
    listed = "\n".join(f"<li>{escape(text)}</li>" for text in findings(sources, arms))
    limits = "\n".join(f"<li>{page.marked(text)}</li>" for text in _limits(settings, arms))
    subjects = page.picture(
        picture.read_bytes(),
        "Test subjects: image, labels, risk map and the prediction of each arm",
    )
    parts = [
        "<h1>Fine-tuning with a transfer risk map</h1>",
        f"<p>{escape(_problem(settings))}</p>",
        page.section("What this run found", f"<ul>\n{listed}\n</ul>"),
        page.section("Mean Dice of each seed", _dots(arms, kinds) + page.note(_DOTS_NOTE)),
        page.section(
            "All structures",
            page.table(header, rows, bold=["mean"])
            + page.note(
                f"{_caption(arms)}. The last two rows compare with CE + Dice, seed by seed. "
                f"{_leep_line(sources)}."
            ),
        ),
        page.section(
            "Test subjects",
            f"<div class='scroll' tabindex='0'><figure>{subjects}</figure></div>\n{_PICTURE_NOTE}",
        ),
        page.section("What it does not show", f"<ul>\n{limits}\n</ul>"),
        page.section("Settings", page.facts(_facts(settings, seconds))),
    ]
    write_text(path, page.page("riskmap demo", "\n".join(parts), _STYLE))


def findings(sources: Sequence[SourceResult], arms: Sequence[ArmResult]) -> list[str]:
    """The results in sentences, built from this run's numbers alone."""
    risk = difference(arms, "risk_dice", BASELINE)
    control = difference(arms, "risk_dice", "class_dice")
    dice = difference(arms, BASELINE, "ce")
    sentences = [
        f"Weighting by transfer risk against CE + Dice: {_gap(risk)}.",
        f"The same against class weights + Dice (square root of inverse class frequency, no source "
        f"model involved): {_gap(control)}. " + _control_reading(risk, control),
        f"CE + Dice against CE alone: {_gap(dice)}.",
    ]
    leep = np.array([s.leep for s in sources])
    entropy = np.array([s.label_entropy for s in sources])
    sentences.append(
        f"The source network's LEEP score on the structures is {leep.mean():.3f}; one that tells "
        f"nothing would score {-entropy.mean():.3f}, a perfect one 0."
    )
    remarks = [f"seed {s.seed}: {s.remark}" for s in sources if s.remark]
    return sentences + remarks


def _control_reading(risk: Difference, control: Difference) -> str:
    if control.seeds == 1:
        return ""
    if control.ahead == control.seeds:
        return "In this run the map gave more than class weights do."
    if control.ahead == 0:
        return (
            "In this run plain class weights did as well or better, so the gain from weighting "
            "needs no map here."
            if risk.ahead == risk.seeds
            else "In this run plain class weights did as well or better."
        )
    return "In this run the map is not told apart from plain class weights."


def _gap(gap: Difference) -> str:
    spread = "" if math.isnan(gap.sd) else f" ± {gap.sd:.1f}"
    return (
        f"{gap.mean:+.1f}{spread} Dice points, ahead in {gap.ahead} of {gap.seeds} "
        f"{'seed' if gap.seeds == 1 else 'seeds'} ({gap.verdict})"
    )


def _cells(arms: Sequence[ArmResult], kinds: Sequence[Arm]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; Dice in percent, mean ± sample standard deviation."""
    rows = []
    for name in arms[0].dice:
        rows.append([name, *(_spread([100 * a.dice[name] for a in _of(arms, k)]) for k in kinds)])
    rows.append(["mean", *(_spread([100 * a.mean_dice for a in _of(arms, k)]) for k in kinds)])
    gaps = [None if k.key == BASELINE else difference(arms, k.key, BASELINE) for k in kinds]
    rows.append(
        ["minus CE + Dice", *(MISSING if g is None else _signed(g.mean, g.sd) for g in gaps)]
    )
    rows.append(
        ["ahead in seeds", *(MISSING if g is None else f"{g.ahead} of {g.seeds}" for g in gaps)]
    )
    return ["structure", *(k.name for k in kinds)], rows


def _of(arms: Sequence[ArmResult], kind: Arm) -> list[ArmResult]:
    return [a for a in arms if a.arm == kind.key]


def _sd(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if values.size > 1 else math.nan


def _spread(values: Sequence[float]) -> str:
    array = np.array(values)
    sd = _sd(array)
    return f"{array.mean():.1f}" if math.isnan(sd) else f"{array.mean():.1f} ± {sd:.1f}"


def _signed(mean: float, sd: float) -> str:
    return f"{mean:+.1f}" if math.isnan(sd) else f"{mean:+.1f} ± {sd:.1f}"


def _caption(arms: Sequence[ArmResult]) -> str:
    seeds = len({a.seed for a in arms})
    subjects = len(arms[0].subjects)
    spread = f"mean ± sd over {seeds} seeds" if seeds > 1 else "one seed"
    return f"Dice in percent, {spread}; {subjects} test subjects each"


def _leep_line(sources: Sequence[SourceResult]) -> str:
    return "LEEP score of the source network: " + _spread_of_leep(sources)


def _spread_of_leep(sources: Sequence[SourceResult]) -> str:
    values = np.array([s.leep for s in sources])
    sd = _sd(values)
    return f"{values.mean():.3f}" if math.isnan(sd) else f"{values.mean():.3f} ± {sd:.3f}"


def _problem(s: Settings) -> str:
    return (
        f"A small network that segments tissues (CSF, grey and white matter) on simulated T1 "
        f"brains is fine-tuned to find five deep structures with only {s.labelled_subjects} "
        f"labelled subjects and {s.steps} steps. Four losses are compared. Within a seed "
        "they share subjects, initial weights, crops and their order."
    )


def _limits(s: Settings, arms: Sequence[ArmResult]) -> list[str]:
    seeds = len({a.seed for a in arms})
    return [
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}: small differences between arms are within "
        "the noise. The spread is over seeds, which differ in subjects, source network, initial "
        "head and crops.",
        "Simulated brains with ellipsoid structures are easier and more alike than real ones. "
        "Nothing here says how a method does on patients.",
        f"Training length matters. This run has {s.steps} steps; with three times the standard 300 "
        "most of the gap between weighted losses and CE + Dice was gone (`riskmap demo --steps "
        "900`).",
        "In larger comparisons (docs/evidence.md) the class part of the map (rare structures get "
        "large weights) explains nearly all of its gain. That is why class weights + Dice is an "
        "arm here.",
        f"All arms use one learning rate ({s.lr:g}); a study would tune it for each.",
    ]


def _facts(s: Settings, seconds: float) -> list[tuple[str, str]]:
    return [
        ("subjects per seed", f"{s.source_subjects} to train the source, {s.labelled_subjects} "
         f"labelled targets, {s.test_subjects} test"),
        ("images", f"{s.resolution:g} mm, z from {s.extent[0]:g} to {s.extent[1]:g} mm, from the "
         "MNI152 templates (T1, grey and white matter): random deformation, tissue intensities, "
         "bias field, noise"),
        ("network", f"MONAI UNet, 2-D, channels {', '.join(map(str, s.channels))}"),
        ("training", f"source {s.source_steps} steps, fine-tuning {s.steps} steps; batch "
         f"{s.batch_size} of {s.patch_size}² crops, "
         f"{s.foreground_crops:.0%} centred on a structure; AdamW {s.lr:g}, polynomial decay"),
        ("risk map", "exponential, base 10, range over the training set"),
        ("versions", f"riskmap_ext {riskmap_ext.__version__}, torch {torch.__version__}, "
         f"MONAI {monai.__version__}, Python {platform.python_version()}"),
        ("time", f"{seconds:.0f} s on a CPU with {os.cpu_count()} cores"),
    ]  # fmt: skip


def _dots(arms: Sequence[ArmResult], kinds: Sequence[Arm]) -> str:
    """A row per arm with a dot per seed on a scale from 0 to 100 Dice points."""
    colours = class_colours(len(kinds) + 1)[1:]
    rows = []
    for kind, rgb in zip(kinds, colours, strict=True):
        values = [100 * a.mean_dice for a in _of(arms, kind)]
        shade = "#" + "".join(f"{round(255 * c):02x}" for c in rgb)
        dots = "".join(f"<i style='left:{v:.1f}%;background:{shade}'></i>" for v in values)
        mean = float(np.mean(values))
        rows.append(
            f"<div class='arm'><span>{escape(kind.name)}</span>"
            f"<div class='track'><b style='left:{mean:.1f}%'></b>{dots}</div>"
            f"<em>{mean:.1f}</em></div>"
        )
    return "\n".join(rows)


_DOTS_NOTE = "A dot is a seed, the line is the mean; the scale goes from 0 to 100."
_PICTURE_NOTE = """<p class="note">The risk map is the weight of each voxel in the loss, drawn here
with the test labels; the networks never saw it for these subjects. <span class="swipe">Swipe the
picture sideways to see all arms.</span></p>"""

_STYLE = """
.swipe { display: none; }
.arm { display: grid; grid-template-columns: 11rem 1fr 3rem; align-items: center; gap: .6rem;
  margin: .15rem 0; }
.track { position: relative; height: 1.5rem; background:
  repeating-linear-gradient(to right, var(--line) 0 1px, transparent 1px 25%), var(--wash);
  border-right: 1px solid var(--line); }
.track i { position: absolute; top: 50%; width: .8rem; height: .8rem; margin: -.4rem;
  border-radius: 50%; border: 1px solid var(--ink); opacity: .9; }
.track b { position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px;
  background: var(--ink); }
.arm em { font-style: normal; text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 58rem) {
  .swipe { display: inline; }
  figure img { min-width: 54rem; }
}
@media (max-width: 40rem) {
  .arm { grid-template-columns: 1fr 3rem; gap: 0 .6rem; margin-bottom: .5rem; }
  .arm span { grid-column: 1 / -1; }
}
"""
