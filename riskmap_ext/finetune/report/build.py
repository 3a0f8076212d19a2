"""The report of a run as a page: what its files say, and what is missing from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex

from riskmap_ext.finetune.base.log import MISSING, gib, number
from riskmap_ext.finetune.metrics.dice import mean_without_nan
from riskmap_ext.finetune.metrics.surfaces import EXTRA, FOUND, MISSED, Score
from riskmap_ext.finetune.pictures.figures import ERROR_COLOURS, RISK
from riskmap_ext.finetune.pictures.slices import class_colours
from riskmap_ext.finetune.report.cases import TOLERANCE, CaseResults
from riskmap_ext.finetune.report.curves import run_charts, thinned
from riskmap_ext.finetune.report.page import duration, render
from riskmap_ext.finetune.report.read import Leep, RunFiles

# Further lists are folded up.
_OPEN_ROWS = 12
# Larger tables would make the file large.
_MOST_CELLS = 12000
# Further source classes are counted.
_MOST_COLUMNS = 30
_NAMES = {"train_loss": "loss", "mean_dice": "mean Dice", "lr": "learning rate"}
_ERRORS = {"missed": "missed (label alone)", "extra": "extra (prediction alone)"}


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    open: bool = True


def run_page(run: RunFiles, results: CaseResults, reports: Mapping[str, str] | None = None) -> str:
    """reports: of the folds, by their names, as links."""
    name = run.folder.resolve().name
    missed = [f"{s.structure} in {s.case}" for s in results.scores if s.outcome == MISSED]
    return render(
        "finetune/report/run.html.j2",
        title=f"riskmap: {name}",
        name=name,
        run=run,
        results=results,
        charts=run_charts(run.losses, run.metrics),
        validations=_validations(run.metrics),
        classes=_classes(run, results.scores),
        missed=missed,
        tolerance=f"{TOLERANCE:g}",
        legend=_legend(run, results),
        tables=_case_tables(run, results.scores),
        folds=_folds(run, reports or {}) if run.folds else None,
        conditional=_conditional(run.leep) if run.leep else None,
        starts=_starts(run.starts),
    )


def _folds(run: RunFiles, reports: Mapping[str, str]) -> Table:
    """Means over the cases of each fold, and of all."""
    rows = []
    for name, fold in (*run.folds.items(), ("all cases", run)):
        link = (
            Markup('<a href="{}">{}</a>').format(reports[name], name) if name in reports else name
        )
        means = fold.class_means or [math.nan] * len(run.classes)
        rows.append([link, f"{len(fold.dice)}", *map(number, (mean_without_nan(means), *means))])
    return Table("", ["fold", "validation cases", "mean Dice", *run.classes], rows)


def _validations(metrics: Sequence[dict[str, float]]) -> Table | None:
    if not metrics:
        return None
    known = [n for n in metrics[0] if n != "step" and any(not math.isnan(r[n]) for r in metrics)]
    shown = thinned(metrics, max(_OPEN_ROWS, _MOST_CELLS // (len(known) + 1)))
    rows = [
        [f"{row['step']:.0f}"]
        + [MISSING if math.isnan(row[name]) else f"{row[name]:.4g}" for name in known]
        for row in shown
    ]
    title = "Validations"
    if len(shown) < len(metrics):
        title += f" ({len(shown)} of {len(metrics)}; metrics.csv has all)"
    return Table(title, ["step", *(_NAMES.get(n, n.removeprefix("dice_")) for n in known)], rows)


def _classes(run: RunFiles, scores: Sequence[Score]) -> Table | None:
    """None where no Dice is known."""
    if run.dice:
        header = ["class", "mean Dice", "sd", "lowest", "highest", "cases with it"]
        surfaces = ["missed", "extra", "mean NSD", "mean HD95, mm", "median HD95, mm"]
        header += surfaces if scores else ["Dice 0"]
        rows = [_class_row(run.dice, i, name, scores) for i, name in enumerate(run.classes)]
        mean = mean_without_nan(run.class_means)
    else:
        last = run.metrics[-1] if run.metrics else {"mean_dice": math.nan}
        header = ["class", "mean Dice"]
        rows = [[name, number(last.get(f"dice_{name}", math.nan))] for name in run.classes]
        mean = last["mean_dice"]
        if math.isnan(mean):
            return None
    rows.append(["mean", number(mean), *[""] * (len(header) - 2)])
    return Table("", header, rows)


def _class_row(
    dice: dict[str, list[float]], index: int, name: str, scores: Sequence[Score]
) -> list[str]:
    known = [row[index] for row in dice.values() if not math.isnan(row[index])]
    spread = statistics.stdev(known) if len(known) > 1 else math.nan
    cells = [mean_without_nan(known), spread, *(f(known, default=math.nan) for f in (min, max))]
    row = [name, *map(number, cells), f"{len(known)} of {len(dice)}"]
    if not scores:
        return [*row, str(known.count(0) or "-")]
    own = [score for score in scores if score.structure == name]
    there = [score.surface_dice for score in own if score.outcome in (FOUND, MISSED)]
    found = [score.hd95 for score in own if score.outcome == FOUND]
    counts = [sum(score.outcome == outcome for score in own) for outcome in (MISSED, EXTRA)]
    surface = number(mean_without_nan(there))
    hd95 = [f"{f(found):.2f}" if found else MISSING for f in (mean_without_nan, statistics.median)]
    return [*row, *(str(count or "-") for count in counts), surface, *hd95]


def _case_tables(run: RunFiles, scores: Sequence[Score]) -> list[Table]:
    if not run.dice:
        return []
    means = run.case_means
    names, which = list(means), "each case"
    most = max(_OPEN_ROWS, _MOST_CELLS // (len(run.classes) + 2))
    if len(names) > most:
        lowest = set(sorted(names, key=lambda name: means[name])[:most])
        names = [name for name in names if name in lowest]
        which = f"the {most} cases with the lowest mean of {len(means)} (dice.csv has all)"
    rows = [[name, *map(number, (*run.dice[name], means[name]))] for name in names]
    header = ["case", *run.classes]
    tables = [Table(f"Dice of {which}", [*header, "mean"], rows, len(rows) <= _OPEN_ROWS)]
    if run.folds:
        tables[0].header.append("fold")
        for row in rows:
            row.append(run.fold_of[row[0]])
    by_case = {(score.case, score.structure): score for score in scores}
    columns = {"NSD": "surface_dice", "HD95 in mm": "hd95"}
    for title, column in columns.items() if scores else ():
        rows = [[n, *(_cell(by_case.get((n, c)), column) for c in run.classes)] for n in names]
        tables.append(Table(f"{title} of {which}", header, rows, open=False))
    return tables


def _cell(score: Score | None, column: str) -> str:
    """Outcomes other than found as words."""
    if score is None:  # of a class that the configuration does not have
        return MISSING
    return f"{getattr(score, column):.3f}" if score.outcome == FOUND else score.outcome


def _conditional(leep: Leep) -> Table:
    """P(y|z) with its margins, for the source classes with most of the mass, in their order."""
    mass = leep.source_frequencies
    shown = sorted(sorted(range(len(mass)), key=lambda z: -mass[z])[:_MOST_COLUMNS])
    title = "P(label | source class)"
    if rest := len(mass) - len(shown):
        left = _percent(max(0.0, 1 - sum(mass[z] for z in shown)))
        title += f": the {len(shown)} source classes with most mass are shown; "
        title += f"{rest} with {left} of it are left out"
    rows = [
        [name, *(f"{row[z]:.3g}" for z in shown), _percent(share)]
        for name, row, share in zip(
            leep.classes, leep.conditional, leep.class_frequencies, strict=True
        )
    ]
    rows.append(["of all mass", *(_percent(mass[z]) for z in shown), ""])
    names = [leep.source_classes[z] for z in shown]
    return Table(title, ["target class", *names, "of all voxels"], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _starts(starts: Sequence[dict[str, Any]]) -> Table | None:
    """What environment.json says, a column for each start of the run."""
    keys = dict.fromkeys(key for start in starts for key in start)
    rows = [[key, *(_said(key, start.get(key)) for start in starts)] for key in keys]
    header = ["start", "1", *(f"{i} (resumed)" for i in range(2, len(starts) + 1))]
    return Table("", header, rows) if starts else None


def _said(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {kind}" for kind, count in value.items())
    if isinstance(value, (int, float)) and key == "seconds":
        return duration(value)
    if isinstance(value, (int, float)) and key.endswith("_bytes"):
        return gib(value)
    return MISSING if value is None else str(value)


def _legend(run: RunFiles, results: CaseResults) -> dict[str, Any] | None:
    """Colours of the classes that are seen, of the errors, and of the weights."""
    shown = [case.panels for case in results.drawn if case.panels]
    present = sorted({i for panels in shown for i in panels.present})
    colours = class_colours(max(present, default=0) + 1)
    if not shown:
        return None
    return {
        "classes": [
            (run.classes[i - 1], to_hex(colours[i])) for i in present if i <= len(run.classes)
        ],
        "errors": [(_ERRORS.get(k, k), to_hex(colour)) for k, colour in ERROR_COLOURS.items()],
        "weights": [to_hex(shade, keep_alpha=True) for shade in RISK(np.linspace(0, 1, 9))]
        if any(panels.weights for panels in shown)
        else [],
    }
