"""`riskmap report`: one HTML file of a run, with what its files say and what is missing."""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex

from riskmap_ext.finetune.base.errors import ConfigError, one_line
from riskmap_ext.finetune.base.files import write_text
from riskmap_ext.finetune.base.log import MISSING, Log, gib, number
from riskmap_ext.finetune.folder.workspace import check_folder
from riskmap_ext.finetune.metrics.dice import known_dice, mean_without_nan
from riskmap_ext.finetune.metrics.surfaces import EXTRA, FOUND, MISSED, Score
from riskmap_ext.finetune.pictures.figures import ERROR_COLOURS, RISK
from riskmap_ext.finetune.pictures.slices import class_colours
from riskmap_ext.finetune.report.cases import TOLERANCE, CaseResults, read_results
from riskmap_ext.finetune.report.curves import run_charts, thinned
from riskmap_ext.finetune.report.page import duration, render
from riskmap_ext.finetune.report.read import Leep, RunFiles, read_run

REPORT_FILE = "report.html"
# Longer lists are collapsed.
_OPEN_ROWS = 12
# Larger tables would make the file large.
_MOST_CELLS = 12000
# Further source classes are only counted.
_MOST_COLUMNS = 30
_NAMES = {"train_loss": "loss", "mean_dice": "mean Dice", "lr": "learning rate"}
_ERRORS = {"missed": "missed (only in the label)", "extra": "extra (only in the prediction)"}


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    open: bool = True


def write_report(
    folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the report of the run or cross-validation in `folder`, finished or not.

    Returns: its path.

    output: default OUTPUT/report.html. The report says what the folder lacks (older runs, `write`
    keys that were false, images that have moved).

    Raises: InputError naming the folder that holds no run, or the file that is damaged or cannot be
        written.
    """
    folder = Path(folder)
    path = folder / REPORT_FILE if output is None else Path(output)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--output: expected a file name that ends in .html, got {path}")
    run = read_run(folder)
    start = path.absolute().parent
    check_folder("--output", start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from libraries; what matters is in the report
        content = run_page(run, read_results(run), start)
    write_text(path, content)
    return path


def report_at_end(folder: Path, log: Log) -> None:
    """Writes the report of a run that has just ended; its results are complete without it."""
    try:
        log(f"Report: {write_report(folder)}")
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        log.warn(f"{folder / REPORT_FILE} was not written ({reason})")


def run_page(run: RunFiles, results: CaseResults, start: Path = Path()) -> str:
    """start: the folder to which the links to the folds' reports are relative."""
    name = run.folder.resolve().name
    return render(
        "finetune/report/run.html.j2",
        title=f"riskmap: {name}",
        name=name,
        run=run,
        results=results,
        charts=run_charts(run.losses, run.metrics),
        validations=_validations(run.metrics),
        classes=_classes(run, results.scores),
        missed=[f"{s.structure} in {s.case}" for s in results.scores if s.outcome == MISSED],
        tolerance=f"{TOLERANCE:g}",
        legend=_legend(run, results),
        tables=_case_tables(run, results.scores),
        folds=_folds(run, start) if run.folds else None,
        conditional=_conditional(run.leep) if run.leep else None,
        starts=_starts(run.starts),
    )


def _folds(run: RunFiles, start: Path) -> Table:
    """Means over the cases of each fold, and of all."""
    rows = []
    for name, fold in (*run.folds.items(), ("all cases", run)):
        means = fold.class_means or [math.nan] * len(run.classes)
        report = fold.folder / REPORT_FILE
        if fold is not run and report.exists():
            link = Path(os.path.relpath(report, start)).as_posix()
            name = Markup('<a href="{}">{}</a>').format(link, name)
        rows.append([name, f"{len(fold.dice)}", *map(number, (mean_without_nan(means), *means))])
    return Table("", ["fold", "validation cases", "mean Dice", *run.classes], rows)


def _validations(metrics: Sequence[dict[str, float]]) -> Table | None:
    if not metrics:
        return None
    known = [n for n in metrics[0] if n != "step" and any(not math.isnan(r[n]) for r in metrics)]
    shown = thinned(metrics, max(_OPEN_ROWS, _MOST_CELLS // (len(known) + 1)))
    cells = ([MISSING if math.isnan(row[n]) else f"{row[n]:.4g}" for n in known] for row in shown)
    rows = [[f"{row['step']:.0f}", *each] for row, each in zip(shown, cells, strict=True)]
    title = "Validations"
    if len(shown) < len(metrics):
        title += f" ({len(shown)} of {len(metrics)}; metrics.csv has all)"
    return Table(title, ["step", *(_NAMES.get(n, n.removeprefix("dice_")) for n in known)], rows)


def _classes(run: RunFiles, scores: Sequence[Score]) -> Table | None:
    """None if no Dice is known."""
    if run.dice:
        header = ["class", "mean Dice", "sd", "lowest", "highest", "cases with it"]
        surfaces = ["missed", "extra", "mean NSD", "mean HD95, mm", "median HD95, mm"]
        header += surfaces if scores else ["Dice 0"]
        columns = known_dice(run.dice, len(run.classes))
        rows = [
            _class_row(name, dice, len(run.dice), scores)
            for name, dice in zip(run.classes, columns, strict=True)
        ]
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


def _class_row(name: str, dice: Sequence[float], cases: int, scores: Sequence[Score]) -> list[str]:
    """dice: of the cases whose label has the class."""
    spread = statistics.stdev(dice) if len(dice) > 1 else math.nan
    cells = mean_without_nan(dice), spread, *(f(dice, default=math.nan) for f in (min, max))
    row = [name, *map(number, cells), f"{len(dice)} of {cases}"]
    if not scores:
        return [*row, str(dice.count(0) or "-")]
    own = [score for score in scores if score.structure == name]
    there = [score.surface_dice for score in own if score.outcome in (FOUND, MISSED)]
    found = [score.hd95 for score in own if score.outcome == FOUND]
    counts = [sum(score.outcome == outcome for score in own) for outcome in (MISSED, EXTRA)]
    hd95 = [f"{f(found):.2f}" if found else MISSING for f in (mean_without_nan, statistics.median)]
    return [*row, *(str(n or "-") for n in counts), number(mean_without_nan(there)), *hd95]


def _case_tables(run: RunFiles, scores: Sequence[Score]) -> list[Table]:
    """Dice, NSD and HD95 of each case and class; outcomes other than found as words."""
    if not run.dice:
        return []
    means, which = run.case_means, "each case"
    names, folds = list(means), run.fold_of
    most = max(_OPEN_ROWS, _MOST_CELLS // (len(run.classes) + 2))
    if len(names) > most:
        lowest = set(sorted(names, key=lambda name: means[name])[:most])
        names = [name for name in names if name in lowest]
        which = f"the {most} cases with the lowest mean of {len(means)} (dice.csv has all)"
    header = ["case", *run.classes]
    rows = [[name, *map(number, (*run.dice[name], means[name]))] for name in names]
    if folds:
        rows = [[*row, folds[row[0]]] for row in rows]
    last = ["mean", "fold"] if folds else ["mean"]
    tables = [Table(f"Dice of {which}", [*header, *last], rows, len(rows) <= _OPEN_ROWS)]
    for title, column in (("NSD", "surface_dice"), ("HD95 in mm", "hd95")) if scores else ():
        cells = {
            (s.case, s.structure): f"{getattr(s, column):.3f}" if s.outcome == FOUND else s.outcome
            for s in scores
        }
        # A class that the configuration lacks is not scored.
        rows = [[n, *(cells.get((n, c), MISSING) for c in run.classes)] for n in names]
        tables.append(Table(f"{title} of {which}", header, rows, open=False))
    return tables


def _conditional(leep: Leep) -> Table:
    """P(y|z) with its margins, for the source classes with most of the mass, in their order."""
    mass = leep.source_frequencies
    shown = sorted(sorted(range(len(mass)), key=lambda z: -mass[z])[:_MOST_COLUMNS])
    title = "P(label | source class)"
    if rest := len(mass) - len(shown):
        left = f"{rest} with {_percent(max(0.0, 1 - sum(mass[z] for z in shown)))} of it"
        title += f": the {len(shown)} source classes with most mass are shown; {left} are left out"
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
    """Colours of the visible classes, of the errors, and of the weights."""
    shown = [case.panels for case in results.drawn if case.panels]
    present = sorted({i for panels in shown for i in panels.present})
    colours = class_colours(max(present, default=0) + 1)
    if not shown:
        return None
    return {
        "classes": [(n, to_hex(colours[i])) for i, n in enumerate(run.classes, 1) if i in present],
        "errors": [(_ERRORS.get(k, k), to_hex(colour)) for k, colour in ERROR_COLOURS.items()],
        "weights": any(panels.weights for panels in shown)
        and [to_hex(shade, keep_alpha=True) for shade in RISK(np.linspace(0, 1, 9))],
    }
